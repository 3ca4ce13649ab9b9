"""torch.compile, torch.export, ONNX, tracing, scripting, vmap, functional_call, forward-mode AD, autocast."""

import copy
import io

import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, LAYOUTS, Case, build, data
from paper import PaperCoordAtt
from test_forward import arguments
from torch import nn
from torch.func import functional_call, jvp, vmap

from coordatt_fast import CoordAtt, coord_att, use_backend


class Network(nn.Module):
    """A block between two convolutions, as in a real network."""

    def __init__(self, block, width=12):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.block = block(width, width)
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        return self.last(self.block(torch.relu(self.norm(self.first(x)))))


def network(block, layout="nchw"):
    seeds.seed(0)
    made = Network(block)
    with torch.no_grad():
        for p in made.block.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return made.to(memory_format=LAYOUTS[layout])


def step(net, x, training):
    """Output, gradient of every parameter and of x, all buffers, after one call."""
    net.train(training)
    x = x.detach().requires_grad_()
    out = net(x)
    out.square().mean().backward()
    results = {"out": out.detach(), "x": x.grad}
    module = getattr(net, "_orig_mod", net)
    results |= {n: p.grad for n, p in module.named_parameters()} | dict(module.named_buffers())
    return {k: v for k, v in results.items() if not k.endswith("conv1.bias")}


def agree(got, expected, bound=2e-5):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert max(tolerances.errors(got[name], value)) < bound, name
        else:
            assert torch.equal(got[name], value), name


