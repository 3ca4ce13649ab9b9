"""What the Triton kernels take for granted of a call's tensors: RuntimeError where it does not hold."""

import torch
from torch import Tensor

from coordatt_fast.codes import NORM_BATCH, NORM_NONE


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory(t: Tensor, name: str) -> None:
    """A tensor whose storage was resized to nothing has elements and no memory."""
    if t.data_ptr() == 0 and t.numel() and not t.is_meta:
        raise RuntimeError(f"coordatt_fast: {name} has {t.numel()} elements, but its storage is empty")


def like(t: Tensor, x: Tensor, name: str) -> None:
    if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
        raise RuntimeError(
            f"coordatt_fast: {name} is {list(t.shape)}, {t.dtype} on {t.device}, "
            f"expected as x: {list(x.shape)}, {x.dtype} on {x.device}"
        )


def dense(t: Tensor | None, shape: tuple | int, dtype, device, name: str) -> Tensor | None:
    """A parameter as the kernels take it: dense, on x's device, of x's dtype or float32 beside half x.

    shape: or a number of elements, in any shape, as PyTorch takes a normalisation's weight and bias.
    """
    if t is None:
        return None
    if (t.numel() if type(shape) is int else t.shape) != shape or t.device != device:
        have = f"{name} has shape {list(t.shape)} on {t.device}"
        raise RuntimeError(f"coordatt_fast: {have}, expected {shape} on {device}")
    if t.dtype is not dtype and (t.dtype is not torch.float32 or dtype is torch.float64):
        raise RuntimeError(f"coordatt_fast: {name} must have x's dtype, or float32 beside half-precision x")
    memory(t, name)
    return t if t.is_contiguous() else t.contiguous()


def width(w1: Tensor) -> int:
    """M."""
    if w1.dim() != 4 or not w1.shape[0]:
        raise RuntimeError(f"coordatt_fast: conv1_weight has shape {list(w1.shape)}, expected [M, C, 1, 1]")
    return w1.shape[0]


def parameters(x, m, w1, b1, gamma, beta, mean, var, wh, bh, ww, bw):
    c, dtype, device = x.shape[1], x.dtype, x.device
    first, last = (m, c, 1, 1), (c, m, 1, 1)
    return (
        dense(w1, first, dtype, device, "conv1_weight"), dense(b1, (m,), dtype, device, "conv1_bias"),
        dense(gamma, m, dtype, device, "bn_weight"), dense(beta, m, dtype, device, "bn_bias"),
        dense(mean, (m,), dtype, device, "bn_mean"), dense(var, (m,), dtype, device, "bn_var"),
        dense(wh, last, dtype, device, "conv_h_weight"), dense(bh, (c,), dtype, device, "conv_h_bias"),
        dense(ww, last, dtype, device, "conv_w_weight"), dense(bw, (c,), dtype, device, "conv_w_bias"),
    )  # fmt: skip


def epsilon(eps: float, norm: int) -> None:
    if (eps < 0 and norm != NORM_NONE) or (eps == 0 and norm == NORM_BATCH):
        wanted = "a positive number, or zero beside given statistics"
        raise RuntimeError(f"coordatt_fast: eps is {eps}, expected {wanted}")


def running(running_mean, running_var, num_batches_tracked, mean, momentum):
    """Whether they move by 1 / batches seen; else the momentum; steps between the elements of both."""
    if num_batches_tracked is not None:
        if num_batches_tracked.dtype != torch.int64 or num_batches_tracked.device != mean.device:
            raise RuntimeError("coordatt_fast: num_batches_tracked must be int64 on x's device")
        memory(num_batches_tracked, "num_batches_tracked")
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if t is None:
            continue
        if t.shape != mean.shape or t.device != mean.device:
            have = f"{name} has shape {list(t.shape)} on {t.device}"
            raise RuntimeError(f"coordatt_fast: {have}, expected {list(mean.shape)} on {mean.device}")
        memory(t, name)
        if (t.dtype == torch.float64) != (mean.dtype == torch.float64):
            raise RuntimeError(
                f"coordatt_fast: {name} must have x's dtype, or float32 beside half-precision x"
            )
    steps = [0 if t is None else t.stride(0) for t in (running_mean, running_var)]
    return momentum is None and num_batches_tracked is not None, float(momentum or 0), *steps


def saved(t: Tensor, count: int, dtype, device, name: str) -> None:
    if t.dtype != dtype or t.numel() != count or t.device != device or not t.is_contiguous():
        raise RuntimeError(f"coordatt_fast: {name} is not what the forward pass saved")
    memory(t, name)


def logits(x, s_h, s_w):
    """Steps of the logits by the kernels' names: image, channel, line of each."""
    n, c, h, w = x.shape
    if tuple(s_h.shape) != (n, c, h, 1) or tuple(s_w.shape) != (n, c, 1, w):
        raise RuntimeError("coordatt_fast: s_h must be [N, C, H, 1] and s_w [N, C, 1, W]")
    if s_h.device != x.device or s_w.device != x.device:
        raise RuntimeError("coordatt_fast: s_h and s_w must be on x's device")
    if any((s.dtype == torch.float64) != (x.dtype == torch.float64) for s in (s_h, s_w)):
        raise RuntimeError("coordatt_fast: logits must be float64 exactly where x is")
    memory(s_h, "s_h")
    memory(s_w, "s_w")
    (h_image, h_channel, h_line, _), (w_image, w_channel, _, w_line) = s_h.stride(), s_w.stride()
    return dict(
        h_image=h_image, h_channel=h_channel, h_line=h_line,
        w_image=w_image, w_channel=w_channel, w_line=w_line,
    )  # fmt: skip
