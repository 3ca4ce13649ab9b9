"""The benchmark: statistics, shape tables, and that no speed is printed whose check failed."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

pytest.importorskip("numpy", reason="the benchmark's requirements are not installed")

from bench import checks, instances, networks, report, schedule  # noqa: E402
from bench.attention import MeanCoordAtt, PlainCoordAtt, SqueezeExcite, parameter_count  # noqa: E402
from bench.cases import Case  # noqa: E402
from coordatt_fast import interleaved  # noqa: E402
from coordatt_fast.models import mobilenet_v2_ca  # noqa: E402


class Scripted:
    """A contestant whose every call takes a given time; advances a clock instead of waiting."""

    rest = 0.0

    def __init__(self, seconds):
        self.seconds = seconds
        self.runs = []

    def run(self, calls):
        self.runs.append(calls)
        return self.seconds * calls


def test_spread_is_median_and_percentiles():
    assert interleaved.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == interleaved.Spread(
        3.0, pytest.approx(1.4), pytest.approx(4.6)
    )
    assert interleaved.Spread.of([7.0]) == interleaved.Spread(7.0, 7.0, 7.0)


def test_speedup_is_taken_round_by_round():
    """A machine that slows down threefold in one round does not move a ratio."""
    race = interleaved.Race({"fast": [1.0, 3.0, 1.0], "slow": [4.0, 12.0, 4.0]})
    assert race.speedup("fast", over="slow") == interleaved.Spread(4.0, 4.0, 4.0)
    assert race.speedup("slow", over="fast").median == 0.25


def test_race_fills_blocks_and_interleaves():
    contestants = {"a": Scripted(0.001), "b": Scripted(0.5)}
    race = interleaved.race(contestants, rounds=6, block=0.01)
    assert race.calls["a"] >= 10 and race.calls["b"] == 1
    assert race.rounds == {"a": pytest.approx([0.001] * 6), "b": pytest.approx([0.5] * 6)}


def test_race_stops_when_time_is_spent_but_not_before_the_least_rounds():
    race = interleaved.race({"a": Scripted(0.001)}, rounds=1000, least_rounds=4, limit=0.0)
    assert len(race.rounds["a"]) == 4


@pytest.mark.parametrize(
    "name, blocks, millions",
    [
        ("mobilenetv2", 16, 1.90),
        ("mobilenext", 18, 1.87),
        ("mobilenext_first", 15, 1.57),
        ("efficientnet_b0", 16, 2.31),
        ("resnet50", 16, 5.52),
        ("yolov5s", 3, 1.43),
        ("yolov8n", 3, 0.72),
        ("yolox_s", 6, 1.43),
        ("memseg", 3, 0.92),
        ("ssdlite", 16, 3.88),
        ("deeplabv3_512", 16, 12.6),
        ("deeplabv3_512_os8", 16, 32.05),
        ("deeplabv3", 16, 25.2),
        ("deeplabv3_os8", 16, 64.1),
    ],
)
def test_networks_have_their_blocks(name, blocks, millions):
    """Number of CoordAtt blocks and the elements per image that pass through them."""
    instances = networks.find(name)
    assert len(instances) == blocks
    assert sum(instance.size for instance in instances) / 1e6 == pytest.approx(millions, rel=6e-3)
    assert sum(networks.distinct(instances).values()) == blocks


def test_width_multiplier_follows_the_papers_rounding():
    assert [i.channels for i in networks.find("mobilenetv2_0.75")] == [96] + [144] * 5 + [288] * 4 + [
        432
    ] * 3 + [720] * 3


def test_unknown_network_names_the_known_ones():
    with pytest.raises(ValueError, match="mobilenetv2"):
        networks.find("mobilenet9")


@pytest.mark.parametrize(
    "attention, millions", [(None, 3.50), (SqueezeExcite, 3.89), (lambda c: PlainCoordAtt(c, c), 3.95)]
)
def test_baselines_have_the_published_parameters(attention, millions):
    """Table 2 of the CoordAtt paper."""
    assert round(parameter_count(mobilenet_v2_ca(attention=attention)) / 1e6, 2) == millions


def test_the_two_baselines_are_the_same_function():
    case = Case((2, 48, 9, 5), "train", "float64")
    plain, x, g = case.plain(), case.tensor(1), case.tensor(2)
    mean = MeanCoordAtt(48, 48)
    mean.load_state_dict(plain.state_dict())
    found = checks.errors(checks.results(case.place(mean), mean, x, g), checks.truth(plain, x, g))
    assert max(found.values()) < 1e-13


class Broken(nn.Module):
    """CoordAtt that forgets one of its gates at one channel."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, x):
        out = self.plain(x).clone()
        out[:, 3] = x[:, 3]
        return out


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_failed_check_suppresses_the_speed(mode):
    case = Case((1, 16, 6, 5), mode)
    plain = case.plain()
    result = instances.measure(
        case, ["eager"], instances.Runtimes(1), schedule.QUICK.instance, lambda: (Broken(plain), plain)
    )
    result |= {"threads": 1, "pages": "plain", "order": 0}
    assert not result["checks"]["ours"]["passed"]
    assert result["seconds"] == {} and result["speedup"] == {}
    text = report.instance_tables([result])
    assert "WRONG" in text and "x (" not in text
    assert report.failures([result])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_one_wrong_block_fails_the_whole_networks_check(mode):
    for package in ("PIL", "sklearn"):
        pytest.importorskip(package)
    from bench import whole_network

    case = whole_network.NetworkCase(1, mode, size=64)
    models = whole_network.networks(case)
    assert whole_network.agreement(models, case)["passed"]
    block = models[whole_network.OURS].features[9].conv[6]
    block.conv_h, block.conv_w = block.conv_w, block.conv_h
    assert not whole_network.agreement(models, case)["passed"]


def test_nan_fails_the_check():
    nan = {"output": float("nan")}
    assert not checks.judge(nan, {"output": 0.0}, torch.float32, 2).passed


def test_fallback_is_said_loudly():
    plan = {"tier": "reference", "backend": "reference", "reason": "no compiled library"}
    (line,) = report.unfused([{"kind": "instance", "plan": plan}])
    assert "NOT THE FUSED KERNELS" in line and "no compiled library" in line


def test_large_outputs_are_measured_with_fresh_and_with_kept_pages():
    from bench.throughput import parse

    labs, _ = schedule.plan(parse(["--batch", "1", "32", "--no-photos", "--mode", "eval", "--threads", "2"]))
    shapes = {lab.pages: {tuple(job["case"]["shape"]) for job in lab.jobs} for lab in labs}
    assert shapes["fresh"] == shapes["kept"] == {(32, 96, 56, 56), (32, 144, 56, 56), (32, 192, 28, 28)}
    assert (1, 96, 56, 56) in shapes["plain"] and (32, 96, 56, 56) not in shapes["plain"]


def test_quick_run_writes_its_files(tmp_path, capsys):
    for package in ("matplotlib", "PIL", "sklearn"):
        pytest.importorskip(package)
    from bench.throughput import main

    assert main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "ALL CHECKS PASSED" in capsys.readouterr().out
    document = json.loads((tmp_path / "results.json").read_text())
    assert {result["kind"] for result in document["results"]} == {"network", "instance"}
    assert document["machine"]["cores"] >= 1
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {row["contestant"] for row in rows} == {"ours", "eager", "clone"}
    assert all(float(row["median_s"]) > 0 for row in rows)
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_probe_prints_its_times(capsys):
    from bench import probe

    probe.main(["--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "channels" in line] == [str(c) for c in probe.CHANNELS]
