"""What the GPU benchmark says: a line per case, and short tables."""

import math
from statistics import geometric_mean

from bench.baselines import ANY_COMPILED
from bench.cases import DTYPES
from bench.gpu.cases import COPY, GRAPHED, PHASES

LARGE = 128 << 20  # bytes of a map that no L2 holds


def took(result: dict, phase: str, suffix: str = "") -> dict[str, float]:
    """Median seconds of a phase by contestant, those with the suffix, without it."""
    found = {name: spread["median"] for name, spread in result["seconds"].get(phase, {}).items()}
    if not suffix:
        return {name: seconds for name, seconds in found.items() if not name.endswith(GRAPHED)}
    return {name.removesuffix(suffix): s for name, s in found.items() if name.endswith(suffix)}


def label(result: dict) -> str:
    return f"{result['name']} {result['case']['dtype']} {result['case']['layout']}"


def line(result: dict) -> str:
    """One line of progress: ours against each rival, and the share of the copy's bandwidth."""
    parts = []
    for phase in PHASES:
        seconds = took(result, phase)
        shares = result["bandwidth"].get(phase, {})
        for name in (name for name in result["ours"] if name in shares):
            rivals = {k: v for k, v in seconds.items() if k not in result["ours"] and k != COPY}
            ratios = " ".join(f"{other / seconds[name]:.2f}x {rival}" for rival, other in rivals.items())
            share = shares[name] / result["copy_bandwidth"]
            parts.append(f"{phase} {name} {seconds[name] * 1e6:.1f} us {ratios} {share:.0%} of copy")
    problems = [f"{name}: {why}" for name, why in result["left_out"].items()]
    problems += [f"{name}: {v['text']}" for name, v in result["checks"].items() if not v["passed"]]
    return f"{label(result)} [{result['took']:.0f} s] " + "; ".join(parts + problems)


def geometric(values: list[float]) -> str:
    return f"{geometric_mean(values):.2f}x" if values else "-"


def summary(results: list[dict]) -> str:
    """For each of ours, by dtype, layout, batch and phase: geometric means of its speed-up over the others,
    and its share of the copy's bandwidth."""
    head = (
        f"{'dtype':9} {'layout':13} {'batch':>5}  {'phase':8} {'ours':16} {'over eager':>10} "
        f"{'best compile':>12} {'triton':>7} {'graphed: eager':>14} {'best compile':>12} "
        f"{'triton':>7}   of copy, maps > 128 MB"
    )
    rows = [head]
    groups = sorted({(r["case"]["dtype"], r["case"]["layout"], r["case"]["shape"][0]) for r in results})
    for dtype, layout, batch in groups:
        here = [
            r
            for r in results
            if (r["case"]["dtype"], r["case"]["layout"], r["case"]["shape"][0]) == (dtype, layout, batch)
        ]
        for phase in PHASES:
            for name in dict.fromkeys(name for r in here for name in r["ours"]):
                if row := summary_row(here, phase, name):
                    rows.append(f"{dtype:9} {layout:13} {batch:5}  {phase:8} {name:16} {row}")
    return "\n".join(rows)


def summary_row(results: list[dict], phase: str, name: str) -> str:
    cells, shares, any_time = [], [], False
    for suffix in ("", GRAPHED):
        over: dict[str, list[float]] = {"eager": [], "compile": [], "triton": []}
        for result in results:
            seconds = took(result, phase, suffix)
            if name not in seconds:
                continue
            any_time = True
            others = {"eager": seconds.get("eager")}
            others["triton"] = seconds.get("triton") if name != "triton" else None
            others["compile"] = min((seconds[c] for c in ANY_COMPILED if c in seconds), default=None)
            for rival, other in others.items():
                if other:
                    over[rival].append(other / seconds[name])
            case = result["case"]
            if not suffix and math.prod(case["shape"]) * DTYPES[case["dtype"]].itemsize > LARGE:
                shares.append(result["bandwidth"][phase][name] / result["copy_bandwidth"])
        widths = (10, 12, 7) if not suffix else (14, 12, 7)
        cells += [f"{geometric(values):>{width}}" for values, width in zip(over.values(), widths)]
    share = f"{min(shares):.0%} to {max(shares):.0%}" if shares else "-"
    return " ".join([*cells, f"  {share}"]) if any_time else ""


def ways(results: list[dict]) -> str:
    """The CUDA backend's ways forward by case: microseconds of a call (graphed where it was), the fastest,
    the one that is estimated to be, and what the device holds of each."""
    rows = []
    for result in results:
        for phase, mode in (("eval", "eval"), ("forward", "train")):
            outlines = result["outlines"].get(mode, {})
            alone, graph = took(result, phase), took(result, phase, GRAPHED)
            seconds = {name: graph.get(name, alone.get(name)) for name in outlines if name in alone}
            if not seconds:
                continue
            best = min(seconds, key=seconds.get)
            cells = []
            for name, s in seconds.items():
                o = outlines[name]
                held = f" ({o['blocks']} blocks" + (f", {o['held']} held)" if o.get("held") else ")")
                mark = "*" if name == best else ""
                cells.append(f"{name.removeprefix('cuda ')} {s * 1e6:.1f}{mark}{held}")
            guess = result["estimated"].get(mode, "")
            lost = seconds.get(f"cuda {guess}", math.nan) / seconds[best] - 1
            copy = f"copy {alone[COPY] * 1e6:.1f}" if COPY in alone else ""
            rows.append(
                f"{label(result)} {phase}{' graphed' if graph else ''}, us: {', '.join(cells)}; {copy}; "
                f"estimated {guess} (+{lost:.0%})"
            )
    head = "The CUDA backend's ways forward (* the fastest; what the estimate loses to it):"
    return "\n".join([head, *rows]) if rows else ""


def hosts(results: list[dict]) -> str:
    """One image: microseconds of the host's clock beside those of the device's, graphed."""
    rows = []
    for result in results:
        for phase, times in result["host"].items():
            graph = took(result, phase, GRAPHED)
            cells = []
            for name, spread in times.items():
                device = f" / {graph[name] * 1e6:.1f}" if name in graph else ""
                cells.append(f"{name} {spread['median'] * 1e6:.1f}{device}")
            rows.append(f"{label(result)} {phase}: {', '.join(cells)}")
    return "\n".join(["One image, us: host / device in a CUDA graph:", *rows]) if rows else ""


def failures(result: dict) -> list[str]:
    """Our checks that failed and what kept ours from running."""
    wrong = [name for name, verdict in result["checks"].items() if not verdict["passed"]]
    absent = [f"{name}: {why}" for name, why in result["left_out"].items()]
    ours = tuple(result["ours"])
    return [text for text in wrong + absent if ours and text.startswith(ours)]
