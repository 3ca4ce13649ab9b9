"""Turns results into what people read: tables on the terminal, CSV and JSON."""

import csv
import json
import math
import textwrap
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from bench import machine, whole_network
from bench.baselines import CLONE, OURS, OURS_OUT, RIVALS
from bench.timing import PAGES_SHORT

NETWORK_INTRODUCTION = """
MobileNetV2-1.0, random weights, on crops of {count} real photographs ({names}).
Attention follows the depthwise convolution of the 16 blocks that expand, as in the authors' network.
"""
NETWORK_LEGEND = """
In brackets: time added over the network without attention. 'with neighbours': after accelerate, by
which the blocks take in the normalisation and activation before them. Training is forward, loss and
backward. 'ours - plain' above is the largest absolute difference; the errors are norms relative to the
truth's, plain PyTorch's the largest over 8 copies of the photographs that differ by one rounding.
"""
BLOCKS_INTRODUCTION = """
CoordAtt block by block. 'ours' is the time of one call; 'vs X' says how many times
faster ours is than X (median over interleaved rounds, p10-p90 of the first in brackets).
"""
BLOCKS_LEGEND = """
(xN): repeats of the shape in the network. GB/s: the bytes a two-pass algorithm has to move (inference: x
twice, out once; training: also g twice, x again, dx once) over the time. fits: the first cache that holds x
and out together. error: our largest error against a float64 run over plain PyTorch's own. clones: our time
over that of one x.clone(). pages: how malloc treats outputs above 16 MB; fresh: they are mapped anew on each
call, as plain malloc does from 32 MB; kept: their pages are used again. Smaller outputs: plain malloc.
coordatt_fast keeps the memory of its own outputs from 1 MB up (COORDATT_FAST_KEEP_MB), whatever malloc does;
the rows with kept pages compare the arithmetic alone. out=: our functional form writing into an existing
buffer.
"""
PAGES_CELL = {"plain": "", "fresh": "fresh", "kept": "kept"}


