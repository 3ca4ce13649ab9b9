"""The host's side of the Triton kernels: csrc/bindings.h's operators, with the same arguments and results.

Results that only the backward pass reads (pooled, gates) hold C * L numbers an image in the order of walk.py.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from coordatt_fast import codes

from . import arguments, autotune, checks, mix, mix_backward, tables
from . import gate as gate_pass
from . import pool as pool_pass
from .checks import accumulate_dtype

WIDE_FROM = 2**31  # offsets within an image from here on take 64 bits
_ACC = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), tl.float32) | {torch.float64: tl.float64}


OPTIONS = dict(num_warps=tables.WARPS, enable_fp_fusion=True)


class Constants(dict):
    """Constants of a kernel, and what Triton compiled with them for each kind of arguments.

    An inference call's host side takes 61 us through Triton's own dispatch, 24 us without (measured with a
    driver that launches nothing).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.variants, self.compiled, self.values = {}, {}, None

    def plus(self, **more) -> "Constants":
        key = tuple(more.values())
        if key not in self.variants:
            self.variants[key] = Constants(self | more)
        return self.variants[key]


def _run(kernel, programs: int, given: tuple, constants: Constants) -> None:
    """Launches kernel; given: its class of arguments.py."""
    kind = tuple([(a.data_ptr() & 15, a.dtype) if isinstance(a, Tensor) else a for a in given])
    compiled = constants.compiled.get(kind)
    if compiled is not None:
        compiled[programs, 1, 1](*given, *constants.values)
        return
    compiled = kernel[programs,](*given, **constants, **OPTIONS)
    if compiled is not None:  # the interpreter compiles nothing
        if len(constants.compiled) >= 64:
            constants.compiled.clear()
        constants.values = tuple(constants[name] for name in kernel.arg_names[len(given) :])
        constants.compiled[kind] = compiled


# Maps ------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the kernels walk a map.

    nhwc: channels dense; native: as it is, else a copy of it; steps: of channel and pixel; wide: offsets
    within an image exceed 31 bits; strides: of a fresh map of the same layout.
    """

    nhwc: bool
    native: bool
    steps: tuple[int, int]
    wide: bool
    strides: tuple[int, int, int, int]


@functools.lru_cache(maxsize=4096)
def _layout_of(shape, strides, nhwc: bool | None = None) -> Layout:
    """The layout of these strides; nhwc None: to be read off them, one channel counting as nchw."""
    _, c, h, w = shape
    _, sc, sh, sw = strides
    pixel = sw if w > 1 else sh if h > 1 else c
    nhwc = c > 1 and sc == 1 if nhwc is None else nhwc
    if nhwc:
        native = (c == 1 or sc == 1) and (w == 1 or h == 1 or sh == w * pixel)
        steps, fresh = (1, pixel), (h * w * c, 1, w * c, c)
    else:
        native = (w == 1 or sw == 1) and (h == 1 or sh == w)
        steps, fresh = (sc, 1), (c * h * w, h * w, w, 1)
    if h * w == 1:
        fresh = (c, 1, 1, 1)  # both, but PyTorch's strides
    wide = sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:])) >= WIDE_FROM
    return Layout(nhwc, native, steps, wide, fresh)


def _native(t: Tensor, nhwc: bool | None = None) -> tuple[Tensor, Layout]:
    """t, or a copy of it that the kernels can walk."""
    checks.memory(t, "a map")
    layout = _layout_of(t.shape, t.stride(), nhwc)
    if layout.native:
        return t, layout
    copy = t.new_empty_strided(t.shape, layout.strides).copy_(t)
    return copy, _layout_of(copy.shape, layout.strides, layout.nhwc)


def _fresh(x: Tensor, layout: Layout, strides=None) -> tuple[Tensor, Layout]:
    """A new map of x's shape, dtype and layout."""
    strides = strides or layout.strides
    made = x.new_empty_strided(x.shape, strides)
    return made, _layout_of(made.shape, strides, layout.nhwc)


