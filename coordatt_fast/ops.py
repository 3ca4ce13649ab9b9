"""The compiled operators as PyTorch sees them: calls from eager and compiled code, gradients, shapes, FLOPs.

The schemas are csrc/library.cpp's (namespace coordatt_fast). R = N * (H + W) rows, first (n, h), then (n, w):
pooled and gates are [R, C], squeezed is [R, M], mean and var are [M], float64 for float64 maps and float32
for all others. Eager calls go through an autograd.Function around each op, a third of the cost of a
registered formula; the compiler and opcheck see the registered formulas. Both run the same code.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils.flop_counter import register_flop_formula

from coordatt_fast import library, reference

NORM_NONE, NORM_GIVEN, NORM_BATCH = 0, 1, 2
_NAMES = tuple(reference.ACTIVATIONS)

LOADED = library.load().loaded
_lib = torch.ops.coordatt_fast
if LOADED:
    _attend, _attend_out = _lib.attend.default, _lib.attend_out.default
    _attend_train, _attend_backward = _lib.attend_train.default, _lib.attend_backward.default
    _update = _lib.update_running_stats.default
    _pool, _pool_backward = _lib.pool.default, _lib.pool_backward.default
    _gate, _gate_backward = _lib.gate.default, _lib.gate_backward.default

# Keeps a call from entering the registered formula's kernel, which costs 10 us also where no gradient is
# wanted.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_functorch_level = torch._C._functorch.maybe_current_level


# The whole function --------------------------------------------------------------------------------

# weights are attend's arguments after x: conv1's weight and bias, the normalisation's weight, bias, mean and
# variance (None where absent), eps, conv_h's weight and bias, conv_w's weight and bias.


def attention(x, weights, norm, activation, skip, tracked, momentum, update, out):
    """The fused function of x [N, C, H, W], moving the running statistics (and tracked) where update is true.

    norm and activation are integer codes. The result is written into out where that is given, unless a
    gradient is recorded: then out is left alone.
    """
    if _is_grad_enabled() and (x.requires_grad or _any_requires_grad(weights)):
        if _is_compiling():
            return _train(x, weights, norm, activation, skip, tracked, momentum, update)[0]
        return _apply(x, *weights, norm, activation, skip, tracked, momentum, update)
    if norm == NORM_BATCH:
        with _below_autograd():
            result = _train(x, weights, norm, activation, skip, tracked, momentum, update)[0]
        return result if out is None else out.copy_(result)
    if out is None:
        return _attend(x, *weights, activation, skip)
    return _attend_into(out, x, weights, activation, skip)


def _any_requires_grad(weights):
    for weight in weights:
        if getattr(weight, "requires_grad", False):
            return True
    return False


def _attend_into(out, x, weights, activation, skip):
    compiling = _is_compiling()
    if not compiling and torch._debug_has_internal_overlap(out) == 1:
        raise RuntimeError(f"out (x, if in place) has elements that share memory: strides {out.stride()}")
    if not compiling and out is not x and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        # The two may overlap: written while it is read, x would come out wrong.
        return out.copy_(_attend(x, *weights, activation, skip))
    _attend_out(x, *weights, activation, skip, out=out)
    if not compiling and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # the compiled operator does not
    return out


def _train(x, weights, norm, activation, skip, tracked, momentum, update):
    """attend_train's six results, the running statistics moved."""
    mean, var = weights[4:6]
    if norm == NORM_BATCH:
        weights = (*weights[:4], None, None, *weights[6:])
    results = _attend_train(x, *weights, norm, activation, skip)
    if update:
        _update(mean, var, tracked, results[2], results[4], results[5], momentum)
    return results


class _Attend(Function):
    """Keeps x, and beside it only what is of size N * C * (H + W) or smaller."""

    @staticmethod
    def forward(ctx, x, *args):
        weights = args[:11]
        with _below_autograd():
            results = _train(x, weights, *args[11:])
        _keep(ctx, x, weights, args[11:14], results)
        return results[0]

    @staticmethod
    def backward(ctx, grad):
        return *_attention_gradients(ctx, grad), None, None, None


# Without Function.apply's look for functorch's wrappers (5 us): plan.py sends those to the reference.
_apply = super(Function, _Attend).apply


def _keep(ctx, x, weights, settings, results):
    w1, b1, gamma, beta, _, _, eps, wh, bh, ww, bw = weights
    _, pooled, squeezed, gates, mean, var = results
    ctx.save_for_backward(x, pooled, squeezed, gates, mean, var, w1, b1, gamma, beta, wh, bh, ww, bw)
    ctx.settings = (eps, *settings)


