"""torch.compile in every combination: one graph, and eager's results against float64. docs/integration.md has the
table.
"""

import contextlib
import copy
import pickle
import types

import pytest
import seeds
import tolerances
import torch
import torch._functorch.config
import torch._inductor.config
from harness import FLOATS, LAYOUTS, Case, autocast, build, compare, data, run
from paper import PaperCoordAtt
from test_forward import arguments
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vjp, vmap

from coordatt_fast import CoordAtt, accelerate, coord_att, use_backend

CASE = Case((2, 24, 9, 7), 8)
ODD = (3, 24, 5, 11)


def compiled(prepare=lambda module: None, gradients=True, graphs=1, **options):
    """A way to run a case, for compare: the module compiled whole, and what it took to do so."""
    options = {"backend": "aot_eager", "fullgraph": True} | options

    def under_test(case, d, backward):
        module = build(CoordAtt, case, d.params)
        prepare(module)
        module.compile(**options)
        with autocast(case):
            if backward or not gradients:
                return run(module, d.x.clone(), d.grad if backward else None)
            out = module(d.x)
            assert not out.requires_grad
            return {"out": out} | {n: b for n, b in module.named_buffers() if n.startswith("bn1.running")}

    under_test.graphs = graphs
    return under_test


def check(case, backward, way):
    """As close as eager has to be, over several draws of the tensors, with one compilation for all of them."""
    torch._dynamo.reset()
    counters.clear()
    compare(case, backward, way)
    assert counters["stats"]["unique_graphs"] == way.graphs and not counters["graph_break"], counters


# Modes ---------------------------------------------------------------------------------------------


TRAINED, GIVEN = CASE, CASE.but(norm="running")
INDUCTOR = {
    "training": (TRAINED, True, {}),
    "training, channels_last": (TRAINED.but(layout="nhwc"), True, {}),
    "inference": (GIVEN, False, {}),
    "inference, channels_last": (GIVEN.but(layout="nhwc"), False, {}),
    "training, bfloat16 autocast": (TRAINED.but(dtype=torch.bfloat16, autocast=True), True, {}),
    "max-autotune": (GIVEN, False, {"mode": "max-autotune"}),
    "reduce-overhead": (GIVEN.but(layout="nhwc"), False, {"mode": "reduce-overhead"}),
    "dynamic": (TRAINED.but(layout="nhwc"), True, {"dynamic": True}),
}


@pytest.mark.parametrize("name", INDUCTOR)
def test_inductor(cpu, name):
    case, backward, options = INDUCTOR[name]
    check(case, backward, compiled(gradients=False, backend="inductor", **options))


def test_inductor_freezing(cpu):
    """Parameters become constants of the graph."""
    case = GIVEN.but(layout="nhwc")
    d = data(case)
    module, truth = build(CoordAtt, case, d.params), build(PaperCoordAtt, case, d.params, torch.float64)
    module.compile(backend="inductor", fullgraph=True)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        for x in (d.x, d.x, -d.x):
            assert max(tolerances.errors(module(x), truth(x.double()))) < 1e-6


KINDS = [("float32", "nchw"), ("float32", "nhwc"), ("bfloat16", "nhwc")]


@pytest.mark.parametrize("dtype, layout", KINDS)
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
@pytest.mark.parametrize("way", ["gradients", "no_grad", "frozen"])
def test_every_way_to_call(cpu, way, norm, dtype, layout):
    case = CASE.but(norm=norm, layout=layout, dtype=FLOATS[dtype])
    if way == "frozen":
        check(case, False, compiled(lambda module: module.requires_grad_(False)))
    else:
        check(case, way == "gradients", compiled(gradients=False))


@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics(cpu, training):
    """track_running_stats=False: statistics of the batch, whatever the flag says, and nothing moves."""
    case = CASE
    d = data(case)
    module, truth = build(CoordAtt, case, d.params), build(PaperCoordAtt, case, d.params, torch.float64)
    for m in (module, truth):
        bn = nn.BatchNorm2d(case.mid, track_running_stats=False).to(m.bn1.weight.dtype)
        bn.load_state_dict(m.bn1.state_dict(), strict=False)
        m.bn1 = bn
        m.train(training)
    module.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert max(tolerances.errors(module(d.x), truth(d.x.double()))) < 1e-6
    results, expected = run(module, d.x, d.grad), run(truth, d.x.double(), d.grad.double())
    for name in expected:
        if name not in case.exactly_zero:
            assert max(tolerances.errors(results[name], expected[name])) < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm, backward", [("batch", True), ("batch", False), ("running", False)])
