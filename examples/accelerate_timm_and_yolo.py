"""Accelerates networks of timm and ultralytics as they come, and measures them before and after.

    python -m examples.accelerate_timm_and_yolo [--batch 4] [--out build/examples]

The weights are random: this is about speed and about equal results, on photographs.
"""

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor, nn

import coordatt_fast
from bench import photos
from coordatt_fast.interleaved import Local, Race, race
from coordatt_fast.side_by_side import Difference, differences, pass_of
from examples.third_party import timm_network, yolov8n

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PLAIN, OURS = "#c9ced6", "#1a7f5a"
NETWORKS = {
    "timm efficientnet_b0": (lambda: timm_network("efficientnet_b0"), 224),
    "timm resnet50": (lambda: timm_network("resnet50"), 224),
    "ultralytics yolov8n": (yolov8n, 320),
}
MODES = {"inference": False, "training": True}


class Row(NamedTuple):
    network: str
    mode: str
    batch: int
    measured: Race

    def rate(self, which: str) -> float:
        """Images per second."""
        return self.batch / self.measured.seconds(which).median


def check(name: str, before: nn.Module, after: nn.Module, images: Tensor) -> None:
    """Raises where the results differ: nothing that is wrong is measured."""
    worst: list[Difference] = []
    for training in MODES.values():
        worst += differences(before, after, images, training)
    wrong = [row for row in worst if not row.within]
    if wrong:
        raise RuntimeError(f"{name}: accelerate changed its results: {wrong}")
    exact = max(row.error for row in worst if row.dtype is torch.float64)
    print(f"  outputs, gradients and statistics agree in float64 to {exact:.0e}")


def measure(name: str, build, images: Tensor, limit: float) -> list[Row]:
    torch.manual_seed(0)
    before = build()
    after = copy.deepcopy(before)
    report = coordatt_fast.accelerate(after)
    found = len(report.replaced), len(report.skipped)
    print(f"{name}: {found[0]} {report.replaced[0].cls} accelerated, {found[1]} left alone")
    check(name, before, after, images[:2, :, :96, :128].contiguous())
    rows = []
    for mode, training in MODES.items():
        calls = {
            label: Local(pass_of(model, images, training))
            for label, model in (("before", before), ("after", after))
        }
        rows.append(Row(name, mode, len(images), race(calls, limit=limit)))
        ratio = rows[-1].measured.speedup("after", over="before")
        print(
            f"  {mode:<9}  {rows[-1].rate('before'):.1f} to {rows[-1].rate('after'):.1f} images/s, "
            f"{ratio.median:.2f} times as fast ({ratio.p10:.2f} to {ratio.p90:.2f})"
        )
    return rows


def draw(rows: list[Row], caption: str, path: Path) -> None:
    figure, panels = plt.subplots(1, len(MODES), figsize=(10.5, 4), layout="constrained")
    for axes, mode in zip(panels, MODES):
        shown = [row for row in rows if row.mode == mode]
        for index, row in enumerate(shown):
            for offset, which, colour in ((-0.2, "before", PLAIN), (0.2, "after", OURS)):
                label = which if index == 0 else None
                axes.bar(index + offset, row.rate(which), 0.38, color=colour, label=label, zorder=3)
            ratio = row.measured.speedup("after", over="before")
            axes.annotate(
                f"{ratio.median:.2f}x",
                (index + 0.2, row.rate("after")),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
                color=OURS,
            )
        names = [row.network.replace(" ", "\n") for row in shown]
        axes.set_xticks(range(len(shown)), names, fontsize=9)
        axes.set_title(mode if mode == "inference" else "training (forward and backward)", loc="left")
        axes.set_ylabel("images per second")
        axes.grid(axis="y", color="#e6e6e6", zorder=0)
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, title="accelerate(model)", alignment="left")
    figure.supxlabel(caption, fontsize=8.5, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default 4)")
    parser.add_argument("--limit", type=float, default=6, help="seconds per network and mode (default 6)")
    parser.add_argument("--out", type=Path, default=Path("build/examples"), help="default build/examples")
    arguments = parser.parse_args()
    if arguments.batch < 2:
        parser.error(f"--batch is {arguments.batch}, expected 2 or more")
    rows = []
    for name, (build, size) in NETWORKS.items():
        rows += measure(name, build, photos.batch(arguments.batch, size), arguments.limit)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "accelerate_timm_and_yolo.png"
    caption = (
        f"whole networks, batch {arguments.batch}, float32, {torch.get_num_threads()} threads, measured in "
        "turn before and after; the number is the median of the rounds' ratios"
    )
    draw(rows, caption, path)
    print(path)


if __name__ == "__main__":
    main()
