"""Block sizes by C, H, W, M, dtype and layout: static, so that a shape always runs the same code.

Every program owns BC channels of one image. Small BC gives more programs, large BC fewer parts of the
squeeze: with B = C / BC blocks, B parts of L x M numbers an image are written once and, in inference, read by
each of B gate programs. PART_SHARE bounds these bytes against the three passes over the map.
"""

import functools
import math
from typing import NamedTuple

PART_SHARE = 0.25
TILE = 4096  # elements of a map that a program holds at a time: 32 a thread, 8 of float64
WARPS = 4


class Sizes(NamedTuple):
    """Constants of the kernels for one map; the letters are the kernels' own."""

    BC: int  # channels of a program
    TC: int  # a pass over planes takes TC x BH x BW elements at a time
    BH: int
    BW: int
    RC: int  # the same for the gradient's pass, which holds two maps
    RH: int
    RW: int
    BLOCK: int  # elements of the flat walk
    LB: int  # lines of the middle in a product
    KC: int  # channels in a product
    MP: int  # M, padded
    RB: int  # rows of the middle in a tile where there is no product
    NBP: int  # at most so many blocks of rows, each with statistics of its own
    WC: int  # channels and rows of the weights' gradients
    KB: int
    WHOLE: int  # see walk.inside


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _tile(bc: int, h: int, w: int, nhwc: bool, elements: int) -> tuple[int, int, int]:
    if nhwc:
        tc = min(bc, 64)
        bw = min(power(w), max(1, elements // tc))
        return tc, min(power(h), max(1, elements // (tc * bw))), bw
    bw = min(power(w), elements // 8)
    bh = min(power(h), elements // bw)
    while bh > 1 and math.ceil(h / bh) * bh > 1.15 * h:
        bh //= 2
    return min(bc, elements // (bh * bw)), bh, bw


def _channels(c: int, h: int, w: int, m: int, itemsize: int, nhwc: bool) -> int:
    """The smallest block of channels whose parts stay within PART_SHARE."""
    most = max(16, min(128, power(c)))
    bc = 16 if nhwc else 8
    while bc < most:
        blocks = math.ceil(c / bc)
        if blocks * (1 + blocks) * (h + w) * m * 4 <= PART_SHARE * 3 * c * h * w * itemsize:
            break
        bc *= 2
    return bc


@functools.lru_cache(maxsize=1024)
def sizes(c: int, h: int, w: int, m: int, itemsize: int, nhwc: bool, bc: int = 0) -> Sizes:
    """The table's entry for maps [.., c, h, w] of itemsize bytes an element and m squeezed channels.

    bc: another block of channels than the table's.
    """
    bc = bc or _channels(c, h, w, m, itemsize, nhwc)
    elements = TILE if itemsize < 8 else TILE // 4
    mp = max(16, power(m))
    whole = math.gcd(16, math.gcd(c, bc) * h * w)
    return Sizes(
        bc, *_tile(bc, h, w, nhwc, elements), *_tile(bc, h, w, nhwc, elements // 2),
        BLOCK=max(512, bc, min(2048 if itemsize < 8 else 1024, power(bc * h * w))),
        LB=16,
        KC=max(16, min(bc, 32 if mp <= 32 and itemsize < 8 else 16)),
        MP=mp,
        RB=max(1, 2048 // mp),
        NBP=max(16, min(64, 2048 // mp)),
        WC=max(16, min(32 if mp <= 32 else 16, power(c))),
        KB=32 if mp <= 16 and itemsize < 8 else 16,
        WHOLE=whole,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def candidates(c: int, h: int, w: int, m: int, itemsize: int, nhwc: bool) -> tuple[int, ...]:
    """Blocks of channels worth a try beside the table's, for autotune."""
    bc = _channels(c, h, w, m, itemsize, nhwc)
    least, most = (16 if nhwc else 8), max(16, min(128, power(c)))
    return tuple(size for size in (bc, bc // 2, bc * 2) if least <= size <= most)


@functools.lru_cache(maxsize=4096)
def row_blocks(rows: int, rb: int, nbp: int) -> tuple[int, int]:
    """Tiles of rb rows per block, and number of blocks (at most nbp); few values, as each compiles anew."""
    tiles = power(math.ceil(rows / (nbp * rb)))
    return tiles, math.ceil(rows / (tiles * rb))


@functools.lru_cache(maxsize=4096)
def weight_tiles(rows: int, kb: int) -> int:
    """Tiles of kb rows per program of the weights' gradients: at most 32 parts, 8 tiles before a second."""
    return max(power(math.ceil(rows / (32 * kb))), min(8, power(math.ceil(rows / kb))))
