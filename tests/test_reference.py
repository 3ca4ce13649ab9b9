"""The reference is the paper's function: output, every gradient and running statistics."""

import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, Case, build, compare, data, plain, run, truth
from paper import ACTIVATIONS, PaperCoordAtt
from shapes import AWKWARD, EMPTY, FEW, TWO

from coordatt_fast import CoordAtt, coord_att, use_backend

NORMS = ["batch", "running", "none"]


@pytest.fixture(autouse=True)
def _reference():
    with use_backend("reference"):
        yield


def noisy_bias(case, d, backward=True):
    """The reference's results; conv1.bias' gradient, noise around zero under batch statistics, is checked on
    its own.
    """
    results = run(build(CoordAtt, case, d.params), d.x, d.grad if backward else None)
    for name in case.exactly_zero:
        if name in results:
            noise = results[name].abs().max()
            scale = results["d bn1.bias" if case.affine else "d conv1.weight"].abs().max()
            assert noise <= 1e3 * torch.finfo(noise.dtype).eps * scale + 1e-3 * scale
            results[name] = torch.zeros_like(results[name])
    return results


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", AWKWARD)
def test_truth_agrees_with_its_oracle(shape, norm):
    """The paper's module under autograd in float64 and the hand-written long double give the same numbers."""
    case = Case(*AWKWARD[shape], dtype=torch.float64, norm=norm)
    d = data(case)
    expected, got = truth(case, d), plain(case, d)
    assert expected.keys() == got.keys()
    for name in expected:
        if name not in case.exactly_zero:
            assert max(tolerances.errors(got[name], expected[name])) < tolerances.FORMULAS_AGREE, name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", AWKWARD)
def test_shapes(shape, norm):
    compare(Case(*AWKWARD[shape], dtype=torch.float64, norm=norm), under_test=noisy_bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", FEW)
def test_forward_in_every_dtype(shape, layout, dtype):
    case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm="running")
    compare(case, backward=False, under_test=noisy_bias)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_options(norm, activation, bias, affine, skip):
    shape, mid = AWKWARD["primes"]
    case = Case(
        shape,
        mid,
        dtype=torch.float64,
        norm=norm,
        activation=activation,
        bias=bias,
        affine=affine,
        skip=skip,
    )
    compare(case, under_test=noisy_bias)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    shape, mid = EMPTY
    case = Case(shape, mid, norm="batch" if training else "running")
    d = data(case)
    expected, got = plain(case, d), run(build(CoordAtt, case, d.params), d.x, d.grad)
    assert got.keys() == expected.keys()
    for name in expected:
        tolerances.assert_same_bits(got[name].abs(), expected[name].abs(), name)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", TWO)
def test_functional_form(shape, norm):
    """coord_att takes every parameter explicitly and moves the running statistics it is given."""
    case = Case(*AWKWARD[shape], dtype=torch.float64, norm=norm)
    d = data(case)
    expected = truth(case, d, backward=False)
    p = {k: v.clone() for k, v in d.params.items()}
    tracked = torch.zeros((), dtype=torch.long)
    out = coord_att(
        d.x,
        p["conv1.weight"],
        p["conv1.bias"],
        p.get("bn1.weight"),
        p.get("bn1.bias"),
        p.get("bn1.running_mean"),
        p.get("bn1.running_var"),
        p["conv_h.weight"],
        p["conv_h.bias"],
        p["conv_w.weight"],
        p["conv_w.bias"],
        training=norm == "batch",
        num_batches_tracked=tracked if norm == "batch" else None,
    )
    assert max(tolerances.errors(out, expected["out"])) < tolerances.FORMULAS_AGREE
    assert tracked.item() == (norm == "batch")
    for name in ("bn1.running_mean", "bn1.running_var"):
        if name in expected:
            assert max(tolerances.errors(p[name], expected[name])) < tolerances.FORMULAS_AGREE


def test_state_is_the_papers():
    """Same children in the same order, same keys, same values from the same seed."""
    seeds.seed(3)
    theirs = PaperCoordAtt(48, 48, reduction=4)
    seeds.seed(3)
    ours = CoordAtt(48, 48, reduction=4)
    assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
    a, b = theirs.state_dict(), ours.state_dict()
    assert list(a) == list(b) and len(b) == 11
    for name in a:
        tolerances.assert_same_bits(a[name], b[name], name) if a[name].is_floating_point() else None
        assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype
    seeds.seed(3)
    PaperCoordAtt(48, 48, reduction=4)
    after_theirs = torch.rand(4)
    seeds.seed(3)
    CoordAtt(48, 48, reduction=4)
    assert torch.equal(after_theirs, torch.rand(4))
