"""The command line: coordatt-fast, or python -m coordatt_fast, with info, bench or verify."""

import argparse
import contextlib
import copy
import difflib
import importlib
import io
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import nn

import coordatt_fast
from coordatt_fast import library, plan, side_by_side
from coordatt_fast.backends import choice

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
MODES = {False: "eval", True: "training"}


MOST_THREADS = 256  # where the system has no more, the process would end


class Wrong(Exception):
    """What the user gave cannot be used; the message names the argument or variable, its value, and what
    would be right."""


def said(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    return type(error).__name__ + (f": {text[:300]}" if text else "")


@contextlib.contextmanager
def blamed_on(what: str, right: str) -> Iterator[None]:
    """An exception within, exits too, becomes a Wrong: what raised it and what would be right."""
    try:
        yield
    except (Wrong, BrokenPipeError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Wrong(f"{what} raised {said(error)}; expected {right}") from error


# Arguments -----------------------------------------------------------------------------------------


def sizes(text: str, count: int | None = None) -> tuple[int, ...]:
    example = "8,96,56,56" if count else "1,3,224,224"
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.isdecimal() and len(part) < 19]
    if len(numbers) != (count or len(parts)) or len(parts) != len(numbers) or min(numbers) < 1:
        many = f"{count} positive integers" if count else "positive integers"
        raise argparse.ArgumentTypeError(f"{text!r}, expected {many} separated by commas, as in {example}")
    return tuple(numbers)


def feature_map(text: str) -> tuple[int, ...]:
    return sizes(text, 4)


def positive(text: str, most: int = 10**9) -> int:
    if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive integer up to {most}")
    return int(text)


def threads(text: str) -> int:
    return positive(text, MOST_THREADS)


BENCH = """Checks CoordAtt against plain PyTorch at one shape, then measures the two in turn. A short look:
whole networks, torch.compile, onnxruntime and OpenVINO are in the repository's benchmark (make bench)."""

VERIFY = """Builds your model, accelerates a copy of it, and reports what was replaced, how far outputs,
gradients and statistics are from the original's in float64 (beside the original's own in float32), and the
speed of both. Exit status: 0 when all of it is within the bounds, 1 when it is not or when nothing was
accelerated, 2 when an argument cannot be used."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="coordatt-fast",
        description="Fused Coordinate Attention: what runs here, how fast, and whether it fits your model.",
    )
    commands = top.add_subparsers(dest="command", metavar="info | bench | verify")
    commands.add_parser("info", help="versions, backends with reasons, SIMD level; the same as no command")
    bench = commands.add_parser("bench", help="the block against plain PyTorch", description=BENCH)
    add = bench.add_argument
    add("--shape", type=feature_map, default=(8, 96, 56, 56), metavar="N,C,H,W", help="default 8,96,56,56")
    add("--dtype", choices=DTYPES, default="float32", help="default float32")
    add("--channels-last", action="store_true", help="memory format of x and the weights")
    verify = commands.add_parser("verify", help="your model, accelerated and not", description=VERIFY)
    add = verify.add_argument
    add("model", metavar="module:factory", help="what returns the model when called, or is it")
    add("--input", type=sizes, default=(1, 3, 224, 224), metavar="SIZES", help="default 1,3,224,224; float32")
    for command in (bench, verify):
        mode = command.add_mutually_exclusive_group()
        mode.add_argument("--eval", action="store_true", help="inference only (default: both)")
        mode.add_argument("--train", action="store_true", help="training only: forward and backward")
        command.add_argument("--threads", type=threads, help="of PyTorch (default: its own choice)")
        command.add_argument("--rounds", type=positive, default=15, help="of the measurement (default 15)")
    return top


def must_fit(argument: str, given: tuple[int, ...], count: int) -> None:
    """Wrong where count numbers in float64 are more than the machine has memory."""
    if not hasattr(os, "sysconf"):  # Windows: PyTorch will say it
        return
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 8 * count > have:
        takes = f"takes {8 * count / 1e9:.3g} GB in float64, this machine has {have / 1e9:.3g} GB"
        raise Wrong(f"argument {argument} {','.join(map(str, given))}: {takes}; expected smaller sizes")


def must_run_on_cpu() -> None:
    """Wrong where COORDATT_FAST_BACKEND chose a backend that cannot run what is measured here."""
    try:
        plan.obstacle(torch.empty(1, 1, 1, 1, device="cpu"))
    except RuntimeError as error:
        why = f"{error}; bench and verify run on the CPU, expected auto, cpu or reference"
        raise Wrong(f"COORDATT_FAST_BACKEND={choice.name}: {why}") from error


def modes(arguments: argparse.Namespace) -> list[bool]:
    """Training or not, for each mode that was asked for."""
    return [training for training in (False, True) if not (arguments.eval if training else arguments.train)]


# Output --------------------------------------------------------------------------------------------


def times(numbers) -> str:
    return " x ".join(map(str, numbers))


def show_errors(original: str, rows: dict[str, list[side_by_side.Difference]]) -> bool:
    print(f"errors against {original} in float64: root mean square over the truth's, in the worst tensor")
    print(f"  {'':31}  ours     {original}  allowed")
    good = True
    for mode, differences in rows.items():
        for row in differences:
            dtype = str(row.dtype).removeprefix("torch.")
            own = f"{row.original:.1e}" if row.dtype is not torch.float64 else "the truth"
            verdict = f"ok, {row.tensor}" if row.within else f"NOT within, {row.tensor}"
            print(
                f"  {mode:<8}  {row.group:<10}  {dtype:<9}  {row.error:.1e}  {own:<{len(original)}}  "
                f"{row.allowed:.1e}  {verdict}"
            )
            good &= row.within
    if not good:
        print("the results do not agree, so nothing was measured")
    return good


def show_speed(mode: str, first: str, second: str, speed: side_by_side.Speed) -> None:
    print(
        f"  {mode:<8}  {first} {speed.first * 1e3:.3g} ms, {second} {speed.second * 1e3:.3g} ms: "
        f"{speed.ratio:.2f} times as fast ({speed.low:.2f} to {speed.high:.2f})"
    )


def show_how_measured(arguments: argparse.Namespace) -> None:
    threads = torch.get_num_threads()
    print(
        f"speed: {threads} thread{'s' * (threads > 1)}, up to {arguments.rounds} rounds that measure both; "
        "median of their ratios (10th to 90th percentile)"
    )


# Commands ------------------------------------------------------------------------------------------


def info(arguments: argparse.Namespace) -> int:
    found = library.load()
    print(f"coordatt_fast {coordatt_fast.__version__}")
    print(f"torch         {torch.__version__}")
    print(f"python        {platform.python_version()} on {sys.platform}-{platform.machine()}")
    print(f"threads       {torch.get_num_threads()}")
    print("backends")
    for name, backend in coordatt_fast.backends().items():
        print(f"  {name:<10}  {'yes' if backend.available else 'no ':<3}  {backend.reason}")
    print(f"chosen        {choice.name}")
    if found.loaded:
        print(f"SIMD level    {torch.ops.coordatt_fast.simd_level()}")
        print(f"build         {torch.ops.coordatt_fast.build_info()}")
    elif found.build:
        print(f"build         {json.dumps(found.build)}")
    print(f"library       {found.path}{'' if found.loaded else ' (not loaded)'}")
    return 0


def bench(arguments: argparse.Namespace) -> int:
    must_run_on_cpu()
    _, channels, *_ = arguments.shape
    must_fit("--shape", arguments.shape, math.prod(arguments.shape) + 3 * channels * max(8, channels // 32))
    with blamed_on(f"argument --shape {','.join(map(str, arguments.shape))}: it", "smaller sizes"):
        return measure_block(arguments)


def measure_block(arguments: argparse.Namespace) -> int:
    dtype = DTYPES[arguments.dtype]
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    x = torch.randn(arguments.shape).to(dtype).contiguous(memory_format=layout)
    plain = side_by_side.Published(x.shape[1])
    with torch.no_grad():  # statistics and weights that a skipped normalisation would show in
        for tensor in (plain.bn1.weight, plain.bn1.running_var):
            tensor.uniform_(0.5, 1.5)
        plain.bn1.running_mean.uniform_(-0.2, 0.2)
    plain.to(dtype, memory_format=layout)
    ours = coordatt_fast.CoordAtt(x.shape[1], x.shape[1]).to(dtype, memory_format=layout)
    ours.load_state_dict(plain.state_dict())
    print(f"x {times(x.shape)} {arguments.dtype} {'channels_last' if arguments.channels_last else 'nchw'}")
    for training in modes(arguments):
        with torch.set_grad_enabled(training):
            way = coordatt_fast.explain(ours.train(training), x)
        print(f"  {MODES[training]:<8}  {str(way).splitlines()[0]}")
    floors = dict.fromkeys(side_by_side.FLOORS, max(2e-6, torch.finfo(dtype).eps))
    rows = {MODES[t]: side_by_side.differences(plain, ours, x, t, floors) for t in modes(arguments)}
    if not show_errors("plain PyTorch", rows):
        return 1
    show_how_measured(arguments)
    for training in modes(arguments):
        calls = [side_by_side.pass_of(module, x, training, of_x=True) for module in (plain, ours)]
        speed = side_by_side.race(*calls, rounds=arguments.rounds)
        show_speed(MODES[training], "plain PyTorch", "ours", speed)
    print("a short look; the repository's benchmark (make bench) measures networks and more rivals")
    return 0


def build(text: str) -> nn.Module:
    """The model that "module:factory" names; Wrong where there is none."""
    about, process = f"argument module:factory: {text!r}", os.getpid()
    module, colon, path = text.partition(":")
    if not (module and colon and path):
        raise Wrong(f"{about}, expected module:factory, as in my_models.small:make_network")
    sys.path.insert(0, os.getcwd())  # the console script's own folder is there instead
    right = "a module that is installed, or a file below the current folder"
    with blamed_on(f"{about}: importing {module!r}", right):
        found = importlib.import_module(module)
    for name in path.split("."):
        with blamed_on(f"{about}: looking for {name}", "a function that returns the model"):
            if not hasattr(found, name):
                have = [n for n in dir(found) if not n.startswith("_")]
                similar = ", ".join(difflib.get_close_matches(name, have, 3) or have[:8])
                raise Wrong(f"{about}: there is no {name}, expected one of its names, such as {similar}")
            found = getattr(found, name)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise Wrong(f"{about} is a {type(found).__name__}, expected a function that returns the model")
    with blamed_on(f"{about}: calling it", "a function that returns the model and needs no arguments"):
        model = found()
    if os.getpid() != process:
        raise Wrong(f"{about}: calling it started a second process that returned too, expected one model")
    if sys.stdout is None or sys.stdout.closed:
        raise Wrong(f"{about}: calling it closed the standard output, which the report goes to")
    if not isinstance(model, nn.Module):
        raise Wrong(f"{about} returns a {type(model).__name__}, expected an nn.Module")
    return model


def verify(arguments: argparse.Namespace) -> int:
    must_run_on_cpu()
    must_fit("--input", arguments.input, math.prod(arguments.input))
    given, about = build(arguments.model), f"argument module:factory: {arguments.model!r}"
    torch.set_grad_enabled(True)  # whatever building the model left behind
    with blamed_on(f"{about}: copying the model", "one that copy.deepcopy copies"):
        original = copy.deepcopy(given).cpu().float()
        coordatt_fast.restore(original)
        torch.manual_seed(0)
        drawn = side_by_side.awake(original)
        ours = copy.deepcopy(original)
        count = sum(p.numel() for p in original.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report says it
        with blamed_on(f"{about}: accelerating it", "a model whose modules can be called for a trial"):
            report = coordatt_fast.accelerate(ours)
    print(f"{arguments.model}: {type(original).__name__}, {count:,} parameters")
    print(report)
    if not report.replaced:
        print("nothing was accelerated, so there is nothing to compare")
        return 1
    cpu = coordatt_fast.backends()["cpu"]
    print(f"compiled kernels: {'yes' if cpu.available else 'no'}, {cpu.reason}")

    sizes = f"argument --input {','.join(map(str, arguments.input))}"
    with blamed_on(f"{sizes}: it", "sizes that PyTorch takes"):
        numbers = torch.Generator().manual_seed(0)
        x = torch.randn(arguments.input, generator=numbers, dtype=torch.float32, device="cpu")
    if drawn:
        print(f"weights of {drawn} normalisations were zero, which hides the blocks: drawn at random")
    rows = {}
    right = "sizes that it takes, also in float64 (--eval or --train for one mode)"
    for training in modes(arguments):
        with blamed_on(f"{sizes}: in {MODES[training]} mode the model", right):
            rows[MODES[training]] = side_by_side.differences(original, ours, x, training)
    print(f"input {times(x.shape)}")
    if not show_errors("the original", rows):
        return 1
    show_how_measured(arguments)
    for training in modes(arguments):
        right = "a model that can be called again and again"
        with blamed_on(f"{about}: measuring it in {MODES[training]} mode", right):
            calls = [side_by_side.pass_of(model, x, training) for model in (original, ours)]
            speed = side_by_side.race(*calls, rounds=arguments.rounds)
        show_speed(MODES[training], "original", "accelerated", speed)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status (argparse itself exits with 2 for wrong arguments)."""
    for stream in (sys.stdout, sys.stderr):  # names that the terminal's encoding does not have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    top = parser()
    arguments = top.parse_args(argv)
    if getattr(arguments, "threads", None):
        torch.set_num_threads(arguments.threads)
    command = {"bench": bench, "verify": verify}.get(arguments.command, info)
    try:
        status = command(arguments)
        sys.stdout.flush()
        return status
    except Wrong as wrong:
        top.error(str(wrong))
    except BrokenPipeError:  # of head, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("coordatt-fast: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
