"""The fused function with a normalisation and an activation before it, as PyTorch sees it.

x is what the normalisation is given, a convolution's output; the map that is pooled and gated is
act(scale x + shift), formed as x is loaded and stored nowhere. The operators are the compiled library's, for
CPU tensors only: those of ops.py with what stands before as further arguments. before is (weight, bias, mean,
var, eps, norm, activation, tracked, momentum, update): of the BatchNorm2d before the block, as ops.attention
has them of the one inside; activation is an integer code, or -1 for none.
"""

import torch
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from coordatt_fast import internals, ops, plan, reference
from coordatt_fast.backends import SERVED_BY_CPU, choice
from coordatt_fast.codes import NORM_BATCH, NORM_GIVEN

NO_ACTIVATION = -1

_is_grad_enabled = torch.is_grad_enabled
_is_compiling = internals.is_compiling
_cpu = ops._cpu
if _cpu is not None:
    _infer = _cpu.packets.norm_attend.default
    _train = _cpu.packets.norm_attend_train.default
    _backward = _cpu.packets.norm_attend_backward.default


def serves(x, norm, eps, batch) -> bool:
    """Whether attention takes an x that ops.attention takes, behind this norm's weight, bias, mean and var.

    False also where PyTorch's own raises, so that it does.
    """
    if _cpu is None or not x.is_cpu or choice.name not in SERVED_BY_CPU:
        return False
    channels = x.shape[1]
    if x.numel() < channels * (2 if batch else 1) or not eps > 0:
        return False
    if (norm[2] is None) is not (norm[3] is None):
        return False
    dtype = None
    for t in norm:
        if t is not None:
            if type(t) not in plan.PLAIN or not t.is_cpu or t.shape != (channels,):
                return False
            if dtype is not None and t.dtype is not dtype:
                return False
            dtype = t.dtype
    return dtype is None or dtype is x.dtype or dtype is ops.accumulate_dtype(x.dtype)


def attention(x, before, weights, norm, activation, skip, tracked, momentum, update):
    """ops.attention of act(batch_norm(x)) for x [N, C, H, W] on the CPU, moving both norms' statistics."""
    arguments = *before[:7], *weights, norm, activation, skip
    running = *before[7:], tracked, momentum, update
    if _is_grad_enabled() and (
        x.requires_grad or ops._any_requires_grad(weights) or ops._any_requires_grad(before[:2])
    ):
        if _is_compiling():
            return _trained(x, arguments, running)[0]
        return _apply(x, *arguments, *running)
    if norm == NORM_BATCH or before[5] == NORM_BATCH:
        with ops._below_autograd():
            return _trained(x, arguments, running)[0]
    return _infer(x, *before[:5], before[6], *weights, activation, skip)


def _trained(x, arguments, running):
    """norm_attend_train's eight results, the running statistics moved."""
    results = _train(x, *arguments)
    _, _, squeezed, _, mean, var, before_mean, before_var = results
    tracked, momentum, update = running[:3]
    if update:
        _move(x, *arguments[2:4], tracked, x, before_mean, before_var, momentum)
    tracked, momentum, update = running[3:]
    if update:
        _move(x, *arguments[11:13], tracked, squeezed, mean, var, momentum)
    return results


def _move(x, running_mean, running_var, tracked, counted, mean, var, momentum):
    """Running statistics by a batch's, of counted.numel() / mean.numel() values each."""
    if tracked is not None and not ops._countable(tracked, x):
        seen = tracked.clone().add_(1)
        if momentum is None:
            momentum = 1 / float(seen)
        tracked.copy_(seen)
        tracked = None
    _cpu.update(running_mean, running_var, tracked, counted, mean, var, momentum)


class _NormAttend(Function):
    """Keeps x, and beside it only what is of size N * C * (H + W) or smaller."""

    @staticmethod
    def forward(ctx, x, *args):
        with ops._below_autograd():
            results = _trained(x, args[:21], args[21:])
        _keep(ctx, (x, *args[:21]), results)
        return results[0]

    @staticmethod
    def backward(ctx, grad):
        return *_gradients(ctx, grad), None, None, None, None, None, None


_apply = internals.apply_of(_NormAttend)