def images(layout, n=2, h=9, w=13):
    x = torch.randn(n, 3, h, w, generator=seeds.generator(1))
    return x.contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled_network(backend, compiler, layout, training):
    """One graph, the paper's numbers, forward and backward."""
    x = images(layout)
    expected = step(network(PaperCoordAtt, layout), x, training)
    net = torch.compile(network(CoordAtt, layout), fullgraph=True, backend=compiler)
    agree(step(net, x, training), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_inference(backend, layout):
    x = images(layout)
    with torch.no_grad():
        expected = network(PaperCoordAtt, layout).eval()(x)
        net = torch.compile(network(CoordAtt, layout).eval(), fullgraph=True)
        assert max(tolerances.errors(net(x), expected)) < 2e-5


def graphs(net, *args):
    """What torch.compile captured, as op names, and the output."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    out = torch.compile(net, fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend))(
        *args
    )
    return seen, out


def test_compiled_graph_holds_our_ops(cpu):
    """fullgraph alone would pass with the reference traced through."""
    net = network(CoordAtt).eval()
    with torch.no_grad():
        seen, _ = graphs(net, images("nchw"))
    assert any(op.startswith("coordatt_fast.attend") for op in seen), seen
    torch._dynamo.reset()
    seen, out = graphs(net.train(), images("nchw").requires_grad_())
    out.sum().backward()
    assert any("attend_train" in op for op in seen) and any("attend_backward" in op for op in seen), seen


@pytest.mark.parametrize("training", [True, False])
def test_dynamic_shapes(backend, training):
    net = torch.compile(network(CoordAtt), fullgraph=True, dynamic=True, backend="aot_eager")
    plain = network(PaperCoordAtt)
    for size in ((2, 9, 13), (3, 9, 13), (2, 11, 6), (1, 7, 7)):
        x = images("nchw", *size)
        net.zero_grad()
        plain.zero_grad()
        agree(step(net, x, training), step(plain, x, training), 5e-5)


def test_compiled_under_autocast(backend):
    x = images("nchw")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step(network(PaperCoordAtt), x, True)
        got = step(torch.compile(network(CoordAtt), fullgraph=True, backend="aot_eager"), x, True)
    for name, value in expected.items():
        if value.is_floating_point():
            assert got[name].dtype == value.dtype, name
            assert tolerances.errors(got[name], value)[0] < 0.1, name


def test_hook_added_before_compiling_is_honoured(backend):
    net, plain = network(CoordAtt).eval(), network(PaperCoordAtt).eval()
    for n in (net, plain):
        n.block.conv_h.register_forward_hook(lambda m, i, out: out * 3)
    x = images("nchw")
    with torch.no_grad():
        got = torch.compile(net, backend="aot_eager")(x)
        assert max(tolerances.errors(got, plain(x))) < 2e-5


def test_export_with_dynamic_sizes():
    net, x = network(CoordAtt).eval(), images("nchw")
    dim = torch.export.Dim
    shape = {0: dim("n", max=64), 2: dim("h", max=64), 3: dim("w", max=64)}
    program = torch.export.export(net, (x,), dynamic_shapes=(shape,), strict=False)
    names = [str(node.target) for node in program.graph.nodes]
    assert not any("coordatt_fast" in n for n in names), "an exported program must load without this package"
    for size in ((2, 9, 13), (3, 5, 8)):
        y = images("nchw", *size)
        with torch.no_grad():
            assert max(tolerances.errors(program.module()(y), network(PaperCoordAtt).eval()(y))) < 2e-5


@pytest.mark.filterwarnings("ignore")
def test_onnx_with_dynamic_axes():
    """The tracing exporter, where AdaptiveAvgPool2d fails; run by onnx's own evaluator at another size."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    file, net = io.BytesIO(), network(CoordAtt).eval()
    axes = {"x": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(net, (images("nchw"),), file, input_names=["x"], dynamic_axes=axes, dynamo=False)
    model = onnx.load_from_string(file.getvalue())
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    y = images("nchw", 3, 5, 8)
    (out,) = reference.ReferenceEvaluator(model).run(None, {"x": y.numpy()})
    assert max(tolerances.errors(torch.from_numpy(out), network(PaperCoordAtt).eval()(y))) < 2e-5


@pytest.mark.filterwarnings("ignore")
def test_trace():
    net, x = network(CoordAtt).eval(), images("nchw")
    traced = torch.jit.trace(net, (x,))
    assert "coordatt_fast::" not in str(traced.inlined_graph)
    y = images("nchw", 3, 5, 8)
    assert max(tolerances.errors(traced(y), network(PaperCoordAtt).eval()(y))) < 2e-5


@pytest.mark.filterwarnings("ignore")
def test_script():
    net, y = network(CoordAtt).eval(), images("nchw", 3, 5, 8)
    scripted = torch.jit.script(net)
    assert max(tolerances.errors(scripted(y), network(PaperCoordAtt).eval()(y))) < 2e-5


def test_symbolic_trace():
    net, y = network(CoordAtt).eval(), images("nchw", 3, 5, 8)
    traced = torch.fx.symbolic_trace(net)
    assert max(tolerances.errors(traced(y), network(PaperCoordAtt).eval()(y))) < 2e-5


CASE = Case((2, 12, 5, 7), 8, dtype=torch.float64, norm="running")


def pair():
    d = data(CASE)
    return d, build(CoordAtt, CASE, d.params), build(PaperCoordAtt, CASE, d.params)


def test_vmap():
    d, ours, theirs = pair()
    stack = torch.stack([d.x, d.grad, -d.x])
    got, expected = vmap(ours)(stack), torch.stack([theirs(x) for x in stack])
    assert max(tolerances.errors(got, expected)) < tolerances.FORMULAS_AGREE


def test_functional_call_and_grad():
    d, ours, theirs = pair()
    results = []
    for module in (ours, theirs):
        loss = lambda p: functional_call(module, p, (d.x,)).square().sum()
        results.append(torch.func.grad(loss)({n: p.detach() for n, p in module.named_parameters()}))
    for name in results[1]:
        assert max(tolerances.errors(results[0][name], results[1][name])) < tolerances.FORMULAS_AGREE, name


def test_per_sample_gradients():
    d, ours, theirs = pair()
    results = []
    for module in (ours, theirs):
        p = {n: v.detach() for n, v in module.named_parameters()}
        b = {n: v for n, v in module.named_buffers()}
        loss = lambda p, x, m=module: functional_call(m, (p, b), (x[None],)).square().sum()
        results.append(vmap(torch.func.grad(loss), in_dims=(None, 0))(p, d.x))
    for name in results[1]:
        assert max(tolerances.errors(results[0][name], results[1][name])) < tolerances.FORMULAS_AGREE, name


def test_forward_mode():
    d, ours, theirs = pair()
    got, expected = (jvp(module, (d.x,), (d.grad,)) for module in (ours, theirs))
    for a, b in zip(got, expected):
        assert max(tolerances.errors(a, b)) < tolerances.FORMULAS_AGREE


def test_gradient_of_a_gradient_norm():
    """WGAN-GP's penalty, end to end."""
    d, ours, theirs = pair()
    results = []
    for module in (ours.train(), theirs.train()):
        x = d.x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((module(x) * d.grad).sum(), x, create_graph=True)
        slope.square().sum().backward()
        results.append(
            {"x": x.grad} | {n: p.grad for n, p in module.named_parameters() if "conv1.bias" not in n}
        )
    for name in results[1]:
        got, expected = (r[name] if r[name] is not None else torch.zeros(1) for r in results)
        assert max(tolerances.errors(got, expected)) < tolerances.FORMULAS_AGREE, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("x_dtype", ["float32", "half"])
def test_autocast_dtypes(backend, x_dtype, dtype):
    """Under autocast the output has the dtype plain PyTorch gives; gradients have their parameters'."""
    case = CASE.but(dtype=FLOATS[dtype], autocast=True, norm="batch")
    d = data(case)
    x = d.x.float() if x_dtype == "float32" else d.x
    kept = []
    for cls in (PaperCoordAtt, CoordAtt):
        with torch.autocast("cpu", dtype=case.dtype):
            leaf = x.detach().requires_grad_()
            module = build(cls, case, d.params)
            out = module(leaf)
        out.float().square().sum().backward()
        kept.append({"out": out, "x": leaf.grad} | {n: p.grad for n, p in module.named_parameters()})
    for name, value in kept[0].items():
        assert kept[1][name].dtype == value.dtype, name
        if name != "conv1.bias":
            assert tolerances.errors(kept[1][name], value)[0] < 0.1, name


def test_flop_counter_counts_the_convolutions(backend):
    """C=64, 14x14, mid 8: 3 products of 2 x 28 x 64 x 8, half of it in each of the last two: 57344."""
    from torch.utils.flop_counter import FlopCounterMode

    counted = []
    for cls in (PaperCoordAtt, CoordAtt):
        module, x = cls(64, 64).eval(), torch.randn(1, 64, 14, 14)
        with FlopCounterMode(display=False) as mode, torch.no_grad():
            module(x)
        with FlopCounterMode(display=False) as training:
            module.train()(x.requires_grad_()).sum().backward()
        counted.append((mode.get_total_flops(), training.get_total_flops()))
    assert counted[0][0] == 57344
    assert counted[1] == counted[0]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_flop_counter_counts_the_fused_operators(backend, training, gradients):
    """The functional form: the counter's hooks make a module call its children."""
    from torch.utils.flop_counter import FlopCounterMode

    d = data(Case((1, 64, 14, 14), 8))
    x = d.x.requires_grad_(gradients)
    with FlopCounterMode(display=False) as mode:
        coord_att(x, *arguments(d.params), training=training)
    assert mode.get_total_flops() == 57344


def test_deepcopy_of_a_compiled_networks_source(cpu):
    """Compiling must not leave anything on the module that cannot be copied."""
    net = network(CoordAtt).eval()
    x = images("nchw")
    with torch.no_grad():
        expected = torch.compile(net, backend="aot_eager")(x)
        assert max(tolerances.errors(copy.deepcopy(net)(x), expected)) < 1e-6


def test_backend_choice_reaches_compiled_code():
    """use_backend("reference") around a compiled call: the graph is recompiled, not reused."""
    net = network(CoordAtt).eval()
    with use_backend("reference"), torch.no_grad():
        seen, _ = graphs(net, images("nchw"))
    assert not any("coordatt_fast" in op for op in seen), seen
