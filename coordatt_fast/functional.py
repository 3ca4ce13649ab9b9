"""The functional form of Coordinate Attention: every parameter explicit."""

from torch import Tensor

from coordatt_fast import reference


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
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    activation: str = "hard_swish",
    skip: bool = False,
    inplace: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Coordinate Attention of x [N, C, H, W]."""
    return reference.coord_att(
        x, conv1_weight, conv1_bias, bn_weight, bn_bias, running_mean, running_var,
        conv_h_weight, conv_h_bias, conv_w_weight, conv_w_bias,
        training=training, momentum=momentum, eps=eps, activation=activation, skip=skip,
    )