def test_dynamic_sizes(cpu, norm, backward, layout):
    """All sizes free: one graph for both."""
    torch._dynamo.reset()
    counters.clear()
    way = compiled(gradients=False, dynamic=True)
    for shape in (CASE.shape, ODD):
        compare(CASE.but(norm=norm, layout=layout, shape=shape), backward, way)
    assert counters["stats"]["unique_graphs"] == 1, counters


def test_one_graph_serves_all_blocks_of_a_kind(cpu):
    """Regional compilation: other parameters, same sizes, nothing compiled anew."""
    check(GIVEN, False, compiled(gradients=False))


HYBRID = {
    "GroupNorm": lambda m: setattr(m, "bn1", nn.GroupNorm(2, 8)),
    "GELU": lambda m: setattr(m, "act", nn.GELU()),
    "hook": lambda m: m.conv1.register_forward_hook(lambda module, args, out: out * 2),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m.conv_h),
    "replaced pool": lambda m: setattr(m, "pool_w", nn.AdaptiveMaxPool2d((1, None))),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("change", HYBRID)
def test_own_children(cpu, change, gradients):
    """Hybrid, and fused with a weight that is computed."""
    d = data(CASE)
    module, truth = build(CoordAtt, CASE, d.params), build(PaperCoordAtt, CASE, d.params, torch.float64)
    for m in (module, truth):
        HYBRID[change](m)
        m.to(m.conv1.bias.dtype)
    counter = CompileCounterWithBackend("aot_eager")
    module.compile(backend=counter, fullgraph=True)
    found = run(module, d.x, d.grad if gradients else None)
    expected = run(truth, d.x.double(), d.grad.double() if gradients else None)
    for name in expected:
        if name != "d conv1.bias" or change == "GroupNorm":
            assert max(tolerances.errors(found[name], expected[name])) < 1e-5, name
    targets = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    op = "attend" if change == "weight_norm" else "gate"
    assert counter.frame_count == 1 and any(t.startswith(f"coordatt_fast.{op}") for t in targets), targets


# In place and into out= ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm, layout, compiler",
    [
        ("batch", "nchw", "aot_eager"),
        ("running", "nchw", "aot_eager"),
        ("running", "nhwc", "aot_eager"),
        ("running", "nhwc", "inductor"),
    ],
)
def test_inplace(cpu, norm, layout, compiler):
    case = CASE.but(norm=norm, layout=layout)
    d = data(case)
    module = build(lambda *a, **k: CoordAtt(*a, inplace=True, **k), case, d.params)
    truth = build(PaperCoordAtt, case, d.params, torch.float64)
    module.compile(backend=compiler, fullgraph=True)
    with torch.no_grad():
        x, expected = d.x.clone(), truth(d.x.double())
        returned = module(x)
        assert returned.data_ptr() == x.data_ptr() and returned.stride() == x.stride()
        assert max(tolerances.errors(x, expected)) < 1e-6
    found, expected = run(module, d.x, d.grad), run(truth, d.x.double(), d.grad.double())
    for name in ("out", "d x"):
        assert max(tolerances.errors(found[name], expected[name])) < 1e-5, name


def overlapping(kind, d, layout):
    """x, out and the parameters of a call whose out overlaps one of them."""
    parameters = list(arguments(d.params))
    memory = torch.cat([d.x, d.x]).contiguous(memory_format=LAYOUTS[layout])
    if kind == "nothing":
        return memory[:2], memory[2:], parameters
    if kind == "x":
        return memory[:2], memory[1:3], parameters
    if kind == "x itself":
        return memory[:2], memory[:2], parameters
    x, out = memory[:2], torch.zeros_like(d.x)
    index = {"conv_h_weight": 6, "running_var": 5, "conv1_bias": 1}[kind]
    inside = out.as_strided(parameters[index].shape, parameters[index].stride(), 40)
    parameters[index] = inside.copy_(parameters[index])
    return x, out, parameters


OVERLAPS = ["nothing", "x", "x itself", "conv_h_weight", "running_var", "conv1_bias"]


OUT = [(None, "nchw"), (None, "nhwc"), ("aot_eager", "nchw"), ("aot_eager", "nhwc"), ("inductor", "nhwc")]


@pytest.mark.parametrize("compiler, layout", OUT)
@pytest.mark.parametrize("training", [True, False])
def test_out_that_overlaps(backend, training, compiler, layout):
    """out= takes the result for the arguments as they were before the call."""
    if compiler == "inductor" and (training or backend == "reference"):
        pytest.skip("it is the operator that has to be safe")
    d = data(GIVEN.but(layout=layout))
    call = lambda x, out, *parameters: coord_att(x, *parameters, out=out, training=training)
    for kind in OVERLAPS[1:4] if compiler else OVERLAPS:
        x, out, parameters = overlapping(kind, d, layout)
        torch._dynamo.reset()
        f = torch.compile(call, backend=compiler, fullgraph=True) if compiler else call
        before = [t.double() for t in (x, *parameters)]
        with torch.no_grad(), use_backend("reference"):
            expected = coord_att(*before, training=training)
        # The cache on disk takes no note of where views of one tensor begin.
        with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
            returned = f(x, out, *parameters)
        assert returned.data_ptr() == out.data_ptr() and returned.stride() == out.stride(), kind
        assert max(tolerances.errors(out, expected)) < 1e-6, kind


