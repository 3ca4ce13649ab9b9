"""The command line as a user meets it: info, bench and verify, their output and exit status."""

import copy
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances
import torch
from paper import PaperCoordAtt

import coordatt_fast
from coordatt_fast import interleaved, side_by_side
from coordatt_fast.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
MODELS = '''
import math
import os
import sys

import torch
from torch import nn
from paper import PaperCoordAtt


class Small(nn.Module):
    def __init__(self, block=PaperCoordAtt):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.attention = block(16, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        maps = self.attention(self.stem(x))
        return {"maps": [self.head(maps)], "names": "four"}


class CoordAttThenConv(PaperCoordAtt):
    def __init__(self, inp, oup):
        super().__init__(inp, oup)
        self.conv = nn.Conv2d(oup, oup, 3, padding=1)

    def forward(self, x):
        return self.conv(super().forward(x))


def both():
    torch.manual_seed(0)
    return nn.ModuleDict({"net": Small(), "other": Small(CoordAttThenConv)}).net


def two_kinds():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), PaperCoordAtt(8, 8), CoordAttThenConv(8, 8), nn.BatchNorm2d(8))


def asleep():
    net = two_kinds()
    nn.init.zeros_(net[3].weight)
    nn.init.zeros_(net[3].bias)
    return net


class LooksAtClasses(Small):
    """The network, not the block, does something else where the block's class is another."""

    def forward(self, x):
        known = all(type(m).__module__ != "coordatt_fast.accelerate" for m in self.modules())
        return super().forward(x if known else 2 * x)


def looks_at_classes():
    return LooksAtClasses(PaperCoordAtt)


def drops():
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5), PaperCoordAtt(8, 8))


def without():
    return nn.Sequential(nn.Conv2d(3, 8, 1))


def squeeze():
    return nn.Sequential(nn.Conv2d(3, 8, 1), CoordAttThenConv(8, 8))


def no_tensor():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = PaperCoordAtt(3, 3)

        def forward(self, x):
            self.block(x)
            return "done"

    return Silent()


def raises():
    raise OSError("the weights are elsewhere")


def needs(width):
    return Small()


def number():
    return 3


def leaves():
    sys.exit(0)


def leaves_with_words():
    sys.exit("no licence")


def recursive():
    return recursive()


def closes():
    sys.stdout.close()
    return two_kinds()


class LeavesInForward(PaperCoordAtt):
    def forward(self, x):
        sys.exit(0)


class OnlyWithGradients(Small):
    def forward(self, x):
        if torch.is_inference_mode_enabled():
            raise RuntimeError("not like this")
        return super().forward(x)


class Outside(Small):
    def forward(self, x):
        sys.exit(0)


class Masked(Small):
    """Infinities and NaN in its outputs, as masks leave them."""

    def forward(self, x):
        maps = self.attention(self.stem(x))
        masked = maps.masked_fill(maps > 0.5, -math.inf)
        return masked, masked.detach().exp().log() * 0, maps


def leaves_when_tried():
    return nn.Sequential(nn.Conv2d(3, 8, 1), LeavesInForward(8, 8))


def without_gradients():
    torch.set_grad_enabled(False)
    return two_kinds()


def forks():
    sys.stdout.flush()
    os.fork()
    return two_kinds()


def lazy():
    return nn.Sequential(nn.LazyConv2d(8, 1), PaperCoordAtt(8, 8))


def interrupts():
    raise KeyboardInterrupt


class Guarded:
    def __getattr__(self, name):
        raise RuntimeError("closed")


guarded = Guarded()
instance = two_kinds()
width = 8
'''


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with a user's my_models.py, which is the current one."""
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    yield tmp_path
    sys.modules.pop("my_models", None)


def run(*arguments, cwd=ROOT):
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "coordatt_fast", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | path, capture_output=True, text=True, timeout=300
    )


def errors_in(printed):
    """(mode, group, dtype) to the error and the bound printed."""
    number = r"(\d\.\de[+-]\d\d|inf)"
    row = rf"^  (eval|training) +(outputs|gradients|statistics) +(float32|float64|bfloat16) +{number} .* {number}  (ok|NOT)"
    return {m.groups()[:3]: (float(m[4]), float(m[5]), m[6]) for m in re.finditer(row, printed, re.M)}


# info ----------------------------------------------------------------------------------------------


def test_info_is_what_no_command_prints():
    plain, info = run(), run("info")
    assert plain.returncode == info.returncode == 0, plain.stderr + info.stderr
    assert plain.stdout == info.stdout and coordatt_fast.__version__ in info.stdout


