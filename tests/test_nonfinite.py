"""NaN and infinity come out exactly where the paper's module puts them, forward and backward."""

import pytest
import torch
from harness import FLOATS, LAYOUTS, Case, build, data, run
from paper import ACTIVATIONS, PaperCoordAtt
from tolerances import FORMULAS_AGREE, errors

from coordatt_fast import CoordAtt, use_backend

pytestmark = pytest.mark.usefixtures("cpu")

SHAPE, MID = (2, 19, 6, 21), 9
VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
# First, last and inner elements: of the vector body and of its tail, in either layout.
PLACES = [(0, 0, 0, 0), (1, 18, 5, 20), (0, 7, 3, 16), (1, 16, 0, 9), (1, 3, 5, 0)]


def not_finite(t):
    return ~torch.isfinite(t)


EXACT = {"NaN": torch.isnan, "+inf": torch.isposinf, "-inf": torch.isneginf}


def same_kind(got, expected, message, kinds=EXACT):
    """NaN, +inf and -inf at the same elements; finite elements agree to a few per cent (accuracy has its own
    tests).
    """
    assert got.shape == expected.shape
    for kind, test in kinds.items():
        a, b = test(got), test(expected)
        if not torch.equal(a, b):
            where = (a != b).nonzero()
            raise AssertionError(
                f"{message}: {kind} at {int(a.sum())} elements, expected {int(b.sum())}; first difference at "
                f"{where[0].tolist()}: got {got[tuple(where[0])].item()}, "
                f"expected {expected[tuple(where[0])].item()}"
            )
    finite = torch.isfinite(expected)
    a, b = got[finite].double(), expected[finite].double()
    if len(a):
        assert (a - b).abs().max() <= 0.05 * b.abs().max() + 1e-6, f"{message}: finite elements differ"


