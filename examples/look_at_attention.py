"""Draws what Coordinate Attention attends to: a_h, a_w and their product over photographs.

    python -m examples.look_at_attention [--steps 200] [--block 4] [--out build/examples]

The network is trained briefly on the task of examples/scenes.py: that shows how gates find an object by its
row and its column, not what they do in a network trained on ImageNet. Every scene is shown with the one
channel that varies most over it.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from coordatt_fast import CoordAtt
from examples.scenes import CLASSES, dataset, scene, small_network, tensor
from examples.train_side_by_side import BATCH, Run

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIZE, SCALE = (64, 96), 5
ROWS, COLUMNS = "#1a7f5a", "#b85c12"


def train(steps: int) -> nn.Module:
    images, labels = dataset(1500, training=True)
    run = Run("ours", small_network(lambda channels: CoordAtt(channels, channels)), steps)
    chooser = torch.Generator().manual_seed(1)
    progress = tqdm(range(steps), unit="step", ncols=90, mininterval=0.1 if sys.stderr.isatty() else 10)
    for _ in progress:
        batch = torch.randint(len(images), (BATCH,), generator=chooser)
        run.step(images[batch], labels[batch])
        progress.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
    run.look(*dataset(300, training=False))
    print(f"accuracy on backgrounds never seen: {run.accuracy[-1]:.1%}")
    return run.model


def gates(model: nn.Module, block: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a_h [N, C, H, 1], a_w [N, C, 1, W] of a block inside model, and the model's answers [N].

    Hooks on the block's convolutions work as with the original (the block then runs in the hybrid tier).
    """
    found = {}

    def keep(name):
        return lambda convolution, inputs, out: found.update({name: out.sigmoid()})

    hooks = [getattr(block, name).register_forward_hook(keep(name)) for name in ("conv_h", "conv_w")]
    with torch.no_grad():
        answers = model.eval()(images).argmax(1)
    for hook in hooks:
        hook.remove()
    return found["conv_h"], found["conv_w"], answers


def one_of_each(seed: int) -> tuple[list[Image.Image], list[int]]:
    """The first scene of every class, large enough to look at."""
    chooser, found = np.random.default_rng(seed), {}
    while len(found) < len(CLASSES):
        picture, kind = scene(chooser, SIZE, training=False, scale=SCALE)
        found.setdefault(kind, picture)
    kinds = sorted(found)
    return [found[kind] for kind in kinds], kinds


def profile(axes, values: Tensor, colour: str, upright: bool) -> None:
    """A gate along its axis, as steps beside the picture."""
    orientation = "horizontal" if upright else "vertical"
    axes.stairs(values, orientation=orientation, color=colour, fill=True, alpha=0.3)
    axes.stairs(values, orientation=orientation, color=colour)
    low, high = values.min().item(), values.max().item()
    spare = 0.12 * (high - low) + 1e-3
    if upright:
        axes.set(xlim=(low - spare, high + spare), ylim=(len(values), 0), yticks=[], xticks=[low, high])
    else:
        axes.set(ylim=(low - spare, high + spare), xlim=(0, len(values)), xticks=[], yticks=[low, high])
    along = axes.xaxis if upright else axes.yaxis
    along.set_major_formatter("{x:.2f}")
    axes.tick_params(labelsize=7, length=2)
    axes.spines[["top", "right"]].set_visible(False)


# A scene in inches: the picture, its gates beside it, and the product over it.
WIDE, HIGH, GATE, GAP = 3.0, 2.0, 0.5, 0.12
SCENE_WIDE, SCENE_HIGH = 2 * WIDE + GATE + 1.25, HIGH + GATE + 0.75


def draw(pictures, kinds, a_h: Tensor, a_w: Tensor, answers, caption: str, path: Path) -> None:
    rows = -(-len(pictures) // 2)
    size = 2 * SCENE_WIDE, rows * SCENE_HIGH + 0.35
    figure = plt.figure(figsize=size)

    def place(left: float, top: float, width: float, height: float):
        """Axes at so many inches from the figure's left and top."""
        bottom = size[1] - top - height
        return figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))

    for index, (picture, kind) in enumerate(zip(pictures, kinds)):
        left, top = 0.5 + index % 2 * SCENE_WIDE, 0.35 + index // 2 * SCENE_HIGH
        product = (a_h[index] * a_w[index]).numpy()
        channel = int(product.std((1, 2)).argmax())
        axes = place(left, top, WIDE, HIGH)
        axes.imshow(picture)
        answer = CLASSES[int(answers[index])]
        right = "" if answer == CLASSES[kind] else f" (it is the {CLASSES[kind]})"
        axes.set_title(f"answer: {answer}{right}", fontsize=10, loc="left")
        axes.set_axis_off()
        axes = place(left + WIDE + GAP, top, GATE, HIGH)
        profile(axes, a_h[index, channel, :, 0], ROWS, upright=True)
        axes.set_title("$a_h$", fontsize=11, color=ROWS)
        axes = place(left, top + HIGH + GAP, WIDE, GATE)
        profile(axes, a_w[index, channel, 0], COLUMNS, upright=False)
        axes.text(1.02, 0.35, "$a_w$", transform=axes.transAxes, fontsize=11, color=COLUMNS)
        second = left + WIDE + 2 * GAP + GATE + 0.1
        axes = place(second, top, WIDE, HIGH)
        axes.imshow(picture.convert("L"), cmap="gray", vmin=-80, vmax=300)
        extent = (0, picture.width, picture.height, 0)
        heat = axes.imshow(product[channel], cmap="inferno", alpha=0.6, extent=extent)
        axes.set_title(f"$a_h \\cdot a_w$, channel {channel} of {len(product)}", fontsize=10, loc="left")
        axes.set_axis_off()
        bar = figure.colorbar(heat, cax=place(second, top + HIGH + GAP, WIDE, 0.1), orientation="horizontal")
        bar.ax.tick_params(labelsize=7, length=2)
    figure.text(0.5, 0.15 / size[1], caption, fontsize=8.5, color="#555555", ha="center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of training (default 200)")
    parser.add_argument(
        "--block", type=int, default=4, choices=range(1, 7), help="which attention (default 4)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/examples"), help="default build/examples")
    arguments = parser.parse_args()
    if arguments.steps < 10:
        parser.error(f"--steps is {arguments.steps}, expected 10 or more")
    model = train(arguments.steps)
    block = [module for module in model.modules() if isinstance(module, CoordAtt)][arguments.block - 1]
    pictures, kinds = one_of_each(seed=5)
    images = tensor([picture.resize(SIZE[::-1], Image.Resampling.BOX) for picture in pictures])
    a_h, a_w, answers = gates(model, block, images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "look_at_attention.png"
    caption = (
        f"attention {arguments.block} of 6 after {arguments.steps} steps of training, "
        f"maps of {a_h.shape[2]} x {a_w.shape[3]}; in each scene the channel that varies most"
    )
    draw(pictures, kinds, a_h, a_w, answers, caption, path)
    print(path)


if __name__ == "__main__":
    main()
