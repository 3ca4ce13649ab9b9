"""x and its gradient in every memory layout a network produces: values, and strides of the results."""

import promises
import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, LAYOUTS, Case, build, data, feature_map, run
from shapes import AWKWARD
from torch._subclasses.fake_tensor import FakeTensorMode

from coordatt_fast import CoordAtt, coord_att, explain

pytestmark = pytest.mark.usefixtures("cpu")

SHAPE, MID = (3, 20, 6, 9), 8
PARAMETERS = "conv1.weight conv1.bias bn1.weight bn1.bias bn1.running_mean bn1.running_var".split()
PARAMETERS += "conv_h.weight conv_h.bias conv_w.weight conv_w.bias".split()


def wide(t, dim, before, after, layout):
    """t as a slice of a larger tensor of the layout, NaN around it."""
    size = list(t.shape)
    size[dim] += before + after
    buffer = torch.full(size, torch.nan, dtype=t.dtype).contiguous(memory_format=LAYOUTS[layout])
    view = buffer.narrow(dim, before, t.shape[dim])
    return view.copy_(t)


RELAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "nhwc": lambda t: t.contiguous(memory_format=torch.channels_last),
    "nchw channel slice": lambda t: wide(t, 1, 3, 5, "nchw"),
    "nhwc channel slice": lambda t: wide(t, 1, 3, 5, "nhwc"),
    "nchw second half": lambda t: wide(t, 1, t.shape[1], 0, "nchw"),
    "nhwc second half": lambda t: wide(t, 1, t.shape[1], 0, "nhwc"),
    "nchw batch slice": lambda t: wide(t, 0, 1, 1, "nchw"),
    "nhwc batch slice": lambda t: wide(t, 0, 1, 1, "nhwc"),
    "nchw crop of rows": lambda t: wide(t, 2, 1, 2, "nchw"),
    "nhwc crop of rows": lambda t: wide(t, 2, 1, 2, "nhwc"),
    "nchw crop of columns": lambda t: wide(t, 3, 2, 1, "nchw"),
    "nhwc crop of columns": lambda t: wide(t, 3, 2, 1, "nhwc"),
    "every second image": lambda t: t.repeat_interleave(2, 0)[::2],
    "every second column": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "transposed map": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "images innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channels outermost": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "offset by one element": lambda t: torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(
        t.shape
    ),
}


