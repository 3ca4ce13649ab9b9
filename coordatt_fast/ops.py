"""The backends' operators as PyTorch sees them: calls from eager and compiled code, gradients, shapes, FLOPs.

The compiled library's are torch.ops.coordatt_fast, with the schemas of csrc/bindings.h; the Triton backend's
are torch.ops.coordatt_fast_triton, with the same schemas. R = N * (H + W) rows: pooled and gates are
[R, C], squeezed is [R, M], mean and var are [M], float64 for float64 maps and float32 for all others; the
order of the numbers in the first three is each backend's own. Eager calls go through an autograd.Function
around each op, a third of the cost of a registered formula; the compiler and opcheck see the registered
formulas. Both run the same code.
"""

import contextlib
import functools

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from coordatt_fast import internals, reference
from coordatt_fast.backends import INTERPRETED, ROWS, Row, choice, serving
from coordatt_fast.codes import NEEDS_X, NORM_BATCH, NORM_GIVEN

_NAMES = tuple(reference.ACTIVATIONS)

_PARAMETERS = (
    "Tensor conv1_weight, Tensor? conv1_bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, "
    "Tensor? bn_var, float eps, Tensor conv_h_weight, Tensor? conv_h_bias, Tensor conv_w_weight, "
    "Tensor? conv_w_bias"
)
# As in csrc/bindings.h.
_SCHEMAS = (
    f"attend(Tensor x, {_PARAMETERS}, int activation, bool skip) -> Tensor",
    f"attend_out(Tensor x, {_PARAMETERS}, int activation, bool skip, Tensor(a!) result) -> ()",
    f"attend_train(Tensor x, {_PARAMETERS}, int norm, int activation, bool skip) -> (Tensor out, "
    "Tensor pooled, Tensor squeezed, Tensor gates, Tensor mean, Tensor var)",
    f"attend_train_update(Tensor x, {_PARAMETERS}, int norm, int activation, bool skip, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum) -> "
    "(Tensor out, Tensor pooled, Tensor squeezed, Tensor gates, Tensor mean, Tensor var)",
    "attend_backward(Tensor grad, Tensor x, Tensor pooled, Tensor squeezed, Tensor gates, Tensor mean, "
    "Tensor var, Tensor conv1_weight, Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor conv_h_weight, "
    "Tensor conv_w_weight, int norm, int activation, bool skip, int needs) -> (Tensor dx, "
    "Tensor dconv1_weight, Tensor dconv1_bias, Tensor dbn_weight, Tensor dbn_bias, Tensor dconv_h_weight, "
    "Tensor dconv_h_bias, Tensor dconv_w_weight, Tensor dconv_w_bias)",
    "update_running_stats(Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor squeezed, Tensor mean, Tensor var, float? momentum) -> ()",
    "pool(Tensor x) -> Tensor",
    "pool_backward(Tensor grad, Tensor x) -> Tensor",
    "gate(Tensor x, Tensor s_h, Tensor s_w, bool skip) -> Tensor",
    "gate_backward(Tensor grad, Tensor x, Tensor s_h, Tensor s_w, bool skip) -> (Tensor dx, Tensor ds_h, "
    "Tensor ds_w)",
)


def _define_triton() -> torch.library.Library:
    """Operators whose kernels, and Triton itself, are imported by the first call that runs them."""
    made = torch.library.Library("coordatt_fast_triton", "DEF")

    def implementation(name):
        def call(*args, **kwargs):
            from coordatt_fast.kernels import launch

            return getattr(launch, name)(*args, **kwargs)

        return call

    for schema in _SCHEMAS:
        made.define(schema)
        name = schema.partition("(")[0]
        for key in ("CUDA", "XPU", *(["CPU"] if INTERPRETED else [])):
            made.impl(name, implementation(name), key)
    return made


class _Operators:
    """One backend's operators, ready to call."""

    def __init__(self, name: str, row: Row, namespace=None):
        self.name, self.row = name, row
        self.packets = namespace = namespace or getattr(torch.ops, row.namespace)
        self.attend, self.attend_out = namespace.attend.default, namespace.attend_out.default
        self.train, self.backward = namespace.attend_train.default, namespace.attend_backward.default
        self.train_update, self.update = (
            namespace.attend_train_update.default,
            namespace.update_running_stats.default,
        )
        self.pool, self.pool_backward = namespace.pool.default, namespace.pool_backward.default
        self.gate, self.gate_backward = namespace.gate.default, namespace.gate_backward.default


_triton_library = _define_triton()
# Triton's are defined whether it can be imported or not.
_OPERATORS = {
    name: _Operators(name, row) for name, row in ROWS.items() if name == "triton" or row.missing() is None
}
_cpu = _OPERATORS.get("cpu")


