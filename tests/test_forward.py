"""Inference: the fused forward against float64, in every dtype, layout and configuration."""

import pytest
import tolerances
import torch
from harness import FLOATS, LAYOUTS, Case, build, compare, data, fused, plain, run
from paper import ACTIVATIONS
from shapes import AWKWARD, EMPTY, FEW, TWO

from coordatt_fast import CoordAtt, coord_att, explain

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", AWKWARD)
def test_shapes(shape, dtype, layout):
    case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm="running")
    compare(case, backward=False, under_test=fused)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", FEW)
def test_half_x_with_float32_parameters(shape, dtype, layout):
    """What autocast makes of a float32 network."""
    case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], autocast=True, layout=layout, norm="running")
    compare(case, backward=False, under_test=fused)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["running", "none"])
def test_options(norm, activation, bias, affine, skip):
    options = dict(norm=norm, activation=activation, bias=bias, affine=affine, skip=skip)
    for shape in TWO:
        for dtype in (torch.float32, torch.bfloat16):
            compare(Case(*AWKWARD[shape], dtype=dtype, **options), backward=False, under_test=fused)


@pytest.mark.parametrize("shape", TWO)
def test_training_mode_without_gradients(shape):
    """Batch statistics under no_grad and inference_mode: still no gradient, still the statistics move."""
    case = Case(*AWKWARD[shape], norm="batch")
    compare(case, backward=False, under_test=fused)
    d = data(case)
    module, expected = build(CoordAtt, case, d.params), plain(case, d, backward=False)
    with torch.inference_mode():
        out = module(d.x)
    assert out.is_inference()
    assert max(tolerances.errors(out.clone(), expected["out"])) < 1e-5
    assert max(tolerances.errors(module.bn1.running_var.clone(), expected["bn1.running_var"])) < 1e-5


def arguments(params):
    names = "conv1.weight conv1.bias bn1.weight bn1.bias bn1.running_mean bn1.running_var"
    names += " conv_h.weight conv_h.bias conv_w.weight conv_w.bias"
    return [params.get(name) for name in names.split()]


@pytest.mark.parametrize("norm", ["running", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", FEW)
def test_functional_form_is_the_module(shape, dtype, norm):
    case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], norm=norm)
    d = data(case)
    expected = fused(case, d, backward=False)["out"]
    with torch.no_grad():
        tolerances.assert_same_bits(coord_att(d.x, *arguments(d.params)), expected)
    with torch.inference_mode():
        tolerances.assert_same_bits(coord_att(d.x, *arguments(d.params)).clone(), expected)
    tolerances.assert_same_bits(coord_att(d.x, *arguments(d.params)), expected, "nothing requires a gradient")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", FEW)
def test_out_and_inplace(shape, dtype, layout, skip):
    """out= is written whole, between guards that stay as they were; in place gives the same bits as out of
    place.
    """
    case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm="running", skip=skip)
    d = data(case)
    expected = fused(case, d, backward=False)["out"]
    guard = 64
    memory = torch.full((d.x.numel() + 2 * guard,), torch.nan, dtype=d.x.dtype)
    out = memory.as_strided(d.x.shape, d.x.stride(), guard)
    with torch.no_grad():
        returned = coord_att(d.x, *arguments(d.params), skip=skip, out=out)
        assert returned is out or returned.data_ptr() == out.data_ptr()
        tolerances.assert_same_bits(out, expected, "out=")
        assert torch.isnan(memory[:guard]).all() and torch.isnan(memory[-guard:]).all(), "wrote outside out="
        out.copy_(d.x)
        coord_att(out, *arguments(d.params), skip=skip, out=out)
        tolerances.assert_same_bits(out, expected, "out=x")
        x = d.x.clone()
        returned = coord_att(x, *arguments(d.params), skip=skip, inplace=True)
        assert returned.data_ptr() == x.data_ptr()
        tolerances.assert_same_bits(x, expected, "inplace=True")
        module = build(CoordAtt, case, d.params)
        module._inplace = True
        x = d.x.clone()
        assert module(x).data_ptr() == x.data_ptr()
        tolerances.assert_same_bits(x, expected, "CoordAtt(inplace=True)")


