"""The host's side of the Triton kernels: csrc/library.cpp's operators, with the same arguments and results.

Results that only the backward pass reads (pooled, gates) hold C * L numbers an image in the order of walk.py.
"""

import functools
import math

import torch
import triton.language as tl
from torch import Tensor

from . import gate as gate_pass
from . import mix, mix_backward, tables
from . import pool as pool_pass

NONE, GIVEN, BATCH = 0, 1, 2
_ACC = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), tl.float32) | {torch.float64: tl.float64}


def _run(kernel, programs: int, arguments: tuple, constants: dict, warps: int = tables.WARPS) -> None:
    kernel[(programs,)](*arguments, **constants, num_warps=warps)


# Maps ------------------------------------------------------------------------------------------------


def _is_nhwc(t: Tensor) -> bool:
    """channels_last, by the strides: channels dense. A map of one channel counts as nchw."""
    return t.shape[1] > 1 and t.stride(1) == 1


def _is_native(t: Tensor, nhwc: bool) -> bool:
    """Whether the kernels can walk it: dense planes, or dense channels of evenly spaced pixels."""
    _, c, h, w = t.shape
    _, sc, sh, sw = t.stride()
    if not nhwc:
        return (w == 1 or sw == 1) and (h == 1 or sh == w)
    pixel = sw if w > 1 else sh
    return (c == 1 or sc == 1) and (w == 1 or h == 1 or sh == w * pixel)


def _empty_map(x: Tensor, nhwc: bool) -> Tensor:
    n, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c) if nhwc else (c * h * w, h * w, w, 1)
    return x.new_empty_strided((n, c, h, w), strides)


def _native(t: Tensor, nhwc: bool) -> Tensor:
    return t if _is_native(t, nhwc) else _empty_map(t, nhwc).copy_(t)


def _steps(t: Tensor, nhwc: bool) -> tuple[int, int]:
    """Channel and pixel step of a native map."""
    if not nhwc:
        return t.stride(1), 1
    return 1, (t.stride(3) if t.shape[3] > 1 else t.stride(2))


def _check_map(t: Tensor, x: Tensor, name: str) -> None:
    if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
        raise RuntimeError(
            f"coordatt_fast: {name} is {list(t.shape)}, {t.dtype} on {t.device}, "
            f"expected as x: {list(x.shape)}, {x.dtype} on {x.device}"
        )


def _dense(t: Tensor | None, count: int, x: Tensor, name: str) -> Tensor | None:
    """A parameter as the kernels take it: dense, on x's device, of x's dtype or float32 beside half x."""
    if t is None:
        return None
    if t.numel() != count or t.device != x.device:
        where = f"{t.numel()} elements on {t.device}"
        raise RuntimeError(f"coordatt_fast: {name} has {where}, expected {count} on {x.device}")
    if t.dtype is not x.dtype and (t.dtype is not torch.float32 or x.dtype is torch.float64):
        raise RuntimeError(f"coordatt_fast: {name} must have x's dtype, or float32 beside half-precision x")
    return t if t.is_contiguous() else t.contiguous()


