"""CoordAtt: the drop-in module."""

from typing import Any

import torch
from torch import Tensor, nn

from coordatt_fast import ops, plan, reference


class CoordAtt(nn.Module):
    """Coordinate Attention over x [N, C, H, W] (Hou, Zhou, Feng, CVPR 2021, arXiv 2103.02907, section 3.2).

    Same children, state dict and initialisation as the authors' class. The result has x's shape, dtype and
    memory format. The children are read at every call: their eps, momentum and training flags, hooks and
    replacements count. explain(module, x) tells how a call runs.

    inp, oup: channels of x and of the gates, whose product the result is: equal, or one of them 1.
    reduction: the squeezed width is max(8, inp // reduction), or mid_channels where that is given.
    activation: "hard_swish" or another key of coordatt_fast.reference.ACTIVATIONS ("silu", "relu", ...).
    bias: of the three convolutions.
    skip: adds x to the result.
    inplace: writes the result into x when no gradient is recorded; has no effect otherwise.

    A call raises ValueError for an x that is not four-dimensional, NotImplementedError for one that is not of
    floating dtype, RuntimeError for other channels, dtype or device than the parameters'.
    """

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
        if activation not in reference.ACTIVATIONS:
            names = ", ".join(reference.ACTIVATIONS)
            raise ValueError(f"activation is {activation!r}, expected one of {names}")
        if mid_channels is None:
            if reduction < 1:
                raise ValueError(f"reduction is {reduction}, expected at least 1")
            mid_channels = max(8, inp // reduction)
        elif mid_channels < 1:
            raise ValueError(f"mid_channels is {mid_channels}, expected at least 1")
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        self.conv1 = nn.Conv2d(inp, mid_channels, kernel_size=1, bias=bias, device=device, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(mid_channels, device=device, dtype=dtype)
        self.act = reference.ACTIVATIONS[activation].make()
        self.conv_h = nn.Conv2d(mid_channels, oup, kernel_size=1, bias=bias, device=device, dtype=dtype)
        self.conv_w = nn.Conv2d(mid_channels, oup, kernel_size=1, bias=bias, device=device, dtype=dtype)
        self.skip = skip
        # Not "inplace": frameworks switch that on in every module that has it.
        self._inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        arguments: Any = plan.arguments(self.__dict__, x)
        if type(arguments) is tuple:
            try:
                return ops.attention(x, *arguments)
            except RuntimeError:
                plan.check_plain(self._modules, x)
                raise
        return self._by_children(x, fast=arguments.tier == plan.HYBRID)

    def _by_children(self, x: Tensor, fast: bool) -> Tensor:
        """The hybrid (fast) and reference tiers: the module's own children between pool and gate."""
        plan.check_plain(self._modules, x)
        if plan.special_pools(self._modules):
            pooled = torch.cat([self.pool_h(x), self.pool_w(x).transpose(2, 3)], dim=2)
        else:
            pooled = ops.pool(x) if fast else reference.pool(x)
        y = pooled
        for child in (self.conv1, self.bn1, self.act):
            y = child(plan.laid_out(child, y, fast))
        y_h, y_w = reference.split(plan.laid_out(self.conv_h, y, fast), x)
        s_h, s_w = self.conv_h(y_h), self.conv_w(y_w)
        fast = fast and plan.gate_fits(x, s_h, s_w)
        out = ops.gate(x, s_h, s_w, self.skip) if fast else reference.gate(x, s_h, s_w, self.skip)
        if self._inplace and not (torch.is_grad_enabled() and out.requires_grad):
            return x.copy_(out)
        return out

    def extra_repr(self) -> str:
        settings = {"skip": self.skip, "inplace": self._inplace}
        return ", ".join(f"{name}=True" for name, value in settings.items() if value)

    def __setstate__(self, state: dict) -> None:
        # As pickles have it that were made when it was called so.
        if "_inplace" not in state:
            state = dict(state)
            state["_inplace"] = state.pop("inplace", False)
        super().__setstate__(state)

    def __prepare_scriptable__(self) -> nn.Module:
        return Scriptable(self._modules, self.skip, self.training)


class Scriptable(nn.Module):
    """What torch.jit.script compiles in place of a CoordAtt: the reference over the same children.

    Without the pools, which do not compile and have no state.
    """

    def __init__(self, children: dict, skip: bool, training: bool) -> None:
        super().__init__()
        for name in ("conv1", "bn1", "act", "conv_h", "conv_w"):
            self.add_module(name, children[name])
        self.skip = skip
        self.training = training

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        y = self.act(self.bn1(self.conv1(torch.cat([rows, columns], dim=2))))  # type: ignore[operator]
        h = x.size(2)
        s_h, s_w = self.conv_h(y[:, :, :h]), self.conv_w(y[:, :, h:].transpose(2, 3))  # type: ignore[operator]
        out = x * s_w.sigmoid() * s_h.sigmoid()
        return out + x if self.skip else out
