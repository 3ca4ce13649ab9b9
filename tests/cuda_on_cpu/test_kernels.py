"""The whole function on the CUDA kernels: every way forward, every gradient, running statistics."""

import checking
import promises
import pytest
import test_registration
import tolerances
import torch
from checking import A100, H200, RTX_5090, agree, compare, kernels, on_cuda
from harness import FLOATS, LAYOUTS, Case, build, data, run
from paper import ACTIVATIONS, PaperCoordAtt
from shapes import AWKWARD
from test_nonfinite import takes_slopes_at_kinks
from test_registration import CASES, OPS
from test_strides import RELAYOUTS

from coordatt_fast import CoordAtt, explain

TRAINING = ["pool_kernel", "statistics_kernel", "gate_kernel"]
BACKWARD = ["reduce_kernel", "rows_kernel", "spread_kernel"]


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


# A cluster's size decides how channels and pieces are shared out, a dtype where planes begin and what is converted:
# float64 and float16 differ from the two others in what they convert alone.
CLUSTERS = [(cluster, dtype) for dtype in ("float32", "bfloat16") for cluster in (1, 2, 4, 8, 16)]
CLUSTERS += [(4, "float64"), (4, "float16")]


@pytest.mark.parametrize("cluster, dtype", CLUSTERS)
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
    names = ("all-ones", "primes", "W=7", "W=56", "C=129", "W=1", "mid=88")
    for name in names if dtype in ("float32", "bfloat16") else names[1:3]:
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
    promises.moves_running_statistics(FLOATS[dtype], momentum)


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
    for wanted in promises.WANTED:
        promises.computes_only(wanted, case, d, everything)


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
        promises.takes_strides(RELAYOUTS[lay])
    checking.emulator.set_forward("cluster:2")
    case = Case((2, 9, 4, 5), 9, torch.float64, norm="running")
    d = data(case)
    theirs, ours = (run(build(cls, case, d.params), RELAYOUTS[lay](d.x))["out"] for cls in (PaperCoordAtt, CoordAtt))
    assert max(tolerances.errors(ours, theirs)) < tolerances.FORMULAS_AGREE


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite(activation, value):
    for layout in LAYOUTS:
        for norm in ("batch", "running", "none"):
            case = Case((2, 5, 4, 3), 9, layout=layout, norm=norm, activation=activation)
            for way in ("chain", "resident", "cluster:2"):
                checking.emulator.set_forward(way)
                promises.keeps_not_finite(case, value, on_cuda)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_not_finite(layout, value):
    promises.keeps_gradients_not_finite(layout, value, on_cuda)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_where_the_activation_is_flat(activation):
    promises.keeps_gradients_where_the_activation_is_flat(activation, on_cuda)
    takes_slopes_at_kinks(activation, on_cuda)


@pytest.mark.parametrize("shape", promises.AMBIGUOUS, ids=str)
def test_strides_of_the_result(shape):
    promises.returns_plain_strides(shape)


def test_batches_are_counted_in_any_dtype():
    promises.counts_batches(torch.tensor(2, dtype=torch.int32), None)
    promises.counts_batches(torch.tensor(2.0), 0.1)


@pytest.mark.parametrize("op", OPS)
def test_what_the_kernels_refuse(op, monkeypatch):
    promises.refuses_wrong_tensors(op, torch.ops.coordatt_fast_cuda_on_cpu, monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_and_inplace(layout):
    for way in ("chain", "cluster:2"):
        checking.emulator.set_forward(way)
        promises.writes_out_and_inplace(layout, on_cuda)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout, training):
    promises.takes_empty_batches(layout, training)
    assert set(kernels()) <= {"update_kernel"}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hybrid(layout, dtype):
    for shape in ((2, 6, 5, 7), (1, 3, 2, 1030), (1, 16, 40, 48)):
        kernels()
        promises.serves_hybrids(shape, FLOATS[dtype], layout, "cuda")
        assert kernels() == ["pool_kernel", "gate_kernel", "reduce_kernel", "spread_kernel"]


def test_lines_beyond_shared_memory_are_refused():
    for dtype, w in ((torch.float32, 4096), (torch.float64, 2048)):
        x = torch.zeros(1, 1, 1, w, dtype=dtype)
        with pytest.raises(RuntimeError, match=r"x is too long: H \+ W is above \d+"):
            torch.ops.coordatt_fast_cuda_on_cpu.pool(x)
        torch.ops.coordatt_fast_cuda_on_cpu.pool(x[..., 1:])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", promises.OPCHECKED)
def test_opcheck(op, case, monkeypatch):
    monkeypatch.setattr(test_registration, "ops", lambda: torch.ops.coordatt_fast_cuda_on_cpu)
    promises.passes_opcheck(op, CASES[case], torch.ops.coordatt_fast_cuda_on_cpu)
