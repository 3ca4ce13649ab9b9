"""Mix: the channel-mixing middle. Means -> squeezed -> gates, and dlogits -> the parameters' gradients.

Rows of the middle are [N * L, M], image after image. The big kernels (pool, gate) do the products with
their own channels; what spans channels or images has kernels here.
"""

import triton
import triton.language as tl

from coordatt_fast.codes import NORM_BATCH, NORM_GIVEN, NORM_NONE

NONE, GIVEN, BATCH = tl.constexpr(NORM_NONE), tl.constexpr(NORM_GIVEN), tl.constexpr(NORM_BATCH)
# In the order of reference.ACTIVATIONS.
HARD_SWISH, SILU, RELU, RELU6 = map(tl.constexpr, range(4))


@triton.jit
def product(a, b, acc):
    """acc + a b, in the accumulate dtype and never in tf32."""
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def contract(
    small_ptr, w_ptr, out_ptr, c0, first: tl.constexpr, count: tl.constexpr,
    WC: tl.constexpr, WM: tl.constexpr, OUT: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    GC: tl.constexpr, GL: tl.constexpr, BC: tl.constexpr, LB: tl.constexpr, KC: tl.constexpr,
    MP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A block of channels' part of lines first to first + count of [L, C] x [C, M]; pointers are at c0."""
    m = tl.arange(0, MP)
    for l0 in range(first, first + count, LB):
        line = l0 + tl.arange(0, LB)
        on = line < first + count
        acc = tl.zeros([LB, MP], ACC)
        for k0 in range(0, BC, KC):
            k = k0 + tl.arange(0, KC)
            there = (k < BC) & (c0 + k < C)
            at = (line * GL)[:, None] + (k * GC)[None, :]
            a = tl.load(small_ptr + at, mask=on[:, None] & there[None, :], other=0.0)
            at = (k * WC)[:, None] + (m * WM)[None, :]
            b = tl.load(w_ptr + at, mask=there[:, None] & (m < M)[None, :], other=0.0).to(ACC)
            acc = product(a, b, acc)
        tl.store(out_ptr + (line * OUT)[:, None] + m[None, :], acc, mask=on[:, None] & (m < M)[None, :])


@triton.jit
def expand(
    y, line, on, w_ptr, b_ptr, gates_ptr, c0, C: tl.constexpr, M: tl.constexpr,
    GC: tl.constexpr, GL: tl.constexpr, BC: tl.constexpr, LB: tl.constexpr, KC: tl.constexpr,
    MP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gates of these lines and this block's channels from y [LB, MP]; gates_ptr is at c0."""
    m = tl.arange(0, MP)
    for k0 in range(0, BC, KC):
        k = k0 + tl.arange(0, KC)
        there = (k < BC) & (c0 + k < C)
        at = ((c0 + k) * M)[None, :] + m[:, None]
        w = tl.load(w_ptr + at, mask=(m < M)[:, None] & there[None, :], other=0.0).to(ACC)
        s = product(y, w, tl.zeros([LB, KC], ACC))
        if b_ptr is not None:
            s += tl.load(b_ptr + c0 + k, mask=there, other=0.0).to(ACC)[None, :]
        at = (line * GL)[:, None] + (k * GC)[None, :]
        tl.store(gates_ptr + at, sigmoid(s), mask=on[:, None] & there[None, :])


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def clamp6(v):
    """min(max(v, 0), 6), NaN kept."""
    v = tl.where(v < 0.0, 0.0, v)
    return tl.where(v > 6.0, 6.0, v)


@triton.jit
def activate(u, ACT: tl.constexpr):
    """NaN kept, and infinite u gives what PyTorch's kernels give."""
    if ACT == HARD_SWISH:
        y = u * (clamp6(u + 3.0) / 6.0)
    elif ACT == SILU:
        y = u * sigmoid(u)
    elif ACT == RELU:
        y = tl.where(u < 0.0, 0.0, u)
    else:
        tl.static_assert(ACT == RELU6, "no such activation")
        y = clamp6(u)
    return y


@triton.jit
def activate_backward(u, dy, ACT: tl.constexpr):
    """dy times the slope. Where that is zero by a comparison the result is selected, as in PyTorch's kernels:
    NaN or infinity times zero would be NaN."""
    if ACT == HARD_SWISH:
        slope = tl.where(u >= 3.0, 0.0, u / 6.0)
        du = dy * (slope + clamp6(u + 3.0) / 6.0)
        du = tl.where(u <= -3.0, 0.0, du)
    elif ACT == SILU:
        s = sigmoid(u)
        du = dy * (s * (1.0 + u * (1.0 - s)))
    elif ACT == RELU:
        du = tl.where(u <= 0.0, 0.0, dy)
    else:
        tl.static_assert(ACT == RELU6, "no such activation")
        du = tl.where(u <= 0.0, 0.0, dy)
        du = tl.where(u >= 6.0, 0.0, du)
    return du


@triton.jit
def affine(mean, var, gamma_ptr, beta_ptr, eps, M: tl.constexpr, MP: tl.constexpr, ACC: tl.constexpr):
    """mean, 1 / std, scale and shift of u = (z - mean) * scale + shift."""
    m = tl.arange(0, MP)
    inv = 1.0 / tl.sqrt(var + tl.full([MP], eps, ACC))
    scale = inv
    shift = tl.zeros([MP], ACC)
    if gamma_ptr is not None:
        scale = inv * tl.load(gamma_ptr + m, mask=m < M, other=0.0).to(ACC)
    if beta_ptr is not None:
        shift = tl.load(beta_ptr + m, mask=m < M, other=0.0).to(ACC)
    return mean, inv, scale, shift


@triton.jit
def normalisation(
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
    M: tl.constexpr, MP: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """affine() from given statistics; the identity where NORM is NONE."""
    m = tl.arange(0, MP)
    mean = tl.zeros([MP], ACC)
    inv = mean + 1.0
    scale = inv
    shift = mean
    if NORM != NONE:
        mean = tl.load(mean_ptr + m, mask=m < M, other=0.0).to(ACC)
        var = tl.load(var_ptr + m, mask=m < M, other=1.0).to(ACC)
        mean, inv, scale, shift = affine(mean, var, gamma_ptr, beta_ptr, eps, M, MP, ACC)
    return mean, inv, scale, shift


@triton.jit
def add_partials(
    partial_ptr, line, on, BLOCKS: tl.constexpr, M: tl.constexpr, LB: tl.constexpr, MP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """[LB, MP] sums over the blocks of channels of partial [lines, BLOCKS, M], in order."""
    m = tl.arange(0, MP)
    mask = on[:, None] & (m < M)[None, :]
    total = tl.zeros([LB, MP], ACC)
    # Unrolled, so that the loads are under way together: one after the other each would wait for the L2.
    for k in tl.range(0, BLOCKS, loop_unroll_factor=8):
        at = (line * (BLOCKS * M))[:, None] + (k * M + m)[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    return total


@triton.jit
def bias_of(b_ptr, M: tl.constexpr, MP: tl.constexpr, ACC: tl.constexpr):
    m = tl.arange(0, MP)
    bias = tl.zeros([MP], ACC)
    if b_ptr is not None:
        bias = tl.load(b_ptr + m, mask=m < M, other=0.0).to(ACC)
    return bias


@triton.jit
def stats_kernel(
    partial_ptr, b1_ptr, squeezed_ptr, stats_ptr, rows,
    M: tl.constexpr, BLOCKS: tl.constexpr, LB: tl.constexpr, TILES: tl.constexpr, MP: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """squeezed [rows, M] from its parts; for batch statistics mean and squared deviations of each block
    of TILES * LB rows, stats [blocks, 2, M]."""
    block = tl.program_id(0)
    m = tl.arange(0, MP)
    first = block.to(tl.int64) * (TILES * LB)
    partial_ptr += first * (BLOCKS * M)
    squeezed_ptr += first * M
    left = rows - block * (TILES * LB)
    bias = bias_of(b1_ptr, M, MP, ACC)
    mean = tl.zeros([MP], ACC)
    deviation = tl.zeros([MP], ACC)
    for tile in range(TILES):
        line = tile * LB + tl.arange(0, LB)
        on = line < left
        mask = on[:, None] & (m < M)[None, :]
        z = add_partials(partial_ptr, line, on, BLOCKS, M, LB, MP, ACC) + bias[None, :]
        tl.store(squeezed_ptr + line[:, None] * M + m[None, :], z, mask=mask)
        if NORM == BATCH:
            # Chan's formula joins the tile with the rows before it.
            before = tl.zeros([MP], ACC) + tile * LB
            count = tl.sum(tl.zeros([LB, MP], ACC) + tl.where(on, 1.0, 0.0)[:, None], 0)
            tile_mean = tl.sum(tl.where(mask, z, 0.0), 0) / tl.where(count > 0, count, 1.0)
            off = tl.where(mask, z - tile_mean[None, :], 0.0)
            rounding = tl.sum(off, 0) / tl.where(count > 0, count, 1.0)  # of the sum, taken out of it
            tile_mean += tl.where(rounding == rounding, rounding, 0.0)
            off = tl.where(mask, z - tile_mean[None, :], 0.0)
            delta = tile_mean - mean
            share = count / (before + count)
            joined = deviation + tl.sum(off * off, 0) + delta * delta * before * share
            deviation = tl.where(count > 0, joined, deviation)
            # An infinite mean stays what it is.
            moved = tl.where(mean - mean == 0.0, mean + delta * share, mean + tile_mean)
            mean = tl.where(count > 0, moved, mean)
    if NORM == BATCH:
        at = stats_ptr + block * (2 * M) + m
        tl.store(at, mean, mask=m < M)
        tl.store(at + M, deviation, mask=m < M)


@triton.jit
def batch_statistics(
    stats_ptr, rows, blocks, SIZE: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, NBP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance [MP] of all rows from stats_kernel's blocks of SIZE rows."""
    m = tl.arange(0, MP)
    b = tl.arange(0, NBP)
    mask = (b < blocks)[:, None] & (m < M)[None, :]
    at = stats_ptr + (b * (2 * M))[:, None] + m[None, :]
    count = tl.where(b < blocks, tl.minimum(rows - b * SIZE, SIZE), 0).to(ACC)[:, None]
    means = tl.load(at, mask=mask, other=0.0)
    total = rows.to(ACC)
    mean = tl.sum(means * count, 0) / total
    off = tl.where(mask, means - mean[None, :], 0.0)
    rounding = tl.sum(off * count, 0) / total
    mean += tl.where(rounding == rounding, rounding, 0.0)
    off = tl.where(mask, means - mean[None, :], 0.0)
    deviation = tl.sum(tl.load(at + M, mask=mask, other=0.0) + off * off * count, 0)
    return mean, deviation / total


@triton.jit
def move_statistics(
    running_mean_ptr, running_var_ptr, tracked_ptr, mean, var, rows, momentum, mean_step, var_step,
    M: tl.constexpr, MP: tl.constexpr, CUMULATIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Moves running statistics towards the batch's mean and var [MP]; CUMULATIVE: by 1 / batches seen."""
    m = tl.arange(0, MP)
    factor = tl.full([MP], momentum, ACC)
    if tracked_ptr is not None:
        seen = tl.load(tracked_ptr) + 1
        if CUMULATIVE:
            factor = 1.0 / (tl.zeros([MP], ACC) + seen.to(ACC))
        tl.debug_barrier()
        tl.store(tracked_ptr, seen)
    count = tl.zeros([MP], ACC) + rows.to(ACC)
    live = m < tl.minimum(rows, 1) * M
    if running_mean_ptr is not None:
        at = running_mean_ptr + m.to(tl.int64) * mean_step
        old = tl.load(at, mask=m < M, other=0.0).to(ACC)
        tl.store(at, (1.0 - factor) * old + factor * mean, mask=live)
    if running_var_ptr is not None:
        at = running_var_ptr + m.to(tl.int64) * var_step
        old = tl.load(at, mask=m < M, other=0.0).to(ACC)
        unbiased = tl.where(count > 1.0, count / (count - 1.0), 1.0)
        tl.store(at, (1.0 - factor) * old + factor * unbiased * var, mask=live)


@triton.jit
def update_kernel(
    running_mean_ptr, running_var_ptr, tracked_ptr, mean_ptr, var_ptr, rows, momentum: tl.float64,
    mean_step, var_step, M: tl.constexpr, MP: tl.constexpr, CUMULATIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, MP)
    mean = tl.load(mean_ptr + m, mask=m < M, other=0.0)
    var = tl.load(var_ptr + m, mask=m < M, other=0.0)
    move_statistics(
        running_mean_ptr, running_var_ptr, tracked_ptr, mean, var, rows, momentum, mean_step, var_step,
        M, MP, CUMULATIVE, ACC,
    )  # fmt: skip
