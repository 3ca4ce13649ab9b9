"""Pool: x -> row and column means, and their part of the squeeze. Backward, spread: their gradient -> dx."""

import triton
import triton.language as tl

from .mix import contract, normalisation, product
from .mix_backward import dz_of, finish, gradient_sums
from .walk import inside, own, place, step


@triton.jit
def pool_kernel(
    x_ptr, means_ptr, w1_ptr, partial_ptr, x_image,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
    XC: tl.constexpr, XW: tl.constexpr, GC: tl.constexpr, GL: tl.constexpr,
    BC: tl.constexpr, TC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    LB: tl.constexpr, KC: tl.constexpr, MP: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One read of x. means: small tensors; partial [N * L, blocks, M], or None for means alone."""
    n, block, c0 = own(tl.program_id(0), C, BC)
    x_ptr += n * x_image + c0.to(tl.int64) * XC
    means_ptr += n * (C * (H + W)) + c0 * GC
    for t in range(0, BC, TC):
        c = t + tl.arange(0, TC)
        there = (c0 + c < C) & (c < BC)
        for w0 in range(0, W, BW):
            w = w0 + tl.arange(0, BW)
            columns = tl.zeros([TC, BH, BW], ACC)
            for h0 in range(0, H, BH):
                h = h0 + tl.arange(0, BH)
                mask = there[:, None, None] & (h < H)[None, :, None] & (w < W)[None, None, :]
                pixel = (h * (W * XW))[None, :, None] + (w * XW)[None, None, :]
                if WIDE:
                    pixel = (h.to(tl.int64) * (W * XW))[None, :, None] + (w * XW)[None, None, :]
                v = tl.load(x_ptr + (c * XC)[:, None, None] + pixel, mask=mask, other=0.0).to(ACC)
                columns += v
                rows = tl.sum(v, 2) / W
                at = means_ptr + (c * GC)[:, None] + (h * GL)[None, :]
                live = there[:, None] & (h < H)[None, :]
                if BW < W:
                    rows += tl.load(at, mask=live & (w0 > 0), other=0.0).to(ACC)
                tl.store(at, rows, mask=live)
            at = means_ptr + (c * GC)[:, None] + ((H + w) * GL)[None, :]
            tl.store(at, tl.sum(columns, 1) / H, mask=there[:, None] & (w < W)[None, :])
            if BW < W:
                tl.debug_barrier()  # the next columns add to these rows
    if partial_ptr is not None:
        tl.debug_barrier()
        blocks: tl.constexpr = (C + BC - 1) // BC
        partial_ptr += n * ((H + W) * blocks * M) + block * M
        w1_ptr += c0
        contract(
            means_ptr, w1_ptr, partial_ptr, c0, 0, H + W, 1, C, blocks * M, C, M, GC, GL, BC, LB, KC, MP, ACC
        )


@triton.jit
def spread_kernel(
    grad_ptr, dx_ptr, gates_ptr, dp_ptr, du_ptr, squeezed_ptr, sums_ptr,
    mean_ptr, var_ptr, gamma_ptr, w1_ptr, eps: tl.float64,
    parts_ptr, dwh_ptr, dbh_ptr, dww_ptr, dbw_ptr, dw1_ptr,
    grad_image, dx_image, rows, blocks_of_rows, planes, splits_h, splits_w, splits_1,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
    GXC: tl.constexpr, GXW: tl.constexpr, DXC: tl.constexpr, DXW: tl.constexpr,
    GC: tl.constexpr, GL: tl.constexpr, BC: tl.constexpr, BLOCK: tl.constexpr,
    LB: tl.constexpr, KC: tl.constexpr, MP: tl.constexpr, NBP: tl.constexpr, SPLITS: tl.constexpr,
    FB: tl.constexpr, NORM: tl.constexpr, SKIP: tl.constexpr, NHWC: tl.constexpr, WHOLE: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = grad * gates + what comes back through the pools; reads grad once.

    Programs from planes on, where SPLITS is not 0, add up the parts of the weights' gradients instead.
    """
    pid = tl.program_id(0)
    if pid >= planes:
        if SPLITS > 0:
            finish(
                pid - planes, parts_ptr, dwh_ptr, dbh_ptr, dww_ptr, dbw_ptr, dw1_ptr,
                splits_h, splits_w, splits_1, C, M, SPLITS, FB, ACC,
            )  # fmt: skip
    elif dx_ptr is not None:
        # Backwards: what reduce read last is still in cache.
        n, _, c0 = own(planes - 1 - pid, C, BC)
        small = n * (C * (H + W)) + c0 * GC
        gates_ptr += small
        dp_ptr += small
        m = tl.arange(0, MP)
        mean, inv, scale, _ = normalisation(mean_ptr, var_ptr, gamma_ptr, None, eps, M, MP, NORM, ACC)
        sum_du, sum_dev = gradient_sums(sums_ptr, blocks_of_rows, M, MP, NBP, ACC)
        row0 = n * ((H + W) * M)
        for l0 in range(0, H + W, LB):
            line = l0 + tl.arange(0, LB)
            mask = (line < H + W)[:, None] & (m < M)[None, :]
            at = row0 + line[:, None] * M + m[None, :]
            du = tl.load(du_ptr + at, mask=mask, other=0.0)
            z = tl.load(squeezed_ptr + at, mask=mask, other=0.0)
            dz = tl.where(mask, dz_of(du, z, mean, inv, scale, sum_du, sum_dev, rows, NORM), 0.0)
            share = tl.where(line < H, W, H).to(ACC)
            for k0 in range(0, BC, KC):
                k = k0 + tl.arange(0, KC)
                there = (k < BC) & (c0 + k < C)
                w1 = tl.load(
                    w1_ptr + (c0 + k)[None, :] + (m * C)[:, None],
                    mask=(m < M)[:, None] & there[None, :], other=0.0,
                ).to(ACC)  # fmt: skip
                dp = product(dz, w1, tl.zeros([LB, KC], ACC)) / share[:, None]
                tl.store(
                    dp_ptr + (k * GC)[None, :] + (line * GL)[:, None], dp,
                    mask=(line < H + W)[:, None] & there[None, :],
                )  # fmt: skip
        tl.debug_barrier()
        grad_ptr += n * grad_image + c0.to(tl.int64) * GXC
        dx_ptr += n * dx_image + c0.to(tl.int64) * DXC
        for i0 in range(0, BC * H * W, BLOCK):
            i, c, pixel = place(i0, H, W, BC, BLOCK, NHWC)
            mask = inside(i, c, pixel, c0, C, H, W, BC, NHWC, WHOLE)
            at = step(i, c, pixel, GXC, GXW, H * W, NHWC, WIDE)
            g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
            at_h = c * GC + (pixel // W) * GL
            at_w = c * GC + (H + pixel % W) * GL
            v = g * tl.load(gates_ptr + at_h, mask=mask, other=0.0)
            v = v * tl.load(gates_ptr + at_w, mask=mask, other=0.0)
            if SKIP:
                v += g
            v += tl.load(dp_ptr + at_h, mask=mask, other=0.0) + tl.load(dp_ptr + at_w, mask=mask, other=0.0)
            tl.store(dx_ptr + step(i, c, pixel, DXC, DXW, H * W, NHWC, WIDE), v, mask=mask)


@triton.jit
def pool_backward_kernel(
    grad_ptr, dx_ptr, grad_image, grad_channel, grad_line, dx_image,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, DXC: tl.constexpr, DXW: tl.constexpr,
    BC: tl.constexpr, BLOCK: tl.constexpr, NHWC: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dx [N, C, H, W] from the gradient of the means [N, C, L], of any strides."""
    n, _, c0 = own(tl.program_id(0), C, BC)
    grad_ptr += n * grad_image + c0.to(tl.int64) * grad_channel
    dx_ptr += n * dx_image + c0.to(tl.int64) * DXC
    for i0 in range(0, BC * H * W, BLOCK):
        i, c, pixel = place(i0, H, W, BC, BLOCK, NHWC)
        mask = inside(i, c, pixel, c0, C, H, W, BC, NHWC, WHOLE)
        at = c.to(tl.int64) * grad_channel
        g_h = tl.load(grad_ptr + at + (pixel // W) * grad_line, mask=mask, other=0.0).to(ACC)
        g_w = tl.load(grad_ptr + at + (H + pixel % W) * grad_line, mask=mask, other=0.0).to(ACC)
        tl.store(dx_ptr + step(i, c, pixel, DXC, DXW, H * W, NHWC, WIDE), g_h / W + g_w / H, mask=mask)