def _made_of(x: Tensor, layout: Layout, skip: bool) -> tuple[Tensor, Layout]:
    """A new map for what the gate makes of x: makes_nhwc of csrc/bindings.h."""
    _, c, h, w = x.shape
    if c == 1 and x.stride(1) == 1 and w > 1 and not (x.is_contiguous() and (skip or h == 1)):
        return _fresh(x, layout, (h * w, 1, w, 1))
    return _fresh(x, layout)


# Constants, once per shape, dtype and layout ---------------------------------------------------------


@autotune.chosen
@functools.lru_cache(maxsize=512)
def _constants_of(shape, m, dtype, device, nhwc, x_steps, o_steps, wide, bc=0):
    """Sizes and, per kernel, everything about a map that its code depends on; one set a device."""
    _, c, h, w = shape
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
    parts = {
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
    return s, blocks, {name: Constants(constants) for name, constants in parts.items()}


def _constants(x: Tensor, m: int, layout: Layout, other: Layout):
    """For x as it is walked (layout) beside the other map of a kernel: an output or the gradient."""
    wide = layout.wide or other.wide
    return _constants_of(x.shape, m, x.dtype, x.device, layout.nhwc, layout.steps, other.steps, wide)


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
    return _infer(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, activation, skip, None)


def attend_out(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, activation, skip, result):
    checks.like(result, x, "out")
    checks.memory(result, "out")
    # A copy where the kernels cannot walk it, where it lies crossways to x, and where it would be written
    # while it is still read; x itself is read before it is written.
    crossways = _layout_of(result.shape, result.stride(), _layout_of(x.shape, x.stride()).nhwc)
    writable = crossways.native and all(n <= 1 or s > 0 for n, s in zip(result.shape, result.stride()))
    in_place = result.data_ptr() == x.data_ptr() and result.stride() == x.stride()
    read = (None if in_place else x, w1, b1, gamma, beta, mean, var, wh, bh, ww, bw)
    writable = writable and not any(t is not None and _share_memory(t, result) for t in read)
    to = result if writable else None
    made = _infer(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, activation, skip, to)
    if not writable:
        result.copy_(made)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _infer(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, activation, skip, out):
    if (mean is None) != (var is None):
        raise RuntimeError("coordatt_fast: bn_mean and bn_var go together")
    n, c, h, w = x.shape
    m, rows = checks.width(w1), n * (h + w)
    parameters = checks.parameters(x, m, w1, b1, gamma, beta, mean, var, wh, bh, ww, bw)
    w1, b1, gamma, beta, mean, var, wh, bh, ww, bw = parameters
    xn, layout = _native(x)
    out, out_layout = _made_of(x, layout, skip) if out is None else _native(out, layout.nhwc)
    norm = codes.NORM_NONE if mean is None else codes.NORM_GIVEN
    checks.epsilon(eps, norm)
    if x.numel() == 0:
        return out
    _, blocks, k = _constants(x, m, layout, out_layout)
    acc = accumulate_dtype(x.dtype)
    small = x.new_empty(rows * c, dtype=acc)  # the means, then the gates
    partial = x.new_empty(rows * blocks * m, dtype=acc)
    constants = k["gate"].plus(
        BLOCKS=blocks, SIZE=1, TRAIN=False, UPDATE=False, NORM=norm, ACT=activation, SKIP=skip
    )
    with _on(x):
        pooling = arguments.Pool(
            x_ptr=xn, means_ptr=small, w1_ptr=w1, partial_ptr=partial, x_image=xn.stride(0)
        )
        _run(pool_pass.pool_kernel, n * blocks, pooling, k["pool"])
        gating = arguments.Gate(
            x_ptr=xn, out_ptr=out, gates_ptr=small, z_ptr=partial,
            b1_ptr=b1, gamma_ptr=gamma, beta_ptr=beta, mean_ptr=mean, var_ptr=var, eps=eps,
            wh_ptr=wh, bh_ptr=bh, ww_ptr=ww, bw_ptr=bw,
            x_image=xn.stride(0), out_image=out.stride(0), rows=rows,
        )  # fmt: skip
        _run(gate_pass.gate_kernel, n * blocks, gating, constants)
    return out


def attend_train(x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, norm, activation, skip):
    return attend_train_update(
        x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, norm, activation, skip, None, None, None, None
    )


def attend_train_update(
    x, w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw, norm, activation, skip,
    running_mean, running_var, num_batches_tracked, momentum,
):  # fmt: skip
    if norm == codes.NORM_GIVEN and (mean is None or var is None):
        raise RuntimeError("coordatt_fast: norm 1 needs bn_mean and bn_var")
    if norm != codes.NORM_GIVEN:
        mean = var = None
    n, c, h, w = x.shape
    m, rows, acc = checks.width(w1), n * (h + w), accumulate_dtype(x.dtype)
    parameters = checks.parameters(x, m, w1, b1, gamma, beta, mean, var, wh, bh, ww, bw)
    w1, b1, gamma, beta, mean, var, wh, bh, ww, bw = parameters
    means, squeezed, gates = (x.new_empty(size, dtype=acc) for size in ((rows, c), (rows, m), (rows, c)))
    saved_mean, saved_var = x.new_empty(m, dtype=acc), x.new_empty(m, dtype=acc)
    running = (running_mean, running_var, num_batches_tracked)
    update = any(t is not None for t in running)
    checks.epsilon(eps, norm)
    xn, layout = _native(x)
    out, out_layout = _made_of(x, layout, skip)
    if update and norm != codes.NORM_BATCH:
        raise RuntimeError("coordatt_fast: running statistics move under batch statistics (norm 2) only")
    if x.numel() == 0:
        saved_mean.copy_(mean) if norm == codes.NORM_GIVEN else saved_mean.zero_()
        saved_var.copy_(var) if norm == codes.NORM_GIVEN else saved_var.fill_(1)
        if update:
            update_running_stats(*running, squeezed, saved_mean, saved_var, momentum)
        return out, means, squeezed, gates, saved_mean, saved_var
    s, blocks, k = _constants(x, m, layout, out_layout)
    tiles, row_blocks = tables.row_blocks(rows, s.RB, s.NBP)
    partial, stats = x.new_empty(rows * blocks * m, dtype=acc), x.new_empty(row_blocks * 2 * m, dtype=acc)
    cumulative, momentum, mean_step, var_step = checks.running(*running, saved_mean, momentum)
    constants = k["gate"].plus(
        BLOCKS=1, SIZE=tiles * s.RB, TRAIN=True, UPDATE=1 + cumulative if update else 0, NORM=norm,
        ACT=activation, SKIP=skip,
    )  # fmt: skip
    with _on(x):
        pooling = arguments.Pool(
            x_ptr=xn, means_ptr=means, w1_ptr=w1, partial_ptr=partial, x_image=xn.stride(0)
        )
        _run(pool_pass.pool_kernel, n * blocks, pooling, k["pool"])
        adding = arguments.Stats(
            partial_ptr=partial, b1_ptr=b1, squeezed_ptr=squeezed, stats_ptr=stats, rows=rows
        )
        _run(mix.stats_kernel, row_blocks, adding, k["rows"].plus(TILES=tiles, NORM=norm))
        gating = arguments.Gate(
            x_ptr=xn, out_ptr=out, gates_ptr=gates, z_ptr=squeezed,
            b1_ptr=b1, gamma_ptr=gamma, beta_ptr=beta, mean_ptr=mean, var_ptr=var, eps=eps,
            wh_ptr=wh, bh_ptr=bh, ww_ptr=ww, bw_ptr=bw,
            x_image=xn.stride(0), out_image=out.stride(0), rows=rows,
            stats_ptr=stats, saved_mean_ptr=saved_mean, saved_var_ptr=saved_var, blocks_of_rows=row_blocks,
            running_mean_ptr=running_mean, running_var_ptr=running_var, tracked_ptr=num_batches_tracked,
            momentum=momentum, mean_step=mean_step, var_step=var_step,
        )  # fmt: skip
        _run(gate_pass.gate_kernel, n * blocks, gating, constants)
    return out, means, squeezed, gates, saved_mean, saved_var


def update_running_stats(running_mean, running_var, num_batches_tracked, squeezed, mean, var, momentum):
    m = mean.numel()
    rows = squeezed.numel() // max(1, m)
    for name, t in (("mean", mean), ("var", var)):
        checks.saved(t, m, accumulate_dtype(mean.dtype), squeezed.device, name)
    running = (running_mean, running_var, num_batches_tracked)
    cumulative, momentum, mean_step, var_step = checks.running(*running, mean, momentum)
    constants = _update_constants(m, cumulative, mean.dtype, mean.device)
    with _on(mean):
        moving = arguments.Update(
            running_mean_ptr=running_mean, running_var_ptr=running_var, tracked_ptr=num_batches_tracked,
            mean_ptr=mean, var_ptr=var, rows=rows,
            momentum=momentum, mean_step=mean_step, var_step=var_step,
        )  # fmt: skip
        _run(mix.update_kernel, 1, moving, constants)


@functools.lru_cache(maxsize=512)
def _update_constants(m, cumulative, dtype, device):
    return Constants(M=m, MP=tables.power(m), CUMULATIVE=cumulative, ACC=_ACC[dtype])


# Backward --------------------------------------------------------------------------------------------


def attend_backward(
    grad, x, pooled, squeezed, gates, mean, var, w1, gamma, beta, eps, wh, ww, norm, activation, skip, needs
):
    n, c, h, w = x.shape
    checks.like(grad, x, "grad")
    m, rows, acc = checks.width(w1), n * (h + w), accumulate_dtype(x.dtype)
    for name, t, count in (
        ("pooled", pooled, rows * c), ("squeezed", squeezed, rows * m), ("gates", gates, rows * c),
        ("mean", mean, m), ("var", var, m),
    ):  # fmt: skip
        checks.saved(t, count, acc, x.device, name)
    if gamma is not None and gamma.dim() != 1:
        raise RuntimeError(f"coordatt_fast: bn_weight has shape {list(gamma.shape)}, expected [{m}]")
    xn, layout = _native(x)
    g, g_layout = _native(grad, layout.nhwc)
    bn = w1 if gamma is None else gamma
    first, last = (m, c, 1, 1), (c, m, 1, 1)
    like = ((w1, first), (w1, m), (bn, m), (bn, m), (wh, last), (wh, c), (ww, last), (ww, c))
    dx = _fresh(x, layout)[0] if needs & codes.NEEDS_X else x.new_empty(0)
    found = [
        t.new_empty(size if needs >> bit & 1 else 0) for bit, (t, size) in enumerate(like, start=1)
    ]
    if x.numel() == 0:
        return dx, *(t.zero_() for t in found)
    w1, _, gamma, beta, _, _, wh, _, ww, _ = checks.parameters(
        x, m, w1, None, gamma, beta, None, None, wh, None, ww, None
    )
    s, blocks, k = _constants(x, m, layout, g_layout)
    planes = n * blocks
    tiles, row_blocks = tables.row_blocks(rows, s.RB, s.NBP)
    ds, partial, du, sums = (
        x.new_empty(size, dtype=acc) for size in (rows * c, rows * blocks * m, rows * m, row_blocks * 2 * m)
    )
    dw1, db1, dgamma, dbeta, dwh, dbh, dww, dbw = (t if t.numel() else None for t in found)
    statistics = dict(mean_ptr=mean, var_ptr=var, gamma_ptr=gamma, eps=eps)
    with _on(x):
        reducing = arguments.Reduce(
            g_ptr=g, x_ptr=xn, gates_ptr=gates, ds_ptr=ds, wh_ptr=wh, ww_ptr=ww, partial_ptr=partial,
            g_image=g.stride(0), x_image=xn.stride(0),
        )  # fmt: skip
        _run(gate_pass.reduce_kernel, planes, reducing, k["reduce"])

        mixing = arguments.MixBackward(
            partial_ptr=partial, squeezed_ptr=squeezed, du_ptr=du, sums_ptr=sums,
            **statistics, beta_ptr=beta, rows=rows,
        )  # fmt: skip
        constants = k["rows"].plus(TILES=tiles, NORM=norm, ACT=activation)
        _run(mix_backward.mix_backward_kernel, row_blocks, mixing, constants)

        parts, splits, most = None, (0, 0, 0), 0
        if needs & codes.NEEDS_PARAMETERS:
            kb_tiles = tables.weight_tiles(rows, s.KB)
            per = kb_tiles * s.KB
            lines = {codes.NEEDS_CONV_H: n * h, codes.NEEDS_CONV_W: n * w, codes.NEEDS_CONV1_WEIGHT: rows}
            splits = tuple(math.ceil(count / per) if needs & kind else 0 for kind, count in lines.items())
            if max(splits) > 1:
                most = tables.power(max(splits))
                parts = x.new_empty(sum(splits) * c * (m + 1), dtype=acc)
            weighing = arguments.Weights(
                ds_ptr=ds, means_ptr=pooled, du_ptr=du, squeezed_ptr=squeezed, sums_ptr=sums,
                **statistics, beta_ptr=beta, parts_ptr=parts, dwh_ptr=dwh, dbh_ptr=dbh,
                dww_ptr=dww, dbw_ptr=dbw, dw1_ptr=dw1, db1_ptr=db1, dgamma_ptr=dgamma, dbeta_ptr=dbeta,
                images=n, rows=rows, blocks_of_rows=row_blocks,
                splits_h=splits[0], splits_w=splits[1], splits_1=splits[2],
            )  # fmt: skip
            constants = k["weights"].plus(TILES=kb_tiles, SPLIT=most > 0, NORM=norm, ACT=activation)
            programs = max(1, sum(splits)) * math.ceil(c / s.WC)
            _run(mix_backward.weights_kernel, programs, weighing, constants)

        if needs & codes.NEEDS_X or most:
            # ds has been used up: its memory takes dp.
            steps = _layout_of(dx.shape, dx.stride(), layout.nhwc).steps if needs & codes.NEEDS_X else (1, 1)
            constants = k["spread"].plus(DXC=steps[0], DXW=steps[1], SPLITS=most, NORM=norm, SKIP=skip)
            planes = planes if needs & codes.NEEDS_X else 0
            sums_of_parts = 3 * math.ceil(c * (m + 1) / constants["FB"]) if most else 0
            spreading = arguments.Spread(
                grad_ptr=g, dx_ptr=dx if needs & codes.NEEDS_X else None, gates_ptr=gates, dp_ptr=ds,
                du_ptr=du, squeezed_ptr=squeezed, sums_ptr=sums, **statistics, w1_ptr=w1,
                parts_ptr=parts, dwh_ptr=dwh, dbh_ptr=dbh, dww_ptr=dww, dbw_ptr=dbw, dw1_ptr=dw1,
                grad_image=g.stride(0), dx_image=dx.stride(0), rows=rows, blocks_of_rows=row_blocks,
                planes=planes, splits_h=splits[0], splits_w=splits[1], splits_1=splits[2],
            )  # fmt: skip
            _run(pool_pass.spread_kernel, planes + sums_of_parts, spreading, constants)
    return dx, *found


# Pool and gate, for the hybrid tier ------------------------------------------------------------------


def pool(x):
    n, c, h, w = x.shape
    length = h + w
    size, strides = (n, c, length, 1), (length * c, 1, c, c)
    xn, layout = _native(x)
    s, blocks, k = _constants(x, 1, layout, layout)
    # Columns wider than a tile are added up in memory, so not in a half type.
    dtype = x.dtype if s.BW >= w else accumulate_dtype(x.dtype)
    means = x.new_empty_strided(size, strides, dtype=dtype)
    if x.numel():
        with _on(x):
            pooling = arguments.Pool(
                x_ptr=xn, means_ptr=means, w1_ptr=None, partial_ptr=None, x_image=xn.stride(0)
            )
            _run(pool_pass.pool_kernel, n * blocks, pooling, k["means"])
    return means if dtype is x.dtype else _as(means, x.dtype, size, strides)


def _as(t, dtype, size, strides):
    """A copy of t in this dtype and these strides."""
    return t.new_empty_strided(size, strides, dtype=dtype).copy_(t)


def pool_backward(grad, x):
    n, c, h, w = x.shape
    if tuple(grad.shape) != (n, c, h + w, 1) or grad.device != x.device:
        raise RuntimeError("coordatt_fast: grad must be [N, C, H + W, 1] on x's device")
    checks.memory(grad, "grad")
    dx, layout = _fresh(x, _layout_of(x.shape, x.stride()))
    if x.numel():
        _, blocks, k = _constants(x, 1, layout, layout)
        with _on(x):
            grad_image, grad_channel, grad_line, _ = grad.stride()
            pooling = arguments.PoolBackward(
                grad_ptr=grad, dx_ptr=dx, grad_image=grad_image, grad_channel=grad_channel,
                grad_line=grad_line, dx_image=dx.stride(0),
            )  # fmt: skip
            _run(pool_pass.pool_backward_kernel, n * blocks, pooling, k["means_backward"])
    return dx


def gate(x, s_h, s_w, skip):
    n, c, h, w = x.shape
    steps = checks.logits(x, s_h, s_w)
    xn, layout = _native(x)
    out, out_layout = _made_of(x, layout, skip)
    if x.numel():
        _, blocks, k = _constants(x, 1, layout, out_layout)
        gates = x.new_empty(n * (h + w) * c, dtype=accumulate_dtype(x.dtype))
        with _on(x):
            gating = arguments.GateLogits(
                x_ptr=xn, out_ptr=out, gates_ptr=gates, s_h_ptr=s_h, s_w_ptr=s_w,
                x_image=xn.stride(0), out_image=out.stride(0), **steps,
            )  # fmt: skip
            _run(gate_pass.gate_logits_kernel, n * blocks, gating, k["logits"].plus(SKIP=skip))
    return out


def gate_backward(grad, x, s_h, s_w, skip):
    n, c, h, w = x.shape
    checks.like(grad, x, "grad")
    steps = checks.logits(x, s_h, s_w)
    xn, layout = _native(x)
    g, g_layout = _native(grad, layout.nhwc)
    dx, dx_layout = _fresh(x, layout)
    length, acc = h + w, accumulate_dtype(x.dtype)
    ds = x.new_empty((n, length, c), dtype=acc)
    if x.numel():
        _, blocks, k = _constants(x, 1, layout, g_layout)
        gates = x.new_empty(n * length * c, dtype=acc)
        constants = k["logits_backward"].plus(SKIP=skip, OC=dx_layout.steps[0], OW=dx_layout.steps[1])
        with _on(x):
            gating = arguments.GateBackward(
                g_ptr=g, x_ptr=xn, dx_ptr=dx, gates_ptr=gates, ds_ptr=ds, s_h_ptr=s_h, s_w_ptr=s_w,
                g_image=g.stride(0), x_image=xn.stride(0), dx_image=dx.stride(0), **steps,
            )  # fmt: skip
            _run(gate_pass.gate_backward_kernel, n * blocks, gating, constants)
    ds_h = _as(ds[:, :h].mT.unsqueeze(3), s_h.dtype, (n, c, h, 1), (h * c, 1, c, c))
    ds_w = _as(ds[:, h:].mT.unsqueeze(2), s_w.dtype, (n, c, 1, w), (w * c, 1, w * c, c))
    return dx, ds_h, ds_w
