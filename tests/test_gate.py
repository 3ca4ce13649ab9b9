"""The gate pass alone: x times its two sigmoids, and the gradients of all three."""

import functools

import oracle
import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, LAYOUTS, draws, feature_map, gradients
from shapes import AWKWARD, EMPTY, FEW

pytestmark = pytest.mark.usefixtures("cpu")


def gate(x, s_h, s_w, skip=False):
    return torch.ops.coordatt_fast.gate(x, s_h, s_w, skip)


def paper_gate(x, s_h, s_w, skip=False):
    out = x * s_w.sigmoid() * s_h.sigmoid()
    return out + x if skip else out


def inputs(shape, dtype, layout, seed, logit_dtype=None):
    n, c, h, w = shape
    g = seeds.generator(seed)
    logits = lambda *size: (2 * torch.randn(size, generator=g, dtype=torch.float64)).to(logit_dtype or dtype)
    named = {
        "x": feature_map(shape, g, dtype, layout),
        "s_h": logits(n, c, h, 1),
        "s_w": logits(n, c, 1, w),
    }
    return named, feature_map(shape, g, dtype, layout)


def beside(drawn, index):
    named, grad = drawn
    g = seeds.generator(3000 + index)
    return {name: tolerances.beside(t, g) for name, t in named.items()}, tolerances.beside(grad, g)


@functools.lru_cache(maxsize=128)
def yardstick(shape, dtype, skip):
    return tolerances.Yardstick(
        lambda seed: inputs(shape, dtype, "nchw", seed),
        beside,
        lambda drawn: oracle.gate(**drawn[0], grad=drawn[1], skip=skip),
        lambda drawn: gradients(lambda **t: paper_gate(**t, skip=skip), *drawn),
    )