def operators(x) -> _Operators:
    """What computes a call on x that plan.obstacle lets through."""
    if x.is_cpu and not INTERPRETED:
        return _cpu
    device = x.device
    served, _ = serving(choice.name, device.type, device.index, is_long(x))
    return _OPERATORS[served]


def is_long(x) -> bool:
    """Whether x's lines are beyond what a block of the CUDA kernels has room for."""
    # A branch, so that dynamic sizes become a guard and a plain bool goes on.
    return True if x.shape[2] + x.shape[3] > (2048 if x.dtype is torch.float64 else 4096) else False


def cuda_forward_way(x, mid: int, training: bool) -> str:
    """How the CUDA kernels go forward: "chain" of launches, or one launch: "cluster:K", "resident"."""
    return operators(x).packets.cuda_forward_way(x, mid, training)


_is_grad_enabled = torch.is_grad_enabled
_is_compiling = internals.is_compiling
_BelowAutograd = internals.BelowAutograd


def _below_autograd():
    """Keeps a call from entering the registered formula's kernel, which costs 10 us also where no gradient is
    wanted. The compiler wants none, and cannot trace it."""
    return contextlib.nullcontext() if _is_compiling() else _BelowAutograd()


# The whole function --------------------------------------------------------------------------------

# weights are attend's arguments after x: conv1's weight and bias, the normalisation's weight, bias, mean and
# variance (None where absent), eps, conv_h's weight and bias, conv_w's weight and bias.


def attention(x, weights, norm, activation, skip, tracked, momentum, update, group, out):
    """The fused function of x [N, C, H, W], moving the running statistics (and tracked) where update is true.

    norm and activation are integer codes. group: the processes that batch statistics are taken over; None for
    this one. The result is written into out where that is given, unless a gradient is recorded: then out is
    left alone.
    """
    if group is not None:
        from coordatt_fast import joined

        run = joined.uncompiled if _is_compiling() and joined.make_uncompiled() else joined.attention
        result = run(x, weights, activation, skip, tracked, momentum, update, group)
        return result if out is None or result.requires_grad else out.copy_(result)
    ops = _cpu if x.is_cpu and not INTERPRETED else operators(x)
    if _is_grad_enabled() and (x.requires_grad or _any_requires_grad(weights)):
        if _is_compiling():
            return _train(ops, x, weights, norm, activation, skip, tracked, momentum, update)[0]
        return _apply(ops, x, *weights, norm, activation, skip, tracked, momentum, update)
    if norm == NORM_BATCH:
        with _below_autograd():
            result = _train(ops, x, weights, norm, activation, skip, tracked, momentum, update)[0]
        return result if out is None else out.copy_(result)
    if out is None:
        return ops.attend(x, *weights, activation, skip)
    return _attend_into(ops, out, x, weights, activation, skip)


def _any_requires_grad(weights):
    for weight in weights:
        if getattr(weight, "requires_grad", False):
            return True
    return False


def _attend_into(ops, out, x, weights, activation, skip):
    compiling = _is_compiling()
    if not compiling and internals.shares_memory(out):
        raise RuntimeError(f"out (x, if in place) has elements that share memory: strides {out.stride()}")
    ops.attend_out(x, *weights, activation, skip, out)
    if not compiling and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # the operators do not
    return out


def _train(ops, x, weights, norm, activation, skip, tracked, momentum, update):
    """attend_train's six results, the running statistics moved."""
    if update and tracked is not None and not _countable(tracked, x):
        seen = tracked.clone().add_(1)
        if momentum is None:
            momentum = 1 / float(seen)
        results = _train(ops, x, weights, norm, activation, skip, None, momentum, update)
        tracked.copy_(seen)
        return results
    mean, var = weights[4:6]
    if norm == NORM_BATCH:
        weights = (*weights[:4], None, None, *weights[6:])
    if update and not _is_compiling():
        return ops.train_update(x, *weights, norm, activation, skip, mean, var, tracked, momentum)
    results = ops.train(x, *weights, norm, activation, skip)
    if update:
        ops.update(mean, var, tracked, results[2], results[4], results[5], momentum)
    return results


def _countable(tracked, x):
    """Whether the kernels can count in tracked; PyTorch does so in any dtype and on any device."""
    return tracked.dtype is torch.int64 and tracked.device == x.device and tracked.numel() == 1


class _Attend(Function):
    """Keeps x, and beside it only what is of size N * C * (H + W) or smaller."""

    @staticmethod
    def forward(ctx, ops, x, *args):
        weights = args[:11]
        with _below_autograd():
            results = _train(ops, x, weights, *args[11:])
        ctx.ops = ops
        _keep(ctx, x, weights, args[11:14], results)
        return results[0]

    @staticmethod
    def backward(ctx, grad):
        return None, *_attention_gradients(ctx, grad, ctx.needs_input_grad[1:]), None, None, None


