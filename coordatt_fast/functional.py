"""The functional form of Coordinate Attention: every parameter explicit."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coordatt_fast import before as stacked
from coordatt_fast import checks, ops, plan, reference
from coordatt_fast.codes import NORM_BATCH, NORM_GIVEN, NORM_NONE

_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}


class NormAct(NamedTuple):
    """The batch normalisation (arXiv 1502.03167) and the activation that stand before a coord_att.

    weight, bias, running_mean and running_var are [C] or None, in x's dtype or, beside a half x, float32.
    training, momentum, eps, num_batches_tracked: as in coord_att; without training and running_mean the
    batch's own statistics are used, as by nn.BatchNorm2d. activation: "relu6" or another key of
    coordatt_fast.reference.ACTIVATIONS, or None.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None
    activation: str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """activation(batch_norm(x)) of x [N, C, H, W] in plain PyTorch; raises what F.batch_norm does."""
        weight, bias, mean, var, training, momentum, eps, tracked, activation = self
        if training and tracked is not None:
            tracked.add_(1)
        if momentum is None:
            momentum = 1 / float(tracked) if training and tracked is not None else 0.0
        y = F.batch_norm(x, mean, var, weight, bias, training or mean is None, momentum, eps)
        return y if activation is None else reference.ACTIVATIONS[activation].function(y)

    def arguments(self, x: Tensor) -> tuple | None:
        """As before.attention takes them; None where x, which coord_att can fuse, is for plain PyTorch."""
        weight, bias, mean, var, training, momentum, eps, tracked, activation = self
        batch = training or mean is None
        if not stacked.serves(x, self[:4], eps, batch) or (momentum is None and tracked is None and training):
            return None
        code = stacked.NO_ACTIVATION if activation is None else _CODES[activation]
        moves = training and (mean is not None or tracked is not None)
        norm = NORM_BATCH if batch else NORM_GIVEN
        return weight, bias, mean, var, eps, norm, code, tracked, momentum, moves


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
    before: NormAct | None = None,
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
    before: a normalisation and an activation that x goes through first. On the CPU what they make of x is
    formed as x is read, and stored nowhere; elsewhere they run by themselves. Not with inplace or out.

    Raises ValueError for an x that is not four-dimensional, an unknown activation, an eps that is negative
    (in training: or zero), or two of inplace, out and before; RuntimeError for parameters of other shapes,
    dtype or device than x needs.
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
    if before is not None:
        if inplace or out is not None:
            raise ValueError("before goes with a result of its own: give neither inplace nor out")
        if before.activation is not None and before.activation not in _CODES:
            names = ", ".join(_CODES)
            raise ValueError(f"before.activation is {before.activation!r}, expected None or one of {names}")
    affine = (conv1_weight, conv1_bias, bn_weight, bn_bias)
    gates = (conv_h_weight, conv_h_bias, conv_w_weight, conv_w_bias)
    tensors = (*affine, running_mean, running_var, *gates)
    if out is not None:
        checks.output(out, x)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors, out)):
            raise RuntimeError("out= records no gradient, but an argument requires one: use torch.no_grad()")

    fused = plan.functional_obstacle(x, tensors) is None
    stands = before.arguments(x) if fused and before is not None else None
    if before is not None and stands is None:
        x, before = before(x), None
    if fused:
        norm = NORM_BATCH if training else NORM_NONE if running_mean is None else NORM_GIVEN
        update = training and (running_mean is not None or num_batches_tracked is not None)
        weights = (*affine, running_mean, running_var, eps, *gates)
        target = x if inplace else out
        try:
            if stands is not None:
                code = _CODES[activation]
                settings = norm, code, skip, num_batches_tracked, momentum, update
                return stacked.attention(x, stands, weights, *settings)
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
        momentum = 1 / float(num_batches_tracked) if training and num_batches_tracked is not None else 0.0
    result = reference.coord_att(
        x, *affine, running_mean, running_var, *gates,
        training=training, momentum=momentum, eps=eps, activation=activation, skip=skip,
    )  # fmt: skip
    if inplace and not (torch.is_grad_enabled() and result.requires_grad):
        return x.copy_(result)
    return result if out is None else out.copy_(result)