def _parameters(x, m, w1, b1, gamma, beta, mean, var, wh, bh, ww, bw):
    c = x.shape[1]
    if w1.dim() != 4 or m < 1:
        raise RuntimeError("coordatt_fast: conv1_weight must be [M, C, 1, 1]")
    return (
        _dense(w1, m * c, x, "conv1_weight"), _dense(b1, m, x, "conv1_bias"),
        _dense(gamma, m, x, "bn_weight"), _dense(beta, m, x, "bn_bias"),
        _dense(mean, m, x, "bn_mean"), _dense(var, m, x, "bn_var"),
        _dense(wh, m * c, x, "conv_h_weight"), _dense(bh, c, x, "conv_h_bias"),
        _dense(ww, m * c, x, "conv_w_weight"), _dense(bw, c, x, "conv_w_bias"),
    )  # fmt: skip


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Constants, once per shape, dtype and layout ---------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _constants(c, h, w, m, dtype, nhwc, x_steps, o_steps, wide, bc=0):
    """Sizes and, per kernel, everything about a map that its code depends on."""
    s = tables.sizes(c, h, w, m, dtype.itemsize, nhwc, bc)
    small = dict(GC=1, GL=c) if nhwc else dict(GC=h + w, GL=1)
    shape = dict(C=c, H=h, W=w)
    common = dict(WIDE=wide, ACC=_ACC[dtype])
    product = dict(LB=s.LB, KC=s.KC, MP=s.MP)
    walk = dict(BC=s.BC, BLOCK=s.BLOCK, NHWC=nhwc, WHOLE=s.WHOLE)
    x, o = dict(XC=x_steps[0], XW=x_steps[1]), dict(OC=o_steps[0], OW=o_steps[1])
    g, dx = dict(GXC=o_steps[0], GXW=o_steps[1]), dict(DXC=x_steps[0], DXW=x_steps[1])
    tile, reduce_tile = dict(TC=s.TC, BH=s.BH, BW=s.BW), dict(TC=s.RC, BH=s.RH, BW=s.RW)
    blocks = math.ceil(c / s.BC)
    row = dict(M=m, BLOCKS=blocks, LB=s.RB, MP=s.MP, ACC=_ACC[dtype])
    return {
        "sizes": s,
        "blocks": blocks,
        "pool": shape | x | small | tile | product | common | dict(M=m, BC=s.BC),
        "means": shape | x | tile | product | common | dict(M=1, BC=s.BC, GC=1, GL=c),
        "gate": shape | x | o | small | product | walk | common | dict(M=m, NBP=s.NBP),
        "logits": shape | x | o | small | walk | common | dict(LB=s.LB),
        "reduce": shape | x | g | small | reduce_tile | product | common | dict(M=m, BC=s.BC),
        "logits_backward": shape | x | g | reduce_tile | walk | common | dict(LB=s.LB, GC=1, GL=c),
        "spread": shape | g | small | product | walk | common | dict(M=m, NBP=s.NBP, FB=256),
        "means_backward": shape | dx | walk | common,
        "rows": row,
        "weights": shape | small | dict(M=m, BC=s.WC, KB=s.KB, MP=s.MP, NBP=s.NBP, ACC=_ACC[dtype]),
    }


def _is_wide(*maps: Tensor) -> bool:
    """Whether an offset within an image can exceed 31 bits."""
    limit = 2**31
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:])) >= limit for t in maps
    )


