"""The pool pass alone: row means and column means of x, and its backward."""

import functools

import oracle
import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, LAYOUTS, draws, feature_map, gradients
from shapes import AWKWARD, EMPTY, FEW

pytestmark = pytest.mark.usefixtures("cpu")


def pool(x):
    return torch.ops.coordatt_fast.pool(x)


def paper_pool(x):
    rows = torch.nn.functional.adaptive_avg_pool2d(x, (None, 1))
    columns = torch.nn.functional.adaptive_avg_pool2d(x, (1, None))
    return torch.cat([rows, columns.permute(0, 1, 3, 2)], dim=2)


def inputs(shape, dtype, layout, seed):
    n, c, h, w = shape
    g = seeds.generator(seed)
    x = feature_map(shape, g, dtype, layout)
    return x, feature_map((n, c, h + w, 1), g, dtype)


def beside(drawn, index):
    g = seeds.generator(3000 + index)
    return tuple(tolerances.beside(t, g) for t in drawn)


@functools.lru_cache(maxsize=128)
def yardstick(shape, dtype):
    return tolerances.Yardstick(
        lambda seed: inputs(shape, dtype, "nchw", seed),
        beside,
        lambda drawn: oracle.pool(*drawn),
        lambda drawn: gradients(paper_pool, {"x": drawn[0]}, drawn[1]),
    )


def results(shape, dtype, layout, seed):
    x, grad = inputs(shape, dtype, layout, seed)
    return gradients(pool, {"x": x}, grad)


def check(shape, dtype, layout):
    tolerances.check(
        lambda seed: results(shape, dtype, layout, seed),
        yardstick(shape, dtype),
        key="pool " + str(dtype).removeprefix("torch."),
        draws=draws(shape),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", AWKWARD)
def test_values_and_gradient(shape, dtype, layout):
    check(AWKWARD[shape][0], FLOATS[dtype], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", FEW)
def test_every_simd_level(shape, layout, simd):
    for dtype in FLOATS.values():
        check(AWKWARD[shape][0], dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", FEW)
def test_each_strip_has_its_own_mean(shape, layout):
    """Integers small enough that every sum is exact: each strip's mean is known in every bit, and no two are
    equal.
    """
    n, c, h, w = AWKWARD[shape][0]
    x = torch.zeros(n, c, h, w).contiguous(memory_format=LAYOUTS[layout])
    x += torch.arange(n * c * h).reshape(n, c, h, 1) % 509
    x += torch.arange(n * c * w).reshape(n, c, 1, w) % 251
    p = pool(x)
    exact = x.double()
    expected = torch.cat([exact.mean(3, keepdim=True), exact.mean(2, keepdim=True).transpose(2, 3)], 2)
    # One division (or one multiplication by the rounded reciprocal) is left: at most one ulp.
    assert ((p.double() - expected).abs() <= torch.finfo(torch.float32).eps * expected.abs()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_rounded_to_nearest_even(dtype, layout, simd):
    """Means of neighbours lie halfway between two numbers, those of others anywhere: as torch rounds them, in every
    bit."""
    dtype = FLOATS[dtype]
    g = seeds.generator(0)
    x = torch.randn(2, 19, 7, 2, generator=g).to(dtype)
    ulps = torch.randint(-9, 10, x[..., :1].shape, generator=g, dtype=torch.int16)
    x[..., 1:] = (x[..., :1].contiguous().view(torch.int16) + ulps).view(dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    rows = pool(x)[:, :, :7]
    tolerances.assert_same_bits(rows, x.float().mean(3, keepdim=True).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_long_sums_keep_their_small_terms(dtype):
    """65504 terms of about one. Summed in half precision they would stick at 2^8 or 2^11, in float32 one by
    one they drift.
    """
    dtype = FLOATS[dtype]
    x = 1 + torch.rand(1, 2, 4, 16384, generator=seeds.generator(0)).to(dtype)
    got, expected = pool(x).double(), paper_pool(x.double())
    # Eight or more partial sums of at most 2^11 terms: errors below 2^11 roundings of half an ulp, and
    # usually their root.
    slack = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps
    assert ((got - expected).abs() <= slack * expected).all()


def test_empty_batch():
    p = gradients(pool, {"x": torch.empty(EMPTY[0])}, torch.empty(0, 16, 12, 1))
    assert p["out"].shape == (0, 16, 12, 1) and p["d x"].shape == EMPTY[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_of_expanded_gradient(layout):
    """sum() hands back a gradient with zero strides."""
    shape = AWKWARD["primes"][0]
    x = feature_map(shape, seeds.generator(0), layout=layout).requires_grad_()
    pool(x).sum().backward()
    assert torch.allclose(x.grad, torch.full(shape, 1 / shape[2] + 1 / shape[3]), rtol=1e-6, atol=0)
    assert x.grad.stride() == x.stride()
