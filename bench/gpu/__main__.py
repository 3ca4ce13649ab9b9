"""The GPU benchmark: tests, then every phase of CoordAtt against eager PyTorch, torch.compile and a copy.

  tests      with --tests: tests/gpu, on this GPU.
  compile    the cases that torch.compile takes part in, of the published module and of its mean() rewrite.
  ways       the CUDA backend's ways forward against one another: chain, clusters of every size, resident.
  sanitizer  compute-sanitizer's four tools over the CUDA backend, where it is there.
  traffic    DRAM bytes of our kernels, where ncu is there.
  code       what the compiler made of both: kernels, and library calls beside them.
  sweep      shapes, batches, dtypes and layouts against eager.

Speeds are ratios within one interleaved series of rounds, timed by device events, after a check against a
float64 run; small maps also as CUDA graphs of ten calls, one image also by the host's clock. Bandwidth counts
what a phase has to move (forward: x twice, or once where one launch does it, and out; backward: g twice, x
and dx) and stands beside that of a device copy of x. Needs torch with a GPU and nothing else: no network, no
install. Run it in the repository's root; COORDATT_FAST_LIBRARY names a compiled library built elsewhere.
Results: gpu.json and gpu.txt, written after every part; what the budget left out is listed.
"""

import argparse
import faulthandler
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch._functorch.config

import coordatt_fast
from bench import machine
from bench.baselines import local
from bench.cases import LAYOUTS, Case
from bench.gpu import cases, report, sanitizer, tests, traffic
from bench.gpu.ours import Ours, backends
from bench.lab import ROOT

PARTS = ("compile", "ways", "sanitizer", "traffic", "code", "sweep")
# How much of the budget has gone when a part ends at the latest.
UNTIL = {"tests": 0.45, "compile": 0.65, "ways": 0.78, "sanitizer": 0.88}
UNTIL |= {"traffic": 0.94, "code": 0.96, "sweep": 1.0}