def check(shape, dtype, layout, skip=False):
    tolerances.check(
        lambda seed: gradients(lambda **t: gate(**t, skip=skip), *inputs(shape, dtype, layout, seed)),
        yardstick(shape, dtype, skip),
        key="gate " + str(dtype).removeprefix("torch."),
        draws=draws(shape),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", AWKWARD)
def test_values_and_gradients(shape, dtype, layout):
    check(AWKWARD[shape][0], FLOATS[dtype], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", FEW)
def test_skip(shape, dtype, layout):
    check(AWKWARD[shape][0], FLOATS[dtype], layout, skip=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", FEW)
def test_every_simd_level(shape, layout, simd):
    for dtype in FLOATS.values():
        check(AWKWARD[shape][0], dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_nearly_closed(dtype, simd):
    """Of each element's own size: beside open gates an error in these would drown."""
    s_h = torch.linspace(-87, -40, 997, dtype=dtype).view(1, 1, -1, 1)
    x, s_w = torch.ones_like(s_h), torch.zeros(1, 1, 1, 1, dtype=dtype)
    truth = oracle.gate(x, s_h, s_w, x, False)["out"]
    ours, plain = (((f(x, s_h, s_w) - truth) / truth).double() for f in (gate, paper_gate))
    eps = torch.finfo(dtype).eps
    for factor, size in (
        (tolerances.NORM_FACTOR, lambda e: e.square().mean().sqrt()),
        (tolerances.ELEMENT_FACTOR, lambda e: e.abs().max()),
    ):
        assert size(ours) <= factor * size(plain) + tolerances.FLOOR_ULPS * eps


@pytest.mark.parametrize("logit_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits_of_another_dtype(dtype, logit_dtype):
    """Logits come in whatever dtype the module's convolutions gave; their gradients go back in it."""
    shape, dtypes = AWKWARD["primes"][0], (FLOATS[dtype], FLOATS[logit_dtype])

    def in_float32(drawn):
        """Plain PyTorch's arithmetic in float32, each result rounded once to its own dtype."""
        named, grad = drawn
        results = gradients(paper_gate, {k: v.float() for k, v in named.items()}, grad.float())
        return {k: v.to(dtypes["s_" in k]) for k, v in results.items()}

    tolerances.check(
        lambda seed: gradients(gate, *inputs(shape, dtypes[0], "nchw", seed, dtypes[1])),
        tolerances.Yardstick(
            lambda seed: inputs(shape, dtypes[0], "nchw", seed, dtypes[1]),
            beside,
            lambda drawn: oracle.gate(**drawn[0], grad=drawn[1], skip=False),
            in_float32,
        ),
        key=f"gate {dtype} {logit_dtype}",
        draws=draws(shape),
    )


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32"), ("bfloat16", "float64")])
def test_float64_logits_go_with_float64_x_only(dtypes):
    """Plain PyTorch would widen the result: x's dtype is kept here, so precision would be lost in silence."""
    named, _ = inputs(AWKWARD["primes"][0], FLOATS[dtypes[0]], "nchw", 0)
    named |= {k: named[k].to(FLOATS[dtypes[1]]) for k in ("s_h", "s_w")}
    with pytest.raises(RuntimeError, match="float64"):
        gate(**named)


@pytest.mark.parametrize("which", ["s_h", "s_w"])
@pytest.mark.parametrize(
    "relayout",
    {
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "every second": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
        "slice": lambda t: torch.cat([torch.full_like(t, torch.nan), t], 1)[:, t.shape[1] :],
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "flipped": lambda t: t.flip(1).flip(1),
    }.items(),
    ids=lambda item: item[0],
)
def test_logits_of_any_strides(relayout, which):
    named, grad = inputs(AWKWARD["primes"][0], torch.float32, "nchw", 0)
    expected = gradients(gate, named, grad)
    got = gradients(gate, named | {which: relayout[1](named[which])}, grad)
    for name in expected:
        tolerances.assert_same_bits(got[name], expected[name], name)


@pytest.mark.parametrize("dtype", FLOATS)
def test_saturated_logits(dtype):
    """exp must neither overflow into NaN nor lose the small side: sigmoid(-30) is 9e-14, not zero."""
    dtype = FLOATS[dtype]
    logits = torch.tensor(
        [0.0, -0.0, 1e-4, 8, -8, 17, -17, 30, -30, 87, -87, 88.5, -88.5, 89, -89, 104, -104, 1e4, -1e4]
    )
    logits = torch.cat([logits, torch.tensor([torch.inf, -torch.inf])]).to(dtype)
    count = len(logits)
    x = torch.full((1, 1, count, count), 1.5, dtype=dtype)
    s_h, s_w = logits.reshape(1, 1, count, 1), torch.zeros(1, 1, 1, count, dtype=dtype)
    named, grad = {"x": x, "s_h": s_h, "s_w": s_w}, torch.ones_like(x)
    got, expected = gradients(gate, named, grad), oracle.gate(x, s_h, s_w, grad, False)
    compute = torch.finfo(torch.promote_types(dtype, torch.float32))
    for name, value in got.items():
        wrong = (value.double() - expected[name]).abs()
        # Relative to each element; below the smallest normal number of either dtype only the absolute size
        # counts. The gradient of a saturated logit is a (1 - a): where a rounds to one it is zero, in plain
        # PyTorch too.
        tiny = max(compute.tiny, torch.finfo(dtype).tiny) + (
            count * 3 * compute.eps if name == "d s_h" else 0
        )
        allowed = (16 * compute.eps + torch.finfo(dtype).eps) * expected[name].abs() + 4 * tiny
        assert (wrong <= allowed).all(), (
            f"{name}: {value.flatten()[:count]} against {expected[name].flatten()[:count]}"
        )


def test_empty_batch():
    n, c, h, w = EMPTY[0]
    named = {"x": torch.empty(EMPTY[0]), "s_h": torch.empty(n, c, h, 1), "s_w": torch.empty(n, c, 1, w)}
    for name, value in gradients(gate, named, torch.empty(EMPTY[0])).items():
        assert value.shape == named[name.removeprefix("d ") if name != "out" else "x"].shape
