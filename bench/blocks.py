"""The attention blocks that a user would put in CoordAtt's place, one per place, built from its number of
channels.

Squeeze-and-excitation, ECA, CBAM and global context come from timm; triplet attention and strip pooling are
written from their papers. Where a block squeezes its channels, it does so to ``squeezed(channels)``, the
width of the CoordAtt paper's comparison.
"""

import importlib
import types
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.third_party import import_torchvision

REDUCTION = 24  # of SE and CBAM in table 4 of the CoordAtt paper


def squeezed(channels: int) -> int:
    return max(8, channels // REDUCTION)


def timm_layers() -> types.ModuleType:
    """``timm.layers``; ``ModuleNotFoundError`` where timm or torchvision is not installed."""
    try:
        import_torchvision()
        return importlib.import_module("timm.layers")
    except ModuleNotFoundError as error:
        install = "pip install --no-deps -r requirements/third-party.txt"
        raise ModuleNotFoundError(f"the blocks of timm need it: {error}; {install}") from error


def from_timm(name: str, channels: int) -> nn.Module:
    """One of timm's blocks over ``[N, channels, H, W]``."""
    layers = timm_layers()
    width = squeezed(channels)
    makers: dict[str, Callable[[], nn.Module]] = {
        "se": partial(layers.SEModule, channels, rd_channels=width),
        "eca": partial(layers.EcaModule, channels),
        "cbam": partial(layers.cbam.CbamModule, channels, rd_channels=width),
        "gc": partial(layers.GlobalContext, channels, rd_channels=width),
    }
    return makers[name]()


class TripletAttention(nn.Module):
    """Misra et al., "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021, section 3.2.

    One gate over (H, W), one over (C, W) and one over (C, H), each from the maximum and the mean over the
    third dimension by a 7 x 7 convolution; the mean of the three products.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1), nn.Sigmoid())
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = 0
        for axis, gate in zip((1, 2, 3), self.gates, strict=True):
            turned = x.transpose(1, axis)
            pooled = torch.cat([turned.amax(1, keepdim=True), turned.mean(1, keepdim=True)], dim=1)
            out = out + (turned * gate(pooled)).transpose(1, axis)
        return out / 3


class StripPooling(nn.Module):
    """Hou et al., "Strip Pooling: Rethinking Spatial Pooling for Scene Parsing", CVPR 2020, section 3.1.

    Means over rows and over columns, each through a convolution over 3 neighbours, C -> C; their sum through
    a 1 x 1 convolution and a sigmoid is the gate. That convolution is linear and is taken of the strips.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rows = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), bias=False)
        self.columns = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1), bias=False)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.mix(self.rows(x.mean(3, keepdim=True)))
        columns = nn.functional.conv2d(self.columns(x.mean(2, keepdim=True)), self.mix.weight)
        return x * (rows + columns).sigmoid()


OTHERS: dict[str, Callable[[int], nn.Module]] = {
    "se": partial(from_timm, "se"),
    "eca": partial(from_timm, "eca"),
    "cbam": partial(from_timm, "cbam"),
    "gc": partial(from_timm, "gc"),
    "triplet": TripletAttention,
    "strip": StripPooling,
}