def duration(seconds: float) -> str:
    """Three significant digits in us, ms or s."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if seconds < 999.5 * scale or unit == "s":
            value = seconds / scale
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def times(value: float) -> str:
    return f"{value:.1f}x" if value < 99.5 else f"{value:.0f}x"


def prose(text: str) -> str:
    """A paragraph, wrapped."""
    return textwrap.fill(text.strip(), 110)


def threads_text(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns two blanks apart, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        [
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def unfused(results: Iterable[dict]) -> list[str]:
    """A loud line for every reason why a measured call was not fused."""
    found = {(result["plan"]["tier"], result["plan"]["reason"]) for result in results if "plan" in result}
    return [
        f"!!! NOT THE FUSED KERNELS: the {tier} tier was measured, because {reason}"
        for tier, reason in sorted(found)
        if tier != "fused"
    ]


def group_key(result: dict) -> tuple:
    """What the results of one table and of one panel of the plot have in common."""
    case = result["case"]
    return case["mode"], case["shape"][0], result["threads"], case["dtype"], case["layout"], case["device"]


def groups(results: Iterable[dict]) -> list[tuple[tuple, list[dict]]]:
    """The instances by ``group_key``, shapes in network order, fresh pages before kept ones."""
    ordered = sorted(
        (result for result in results if result["kind"] == "instance"),
        key=lambda result: (group_key(result), result["order"], result["pages"]),
    )
    return [(key, list(group)) for key, group in groupby(ordered, group_key)]


def group_title(key: tuple) -> str:
    mode, batch, threads, dtype, layout, device = key
    what = "Training (forward + backward)" if mode == "train" else "Inference"
    kind = "" if (dtype, layout) == ("float32", "nchw") else f", {dtype} {layout}"
    return f"{what}, batch {batch}{kind}, {threads_text(threads) if device == 'cpu' else device}"


def instance_row(result: dict, rivals: list[str]) -> list[str]:
    count = result["case"]["count"]
    row = [result["name"] + (f" (x{count})" if count > 1 else ""), PAGES_CELL[result["pages"]]]
    if not result["checks"][OURS]["passed"]:
        return row + ["WRONG"] + [""] * (5 + len(rivals))
    cells = [
        duration(result["seconds"][OURS]["median"]),
        duration(result["seconds"][OURS_OUT]["median"]) if OURS_OUT in result["seconds"] else "",
        f"{result['gb_per_second']:.1f}",
        result["fits_in"],
        f"{result['our_error'] / result['plain_error']:.1f}x" if result["plain_error"] else "",
        f"{1 / result['speedup'][CLONE]['median']:.1f}",
    ]
    for name in rivals:
        if name in result["speedup"]:
            spread = result["speedup"][name]
            cell = times(spread["median"])
            if name == rivals[0]:
                cell += f" ({spread['p10']:.1f}-{spread['p90']:.1f})"
        elif name in result["checks"]:
            cell = "wrong"
        else:
            cell = "-"
        cells.append(cell)
    return row + cells


def total_row(group: list[dict], rivals: list[str], pages: str) -> list[str]:
    """All blocks together, times summed with their counts; a rival that missed a shape has no total."""

    def total(name: str) -> float:
        if any(name not in result["seconds"] for result in group):
            return math.nan
        return sum(result["case"]["count"] * result["seconds"][name]["median"] for result in group)

    mine = total(OURS)
    blocks = sum(result["case"]["count"] for result in group)
    moved = sum(result["case"]["count"] * result["bytes_moved"] for result in group)
    ratios = [total(name) / mine for name in rivals]
    cells = ["-" if math.isnan(ratio) else times(ratio) for ratio in ratios]
    bandwidth, clones = f"{moved / mine / 1e9:.1f}", f"{mine / total(CLONE):.1f}"
    return [f"these {blocks} blocks", pages, duration(mine), "", bandwidth, "", "", clones, *cells]


def total_rows(group: list[dict], rivals: list[str]) -> list[list[str]]:
    """One total per page state; the smaller outputs, measured once, count in both."""
    shapes = {result["name"] for result in group}
    if len(shapes) < 2 or any(not result["seconds"] for result in group):
        return []
    states = [pages for pages in ("fresh", "kept") if any(result["pages"] == pages for result in group)]
    return [
        total_row(
            [result for result in group if result["pages"] in ("plain", pages)], rivals, PAGES_CELL[pages]
        )
        for pages in states or ["plain"]
    ]


def instance_table(key: tuple, group: list[dict]) -> str:
    rivals = [name for name in RIVALS if any(name in r["speedup"] or name in r["checks"] for r in group)]
    heads = [f"vs {RIVALS[name].label}" for name in rivals]
    header = ["N x C x H x W", "pages", "ours", "out=", "GB/s", "fits", "error", "clones", *heads]
    rows = [instance_row(result, rivals) for result in group] + total_rows(group, rivals)
    used = [index for index in range(len(header)) if any(row[index] for row in rows)]
    header, *rows = [[row[index] for index in used] for row in [header, *rows]]
    return f"{group_title(key)}\n{table(header, rows)}"


def instance_tables(results: list[dict]) -> str:
    """One table per mode, batch and thread count."""
    found = groups(results)
    if not found:
        return ""
    legend = [
        f"  {rival.label}: {rival.meaning}"
        for name, rival in RIVALS.items()
        if any(name in result["speedup"] for _, group in found for result in group)
    ]
    parts = [
        prose(BLOCKS_INTRODUCTION),
        *(instance_table(key, group) for key, group in found),
        prose(BLOCKS_LEGEND),
    ]
    return "\n\n".join(parts) + "\n" + "\n".join(legend)


def network_tables(results: list[dict]) -> str:
    """Agreement and images/s of the whole network."""
    measured = [result for result in results if result["kind"] == "network"]
    if not measured:
        return ""
    photographs = measured[0]["photographs"]
    introduction = NETWORK_INTRODUCTION.format(count=len(photographs), names=", ".join(photographs))
    parts = [prose(introduction)]
    agreements = {result["agreement"]["what"]: result["agreement"] for result in measured}
    header = [
        "error against a float64 run",
        "ours",
        "plain PyTorch",
        "ours in float64",
        "ours - plain",
        "largest value",
    ]
    rows = [
        [
            f"{what}, {check['images']} photographs",
            f"{check['our_error']:.1e}",
            f"{check['plain_error']:.1e}",
            f"{check['float64_error']:.1e}",
            f"{check['largest_difference']:.1e}",
            f"{check['largest_value']:.2g}",
        ]
        for what, check in sorted(agreements.items(), reverse=True)
    ]
    parts.append(table(header, rows))
    names = list(whole_network.LABELS)
    header = ["images/s"] + [whole_network.LABELS[name] for name in names] + ["the same vs plain"]
    rows = []
    for result in measured:
        case = result["case"]
        pages = PAGES_SHORT[result["pages"]]
        label = f"{case['mode']}, batch {case['batch']}, {threads_text(result['threads'])}, {pages}"
        if not result["images_per_second"]:
            rows.append([label, "WRONG"] + [""] * len(names))
            continue
        cells = []
        for name in names:
            cost = "" if name == whole_network.NONE else f" ({result['cost'][name]:+.0%})"
            cells.append(f"{result['images_per_second'][name]:.1f}{cost}")
        rows.append([label, *cells, times(result["speedup"]["median"])])
    counts = measured[0]["parameters"]
    parameters = ["parameters"] + [f"{counts[name] / 1e6:.2f} M" for name in names] + [""]
    parts.append(table(header, [*rows, parameters]))
    parts.append(prose(NETWORK_LEGEND))
    return "\n\n".join(parts)


def noisy(results: list[dict]) -> str:
    """A warning when ratios varied a lot from round to round; empty when they were steady."""
    spreads = [
        (result, next(spread for name, spread in result["speedup"].items() if name not in (OURS, OURS_OUT)))
        for result in results
        if result.get("speedup") and result["kind"] == "instance"
    ]
    wild = [result["name"] for result, spread in spreads if spread["p90"] > 2 * spread["p10"]]
    if not wild:
        return ""
    count = f"{len(wild)} of {len(spreads)}"
    return prose(
        f"!!! NOISY: in {count} cases the ratio more than doubles from its 10th to its 90th percentile. "
        "Something else was using the cores; close it and run again."
    )


def left_out(results: list[dict], planned: list[str]) -> str:
    """What was not measured, and why; each line once."""
    lines = list(planned)
    skipped: dict[str, list[str]] = {}
    for result in results:
        if result["kind"] == "skipped":
            case = result["job"]["case"]
            what = (
                "x".join(map(str, case["shape"]))
                if "shape" in case
                else f"whole network, batch {case['batch']}"
            )
            skipped.setdefault(f"{case['mode']}, {PAGES_SHORT[result['pages']]}", []).append(what)
    for where, what in skipped.items():
        lines.append(prose(f"no time left (raise --budget), {where}: {', '.join(what)}"))
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result.get("left_out", {}).items():
            reasons.setdefault((name, reason), []).append(f"{result['name']} {result['case']['mode']}")
    for (name, reason), where in reasons.items():
        some = ", ".join(dict.fromkeys(where)) if len(where) <= 3 else f"{len(where)} cases"
        lines.append(f"{RIVALS[name].label}, {some}: {reason}")
    return "Left out:\n" + textwrap.indent("\n".join(lines), "  ") if lines else ""


def failures(results: list[dict]) -> list[str]:
    """Every failed correctness check in words; empty when all is well."""
    lines = []
    for result in results:
        if result["kind"] == "died":
            lines.append(result["text"])
        if result["kind"] == "network" and not result["agreement"]["passed"]:
            check = result["agreement"]
            lines.append(
                f"{result['name']}: {check['what']} of ours are off by {check['our_error']:.1e} "
                f"(allowed {check['allowed']:.1e}), in float64 by {check['float64_error']:.1e} "
                f"(allowed {check['float64_allowed']:.1e})"
            )
        for name, verdict in result.get("checks", {}).items():
            if not verdict["passed"]:
                lines.append(f"{result['name']} {result['case']['mode']}, {name}: {verdict['text']}")
    return lines


def whole(facts: dict, results: list[dict], planned: list[str]) -> str:
    """The full text of the report."""
    bad = failures(results)
    verdict = (
        "ALL CHECKS PASSED"
        if not bad
        else "CHECKS FAILED, no speed is given for these:\n" + "\n".join(f"  {b}" for b in bad)
    )
    parts = [
        machine.line(facts),
        machine.busy(facts),
        "\n".join(unfused(results)),
        network_tables(results),
        instance_tables(results),
        noisy(results),
        left_out(results, planned),
        verdict,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


COLUMNS = (
    "shape",
    "count",
    "mode",
    "dtype",
    "layout",
    "device",
    "threads",
    "pages",
    "contestant",
    "median_s",
    "p10_s",
    "p90_s",
    "ours_faster_median",
    "ours_faster_p10",
    "ours_faster_p90",
    "rounds",
    "calls_per_block",
    "bytes_moved",
    "gb_per_s",
    "error",
    "error_allowed",
    "tier",
    "backend",
)


def csv_rows(results: list[dict]) -> Iterable[dict]:
    """One row per instance and contestant; the whole network's images/s are in the JSON."""
    for result in results:
        if result["kind"] != "instance":
            continue
        for name, seconds in result["seconds"].items():
            speedup, check = result["speedup"][name], result["checks"].get(name, {})
            own = name in (OURS, OURS_OUT)
            yield {
                **{key: result["case"][key] for key in ("count", "mode", "dtype", "layout", "device")},
                "shape": result["name"],
                "threads": result["threads"],
                "pages": result["pages"],
                "contestant": name,
                "median_s": seconds["median"],
                "p10_s": seconds["p10"],
                "p90_s": seconds["p90"],
                "ours_faster_median": speedup["median"],
                "ours_faster_p10": speedup["p10"],
                "ours_faster_p90": speedup["p90"],
                "rounds": result["rounds"],
                "calls_per_block": result["calls_per_block"][name],
                "bytes_moved": result["bytes_moved"],
                "gb_per_s": result["bytes_moved"] / seconds["median"] / 1e9 if own else "",
                "error": check.get("error", ""),
                "error_allowed": check.get("allowed", ""),
                "tier": result["plan"]["tier"] if own else "",
                "backend": result["plan"]["backend"] if own else "",
            }


def finite(value):
    """NaN and infinities as text, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(folder: Path, facts: dict, settings: dict, results: list[dict]) -> None:
    """results.json (everything) and results.csv (one row per instance and contestant)."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"machine": facts, "settings": settings, "results": results}
    (folder / "results.json").write_text(json.dumps(finite(document), indent=1, allow_nan=False) + "\n")
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(csv_rows(results))
