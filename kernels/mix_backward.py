"""Mix, backward: from the gradient of y to that of the squeezed rows, and the parameters' gradients."""

import triton
import triton.language as tl

from .mix import BATCH, activate, activate_backward, add_partials, normalisation, product


@triton.jit
def mix_backward_kernel(
    partial_ptr, squeezed_ptr, du_ptr, sums_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps: tl.float64,
    rows, M: tl.constexpr, BLOCKS: tl.constexpr, LB: tl.constexpr, TILES: tl.constexpr, MP: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """du [rows, M] from the parts of dy, and sums [blocks, 2, M]: of du and du * (z - mean) over TILES * LB
    rows."""
    block = tl.program_id(0)
    m = tl.arange(0, MP)
    first = block.to(tl.int64) * (TILES * LB)
    partial_ptr += first * (BLOCKS * M)
    squeezed_ptr += first * M
    du_ptr += first * M
    left = rows - block * (TILES * LB)
    mean, _, scale, shift = normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, M, MP, NORM, ACC)
    # Sums stay in the tile's shape within the loop: triton 3.6 cannot compile some reductions in loops.
    sum_du = tl.zeros([LB, MP], ACC)
    sum_dev = tl.zeros([LB, MP], ACC)
    for tile in range(TILES):
        line = tile * LB + tl.arange(0, LB)
        on = line < left
        mask = on[:, None] & (m < M)[None, :]
        at = line[:, None] * M + m[None, :]
        dy = add_partials(partial_ptr, line, on, BLOCKS, M, LB, MP, ACC)
        off = tl.load(squeezed_ptr + at, mask=mask, other=0.0) - mean[None, :]
        du = activate_backward(off * scale[None, :] + shift[None, :], dy, ACT)
        du = tl.where(mask, du, 0.0)
        tl.store(du_ptr + at, du, mask=mask)
        sum_du += du
        sum_dev += tl.where(mask, du * off, 0.0)
    at = sums_ptr + block * (2 * M) + m
    tl.store(at, tl.sum(sum_du, 0), mask=m < M)
    tl.store(at + M, tl.sum(sum_dev, 0), mask=m < M)


@triton.jit
def gradient_sums(
    sums_ptr, blocks, M: tl.constexpr, MP: tl.constexpr, NBP: tl.constexpr, ACC: tl.constexpr
):
    """mix_backward_kernel's sums over all rows, [MP] each."""
    m = tl.arange(0, MP)
    b = tl.arange(0, NBP)
    mask = (b < blocks)[:, None] & (m < M)[None, :]
    at = sums_ptr + (b * (2 * M))[:, None] + m[None, :]
    return tl.sum(tl.load(at, mask=mask, other=0.0), 0), tl.sum(tl.load(at + M, mask=mask, other=0.0), 0)


@triton.jit
def dz_of(du, z, mean, inv, scale, sum_du, sum_dev, rows, NORM: tl.constexpr):
    """The gradient of the squeezed rows z [.., MP]; batch statistics move with them."""
    dz = du
    if NORM == BATCH:
        count = tl.zeros_like(sum_du) + rows
        along = inv * inv * (sum_dev / count)
        dz = du - (sum_du / count)[None, :] - (z - mean[None, :]) * along[None, :]
    return dz * scale[None, :]


