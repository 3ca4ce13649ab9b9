"""What the GPU benchmark says: a line per case, and a short table."""

import math
from statistics import geometric_mean

from bench.baselines import COMPILED
from bench.cases import DTYPES
from bench.gpu_cases import COPY, GRAPHED, PHASES

LARGE = 128 << 20  # bytes of a map that no L2 holds


def line(result: dict) -> str:
    """One line of progress."""
    case = result["case"]
    parts = []
    for phase in PHASES:
        rivals = {
            k: v["median"] for k, v in result["speedup"].get(phase, {}).items() if k not in ("ours", COPY)
        }
        ratios = " ".join(f"{ratio:.2f}x {name}" for name, ratio in rivals.items())
        if phase in result["bandwidth"]:
            share = result["bandwidth"][phase] / result["copy_bandwidth"]
            took = result["seconds"][phase]["ours"]["median"] * 1e6
            parts.append(f"{phase} {took:.0f} us, {ratios}, {share:.0%} of copy")
    problems = [f"{name}: {why}" for name, why in result["left_out"].items()]
    problems += [f"{name}: {v['text']}" for name, v in result["checks"].items() if not v["passed"]]
    name = f"{result['name']} {case['dtype']} {case['layout']}"
    return f"{name} [{result['took']:.0f} s, {result['backend']}] " + "; ".join(parts + problems)


def geometric(values: list[float]) -> str:
    return f"{geometric_mean(values):.2f}x" if values else "-"


def summary(results: list[dict]) -> str:
    """By dtype, layout and batch: geometric means of our speed-up, and our share of the copy's bandwidth."""
    head = "dtype     layout         batch  phase     over eager  over best compile  graphed: eager  compile"
    rows = [head + "   of copy, maps > 128 MB"]
    groups = sorted({(r["case"]["dtype"], r["case"]["layout"], r["case"]["shape"][0]) for r in results})
    for dtype, layout, batch in groups:
        for phase in PHASES:
            over = {"eager": [], "compile": [], "eager-graph": [], "compile-graph": []}
            shares = []
            for r in results:
                case = r["case"]
                here = (case["dtype"], case["layout"], case["shape"][0]) == (dtype, layout, batch)
                if not here or phase not in r["speedup"]:
                    continue
                took = {name: spread["median"] for name, spread in r["seconds"][phase].items()}
                for suffix in ("", GRAPHED):
                    ours = took.get("ours" + suffix)
                    if ours and "eager" + suffix in took:
                        over["eager" + suffix].append(took["eager" + suffix] / ours)
                    compiled = [took[name + suffix] for name in COMPILED if name + suffix in took]
                    if ours and compiled:
                        over["compile" + suffix].append(min(compiled) / ours)
                if math.prod(case["shape"]) * DTYPES[dtype].itemsize > LARGE:
                    shares.append(r["bandwidth"][phase] / r["copy_bandwidth"])
            if over["eager"]:
                share = f"{min(shares):.0%} to {max(shares):.0%}" if shares else "-"
                a, b, c, d = (geometric(values) for values in over.values())
                row = (
                    f"{dtype:9} {layout:14} {batch:5}  {phase:9} {a:>10}  {b:>17}  {c:>14}  {d:>7}   {share}"
                )
                rows.append(row)
    return "\n".join(rows)


def failures(result: dict) -> list[str]:
    """Our checks that failed and what kept ours from running."""
    wrong = [name for name, verdict in result["checks"].items() if not verdict["passed"]]
    absent = [f"{name}: {why}" for name, why in result["left_out"].items()]
    return [text for text in wrong + absent if text.startswith("ours")]
