"""CoordAtt: the drop-in module."""

import torch
from torch import Tensor, nn

from coordatt_fast import reference

_ACTIVATION_MODULES = {"hard_swish": nn.Hardswish, "silu": nn.SiLU, "relu": nn.ReLU, "relu6": nn.ReLU6}


class CoordAtt(nn.Module):
    """Coordinate Attention."""

    def __init__(
        self,
        inp: int,
        oup: int,
        reduction: int = 32,
        *,
        activation: str = "hard_swish",
        bias: bool = True,
        skip: bool = False,
        mid_channels: int | None = None,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATION_MODULES:
            raise ValueError(f"activation is {activation!r}, expected one of {', '.join(_ACTIVATION_MODULES)}")
        where = {"device": device, "dtype": dtype}
        mip = max(8, inp // reduction) if mid_channels is None else mid_channels
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        self.conv1 = nn.Conv2d(inp, mip, kernel_size=1, bias=bias, **where)
        self.bn1 = nn.BatchNorm2d(mip, **where)
        self.act = _ACTIVATION_MODULES[activation]()
        self.conv_h = nn.Conv2d(mip, oup, kernel_size=1, bias=bias, **where)
        self.conv_w = nn.Conv2d(mip, oup, kernel_size=1, bias=bias, **where)
        self.skip = skip
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y_h, y_w = reference.split(self.act(self.bn1(self.conv1(reference.pool(x)))), x)
        return reference.gate(x, self.conv_h(y_h), self.conv_w(y_w), self.skip)
