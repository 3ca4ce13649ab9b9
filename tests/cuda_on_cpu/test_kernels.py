"""The whole function on the CUDA kernels: every way forward, every gradient, running statistics."""

import checking
import pytest
import test_registration
import tolerances
import torch
from checking import A100, H200, RTX_5090, agree, compare, kernels, on_cuda
from harness import FLOATS, LAYOUTS, Case, build, data, feature_map, plain, run
from paper import ACTIVATIONS, PaperCoordAtt
from shapes import AWKWARD
from test_forward import arguments
from test_nonfinite import not_finite, same_kind
from test_registration import CASES, OPS, fits, sample
from test_strides import RELAYOUTS
from torch import nn
from torch.library import opcheck

from coordatt_fast import CoordAtt, coord_att, explain, use_backend

TRAINING = ["pool_kernel", "statistics_kernel", "gate_kernel"]
BACKWARD = ["reduce_kernel", "rows_kernel", "spread_kernel"]
NAMES = ["x"] + [f"{m}.{p}" for m in ("conv1", "bn1", "conv_h", "conv_w") for p in ("weight", "bias")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", AWKWARD)
def test_shapes(shape, layout):
    compare(Case(*AWKWARD[shape], layout=layout))


@pytest.mark.parametrize("shape", ["all-ones", "primes", "W=28", "W=112", "C=129", "mid=88", "many-images", "large"])
def test_shapes_with_given_statistics(shape):
    for layout in LAYOUTS:
        compare(Case(*AWKWARD[shape], layout=layout, norm="running"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", ["primes", "W=7", "W=56", "W=16"])
def test_dtypes(shape, dtype, layout):
    for norm in ("batch", "running"):
        compare(Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm=norm))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_x_with_float32_parameters(dtype):
    for norm in ("batch", "running"):
        compare(Case(*AWKWARD["primes"], dtype=FLOATS[dtype], autocast=True, norm=norm))


@pytest.mark.parametrize("device", [A100, RTX_5090], ids=["sm_80", "sm_120"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_devices(device, layout):
    """sm_80 has no bulk copies; sm_120 less shared memory."""
    checking.emulator.set_device(**device)
    for name in ("primes", "W=56", "W=112", "deep"):
        (n, c, h, w), mid = AWKWARD[name]
        for dtype in FLOATS:
            agree_or_compare = agree if dtype == "float64" else compare
            agree_or_compare(Case((n, min(c, 21), h, w), min(mid, 8), dtype=FLOATS[dtype], layout=layout))


@pytest.mark.parametrize("device", [H200, RTX_5090], ids=["sm_90", "sm_120"])
def test_many_pieces(device):
    """More than the stages of the ring hold, and more than one group of channels; the longest lines."""
    checking.emulator.set_device(**device)
    for layout in LAYOUTS:
        for shape in ((1, 13, 96, 80), (2, 3, 130, 135), (1, 2, 3, 2040), (1, 2, 2045, 3)):
            agree(Case(shape, 8, torch.float64, layout=layout))
        compare(Case((1, 26, 96, 80), 8, layout=layout))


def test_middle_in_chunks():
    """Its rows times lines are beyond what passes through shared memory at a time."""
    for layout in LAYOUTS:
        agree(Case((2, 10, 41, 62), 90, torch.float64, layout=layout))
        agree(Case((1, 6, 5, 3), 700, torch.float64, layout=layout))


def test_little_shared_memory():
    checking.emulator.set_device(arch=90, processors=4, shared_memory=30000)
    for layout in LAYOUTS:
        agree(Case((2, 24, 33, 47), 9, torch.float64, layout=layout))
        agree(Case((1, 40, 130, 12), 9, torch.float64, layout=layout))
        agree(Case((1, 3, 7, 5), 700, torch.float64, layout=layout))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_options(norm, activation, skip):
    for bias, affine in ((True, True), (False, False)):
        case = Case((2, 5, 4, 3), 9, torch.float64, norm=norm, activation=activation, skip=skip)
        agree(case.but(bias=bias, affine=affine))
        checking.emulator.set_forward("resident" if norm == "batch" else "cluster:2")
        agree(case.but(bias=bias, affine=affine))
        agree(case.but(bias=bias, affine=affine, norm="none" if norm == "none" else "running"), backward=False)


# The one-pass kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
def test_one_pass(cluster, dtype):
    """Also more images than clusters, channels that do not divide, unaligned planes, several pieces to a block."""
    for shape in ((1, 16, 1, 2), (3, 17, 13, 7), (5, 33, 7, 7), (1, 8, 56, 56), (4, 18, 28, 28), (2, 16, 14, 14)):
        if cluster > shape[1]:
            continue
        checking.emulator.set_forward(f"cluster:{cluster}")
        case = Case(shape, 8, dtype=FLOATS[dtype], norm="running")
        compare(case, backward=False)
        assert set(kernels()) == {"one_pass_kernel"}, (shape, cluster)


def test_one_pass_is_the_same_in_any_schedule():
    for cluster in (1, 4, 8):
        checking.emulator.set_forward(f"cluster:{cluster}")
        case = Case((7, 33, 14, 14), 9, norm="running")
        d = data(case)
        results = [on_cuda(case, d, backward=False)["out"] for _ in range(6)]
        for other in results[1:]:
            tolerances.assert_same_bits(other, results[0])


def test_one_pass_takes_what_fits():
    emulator = checking.emulator
    emulator.set_forward("any")
    way = lambda shape, **more: torch.ops.coordatt_fast_cuda_on_cpu.cuda_forward_way(torch.zeros(shape, **more), 8, False)
    assert way((1, 16, 14, 14)).startswith("cluster:")
    assert way((1, 96, 112, 112)) == "chain"
    assert way((1, 16, 14, 14), dtype=torch.bfloat16).startswith("cluster:")
    assert torch.ops.coordatt_fast_cuda_on_cpu.cuda_forward_way(
        torch.zeros(1, 16, 14, 14).contiguous(memory_format=torch.channels_last), 8, False
    ) == "chain"
    emulator.set_device(**A100)
    assert way((1, 16, 14, 14)) == "chain"
    emulator.set_device(**H200)
    emulator.set_forward("")
    assert way((1, 16, 14, 14)) == "chain"  # no way has been verified on a GPU


def test_forced_ways_have_names():
    for name in ("cluster:3", "cluster:", "cluster:16x", "both", "cluster:32"):
        assert not checking.emulator.set_forward(name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_resident_training(dtype, layout):
    for name in ("all-ones", "primes", "W=7", "W=56", "C=129", "W=1", "mid=88"):
        checking.emulator.set_device(**(A100 if name in ("W=7", "W=56") else H200))
        checking.emulator.set_forward("resident")
        checking.emulator.launches()
        (n, c, h, w), mid = AWKWARD[name]
        compare(Case((n, min(c, 33), h, w), mid, dtype=FLOATS[dtype], layout=layout))
        assert set(kernels()) == {"resident_kernel", *BACKWARD}
    compare(Case(*AWKWARD["primes"], dtype=FLOATS[dtype], layout=layout, norm="running"))


# What every backend promises --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["chain", "resident"])
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_running_statistics(dtype, momentum, way):
    checking.emulator.set_forward(way)
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


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_by_the_operator_alone(momentum):
    """Compiled code moves them after the forward pass."""
    squeezed, mean, var = torch.zeros(10, 5), torch.randn(5), torch.rand(5)
    expected_mean, expected_var, factor = torch.ones(5), torch.full((5,), 2.0), momentum or 1 / 8
    expected_mean.lerp_(mean, factor)
    expected_var.lerp_(var * 10 / 9, factor)
    got = torch.ones(5, 2)[:, 0], torch.full((5,), 2.0), torch.tensor(7)
    torch.ops.coordatt_fast_cuda_on_cpu.update_running_stats(*got, squeezed, mean, var, momentum)
    assert got[2].item() == 8
    for a, b in zip(got, (expected_mean, expected_var)):
        assert torch.allclose(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_only_what_is_asked_for(norm):
    case = Case((2, 17, 5, 4), 9, norm=norm)
    d = data(case)
    everything = on_cuda(case, d)
    for wanted in [[n] for n in NAMES] + [["conv_h.weight", "conv_w.weight"], ["x", "bn1.weight"]]:
        module = build(CoordAtt, case, d.params)
        for name, p in module.named_parameters():
            p.requires_grad_(name in wanted)
        x = d.x.detach().requires_grad_("x" in wanted)
        module(x).backward(d.grad)
        got = {n: p.grad for n, p in module.named_parameters()} | {"x": x.grad}
        for name in NAMES:
            if name in wanted:
                tolerances.assert_same_bits(got[name], everything["d " + name], name)
            else:
                assert got[name] is None, name


def test_launches():
    """Two in inference or one; three in training or one; three in backward."""
    case = Case((2, 17, 5, 4), 9)
    d = data(case)
    module = build(CoordAtt, case, d.params)
    for way, forward in (("chain", TRAINING), ("resident", ["resident_kernel"])):
        checking.emulator.set_forward(way)
        out = module(d.x.requires_grad_())
        assert kernels() == forward
        assert explain(module, d.x).passes["forward"] == ((2, 1) if way == "chain" else (1, 1))
        out.backward(d.grad)
        assert kernels() == BACKWARD
    for way, forward in (("chain", ["pool_kernel", "gate_kernel"]), ("cluster:4", ["one_pass_kernel"])):
        checking.emulator.set_forward(way)
        with torch.no_grad():
            module.eval()(d.x)
            assert kernels() == forward
            plan = explain(module, d.x)
            assert plan.passes["forward"] == ((2, 1) if way == "chain" else (1, 1)) and way in plan.reason


@pytest.mark.parametrize("way", ["chain", "resident"])
def test_same_bits_in_any_schedule(way):
    checking.emulator.set_forward(way)
    for layout in LAYOUTS:
        case = Case((2, 21, 40, 36), 9, layout=layout)
        d = data(case)
        first, *others = (on_cuda(case, d) for _ in range(4))
        for other in others:
            for name, value in first.items():
                tolerances.assert_same_bits(other[name], value, name)


@pytest.mark.parametrize("lay", RELAYOUTS)
def test_strides(lay):
    """x and the gradient wherever they lie."""
    for way in ("chain", "resident"):
        checking.emulator.set_forward(way)
        case = Case((2, 9, 4, 5), 9, torch.float64)
        d = data(case)
        x, grad = RELAYOUTS[lay](d.x), RELAYOUTS[lay](d.grad)
        theirs = run(build(PaperCoordAtt, case, d.params), x, grad)
        ours = run(build(CoordAtt, case, d.params), x, grad)
        for name in theirs:
            if name != "d conv1.bias":
                assert max(tolerances.errors(ours[name], theirs[name])) < tolerances.FORMULAS_AGREE, name
    checking.emulator.set_forward("cluster:2")
    case = case.but(norm="running")
    module, plain_module = (build(cls, case, d.params) for cls in (CoordAtt, PaperCoordAtt))
    ours, theirs = (run(m, x)["out"] for m in (module, plain_module))
    assert max(tolerances.errors(ours, theirs)) < tolerances.FORMULAS_AGREE


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite(activation, value):
    for layout in LAYOUTS:
        for norm in ("batch", "running", "none"):
            case = Case((2, 5, 4, 3), 9, layout=layout, norm=norm, activation=activation)
            d = data(case)
            d.x[1, 2, 3, 1] = value
            backward = value != value and activation == "hard_swish"
            theirs = plain(case, d, backward)
            for way in ("chain", "resident", "cluster:2"):
                checking.emulator.set_forward(way)
                ours = on_cuda(case, d, backward)
                for name in theirs:
                    if name not in case.exactly_zero:
                        same_kind(ours[name], theirs[name], f"{name}, {norm}, {way}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_not_finite(layout, value):
    for norm in ("batch", "running"):
        case = Case((2, 5, 4, 3), 9, layout=layout, norm=norm)
        d = data(case)
        d.grad[1, 2, 3, 1] = value
        theirs, ours = plain(case, d), on_cuda(case, d)
        for name in theirs:
            if name not in case.exactly_zero:
                same_kind(ours[name], theirs[name], name, {"not finite": not_finite})


def test_out_and_inplace():
    for way in ("chain", "cluster:2"):
        for layout in LAYOUTS:
            checking.emulator.set_forward(way)
            case = Case(*AWKWARD["primes"], layout=layout, norm="running", skip=True)
            d = data(case)
            expected = on_cuda(case, d, backward=False)["out"]
            crossways = d.x.new_zeros(d.x.shape).mT.contiguous().mT
            shifted = torch.cat([d.x.new_full((1,), torch.nan), d.x.flatten()])[1:].view(d.x.shape)
            with torch.no_grad():
                for out in (torch.empty_like(d.x), d.x.new_zeros(d.x.shape), crossways, shifted):
                    coord_att(d.x, *arguments(d.params), skip=True, out=out)
                    tolerances.assert_same_bits(out, expected)
                x = d.x.clone()
                coord_att(x, *arguments(d.params), skip=True, inplace=True)
                tolerances.assert_same_bits(x, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout, training):
    case = Case((0, 16, 5, 7), 8, layout=layout, norm="batch" if training else "running")
    d = data(case)
    theirs, ours = plain(case, d), run(build(CoordAtt, case, d.params), d.x, d.grad)
    for name, value in theirs.items():
        tolerances.assert_same_bits(ours[name].abs(), value.abs(), name)
    assert set(kernels()) <= {"update_kernel"}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hybrid(layout, dtype):
    """Another normalisation in between: pool, gate and their backward passes."""
    dtype = FLOATS[dtype]
    generator = torch.Generator().manual_seed(3)
    for shape in ((2, 6, 5, 7), (1, 3, 2, 1030), (1, 16, 40, 48)):
        x = feature_map(shape, generator, dtype, layout)
        grad = feature_map(shape, generator, dtype, layout)
        torch.manual_seed(1)
        module = CoordAtt(shape[1], shape[1], mid_channels=4, skip=True).to(dtype)
        module.bn1 = nn.GroupNorm(2, 4).to(dtype)
        assert explain(module, x).tier == "hybrid" and explain(module, x).backend == "cuda"
        kernels()
        ours = run(module, x, grad)
        assert kernels() == ["pool_kernel", "gate_kernel", "reduce_kernel", "spread_kernel"]
        module.zero_grad()
        with use_backend("reference"):
            theirs = run(module.double(), x.double(), grad.double())
        bound = 16 * torch.finfo(dtype).eps
        for name in theirs:
            assert max(tolerances.errors(ours[name], theirs[name])) < bound, name


def test_lines_beyond_shared_memory_are_refused():
    for dtype, w in ((torch.float32, 4096), (torch.float64, 2048)):
        x = torch.zeros(1, 1, 1, w, dtype=dtype)
        with pytest.raises(RuntimeError, match=r"x is too long: H \+ W is above \d+"):
            torch.ops.coordatt_fast_cuda_on_cpu.pool(x)
        torch.ops.coordatt_fast_cuda_on_cpu.pool(x[..., 1:])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", ["nchw float32 batch", "nhwc bfloat16 batch skip", "nchw float64 none silu", "empty"])
def test_opcheck(op, case, monkeypatch):
    monkeypatch.setattr(test_registration, "ops", lambda: torch.ops.coordatt_fast_cuda_on_cpu)
    case = CASES[case]
    if not fits(op, case):
        return
    arguments, keywords = sample(op, case)
    opcheck(
        getattr(torch.ops.coordatt_fast_cuda_on_cpu, op).default, arguments, keywords,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
