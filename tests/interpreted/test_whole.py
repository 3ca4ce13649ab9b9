"""The whole function on Triton's kernels: inference, training, every gradient, running statistics."""

import pytest
import test_registration
import tolerances
import torch
from checking import agree, compare, on_triton
from harness import FLOATS, LAYOUTS, Case, build, data, feature_map, plain, run
from paper import ACTIVATIONS, PaperCoordAtt
from shapes import AWKWARD
from test_forward import arguments
from test_nonfinite import not_finite, same_kind
from test_registration import CASES, OPS, fits, sample
from torch import nn
from torch.library import opcheck

from coordatt_fast import CoordAtt, coord_att, explain
from coordatt_fast.kernels import launch

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
    case = Case((2, 5, 4, 3), 9, FLOATS[dtype])
    d = data(case)
    modules = [build(PaperCoordAtt, case, d.params, torch.float64), build(CoordAtt, case, d.params)]
    for module in modules:
        module.bn1.momentum = momentum
        for seed in range(3):
            module(data(case, seed).x.to(module.conv1.weight.dtype))
        assert module.bn1.num_batches_tracked.item() == 3
    bound = 1e-13 if case.dtype is torch.float64 else 1e-6
    for name in ("running_mean", "running_var"):
        expected, got = (getattr(m.bn1, name) for m in modules)
        assert max(tolerances.errors(got, expected)) < bound, name


NAMES = ["x"] + [f"{m}.{p}" for m in ("conv1", "bn1", "conv_h", "conv_w") for p in ("weight", "bias")]


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_only_what_is_asked_for(norm, guarded):
    case = Case((2, 17, 5, 4), 9, norm=norm)
    d = data(case)
    everything = on_triton(case, d)
    for wanted in [[n] for n in NAMES] + [["conv_h.weight", "conv_w.weight"], ["x", "bn1.weight"]]:
        module = build(CoordAtt, case, d.params)
        for name, p in module.named_parameters():
            p.requires_grad_(name in wanted)
        x = d.x.detach().requires_grad_("x" in wanted)
        guarded.clear()
        module(x).backward(d.grad)
        got = {n: p.grad for n, p in module.named_parameters()} | {"x": x.grad}
        for name in NAMES:
            if name in wanted:
                tolerances.assert_same_bits(got[name], everything["d " + name], name)
            else:
                assert got[name] is None, name
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


VIEWS = {
    "sliced channels": lambda x: torch.cat([x, x], 1)[:, 2 : 2 + x.shape[1]],
    "sliced columns": lambda x: torch.cat([x, x], 3)[..., 1 : 1 + x.shape[3]],
    "every second image": lambda x: torch.cat([x, x])[::2],
    "expanded images": lambda x: x[:1].expand_as(x),
    "expanded columns": lambda x: x[..., :1].expand_as(x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "nhwc of more channels": lambda x: torch.cat([x, x], 1)
    .contiguous(memory_format=torch.channels_last)[:, 2 : 2 + x.shape[1]],
}  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view):
    case = Case((2, 9, 4, 5), 9, torch.float64)
    d = data(case)
    x, grad = VIEWS[view](d.x), VIEWS[view](d.grad)
    theirs = run(build(PaperCoordAtt, case, d.params), x, grad)
    ours = run(build(CoordAtt, case, d.params), x, grad)
    for name in theirs:
        if name != "d conv1.bias":
            assert max(tolerances.errors(ours[name], theirs[name])) < tolerances.FORMULAS_AGREE, name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_not_finite(layout, activation, value):
    """In the same places as plain PyTorch's; backward as far as test_nonfinite.py holds every backend to it."""
    for norm in ("batch", "running", "none"):
        case = Case((2, 5, 4, 3), 9, layout=layout, norm=norm, activation=activation)
        d = data(case)
        d.x[1, 2, 3, 1] = value
        backward = value != value and activation == "hard_swish"
        theirs, ours = plain(case, d, backward), on_triton(case, d, backward)
        for name in theirs:
            if name not in case.exactly_zero:
                same_kind(ours[name], theirs[name], f"{name}, {norm}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_not_finite(layout, value):
    for norm in ("batch", "running"):
        case = Case((2, 5, 4, 3), 9, layout=layout, norm=norm)
        d = data(case)
        d.grad[1, 2, 3, 1] = value
        theirs, ours = plain(case, d), on_triton(case, d)
        for name in theirs:
            if name not in case.exactly_zero:
                same_kind(ours[name], theirs[name], name, {"not finite": not_finite})


def test_out_and_inplace():
    for layout in LAYOUTS:
        case = Case(*AWKWARD["primes"], layout=layout, norm="running", skip=True)
        d = data(case)
        expected = on_triton(case, d, backward=False)["out"]
        with torch.no_grad():
            for out in (torch.empty_like(d.x), d.x.new_zeros(d.x.shape), d.x.new_zeros(d.x.shape).mT.contiguous().mT):
                coord_att(d.x, *arguments(d.params), skip=True, out=out)
                tolerances.assert_same_bits(out, expected)
            x = d.x.clone()
            coord_att(x, *arguments(d.params), skip=True, inplace=True)
            tolerances.assert_same_bits(x, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout, training, guarded):
    case = Case((0, 16, 5, 7), 8, layout=layout, norm="batch" if training else "running")
    d = data(case)
    theirs, ours = plain(case, d), run(build(CoordAtt, case, d.params), d.x, d.grad)
    for name, value in theirs.items():
        tolerances.assert_same_bits(ours[name].abs(), value.abs(), name)
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
    """Another normalisation in between: pool, gate and their backward passes."""
    dtype = FLOATS[dtype]
    generator = torch.Generator().manual_seed(3)
    for shape in ((2, 6, 5, 7), (1, 3, 2, 1030)):
        x = feature_map(shape, generator, dtype, layout)
        grad = feature_map(shape, generator, dtype, layout)
        torch.manual_seed(1)
        module = CoordAtt(shape[1], shape[1], mid_channels=4, skip=True).to(dtype)
        module.bn1 = nn.GroupNorm(2, 4).to(dtype)
        assert explain(module, x).tier == "hybrid" and explain(module, x).backend == "triton"
        guarded.clear()
        ours = run(module, x, grad)
        names = {"pool_kernel", "gate_logits_kernel", "gate_backward_kernel", "pool_backward_kernel"}
        assert set(guarded) == names
        module.zero_grad()
        from coordatt_fast import use_backend

        with use_backend("reference"):
            theirs = run(module, x, grad)
        bound = 16 * torch.finfo(dtype).eps
        for name in theirs:
            assert max(tolerances.errors(ours[name], theirs[name])) < bound, name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", ["nchw float32 batch", "nhwc bfloat16 batch skip", "nchw float64 none silu", "empty"])
def test_opcheck(op, case, monkeypatch):
    monkeypatch.setattr(test_registration, "ops", lambda: torch.ops.coordatt_fast_triton)
    case = CASES[case]
    if not fits(op, case):
        return
    arguments, keywords = sample(op, case)
    opcheck(
        getattr(torch.ops.coordatt_fast_triton, op).default, arguments, keywords,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
