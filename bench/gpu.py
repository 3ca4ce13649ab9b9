"""The GPU benchmark: tests, then every phase of CoordAtt against eager PyTorch, torch.compile and a copy.

  1. With --tests: tests/gpu, on this GPU.
  2. The cases that torch.compile takes part in, of the published module and of its mean() rewrite; small maps
     also as CUDA graphs.
  3. What the compiler made of both: kernels, and library calls beside them.
  4. DRAM bytes of our kernels, where ncu is there.
  5. A sweep over shapes, batches, dtypes and layouts against eager.

Speeds are ratios within one interleaved series of rounds, timed by device events, after a check against a
float64 run. Bandwidth counts what the algorithm has to move (x twice and out once forward; g twice, x and dx
backward) and stands beside that of a device copy of x. Needs torch with a GPU and nothing else: no network,
no install. Run it in the repository's root; COORDATT_FAST_LIBRARY names a compiled library built elsewhere.
Results: gpu.json and gpu.txt.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch._functorch.config

import coordatt_fast
from bench import gpu_cases, gpu_report, gpu_traffic, machine
from bench.baselines import local
from bench.cases import LAYOUTS, Case
from bench.lab import ROOT

# MobileNetV2's stages and YOLO's head, channels x height x width.
SHAPES = ((96, 56, 56), (192, 28, 28), (384, 14, 14), (960, 7, 7), (128, 80, 80), (256, 20, 20))
BATCHES = (1, 32, 128, 256)
# Against torch.compile, most telling first: batch, shape, dtype, layout.
AGAINST_COMPILE = (
    (256, (96, 56, 56), "bfloat16", "nchw"),
    (1, (384, 14, 14), "float32", "nchw"),
    (128, (96, 56, 56), "float32", "nchw"),
    (256, (96, 56, 56), "float16", "channels_last"),
    (256, (960, 7, 7), "float32", "nchw"),
    (1, (128, 80, 80), "bfloat16", "nchw"),
    (32, (384, 14, 14), "float32", "nchw"),
    (32, (128, 80, 80), "bfloat16", "channels_last"),
)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_tests() -> dict:
    """The GPU tests' closing line and exit status."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    if importlib.util.find_spec("xdist"):  # compiling takes most of the time
        command += ["-n", "8", "--dist", "loadgroup"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    say(done.stdout[-3000:] + done.stderr[-1000:])
    lines = [line for line in done.stdout.strip().splitlines() if line]
    return {"status": done.returncode, "summary": lines[-1] if lines else "no output"}


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


def cases(options) -> tuple[list[Case], list[Case]]:
    """Those against torch.compile, and the sweep."""

    def make(batch, shape, dtype, layout):
        return Case((batch, *shape), "eval", dtype, layout, options.device)

    if options.quick:
        return [], [make(batch, (16, 7, 9), "float32", layout) for batch in (1, 2) for layout in LAYOUTS]
    order = [(dtype, layout) for layout in LAYOUTS for dtype in ("float32", "bfloat16", "float16")]
    sweep = [make(n, shape, *kind) for kind in order for shape in SHAPES for n in BATCHES]
    return [make(*case) for case in AGAINST_COMPILE], sweep


def backend(device: str) -> str:
    """Ours by name, so that it never falls back unseen."""
    return "triton" if device.startswith("cuda") else "auto"


def measure_all(chosen: list[Case], names: list[str], until: float, rounds: int, into: list[dict]) -> int:
    """Measure while there is time; how many were left."""
    for index, case in enumerate(chosen):
        if time.perf_counter() > until:
            return len(chosen) - index
        try:
            with coordatt_fast.use_backend(backend(case.device)):
                result = asdict(gpu_cases.measure(case, names, rounds=rounds, block=0.002))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            say(f"{case.name} {case.dtype}: not enough memory")
            continue
        into.append(result)
        say(gpu_report.line(result))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda (default), cuda:1, ...; cpu only tries the script out"
    )
    parser.add_argument("--tests", action="store_true", help="run the GPU tests first")
    parser.add_argument(
        "--budget", type=float, default=400.0, metavar="SECONDS", help="of measuring (default 400)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="per contestant (default 7)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, no torch.compile: does it work at all?"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default bench/results/DATE-MACHINE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("bench.gpu: torch finds no CUDA device here; nothing was measured", file=sys.stderr)
        return 2
    torch._functorch.config.donated_buffer = False  # the backward pass is timed by repeating it
    facts = machine.describe(options.device)
    say(machine.line(facts))
    tests = run_tests() if options.tests else {"status": 0, "summary": "not run"}
    began = time.perf_counter()
    against_compile, sweep = cases(options)
    results: list[dict] = []
    found = {"facts": facts, "tests": tests, "results": results, "traffic": [], "compiled": []}
    left = measure_all(
        against_compile,
        ["eager", "compile", "compile-mean"],
        began + 0.5 * options.budget,
        options.rounds,
        results,
    )
    if on_gpu and not options.quick:
        for dtype, layout in (("bfloat16", "nchw"), ("float32", "channels_last")):
            found["traffic"].append(gpu_traffic.traffic((64, 96, 112, 112), dtype, layout))
        for name in ("compile", "compile-mean"):
            for mode in ("eval", "train"):
                case = Case((32, 192, 28, 28), mode, device=options.device)
                found["compiled"].append(compiled_kernels(case, name))
    left += measure_all(sweep, ["eager"], began + options.budget, max(3, options.rounds - 2), results)

    folder = options.out or ROOT / "bench/results" / f"{facts['date'][:10]}-{machine.slug(facts)}"
    folder.mkdir(parents=True, exist_ok=True)
    failed = [f"{r['name']} {name}" for r in results for name in gpu_report.failures(r)]
    text = [machine.line(facts), f"tests: {tests['summary']}", ""]
    text += [gpu_traffic.table(t) for t in found["traffic"]]
    for c in found["compiled"]:
        what = f"torch.compile, {c['rival']} {c['case']['mode']}"
        text.append(f"{what}: {c['kernels']} kernels, {c['library_calls']} library calls")
    text += ["", gpu_report.summary(results), ""]
    text += [f"{left} cases left out for lack of time"] if left else []
    text += [f"CHECK FAILED: {name}" for name in failed] or ["ALL CHECKS PASSED"]
    took = time.perf_counter() - began
    text.append(f"coordatt_fast {coordatt_fast.__version__}, {len(results)} cases, {took:.0f} s")
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "gpu.txt").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    return 1 if failed or tests["status"] else 0


if __name__ == "__main__":
    sys.exit(main())
