"""The functional form of Coordinate Attention: every parameter explicit."""

import torch
from torch import Tensor

from coordatt_fast import checks, ops, plan, reference
from coordatt_fast.codes import NORM_BATCH, NORM_GIVEN, NORM_NONE

_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}


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
    """Coordinate Attention of x [N, C, H, W], in x's dtype and memory format (arXiv 2103.02907, section 3.2).

    conv1_weight is [M, C, 1, 1], conv_h_weight and conv_w_weight are [C, M, 1, 1]; biases [M], [C], [C] or
    None; the normalisation's tensors are [M] or None. All have x's dtype, or float32 beside a half x under
    autocast.

    training: normalises with batch statistics and, where running_mean and running_var are given, moves them
    by momentum (None: the cumulative average, which needs num_batches_tracked); num_batches_tracked grows by
    one where given. Without training the running statistics are used; where they are None there is no
    normalisation.
    activation: "hard_swish" or another key of coordatt_fast.reference.ACTIVATIONS ("silu", "relu", ...).
    skip: adds x to the result.
    inplace: writes the result into x when no gradient is recorded; has no effect otherwise.
    out: takes the result, in x's shape and dtype, and may overlap x or a parameter; RuntimeError when a
    gradient is recorded, or out requires one and gradients are on.

    Raises ValueError for an x that is not four-dimensional, an unknown activation, an eps that is negative
    (in training: or zero), or inplace with out; RuntimeError for parameters of other shapes, dtype or device
    than x needs.
    """
    if activation not in _CODES:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(_CODES)}")
    if not training and running_mean is None:
        if any(tensor is not None for tensor in (running_var, bn_weight, bn_bias)):
            raise ValueError("without running_mean outside training, give no running_var, bn_weight, bn_bias")
    if training and momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("momentum is None (the cumulative average), which needs num_batches_tracked")

    if inplace and out is not None:
        raise ValueError("inplace writes into x and out= into out: give one of them")
    affine = (conv1_weight, conv1_bias, bn_weight, bn_bias)
    gates = (conv_h_weight, conv_h_bias, conv_w_weight, conv_w_bias)
    tensors = (*affine, running_mean, running_var, *gates)
    if out is not None:
        checks.output(out, x)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors, out)):
            raise RuntimeError("out= records no gradient, but an argument requires one: use torch.no_grad()")

    if plan.functional_obstacle(x, tensors) is None:
        norm = NORM_BATCH if training else NORM_NONE if running_mean is None else NORM_GIVEN
        update = training and (running_mean is not None or num_batches_tracked is not None)
        weights = (*affine, running_mean, running_var, eps, *gates)
        target = x if inplace else out
        try:
            return ops.attention(
                x, weights, norm, _CODES[activation], skip,
                num_batches_tracked, momentum, update, None, target,
            )  # fmt: skip
        except RuntimeError:
            checks.parameters(x, tensors, checks.FUNCTIONAL_NAMES, plan.autocast(x))
            if norm != NORM_NONE:
                checks.epsilon(eps, training)
            raise

    if plan.is_eager(x):
        checks.parameters(x, tensors, checks.FUNCTIONAL_NAMES, plan.autocast(x), broadcast=True)
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1 / float(num_batches_tracked)
    result = reference.coord_att(
        x, *affine, running_mean, running_var, *gates,
        training=training, momentum=momentum, eps=eps, activation=activation, skip=skip,
    )  # fmt: skip
    if inplace and not (torch.is_grad_enabled() and result.requires_grad):
        return x.copy_(result)
    return result if out is None else out.copy_(result)
