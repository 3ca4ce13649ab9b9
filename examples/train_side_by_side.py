"""Trains a small network on real photographs, as it is and accelerated, same weights and data.

    python -m examples.train_side_by_side [--steps 200] [--out build/examples]

Draws loss, accuracy and how far the losses are apart. Training amplifies rounding, so a third network, in
plain PyTorch with another memory format, shows how far apart two equally correct runs are.
"""

import argparse
import copy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import coordatt_fast
from bench.attention import PlainCoordAtt
from coordatt_fast.interleaved import Spread
from examples.scenes import CLASSES, dataset, small_network

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH, LOOK_EVERY = 16, 20
PLAIN, OURS = "#9aa3af", "#1a7f5a"


@dataclass
class Run:
    """One network in training: its loss and seconds per step, and its accuracy now and then."""

    label: str
    model: nn.Module
    steps: int
    layout: torch.memory_format = torch.channels_last
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.to(memory_format=self.layout)
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, 0.03, total_steps=self.steps)

    def step(self, images: Tensor, labels: Tensor) -> None:
        images = images.contiguous(memory_format=self.layout)
        start = time.perf_counter()
        loss = F.cross_entropy(self.model.train()(images), labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.losses.append(loss.item())

    @torch.inference_mode()
    def look(self, images: Tensor, labels: Tensor) -> None:
        found = self.model.eval()(images.contiguous(memory_format=self.layout)).argmax(1)
        self.accuracy.append((found == labels).float().mean().item())


def train(steps: int) -> tuple[Run, Run, Run]:
    """The network with the block in plain PyTorch, a copy accelerated, and one in another memory format."""
    images, labels = dataset(2000, training=True)
    unseen, answers = dataset(300, training=False)
    plain = small_network(lambda channels: PlainCoordAtt(channels, channels))
    ours = copy.deepcopy(plain)
    tqdm.write(str(coordatt_fast.accelerate(ours)))
    again = Run("plain PyTorch, NCHW", copy.deepcopy(plain), steps, torch.contiguous_format)
    runs = Run("plain PyTorch", plain, steps), Run("accelerated", ours, steps), again
    chooser = torch.Generator().manual_seed(1)
    # Where there is no terminal, a line now and then.
    progress = tqdm(range(steps), unit="step", ncols=90, mininterval=0.1 if sys.stderr.isatty() else 10)
    for index in progress:
        batch = torch.randint(len(images), (BATCH,), generator=chooser)
        # In turn, and in turns: what slows the machine down slows both.
        for run in runs if index % 2 else (runs[1], runs[0], again):
            run.step(images[batch], labels[batch])
        if index % LOOK_EVERY == LOOK_EVERY - 1 or index in (0, steps - 1):
            for run in runs[:2]:
                run.look(unseen, answers)
            state = {"loss": f"{runs[1].losses[-1]:.3f}", "accuracy": f"{runs[1].accuracy[-1]:.0%}"}
            progress.set_postfix(state, refresh=False)
    return runs


def apart(one: Run, other: Run) -> list[float]:
    return [abs(a - b) for a, b in zip(one.losses, other.losses)]


def draw(plain: Run, ours: Run, again: Run, caption: str, path: Path) -> None:
    figure, (loss, accuracy, gap) = plt.subplots(1, 3, figsize=(13, 4.1), layout="constrained")
    steps = range(1, len(ours.losses) + 1)
    looks = sorted({1, *range(LOOK_EVERY, len(steps) + 1, LOOK_EVERY), len(steps)})
    for run, style in ((plain, {"color": PLAIN, "linewidth": 5, "alpha": 0.7}), (ours, {"color": OURS})):
        loss.plot(steps, run.losses, label=run.label, **style)
        accuracy.plot(looks, run.accuracy, label=run.label, marker="o", markersize=3, **style)
    loss.set(title="Loss, every batch", yscale="log")
    accuracy.set(title="Accuracy on backgrounds never seen", ylim=(0, 1.02))
    accuracy.axhline(1 / len(CLASSES), color="#888888", linestyle=":", linewidth=1)
    place = (len(steps), 1 / len(CLASSES))
    accuracy.annotate("guessing", place, (0, 3), textcoords="offset points", ha="right")
    accuracy.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    for run, style in ((again, {"color": PLAIN, "linewidth": 3}), (ours, {"color": OURS})):
        gap.plot(steps, [max(distance, 1e-8) for distance in apart(run, plain)], label=run.label, **style)
    gap.set(title="Distance of the loss from plain PyTorch's", yscale="log")
    for axes in (loss, accuracy, gap):
        axes.set_xlabel("step")
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left" if axes is loss else "lower right")
    figure.supxlabel(caption, fontsize=8.5, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="default 200")
    parser.add_argument("--out", type=Path, default=Path("build/examples"), help="default build/examples")
    arguments = parser.parse_args()
    if arguments.steps < 10:
        parser.error(f"--steps is {arguments.steps}, expected 10 or more")
    plain, ours, again = train(arguments.steps)
    # The first steps warm up.
    ratio = Spread.of([a / b for a, b in zip(plain.seconds[5:], ours.seconds[5:])])
    caption = (
        f"a step is {ratio.median:.2f} times as fast accelerated ({ratio.p10:.2f} to {ratio.p90:.2f}), batch "
        f"{BATCH} of 64 x 64, {torch.get_num_threads()} threads; accuracy {plain.accuracy[-1]:.1%} and "
        f"{ours.accuracy[-1]:.1%}; losses at most {max(apart(ours, plain)):.1g} apart, plain PyTorch in two "
        f"memory formats {max(apart(again, plain)):.1g}"
    )
    print(caption)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "train_side_by_side.png"
    draw(plain, ours, again, caption, path)
    print(path)


if __name__ == "__main__":
    main()