_apply = internals.apply_of(_Attend)


def _keep(ctx, x, weights, settings, results):
    w1, b1, gamma, beta, _, _, eps, wh, bh, ww, bw = weights
    _, pooled, squeezed, gates, mean, var = results
    ctx.save_for_backward(x, pooled, squeezed, gates, mean, var, w1, b1, gamma, beta, wh, bh, ww, bw)
    ctx.settings = (eps, *settings)


def _keep_registered(ctx, inputs, output, ops):
    ctx.ops = ops
    _keep(ctx, inputs[0], inputs[1:12], inputs[12:], output)
    ctx.mark_non_differentiable(*output[1:])


def _registered_gradients(ctx, grad, *_):
    return _attention_gradients(ctx, grad, ctx.needs_input_grad)


def _attention_gradients(ctx, grad, need):
    """Gradients for attend_train's 15 inputs; its results but the first have none."""
    x, pooled, squeezed, gates, mean, var, w1, b1, gamma, beta, wh, bh, ww, bw = ctx.saved_tensors
    eps, norm, activation, skip = ctx.settings
    need = (*need[:5], *need[8:12])
    if _is_observed():
        inputs = (x, w1, b1, gamma, beta, wh, bh, ww, bw)
        found = _reference_gradients(_attention_in_reference(mean, var, *ctx.settings), inputs, need, grad)
    else:
        needs = 0
        for bit, needed in enumerate(need):
            needs |= needed << bit
        with _below_autograd():
            found = ctx.ops.backward(
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
    return _is_grad_enabled() or internals.in_transform()


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
        return operators(x).pool(x)
    if x.requires_grad and _is_grad_enabled():
        return _Pool.apply(x)
    with _below_autograd():
        return operators(x).pool(x)


def gate(x: Tensor, s_h: Tensor, s_w: Tensor, skip: bool) -> Tensor:
    """reference.gate of x, s_h [N, C, H, 1] and s_w [N, C, 1, W] in one read and one write,
    differentiable."""
    if _is_compiling():
        return operators(x).gate(x, s_h, s_w, skip)
    if _is_grad_enabled() and (x.requires_grad or s_h.requires_grad or s_w.requires_grad):
        return _Gate.apply(x, s_h, s_w, skip)
    with _below_autograd():
        return operators(x).gate(x, s_h, s_w, skip)


class _Pool(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.ops = operators(x)
        with _below_autograd():
            return ctx.ops.pool(x)

    @staticmethod
    def backward(ctx, grad):
        return _pool_gradient(ctx, grad)


class _Gate(Function):
    @staticmethod
    def forward(ctx, x, s_h, s_w, skip):
        ctx.save_for_backward(x, s_h, s_w)
        ctx.skip, ctx.ops = skip, operators(x)
        with _below_autograd():
            return ctx.ops.gate(x, s_h, s_w, skip)

    @staticmethod
    def backward(ctx, grad):
        return _gate_gradients(ctx, grad)


def _pool_gradient(ctx, grad):
    (x,) = ctx.saved_tensors
    if _is_observed():
        return _reference_gradients(reference.pool, [x], [True], grad)[0]
    with _below_autograd():
        return ctx.ops.pool_backward(grad, x)


def _gate_gradients(ctx, grad):
    x, s_h, s_w = ctx.saved_tensors
    need = ctx.needs_input_grad
    if _is_observed():
        function = functools.partial(reference.gate, skip=ctx.skip)
        return *_reference_gradients(function, (x, s_h, s_w), need[:3], grad), None
    with _below_autograd():
        dx, ds_h, ds_w = ctx.ops.gate_backward(grad, x, s_h, s_w, ctx.skip)
    return dx if need[0] else None, ds_h if need[1] else None, ds_w if need[2] else None, None


def _keep_for_pool_backward(ctx, inputs, output, ops):
    ctx.save_for_backward(inputs[0])
    ctx.ops = ops


def _keep_for_gate_backward(ctx, inputs, output, ops):
    ctx.save_for_backward(*inputs[:3])
    ctx.skip, ctx.ops = inputs[3], ops


# What the compiler must know ------------------------------------------------------------------------


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the kernels add up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _map_like(x, channels_last=None):
    """As the kernels lay out a gradient of x: channels_last where x's channels are dense, else contiguous."""
    n, c, h, w = x.shape
    if channels_last is None:
        channels_last = c > 1 and x.stride(1) == 1
    last = channels_last and h * w != 1
    strides = (h * w * c, 1, w * c, c) if last else (c * h * w, h * w, w, 1)
    return x.new_empty_strided((n, c, h, w), strides)


def _made_of(x, skip):
    """As the kernels lay out the result: makes_nhwc of csrc/bindings.h."""
    _, c, h, w = x.shape
    if c != 1:
        return _map_like(x)
    return _map_like(x, x.stride(1) == 1 and w > 1 and not (x.is_contiguous() and (skip or h == 1)))


def _fake_attend(x, *parameters):
    return _made_of(x, skip=parameters[-1])


def _fake_attend_train(x, w1, *parameters):
    skip = parameters[12]
    n, c, h, w = x.shape
    m, rows = w1.shape[0], n * (h + w)
    kept = ((rows, c), (rows, m), (rows, c), (m,), (m,))
    return (_made_of(x, skip), *(x.new_empty(shape, dtype=accumulate_dtype(x.dtype)) for shape in kept))


def _fake_attend_backward(
    grad, x, pooled, squeezed, gates, mean, var, w1, gamma, beta, eps, wh, ww, norm, activation, skip, needs
):
    scale = w1 if gamma is None else gamma
    m, c = w1.shape[0], x.shape[1]
    first, last = (m, c, 1, 1), (c, m, 1, 1)
    like = ((w1, first), (w1, m), (scale, m), (scale, m), (wh, last), (wh, c), (ww, last), (ww, c))
    dx = _map_like(x) if needs & NEEDS_X else x.new_empty(0)
    return dx, *(t.new_empty(size if needs >> bit & 1 else 0) for bit, (t, size) in enumerate(like, start=1))


def _fake_pool(x):
    n, c, h, w = x.shape
    return x.new_empty_strided((n, c, h + w, 1), ((h + w) * c, 1, c, c))


def _fake_gate_backward(grad, x, s_h, s_w, skip):
    n, c, h, w = x.shape
    ds_h = s_h.new_empty_strided((n, c, h, 1), (h * c, 1, c, c))
    return _map_like(x), ds_h, s_w.new_empty_strided((n, c, 1, w), (w * c, 1, w * c, c))


def _taking_grad_as_x(op, fake):
    """fake, which the compiler calls before it lowers op."""

    def call(*args, **kwargs):
        internals.take_grad_as_x(op)
        return fake(*args, **kwargs)

    return call


def _checked(op, fake):
    """fake for tensors on one device; RuntimeError for others, and so for all calls that reach it with meta
    tensors beside real ones: the dispatcher goes by the meta ones, and nothing would be computed."""
    names = internals.argument_names(op)

    def call(*args, **kwargs):
        first = None
        for name, t in (*zip(names, args), *kwargs.items()):
            if isinstance(t, Tensor):
                first = first or (name, t.device)
                if t.device != first[1]:
                    raise RuntimeError(f"{name} is on {t.device}, {first[0]} on {first[1]}: move one of them")
        return fake(*args, **kwargs)

    return call


def _convolution_flops(x_shape, w1_shape, *args, out_shape=None, **kwargs) -> int:
    """What FlopCounterMode counts for conv1, conv_h and conv_w."""
    n, c, h, w = x_shape
    return 4 * n * c * w1_shape[0] * (h + w)


def _backward_flops(
    grad_shape, x_shape, pooled, squeezed, gates, mean, var, w1_shape, *args, out_shape=None, **kwargs
) -> int:
    return 2 * _convolution_flops(x_shape, w1_shape)


def _register(ops: _Operators) -> None:
    fakes = {
        ops.attend: _fake_attend,
        ops.attend_out: lambda *args: None,
        ops.train: _fake_attend_train,
        ops.backward: _taking_grad_as_x(ops.backward, _fake_attend_backward),
        ops.train_update: _fake_attend_train,
        ops.update: lambda *args: None,
        ops.pool: _fake_pool,
        ops.pool_backward: lambda grad, x: _map_like(x),
        ops.gate: lambda x, s_h, s_w, skip: _made_of(x, skip),
        ops.gate_backward: _taking_grad_as_x(ops.gate_backward, _fake_gate_backward),
    }
    for op, fake in fakes.items():
        torch.library.register_fake(op, _checked(op, fake))
        internals.take_any_layout(op)
    for op, backward, keep in (
        (ops.train, _registered_gradients, _keep_registered),
        (ops.pool, _pool_gradient, _keep_for_pool_backward),
        (ops.gate, _gate_gradients, _keep_for_gate_backward),
    ):
        torch.library.register_autograd(op, backward, setup_context=functools.partial(keep, ops=ops))
    packets = ops.packets
    for op in (packets.attend, packets.attend_out, packets.attend_train, packets.attend_train_update):
        register_flop_formula(op)(_convolution_flops)
    register_flop_formula(packets.attend_backward)(_backward_flops)


# Once a namespace: the compiled library's backends have the same operators.
for _made in {ops.row.namespace: ops for ops in _OPERATORS.values()}.values():
    _register(_made)
