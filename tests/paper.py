"""The paper's block, written once more from the article and on its own: the yardstick of every test.

It follows figure 2(c) and equations 4 to 8 of Hou, Zhou, Feng, "Coordinate Attention for Efficient Mobile
Network Design" (CVPR 2021) operation by operation: two adaptive pools, one concatenation, 1x1 convolution,
batch normalisation, activation, split, two 1x1 convolutions, two sigmoids, one product. Nothing here is
imported from the package under test. Run in float64 it is the truth; run in another dtype it is "plain
PyTorch in that dtype".
"""

import torch
from torch import nn


class HSigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6()

    def forward(self, x):
        return self.relu(x + 3) / 6


class HSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = HSigmoid()

    def forward(self, x):
        return x * self.sigmoid(x)


ACTIVATIONS = {"hard_swish": HSwish, "silu": nn.SiLU, "relu": nn.ReLU, "relu6": nn.ReLU6}


class PaperCoordAtt(nn.Module):
    """`inp`, `oup`, `reduction` as in the article; the keyword arguments are the package's extras."""

    def __init__(
        self,
        inp,
        oup,
        reduction=32,
        *,
        activation="hard_swish",
        bias=True,
        skip=False,
        mid_channels=None,
        norm=None,
    ):
        super().__init__()
        mip = mid_channels or max(8, inp // reduction)
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        self.conv1 = nn.Conv2d(inp, mip, kernel_size=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(mip) if norm is None else norm(mip)
        self.act = ACTIVATIONS[activation]()
        self.conv_h = nn.Conv2d(mip, oup, kernel_size=1, bias=bias)
        self.conv_w = nn.Conv2d(mip, oup, kernel_size=1, bias=bias)
        self.skip = skip

    def forward(self, x):
        _, _, height, width = x.size()
        strips = torch.cat([self.pool_h(x), self.pool_w(x).permute(0, 1, 3, 2)], dim=2)
        mixed = self.act(self.bn1(self.conv1(strips)))
        of_rows, of_columns = torch.split(mixed, [height, width], dim=2)
        gate_h = self.conv_h(of_rows).sigmoid()
        gate_w = self.conv_w(of_columns.permute(0, 1, 3, 2)).sigmoid()
        out = x * gate_w * gate_h
        return out + x if self.skip else out
