"""Every way forward of the CUDA backend computes the function: shapes, dtypes, layouts, options, what is not finite."""

import copy

import on_gpu
import promises
import pytest
import torch
from harness import FLOATS, LAYOUTS, Case, build, data, plain, run
from on_gpu import (
    INFERENCE,
    SIZES,
    TRAINING,
    by,
    close,
    compare,
    forced,
    infer,
    maps,
    modules,
    same_bits,
    step,
    taken,
)
from paper import ACTIVATIONS
from shapes import AWKWARD, FEW
from test_forward import arguments
from test_nonfinite import same_kind
from test_strides import RELAYOUTS

from coordatt_fast import CoordAtt, coord_att

pytestmark = pytest.mark.usefixtures("cuda")

# Rows of every alignment, channels that no cluster divides, more images than clusters, several pieces to a block.
SHAPES = [*FEW, "H=1", "W=1", "W=14", "W=20", "W=28", "W=56", "mid=88", "mid>C", "deep"]
SMALL = {name: AWKWARD[name] for name in SHAPES} | {
    "one image": ((1, 16, 1, 2), 8),
    "400 images": ((400, 33, 7, 7), 8),
    "full blocks": ((4, 64, 28, 28), 8),
    "16 x 9": ((2, 16, 14, 9), 8),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SMALL)
def test_inference(shape, dtype):
    for layout in LAYOUTS:
        case = Case(*SMALL[shape], dtype=FLOATS[dtype], layout=layout, norm="running")
        for way in INFERENCE if layout == "nchw" else ("chain", "cluster:4"):
            compare(case, backward=False, under_test=by(way))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SMALL)
def test_training(shape, dtype):
    for layout in LAYOUTS:
        case = Case(*SMALL[shape], dtype=FLOATS[dtype], layout=layout)
        for way in TRAINING:
            compare(case, under_test=by(way))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_options(norm, activation):
    for skip, bias, affine in ((True, True, True), (False, False, False)):
        case = Case(*AWKWARD["primes"], norm=norm, activation=activation, skip=skip, bias=bias, affine=affine)
        compare(case, under_test=by("resident"))
        if norm != "batch":
            for way in ("chain", "cluster:2", "cluster:16"):
                compare(case, backward=False, under_test=by(way))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_x_with_float32_parameters(dtype):
    for norm, way in (("batch", "resident"), ("running", "cluster:4")):
        case = Case(*AWKWARD["primes"], dtype=FLOATS[dtype], autocast=True, norm=norm)
        compare(case, backward=norm == "batch", under_test=by(way))


def ways_taken(x, mid):
    inference = [way for way in INFERENCE if taken(way, x, mid, False)]
    return inference, [way for way in TRAINING if taken(way, x, mid, True)]