def _keep_registered(ctx, inputs, output):
    _keep(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _keep(ctx, inputs, output):
    x, weight, bias, _, _, *settings = inputs[:8]
    w1, b1, gamma, beta, _, _, eps, wh, bh, ww, bw, *rest = inputs[8:]
    ctx.save_for_backward(x, *output[1:], weight, bias, w1, b1, gamma, beta, wh, bh, ww, bw)
    ctx.settings = (settings, eps, *rest)


def _gradients(ctx, grad, *_):
    """Gradients for norm_attend_train's 22 inputs; its results but the first have none."""
    need = ctx.needs_input_grad
    x, *saved = ctx.saved_tensors
    *kept, weight, bias, w1, b1, gamma, beta, wh, bh, ww, bw = saved
    (before_eps, before_norm, before_activation), eps, norm, activation, skip = ctx.settings
    # In the order of norm_attend_backward's results.
    need = (need[0], *need[8:12], *need[15:19], *need[1:3])
    inputs = (x, w1, b1, gamma, beta, wh, bh, ww, bw, weight, bias)
    if ops._is_observed():
        function = _in_reference(kept, ctx.settings)
        found = ops._reference_gradients(function, inputs, need, grad)
    else:
        needs = 0
        for bit, needed in enumerate(need):
            needs |= needed << bit
        with ops._below_autograd():
            found = _backward(
                grad, x, *kept, weight, bias, before_eps, before_norm, before_activation,
                w1, gamma, beta, eps, wh, ww, norm, activation, skip, needs,
            )  # fmt: skip
    dx, dw1, db1, dgamma, dbeta, dwh, dbh, dww, dbw, dweight, dbias = (
        gradient if needed else None for gradient, needed in zip(found, need)
    )
    middle = dw1, db1, dgamma, dbeta, None, None, None, dwh, dbh, dww, dbw, None, None, None
    return dx, dweight, dbias, None, None, None, None, None, *middle


def _in_reference(kept, settings):
    """The function of x and the parameters in plain PyTorch, in the accumulate dtype."""
    _, _, _, mean, var, before_mean, before_var = kept
    (before_eps, before_norm, before_activation), *of_block = settings
    statistics = (before_mean, before_var) if before_norm == NORM_GIVEN else (None, None)
    block = ops._attention_in_reference(mean, var, *of_block)

    def function(x, *parameters):
        *of_block, weight, bias = (t if t is None else t.to(mean.dtype) for t in parameters)
        batch = before_norm != NORM_GIVEN
        y = torch.nn.functional.batch_norm(
            x.to(mean.dtype), *statistics, weight, bias, batch, 0.0, before_eps
        )
        if before_activation != NO_ACTIVATION:
            y = reference.ACTIVATIONS[ops._NAMES[before_activation]].function(y)
        return block(y, *of_block)

    return function


def _fake_infer(x, weight, bias, mean, var, eps, before_activation, *parameters):
    return ops._fake_attend(x, *parameters)


def _fake_train(x, weight, bias, mean, var, eps, before_norm, before_activation, *parameters):
    made = ops._fake_attend_train(x, *parameters)
    c = x.shape[1]
    return *made, *(x.new_empty(c, dtype=ops.accumulate_dtype(x.dtype)) for _ in range(2))


def _fake_backward(
    grad, x, pooled, squeezed, gates, mean, var, before_mean, before_var, weight, bias, before_eps,
    before_norm, before_activation, w1, gamma, beta, eps, wh, ww, norm, activation, skip, needs,
):  # fmt: skip
    like = before_mean if weight is None else weight
    made = ops._fake_attend_backward(
        grad, x, pooled, squeezed, gates, mean, var, w1, gamma, beta, eps, wh, ww,
        norm, activation, skip, needs,
    )  # fmt: skip
    vectors = ((9, like), (10, like if bias is None else bias))
    return *made, *(t.new_empty(x.shape[1] if needs >> bit & 1 else 0) for bit, t in vectors)


def _flops(x_shape, *args, out_shape=None, **kwargs) -> int:
    w1_shape = next(shape for shape in args[6:8] if isinstance(shape, (list, tuple, torch.Size)))
    return ops._convolution_flops(x_shape, w1_shape)


def _backward_flops(grad_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * ops._convolution_flops(x_shape, args[12])


if _cpu is not None:
    for _op, _fake in (
        (_infer, _fake_infer),
        (_train, _fake_train),
        (_backward, ops._taking_grad_as_x(_backward, _fake_backward)),
    ):
        torch.library.register_fake(_op, ops._checked(_op, _fake))
        internals.take_any_layout(_op)
    torch.library.register_autograd(_train, _gradients, setup_context=_keep_registered)
    register_flop_formula([_cpu.packets.norm_attend, _cpu.packets.norm_attend_train])(_flops)
    register_flop_formula(_cpu.packets.norm_attend_backward)(_backward_flops)
