"""The whole function on Triton's kernels: inference, training, every gradient, running statistics."""

import promises
import pytest
import test_registration
import tolerances
import torch
from checking import agree, compare, on_triton
from harness import FLOATS, LAYOUTS, Case, build, data
from paper import ACTIVATIONS, PaperCoordAtt
from shapes import AWKWARD
from test_nonfinite import takes_slopes_at_kinks
from test_registration import CASES, OPS
from test_strides import RELAYOUTS

from coordatt_fast import CoordAtt, reference
from coordatt_fast.kernels import entries, launch

SMALL = ["all-ones", "one-channel", "H=1", "W=1", "mid>C"]
MEDIUM = ["primes", "W=7", "W=17", "mid=1", "mid=30", "mid=88", "C=129"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("shape", SMALL)
def test_small_shapes(shape, norm, layout):
    compare(Case(*AWKWARD[shape], layout=layout, norm=norm))


@pytest.mark.parametrize("shape", MEDIUM)
def test_shapes(shape):
    layout = "nhwc" if len(shape) % 2 else "nchw"
    compare(Case(*AWKWARD[shape], layout=layout, norm="batch"))
    compare(Case(*AWKWARD[shape], layout="nchw", norm="running"), backward=False)


@pytest.mark.parametrize("shape", ["W=14", "H=129"])
def test_large_shapes(shape):
    (_, c, h, w), mid = AWKWARD[shape]
    compare(Case((1, min(c, 17), h, w), mid, norm="batch"))
    compare(Case((1, min(c, 17), h, w), mid, layout="nhwc", norm="running"), backward=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("shape", ["primes", "W=7"])
def test_dtypes(shape, norm, dtype, layout):
    (_, c, h, w), mid = AWKWARD[shape]
    compare(Case((2, min(c, 19), h, w), mid, dtype=FLOATS[dtype], layout=layout, norm=norm))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("norm", ["batch", "running"])
def test_half_x_with_float32_parameters(norm, dtype):
    compare(Case(*AWKWARD["primes"], dtype=FLOATS[dtype], autocast=True, norm=norm))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_options(norm, activation, skip):
    for bias, affine in ((True, True), (False, False)):
        case = Case((2, 5, 4, 3), 9, torch.float64, norm=norm, activation=activation, skip=skip)
        agree(case.but(bias=bias, affine=affine))


def test_columns_in_several_tiles():
    """Rows are then added up in memory."""
    for layout in LAYOUTS:
        agree(Case((1, 2, 3, 1030), 8, torch.float64, layout=layout))


def test_many_rows():
    """More rows than one part of the weights' gradients takes, and more than one block of statistics."""
    for layout in LAYOUTS:
        agree(Case((2, 9, 130, 135), 8, torch.float64, layout=layout))


def test_several_tiles_of_rows_in_a_block(monkeypatch):
    """As in batches of more than 8192 rows."""
    monkeypatch.setattr(launch.tables, "row_blocks", lambda rows, rb, nbp: (4, -(-rows // (4 * rb))))
    agree(Case((2, 5, 160, 190), 8, torch.float64))


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(launch, "WIDE_FROM", 0)
    launch._layout_of.cache_clear()
    for layout in LAYOUTS:
        agree(Case((2, 17, 5, 4), 8, torch.float64, layout=layout))
    launch._layout_of.cache_clear()


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_running_statistics(dtype, momentum):
    promises.moves_running_statistics(FLOATS[dtype], momentum)


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_only_what_is_asked_for(norm, guarded):
    case = Case((2, 17, 5, 4), 9, norm=norm)
    d = data(case)
    everything = on_triton(case, d)
    for wanted in promises.WANTED:
        guarded.clear()
        promises.computes_only(wanted, case, d, everything)
        assert ("spread_kernel" in guarded) == ("x" in wanted)
        assert ("weights_kernel" in guarded) == (wanted != ["x"])


def test_launches(guarded):
    """Two in inference; three in training, which also move the running statistics; four in backward."""
    case = Case((2, 17, 5, 4), 9)
    d = data(case)
    module = build(CoordAtt, case, d.params)
    out = module(d.x.requires_grad_())
    assert guarded == ["pool_kernel", "stats_kernel", "gate_kernel"]
    guarded.clear()
    out.backward(d.grad)
    assert guarded == ["reduce_kernel", "mix_backward_kernel", "weights_kernel", "spread_kernel"]
    guarded.clear()
    with torch.no_grad():
        module.eval()(d.x)
    assert guarded == ["pool_kernel", "gate_kernel"]


def test_same_bits_again():
    for layout in LAYOUTS:
        case = Case(*AWKWARD["primes"], layout=layout)
        d = data(case)
        first, second = on_triton(case, d), on_triton(case, d)
        for name, value in first.items():
            tolerances.assert_same_bits(second[name], value, name)


VIEWS = RELAYOUTS | {
    "expanded images": lambda x: x[:1].expand_as(x),
    "expanded columns": lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view):
    promises.takes_strides(VIEWS[view])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_not_finite(layout, activation, value):
    for norm in ("batch", "running", "none"):
        case = Case((2, 5, 4, 3), 9, layout=layout, norm=norm, activation=activation)
        promises.keeps_not_finite(case, value, on_triton)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_not_finite(layout, value):
    promises.keeps_gradients_not_finite(layout, value, on_triton)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_where_the_activation_is_flat(activation):
    promises.keeps_gradients_where_the_activation_is_flat(activation, on_triton)
    takes_slopes_at_kinks(activation, on_triton)


def test_an_unknown_activation_is_refused():
    case = Case((1, 5, 4, 3), 9)
    arguments = test_registration.sample("attend", case.but(norm="running"))
    with pytest.raises(Exception, match="no such activation"):
        torch.ops.coordatt_fast_triton.attend(*arguments[:-2], 4, False)


@pytest.mark.parametrize("shape", promises.AMBIGUOUS, ids=str)
def test_strides_of_the_result(shape):
    module = CoordAtt(shape[1], shape[1])
    w1, wh, ww = module.conv1.weight, module.conv_h.weight, module.conv_w.weight
    n, c, h, w = shape
    s_h, s_w = torch.randn(n, c, h, 1), torch.randn(n, c, 1, w)
    for dense in promises.DENSE.values():
        x = dense(torch.randn(shape))
        for skip in (False, True):
            expected = reference.gate(x, s_h, s_w, skip).stride()
            with entries.record([]):
                weights = w1, None, None, None, None, None, 1e-5, wh, None, ww, None
                assert launch.gate(x, s_h, s_w, skip).stride() == expected
                assert launch.attend(x, *weights, 0, skip).stride() == expected
                assert launch.attend_train(x, *weights, 0, 0, skip)[0].stride() == expected


def test_batches_are_counted_in_any_dtype():
    promises.counts_batches(torch.tensor(2, dtype=torch.int32), None)
    promises.counts_batches(torch.tensor(2.0), 0.1)


@pytest.mark.parametrize("op", OPS)
def test_what_the_kernels_refuse(op, monkeypatch):
    promises.refuses_wrong_tensors(op, torch.ops.coordatt_fast_triton, monkeypatch)


@pytest.mark.parametrize("training", [True, False])
def test_eps(training):
    module = CoordAtt(8, 8).train(training)
    module.bn1.eps = -1e-5
    with pytest.raises(ValueError, match="eps.*-1e-05"):
        module(torch.randn(1, 8, 4, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_and_inplace(layout):
    promises.writes_out_and_inplace(layout, on_triton)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout, training, guarded):
    promises.takes_empty_batches(layout, training)
    assert set(guarded) <= {"update_kernel"}


def test_double_backward_goes_through_the_reference():
    case = Case((2, 5, 4, 3), 9, torch.float64)
    d = data(case)
    results = []
    for cls in (PaperCoordAtt, CoordAtt):
        module = build(cls, case, d.params)
        x = d.x.detach().requires_grad_()
        (first,) = torch.autograd.grad(module(x), x, d.grad, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert max(tolerances.errors(results[1], results[0])) < tolerances.FORMULAS_AGREE


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hybrid(layout, dtype, guarded):
    for shape in ((2, 6, 5, 7), (1, 3, 2, 1030)):
        guarded.clear()
        promises.serves_hybrids(shape, FLOATS[dtype], layout, "triton")
        names = {"pool_kernel", "gate_logits_kernel", "gate_backward_kernel", "pool_backward_kernel"}
        assert set(guarded) == names


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", promises.OPCHECKED)
def test_opcheck(op, case, monkeypatch):
    monkeypatch.setattr(test_registration, "ops", lambda: torch.ops.coordatt_fast_triton)
    promises.passes_opcheck(op, CASES[case], torch.ops.coordatt_fast_triton)