@triton.jit
def weights_kernel(
    ds_ptr, means_ptr, du_ptr, squeezed_ptr, sums_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    eps: tl.float64, parts_ptr, dwh_ptr, dbh_ptr, dww_ptr, dbw_ptr, dw1_ptr, db1_ptr, dgamma_ptr, dbeta_ptr,
    images, rows, blocks_of_rows, splits_h, splits_w, splits_1,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, M: tl.constexpr, GC: tl.constexpr, GL: tl.constexpr,
    BC: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, MP: tl.constexpr, NBP: tl.constexpr,
    SPLIT: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the convolutions' weights and the expanding ones' biases: a product over KB * TILES rows
    of the middle per program. With SPLIT parts [splits, C, M + 1] for finish(), else the results.

    The first program writes the gradients of bn's parameters and of conv1's bias.
    """
    pid = tl.program_id(0)
    groups: tl.constexpr = (C + BC - 1) // BC
    split = pid // groups
    c = (pid % groups) * BC + tl.arange(0, BC)
    m = tl.arange(0, MP)
    mean, inv, scale, shift = normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, M, MP, NORM, ACC)
    sum_du, sum_dev = gradient_sums(sums_ptr, blocks_of_rows, M, MP, NBP, ACC)
    if pid == 0:
        if dgamma_ptr is not None:
            tl.store(dgamma_ptr + m, sum_dev * inv, mask=m < M)
        if dbeta_ptr is not None:
            tl.store(dbeta_ptr + m, sum_du, mask=m < M)
        if db1_ptr is not None:
            if NORM == BATCH:  # the mean takes any shift out again: exactly zero
                tl.store(db1_ptr + m, tl.zeros([MP], ACC), mask=m < M)
            else:
                tl.store(db1_ptr + m, sum_du * scale, mask=m < M)
    if split < splits_h + splits_w + splits_1:
        # What is multiplied: 0 ds and y of rows of maps, 1 of columns, 2 means and dz of both.
        kind = tl.where(split < splits_h, 0, tl.where(split < splits_h + splits_w, 1, 2))
        span = tl.where(kind == 0, H, tl.where(kind == 1, W, H + W))
        start = tl.where(kind == 1, H, 0)
        part = split - tl.where(kind == 0, 0, tl.where(kind == 1, splits_h, splits_h + splits_w))
        left_ptr = ds_ptr
        if kind == 2:
            left_ptr = means_ptr
        acc = tl.zeros([BC, MP], ACC)
        lefts = tl.zeros([BC, KB], ACC)
        for tile in range(TILES):
            q = (part * TILES + tile) * KB + tl.arange(0, KB)
            on = q < images * span
            n = q // span
            line = start + q - n * span
            at = n.to(tl.int64)[None, :] * (C * (H + W)) + (line * GL)[None, :] + (c * GC)[:, None]
            left = tl.load(left_ptr + at, mask=(c < C)[:, None] & on[None, :], other=0.0)
            at = (n.to(tl.int64) * (H + W) + line)[:, None] * M + m[None, :]
            mask = on[:, None] & (m < M)[None, :]
            z = tl.load(squeezed_ptr + at, mask=mask, other=0.0)
            du = tl.load(du_ptr + at, mask=mask, other=0.0)
            y = activate((z - mean[None, :]) * scale[None, :] + shift[None, :], ACT)
            dz = dz_of(du, z, mean, inv, scale, sum_du, sum_dev, rows, NORM)
            right = tl.where(mask, tl.where(kind == 2, dz, y), 0.0)
            acc = product(left, right, acc)
            lefts += left
        bias = tl.sum(lefts, 1)
        if SPLIT:
            at = parts_ptr + split.to(tl.int64) * (C * (M + 1)) + c * (M + 1)
            tl.store(at[:, None] + m[None, :], acc, mask=(c < C)[:, None] & (m < M)[None, :])
            tl.store(at + M, bias, mask=c < C)
        else:
            mask = (c < C)[:, None] & (m < M)[None, :]
            out = c[:, None] * M + m[None, :]
            if kind == 0:
                if dwh_ptr is not None:
                    tl.store(dwh_ptr + out, acc, mask=mask)
                if dbh_ptr is not None:
                    tl.store(dbh_ptr + c, bias, mask=c < C)
            elif kind == 1:
                if dww_ptr is not None:
                    tl.store(dww_ptr + out, acc, mask=mask)
                if dbw_ptr is not None:
                    tl.store(dbw_ptr + c, bias, mask=c < C)
            else:
                if dw1_ptr is not None:
                    tl.store(dw1_ptr + m[None, :] * C + c[:, None], acc, mask=mask)


@triton.jit
def finish(
    index, parts_ptr, dwh_ptr, dbh_ptr, dww_ptr, dbw_ptr, dw1_ptr, splits_h, splits_w, splits_1,
    C: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr, FB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds up FB numbers of one kind of weights_kernel's parts, in order. SPLITS bounds the number."""
    size: tl.constexpr = C * (M + 1)
    groups: tl.constexpr = (size + FB - 1) // FB
    kind = index // groups
    i = (index % groups) * FB + tl.arange(0, FB)
    start = tl.where(kind == 0, 0, tl.where(kind == 1, splits_h, splits_h + splits_w))
    splits = tl.where(kind == 0, splits_h, tl.where(kind == 1, splits_w, splits_1))
    total = tl.zeros([FB], ACC)
    for s in range(SPLITS):
        at = parts_ptr + (start + s).to(tl.int64) * size + i
        total += tl.load(at, mask=i < tl.where(splits > s, size, 0), other=0.0)
    c = i // (M + 1)
    m = i % (M + 1)
    there = i < tl.where(splits > 0, size, 0)
    weight = there & (m < M)
    bias = there & (m == M)
    if kind == 0:
        if dwh_ptr is not None:
            tl.store(dwh_ptr + c * M + m, total, mask=weight)
        if dbh_ptr is not None:
            tl.store(dbh_ptr + c, total, mask=bias)
    elif kind == 1:
        if dww_ptr is not None:
            tl.store(dww_ptr + c * M + m, total, mask=weight)
        if dbw_ptr is not None:
            tl.store(dbw_ptr + c, total, mask=bias)
    else:
        if dw1_ptr is not None:
            tl.store(dw1_ptr + m * C + c, total, mask=weight)
