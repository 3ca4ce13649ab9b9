"""A small task on real photographs that come inside PyPI packages, and a small network for it.

A round cutting of one of four photographs (a flower, a cat, a cup, a face) lies somewhere on a crop of
another one. Which of the four is it? Test scenes have backgrounds that no training scene has.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from bench import photos

# Photograph, centre and radius of what is cut out, in pixels.
OBJECTS = {
    "flower": ("flower.jpg", (308, 220), 140),
    "cat": ("chelsea.png", (233, 160), 135),
    "cup": ("coffee.png", (296, 130), 125),
    "face": ("astronaut.png", (229, 100), 80),
}
BACKGROUNDS = ("china.jpg", "rocket.jpg", "motorcycle_left.png")
CLASSES = tuple(OBJECTS)


@functools.cache
def _photo(name: str) -> Image.Image:
    return next(Image.open(path).convert("RGB") for path in photos.paths() if path.name == name)


@functools.cache
def _half(name: str) -> Image.Image:
    """A photograph at half its size, of which small scenes are made in less time."""
    return _photo(name).reduce(2)


@functools.cache
def _cutting(name: str) -> Image.Image:
    """The object as a square RGBA picture, transparent outside its circle."""
    photo, (x, y), radius = OBJECTS[name]
    square = _photo(photo).crop((x - radius, y - radius, x + radius, y + radius)).convert("RGBA")
    mask = Image.new("L", square.size)
    ImageDraw.Draw(mask).ellipse((0, 0, *square.size), fill=255)
    square.putalpha(mask)
    return square.resize((160, 160), Image.Resampling.LANCZOS)


def scene(
    chooser: np.random.Generator, size: tuple[int, int], training: bool, scale: int = 1
) -> tuple[Image.Image, int]:
    """A picture of size (H, W) times scale, and the index of the class of what lies on it.

    Training scenes have the left part of a photograph as background, the others its right part. The choice
    does not depend on scale.
    """
    height, width = size
    photo = (_half if scale == 1 else _photo)(BACKGROUNDS[chooser.integers(len(BACKGROUNDS))])
    left, right = (0, 0.6 * photo.width) if training else (0.6 * photo.width, photo.width)
    most = min((right - left) / width, photo.height / height)
    zoom = chooser.uniform(0.6, 1.0) * most
    x = chooser.uniform(left, right - zoom * width)
    y = chooser.uniform(0, photo.height - zoom * height)
    box = (x, y, x + zoom * width, y + zoom * height)
    picture = photo.resize((width * scale, height * scale), Image.Resampling.BILINEAR, box)
    kind = int(chooser.integers(len(CLASSES)))
    side = chooser.uniform(18, 30)
    column, row = chooser.uniform(0, width - side), chooser.uniform(0, height - side)
    angle, mirrored = chooser.uniform(-25, 25), chooser.random() < 0.5
    cutting = _cutting(CLASSES[kind]).rotate(angle, Image.Resampling.BILINEAR)
    if mirrored:
        cutting = cutting.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cutting = cutting.resize([round(side * scale)] * 2, Image.Resampling.BOX)
    picture.paste(cutting, (round(column * scale), round(row * scale)), cutting)
    return picture, kind


def tensor(pictures: list[Image.Image]) -> Tensor:
    """[N, 3, H, W] float32, normalised as ImageNet's photographs."""
    values = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (photos.MEAN, photos.STD))
    return ((values - mean) / std).contiguous()


def dataset(count: int, training: bool, size: tuple[int, int] = (64, 64)) -> tuple[Tensor, Tensor]:
    """count seeded scenes [count, 3, H, W] and their classes [count]."""
    chooser = np.random.default_rng(int(training))
    pictures, kinds = zip(*(scene(chooser, size, training) for _ in range(count)))
    return tensor(pictures), torch.tensor(kinds)


class Residual(nn.Module):
    """Expand, depthwise convolution, attention, project: MobileNetV2's block, attention where the authors of
    Coordinate Attention put it."""

    def __init__(self, inp: int, out: int, stride: int, attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        wide = 4 * inp
        self.body = nn.Sequential(
            nn.Conv2d(inp, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.SiLU(),
            attention(wide),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.adds = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.adds else y


def small_network(attention: Callable[[int], nn.Module], seed: int = 0) -> nn.Sequential:
    """[N, 3, H, W] to [N, 4] scores. attention(channels) makes the block, six times."""
    torch.manual_seed(seed)
    blocks = [(16, 24, 1), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 48, 2), (48, 48, 1)]
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU()),
        *(Residual(*block, attention) for block in blocks),
        nn.Sequential(nn.Conv2d(48, 128, 1, bias=False), nn.BatchNorm2d(128), nn.SiLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, len(CLASSES)),
    )