def _keep_registered(ctx, inputs, output):
    _keep(ctx, inputs[0], inputs[1:12], inputs[12:], output)
    ctx.mark_non_differentiable(*output[1:])


def _attention_gradients(ctx, grad, *_):
    """Gradients for attend_train's 15 inputs; its results but the first have none."""
    x, pooled, squeezed, gates, mean, var, w1, b1, gamma, beta, wh, bh, ww, bw = ctx.saved_tensors
    eps, norm, activation, skip = ctx.settings
    need = ctx.needs_input_grad
    need = (*need[:5], *need[8:12])
    if _is_observed():
        inputs = (x, w1, b1, gamma, beta, wh, bh, ww, bw)
        found = _reference_gradients(_attention_in_reference(mean, var, *ctx.settings), inputs, need, grad)
    else:
        needs = 0
        for bit, needed in enumerate(need):
            needs |= needed << bit
        with _below_autograd():
            found = _attend_backward(
                grad, x, pooled, squeezed, gates, mean, var, w1, gamma, beta, eps, wh, ww,
                norm, activation, skip, needs,
            )  # fmt: skip
    dx, dw1, db1, dgamma, dbeta, dwh, dbh, dww, dbw = (
        gradient if needed else None for gradient, needed in zip(found, need)
    )
    return dx, dw1, db1, dgamma, dbeta, None, None, None, dwh, dbh, dww, dbw, None, None, None


def _is_observed():
    """Whether a backward pass is itself differentiated or transformed: then it runs through the reference."""
    if _is_compiling():
        return False
    return _is_grad_enabled() or _functorch_level() is not None or forward_ad._current_level >= 0


def _reference_gradients(function, inputs, needed, grad):
    """The needed gradients of function(*inputs), None for the others; they can be differentiated again."""
    create_graph = _is_grad_enabled()
    with torch.enable_grad():
        # An alias of each input: one Parameter in two places must not get the sum of both gradients twice.
        if create_graph:
            alias = [None if t is None else t.view_as(t) for t in inputs]
        else:
            alias = [
                None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needed)
            ]
        wanted = [t for t, need in zip(alias, needed) if need]
        out = function(*alias)
        found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=create_graph))
    return [next(found) if need else None for need in needed]


def _attention_in_reference(mean, var, eps, norm, activation, skip):
    """The reference as a function of x and the parameters, in the accumulate dtype."""
    statistics = (mean, var) if norm == NORM_GIVEN else (None, None)

    def function(*inputs):
        x, w1, b1, gamma, beta, wh, bh, ww, bw = (t if t is None else t.to(mean.dtype) for t in inputs)
        return reference.coord_att(
            x, w1, b1, gamma, beta, *statistics, wh, bh, ww, bw,
            training=norm == NORM_BATCH, eps=eps, activation=_NAMES[activation], skip=skip,
        )  # fmt: skip

    return function


# Pool and gate, for the hybrid tier -----------------------------------------------------------------


def pool(x: Tensor) -> Tensor:
    """reference.pool of x [N, C, H, W] in one read, differentiable."""
    if _is_compiling():
        return _pool(x)
    if x.requires_grad and _is_grad_enabled():
        return _Pool.apply(x)
    with _below_autograd():
        return _pool(x)


def gate(x: Tensor, s_h: Tensor, s_w: Tensor, skip: bool) -> Tensor:
    """reference.gate of x, s_h [N, C, H, 1] and s_w [N, C, 1, W] in one read and one write,
    differentiable."""
    if _is_compiling():
        return _gate(x, s_h, s_w, skip)
    if _is_grad_enabled() and (x.requires_grad or s_h.requires_grad or s_w.requires_grad):
        return _Gate.apply(x, s_h, s_w, skip)
    with _below_autograd():
        return _gate(x, s_h, s_w, skip)


