"""Every width, height, channel count and middle up to a few vectors: no remainder of any loop is left out or
doubled.

Accuracy has its own tests. Here each of thousands of shapes is run once and only has to be the right
function: leaving one element out of a strip of at most 145 is an error of 1/145 of that strip.
"""

import functools

import harness
import pytest
import torch
from harness import FLOATS, LAYOUTS, Case, data

LONG = [*range(18, 70), 95, 96, 97, 127, 128, 129, 130, 143, 144, 145]
SWEEPS = {
    # Small planes are walked flat, two rows to a vector, or back to back: all of them, and one channel over a
    # vector.
    "small maps": [((1, 19, h, w), 8) for h in range(1, 18) for w in range(1, 18)],
    "flat maps": [((1, 17, h, w), 8) for h in (19, 24, 25, 31, 32, 33) for w in (9, 16, 17, 31, 32, 33)],
    "widths": [((1, 5, h, w), 8) for h in (1, 3) for w in LONG],
    "heights": [((1, 5, h, w), 8) for w in (1, 3) for h in LONG],
    "channels": [((2, c, 5, 4), 8) for c in [*range(1, 70), 95, 96, 97, 127, 128, 129]],
    "middles": [((1, 7, 4, 3), m) for m in [*range(1, 70), 95, 96, 97]],
    "images": [((n, 3, 2, 3), 8) for n in [*range(1, 20), 51, 52, 103]],
}


@functools.cache
def expected(shape, mid, dtype, norm):
    """The data, the truth with the largest size of each result, and a module for every layout and level."""
    case = Case(shape, mid, dtype, norm=norm)
    d = data(case)
    reference = harness.build(harness.PaperCoordAtt, case, d.params, torch.float64)
    truth = harness.run(reference, d.x.double(), d.grad.double())
    truth = {name: (value, value.abs().max()) for name, value in truth.items()}
    return d, truth, harness.build(harness.CoordAtt, case, d.params)


def relayout(t, layout):
    return t.contiguous(memory_format=LAYOUTS[layout])


def check(shape, mid, dtype, layout, norm, step=None):
    case = Case(shape, mid, dtype, layout=layout, norm=norm)
    d, truth, module = expected(shape, mid, dtype, norm)
    x, grad = (relayout(t, layout) if step is None else spaced(t, step) for t in (d.x, d.grad))
    module.zero_grad()
    if norm == "batch":
        module.load_state_dict(d.params, strict=False)
    got = harness.run(module, x, grad)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    slack = (
        2**12 * eps
    )  # float32: 5e-4, float64: 9e-13; batch statistics of a few rows multiply rounding by 1/sqrt(eps)
    if norm == "batch" and shape[0] * (shape[2] + shape[3]) < 8:
        slack *= 2**8
    for name, (value, size) in truth.items():
        if name in case.exactly_zero + case.vanishing:
            continue
        assert got[name].shape == value.shape, name
        worst = (got[name].double() - value).abs().max() / size
        assert worst <= slack + torch.finfo(got[name].dtype).eps, (
            f"{shape}, mid {mid}: {name} is off by {worst:.2g}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweep(sweep, dtype, layout, simd):
    for shape, mid in SWEEPS[sweep]:
        check(shape, mid, FLOATS[dtype], layout, "running")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sweep", ["channels", "middles", "images"])
def test_sweep_with_batch_statistics(sweep, layout, simd):
    for shape, mid in SWEEPS[sweep]:
        for dtype in (torch.float32, torch.float64):
            check(shape, mid, dtype, layout, "batch")


def spaced(t, step):
    """t as the first channels of a channels_last tensor with step channels, all others NaN."""
    n, c, h, w = t.shape
    wide = torch.full((n, h, w, step), torch.nan, dtype=t.dtype)
    return wide.permute(0, 3, 1, 2)[:, :c].copy_(t)


# Maps beyond 2 MB and 64 channels are walked in another order; spacing the pixels out makes small ones count
# as such.
WALKED = [((1, c, 5, 7), 8) for c in [*range(65, 84), 95, 96, 97, 127, 128, 129]]
WALKED += [((1, 67, h, w), 8) for h in range(1, 10) for w in (1, 2, 7)]
WALKED += [((1, 65, 2, w), 8) for w in (63, 64, 65, 127, 128, 129, 130)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_maps_beyond_the_cache(dtype, simd):
    for shape, mid in WALKED:
        pixel = shape[2] * shape[3] * FLOATS[dtype].itemsize
        check(shape, mid, FLOATS[dtype], "nhwc", "running", step=2**21 // pixel + 64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_maps_beyond_the_cache_as_they_come(dtype, layout, simd):
    itemsize = FLOATS[dtype].itemsize
    check((1, 72, 2**21 // itemsize // 72 // 60 + 1, 61), 8, FLOATS[dtype], layout, "running")