def test_help_names_the_commands():
    result = run("--help")
    assert result.returncode == 0
    for word in ("info", "bench", "verify"):
        assert word in result.stdout


# bench ---------------------------------------------------------------------------------------------


def test_bench():
    result = run("bench", "--shape", "2,16,9,7", "--rounds", "3", "--threads", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    found = errors_in(result.stdout)
    assert len(found) == 8 and all(error <= bound and ok == "ok" for error, bound, ok in found.values())
    assert len(re.findall(r"[\d.]+ times as fast \([\d.]+ to [\d.]+\)", result.stdout)) == 2
    assert "1 thread," in result.stdout and "make bench" in result.stdout


@pytest.mark.parametrize("flag, mode", [("--eval", "eval"), ("--train", "training")])
def test_bench_in_one_mode(flag, mode, capsys):
    options = ["--dtype", "bfloat16", "--channels-last", "--rounds", "1"]
    assert main(["bench", "--shape", "1,8,5,6", flag, *options]) == 0
    printed = capsys.readouterr().out
    assert {key[0] for key in errors_in(printed)} == {mode}
    assert printed.count("times as fast") == 1 and "1 x 8 x 5 x 6 bfloat16 channels_last" in printed


def test_bench_prints_no_speed_of_wrong_results(monkeypatch, capsys):
    correct = coordatt_fast.CoordAtt.forward
    monkeypatch.setattr(coordatt_fast.CoordAtt, "forward", lambda self, x: correct(self, x) * (1 + 1e-5))
    assert main(["bench", "--shape", "1,8,5,6", "--rounds", "1"]) == 1
    printed = capsys.readouterr().out
    assert "NOT within" in printed and "times as fast" not in printed


# verify --------------------------------------------------------------------------------------------


def test_verify(models):
    result = run("verify", "my_models:two_kinds", "--input", "2,3,12,9", "--rounds", "3", cwd=models)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1  PaperCoordAtt: fused" in result.stdout
    assert "2  CoordAttThenConv: left alone, conv is a 3 x 3 convolution" in result.stdout
    found = errors_in(result.stdout)
    assert len(found) == 8 and all(error <= bound and ok == "ok" for error, bound, ok in found.values())
    for key, (error, bound, _) in found.items():
        assert error < (1e-11 if "float64" in key else 1e-5) <= bound * 1e3, key
    assert result.stdout.count("times as fast") == 2


@pytest.mark.parametrize("factory", ["both", "instance", "drops"])
def test_verify_takes(factory, models, capsys):
    """Outputs in a dict and a list, a model in place of a function, random numbers in training."""
    arguments = ["verify", f"my_models:{factory}", "--input", "2,3,12,9", "--rounds", "1", "--threads", "1"]
    assert main(arguments) == 0
    assert "1 modules accelerated" not in (printed := capsys.readouterr().out)
    assert "1 module accelerated" in printed


def test_verify_leaves_the_model_alone(models):
    import my_models

    before = copy.deepcopy(my_models.instance.state_dict())
    assert main(["verify", "my_models:instance", "--input", "2,3,12,9", "--rounds", "1"]) == 0
    assert type(my_models.instance[1]) is PaperCoordAtt and all(p.grad is None for p in my_models.instance.parameters())
    for name, value in my_models.instance.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_verify_sees_through_weights_of_zero(models, capsys):
    """As networks start whose last normalisation is zero: nothing would reach the outputs."""
    assert main(["verify", "my_models:asleep", "--input", "2,3,12,9", "--train", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "weights of 1 normalisations were zero" in printed
    assert all(error > 0 for error, _, _ in errors_in(printed).values())


def test_verify_fails_for_another_function(models):
    result = run("verify", "my_models:looks_at_classes", "--input", "2,3,8,24", cwd=models)
    assert result.returncode == 1, result.stdout + result.stderr
    assert errors_in(result.stdout)["eval", "outputs", "float64"][2] == "NOT"
    assert "times as fast" not in result.stdout


@pytest.mark.parametrize(
    "factory, words",
    [("without", "0 left alone"), ("squeeze", "3 x 3 convolution"), ("leaves_when_tried", "its forward uses sys")],
)
def test_verify_of_nothing(factory, words, models, capsys):
    assert main(["verify", f"my_models:{factory}"]) == 1
    printed = capsys.readouterr().out
    assert "nothing was accelerated" in printed and words in printed


WRONG = {
    "no colon": (["my_models"], ["'my_models'", "module:factory"]),
    "no module": (["my_modells:two_kinds"], ["my_modells", "ModuleNotFoundError", "current folder"]),
    "no factory": (["my_models:two_kind"], ["two_kind", "two_kinds"]),
    "no function": (["my_models:width"], ["'my_models:width' is a int", "a function that returns the model"]),
    "factory with arguments": (["my_models:needs"], ["TypeError", "needs no arguments"]),
    "factory that raises": (["my_models:raises"], ["OSError: the weights are elsewhere"]),
    "no model": (["my_models:number"], ["returns a int", "nn.Module"]),
    "no tensor": (["my_models:no_tensor", "--input", "1,3,8,8"], ["a str, holds no floating-point tensor"]),
    "channels": (["my_models:two_kinds", "--input", "1,4,8,8"], ["--input 1,4,8,8", "RuntimeError", "sizes that it takes"]),
    "words": (["my_models:two_kinds", "--input", "1,3,a"], ["--input", "'1,3,a'", "positive integers"]),
    "zero": (["my_models:two_kinds", "--input", "1,3,0,8"], ["--input", "'1,3,0,8'", "positive integers"]),
    "threads": (["my_models:two_kinds", "--threads", "0"], ["--threads", "'0'", "a positive integer"]),
    "two modes": (["my_models:two_kinds", "--train", "--eval"], ["--train", "--eval"]),
    "many threads": (["my_models:two_kinds", "--threads", "100000"], ["--threads", "'100000'", "up to 256"]),
    "endless rounds": (["my_models:two_kinds", "--rounds", "9" * 5000], ["--rounds", "a positive integer up to"]),
    "larger than memory": (["my_models:two_kinds", "--input", "1,3,900000,900000"], ["--input 1,3,900000,900000", "this machine has"]),
    "larger than numbers": (["my_models:two_kinds", "--input", "9" * 30], ["--input", "positive integers"]),
    "many dimensions": (["my_models:two_kinds", "--input", ",".join("1" * 70)], ["--input 1,1,1", "RuntimeError"]),
    "factory that exits": (["my_models:leaves"], ["'my_models:leaves'", "SystemExit: 0", "returns the model"]),
    "factory that exits with words": (["my_models:leaves_with_words"], ["SystemExit: no licence"]),
    "factory without end": (["my_models:recursive"], ["'my_models:recursive'", "RecursionError"]),
    "exit": (["sys:exit"], ["'sys:exit'", "SystemExit"]),
    "model that exits": (["my_models:Outside", "--input", "1,3,8,8"], ["--input 1,3,8,8", "eval mode", "SystemExit: 0"]),
    "model that cannot be measured": (["my_models:OnlyWithGradients", "--input", "1,3,8,8", "--eval"], ["'my_models:OnlyWithGradients'", "measuring it in eval mode", "not like this"]),
    "lazy": (["my_models:lazy"], ["'my_models:lazy'", "uninitialized parameter"]),
    "attribute that raises": (["my_models:guarded.make"], ["looking for make", "RuntimeError: closed"]),
    "relative": (["..:make"], ["'..:make'", "TypeError"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_verify_names_what_is_wrong(case, models, capsys):
    arguments, words = WRONG[case]
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *arguments])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(word in message for word in words), message


def test_wrong_shape_and_command(capsys):
    for arguments, word in (
        (["bench", "--shape", "8,96,56"], "4 positive integers"),
        (["bench", "--shape", "1,8,900000,900000"], "argument --shape 1,8,900000,900000: takes"),
        (["bench", "--shape", "1,9000000,1,1"], "argument --shape 1,9000000,1,1: takes"),
        (["bench", "--threads", "100000"], "argument --threads: '100000'"),
        (["mend"], "'mend'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize("command", [["bench", "--shape", "1,8,5,6"], ["verify", "my_models:two_kinds"]])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_that_cannot_run_here(name, command, models, capsys):
    with coordatt_fast.use_backend(name), pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert f"COORDATT_FAST_BACKEND={name}: " in capsys.readouterr().err.splitlines()[-1]


def test_interrupted(models, capsys):
    assert main(["verify", "my_models:interrupts"]) == 130
    assert capsys.readouterr().err == "coordatt-fast: interrupted\n"


def test_a_factory_that_leaves_its_mark(models, capsys):
    """Gradients switched off; infinities and NaN that both models have are no difference."""
    options = ["--input", "2,3,8,9", "--rounds", "1"]
    with torch.enable_grad():
        assert main(["verify", "my_models:without_gradients", *options]) == 0
    assert main(["verify", "my_models:Masked", *options]) == 0
    assert capsys.readouterr().out.count("times as fast") == 4


def test_a_factory_that_closes_the_output(models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "my_models:closes"])
    assert stopped.value.code == 2 and "closed the standard output" in capsys.readouterr().err


def test_a_factory_that_forks(models):
    result = run("verify", "my_models:forks", "--input", "1,3,8,8", "--eval", "--rounds", "1", cwd=models)
    assert result.returncode == 0 and result.stdout.count("times as fast") == 1, result.stderr
    assert "'my_models:forks': calling it started a second process" in result.stderr


def test_a_reader_that_leaves(models):
    """As head does: no traceback."""
    command = [sys.executable, "-u", "-m", "coordatt_fast", "info"]
    reading, writing = os.pipe()
    os.close(reading)
    path = {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, env=os.environ | path, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writing)
    assert result.returncode == 141 and not result.stderr, result.stderr


def test_wrong_arguments_in_a_process_of_its_own(models):
    result = run("verify", "my_models", cwd=models)
    assert result.returncode == 2 and "argument module:factory: 'my_models'" in result.stderr
    assert "Traceback" not in result.stderr


# What they compute with ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_baseline_is_the_papers_block(training):
    theirs = PaperCoordAtt(24, 24)
    baseline = side_by_side.Published(24)
    baseline.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 24, 7, 5, dtype=torch.float64)
    found, truth = (side_by_side.results(m, x, training) for m in (baseline, theirs))
    assert found.keys() == truth.keys()
    for group in truth:
        assert all(error < tolerances.FORMULAS_AGREE for error in side_by_side._errors(found[group], truth[group]).values())


class GradientsOff(side_by_side.Published):
    """The same output, other gradients."""

    def forward(self, x):
        out = super().forward(x)
        return out + 1e-6 * (out.detach() - out)


@pytest.mark.parametrize(
    "change, group",
    [
        (lambda m: m.conv_h.weight.data.mul_(1 + 1e-6), "outputs"),
        (lambda m: setattr(m.bn1, "momentum", 0.1 + 1e-6), "statistics"),
        (lambda m: setattr(m, "__class__", GradientsOff), "gradients"),
        (lambda m: m.conv_w.bias.data.fill_(math.nan), "outputs"),
        (lambda m: m.requires_grad_(False).conv1.weight.requires_grad_(), "gradients"),
    ],
    ids=["weight", "momentum", "gradient", "NaN", "no gradients"],
)
def test_differences_see(change, group):
    torch.manual_seed(0)
    original = side_by_side.Published(16)
    other = copy.deepcopy(original)
    change(other)
    rows = side_by_side.differences(original, other, torch.randn(2, 16, 6, 5), True)
    exact = {row.group: row for row in rows if row.dtype is torch.float64}
    assert not exact[group].within, rows


def test_differences_of_the_same_model_are_none():
    model, x = side_by_side.Published(16), torch.randn(2, 16, 6, 5)
    for training in (False, True):
        rows = side_by_side.differences(model, copy.deepcopy(model), x, training)
        assert all(row.within and (row.error == 0 or row.dtype is torch.float32) for row in rows)
        assert len(rows) == (6 if training else 2)


class Clock:
    """Time that passes in calls only."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def call(self, name, seconds):
        def call():
            self.order.append(name)
            self.now += seconds

        return call


@pytest.mark.parametrize("seconds", [0.5, 0.01, 1e-4])
def test_race_measures_in_turn(seconds, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: clock.now)
    calls = clock.call("first", 4 * seconds), clock.call("second", seconds)
    speed = side_by_side.race(*calls, rounds=20, limit=math.inf)
    assert speed.rounds == 20 and speed.first == pytest.approx(4 * seconds)
    assert speed.low == pytest.approx(4) == speed.high
    runs = [name for i, name in enumerate(clock.order) if i == 0 or clock.order[i - 1] != name]
    assert len(runs) > 20
    assert side_by_side.race(*calls, rounds=20, limit=0.0).rounds == 3


def test_passes_leave_no_gradients():
    model, x = side_by_side.Published(8), torch.randn(1, 8, 4, 5)
    for training in (False, True):
        side_by_side.pass_of(model, x, training, of_x=True)()
        assert model.training is training and x.grad is None
        assert all(p.grad is None for p in model.parameters())
