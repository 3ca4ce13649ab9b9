"""The benchmark of coordatt_fast.

  1. Real photographs through MobileNetV2-1.0 with no attention, SE, plain CoordAtt and ours: do outputs and
     gradients agree, how many images a second, and what does the attention cost?
  2. Every CoordAtt call of a network (or any shape) against eager PyTorch, torch.compile, ONNX Runtime and
     OpenVINO, next to the time of one x.clone().

All contestants of a comparison run in one interleaved, shuffled series of rounds; a speed is printed only
after a check against a float64 run. Results go to the terminal and, as report.txt, results.csv, results.json
and speedup.png, to a folder. Exit status: 0, or 1 when a correctness check failed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import coordatt_fast
from bench import lab, machine, networks, plot, report, schedule
from bench.baselines import DEFAULT_RIVALS, OURS, RIVALS
from bench.cases import DTYPES, LAYOUTS

EXAMPLES = """examples:
  python -m bench.throughput                                      the default run, under 5 minutes on 2 cores
  python -m bench.throughput --quick                              half a minute: does it work at all?
  python -m bench.throughput --network yolov5s --mode eval --batch 1 --no-photos
  python -m bench.throughput --shape 8,64,160,160 --dtype bfloat16 --layout channels_last --threads 1 2
"""


def shape(text: str) -> tuple[int, int, int, int]:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,C,H,W")
    return sizes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.throughput",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--network",
        nargs="+",
        default=["mobilenetv2"],
        metavar="NAME",
        choices=[*networks.NETWORKS, "all"],
        help=f"whose CoordAtt calls to measure: {', '.join(networks.NETWORKS)} or all (default mobilenetv2)",
    )
    what.add_argument(
        "--shape",
        nargs="+",
        type=shape,
        metavar="N,C,H,W",
        help="measure these shapes, not a network's at --batch",
    )
    what.add_argument(
        "--batch", nargs="+", type=int, default=[1, 32], metavar="N", help="batch sizes (default 1 32)"
    )
    what.add_argument(
        "--mode",
        choices=["eval", "train", "both"],
        default="both",
        help="inference, training (forward + backward), or both (default)",
    )
    what.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of x and the parameters (default float32)"
    )
    what.add_argument("--layout", choices=LAYOUTS, default="nchw", help="memory layout of x (default nchw)")
    what.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    what.add_argument("--photos-only", action="store_true", help="step 1 only")
    what.add_argument("--no-photos", action="store_true", help="step 2 only")
    what.add_argument(
        "--photo-batch",
        nargs="+",
        type=int,
        default=[1, 16],
        metavar="N",
        help="batch sizes of step 1 (default 1 16)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--rivals",
        nargs="*",
        choices=RIVALS,
        default=None,
        metavar="NAME",
        help="; ".join(f"{name}: {rival.meaning}" for name, rival in RIVALS.items())
        + f" (default: {' '.join(DEFAULT_RIVALS)})",
    )
    how.add_argument(
        "--compile-shapes",
        type=int,
        default=2,
        metavar="K",
        help="torch.compile takes part in K shapes of every mode and batch (default 2: compiling takes long)",
    )
    how.add_argument(
        "--threads",
        nargs="+",
        type=int,
        default=[torch.get_num_threads()],
        metavar="N",
        help="thread counts (default: one per core)",
    )
    how.add_argument(
        "--budget",
        type=float,
        default=270.0,
        metavar="SECONDS",
        help="leave out what does not fit, and say so (default 270; 0: no limit)",
    )
    how.add_argument(
        "--quick", action="store_true", help="few rounds, two shapes, small photographs, eager only"
    )
    how.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default bench/results/DATE-MACHINE)"
    )
    options = parser.parse_args(arguments)
    if options.photos_only and options.no_photos:
        parser.error("--photos-only and --no-photos exclude each other")
    if options.rivals is None:
        options.rivals = ["eager"] if options.quick else list(DEFAULT_RIVALS)
    if options.quick:
        options.photo_batch = options.photo_batch[:1]
        options.batch = options.batch[:1]
    return options


def say(text: str) -> None:
    """Progress, on standard error so that the report can be piped."""
    print(text, file=sys.stderr, flush=True)


def headline(result: dict) -> str:
    """One line of progress for a finished job."""
    if result["kind"] == "skipped":
        return "skipped, no time left"
    took = f"[{result['took']:.0f} s]"
    if result["kind"] == "network":
        if not result["images_per_second"]:
            return f"{took} {result['name']}: check FAILED, no speed"
        return (
            f"{took} {result['name']}: {report.times(result['speedup']['median'])} plain CoordAtt's images/s"
        )
    if not result["seconds"]:
        return f"{took} {result['name']} {result['case']['mode']}: check FAILED, no speed"
    against = ", ".join(
        f"{report.times(spread['median'])} {name}"
        for name, spread in result["speedup"].items()
        if name != OURS
    )
    return f"{took} {result['name']} {result['case']['mode']}: {against}"


def measure(options: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """Run every lab; the budget that is left is shared by what the remaining labs are expected to need."""
    labs, left_out = schedule.plan(options)
    begun, results = time.perf_counter(), []
    for index, jobs in enumerate(labs):
        if options.budget:
            remaining = max(1.0, options.budget - (time.perf_counter() - begun))
            expected = [sum(job["expected"] for job in later.jobs) for later in labs[index:]]
            jobs.seconds = remaining * expected[0] / sum(expected)
        say(f"{jobs.threads} threads, {jobs.pages} pages: {len(jobs.jobs)} measurements")
        try:
            for number, result in enumerate(lab.run(jobs), 1):
                results.append(result)
                say(f"  {number}/{len(jobs.jobs)} {headline(result)}")
        except RuntimeError as error:
            say(f"  {error}")
            results.append({"kind": "died", "text": f"{error} ({jobs.pages} pages, {jobs.threads} threads)"})
    return results, left_out


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    begun = time.perf_counter()
    facts = machine.describe(options.device)
    say(f"coordatt_fast {coordatt_fast.__version__} benchmark")
    results, left_out = measure(options)
    folder = options.out or Path("bench/results") / f"{facts['date'][:10]}-{machine.slug(facts)}"
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
    }
    report.write(folder, facts, settings, results)
    text = report.whole(facts, results, left_out)
    (folder / "report.txt").write_text(text)
    plot.speedups(results, folder / "speedup.png", machine.line(facts))
    print(text)
    print(
        f"Written to {folder}/ in {time.perf_counter() - begun:.0f} s: "
        + ", ".join(sorted(p.name for p in folder.iterdir()))
    )
    return 1 if report.failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
