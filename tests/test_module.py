"""CoordAtt as a drop-in: checkpoints, copies, pickles, dtypes, memory, init loops."""

import copy
import io
import pickle

import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, LAYOUTS, Case, build, data, run
from paper import PaperCoordAtt
from shapes import AWKWARD, FEW
from torch import nn
from torch.utils.checkpoint import checkpoint

from coordatt_fast import CoordAtt, explain

CASE = Case((2, 12, 5, 7), 8, dtype=torch.float64)
KEYS = [
    "conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var",
    "bn1.num_batches_tracked", "conv_h.weight", "conv_h.bias", "conv_w.weight", "conv_w.bias",
]  # fmt: skip


def close(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if name not in CASE.exactly_zero:
            assert max(tolerances.errors(got[name], value)) < tolerances.FORMULAS_AGREE, name


def pair(case=CASE):
    d = data(case)
    return d, build(CoordAtt, case, d.params), build(PaperCoordAtt, case, d.params)


@pytest.mark.parametrize(
    "inp, oup, reduction", [(16, 16, 32), (48, 48, 4), (576, 576, 32), (3, 3, 1), (1, 1, 32)]
)
def test_init_is_the_originals(inp, oup, reduction):
    """Same seed, same numbers, and the generator stands where it would have stood."""
    modules, after = [], []
    for cls in (PaperCoordAtt, CoordAtt):
        seeds.seed(11)
        modules.append(cls(inp, oup, reduction))
        after.append(torch.rand(4))
    theirs, ours = (m.state_dict() for m in modules)
    assert list(ours) == list(theirs) == KEYS
    for name in KEYS:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    assert torch.equal(*after)


def test_children_are_what_init_loops_look_for():
    module = CoordAtt(32, 32)
    children = dict(module.named_children())
    assert list(children) == ["pool_h", "pool_w", "conv1", "bn1", "act", "conv_h", "conv_w"]
    assert all(type(children[n]) is nn.Conv2d for n in ("conv1", "conv_h", "conv_w"))
    assert type(children["bn1"]) is nn.BatchNorm2d
    assert [n for n, _ in module.named_parameters()] == [
        k for k in KEYS if "running" not in k and "num" not in k
    ]


def test_checkpoints_go_both_ways(backend):
    seeds.seed(1)
    theirs, ours = PaperCoordAtt(24, 24), CoordAtt(24, 24)
    x = torch.randn(2, 24, 6, 9)
    theirs(x)  # moves the running statistics, which have to travel too
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    assert str(ours.load_state_dict(torch.load(file), strict=True)) == "<All keys matched successfully>"
    with torch.no_grad():
        assert max(tolerances.errors(ours.eval()(x), theirs.eval()(x))) < 1e-5
    ours.train()(3 * x)
    back = PaperCoordAtt(24, 24)
    back.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        assert max(tolerances.errors(ours.eval()(x), back.eval()(x))) < 1e-5
    assert back.bn1.num_batches_tracked.item() == 2


def test_strict_loading_reports_what_is_wrong():
    state = PaperCoordAtt(24, 24).state_dict()
    state.pop("conv_w.bias")
    with pytest.raises(RuntimeError, match="conv_w.bias"):
        CoordAtt(24, 24).load_state_dict(state)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(backend, way):
    """After use, forward and backward, nothing uncopyable is left behind, and the copy stands on its own."""
    d, module, _ = pair()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    run(module, d.x, d.grad)
    module.load_state_dict(before)
    if way == "deepcopy":
        twin = copy.deepcopy(module)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    module.zero_grad(), twin.zero_grad()
    expected = run(module, d.x, d.grad)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    got = run(twin, d.x, d.grad)
    for name in expected:
        if name not in CASE.exactly_zero:
            tolerances.assert_same_bits(got[name], expected[name], name)
    assert type(twin) is CoordAtt


def test_repr_shows_the_tree():
    text = repr(CoordAtt(32, 32))
    for child in ("pool_h", "pool_w", "conv1", "bn1", "act", "conv_h", "conv_w"):
        assert f"({child}):" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_to_dtype(backend, dtype):
    """module.half() and .to(dtype) make a module of that dtype, running statistics included."""
    d, ours, theirs = pair()
    x = d.x.to(FLOATS[dtype])
    expected = theirs.eval()(d.x)
    ours, theirs = ours.eval().to(FLOATS[dtype]), theirs.to(FLOATS[dtype])
    out, other = ours(x), theirs(x)
    assert out.dtype == other.dtype == FLOATS[dtype]
    slack = torch.finfo(out.dtype).eps
    assert tolerances.errors(out, expected)[0] <= 2 * tolerances.errors(other, expected)[0] + slack


def test_constructor_dtype_and_device():
    module = CoordAtt(16, 16, dtype=torch.bfloat16, device="meta")
    assert all(p.dtype is torch.bfloat16 and p.is_meta for p in module.parameters())
    assert module(torch.empty(2, 16, 5, 6, dtype=torch.bfloat16, device="meta")).shape == (2, 16, 5, 6)


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_module_in_channels_last(backend, norm):
    """net.to(memory_format=torch.channels_last) restrides the 1x1 weights as well."""
    case = CASE.but(norm=norm, layout="nhwc")
    d, ours, theirs = pair(case)
    ours.to(memory_format=torch.channels_last)
    got = run(ours, d.x, d.grad)
    close(got, run(theirs, d.x, d.grad))
    for name in ("out", "d x"):
        assert got[name].is_contiguous(memory_format=torch.channels_last)


def test_yolo_style_initialisation(backend):
    """eps and momentum rewritten after construction, weights re-drawn in place, by type of child."""
    results = []
    for cls in (PaperCoordAtt, CoordAtt):
        seeds.seed(5)
        module = cls(24, 24).double()
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                nn.init.normal_(child.weight, std=0.5)
                nn.init.zeros_(child.bias)
            elif isinstance(child, nn.BatchNorm2d):
                child.eps, child.momentum = 1e-3, 0.03
        d = data(Case((3, 24, 4, 5), dtype=torch.float64))
        results.append(run(module, d.x, d.grad))
    close(results[1], results[0])


def test_parameters_replaced_after_construction(backend):
    """A Parameter assigned anew, a bias set to None, data swapped: the call uses what is there now."""
    d, ours, theirs = pair()
    run(ours, d.x)
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, theirs):
        seeds.seed(2)
        module.conv1.weight = nn.Parameter(torch.randn_like(module.conv1.weight))
        module.conv_h.bias = None
        module.conv_w.weight.data = torch.randn_like(module.conv_w.weight)
        module.bn1.bias = nn.Parameter(torch.randn_like(module.bn1.bias))
    close(run(ours, d.x, d.grad), run(theirs, d.x, d.grad))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(backend, reentrant):
    """Forward runs twice: same gradients, and the running statistics move twice, as with the original."""
    results = []
    for module in pair()[1:]:
        d = data(CASE)
        x = d.x.detach().requires_grad_()
        checkpoint(module, x, use_reentrant=reentrant).backward(d.grad)
        results.append({"d x": x.grad} | {"d " + n: p.grad for n, p in module.named_parameters()})
        results[-1] |= {n: b.double() for n, b in module.named_buffers()}
    close(*results)
    assert results[0]["bn1.num_batches_tracked"] == 2


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
@pytest.mark.parametrize("shape", FEW)
def test_only_x_is_kept_for_backward(cpu, shape, norm, layout, autocast):
    """Of tensors as large as x only x itself is saved; all others together hold at most 3 N (C + M) (H + W)
    numbers.
    """
    case = Case(
        *AWKWARD[shape], torch.bfloat16 if autocast else torch.float32, autocast, layout, norm, skip=True
    )
    d = data(case)
    module, kept = build(CoordAtt, case, d.params), {}
    theirs = {p.data_ptr() for p in [*module.parameters(), *module.buffers()]}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = d.x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", dtype=case.dtype, enabled=autocast):
            out = module(x)
    assert kept.pop(x.untyped_storage().data_ptr(), None) is not None, "x is needed for backward"
    n, c, h, w = case.shape
    small = sum(size for address, size in kept.items() if address not in theirs)
    assert small <= 4 * (3 * n * (c + case.mid) * (h + w) + 4 * case.mid), f"{small} bytes kept beside x"
    elsewhere = (
        [t for t in vars(out.grad_fn).values() if torch.is_tensor(t)]
        if hasattr(out.grad_fn, "__dict__")
        else []
    )
    assert not elsewhere, "tensors kept where saved_tensors_hooks cannot move them"
    out.backward(d.grad)
    assert x.grad is not None