def both(case, d, x, grad=None):
    return [run(build(cls, case, d.params), x, grad) for cls in (CoordAtt, PaperCoordAtt)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", VALUES)
def test_forward(value, dtype, layout, activation):
    for norm in ("running", "none", "batch"):
        case = Case(SHAPE, MID, dtype=FLOATS[dtype], layout=layout, activation=activation, norm=norm)
        d = data(case)
        for place in PLACES:
            x = d.x.clone()
            x[place] = VALUES[value]
            ours, theirs = both(case, d, x)
            for name in theirs:
                same_kind(ours[name], theirs[name], f"{name}, {norm}, {value} at {place}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("simd_dtype", FLOATS)
def test_forward_at_every_simd_level(simd_dtype, layout, simd):
    case = Case(SHAPE, MID, dtype=FLOATS[simd_dtype], layout=layout, norm="running")
    d = data(case)
    for value in VALUES.values():
        for place in PLACES:
            x = d.x.clone()
            x[place] = value
            ours, theirs = both(case, d, x, d.grad)
            same_kind(ours["out"], theirs["out"], f"{value} at {place}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("norm", ["running", "batch"])
@pytest.mark.parametrize("value", VALUES)
def test_backward_from_the_gradient(value, norm, dtype, layout):
    """A non-finite gradient, as loss scaling meets it: every parameter's gradient must show it.

    A sum over terms of both infinite signs is NaN, of one sign infinite: which it is depends on how the
    formula is arranged (plain PyTorch's convolution multiplies padding by infinity). For an infinite gradient
    the elements that are not finite have to be the same ones, and NaN has to stay NaN.
    """
    kinds = EXACT if value == "nan" else {"not finite": not_finite}
    case = Case(SHAPE, MID, dtype=FLOATS[dtype], layout=layout, norm=norm)
    d = data(case)
    for place in PLACES:
        grad = d.grad.clone()
        grad[place] = VALUES[value]
        given = type(d)(d.x, grad, d.params)
        ours, theirs = fused(case, given), by_reference(case, given)
        for name in theirs:
            # conv1.bias under batch statistics: zero by algebra, ours does not compute it.
            if name not in case.exactly_zero:
                same_kind(ours[name], theirs[name], f"{name}, {value} at {place}", kinds)


def by_reference(case, d):
    """Plain PyTorch with its own activations: hard-swish spelled out, as in the paper's module, multiplies a NaN
    gradient by the zero that PyTorch's selects.
    """
    with use_backend("reference"):
        return run(build(CoordAtt, case, d.params), d.x, d.grad)


def stops_gradients(case, value, under_test):
    """Where an activation's slope is zero plain PyTorch selects zero, whatever comes in: the parameters' gradients
    of such channels stay finite.
    """
    d = data(case)
    bias = "conv1.bias" if case.norm == "none" else "bn1.bias"
    d.params[bias][::2] -= 40
    d.params[bias][1::2] = 3
    if case.activation == "relu6":
        d.params[bias][1] += 40
    d.grad[1, 2, 3, 1] = value
    theirs, ours = by_reference(case, d), under_test(case, d)
    stopped = torch.isfinite(theirs["d conv1.weight"]).flatten(1).all(1)
    assert not stopped.all() and stopped[::2].all() == (case.activation != "silu")
    kinds = EXACT if value != value else {"not finite": not_finite}
    for name in theirs:
        if name not in case.exactly_zero:
            same_kind(ours[name], theirs[name], f"{name}, {case}", kinds)


def takes_slopes_at_kinks(activation, under_test):
    """Where an activation bends plain PyTorch takes one of the two slopes. Other tests' data keep away from there."""
    case = Case((2, 5, 4, 3), 9, torch.float64, norm="none", activation=activation)
    d = data(case)
    d.params["conv1.weight"].zero_()
    d.params["conv1.bias"][:] = torch.tensor([-3.0, 0.0, 3.0, 6.0]).repeat(3)[:9]
    theirs, ours = by_reference(case, d), under_test(case, d)
    for name in theirs:
        assert max(errors(ours[name], theirs[name])) < FORMULAS_AGREE, name


def fused(case, d):
    return run(build(CoordAtt, case, d.params), d.x, d.grad)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_where_the_activation_is_flat(activation, value, simd):
    for dtype in (torch.float32, torch.float64):
        for layout in LAYOUTS:
            for norm in ("running", "batch", "none"):
                case = Case((2, 5, 4, 3), 9, dtype, layout=layout, norm=norm, activation=activation)
                stops_gradients(case, VALUES[value], fused)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_at_kinks(activation, simd):
    takes_slopes_at_kinks(activation, fused)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_with_values_not_finite_in_x(activation, value):
    """Under given statistics no term is multiplied by zero that PyTorch does not have."""
    for norm in ("running", "none"):
        for seed in range(4):
            case = Case((2, 5, 3, 4), 9, norm=norm, activation=activation)
            d = data(case, seed)
            d.x[0, 1, 2, 3] = VALUES[value]
            theirs, ours = by_reference(case, d), fused(case, d)
            for name in theirs:
                same_kind(ours[name], theirs[name], f"{name}, {norm}, {seed}", {"not finite": not_finite})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["running", "batch"])
def test_backward_with_nan_in_x(norm, layout):
    case = Case(SHAPE, MID, dtype=torch.float64, layout=layout, norm=norm)
    d = data(case)
    for place in PLACES:
        x = d.x.clone()
        x[place] = torch.nan
        ours, theirs = both(case, d, x, d.grad)
        for name in theirs:
            if name not in case.exactly_zero:
                same_kind(ours[name], theirs[name], f"{name}, NaN at {place}")


@pytest.mark.parametrize(
    "name",
    ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"]
    + ["conv_h.weight", "conv_h.bias", "conv_w.weight", "conv_w.bias"],
)
def test_nan_in_a_parameter(name):
    """A diverged parameter reaches the output (and not only its own channel's)."""
    case = Case(SHAPE, MID, norm="running")
    d = data(case)
    for index in (0, -1):
        params = dict(d.params)
        params[name] = params[name].clone()
        params[name].view(-1)[index] = torch.nan
        broken = type(d)(d.x, d.grad, params)
        ours, theirs = both(case, broken, d.x, d.grad)
        for result in theirs:
            same_kind(ours[result], theirs[result], f"{result}, NaN in {name}[{index}]")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_large_values_stay_finite(dtype):
    """Sums of values near the top of float16 overflow there, not in the accumulator."""
    case = Case(SHAPE, MID, dtype=FLOATS[dtype], norm="running")
    d = data(case)
    x = torch.full_like(d.x, 60000.0)
    for name in ("conv1.weight", "conv1.bias"):
        d.params[name] = d.params[name] * 1e-4
    ours, theirs = both(case, d, x)
    assert torch.isfinite(ours["out"]).all()
    same_kind(ours["out"], theirs["out"], "60000 everywhere")
    p = torch.ops.coordatt_fast.pool(x)
    assert torch.equal(p, torch.full_like(p, 60000.0))


def test_zero_times_infinity_in_the_gate():
    """A gate of exactly zero times an infinite x is NaN, not zero: the product must not be skipped."""
    x = torch.full((1, 2, 3, 3), torch.inf)
    s_h, s_w = torch.full((1, 2, 3, 1), -200.0), torch.zeros(1, 2, 1, 3)
    assert torch.isnan(torch.ops.coordatt_fast.gate(x, s_h, s_w, False)).all()
    assert torch.isnan(torch.ops.coordatt_fast.gate(x, s_h, s_w, True)).all()