def test_every_way_is_taken():
    """On a device with clusters; which ones have room for a map is the device's matter."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no clusters before sm_90")
    x = maps((2, 64, 14, 14), count=1)[0]
    assert ways_taken(x, 8) == ([*INFERENCE], [*TRAINING])
    assert ways_taken(maps((2, 64, 14, 14), layout="nhwc", count=1)[0], 8) == (["chain"], [*TRAINING])
    assert ways_taken(maps((16, 96, 112, 112), count=1)[0], 8) == (["chain"], ["chain"])
    found = on_gpu.outline(x, 8, False)
    assert found["way"] == "chain" or found["held"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [size for size in SIZES if size != "large"])
def test_numbers(size, dtype):
    """At full size, every way that there is room for."""
    shape, mid = SIZES[size]
    for layout in LAYOUTS:
        x, grad = maps(shape, FLOATS[dtype], layout)
        ours, plain_module = modules(shape[1], mid, FLOATS[dtype])
        exact = copy.deepcopy(plain_module).double()
        inference, training = ways_taken(x, mid)
        truth, theirs = ({"out": infer(m, t)} for m, t in ((exact, x.double()), (plain_module, x)))
        for way in inference:
            with forced(way):
                close({"out": infer(ours, x)}, theirs, truth)
        if training == ["chain"]:  # test_gpu.py's
            continue
        start = copy.deepcopy(ours.state_dict())
        truth, theirs = step(exact.train(), x.double(), grad.double()), step(plain_module.train(), x, grad)
        ours.load_state_dict(start)
        with forced("resident"):
            close(step(ours.train(), x, grad), theirs, truth)


@pytest.mark.parametrize("lay", RELAYOUTS)
def test_strides(lay):
    """x and the gradient wherever they lie: sliced, transposed, shifted by an element."""
    for shape in ((2, 9, 4, 5), (3, 16, 7, 9)):
        for dtype in ("float32", "bfloat16"):
            case = Case(shape, 9, FLOATS[dtype])
            d = data(case)
            x, grad = (t.to(on_gpu.DEVICE) for t in (d.x, d.grad))
            moved_x, moved_grad = RELAYOUTS[lay](x), RELAYOUTS[lay](grad)
            module = build(CoordAtt, case, d.params).to(on_gpu.DEVICE)
            slack = 64 * torch.finfo(torch.float32).eps + torch.finfo(case.dtype).eps
            for way in TRAINING:
                with forced(way):
                    expected, found = step(module, x, grad), step(module, moved_x, moved_grad)
                for name in set(expected) - {"bn1.running_mean", "bn1.running_var"}:
                    scale = expected[name].abs().max().item()
                    assert torch.allclose(found[name], expected[name], rtol=slack, atol=slack * scale), (name, way)
            expected = infer(module, x)
            for way in INFERENCE:
                with forced(way):
                    assert torch.allclose(infer(module, moved_x), expected, rtol=slack, atol=slack * 4), way


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_not_finite(layout, value):
    for norm in ("batch", "running"):
        case = Case((2, 19, 6, 21), 9, layout=layout, norm=norm)
        d = data(case)
        for place in ((0, 0, 0, 0), (1, 18, 5, 20), (0, 7, 3, 16)):
            d.x[place] = value
            theirs = plain(case, d, backward=False)
            for way in TRAINING if norm == "batch" else INFERENCE:
                ours = by(way)(case, d, backward=False)
                for name in theirs:
                    same_kind(ours[name], theirs[name], f"{name}, {norm}, {way}, {place}")
            d.x[place] = 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_not_finite(layout, value):
    promises.keeps_gradients_not_finite(layout, value, by("chain"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout, training):
    case = Case((0, 16, 5, 7), 8, layout=layout, norm="batch" if training else "running")
    d = data(case)
    theirs = plain(case, d)
    for way in ("chain", "resident", "cluster:2"):
        with forced(way):
            ours = run(build(CoordAtt, case, d.params).to(on_gpu.DEVICE), d.x.to(on_gpu.DEVICE), d.grad.to(on_gpu.DEVICE))
        for name, value in theirs.items():
            same_bits(ours[name].cpu().abs(), value.abs(), name)


def test_out_and_inplace():
    case = Case(*AWKWARD["primes"], norm="running", skip=True)
    d = data(case)
    parameters = [t if t is None else t.to(on_gpu.DEVICE) for t in arguments(d.params)]
    x = d.x.to(on_gpu.DEVICE)
    for way in INFERENCE:
        with forced(way), torch.no_grad():
            expected = coord_att(x, *parameters, skip=True)
            shifted = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)
            for out in (torch.empty_like(x), x.new_zeros(x.shape).mT.contiguous().mT, shifted):
                coord_att(x, *parameters, skip=True, out=out)
                same_bits(out.contiguous(), expected, way)
            same = x.clone()
            coord_att(same, *parameters, skip=True, inplace=True)
            same_bits(same, expected, way)


@pytest.mark.parametrize("way", [*INFERENCE, "resident"])
def test_same_bits_every_time(way):
    for shape in ((7, 33, 14, 14), (40, 64, 28, 28), (3, 17, 13, 7)):
        for dtype in ("float32", "bfloat16"):
            x, grad = maps(shape, FLOATS[dtype])
            ours, _ = modules(shape[1], 8, FLOATS[dtype])
            start = copy.deepcopy(ours.state_dict())
            with forced(way):
                expected = infer(ours, x)
                for _ in range(5):
                    same_bits(infer(ours, x), expected, f"{way}, {shape}")
                if way not in TRAINING:
                    continue
                expected = step(ours.train(), x, grad)
                for _ in range(5):
                    ours.load_state_dict(start)
                    for name, value in step(ours, x, grad).items():
                        same_bits(value, expected[name], f"{name}, {way}, {shape}")
