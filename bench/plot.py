"""The picture: speed over eager PyTorch, shape by shape, ours beside the rivals."""

import textwrap
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.report import group_key
from bench.rivals import OURS, RIVALS
from bench.timing import PAGES_SHORT

COLOURS = {
    "eager": "#c9ced6",
    "mean": "#aeb6c2",
    "compile": "#f2b880",
    "compile-mean": "#e8873a",
    "compile-max": "#b85c12",
    "onnxruntime": "#8fb8de",
    "openvino": "#7a8fc9",
    OURS: "#1a7f5a",
}


def relative(result: dict, name: str, base: str) -> float | None:
    """How many times faster ``name`` is than ``base``; None where either was not timed."""
    speedup = result["speedup"]
    if base not in speedup or name not in speedup:
        return None
    return speedup[base]["median"] / speedup[name]["median"]


def title(key: tuple) -> str:
    mode, batch, pages, threads, dtype, layout, _ = key
    what = "Training (forward + backward)" if mode == "train" else "Inference"
    kind = "" if (dtype, layout) == ("float32", "nchw") else f", {dtype} {layout}"
    return f"{what}, batch {batch}{kind}, {threads} thread{'s' * (threads != 1)}, {PAGES_SHORT[pages]}"


def panel(axes, key: tuple, group: list[dict], names: list[str], base: str) -> None:
    width = 0.84 / len(names)
    for position, name in enumerate(names):
        values = [relative(result, name, base) or 0.0 for result in group]
        places = [index + (position - (len(names) - 1) / 2) * width for index in range(len(group))]
        bars = axes.bar(places, values, width * 0.94, color=COLOURS[name], zorder=3)
        if name == OURS:
            axes.bar_label(
                bars,
                [f"{value:.1f}x" if value else "" for value in values],
                padding=2,
                fontsize=8.5,
                fontweight="bold",
                color=COLOURS[OURS],
            )
    axes.axhline(1, color="#666666", linewidth=0.8, zorder=4)
    axes.set_xticks(
        range(len(group)), ["x".join(map(str, result["case"]["shape"][1:])) for result in group], fontsize=8.5
    )
    axes.set_title(title(key), fontsize=11, loc="left")
    axes.set_ylabel(f"speed over {RIVALS[base].label}")
    axes.grid(axis="y", color="#e6e6e6", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01, y=0.14)
    axes.set_ylim(bottom=0)


def speedups(results: list[dict], path: Path, caption: str) -> bool:
    """Write the PNG; False where nothing was timed."""
    timed = [result for result in results if result["kind"] == "instance" and len(result["speedup"]) > 2]
    found = {name for result in timed for name in result["speedup"]}
    names = [name for name in RIVALS if name in found]
    if not names:
        return False
    base = names[0]
    groups = [
        (key, list(group)) for key, group in groupby(sorted(timed, key=lambda r: group_key(r)[:4]), group_key)
    ]
    widest = max(len(group) for _, group in groups)
    figure, rows = plt.subplots(
        len(groups),
        1,
        figsize=(max(7.0, 1.25 * widest + 1.5), 2.7 * len(groups) + 1.0),
        squeeze=False,
        layout="constrained",
    )
    for axes, (key, group) in zip(rows[:, 0], groups, strict=True):
        panel(axes, key, group, [*names, OURS], base)
    rows[-1, 0].set_xlabel("feature map, C x H x W")
    labels = [RIVALS[name].label for name in names] + ["coordatt_fast"]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in (*names, OURS)]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    caption = textwrap.fill(caption.replace("\n", ". "), int(13 * figure.get_figwidth()))
    figure.supxlabel(caption, fontsize=7.5, color="#666666")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
