"""The package as a kernel of Hugging Face's kernels: kernelize maps its layer onto CoordAtt. test_hub.py has the rest."""

import copy
import functools
import io
import logging
import pickle
import sys
from pathlib import Path

import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, Case, autocast, build, compare, feature_map, run
from paper import HSwish, PaperCoordAtt
from test_accelerate import spread
from torch import nn

import coordatt_fast

pytest.importorskip("tomllib", reason="make hub needs Python 3.11")
# The repository's own folder kernels/ would do for "kernels" alone.
pytest.importorskip("kernels.layer", reason="the package kernels is not installed")

import kernels
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

ROOT = Path(__file__).parent.parent
C = 24
COMPILED = pytest.mark.skipif(
    not coordatt_fast.backends()["cpu"].available, reason="the compiled library is not available"
)


@kernels.use_kernel_forward_from_hub("CoordAtt")
class Block(PaperCoordAtt):
    """The authors' block with the name, as its users decorate it."""


class Other(nn.Module):
    """An activation that is nearly the authors'."""

    def forward(self, x):
        return x * (1.702 * x).sigmoid()


class Straight(torch.autograd.Function):
    """Hard-swish by value, with the gradient passed on."""

    @staticmethod
    def forward(ctx, x):
        return nn.functional.hardswish(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class StraightThrough(nn.Module):
    def forward(self, x):
        return Straight.apply(x)


@pytest.fixture
def mapped(hub):
    """kernelize with the kernel mapped onto CoordAtt, no way around it."""
    layer = LocalLayerRepository(hub, layer_name="CoordAtt")

    def apply(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE):
        with use_kernel_mapping({"CoordAtt": {"cpu": layer}}):
            return kernelize(model, mode=mode, device="cpu", use_fallback=False)

    return apply


@pytest.fixture
def tier(kernel):
    """How a kernelized module's call would run."""

    def of(module, x):
        assert module.forward.__func__ is kernel.layers.CoordAtt.forward
        found, _ = kernel.layers.arguments(module, x)
        return "fused" if type(found) is tuple else found.tier

    return of


def block(cls=Block, dtype=torch.float32):
    seeds.seed(0)
    return spread(cls(C, C).to(dtype)).eval()


def image(dtype=torch.float32, n=2):
    return feature_map((n, C, 7, 5), seeds.generator(1), dtype)


def near(got, wanted, limit=1e-5):
    assert max(tolerances.errors(got.detach(), wanted.detach())) < limit


# What it computes -----------------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape,layout", [((2, 24, 7, 13), "nchw"), ((3, 40, 1, 9), "nhwc")], ids=str)
def test_numbers(shape, layout, dtype, norm, mapped, tier):
    """Output, gradients and running statistics beside the truth, from the fused kernels."""

    def kernelized(case, d, backward=True):
        module = mapped(build(Block, case, d.params))
        with autocast(case):
            assert tier(module, d.x) == "fused"
            return run(module, d.x, d.grad if backward else None)

    case = Case(shape, dtype=FLOATS[dtype], layout=layout, norm=norm)
    compare(case, under_test=kernelized)
    if norm != "batch":
        compare(case, backward=False, under_test=kernelized)


@COMPILED
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_one_graph(training, mapped):
    plain = nn.Sequential(nn.Conv2d(C, C, 1), block()).train(training)
    ours = mapped(copy.deepcopy(plain))
    results = []
    torch._dynamo.utils.counters.clear()
    for model in (plain, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        x = image().requires_grad_()
        out = model(x)
        out.square().mean().backward()
        results.append([out, x.grad])
    for (name, p), q in zip(plain.named_parameters(), ours.parameters()):
        if name != "1.conv1.bias" or not training:
            results[0].append(p.grad), results[1].append(q.grad)
    results[0] += plain.buffers()
    results[1] += ours.buffers()
    for wanted, got in zip(*results, strict=True):
        near(got, wanted) if wanted.is_floating_point() else torch.testing.assert_close(got, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@COMPILED
def test_one_operator_in_the_graph(kernel, mapped):
    found = []

    def backend(graph, _):
        found.extend(n.target for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
        return graph.forward

    class Fresh(HSwish):
        """Met first by the compiler."""

    model = block()
    model.act = Fresh()
    mapped(model)
    with torch.no_grad():
        near(
            torch.compile(model, fullgraph=True, backend=backend)(image()),
            PaperCoordAtt.forward(model, image()),
        )
    assert found == [getattr(torch.ops, kernel.__name__).attend.default]


# Which tier -----------------------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("act,wanted", [
    (HSwish, "fused"), (nn.Hardswish, "fused"), (functools.partial(nn.SiLU, inplace=True), "fused"),
    (Other, "hybrid"), (StraightThrough, "hybrid"), (nn.GELU, "hybrid"), (nn.PReLU, "hybrid"),
])  # fmt: skip
def test_activations(act, wanted, mapped, tier):
    """Of a class of the user's own: fused where it computes what a kernel does, value and derivative."""
    module = block()
    module.act = act()
    mapped(module)
    x = image().requires_grad_()
    assert tier(module, x) == wanted
    results = []
    for call in (module, functools.partial(PaperCoordAtt.forward, module)):
        out = call(x)
        results.append((out, *torch.autograd.grad(out.sum(), [x, module.conv1.weight])))
    for got, expected in zip(*results):
        near(got, expected)


@COMPILED
def test_an_activation_that_changed_is_seen(mapped, tier):
    module = mapped(block())
    assert tier(module, image()) == "fused"
    module.act.sigmoid.relu = nn.ReLU()
    assert tier(module, image()) == "hybrid"
    near(module(image()), PaperCoordAtt.forward(module, image()))
    module.act = HSwish()
    module.act.sigmoid.register_forward_hook(lambda *_: None)
    assert tier(module, image()) == "hybrid"


def with_hook(module):
    module.conv1.register_forward_hook(lambda child, args, out: 2 * out)


def with_group_norm(module):
    module.bn1 = nn.GroupNorm(2, 8)


@COMPILED
@pytest.mark.parametrize("change", [with_hook, with_group_norm])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_hybrid(change, training, mapped, tier):
    module = block().train(training)
    change(module)
    plain = copy.deepcopy(module)
    mapped(module)
    x = image().requires_grad_()
    assert tier(module, x) == "hybrid"
    near(module(x), plain(x))
    parameters = dict(module.named_parameters())
    got = torch.autograd.grad(module(x).square().sum(), [x, *parameters.values()])
    wanted = torch.autograd.grad(plain(x).square().sum(), [x, *plain.parameters()])
    for name, have, expected in zip(["x", *parameters], got, wanted):
        if not (training and name == "conv1.bias"):
            near(have, expected)


def test_traced_and_exported(mapped):
    class Fresh(HSwish):
        """Met first by the tracer."""

    module = block()
    module.act = Fresh()
    mapped(module)
    for again in (torch.jit.trace(module, image()), torch.export.export(module, (image(),)).module()):
        assert torch.equal(again(image()), PaperCoordAtt.forward(module, image()))


def test_own_forward_where_no_kernel_can(mapped):
    """vmap, forward-mode AD, double backward, a backend that says so: the module's own forward, to the bit."""
    module, plain = mapped(block(dtype=torch.float64)), block(PaperCoordAtt, torch.float64)
    x = image(torch.float64)
    assert torch.equal(torch.func.vmap(module)(x[None]), torch.func.vmap(plain)(x[None]))
    jvp = lambda m: torch.func.jvp(m, (x,), (torch.ones_like(x),))
    assert all(map(torch.equal, jvp(module), jvp(plain)))
    assert torch.autograd.gradgradcheck(module, x[:1, :, :2, :2].clone().requires_grad_(), fast_mode=True)


def test_the_kernels_switches_are_its_own(kernel, mapped, tier):
    module, x = mapped(block()), image()
    with kernel.use_backend("reference"):
        assert tier(module, x) == "reference" and torch.equal(module(x), PaperCoordAtt.forward(module, x))
    if kernel.backends()["cpu"].available:
        with coordatt_fast.use_backend("reference"):
            assert tier(module, x) == "fused"


# What it refuses ------------------------------------------------------------------------------------


class Residual(Block):
    def forward(self, x):
        return x + super().forward(x)


def adding_x(module):
    module.skip = True


def with_a_child_more(module):
    module.conv2 = nn.Conv2d(C, C, 1)


def without_a_child(module):
    del module.pool_h
    module.pool = nn.AdaptiveAvgPool2d((None, 1))


def with_no_activation(module):
    module.act = None


def with_a_parameter(module):
    module.scale = nn.Parameter(torch.ones(1))


def with_a_hooked_pool(module):
    module.pool_w.register_forward_hook(lambda child, args, out: 2 * out)


@pytest.mark.parametrize("change,words", [
    (adding_x, "adds x"), (with_a_child_more, "other children: conv2"), (without_a_child, "no child pool_h"),
    (with_no_activation, "no child act"), (with_a_parameter, "parameters or buffers beside"), (with_a_hooked_pool, None),
])  # fmt: skip
def test_what_cannot_be_the_authors_runs_its_own_forward(change, words, mapped, tier, caplog):
    @kernels.use_kernel_forward_from_hub("CoordAtt")
    class Own(Block):
        def forward(self, x):
            return 3 * x

    module = block(Own)
    change(module)
    mapped(module)
    assert tier(module, image()) == "original"
    with caplog.at_level(logging.WARNING):
        assert torch.equal(module(image()), 3 * image()) and torch.equal(module(image()), 3 * image())
    said = [record.getMessage() for record in caplog.records if "runs its own forward" in record.getMessage()]
    assert len(said) == (words is not None) and all(words in text and "Own" in text for text in said)


def test_a_subclass_with_another_forward_runs_that(mapped, tier):
    module = mapped(block(Residual))
    assert tier(module, image()) == "original"
    near(module(image()), image() + PaperCoordAtt.forward(module, image()))
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(image()), module(image()))


def test_bad_input_raises_as_in_the_package(mapped):
    module, ours = mapped(block()), coordatt_fast.CoordAtt(C, C).eval()
    for x in (image()[0], image().long(), image()[:, :3], image().double(), None):
        with pytest.raises(Exception) as theirs:
            ours(x)
        with pytest.raises(theirs.type):
            module(x)


def test_the_layer_alone_has_nothing_to_compute_with(kernel):
    with pytest.raises(TypeError, match="has no parameters: kernelize maps it"):
        kernel.layers.CoordAtt()(image())


# The module stays itself ----------------------------------------------------------------------------


def test_no_state_is_added(kernel, mapped):
    module = block()
    before, attributes = copy.deepcopy(module.state_dict()), set(vars(module))
    mapped(module)
    with torch.no_grad():
        module(image())
    assert set(vars(module)) - attributes == {"forward"}
    assert before.keys() == module.state_dict().keys()
    assert all(map(torch.equal, before.values(), module.state_dict().values()))
    layer = kernel.layers.CoordAtt
    assert (
        layer.has_backward and layer.can_torch_compile and not vars(layer()).keys() - vars(nn.Module()).keys()
    )
    assert layer.__init__ is nn.Module.__init__


def test_copies_and_pickles(mapped, tier):
    module = mapped(block())
    wanted = module(image())
    other = copy.deepcopy(module)
    with torch.no_grad():
        module.conv_h.weight.zero_()
    assert other.forward.__self__ is other and torch.equal(other(image()), wanted)
    loaded = pickle.loads(pickle.dumps(other))
    near(loaded(image()), wanted)
    file = io.BytesIO()
    torch.save(other, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for again in (loaded, saved):
        assert torch.equal(mapped(again)(image()), wanted)
        assert again.forward.__self__ is again


def test_modes_and_back(hub, kernel):
    """Whether kernelize maps the layer, for each mode, device and mapping; and gives the forward back."""
    layer = LocalLayerRepository(hub, layer_name="CoordAtt")
    module = block()
    own = module.forward.__func__
    assert own is Block.forward
    for mode in (
        Mode.INFERENCE,
        Mode.INFERENCE | Mode.TORCH_COMPILE,
        Mode.TRAINING,
        Mode.TRAINING | Mode.TORCH_COMPILE,
    ):
        with use_kernel_mapping({"CoordAtt": {"cpu": {mode: layer}}}):
            kernelize(module, mode=mode, device="cpu", use_fallback=False)
            assert module.forward.__func__ is kernel.layers.CoordAtt.forward
            with use_kernel_mapping({"Unknown": {"cpu": layer}}):  # inherits the outer one
                kernelize(module, mode=mode, use_fallback=False)
            assert module.forward.__func__ is kernel.layers.CoordAtt.forward
            kernelize(module, mode=mode, device="xpu")
            assert module.forward.__func__ is own
            kernelize(module, mode=mode)
            with use_kernel_mapping({}, inherit_mapping=False):
                kernelize(module, mode=mode)
            assert module.forward.__func__ is own
    with use_kernel_mapping({"CoordAtt": {"cpu": {Mode.INFERENCE: layer}}}):
        kernelize(module, mode=Mode.INFERENCE)
        assert module.forward.__func__ is kernel.layers.CoordAtt.forward
        kernelize(module, mode=Mode.TRAINING)  # nothing is mapped for it
        assert module.forward.__func__ is own


def test_an_accelerated_model_and_a_kernelized_one(mapped, tier):
    accelerated = block(Block)
    assert coordatt_fast.accelerate(accelerated).replaced
    wanted = accelerated(image())
    near(mapped(accelerated)(image()), wanted)
    kernelized = mapped(block())
    with pytest.warns(UserWarning, match="its forward is replaced on the instance"):
        coordatt_fast.accelerate(kernelized)


# The documentation ---------------------------------------------------------------------------------


def test_the_tutorial(hub, monkeypatch):
    """Every block of docs/kernels.md, in order, beside the build/hub that make hub writes."""
    page = (ROOT / "docs/kernels.md").read_text()
    monkeypatch.chdir(hub.parent.parent)
    space = {"__name__": "tutorial"}
    monkeypatch.setitem(sys.modules, "tutorial", type(sys)("tutorial"))
    code = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    assert len(code) == 4
    for part in code:
        exec(compile(part, "docs/kernels.md", "exec"), space)
    model, images = space["model"], space["images"]
    assert model[2].conv1.weight.grad.abs().max() > 0
    assert ["forward" in vars(part) for part in space["blocks"]] == [True, False]
    first, second = space["blocks"].eval()
    x = model[1](model[0](images))
    near(space["blocks"](x), space["Residual"].forward(second, space["CoordAtt"].forward(first, x)))
