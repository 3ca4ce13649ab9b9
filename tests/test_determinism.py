"""Same inputs, same bits: for any thread count, on every repetition, whatever else is in the batch."""

import pytest
import tolerances
import torch
from harness import FLOATS, LAYOUTS, Case, build, data, run
from shapes import AWKWARD, FEW

from coordatt_fast import CoordAtt

pytestmark = pytest.mark.usefixtures("cpu")

# Beside the usual ones: an image large enough that one image is split over threads, and a batch that does not
# divide.
SHAPES = {name: AWKWARD[name] for name in FEW} | {
    "one big image": ((1, 64, 64, 65), 8),
    "one tall image": ((1, 8, 500, 40), 8),
    "five images": ((5, 96, 14, 14), 8),
    "seven images": ((7, 40, 20, 20), 13),
    "beyond the cache": ((1, 130, 65, 67), 8),
}
THREADS = (1, 2, 3, 4)


def same(results, expected, message):
    for name in expected:
        tolerances.assert_same_bits(results[name], expected[name], f"{message}: {name}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_thread_count(shape, dtype, layout):
    for norm in ("batch", "running"):
        case = Case(*SHAPES[shape], dtype=FLOATS[dtype], layout=layout, norm=norm)
        d = data(case)
        expected = None
        for count in THREADS:
            torch.set_num_threads(count)
            for backward in (False, True):
                got = run(build(CoordAtt, case, d.params), d.x, d.grad if backward else None)
                if expected is not None:
                    same(got, {k: v for k, v in expected.items() if k in got}, f"{count} threads, {norm}")
            expected = expected or got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pool_and_gate_for_any_thread_count(shape, layout):
    case = Case(*SHAPES[shape], layout=layout)
    d = data(case)
    n, c, h, w = case.shape
    s_h, s_w = torch.randn(n, c, h, 1), torch.randn(n, c, 1, w)
    ops, expected = torch.ops.coordatt_fast, None
    for count in THREADS:
        torch.set_num_threads(count)
        p = ops.pool(d.x)
        got = [p, ops.pool_backward(p, d.x), ops.gate(d.x, s_h, s_w, False)]
        got += ops.gate_backward(d.grad, d.x, s_h, s_w, False)
        expected = expected or got
        for index, (a, b) in enumerate(zip(got, expected)):
            tolerances.assert_same_bits(a, b, f"{count} threads, result {index}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_repetition(layout):
    """Twenty times on four threads, with work in between that leaves other bytes in freed memory."""
    torch.set_num_threads(4)
    case = Case(*SHAPES["one big image"], layout=layout)
    d = data(case)
    expected = run(build(CoordAtt, case, d.params), d.x, d.grad)
    for repetition in range(20):
        junk = [torch.randn(1000 + 97 * repetition + i) for i in range(7)]
        del junk
        same(run(build(CoordAtt, case, d.params), d.x, d.grad), expected, f"repetition {repetition}")


@pytest.mark.parametrize("simd_norm", ["running", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ["primes", "W=7", "many-images", "five images"])
def test_an_image_does_not_see_its_batch(shape, dtype, layout, simd_norm):
    """In eval a batch is its images one by one, in every bit: outputs and the gradient of x."""
    case = Case(*SHAPES[shape], dtype=FLOATS[dtype], layout=layout, norm=simd_norm)
    d = data(case)
    module = build(CoordAtt, case, d.params)
    together = run(module, d.x, d.grad)
    for i in range(len(d.x)):
        alone = run(module, d.x[i : i + 1].clone(), d.grad[i : i + 1].clone())
        for name in ("out", "d x"):
            tolerances.assert_same_bits(together[name][i : i + 1], alone[name], f"image {i}: {name}")


def test_alignment_does_not_matter():
    """The same numbers at every offset of a cache line: vector code must not peel by address."""
    case = Case(*SHAPES["primes"])
    d = data(case)
    expected = run(build(CoordAtt, case, d.params), d.x, d.grad)
    for offset in range(1, 17):
        moved = [
            torch.cat([torch.full((offset,), torch.nan), t.flatten()])[offset:].view(t.shape)
            for t in (d.x, d.grad)
        ]
        same(run(build(CoordAtt, case, d.params), *moved), expected, f"offset {offset}")