class _Pool(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        with _below_autograd():
            return _pool(x)

    @staticmethod
    def backward(ctx, grad):
        return _pool_gradient(ctx, grad)


class _Gate(Function):
    @staticmethod
    def forward(ctx, x, s_h, s_w, skip):
        ctx.save_for_backward(x, s_h, s_w)
        ctx.skip = skip
        with _below_autograd():
            return _gate(x, s_h, s_w, skip)

    @staticmethod
    def backward(ctx, grad):
        return _gate_gradients(ctx, grad)


def _pool_gradient(ctx, grad):
    (x,) = ctx.saved_tensors
    if _is_observed():
        return _reference_gradients(reference.pool, [x], [True], grad)[0]
    with _below_autograd():
        return _pool_backward(grad, x)


def _gate_gradients(ctx, grad):
    x, s_h, s_w = ctx.saved_tensors
    need = ctx.needs_input_grad
    if _is_observed():
        function = functools.partial(reference.gate, skip=ctx.skip)
        return *_reference_gradients(function, (x, s_h, s_w), need[:3], grad), None
    with _below_autograd():
        dx, ds_h, ds_w = _gate_backward(grad, x, s_h, s_w, ctx.skip)
    return dx if need[0] else None, ds_h if need[1] else None, ds_w if need[2] else None, None


def _keep_for_gate_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.skip = inputs[3]


# What the compiler must know ------------------------------------------------------------------------


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the kernels add up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _map_like(x):
    """As the kernels lay out a result: channels_last where x's channels are dense, else contiguous."""
    n, c, h, w = x.shape
    channels_last = c > 1 and x.stride(1) == 1
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return x.new_empty_strided((n, c, h, w), strides)


def _fake_attend(x, *parameters):
    return _map_like(x)


def _fake_attend_out(x, *parameters, out):
    return None


def _fake_attend_train(x, w1, *parameters):
    n, c, h, w = x.shape
    m, rows = w1.shape[0], n * (h + w)
    kept = ((rows, c), (rows, m), (rows, c), (m,), (m,))
    return (_map_like(x), *(x.new_empty(shape, dtype=accumulate_dtype(x.dtype)) for shape in kept))


def _fake_attend_backward(
    grad, x, pooled, squeezed, gates, mean, var, w1, gamma, beta, eps, wh, ww, norm, activation, skip, needs
):
    scale = w1 if gamma is None else gamma
    m, c = w1.shape[0], x.shape[1]
    first, last = (m, c, 1, 1), (c, m, 1, 1)
    like = ((w1, first), (w1, m), (scale, m), (scale, m), (wh, last), (wh, c), (ww, last), (ww, c))
    dx = _map_like(x) if needs & 1 else x.new_empty(0)
    return dx, *(t.new_empty(size if needs >> bit & 1 else 0) for bit, (t, size) in enumerate(like, start=1))


def _fake_pool(x):
    n, c, h, w = x.shape
    return x.new_empty_strided((n, c, h + w, 1), ((h + w) * c, 1, c, c))


def _fake_gate_backward(grad, x, s_h, s_w, skip):
    n, c, h, w = x.shape
    ds_h = s_h.new_empty_strided((n, c, h, 1), (h * c, 1, c, c))
    return _map_like(x), ds_h, s_w.new_empty_strided((n, c, 1, w), (w * c, 1, w * c, c))


def _convolution_flops(x_shape, w1_shape, *args, out_shape=None, **kwargs) -> int:
    """What FlopCounterMode counts for conv1, conv_h and conv_w."""
    n, c, h, w = x_shape
    return 4 * n * c * w1_shape[0] * (h + w)


def _backward_flops(
    grad_shape, x_shape, pooled, squeezed, gates, mean, var, w1_shape, *args, out_shape=None, **kwargs
) -> int:
    return 2 * _convolution_flops(x_shape, w1_shape)


def _register() -> None:
    fakes = {
        _attend: _fake_attend,
        _attend_out: _fake_attend_out,
        _attend_train: _fake_attend_train,
        _attend_backward: _fake_attend_backward,
        _update: lambda *args: None,
        _pool: _fake_pool,
        _pool_backward: lambda grad, x: _map_like(x),
        _gate: lambda x, *args: _map_like(x),
        _gate_backward: _fake_gate_backward,
    }
    for op, fake in fakes.items():
        torch.library.register_fake(op, fake)
    torch.library.register_autograd(_attend_train, _attention_gradients, setup_context=_keep_registered)
    torch.library.register_autograd(
        _pool, _pool_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0])
    )
    torch.library.register_autograd(_gate, _gate_gradients, setup_context=_keep_for_gate_backward)
    for op in (_lib.attend, _lib.attend_out, _lib.attend_train):
        register_flop_formula(op)(_convolution_flops)
    register_flop_formula(_lib.attend_backward)(_backward_flops)


if LOADED:
    _register()