def test_inplace_is_for_inference_only():
    """With gradients on, x is needed for backward: inplace=True must not destroy it, nor return wrong
    gradients.
    """
    case = Case(*AWKWARD["primes"], norm="running")
    d = data(case)
    module = build(CoordAtt, case, d.params)
    module._inplace = True
    kept = d.x.clone()
    try:
        results = run(module, d.x, d.grad)
    except RuntimeError as error:
        assert "inplace" in str(error)
    else:
        expected = fused(case, d)
        for name in expected:
            tolerances.assert_same_bits(results[name], expected[name], name)
    tolerances.assert_same_bits(d.x, kept, "x was overwritten")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_guards_around_x(dtype, layout):
    """x between NaN: a load that reaches outside and is used shows at once."""
    for shape in FEW:
        case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm="running")
        d = data(case)
        expected = fused(case, d, backward=False)["out"]
        memory = torch.full((d.x.numel() + 128,), torch.nan, dtype=d.x.dtype)
        x = memory.as_strided(d.x.shape, d.x.stride(), 63).copy_(d.x)
        with torch.no_grad():
            tolerances.assert_same_bits(build(CoordAtt, case, d.params)(x), expected, shape)


@pytest.mark.parametrize("dtype", FLOATS)
def test_parameters_of_any_strides(dtype):
    case = Case(*AWKWARD["primes"], dtype=FLOATS[dtype], norm="running")
    d = data(case)
    expected = fused(case, d, backward=False)["out"]

    def spread(t):
        wide = torch.full((*t.shape, 3), torch.nan, dtype=t.dtype)
        wide[..., 1] = t
        wide = wide[..., 1]
        return wide.transpose(0, 1).clone().transpose(0, 1) if t.dim() == 4 else wide

    params = {k: spread(v) for k, v in d.params.items()}
    with torch.no_grad():
        tolerances.assert_same_bits(coord_att(d.x, *arguments(params)), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_saturated_gates(dtype):
    """Logits in the hundreds: gates of exactly zero and one, never NaN."""

    def draw(case, seed):
        d = data(case, seed)
        for name in ("conv_h.weight", "conv_w.weight"):
            d.params[name] = d.params[name] * 300
        return d

    case = Case(*AWKWARD["primes"], dtype=FLOATS[dtype], norm="running")
    compare(case, backward=False, under_test=fused, draw=draw)


@pytest.mark.parametrize("eps", [1e-3, 1e-12, 10.0])
def test_eps_is_read_at_call_time(eps):
    case = Case(*AWKWARD["primes"], dtype=torch.float64, norm="running")
    d = data(case)
    from paper import PaperCoordAtt

    ours, theirs = build(CoordAtt, case, d.params), build(PaperCoordAtt, case, d.params)
    ours.bn1.eps = theirs.bn1.eps = eps
    with torch.no_grad():
        assert max(tolerances.errors(ours(d.x), theirs(d.x))) < tolerances.FORMULAS_AGREE
        assert explain(ours, d.x).tier == "fused"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout, dtype):
    shape, mid = EMPTY
    case = Case(shape, mid, dtype=FLOATS[dtype], layout=layout, norm="running")
    out = fused(case, data(case), backward=False)["out"]
    assert out.shape == shape and out.dtype == case.dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_of_float32_x_gives_float32(dtype):
    """Autocast only casts what enters the convolutions: the output keeps x's dtype, as in plain PyTorch."""

    def draw(case, seed):
        d = data(case, seed)
        d.x = d.x.float()
        return d

    case = Case(*AWKWARD["primes"], dtype=FLOATS[dtype], autocast=True, norm="running")
    compare(case, backward=False, draw=draw)