@pytest.mark.parametrize("leaf", [True, False])
def test_out_that_requires_a_gradient(backend, leaf):
    """As torch.add(a, b, out=...): refused while gradients are on, written under no_grad."""
    d = data(GIVEN)
    out = torch.zeros_like(d.x).requires_grad_()
    out = out if leaf else out * 1
    with pytest.raises(RuntimeError, match="out="):
        coord_att(d.x, *arguments(d.params), out=out)
    assert not out.detach().any()
    with torch.no_grad():
        coord_att(d.x, *arguments(d.params), out=out)
    assert torch.equal(out, coord_att(d.x, *arguments(d.params)))


# Derivatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("dtype, layout", KINDS)
def test_compiled_autograd_over_an_eager_step(cpu, dtype, layout, norm):
    seen = CompileCounterWithBackend("aot_eager")

    def under_test(case, d, backward):
        module = build(CoordAtt, case, d.params)
        with compiled_autograd._enable(torch.compile(backend=seen, fullgraph=True)):
            return run(module, d.x, d.grad)

    compare(CASE.but(norm=norm, layout=layout, dtype=FLOATS[dtype]), True, under_test)
    assert seen.frame_count == 1
    targets = {str(node.target) for graph in seen.graphs for node in graph.graph.nodes}
    assert "coordatt_fast.attend_backward.default" in targets, targets


def test_compiled_autograd_over_a_compiled_step(cpu):
    way = compiled()

    def under_test(case, d, backward):
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            return way(case, d, backward)

    compare(CASE, True, under_test)


def test_compiled_autograd_around_the_hybrid_tier(cpu):
    d = data(CASE)
    found = []
    for enabled in (True, False):
        module = build(CoordAtt, CASE, d.params)
        module.act = nn.GELU()
        context = compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True))
        with context if enabled else contextlib.nullcontext():
            found.append(run(module, d.x, d.grad))
    for name, value in found[1].items():
        if name != "d conv1.bias":
            assert max(tolerances.errors(found[0][name], value.double())) < 1e-5, name


TRANSFORMS = {
    "grad": lambda f, p, d: grad(lambda p: (f(p, d.x) * d.grad).sum())(p),
    "grad of x": lambda f, p, d: grad(lambda x: (f(p, x) * d.grad).sum())(d.x),
    "vjp": lambda f, p, d: vjp(lambda x: f(p, x), d.x)[1](d.grad)[0],
    "vmap": lambda f, p, d: vmap(lambda x: f(p, x))(torch.stack([d.x, d.grad])),
    "gradients per sample": lambda f, p, d: vmap(
        grad(lambda p, x, g: (f(p, x[None]) * g).sum()), in_dims=(None, 0, 0)
    )(p, d.x, d.grad),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(cpu, name):
    """They run by the reference, in one graph."""
    case = GIVEN.but(dtype=torch.float64)
    d = data(case)
    ours, theirs = build(CoordAtt, case, d.params), build(PaperCoordAtt, case, d.params)
    p = {n: t.detach() for n, t in ours.named_parameters()}

    def call(module):
        return lambda p: TRANSFORMS[name](lambda p, x: functional_call(module, p, (x,)), p, d)

    with use_backend("auto"):
        found = torch.compile(call(ours), backend="aot_eager", fullgraph=True)(p)
    expected = call(theirs)(p)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        assert max(tolerances.errors(a, b)) < tolerances.FORMULAS_AGREE


# Other devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "training, gradients, dynamic", [(True, True, True), (False, False, True), (False, False, False)]
)
def test_meta_device(training, gradients, dynamic):
    """Stands for every device but the CPU: sizes may be symbols where the backend is chosen."""
    module = CoordAtt(16, 16, device="meta").train(training)
    module.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.set_grad_enabled(gradients):
        for shape in ((2, 16, 5, 7), (3, 16, 9, 4)):
            out = module(torch.empty(shape, device="meta"))
            assert out.shape == shape and out.is_meta and out.requires_grad == gradients


