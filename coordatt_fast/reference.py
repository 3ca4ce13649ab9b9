"""Coordinate Attention in plain PyTorch: the definition that everything else is measured against.

Hou, Zhou, Feng, "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021 (arXiv 2103.02907),
section 3.2. x is [N, C, H, W]; M is the squeezed width. All of it differentiates twice, works under
torch.func and exports with dynamic batch and map sizes (the pools are means, not AdaptiveAvgPool2d).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """An activation that every backend computes.

    function: on tensors. make: the module of torch.nn that is the same; one of its class with other settings
    (inplace aside) is another function.
    """

    function: Callable[[Tensor], Tensor]
    make: Callable[[], nn.Module]


# By name; the order is the integer code of each in the operators. CONTRIBUTING.md: where else a new one goes.
ACTIVATIONS = {
    "hard_swish": Activation(F.hardswish, nn.Hardswish),
    "silu": Activation(F.silu, nn.SiLU),
    "relu": Activation(F.relu, nn.ReLU),
    "relu6": Activation(F.relu6, nn.ReLU6),
}


def pool(x: Tensor) -> Tensor:
    """Row means, then column means, of x [N, C, H, W]: [N, C, H + W, 1] (equations 4 and 5)."""
    rows = x.mean(3, keepdim=True)
    columns = x.mean(2, keepdim=True).transpose(2, 3)
    return torch.cat([rows, columns], dim=2)


def split(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The squeezed features y [N, M, H + W, 1] apart: of x's rows [N, M, H, 1], of its columns [N, M, 1,
    W]."""
    _, _, h, w = x.shape
    rows, columns = torch.split(y, [h, w], dim=2)
    return rows, columns.transpose(2, 3)


def gate(x: Tensor, s_h: Tensor, s_w: Tensor, skip: bool = False) -> Tensor:
    """x * sigmoid(s_w) * sigmoid(s_h) (+ x with skip), s_h [N, C, H, 1], s_w [N, C, 1, W] (equations 7 to
    9)."""
    out = x * s_w.sigmoid() * s_h.sigmoid()
    return out + x if skip else out


def coord_att(
    x: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    conv_h_weight: Tensor,
    conv_h_bias: Tensor | None,
    conv_w_weight: Tensor,
    conv_w_bias: Tensor | None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "hard_swish",
    skip: bool = False,
) -> Tensor:
    """The whole function, [N, C, H, W] -> [N, C, H, W].

    conv1_weight is [M, C, 1, 1]; conv_h_weight and conv_w_weight are [C, M, 1, 1]. With training the
    normalisation uses batch statistics and moves the running ones (where given) by momentum; without it the
    running statistics are used, and where both are None there is no normalisation.
    """
    z = F.conv2d(pool(x), conv1_weight, conv1_bias)
    if training or running_mean is not None:
        u = F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    else:
        u = z
    y_h, y_w = split(ACTIVATIONS[activation].function(u), x)
    return gate(x, F.conv2d(y_h, conv_h_weight, conv_h_bias), F.conv2d(y_w, conv_w_weight, conv_w_bias), skip)