def _on(x: Tensor):
    """Makes x's device the current one where it is not."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _STAY


class _Stay:
    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


_STAY = _Stay()


# Forward ---------------------------------------------------------------------------------------------


def attend(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, activation, skip):
    out = _empty_map(x, _is_nhwc(x))
    _infer(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, activation, skip, out)
    return out


def attend_out(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, activation, skip, *, out):
    _check_map(out, x, "out")
    nhwc = _is_nhwc(x)
    # An out that the kernels cannot walk, or that lies crossways to x, gets a copy.
    writable = _is_native(out, nhwc) and all(n <= 1 or s > 0 for n, s in zip(out.shape, out.stride()))
    made = out if writable else _empty_map(x, nhwc)
    _infer(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, activation, skip, made)
    if not writable:
        out.copy_(made)


def _infer(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, activation, skip, out):
    if (mean is None) != (var is None):
        raise RuntimeError("coordatt_fast: bn_mean and bn_var go together")
    norm = NONE if mean is None else GIVEN
    _forward(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, norm, activation, skip, out, None)


def attend_train(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, norm, activation, skip):
    n, c, h, w = x.shape
    m, rows, acc = w1.shape[0], n * (h + w), accumulate_dtype(x.dtype)
    saved = [x.new_empty(size, dtype=acc) for size in ((rows, c), (rows, m), (rows, c), (m,), (m,))]
    out = _empty_map(x, _is_nhwc(x))
    if norm == GIVEN and (mean is None or var is None):
        raise RuntimeError("coordatt_fast: norm 1 needs bn_mean and bn_var")
    if x.numel() == 0:
        given = norm == GIVEN
        saved[3].copy_(mean) if given else saved[3].zero_()
        saved[4].copy_(var) if given else saved[4].fill_(1)
    _forward(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, norm, activation, skip, out, saved)
    return out, *saved


def _forward(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, norm, activation, skip, out, saved):
    n, c, h, w = x.shape
    m = w1.shape[0]
    if norm != GIVEN:
        mean = var = None
    w1, b1, gamma, beta, mean, var, wh, bh, ww, bw = _parameters(
        x, m, w1, b1, gamma, beta, mean, var, wh, bh, ww, bw
    )
    if x.numel() == 0:
        return
    nhwc = _is_nhwc(x)
    xn = _native(x, nhwc)
    wide = _is_wide(xn, out)
    k = _constants(c, h, w, m, x.dtype, nhwc, _steps(xn, nhwc), _steps(out, nhwc), wide)
    blocks, rows = k["blocks"], n * (h + w)
    acc = accumulate_dtype(x.dtype)
    partial = x.new_empty(rows * blocks * m, dtype=acc)
    x_image, out_image = xn.stride(0), out.stride(0)
    with _on(x):
        if saved is None:
            small = x.new_empty(rows * c, dtype=acc)  # the means, then the gates
            _run(pool_pass.pool_kernel, n * blocks, (xn, small, w1, partial, x_image), k["pool"])
            constants = k["gate"] | dict(
                BLOCKS=blocks, SIZE=1, TRAIN=False, NORM=norm, ACT=activation, SKIP=skip
            )
            arguments = (xn, out, small, partial, None, None, None, b1, gamma, beta, mean, var, eps)
            arguments += (wh, bh, ww, bw, x_image, out_image, rows, 1)
        else:
            means, squeezed, gates, saved_mean, saved_var = saved
            _run(pool_pass.pool_kernel, n * blocks, (xn, means, w1, partial, x_image), k["pool"])
            s = k["sizes"]
            tiles, row_blocks = tables.row_blocks(rows, s.RB, s.NBP)
            stats = x.new_empty(row_blocks * 2 * m, dtype=acc)
            constants = k["rows"] | dict(TILES=tiles, NORM=norm)
            _run(mix.stats_kernel, row_blocks, (partial, b1, squeezed, stats, rows), constants)
            constants = k["gate"] | dict(
                BLOCKS=1, SIZE=tiles * s.RB, TRAIN=True, NORM=norm, ACT=activation, SKIP=skip
            )
            arguments = (xn, out, gates, squeezed, stats, saved_mean, saved_var)
            arguments += (b1, gamma, beta, mean, var, eps, wh, bh, ww, bw)
            arguments += (x_image, out_image, rows, row_blocks)
        _run(gate_pass.gate_kernel, n * blocks, arguments, constants)


def update_running_stats(running_mean, running_var, num_batches_tracked, squeezed, mean, var, momentum):
    rows, m = squeezed.shape[0], mean.numel()
    if num_batches_tracked is not None:
        if num_batches_tracked.dtype != torch.int64 or num_batches_tracked.device != mean.device:
            raise RuntimeError("coordatt_fast: num_batches_tracked must be int64 on x's device")
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if t is not None and (t.dim() != 1 or t.numel() != m or t.device != mean.device):
            raise RuntimeError(f"coordatt_fast: {name} must be [M] on x's device")
        if t is not None and (t.dtype == torch.float64) != (mean.dtype == torch.float64):
            raise RuntimeError(
                f"coordatt_fast: {name} must have x's dtype, or float32 beside half-precision x"
            )
    cumulative = momentum is None and num_batches_tracked is not None
    steps = [0 if t is None else t.stride(0) for t in (running_mean, running_var)]
    constants = dict(M=m, MP=tables.power(m), CUMULATIVE=cumulative, ACC=_ACC[mean.dtype])
    momentum = float(momentum or 0)
    arguments = (running_mean, running_var, num_batches_tracked, mean, var, rows, momentum, *steps)
    with _on(mean):
        _run(mix.update_kernel, 1, arguments, constants)


# Backward --------------------------------------------------------------------------------------------


def attend_backward(
    grad, x, pooled, squeezed, gates, mean, var, w1, gamma, beta, eps, wh, ww, norm, activation, skip, needs
):
    n, c, h, w = x.shape
    _check_map(grad, x, "grad")
    m, rows, acc = w1.shape[0], n * (h + w), accumulate_dtype(x.dtype)
    for name, t, count in (
        ("pooled", pooled, rows * c), ("squeezed", squeezed, rows * m), ("gates", gates, rows * c),
        ("mean", mean, m), ("var", var, m),
    ):  # fmt: skip
        if t.dtype != acc or t.numel() != count or t.device != x.device or not t.is_contiguous():
            raise RuntimeError(f"coordatt_fast: {name} is not what the forward pass saved")
    nhwc = _is_nhwc(x)
    bn = w1 if gamma is None else gamma
    first, last = (m, c, 1, 1), (c, m, 1, 1)
    like = ((w1, first), (w1, m), (bn, m), (bn, m), (wh, last), (wh, c), (ww, last), (ww, c))
    dx = _empty_map(x, nhwc) if needs & 1 else x.new_empty(0)
    found = [
        t.new_empty(size if needs >> bit & 1 else 0) for bit, (t, size) in enumerate(like, start=1)
    ]
    if x.numel() == 0:
        return dx, *(t.zero_() for t in found)
    w1, _, gamma, beta, _, _, wh, _, ww, _ = _parameters(
        x, m, w1, None, gamma, beta, None, None, wh, None, ww, None
    )
    xn, g = _native(x, nhwc), _native(grad, nhwc)
    wide = _is_wide(xn, g)
    k = _constants(c, h, w, m, x.dtype, nhwc, _steps(xn, nhwc), _steps(g, nhwc), wide)
    s, blocks = k["sizes"], k["blocks"]
    planes = n * blocks
    tiles, row_blocks = tables.row_blocks(rows, s.RB, s.NBP)
    ds, partial, du, sums = (
        x.new_empty(size, dtype=acc) for size in (rows * c, rows * blocks * m, rows * m, row_blocks * 2 * m)
    )
    dw1, db1, dgamma, dbeta, dwh, dbh, dww, dbw = (t if t.numel() else None for t in found)
    statistics = (mean, var, gamma)
    with _on(x):
        arguments = (g, xn, gates, ds, wh, ww, partial, g.stride(0), xn.stride(0))
        _run(gate_pass.reduce_kernel, planes, arguments, k["reduce"])

        arguments = (partial, squeezed, du, sums, *statistics, beta, eps, rows)
        constants = k["rows"] | dict(TILES=tiles, NORM=norm, ACT=activation)
        _run(mix_backward.mix_backward_kernel, row_blocks, arguments, constants)

        parts, splits, most = None, (0, 0, 0), 0
        if needs >> 1:
            kb_tiles = tables.weight_tiles(rows, s.KB)
            per = kb_tiles * s.KB
            wanted = (needs >> 5 & 3, needs >> 7 & 3, needs >> 1 & 1)
            splits = tuple(
                math.ceil(count / per) if want else 0 for count, want in zip((n * h, n * w, rows), wanted)
            )
            if max(splits) > 1:
                most = tables.power(max(splits))
                parts = x.new_empty(sum(splits) * c * (m + 1), dtype=acc)
            arguments = (ds, pooled, du, squeezed, sums, *statistics, beta, eps)
            arguments += (parts, dwh, dbh, dww, dbw, dw1, db1, dgamma, dbeta)
            arguments += (n, rows, row_blocks, *splits)
            constants = k["weights"] | dict(TILES=kb_tiles, SPLIT=most > 0, NORM=norm, ACT=activation)
            programs = max(1, sum(splits)) * math.ceil(c / s.WC)
            _run(mix_backward.weights_kernel, programs, arguments, constants)

        if needs & 1 or most:
            # ds has been used up: its memory takes dp.
            constants = k["spread"] | _steps_of_dx(dx, nhwc, needs) | dict(SPLITS=most, NORM=norm, SKIP=skip)
            planes = planes if needs & 1 else 0
            sums_of_parts = 3 * math.ceil(c * (m + 1) / constants["FB"]) if most else 0
            arguments = (g, dx if needs & 1 else None, gates, ds, du, squeezed, sums, *statistics, w1, eps)
            arguments += (parts, dwh, dbh, dww, dbw, dw1, g.stride(0), dx.stride(0), rows, row_blocks)
            arguments += (planes, *splits)
            _run(pool_pass.spread_kernel, planes + sums_of_parts, arguments, constants)
    return dx, *found


def _steps_of_dx(dx, nhwc, needs):
    steps = _steps(dx, nhwc) if needs & 1 else (1, 1)
    return dict(DXC=steps[0], DXW=steps[1])


# Pool and gate, for the hybrid tier ------------------------------------------------------------------


def pool(x):
    n, c, h, w = x.shape
    length = h + w
    size, strides = (n, c, length, 1), (length * c, 1, c, c)
    nhwc = _is_nhwc(x)
    xn = _native(x, nhwc)
    steps = _steps(xn, nhwc)
    k = _constants(c, h, w, 1, x.dtype, nhwc, steps, steps, _is_wide(xn))
    # Columns wider than a tile are added up in memory, so not in a half type.
    at_once = k["sizes"].BW >= w
    means = x.new_empty_strided(size, strides, dtype=x.dtype if at_once else accumulate_dtype(x.dtype))
    if x.numel():
        with _on(x):
            arguments = (xn, means, None, None, xn.stride(0))
            _run(pool_pass.pool_kernel, n * k["blocks"], arguments, k["means"])
    return means if means.dtype == x.dtype else _as(means, x.dtype, size, strides)


def _as(t, dtype, size, strides):
    """A copy of t in this dtype and these strides."""
    return t.new_empty_strided(size, strides, dtype=dtype).copy_(t)


def pool_backward(grad, x):
    n, c, h, w = x.shape
    if tuple(grad.shape) != (n, c, h + w, 1):
        raise RuntimeError("coordatt_fast: grad must be [N, C, H + W, 1]")
    nhwc = _is_nhwc(x)
    dx = _empty_map(x, nhwc)
    if x.numel():
        steps = _steps(dx, nhwc)
        k = _constants(c, h, w, 1, x.dtype, nhwc, steps, steps, _is_wide(dx))
        with _on(x):
            arguments = (grad, dx, *grad.stride()[:3], dx.stride(0))
            _run(pool_pass.pool_backward_kernel, n * k["blocks"], arguments, k["means_backward"])
    return dx


def _logits(x, s_h, s_w):
    """Strides of the logits: image, channel, line of each."""
    n, c, h, w = x.shape
    if tuple(s_h.shape) != (n, c, h, 1) or tuple(s_w.shape) != (n, c, 1, w):
        raise RuntimeError("coordatt_fast: s_h must be [N, C, H, 1] and s_w [N, C, 1, W]")
    if s_h.device != x.device or s_w.device != x.device:
        raise RuntimeError("coordatt_fast: s_h and s_w must be on x's device")
    if any((s.dtype == torch.float64) != (x.dtype == torch.float64) for s in (s_h, s_w)):
        raise RuntimeError("coordatt_fast: logits must be float64 exactly where x is")
    return (*s_h.stride()[:3], *s_w.stride()[:2], s_w.stride(3))


def gate(x, s_h, s_w, skip):
    n, c, h, w = x.shape
    strides = _logits(x, s_h, s_w)
    nhwc = _is_nhwc(x)
    out = _empty_map(x, nhwc)
    if x.numel():
        xn = _native(x, nhwc)
        k = _constants(c, h, w, 1, x.dtype, nhwc, _steps(xn, nhwc), _steps(out, nhwc), _is_wide(xn, out))
        gates = x.new_empty(n * (h + w) * c, dtype=accumulate_dtype(x.dtype))
        with _on(x):
            arguments = (xn, out, gates, s_h, s_w, xn.stride(0), out.stride(0), *strides)
            _run(gate_pass.gate_logits_kernel, n * k["blocks"], arguments, k["logits"] | dict(SKIP=skip))
    return out


def gate_backward(grad, x, s_h, s_w, skip):
    n, c, h, w = x.shape
    _check_map(grad, x, "grad")
    strides = _logits(x, s_h, s_w)
    nhwc = _is_nhwc(x)
    dx = _empty_map(x, nhwc)
    length, acc = h + w, accumulate_dtype(x.dtype)
    ds = x.new_empty((n, length, c), dtype=acc)
    if x.numel():
        xn, g = _native(x, nhwc), _native(grad, nhwc)
        k = _constants(c, h, w, 1, x.dtype, nhwc, _steps(xn, nhwc), _steps(g, nhwc), _is_wide(xn, g, dx))
        gates = x.new_empty(n * length * c, dtype=acc)
        steps = _steps(dx, nhwc)
        constants = k["logits_backward"] | dict(SKIP=skip, OC=steps[0], OW=steps[1])
        with _on(x):
            arguments = (g, xn, dx, gates, ds, s_h, s_w, g.stride(0), xn.stride(0), dx.stride(0), *strides)
            _run(gate_pass.gate_backward_kernel, n * k["blocks"], arguments, constants)
    ds_h = _as(ds[:, :h].mT.unsqueeze(3), s_h.dtype, (n, c, h, 1), (h * c, 1, c, c))
    ds_w = _as(ds[:, h:].mT.unsqueeze(2), s_w.dtype, (n, c, 1, w), (w * c, 1, w * c, c))
    return dx, ds_h, ds_w
