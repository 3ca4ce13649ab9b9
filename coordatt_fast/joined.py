"""Training under batch statistics of several processes: what nn.SyncBatchNorm does, within the fused passes.

Each call exchanges one small tensor per direction, in float64: forward the rows, means and squared deviations
of every process [1 + 2 M], backward two sums [2 M]. Every process combines them in the order of the ranks, so
all have the same bits. As with SyncBatchNorm the parameters' gradients are of the process's own images; that
of conv1's bias is zero, as its sum over the processes is.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from coordatt_fast import internals, ops


def attention(x, weights, activation, skip, tracked, momentum, update, group):
    """As ops.attention under batch statistics of all of group's processes, each of which has to call it.

    A process may have no images. The result cannot be differentiated twice.
    """
    if torch.is_grad_enabled() and (x.requires_grad or ops._any_requires_grad(weights)):
        return _Attend.apply(x, *weights, activation, skip, tracked, momentum, update, group)
    return _train(x, weights, activation, skip, tracked, momentum, update, group)[0]


# attention for compiled code, which runs it as it is between two graphs.
uncompiled = None


def make_uncompiled() -> bool:
    """For compiled code, while it is traced: by then the compiler has been imported."""
    global uncompiled
    if uncompiled is None:
        uncompiled = torch.compiler.disable(attention, reason="it exchanges statistics with other processes")
    return True


internals.mark_constant(make_uncompiled)


def _gathered(t: Tensor, group) -> Tensor:
    """Every process's t [width], by rank: [processes, width]."""
    everyone = t.new_empty((torch.distributed.get_world_size(group), t.numel()))
    torch.distributed.all_gather(list(everyone), t, group=group)
    return everyone


def _train(x, weights, activation, skip, tracked, momentum, update, group):
    """out, pooled, squeezed, gates, mean, var and moments, the running statistics moved."""
    w1, b1, gamma, beta, running_mean, running_var, eps, wh, bh, ww, bw = weights
    seen = None
    if update and tracked is not None and not ops._countable(tracked, x):
        seen = tracked.clone().add_(1)
        if momentum is None:
            momentum = 1 / float(seen)
    running = (running_mean, running_var, tracked if seen is None else None) if update else (None,) * 3
    kernels = torch.ops.coordatt_fast
    with ops._below_autograd():
        pooled, squeezed, moments = kernels.attend_train_local.default(x, w1, b1)
        moments = _gathered(moments, group)
        out, gates, mean, var = kernels.attend_train_joined.default(
            x, squeezed, moments, gamma, beta, eps, wh, bh, ww, bw, activation, skip, *running, momentum
        )
        if seen is not None:
            tracked.copy_(seen)
    return out, pooled, squeezed, gates, mean, var, moments


_TWICE = b"batch statistics of several processes cannot be differentiated twice"


class _Attend(Function):
    @staticmethod
    def forward(ctx, x, *args):
        weights = args[:11]
        activation, skip, *_, group = args[11:]
        out, *saved = _train(x, weights, *args[11:])
        w1, _, gamma, beta, _, _, eps, wh, _, ww, _ = weights
        ctx.save_for_backward(x, *saved, w1, gamma, beta, wh, ww)
        ctx.settings = eps, activation, skip, group
        return out

    @staticmethod
    def backward(ctx, grad):
        if internals.in_transform():
            raise RuntimeError("batch statistics of several processes: no backward pass under torch.func")
        x, pooled, squeezed, gates, mean, var, moments, w1, gamma, beta, wh, ww = ctx.saved_tensors
        eps, activation, skip, group = ctx.settings
        need = ctx.needs_input_grad
        needs = 0
        for bit, needed in enumerate((*need[:5], *need[8:12])):
            needs |= needed << bit
        kernels = torch.ops.coordatt_fast
        with ops._below_autograd():
            dlogits, du, y, sums = kernels.attend_backward_local.default(
                grad, x, squeezed, gates, mean, var, gamma, beta, eps, wh, ww, activation, skip
            )
            # Nothing else depends on the other processes.
            all_sums = _gathered(sums, group) if need[0] or need[1] else sums[None]
            found = kernels.attend_backward_joined.default(
                grad, x, pooled, squeezed, gates, mean, var, w1, gamma, eps, wh, ww, skip,
                moments, dlogits, du, y, sums, all_sums, needs,
            )  # fmt: skip
        found = [gradient if needs >> bit & 1 else None for bit, gradient in enumerate(found)]
        if torch.is_grad_enabled():
            # These may be used; what depends on how they were made may not.
            error = internals.DelayedError(_TWICE, len(found))
            found = error(*(None if g is None else g.requires_grad_() for g in found))
        return *found[:5], None, None, None, *found[5:], *(None,) * 6


# What the compiler and counters must know ------------------------------------------------------------


def _fake_train_local(x, w1, b1):
    n, c, h, w = x.shape
    kept = [x.new_empty((n * (h + w), size), dtype=ops.accumulate_dtype(x.dtype)) for size in (c, len(w1))]
    return *kept, x.new_empty(1 + 2 * len(w1), dtype=torch.float64)


def _fake_train_joined(x, squeezed, *parameters):
    n, c, h, w = x.shape
    skip, kept = parameters[9], ((n * (h + w), c), squeezed.shape[1:], squeezed.shape[1:])
    return ops._made_of(x, skip), *(squeezed.new_empty(shape) for shape in kept)


def _fake_backward_local(grad, x, squeezed, gates, *parameters):
    sums = x.new_empty(2 * squeezed.shape[1], dtype=torch.float64)
    return torch.empty_like(gates), torch.empty_like(squeezed), torch.empty_like(squeezed), sums


def _fake_backward_joined(
    grad, x, pooled, squeezed, gates, mean, var, w1, gamma, eps, wh, ww, skip, *middle_and_needs
):
    return ops._fake_attend_backward(
        grad, x, pooled, squeezed, gates, mean, var, w1, gamma, None, eps, wh, ww, None, None, skip,
        middle_and_needs[-1],
    )  # fmt: skip


def _squeeze_flops(x_shape, w1_shape, *args, **kwargs) -> int:
    n, c, h, w = x_shape
    return 2 * n * c * w1_shape[0] * (h + w)


def _expand_flops(x_shape, squeezed_shape, *args, **kwargs) -> int:
    return 2 * x_shape[1] * squeezed_shape[0] * squeezed_shape[1]


def _expand_backward_flops(grad_shape, x_shape, squeezed_shape, *args, **kwargs) -> int:
    return _expand_flops(x_shape, squeezed_shape)


def _rest_backward_flops(grad_shape, x_shape, pooled_shape, squeezed_shape, *args, **kwargs) -> int:
    return 3 * _expand_flops(x_shape, squeezed_shape)


for packet, fake, flops in (
    (torch.ops.coordatt_fast.attend_train_local, _fake_train_local, _squeeze_flops),
    (torch.ops.coordatt_fast.attend_train_joined, _fake_train_joined, _expand_flops),
    (torch.ops.coordatt_fast.attend_backward_local, _fake_backward_local, _expand_backward_flops),
    (torch.ops.coordatt_fast.attend_backward_joined, _fake_backward_joined, _rest_backward_flops),
):
    torch.library.register_fake(packet.default, ops._checked(packet.default, fake))
    register_flop_formula(packet)(flops)
