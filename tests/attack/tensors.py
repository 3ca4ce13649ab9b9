"""Maps and parameters as no test author would choose them: values, layouts, sizes."""

import math

import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FINITE = (
    "normal", "large", "huge", "tiny", "zero", "constant", "offset", "far", "spread", "outliers", "integers", "sparse",
)  # fmt: skip
NOT_FINITE = ("nan", "inf", "-inf", "mixed")
LAYOUTS = (
    "contiguous", "channels_last", "sliced", "cropped", "transposed", "offset", "channels", "batch inside",
    "expanded n", "expanded c", "expanded map", "expanded row", "expanded column",
)  # fmt: skip

# Around every vector width and block, primes, and what networks have.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 14, 15, 16, 17, 20, 23, 28, 31, 32, 33, 40, 47, 56, 63, 64, 65, 80)
LONG = (112, 127, 128, 129, 130, 192, 255, 257, 320, 511, 1024, 1031)
CHANNELS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 129, 160, 257)
MIDDLES = (1, 2, 3, 7, 8, 9, 13, 15, 16, 17, 24, 30, 31, 32, 33, 64, 88)


@st.composite
def shapes(draw, most=12_000):
    """[N, C, H, W] of at most so many elements, rarely (for the blocks of large results) of 300,000 and more."""
    kind = draw(st.integers(0, 99))
    if kind == 99:
        h, w = draw(st.sampled_from(LENGTHS[-9:])), draw(st.sampled_from(LENGTHS[-9:]))
        return 1 + draw(st.integers(0, 1)), -(-300_000 // (h * w)), h, w
    if kind < 4:
        return 0, draw(st.sampled_from(CHANNELS)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    lengths = st.sampled_from(LENGTHS)
    h, w = draw(lengths), draw(lengths)
    if kind < 16:
        h, w = draw(st.sampled_from([(1, 1), (1, w), (h, 1), (2, 2), (h, h)]))
    elif kind < 22:
        h, w = draw(st.sampled_from(LONG)), draw(st.integers(1, 3))
        if draw(st.booleans()):
            h, w = w, h
    c = draw(st.sampled_from([c for c in CHANNELS if c * h * w <= most] or [1]))
    room = most // (c * h * w)
    return draw(st.sampled_from([n for n in (1, 2, 3, 5, 8, 37) if n <= max(1, room)])), c, h, w


def map_of(kind: str, shape, generator, dtype) -> torch.Tensor:
    """A contiguous map of these values, in float64 rounded to dtype."""
    n, c, h, w = shape
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
    x = draw(n, c, h, w) + draw(n, c, h, 1) + draw(n, c, 1, w)
    if kind == "large":
        x = x * (200 if dtype is torch.float16 else 3000)
    elif kind == "huge":
        x = x * {torch.float16: 4e3, torch.float64: 1e40}.get(dtype, 1e9)
    elif kind == "tiny":
        x = x * {torch.float16: 1e-4, torch.float64: 1e-40}.get(dtype, 1e-12)
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "constant":
        x = torch.full_like(x, float(draw(1)))
    elif kind == "offset":
        x = x + 1000 * draw(1, c, 1, 1)
    elif kind == "far":  # a mean of many deviations
        x = 0.01 * x + 1000 * draw(1, c, 1, 1)
    elif kind == "outliers":  # where a sum begins, and anywhere
        x[..., :1, :1] += 1e4
        x = torch.where(draw(n, c, h, w) > 3, -1e4, x)
    elif kind == "spread":
        x = x * (2 * draw(n, c, h, w)).exp()
    elif kind == "integers":
        x = x.round()
    elif kind == "sparse":
        x = torch.where(draw(n, c, h, w) > 1.5, x, 0 * x)
    elif kind in NOT_FINITE and x.numel():
        for _ in range(int(torch.randint(1, 4, (1,), generator=generator))):
            place = int(torch.randint(x.numel(), (1,), generator=generator))
            sign = -math.inf if torch.rand(1, generator=generator) < 0.5 else math.inf
            x.view(-1)[place] = sign if kind == "mixed" else float(kind)
    return x.to(dtype)


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """t's values (where expanded: some of them) in memory of this layout, NaN in all that is left out."""
    n, c, h, w = t.shape
    nan = lambda *size: t.new_full(size, math.nan)
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return nan(n, c, h, 2 * w)[..., ::2].copy_(t)
    if layout == "cropped":
        return nan(n, c, h + 3, w + 2)[:, :, 1 : h + 1, 2:].copy_(t)
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "offset":
        return nan(t.numel() + 3)[3:].view(t.shape).copy_(t)
    if layout == "channels":
        return nan(n, c + 2, h, w)[:, 1 : c + 1].copy_(t)
    if layout == "batch inside":
        return t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout == "expanded n":
        return t[:1].expand(n, c, h, w)
    if layout == "expanded c":
        return t[:, :1].expand(n, c, h, w)
    if layout == "expanded map":
        return t[:, :, :1, :1].expand(n, c, h, w)
    if layout == "expanded row":
        return t[:, :, :1].expand(n, c, h, w)
    if layout == "expanded column":
        return t[:, :, :, :1].expand(n, c, h, w)
    return t.contiguous()


def parameter(t: torch.Tensor, strided: bool) -> torch.Tensor:
    """A parameter's tensor, by choice not dense in memory."""
    if not strided:
        return t.clone()
    wide = t.new_full((2 * t.shape[0], *t.shape[1:]), math.nan)
    return wide[::2].copy_(t) if t.dim() == 1 else wide.transpose(0, 1)[:, ::2].copy_(t.transpose(0, 1)).transpose(0, 1)