def test_backward_twice_needs_retain_graph(backend):
    d, module, _ = pair()
    x = d.x.detach().requires_grad_()
    out = module(x)
    out.backward(d.grad, retain_graph=True)
    first = x.grad.clone()
    out.backward(d.grad)
    tolerances.assert_same_bits(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(d.grad)


def test_x_changed_between_forward_and_backward_is_noticed(backend):
    d, module, _ = pair()
    x = d.x.detach().requires_grad_()
    y = x * 1
    out = module(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(d.grad)


def test_output_is_fresh(backend):
    """ReLU(inplace=True) behind the block changes the output, but neither x nor the gradients."""
    d, ours, theirs = pair()
    results = []
    for module in (ours, theirs):
        x = d.x.detach().requires_grad_()
        torch.relu_(module(x)).backward(d.grad)
        results.append({"d x": x.grad} | {"d " + n: p.grad for n, p in module.named_parameters()})
    close(*results)


def test_threads_of_python_do_not_meet(backend):
    """nn.DataParallel and servers call modules from several threads."""
    from concurrent.futures import ThreadPoolExecutor

    from coordatt_fast import use_backend

    case = Case(*AWKWARD["large"], norm="running")
    d = data(case)
    module = build(CoordAtt, case, d.params)
    expected = run(module, d.x)["out"]

    def call(_):
        with torch.no_grad(), use_backend(backend):
            return module(d.x)

    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(call, range(40)):
            tolerances.assert_same_bits(out, expected)


def test_explain_does_not_run_the_module(backend):
    d, module, _ = pair()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    explain(module, d.x)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


# What training frameworks, detectors and exporters set on every module that they find, some only where there is
# such an attribute already.
FRAMEWORK_ATTRIBUTES = {
    "inplace": True, "i": 7, "f": -1, "type": "CoordAtt", "np": 1000, "export": True, "stride": 32, "strides": [8],
    "dynamic": True, "format": "onnx", "shape": None, "anchors": None, "end2end": True, "legacy": True, "name": "a",
    "args": {}, "names": {}, "nc": 3, "task": "detect", "fused": True, "conv": None, "bn": None, "device": "cpu",
    "dtype": None, "eps": 1e-3, "momentum": 0.03, "bias": False, "activation": "relu", "reduction": 2,
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_attributes_that_frameworks_set_change_nothing(backend, training):
    module = CoordAtt(16, 16).train(training)
    expected_module = copy.deepcopy(module)
    assert not set(FRAMEWORK_ATTRIBUTES) & vars(module).keys()
    for name, value in FRAMEWORK_ATTRIBUTES.items():
        setattr(module, name, value)
    assert repr(module) == repr(expected_module)
    x = torch.randn(2, 16, 5, 7)
    given = x.clone()
    with torch.no_grad():
        out = module(given)
        assert torch.equal(out, expected_module(x)) and torch.equal(given, x)
    out = copy.deepcopy(module)(given.requires_grad_())
    assert torch.equal(out, copy.deepcopy(expected_module)(x.requires_grad_()))


@pytest.mark.parametrize("change", [None, "GroupNorm", "hook"])
def test_inplace_switched_on_everywhere(backend, change):
    """Loaders of checkpoints do this to every module that has the attribute."""
    module = CoordAtt(16, 16).eval()
    if change == "GroupNorm":
        module.bn1 = torch.nn.GroupNorm(2, 8)
    elif change == "hook":
        module.conv1.register_forward_hook(lambda m, i, o: o)
    x = torch.randn(2, 16, 5, 7)
    given = x.clone()
    with torch.no_grad():
        expected = module(x.clone())
        for part in module.modules():
            if hasattr(part, "inplace"):
                part.inplace = True
        assert torch.equal(module(given), expected) and torch.equal(given, x)


@pytest.mark.parametrize("inplace", [True, False])
def test_pickles_from_before_inplace_was_private(inplace):
    state = CoordAtt(16, 16, inplace=inplace).eval().__getstate__()
    state["inplace"] = state.pop("_inplace")
    module = object.__new__(CoordAtt)
    module.__setstate__(state)
    module = copy.deepcopy(module)
    assert ("inplace=True" in repr(module)) == inplace and not hasattr(module, "inplace")
    x = torch.randn(2, 16, 5, 7)
    given = x.clone()
    with torch.no_grad():
        expected = module(x)
        assert (module(given).data_ptr() == given.data_ptr()) == inplace
    assert torch.equal(given, expected) == inplace
