"""Gate: out = x * a_w * a_h (+ x), the gates made on the way. Backward, reduce: grad, x -> dlogits."""

import triton
import triton.language as tl

from .mix import (
    BATCH,
    GIVEN,
    activate,
    add_partials,
    affine,
    batch_statistics,
    bias_of,
    contract,
    expand,
    move_statistics,
    normalisation,
    sigmoid,
)
from .walk import inside, own, place, step


@triton.jit
def apply_gates(
    x_ptr, out_ptr, gates_ptr, c0,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, XC: tl.constexpr, XW: tl.constexpr,
    OC: tl.constexpr, OW: tl.constexpr, GC: tl.constexpr, GL: tl.constexpr, BC: tl.constexpr,
    BLOCK: tl.constexpr, SKIP: tl.constexpr, NHWC: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One read of the block's planes, one write; pointers are at c0."""
    for i0 in range(0, BC * H * W, BLOCK):
        i, c, pixel = place(i0, H, W, BC, BLOCK, NHWC)
        mask = inside(i, c, pixel, c0, C, H, W, BC, NHWC, WHOLE)
        x = tl.load(x_ptr + step(i, c, pixel, XC, XW, H * W, NHWC, WIDE), mask=mask, other=0.0).to(ACC)
        v = x * tl.load(gates_ptr + c * GC + (H + pixel % W) * GL, mask=mask, other=0.0)
        v = v * tl.load(gates_ptr + c * GC + (pixel // W) * GL, mask=mask, other=0.0)
        if SKIP:
            v += x
        tl.store(out_ptr + step(i, c, pixel, OC, OW, H * W, NHWC, WIDE), v, mask=mask)


@triton.jit
def open_lines(
    z_ptr, bias, mean, scale, shift, w_ptr, b_ptr, gates_ptr, c0, first: tl.constexpr, count: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, GC: tl.constexpr, GL: tl.constexpr, BC: tl.constexpr, LB: tl.constexpr,
    KC: tl.constexpr, MP: tl.constexpr, BLOCKS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gates of lines first to first + count from z's parts; z_ptr is at the image."""
    m = tl.arange(0, MP)
    for l0 in range(first, first + count, LB):
        line = l0 + tl.arange(0, LB)
        on = line < first + count
        z = add_partials(z_ptr, line, on, BLOCKS, M, LB, MP, ACC) + bias[None, :]
        y = activate((z - mean[None, :]) * scale[None, :] + shift[None, :], ACT)
        y = tl.where(on[:, None] & (m < M)[None, :], y, 0.0)
        expand(y, line, on, w_ptr, b_ptr, gates_ptr, c0, C, M, GC, GL, BC, LB, KC, MP, ACC)


@triton.jit
def gate_kernel(
    x_ptr, out_ptr, gates_ptr, z_ptr,
    b1_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps: tl.float64, wh_ptr, bh_ptr, ww_ptr, bw_ptr,
    x_image, out_image, rows, stats_ptr, saved_mean_ptr, saved_var_ptr, blocks_of_rows,
    running_mean_ptr, running_var_ptr, tracked_ptr, momentum: tl.float64, mean_step, var_step,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
    XC: tl.constexpr, XW: tl.constexpr, OC: tl.constexpr, OW: tl.constexpr, GC: tl.constexpr,
    GL: tl.constexpr,
    BC: tl.constexpr, BLOCK: tl.constexpr, LB: tl.constexpr, KC: tl.constexpr, MP: tl.constexpr,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr, NBP: tl.constexpr,
    TRAIN: tl.constexpr, UPDATE: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, SKIP: tl.constexpr,
    NHWC: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gates of a block of channels, into gates (small tensors), then its planes.

    z: pool's parts [N * L, BLOCKS, M], or with TRAIN stats_kernel's squeezed [N * L, M]. Batch
    statistics come from its blocks of SIZE rows. With TRAIN the first program writes mean and variance.
    """
    pid = tl.program_id(0)
    # Backwards: what pool read last is still in cache.
    n, _, c0 = own(tl.num_programs(0) - 1 - pid, C, BC)
    gates_ptr += n * (C * (H + W)) + c0 * GC
    m = tl.arange(0, MP)
    if NORM == BATCH:
        mean, var = batch_statistics(stats_ptr, rows, blocks_of_rows, SIZE, M, MP, NBP, ACC)
        mean, _, scale, shift = affine(mean, var, gamma_ptr, beta_ptr, eps, M, MP, ACC)
        if pid == 0:
            tl.store(saved_mean_ptr + m, mean, mask=m < M)
            tl.store(saved_var_ptr + m, var, mask=m < M)
            if UPDATE > 0:
                move_statistics(
                    running_mean_ptr, running_var_ptr, tracked_ptr, mean, var, rows, momentum,
                    mean_step, var_step, M, MP, UPDATE > 1, ACC,
                )  # fmt: skip
    else:
        mean, _, scale, shift = normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, M, MP, NORM, ACC)
        if TRAIN:
            if pid == 0:
                var = tl.zeros([MP], ACC) + 1.0
                if NORM == GIVEN:
                    var = tl.load(var_ptr + m, mask=m < M, other=1.0).to(ACC)
                tl.store(saved_mean_ptr + m, mean, mask=m < M)
                tl.store(saved_var_ptr + m, var, mask=m < M)
    bias = bias_of(None if TRAIN else b1_ptr, M, MP, ACC)
    z_ptr += n * ((H + W) * BLOCKS * M)
    open_lines(
        z_ptr, bias, mean, scale, shift, wh_ptr, bh_ptr, gates_ptr, c0, 0, H,
        C, M, GC, GL, BC, LB, KC, MP, BLOCKS, ACT, ACC,
    )  # fmt: skip
    open_lines(
        z_ptr, bias, mean, scale, shift, ww_ptr, bw_ptr, gates_ptr, c0, H, W,
        C, M, GC, GL, BC, LB, KC, MP, BLOCKS, ACT, ACC,
    )  # fmt: skip
    tl.debug_barrier()
    x_ptr += n * x_image + c0.to(tl.int64) * XC
    out_ptr += n * out_image + c0.to(tl.int64) * OC
    apply_gates(
        x_ptr, out_ptr, gates_ptr, c0, C, H, W, XC, XW, OC, OW, GC, GL, BC, BLOCK, SKIP, NHWC, WHOLE, WIDE,
        ACC,
    )  # fmt: skip


@triton.jit
def open_gates(
    s_h_ptr, s_w_ptr, gates_ptr, n, c0,
    h_image, h_channel, h_line, w_image, w_channel, w_line,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, GC: tl.constexpr, GL: tl.constexpr,
    BC: tl.constexpr, LB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """gates from logits of any strides; gates_ptr is at n and c0, the logits' are not."""
    c = tl.arange(0, BC)
    s_h_ptr += n * h_image
    s_w_ptr += n * w_image
    for l0 in range(0, H + W, LB):
        line = l0 + tl.arange(0, LB)
        there = (c0 + c < C)[None, :]
        on_h = (line < H)[:, None] & there
        on_w = (line >= H)[:, None] & (line < H + W)[:, None] & there
        channel = (c0 + c).to(tl.int64)[None, :]
        s_h = tl.load(s_h_ptr + channel * h_channel + line[:, None] * h_line, mask=on_h, other=0.0).to(ACC)
        at = channel * w_channel + (line - H)[:, None] * w_line
        s_w = tl.load(s_w_ptr + at, mask=on_w, other=0.0).to(ACC)
        gates = sigmoid(tl.where(on_h, s_h, s_w))
        tl.store(gates_ptr + (line * GL)[:, None] + (c * GC)[None, :], gates, mask=on_h | on_w)


@triton.jit
def gate_logits_kernel(
    x_ptr, out_ptr, gates_ptr, s_h_ptr, s_w_ptr, x_image, out_image,
    h_image, h_channel, h_line, w_image, w_channel, w_line,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    XC: tl.constexpr, XW: tl.constexpr, OC: tl.constexpr, OW: tl.constexpr, GC: tl.constexpr,
    GL: tl.constexpr,
    BC: tl.constexpr, BLOCK: tl.constexpr, LB: tl.constexpr, SKIP: tl.constexpr, NHWC: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The hybrid tier's gate: logits s_h [N, C, H], s_w [N, C, W] are given."""
    n, _, c0 = own(tl.num_programs(0) - 1 - tl.program_id(0), C, BC)
    gates_ptr += n * (C * (H + W)) + c0 * GC
    open_gates(
        s_h_ptr, s_w_ptr, gates_ptr, n, c0, h_image, h_channel, h_line, w_image, w_channel, w_line,
        C, H, W, GC, GL, BC, LB, ACC,
    )  # fmt: skip
    tl.debug_barrier()
    x_ptr += n * x_image + c0.to(tl.int64) * XC
    out_ptr += n * out_image + c0.to(tl.int64) * OC
    apply_gates(
        x_ptr, out_ptr, gates_ptr, c0, C, H, W, XC, XW, OC, OW, GC, GL, BC, BLOCK, SKIP, NHWC, WHOLE, WIDE,
        ACC,
    )  # fmt: skip


@triton.jit
def reduce_planes(
    g_ptr, x_ptr, gates_ptr, ds_ptr, c0,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    GXC: tl.constexpr, GXW: tl.constexpr, XC: tl.constexpr, XW: tl.constexpr, GC: tl.constexpr,
    GL: tl.constexpr,
    BC: tl.constexpr, TC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """ds (small tensors) of a block of channels, from one read of grad and x; pointers are at c0."""
    for t in range(0, BC, TC):
        c = t + tl.arange(0, TC)
        there = (c0 + c < C) & (c < BC)
        for w0 in range(0, W, BW):
            w = w0 + tl.arange(0, BW)
            live_w = there[:, None] & (w < W)[None, :]
            at_w = (c * GC)[:, None] + ((H + w) * GL)[None, :]
            a_w = tl.load(gates_ptr + at_w, mask=live_w, other=0.0)
            columns = tl.zeros([TC, BH, BW], ACC)
            for h0 in range(0, H, BH):
                h = h0 + tl.arange(0, BH)
                live_h = there[:, None] & (h < H)[None, :]
                at_h = (c * GC)[:, None] + (h * GL)[None, :]
                a_h = tl.load(gates_ptr + at_h, mask=live_h, other=0.0)
                mask = there[:, None, None] & (h < H)[None, :, None] & (w < W)[None, None, :]
                if WIDE:
                    h = h.to(tl.int64)
                at = (c * GXC)[:, None, None] + (h * (W * GXW))[None, :, None] + (w * GXW)[None, None, :]
                g = tl.load(g_ptr + at, mask=mask, other=0.0).to(ACC)
                at = (c * XC)[:, None, None] + (h * (W * XW))[None, :, None] + (w * XW)[None, None, :]
                gx = g * tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
                columns += gx * a_h[:, :, None]
                rows = tl.sum(gx * a_w[:, None, :], 2) * (a_h * (1.0 - a_h))
                if BW < W:
                    rows += tl.load(ds_ptr + at_h, mask=live_h & (w0 > 0), other=0.0)
                tl.store(ds_ptr + at_h, rows, mask=live_h)
            tl.store(ds_ptr + at_w, tl.sum(columns, 1) * (a_w * (1.0 - a_w)), mask=live_w)
            if BW < W:
                tl.debug_barrier()  # the next columns add to these rows


@triton.jit
def reduce_kernel(
    g_ptr, x_ptr, gates_ptr, ds_ptr, wh_ptr, ww_ptr, partial_ptr, g_image, x_image,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
    GXC: tl.constexpr, GXW: tl.constexpr, XC: tl.constexpr, XW: tl.constexpr, GC: tl.constexpr,
    GL: tl.constexpr,
    BC: tl.constexpr, TC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    LB: tl.constexpr, KC: tl.constexpr, MP: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ds of the logits, and this block's part of dy: partial [N * L, blocks, M]."""
    n, block, c0 = own(tl.program_id(0), C, BC)
    small = n * (C * (H + W)) + c0 * GC
    gates_ptr += small
    ds_ptr += small
    g_ptr += n * g_image + c0.to(tl.int64) * GXC
    x_ptr += n * x_image + c0.to(tl.int64) * XC
    reduce_planes(
        g_ptr, x_ptr, gates_ptr, ds_ptr, c0, C, H, W, GXC, GXW, XC, XW, GC, GL, BC, TC, BH, BW, WIDE, ACC
    )
    tl.debug_barrier()
    blocks: tl.constexpr = (C + BC - 1) // BC
    partial_ptr += n * ((H + W) * blocks * M) + block * M
    wh_ptr += c0 * M
    ww_ptr += c0 * M
    contract(ds_ptr, wh_ptr, partial_ptr, c0, 0, H, M, 1, blocks * M, C, M, GC, GL, BC, LB, KC, MP, ACC)
    contract(ds_ptr, ww_ptr, partial_ptr, c0, H, W, M, 1, blocks * M, C, M, GC, GL, BC, LB, KC, MP, ACC)


@triton.jit
def gate_backward_kernel(
    g_ptr, x_ptr, dx_ptr, gates_ptr, ds_ptr, s_h_ptr, s_w_ptr, g_image, x_image, dx_image,
    h_image, h_channel, h_line, w_image, w_channel, w_line,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    GXC: tl.constexpr, GXW: tl.constexpr, XC: tl.constexpr, XW: tl.constexpr, OC: tl.constexpr,
    OW: tl.constexpr,
    GC: tl.constexpr, GL: tl.constexpr, BC: tl.constexpr, TC: tl.constexpr, BH: tl.constexpr,
    BW: tl.constexpr,
    BLOCK: tl.constexpr, LB: tl.constexpr, SKIP: tl.constexpr, NHWC: tl.constexpr, WHOLE: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The hybrid tier's backward: ds of the logits, and dx, which is the gate applied to grad."""
    n, _, c0 = own(tl.program_id(0), C, BC)
    small = n * (C * (H + W)) + c0 * GC
    gates_ptr += small
    open_gates(
        s_h_ptr, s_w_ptr, gates_ptr, n, c0, h_image, h_channel, h_line, w_image, w_channel, w_line,
        C, H, W, GC, GL, BC, LB, ACC,
    )  # fmt: skip
    tl.debug_barrier()
    g_ptr += n * g_image + c0.to(tl.int64) * GXC
    x_ptr += n * x_image + c0.to(tl.int64) * XC
    dx_ptr += n * dx_image + c0.to(tl.int64) * OC
    reduce_planes(
        g_ptr, x_ptr, gates_ptr, ds_ptr + small, c0,
        C, H, W, GXC, GXW, XC, XW, GC, GL, BC, TC, BH, BW, WIDE, ACC,
    )  # fmt: skip
    apply_gates(
        g_ptr, dx_ptr, gates_ptr, c0, C, H, W, GXC, GXW, OC, OW, GC, GL, BC, BLOCK, SKIP, NHWC, WHOLE, WIDE,
        ACC,
    )  # fmt: skip
