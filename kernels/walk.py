"""How a program goes over its planes: which block of which image it owns, and the second pass's flat walk.

A program owns BC channels of one image in every kernel that touches a map. Maps are addressed by constexpr
strides (XC, XW: channel and pixel step, row step W * XW), so that loads are as wide as the map allows. Small
tensors of an image (means, gates and their gradients) are [C, L] beside an nchw map and [L, C] beside an nhwc
one, L = H + W, rows first: neighbours in a map then find their gates side by side.
"""

import triton
import triton.language as tl


@triton.jit
def own(index, C: tl.constexpr, BC: tl.constexpr):
    """Image (int64), block, first channel of the program of this index."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    block = index % blocks
    return (index // blocks).to(tl.int64), block, block * BC


@triton.jit
def place(i0, H: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, BLOCK: tl.constexpr, NHWC: tl.constexpr):
    """Where the BLOCK elements from i0 on lie: flat index, channel in the block, pixel of the plane.

    Planes one after the other [BLOCK], or, channels_last, pixels one after the other [BLOCK / BC, BC].
    """
    if NHWC:
        pixel = i0 // BC + tl.arange(0, BLOCK // BC)[:, None]
        c = tl.arange(0, BC)[None, :]
        i = pixel * BC + c
    else:
        i = i0 + tl.arange(0, BLOCK)
        c = i // (H * W)
        pixel = i % (H * W)
    return i, c, pixel


@triton.jit
def inside(
    i, c, pixel, c0,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, NHWC: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Mask of the elements that exist. WHOLE is a power of two that divides every block's number of elements,
    which lets the compiler keep masked accesses wide."""
    if NHWC:
        mask = (c0 + c < C) & (pixel < H * W)
    else:
        mask = i < tl.multiple_of(tl.minimum(C - c0, BC) * (H * W), WHOLE)
    return mask


@triton.jit
def step(
    i, c, pixel,
    XC: tl.constexpr, XW: tl.constexpr, HW: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of place()'s elements in a map, from the block's first channel on."""
    if WIDE:
        c = c.to(tl.int64)
        pixel = pixel.to(tl.int64)
    if NHWC:
        at = pixel * XW + c * XC
    elif XC == HW:  # also one flat range for the compiler
        at = i
    else:
        at = c * XC + pixel
    return at
