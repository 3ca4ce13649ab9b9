"""What Coordinate Attention costs beside the other attention blocks: one network, the same 16 places.

MobileNetV2-1.0 with no attention, squeeze-and-excitation, ECA, CBAM, global context, triplet attention, strip
pooling, CoordAtt in plain PyTorch, the same compiled, and ours: parameters, multiply-adds, images a second in
inference and training, and the memory a call needs. Ours and the compiled blocks are checked against plain
PyTorch before a speed is given; what is timed together runs in interleaved rounds. Says nothing of accuracy.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import coordatt_fast
from bench import checks, lab, machine, report, whole_network
from bench.attention import MeanCoordAtt, PlainCoordAtt, parameter_count, settle_statistics
from bench.blocks import OTHERS
from bench.instances import Effort, explain
from bench.timing import PAGES, PAGES_SHORT, pages_for
from bench.whole_network import NONE, OURS, PLAIN, NetworkCase, contestant, square, timings
from coordatt_fast.models import mobilenet_v2_ca

COMPILED = "compiled"
LABELS = {
    NONE: "no attention",
    "se": "SE",
    "eca": "ECA",
    "cbam": "CBAM",
    "gc": "global context",
    "triplet": "triplet attention",
    "strip": "strip pooling",
    PLAIN: "CoordAtt, plain PyTorch",
    COMPILED: "CoordAtt, torch.compile",
    OURS: "CoordAtt, coordatt_fast",
}
ATTENTION: dict[str, Callable[[int], nn.Module] | None] = {
    NONE: None,
    **OTHERS,
    PLAIN: square(PlainCoordAtt),
    COMPILED: square(MeanCoordAtt),
    OURS: square(coordatt_fast.CoordAtt),
}
SAME_FUNCTION = (PLAIN, COMPILED, OURS)
FULL, QUICK = Effort(rounds=11, seconds=40.0, block=0.02), Effort(rounds=2, seconds=0.2, block=0.001)
# So that what is freed is given back, and the peak is that of what was in use.
EXACT_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "COORDATT_FAST_KEEP_MB": "0",
}
LEGEND = """
Images a second, as many at once as the heading says; in brackets the time added over the network without
attention. Pages: how malloc treats outputs above 16 MB (fresh: mapped anew on each call; kept: used
again). Training is forward, loss and backward. Multiply-adds: of convolutions and matrix products, one
image, torch.utils.flop_counter halved. Memory: the largest resident size during one call less that before
it, in a process of its own where nothing freed is kept. CoordAtt is compiled block by block, in its
mean() form, inside the eager network. SE, CBAM and global context squeeze to max(8, C // 24) channels,
CoordAtt to max(8, C // 32), as in its paper. Strip pooling has three full convolutions C -> C in each
place: it was made for a few places in large networks.
"""


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return mobilenet_v2_ca(attention=ATTENTION[name], dropout=0.0)


def compile_blocks(model: nn.Module) -> nn.Module:
    """Every CoordAtt of the model compiled, each for its own shape."""
    torch._dynamo.config.recompile_limit = 64  # 9 shapes share one forward
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MeanCoordAtt):
                setattr(parent, name, torch.compile(child, dynamic=False, fullgraph=True))
    return model


def networks(case: NetworkCase, names: list[str]) -> dict[str, nn.Module]:
    """The networks by name, statistics settled on the photographs; the three with CoordAtt have the same
    weights."""
    images = NetworkCase(1, size=case.size).images(whole_network.CHECKED_IMAGES)
    models = {name: network(name) for name in names}
    for name, model in models.items():
        if name not in SAME_FUNCTION:
            settle_statistics(model, images)
    settle_statistics(models[PLAIN], images)
    for name in SAME_FUNCTION[1:]:
        if name in models:
            models[name].load_state_dict(models[PLAIN].state_dict())
    if COMPILED in models:
        compile_blocks(models[COMPILED])
    return {name: case.place(model) for name, model in models.items()}


def compiled_agrees(models: dict[str, nn.Module], case: NetworkCase, agreement: dict) -> bool:
    """Whether the compiled blocks give plain PyTorch's results, with the factor granted to others."""
    images = case.images(case.batch)
    saved = copy.deepcopy(models[PLAIN].state_dict())
    found = {}
    for name in (PLAIN, COMPILED):
        if case.mode == "train":
            found[name] = whole_network.gradients(models[name], images)
        else:
            with torch.inference_mode():
                found[name] = models[name](images)
    for model in (models[PLAIN], models[COMPILED]):
        for value, old in zip(model.state_dict().values(), saved.values(), strict=True):
            value.copy_(old)
    error = (found[COMPILED] - found[PLAIN]).norm() / found[PLAIN].norm()
    return error.item() <= checks.RIVAL_FACTOR * agreement["allowed"]


def measure(case: NetworkCase, effort: Effort, names: list[str]) -> dict:
    """Check, then time the networks against each other; plain data, ready for JSON.

    Speeds are missing where our check failed; the compiled network is left out where its own did.
    """
    models = networks(case, names)
    agreement = whole_network.agreement(models, case)
    block = next(m for m in models[OURS].modules() if isinstance(m, coordatt_fast.CoordAtt))
    sample = torch.zeros(case.batch, block.conv1.in_channels, case.size // 4, case.size // 4)
    result = {
        "kind": "blocks",
        "case": asdict(case),
        "name": case.name,
        "agreement": agreement,
        "plan": explain(block, sample, case.mode == "train"),
        "seconds": {},
        "cost": {},
        "left_out": {},
    }
    if not agreement["passed"]:
        return result
    if COMPILED in models and not compiled_agrees(models, case, agreement):
        result["left_out"][COMPILED] = "its results are not those of plain PyTorch"
        del models[COMPILED]
    images = case.images(case.batch)
    timed = timings(models, images, case.mode, effort)
    for name in models:
        result["seconds"][name] = asdict(timed.seconds(name))
        result["cost"][name] = {k: 1 / v - 1 for k, v in asdict(timed.speedup(name, NONE)).items()}
    result["rounds"] = len(timed.rounds[OURS])
    return result


def size(name: str) -> dict:
    """Parameters, and multiply-adds of one 224 x 224 image."""
    model = network(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    return {"parameters": parameter_count(model), "macs": counter.get_total_flops() // 2}


def resident(field: str) -> int:
    """Bytes of this process's VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def peak(name: str, batch: int, side: int) -> dict[str, int]:
    """What one inference and one training step of this network need beside model and images (Linux)."""
    found = {}
    for mode in ("eval", "train"):
        case = NetworkCase(batch, mode, size=side)
        model = network(name)
        model = case.place(compile_blocks(model) if name == COMPILED else model)
        call = contestant(model, case.images(batch), mode)
        call.run(2)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        call.run(1)
        found[mode] = max(0, resident("VmHWM") - before)
    return found


def peak_elsewhere(name: str, batch: int, side: int, threads: int) -> dict[str, int] | str:
    """The same in a process of its own; in words where that is not possible."""
    command = [sys.executable, "-m", "bench.other_blocks", "--peak", name]
    command += ["--batch", str(batch), "--size", str(side), "--threads", str(threads)]
    environment = lab.environment("plain") | EXACT_MALLOC
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["ended without a word"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def column(result: dict) -> str:
    case = result["case"]
    pages = "" if result["pages"] == "plain" else f", {PAGES_SHORT[result['pages']]}"
    return f"{case['mode']}, {case['batch']}{pages}"


def cell(result: dict, name: str) -> str:
    if not result["agreement"]["passed"] and name in SAME_FUNCTION:
        return "WRONG"
    if name not in result["seconds"]:
        return "-"
    speed = f"{result['case']['batch'] / result['seconds'][name]['median']:.1f}"
    cost = result["cost"][name]
    return speed if name == NONE else f"{speed} ({cost['median']:+.0%})"


def tables(document: dict) -> str:
    """The report as text: sizes and memory, then speeds."""
    results, sizes, peaks = document["results"], document["sizes"], document["peaks"]
    batch = max(result["case"]["batch"] for result in results)
    header = ["", "parameters", "multiply-adds", f"memory, eval, {batch}", f"memory, train, {batch}"]
    rows = []
    for name, found in sizes.items():
        memory = peaks.get(name, "")
        cells = (
            ["-", "-"]
            if isinstance(memory, str)
            else [f"{memory[m] / 2**20:.0f} MiB" for m in ("eval", "train")]
        )
        rows.append(
            [LABELS[name], f"{found['parameters'] / 1e6:.2f} M", f"{found['macs'] / 1e6:.0f} M", *cells]
        )
    speeds = [[LABELS[name], *[cell(result, name) for result in results]] for name in sizes]
    spread = [
        f"{column(r)}: {(s['p90'] - s['p10']) / s['median']:.0%}"
        for r in results
        if (s := r["seconds"].get(OURS))
    ]
    parts = [
        machine.line(document["machine"]),
        machine.busy(document["machine"]),
        "\n".join(report.unfused(results)),
        report.table(header, rows),
        report.table(["images/s", *[column(result) for result in results]], speeds),
        report.prose(LEGEND),
        "Spread of our times, 10th to 90th percentile over the median: " + "; ".join(spread),
        "\n".join(f"{LABELS[n]}, {column(r)}: {why}" for r in results for n, why in r["left_out"].items()),
        "\n".join(report.failures([r | {"kind": "network"} for r in results])) or "ALL CHECKS PASSED",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.other_blocks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 16], metavar="N", help="batch sizes (default 1 16)"
    )
    parser.add_argument("--mode", choices=["eval", "train", "both"], default="both")
    parser.add_argument("--only", nargs="+", choices=LABELS, metavar="NAME", help=f"of {', '.join(LABELS)}")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default 224)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: one per core")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, small images, batch 2, nothing compiled"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default bench/results/DATE-MACHINE/blocks")
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="print the tables of an earlier blocks.json"
    )
    parser.add_argument("--peak", choices=LABELS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.only or [name for name in LABELS if not (options.quick and name == COMPILED)]
    options.names = [name for name in LABELS if name in {*names, NONE, PLAIN, OURS}]
    if options.quick:
        options.batch, options.size = [2], 64
    return options


def plan(options: argparse.Namespace) -> list[lab.Jobs]:
    """One process per page state, one job per batch and mode."""
    modes = ("eval", "train") if options.mode == "both" else (options.mode,)
    labs = {pages: lab.Jobs(options.threads, pages) for pages in PAGES}
    effort, order = asdict(QUICK if options.quick else FULL), 0
    for batch in options.batch:
        for mode in modes:
            case = NetworkCase(batch, mode, size=options.size)
            for pages in pages_for(case.largest_tensor, case.device):
                job = {"kind": "blocks", "case": asdict(case), "effort": effort, "blocks": options.names}
                labs[pages].jobs.append(job | {"expected": 1.0, "order": order})
                order += 1
    return [jobs for jobs in labs.values() if jobs.jobs]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak(options.peak, options.batch[0], options.size)))
        return 0
    if options.read:
        print(tables(json.loads(options.read.read_text())))
        return 0
    began, facts = time.perf_counter(), machine.describe("cpu")
    results = []
    for jobs in plan(options):
        for result in lab.run(jobs):
            print(
                f"[{result['took']:.0f} s] {result['name']}, {result['pages']} pages",
                file=sys.stderr,
                flush=True,
            )
            results.append(result)
    results.sort(key=lambda result: (result["case"]["mode"], result["order"]))
    sizes = {name: size(name) for name in options.names}
    peaks = {}
    for name in [] if options.no_memory else options.names:
        peaks[name] = peak_elsewhere(name, max(options.batch), options.size, options.threads)
    settings = {key: str(value) for key, value in vars(options).items()}
    document = {"machine": facts, "settings": settings, "sizes": sizes, "peaks": peaks, "results": results}
    folder = options.out or Path("bench/results") / f"{facts['date'][:10]}-{machine.slug(facts)}" / "blocks"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "blocks.json").write_text(
        json.dumps(report.finite(document), indent=1, allow_nan=False) + os.linesep
    )
    text = tables(document)
    (folder / "blocks.txt").write_text(text)
    print(text)
    print(f"Written to {folder}/ in {time.perf_counter() - began:.0f} s: blocks.json, blocks.txt")
    return 0 if all(result["agreement"]["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