@pytest.fixture(params=["batch", "running"])
def norm(request):
    return request.param


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("relayout", RELAYOUTS)
def test_layout_of_x(relayout, dtype, norm):
    """Numbers do not depend on where x lies. Slices of a layout come back dense in it, other strides in
    either.
    """
    case = Case(SHAPE, MID, dtype=FLOATS[dtype], norm=norm)
    d = data(case)
    x = RELAYOUTS[relayout](d.x)
    kept = x.clone()
    assert torch.equal(x, d.x)
    module = build(CoordAtt, case, d.params)
    assert explain(module, x).tier == "fused"
    got = run(module, x, d.grad)
    tolerances.assert_same_bits(x, kept, "x was changed")
    # One layout may sum in another order than the other, so equality is up to a few roundings of the
    # arithmetic.
    expected = run(build(CoordAtt, case, d.params), d.x, d.grad)
    slack = 64 * torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    for name in expected:
        stored = torch.finfo(case.dtype).eps
        assert max(tolerances.errors(got[name], expected[name])) <= slack + stored, name
    x = x.detach().requires_grad_()
    out = module(x)
    (dx,) = torch.autograd.grad(out, x, d.grad)
    for t in (out, dx):
        if relayout.startswith("nhwc"):
            assert t.is_contiguous(memory_format=torch.channels_last)
        elif relayout.startswith("nchw"):
            assert t.is_contiguous()
        else:
            assert any(t.is_contiguous(memory_format=layout) for layout in LAYOUTS.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relayout", [k for k in RELAYOUTS if "slice" in k or "half" in k])
def test_slices_give_the_same_bits_as_their_copy(relayout, layout, norm):
    """A batch or channel slice is read where it lies, in the same order as its dense copy would be."""
    if not relayout.startswith(layout):
        pytest.skip("the slice is of the other layout")
    case = Case(SHAPE, MID, layout=layout, norm=norm)
    d = data(case)
    got = run(build(CoordAtt, case, d.params), RELAYOUTS[relayout](d.x), d.grad)
    expected = run(build(CoordAtt, case, d.params), d.x, d.grad)
    for name in expected:
        tolerances.assert_same_bits(got[name], expected[name], name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relayout", RELAYOUTS)
def test_layout_of_the_gradient(relayout, layout, norm):
    """The gradient has a layout of its own (a slice of a cat, the other memory format); dx follows x."""
    case = Case(SHAPE, MID, layout=layout, norm=norm)
    d = data(case)
    grad = RELAYOUTS[relayout](d.grad)
    got = run(build(CoordAtt, case, d.params), d.x, grad)
    expected = run(build(CoordAtt, case, d.params), d.x, d.grad)
    for name in expected:
        tolerances.assert_same_bits(got[name], expected[name], name)
    assert got["d x"].stride() == d.x.stride()


EXPANDED = {
    "one value": lambda g: g[:1, :1, :1, :1],
    "per image": lambda g: g[:, :1, :1, :1],
    "per channel": lambda g: g[:1, :, :1, :1],
    "per image and channel": lambda g: g[:, :, :1, :1],
    "per row": lambda g: g[:, :, :, :1],
    "per column": lambda g: g[:, :, :1, :],
    "over images": lambda g: g[:1],
    "over channels": lambda g: g[:, :1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("expanded", EXPANDED)
def test_expanded_gradient(expanded, layout, norm):
    """mean() and sum() hand back gradients with zero strides."""
    case = Case(SHAPE, MID, layout=layout, norm=norm)
    d = data(case)
    grad = EXPANDED[expanded](d.grad).expand(SHAPE)
    got = run(build(CoordAtt, case, d.params), d.x, grad)
    expected = run(build(CoordAtt, case, d.params), d.x, grad.contiguous(memory_format=LAYOUTS[layout]))
    for name in expected:
        tolerances.assert_same_bits(got[name], expected[name], name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relayout", [*RELAYOUTS, *EXPANDED])
def test_layout_of_a_gates_gradient(relayout, layout):
    """In the hybrid tier, where the gate is an operator of its own."""
    d = data(Case(SHAPE, MID, layout=layout))
    n, c, h, w = SHAPE
    s_h, s_w = torch.randn(n, c, h, 1), torch.randn(n, c, 1, w)
    grad = EXPANDED[relayout](d.grad).expand(SHAPE) if relayout in EXPANDED else RELAYOUTS[relayout](d.grad)
    backward = torch.ops.coordatt_fast.gate_backward
    dense = grad.contiguous(memory_format=LAYOUTS[layout])
    for got, expected in zip(backward(grad, d.x, s_h, s_w, True), backward(dense, d.x, s_h, s_w, True)):
        tolerances.assert_same_bits(got, expected)
        assert got.stride() == expected.stride()


@pytest.mark.parametrize("expanded", EXPANDED)
def test_expanded_x(expanded, norm):
    case = Case(SHAPE, MID, norm=norm)
    d = data(case)
    x = EXPANDED[expanded](d.x).expand(SHAPE)
    got = run(build(CoordAtt, case, d.params), x, d.grad)
    expected = run(build(CoordAtt, case, d.params), x.contiguous(), d.grad)
    for name in expected:
        assert max(tolerances.errors(got[name], expected[name])) < 1e-5, name


def test_chunks_of_one_tensor():
    """The halves of a chunk, as C3 and CSP blocks make them, and gradients that flow back into the whole."""
    from paper import PaperCoordAtt

    case = Case(SHAPE, MID, dtype=torch.float64)
    d = data(case)
    for layout in LAYOUTS:
        both = feature_map((3, 40, 6, 9), seeds.generator(1), torch.float64, layout)
        results = []
        for cls in (PaperCoordAtt, CoordAtt):
            module, leaf = build(cls, case, d.params), both.detach().requires_grad_()
            first, second = leaf.chunk(2, dim=1)
            out = torch.cat([module(second), first], dim=1)
            (out * both.sin()).sum().backward()
            results.append((out, leaf.grad, module.conv1.weight.grad))
        for theirs, ours in zip(*results):
            assert max(tolerances.errors(ours, theirs)) < tolerances.FORMULAS_AGREE


@pytest.mark.parametrize("shape", ["all-ones", "H=1", "W=1", "one-channel"])
def test_ambiguous_strides(shape):
    """Where sizes of one make a tensor both contiguous and channels_last, or give a dimension of one an odd
    stride.
    """
    case = Case(*AWKWARD[shape], norm="running")
    d = data(case)
    expected = run(build(CoordAtt, case, d.params), d.x, d.grad)
    sizes = d.x.shape
    odd = [s if n > 1 else 12345 for s, n in zip(d.x.stride(), sizes)]
    for x in (d.x.contiguous(memory_format=torch.channels_last), d.x.as_strided(sizes, odd)):
        got = run(build(CoordAtt, case, d.params), x, d.grad)
        for name in expected:
            assert max(tolerances.errors(got[name], expected[name])) < 1e-5, name


@pytest.mark.parametrize("shape", promises.AMBIGUOUS, ids=str)
def test_strides_of_the_result(shape):
    promises.returns_plain_strides(shape)


@pytest.mark.parametrize("shape", promises.AMBIGUOUS, ids=str)
def test_strides_without_data(shape):
    """The compiler is told the strides that the kernels give."""
    module, ops = CoordAtt(shape[1], shape[1]), torch.ops.coordatt_fast
    conv1, conv_h, conv_w = module.conv1, module.conv_h, module.conv_w
    weights = (conv1.weight, conv1.bias, None, None, None, None, 1e-5)
    weights = [*weights, conv_h.weight, conv_h.bias, conv_w.weight, conv_w.bias]
    n, c, h, w = shape
    for dense in promises.DENSE.values():
        x = dense(torch.randn(shape))
        logits = torch.randn(n, c, h, 1), torch.randn(n, c, 1, w)
        for skip in (False, True):
            with torch.no_grad():
                for op, arguments in (
                    (ops.attend, (x, *weights, 0, skip)),
                    (ops.attend_train, (x, *weights, 0, 0, skip)),
                    (ops.gate, (x, *logits, skip)),
                    (ops.gate_backward, (x, x, *logits, skip)),
                    (ops.pool_backward, (torch.randn(n, c, h + w, 1), x)),
                ):
                    real = op(*arguments)
                    mode = FakeTensorMode(allow_non_fake_inputs=False)
                    faked = [mode.from_tensor(t) if torch.is_tensor(t) else t for t in arguments]
                    with mode:
                        fake = op(*faked)
                    pairs = zip(real, fake) if type(real) is tuple else [(real, fake)]
                    assert all(a.stride() == b.stride() for a, b in pairs), (op, x.stride(), skip)


@pytest.mark.parametrize("relayout", [*RELAYOUTS, "negated view"])
def test_inference_in_place_and_into_out(relayout):
    """inplace=True and out= write through any strides, and nothing beside them."""
    case = Case(SHAPE, MID, norm="running")
    d = data(case)
    module = build(CoordAtt, case, d.params)
    with torch.no_grad():
        expected = module(d.x)
        if relayout == "negated view":
            x = torch.complex(d.grad, -d.x).conj().imag
            assert x.is_neg() and torch.equal(x, d.x)
            assert max(tolerances.errors(module(x), expected)) < 1e-5
            return
        x, out = RELAYOUTS[relayout](d.x.clone()), RELAYOUTS[relayout](torch.zeros_like(d.x))
        around = [t._base.clone() if t._base is not None else None for t in (x, out)]
        arguments = [d.params.get(n) for n in PARAMETERS]
        returned = coord_att(d.x, *arguments, out=out)
        assert returned.data_ptr() == out.data_ptr() and max(tolerances.errors(out, expected)) < 1e-5
        module._inplace = True
        returned = module(x)
        assert returned.data_ptr() == x.data_ptr() and max(tolerances.errors(x, expected)) < 1e-5
        for t, before in zip((x, out), around):
            if before is not None and t._base.numel() > t.numel():
                t.copy_(torch.as_strided(before, t.shape, t.stride(), t.storage_offset()))
                tolerances.assert_same_bits(t._base, before, "wrote beside the view")