# MobileNetV2's stages and YOLO's head, channels x height x width.
SHAPES = ((96, 56, 56), (192, 28, 28), (384, 14, 14), (960, 7, 7), (128, 80, 80), (256, 20, 20))
BATCHES = (1, 32, 128, 256)
# Against torch.compile, most telling first: batch, shape, dtype, layout.
AGAINST_COMPILE = (
    (256, (96, 56, 56), "bfloat16", "nchw"),
    (1, (384, 14, 14), "float32", "nchw"),
    (128, (192, 28, 28), "bfloat16", "nchw"),
    (1, (128, 80, 80), "bfloat16", "nchw"),
    (128, (96, 56, 56), "float32", "nchw"),
    (256, (96, 56, 56), "float16", "channels_last"),
    (256, (960, 7, 7), "float32", "nchw"),
    (32, (384, 14, 14), "float32", "nchw"),
    (32, (128, 80, 80), "bfloat16", "channels_last"),
)
# For ncu; maps that L2 does not hold, but for the resident one.
TRAFFIC = (
    ((256, 192, 28, 28), "bfloat16", "nchw", Ours("cuda", "cluster:4")),
    ((256, 96, 56, 56), "bfloat16", "nchw", Ours("cuda", "cluster:16")),
    ((64, 96, 112, 112), "bfloat16", "nchw", Ours("cuda", "chain")),
    ((32, 192, 28, 28), "bfloat16", "nchw", Ours("cuda", "resident")),
    ((64, 96, 112, 112), "bfloat16", "nchw", Ours("triton")),
    ((64, 96, 112, 112), "float32", "channels_last", Ours("cuda", "chain")),
)
# One image, a few, as many as clusters, far more.
WAYS_BATCHES = (1, 128, 8, 32, 512)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compiled_kernels(case: Case, name: str) -> dict:
    """How many kernels and library calls torch.compile makes of a rival's training step or inference."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    function, module = local(name, case.plain(), case)
    x, g = case.tensor(1), case.tensor(2)

    def step():
        if case.mode == "eval":
            with torch.no_grad():
                return function(x)
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), [leaf, *module.parameters()], g)

    _, codes = run_and_get_code(step)
    calls = [line.strip() for code in codes for line in code.splitlines()]
    return {
        "case": case.as_dict(),
        "rival": name,
        "kernels": sum(".run(" in line and line.startswith("triton_") for line in calls),
        "library_calls": sum("extern_kernels." in line or "torch.ops.aten." in line for line in calls),
        "code": "\n\n".join(codes),
    }


def cases_of(options: argparse.Namespace, part: str) -> list[Case]:
    """Of a part that measures, most important first."""

    def make(batch, shape, dtype, layout):
        return Case((batch, *shape), "eval", dtype, layout, options.device)

    if options.quick:
        tiny = {"ways": [(3, (16, 7, 9), "bfloat16", "nchw")], "compile": []}
        sweep = [(batch, (16, 7, 9), "float32", layout) for batch in (1, 2) for layout in LAYOUTS]
        return [make(*case) for case in tiny.get(part, sweep)]
    if part == "compile":
        return [make(*case) for case in AGAINST_COMPILE]
    if part == "ways":
        # Widest maps last: few of them fit a cluster.
        shapes = (SHAPES[2], SHAPES[1], SHAPES[3], SHAPES[5], SHAPES[0], SHAPES[4])
        kinds = ("float32", "bfloat16")
        return [make(n, s, dtype, "nchw") for n in WAYS_BATCHES for s in shapes for dtype in kinds]
    order = [(dtype, layout) for layout in LAYOUTS for dtype in ("float32", "bfloat16", "float16")]
    return [make(n, shape, *kind) for kind in order for shape in SHAPES for n in BATCHES]


class Run:
    """What has been found so far, until when a part may go on, and the files."""

    def __init__(self, options: argparse.Namespace, facts: dict, folder: Path) -> None:
        self.options, self.folder, self.began = options, folder, time.perf_counter()
        self.found: dict = {"facts": facts, "backends": backends(options.device), "tests": None}
        self.found |= {"compile": [], "ways": [], "sweep": [], "traffic": [], "code": [], "sanitizer": {}}
        self.found |= {"left": {}, "parts": {}, "trouble": []}
        self.on_gpu = options.device.startswith("cuda") and not options.quick

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def left(self, part: str) -> float:
        """Seconds until the part has to end."""
        share = UNTIL[part] if self.options.parts else 1.0
        return share * self.options.budget - self.elapsed()

    def do(self, part: str) -> None:
        before = self.elapsed()
        if self.found["trouble"] and part in ("compile", "ways", "code", "sweep"):
            self.found["left"][part] = ["all: CUDA is not usable any more in this process"]
            return
        getattr(self, part)()
        self.found["parts"][part] = round(self.elapsed() - before, 1)
        self.write()

    def tests(self) -> None:
        self.found["tests"] = tests.run(self.left("tests"), self.folder)
        say(f"tests: {self.found['tests']['summary']}")

    def compile(self) -> None:
        self.measure("compile", ["eager", "compile", "compile-mean"], self.options.rounds)

    def ways(self) -> None:
        if self.options.device.startswith("cuda") and self.found["backends"].get("cuda"):
            self.found["left"]["ways"] = [f"all: {self.found['backends']['cuda']}"]
            return
        self.measure("ways", [], max(3, self.options.rounds - 2), triton=False)

    def sweep(self) -> None:
        self.measure("sweep", ["eager"], max(3, self.options.rounds - 2))

    def measure(self, part: str, names: list[str], rounds: int, triton: bool = True) -> None:
        chosen = cases_of(self.options, part)
        for index, case in enumerate(chosen):
            if self.left(part) <= 0:
                self.found["left"][part] = [f"{c.name} {c.dtype} {c.layout}" for c in chosen[index:]]
                return
            try:
                result = asdict(cases.measure(case, names, rounds=rounds, block=0.002, triton=triton))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                self.found["left"].setdefault(part, []).append(f"{case.name} {case.dtype}: not enough memory")
                continue
            except Exception as error:
                # Whatever reaches this place leaves CUDA unusable in this process.
                self.found["trouble"].append(f"{part}, {case.name} {case.dtype} {case.layout}: {error}"[:600])
                self.found["left"][part] = [f"{c.name} {c.dtype} {c.layout}" for c in chosen[index + 1 :]]
                return
            self.found[part].append(result)
            say(report.line(result))
            if case.device.startswith("cuda"):
                torch.cuda.empty_cache()

    def sanitizer(self) -> None:
        if not self.on_gpu:
            return
        if why := self.found["backends"]["cuda"]:
            self.found["left"]["sanitizer"] = [why]
        elif self.left("sanitizer") < 20:
            self.found["left"]["sanitizer"] = [f"all: {self.left('sanitizer'):.0f} s were left"]
        else:
            self.found["sanitizer"] = sanitizer.run(self.left("sanitizer"))
            say(sanitizer.table(self.found["sanitizer"]))

    def traffic(self) -> None:
        if not self.on_gpu:
            return
        for shape, dtype, layout, ours in TRAFFIC:
            if self.found["backends"][ours.backend]:
                continue
            if self.left("traffic") < 10:
                self.found["left"].setdefault("traffic", []).append(f"{ours.name} {shape} {dtype} {layout}")
                continue
            seconds = self.left("traffic")
            self.found["traffic"].append(traffic.traffic(shape, dtype, layout, ours, seconds))

    def code(self) -> None:
        if not self.on_gpu:
            return
        for name in ("compile", "compile-mean"):
            for mode in ("eval", "train"):
                if self.left("code") <= 0:
                    self.found["left"].setdefault("code", []).append(f"{name} {mode}")
                    continue
                case = Case((32, 192, 28, 28), mode, device=self.options.device)
                self.found["code"].append(compiled_kernels(case, name))

    def failed(self) -> list[str]:
        results = [r for part in ("compile", "ways", "sweep") for r in self.found[part]]
        found = [f"{report.label(r)}, {name}" for r in results for name in report.failures(r)]
        found += [f"compute-sanitizer {said}" for said in sanitizer.failures(self.found["sanitizer"])]
        return found + self.found["trouble"]

    def text(self) -> str:
        found, ran = self.found, self.found["tests"]
        lines = [machine.line(found["facts"])]
        lines += [f"not measured: {name}, {why}" for name, why in found["backends"].items() if why]
        lines += [f"tests: {ran['summary']} ({ran['took']:.0f} s)" if ran else "tests: not run"]
        lines += [f"  {test}" for test in ran["failed"]] if ran else []
        lines += ["", report.summary(found["compile"] + found["sweep"]), ""]
        lines += [report.ways(found["compile"] + found["ways"]), ""]
        lines += [report.hosts(found["compile"] + found["ways"] + found["sweep"]), ""]
        lines += [sanitizer.table(found["sanitizer"])] if found["sanitizer"] else []
        lines += [traffic.table(t) for t in found["traffic"]]
        for c in found["code"]:
            what = f"torch.compile, {c['rival']} {c['case']['mode']}"
            lines.append(f"{what}: {c['kernels']} kernels, {c['library_calls']} library calls")
        lines += [f"left out, {part}: {len(what)}: {'; '.join(what)}" for part, what in found["left"].items()]
        lines += [f"CHECK FAILED: {name}" for name in self.failed()] or ["ALL CHECKS PASSED"]
        count = sum(len(found[part]) for part in ("compile", "ways", "sweep"))
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["parts"].items())
        return "\n".join([*lines, f"coordatt_fast {coordatt_fast.__version__}, {count} cases; {parts}"])

    def write(self) -> None:
        (self.folder / "gpu.json").write_text(json.dumps(self.found) + "\n")
        (self.folder / "gpu.txt").write_text(self.text() + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda (default), cuda:1, ...; cpu only tries the script out"
    )
    parser.add_argument("--tests", action="store_true", help="run the GPU tests first")
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="A,B", help=f"of {','.join(PARTS)}, or '' (default: all)"
    )
    parser.add_argument(
        "--budget", type=float, default=540.0, metavar="SECONDS", help="of everything (default 540)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="per contestant (default 7)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, no torch.compile: does it work at all?"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default bench/results/DATE-MACHINE")
    options = parser.parse_args(arguments)
    options.parts = [part for part in PARTS if part in options.parts.split(",")]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench.gpu: torch finds no CUDA device here; nothing was measured", file=sys.stderr)
        return 2
    torch._functorch.config.donated_buffer = False  # the backward pass is timed by repeating it
    facts = machine.describe(options.device)
    say(machine.line(facts))
    folder = options.out or ROOT / "bench/results" / f"{facts['date'][:10]}-{machine.slug(facts)}"
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(options, facts, folder)
    if options.device.startswith("cuda"):
        # A kernel that waits for ever ends the run with a traceback; what was found before is in the files.
        faulthandler.dump_traceback_later(options.budget + 30, exit=True, file=sys.__stderr__)
    try:
        for part in (["tests"] if options.tests else []) + options.parts:
            run.do(part)
    finally:
        faulthandler.cancel_dump_traceback_later()
        run.write()
        print(run.text())
    return 1 if run.failed() or (run.found["tests"] or {}).get("status") else 0


if __name__ == "__main__":
    sys.exit(main())
