"""The command line: coordatt-fast, or python -m coordatt_fast, with info, bench or verify."""

import argparse
import copy
import difflib
import importlib
import io
import json
import os
import platform
import sys
import warnings

import torch
from torch import nn

import coordatt_fast
from coordatt_fast import library, side_by_side
from coordatt_fast.backends import choice

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
MODES = {False: "eval", True: "training"}


class Wrong(Exception):
    """What the user gave cannot be used; the message says what it is and what would be right."""


# Arguments -----------------------------------------------------------------------------------------


def sizes(text: str, count: int | None = None) -> tuple[int, ...]:
    example = "8,96,56,56" if count else "1,3,224,224"
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.isdecimal()]
    if len(numbers) != (count or len(parts)) or len(parts) != len(numbers) or min(numbers) < 1:
        many = f"{count} positive integers" if count else "positive integers"
        raise argparse.ArgumentTypeError(f"{text!r}, expected {many} separated by commas, as in {example}")
    return tuple(numbers)


def feature_map(text: str) -> tuple[int, ...]:
    return sizes(text, 4)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive integer")
    return int(text)


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
        command.add_argument("--threads", type=positive, help="of PyTorch (default: its own choice)")
        command.add_argument("--rounds", type=positive, default=15, help="of the measurement (default 15)")
    return top


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
            plan = coordatt_fast.explain(ours.train(training), x)
        print(f"  {MODES[training]:<8}  {str(plan).splitlines()[0]}")
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
    module, colon, path = text.partition(":")
    if not (module and colon and path):
        raise Wrong(f"{text!r}, expected module:factory, as in my_models.small:make_network")
    sys.path.insert(0, os.getcwd())  # the console script's own folder is there instead
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise Wrong(
            f"{text!r}: importing {module} raised {type(error).__name__}: {error}; expected a module that is "
            "installed, or a file below the current folder"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            have = [n for n in dir(found) if not n.startswith("_")]
            similar = ", ".join(difflib.get_close_matches(name, have, 3) or have[:8])
            raise Wrong(f"{text!r}: there is no {name}, expected one of its names, such as {similar}")
        found = getattr(found, name)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise Wrong(f"{text!r} is a {type(found).__name__}, expected a function that returns the model")
    try:
        model = found()
    except Exception as error:
        raise Wrong(
            f"{text!r}: calling it raised {type(error).__name__}: {error}; expected a function that needs no "
            "arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise Wrong(f"{text!r} returns a {type(model).__name__}, expected an nn.Module")
    return model


def verify(arguments: argparse.Namespace) -> int:
    given = build(arguments.model)
    try:
        original = copy.deepcopy(given).cpu().float()
        coordatt_fast.restore(original)
        torch.manual_seed(0)
        drawn = side_by_side.awake(original)
        ours = copy.deepcopy(original)
    except Exception as error:
        raise Wrong(
            f"{arguments.model!r}: copying the model raised {type(error).__name__}: {error}; expected one "
            "that copy.deepcopy copies"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report says it
        report = coordatt_fast.accelerate(ours)
    count = sum(p.numel() for p in original.parameters())
    print(f"{arguments.model}: {type(original).__name__}, {count:,} parameters")
    print(report)
    if not report.replaced:
        print("nothing was accelerated, so there is nothing to compare")
        return 1
    cpu = coordatt_fast.backends()["cpu"]
    print(f"compiled kernels: {'yes' if cpu.available else 'no'}, {cpu.reason}")

    x = torch.randn(arguments.input, generator=torch.Generator().manual_seed(0))
    if drawn:
        print(f"weights of {drawn} normalisations were zero, which hides the blocks: drawn at random")
    rows = {}
    for training in modes(arguments):
        try:
            rows[MODES[training]] = side_by_side.differences(original, ours, x, training)
        except Exception as error:
            given = ",".join(map(str, arguments.input))
            raise Wrong(
                f"--input {given}: in {MODES[training]} mode the model raised {type(error).__name__}: "
                f"{error}; expected sizes that it takes, also in float64 (--eval or --train for one mode)"
            ) from error
    print(f"input {times(x.shape)}")
    if not show_errors("the original", rows):
        return 1
    show_how_measured(arguments)
    for training in modes(arguments):
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
        return command(arguments)
    except Wrong as wrong:
        top.error(f"argument {wrong}" if str(wrong).startswith("--") else f"argument module:factory: {wrong}")


if __name__ == "__main__":
    sys.exit(main())
