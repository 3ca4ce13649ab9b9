"""The picture: speed over eager PyTorch, shape by shape, ours beside the rivals."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.baselines import OURS, RIVALS
from bench.report import group_title, groups

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


def label(result: dict) -> str:
    pages = "" if result["pages"] == "plain" else f"\n{result['pages']} pages"
    return "x".join(map(str, result["case"]["shape"][1:])) + pages


def panel(axes, key: tuple, group: list[dict], names: list[str], base: str, slots: int) -> None:
    """One mode and batch: for every shape the contestants that took part, side by side."""
    width = 0.86 / len(names)
    tallest = max(relative(result, name, base) or 1.0 for result in group for name in names)
    ends = [result["speedup"][base]["p90"] for result in group if base in result["speedup"]]
    top = min(max([tallest, *ends]) * 1.15, 1.7 * tallest)  # a wild round must not flatten the bars
    for index, result in enumerate(group):
        present = [name for name in names if relative(result, name, base)]
        for position, name in enumerate(present):
            place = index + (position - (len(present) - 1) / 2) * width
            value = relative(result, name, base)
            axes.bar(place, value, width * 0.92, color=COLOURS[name], zorder=3)
            if name == OURS:
                spread = result["speedup"][base]
                high = max(spread["p90"], value)
                reach = [[value - min(spread["p10"], value)], [high - value]]
                axes.errorbar(place, value, reach, color="#0d4a34", linewidth=1, capsize=2, zorder=5)
                text = f"{value:.1f}x" if value < 9.95 else f"{value:.0f}x"
                axes.annotate(
                    text,
                    (place, min(high, 0.92 * top)),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    fontweight="bold",
                    color=COLOURS[OURS],
                )
    axes.axhline(1, color="#666666", linewidth=0.8, zorder=4)
    axes.set_xticks(range(len(group)), [label(result) for result in group], fontsize=8.5)
    axes.set_title(group_title(key), fontsize=11, loc="left")
    axes.set_ylabel(f"speed over {RIVALS[base].label}")
    axes.grid(axis="y", color="#e6e6e6", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(-0.55, slots - 0.45)
    axes.set_ylim(0, top)


def speedups(results: list[dict], path: Path, caption: str) -> bool:
    """Write the PNG; False where nothing was timed."""
    timed = [result for result in results if result["kind"] == "instance" and len(result["speedup"]) > 2]
    found = {name for result in timed for name in result["speedup"]}
    names = [name for name in RIVALS if name in found]
    if not names:
        return False
    base = names[0]
    panels = groups(timed)
    slots = max(6, *(len(group) for _, group in panels))
    figure, rows = plt.subplots(
        len(panels),
        1,
        figsize=(1.1 * slots + 1.5, 2.6 * len(panels) + 1.0),
        squeeze=False,
        layout="constrained",
    )
    for axes, (key, group) in zip(rows[:, 0], panels, strict=True):
        panel(axes, key, group, [*names, OURS], base, slots)
    rows[-1, 0].set_xlabel("feature map, C x H x W")
    labels = [RIVALS[name].label for name in names] + ["coordatt_fast"]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in (*names, OURS)]
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels) if slots > 7 else 4, frameon=False
    )
    caption = textwrap.fill(caption.replace("\n", ". "), int(13 * figure.get_figwidth()))
    figure.supxlabel(caption, fontsize=7.5, color="#666666")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