@pytest.mark.parametrize("dynamic", [True, False])
def test_fake_cuda_tensors_on_any_build(dynamic):
    """Without gradients: torch itself cannot record any where it was built without CUDA."""
    module = CoordAtt(16, 16, device="meta").eval()
    shapes = {name: t.shape for name, t in module.state_dict().items() if t.dim()}
    with FakeTensorMode(), torch.no_grad():
        fake = {name: torch.empty(shape, device="cuda") for name, shape in shapes.items()}
        module.load_state_dict(fake, strict=False, assign=True)
        module.compile(backend="eager", fullgraph=True, dynamic=dynamic)
        for shape in ((2, 16, 5, 7), (3, 16, 9, 4)):
            out = module(torch.empty(shape, device="cuda"))
            assert out.shape == shape and out.is_cuda


# What is seen after compiling --------------------------------------------------------------------------


CHANGES = {
    "_inplace": lambda m: setattr(m, "_inplace", True),
    "skip": lambda m: setattr(m, "skip", True),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "training": lambda m: m.train(),
    "momentum": lambda m: setattr(m.train().bn1, "momentum", 0.7),
    "track_running_stats": lambda m: setattr(m.train().bn1, "track_running_stats", False),
    "no statistics": lambda m: (setattr(m.bn1, "running_mean", None), setattr(m.bn1, "running_var", None)),
    "activation": lambda m: setattr(m, "act", nn.ReLU()),
    "unknown activation": lambda m: setattr(m, "act", nn.GELU()),
    "no bias": lambda m: setattr(m.conv_h, "bias", None),
    "values": lambda m: m.conv_h.weight.data.mul_(3),
    "another weight": lambda m: setattr(m.conv_h, "weight", nn.Parameter(3 * m.conv_h.weight.detach())),
    "GroupNorm": lambda m: setattr(m, "bn1", nn.GroupNorm(2, 8)),
    "no normalisation": lambda m: setattr(m, "bn1", nn.Identity()),
    "pool": lambda m: setattr(m, "pool_h", nn.AdaptiveMaxPool2d((None, 1))),
    "parametrized": lambda m: nn.utils.parametrizations.spectral_norm(m.conv1),
    "another class": lambda m: setattr(m.conv1, "__class__", Tripled),
    "another forward": lambda m: setattr(m.conv_h, "forward", types.MethodType(Tripled.forward, m.conv_h)),
    "hook": lambda m: m.conv1.register_forward_hook(lambda module, args, out: out * 3),
    "pre-hook": lambda m: m.act.register_forward_pre_hook(lambda module, args: (args[0] * 3,)),
}


class Tripled(nn.Conv2d):
    def forward(self, x):
        return 3 * nn.Conv2d.forward(self, x)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_compiling_are_seen(cpu, change):
    """Hooks, which the compiler takes no notice of by default, where it is told to."""
    d = data(GIVEN)
    module = build(CoordAtt, GIVEN, d.params)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False), torch.no_grad():
        module.compile(backend="eager")
        before = module(d.x)
        CHANGES[change](module)
        expected = copy.deepcopy(module)
        expected._compiled_call_impl = None
        x, y = d.x.clone(), d.x.clone()
        seeds.seed(1)
        found = module(x)
        seeds.seed(1)
        assert max(tolerances.errors(found, expected(y))) < 1e-6
        assert torch.equal(x, y)
        assert change == "track_running_stats" or change == "_inplace" or not torch.equal(found, before)
    for (name, a), b in zip(module.named_buffers(), expected.buffers()):
        assert max(tolerances.errors(a, b)) < 1e-6, name


def guards(module, x):
    torch._dynamo.reset()
    torch.compile(module, backend="eager", fullgraph=True)(x)
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(type(module).forward.__code__)
    return len(str(entry.guard_manager).splitlines())


class Chain(nn.Module):
    def __init__(self, make, count):
        super().__init__()
        self.blocks = nn.ModuleList(make(16, 16) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_guards_of_a_block(cpu):
    """What each block of a network adds to the checks before a compiled call: no more than plain PyTorch's."""
    x = torch.randn(2, 16, 5, 7)
    counts = []
    for make in (CoordAtt, PaperCoordAtt, lambda *channels: accelerated(PaperCoordAtt(*channels))):
        with torch.no_grad():
            one, three = (guards(Chain(make, count).eval(), x) for count in (1, 3))
        counts.append((three - one) / 2)
    assert counts[0] <= counts[1], counts
    assert counts[2] <= 1.2 * counts[1], counts


def accelerated(module):
    accelerate(module)
    return module


def test_accelerated_blocks_share_compiled_code(cpu):
    """Regional compilation: blocks, their copies and their pickles, each compiled alone."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = [accelerated(PaperCoordAtt(16, 16)).eval() for _ in range(3)]
    blocks += [copy.deepcopy(blocks[0]), pickle.loads(pickle.dumps(blocks[1])), copy.copy(blocks[2])]
    x = torch.randn(2, 16, 5, 7)
    counters.clear()
    with torch.no_grad():
        for block in blocks:
            assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x), block(x))
    assert counters["stats"]["unique_graphs"] == 1, counters
