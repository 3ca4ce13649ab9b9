"""accelerate(): what is recognised runs as before only faster, what only looks like it is left alone, and
nothing but the class of a module changes.
"""

import contextlib
import copy
import io
import pickle
import warnings

import lookalikes
import pytest
import seeds
import tolerances
import torch
import variants
from harness import feature_map
from paper import PaperCoordAtt
from torch import nn
from variants import GOOD, C, CoordAtt, Released

import coordatt_fast
from coordatt_fast import accelerate, explain, restore, use_backend


def spread(module, seed=3):
    """Weights and statistics drawn so that gates and activations reach their whole range."""
    g = seeds.generator(seed)
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        if not t.is_floating_point():
            continue
        draw = torch.randn(t.shape, generator=g, dtype=torch.float64)
        if name.endswith("running_var"):
            draw = 0.5 + draw.square()
        elif t.dim() == 4:
            draw *= 1.5 / t.shape[1] ** 0.5
        elif name.endswith("weight"):
            draw = 1 + 0.4 * draw
        t.data.copy_(draw)
    return module


def subject(name, dtype=torch.float64):
    """A variant as its users have it, and a map it takes."""
    seeds.seed(0)
    module = spread(GOOD[name][0]().to(dtype))
    size = (7, 7) if "square" in name else variants.MAP
    g = seeds.generator(4)
    return module, feature_map((3, C, *size), g, dtype), feature_map((3, C, *size), g, dtype)


def results(module, x, grad):
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = module(x)
    out.backward(grad)
    found = {"out": out.detach(), "d x": x.grad.clone()}
    found |= {f"d {n}": None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
    return found | {n: b.clone().double() for n, b in module.named_buffers()}


def squeeze_bias(module):
    """The bias that batch normalisation cancels."""
    first = next(n for n, m in module.named_modules() if isinstance(m, nn.Conv2d))
    return f"d {first}.bias"


def agree(ours, theirs, limit=tolerances.FORMULAS_AGREE, but=()):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name in but:
            continue
        assert (value is None) == (ours[name] is None), name
        if value is not None:
            assert max(tolerances.errors(ours[name], value)) < limit, name


def accelerated(module):
    report = accelerate(module)
    assert len(report.replaced) == 1 and not report.skipped, str(report)
    return module


@pytest.fixture(autouse=True)
def _compiled_where_there_is_one():
    with use_backend("cpu" if coordatt_fast.backends()["cpu"].available else "auto"):
        yield


# What is recognised -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", GOOD)
def test_computes_what_it_did(name, training):
    module, x, grad = subject(name)
    ours = accelerated(copy.deepcopy(module)).train(training)
    expected = results(module.train(training), x, grad)
    agree(results(ours, x, grad), expected, but=[squeeze_bias(module)] if training else ())


@pytest.mark.parametrize("name", GOOD)
def test_report_and_tier(name, cpu):
    module, x, _ = subject(name, torch.float32)
    keys = list(module.state_dict())
    cls, (_, tier, words) = type(module).__name__, GOOD[name]
    report = accelerate(module)
    (row,) = report.replaced
    assert (row.path, row.cls, row.tier) == ("", cls, tier) and words in row.differs, str(report)
    assert explain(module, x).tier == tier, str(explain(module, x))
    assert "1 module accelerated" in str(report) and tier in str(report)
    assert list(module.state_dict()) == keys


@pytest.mark.parametrize("name", lookalikes.BAD)
def test_left_alone(name):
    make, reason = lookalikes.BAD[name]
    module = make()
    kind = type(module)
    with pytest.warns(UserWarning, match="nothing to accelerate"):
        report = accelerate(nn.Sequential(module))
    assert not report.replaced and type(module) is kind
    (row,) = report.skipped
    assert (row.path, row.cls) == ("0", kind.__name__) and reason in row.reason, str(report)
    assert reason in str(report)


@pytest.mark.parametrize("name", ["conv1", "act", "bn1"])
def test_children_of_other_classes_keep_their_say(name):
    """A subclass of a known child computes something else than the class it stands for."""

    class Scaled(type(getattr(PaperCoordAtt(C, C, activation="silu"), name))):
        def forward(self, x):
            return super().forward(x) * 1.5

    module, x, grad = spread(PaperCoordAtt(C, C, activation="silu").double()), *subject("SiLU")[1:]
    getattr(module, name).__class__ = Scaled
    expected = results(copy.deepcopy(module), x, grad)
    agree(results(accelerated(module), x, grad), expected, but=["d conv1.bias"])
    assert explain(module, x).tier != "fused"


def test_one_or_no_argument_more():
    """Optional inputs go to the module's own forward."""

    class Optional(CoordAtt):
        def forward(self, x, scale=None):
            out = super().forward(x)
            return out if scale is None else out * scale

    module, (_, x, _) = Optional().double(), subject("the authors'")
    expected = module(x), module(x, 2.0), module(x=x)
    accelerated(module.train())
    for got, wanted in zip((module(x), module(x, 2.0), module(x=x)), expected):
        assert max(tolerances.errors(got, wanted)) < tolerances.FORMULAS_AGREE


# Frames: where a module may sit --------------------------------------------------------------------


def network(cls=Released):
    seeds.seed(2)
    block = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), cls())
    return nn.Sequential(block, nn.ModuleDict({"neck": cls()}).neck, nn.Conv2d(C, 4, 1)).double()


def test_everything_but_the_class_stays():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    objects = dict(model.named_modules(remove_duplicate=False))
    tensors = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model[0][1].conv2.weight.requires_grad_(False)
    model.eval()
    model[1].train()
    flags = {n: m.training for n, m in model.named_modules()}
    random = torch.get_rng_state()
    report = accelerate(model)
    assert [r.path for r in report.replaced] == ["0.1", "1"]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(model.get_submodule(n) is m for n, m in objects.items())
    assert {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model[0][1].conv2.weight.requires_grad and model[1].conv2.weight.requires_grad
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert isinstance(model[1], Released)
    before = model[1].conv3.weight.clone()
    model(torch.randn(2, 3, 6, 5).double()).sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].conv3.weight, before)


def test_random_numbers_stay_where_they_were():
    """Also where the forward that is tried draws some."""
    module, before = lookalikes.FunctionalDropout(), torch.get_rng_state()
    with pytest.warns(UserWarning):
        accelerate(module)
    assert torch.equal(torch.get_rng_state(), before)


def test_restore():
    model = network()
    x = torch.randn(2, 3, 6, 5).double()
    expected = model.eval()(x)
    modules = dict(model.named_modules())
    own = set(vars(model[1]))
    accelerate(model)
    assert restore(model) == ["0.1", "1"] and restore(model) == []
    assert all(model.get_submodule(n) is m for n, m in modules.items())
    assert type(model[1]) is Released and set(vars(model[1])) == own
    assert torch.equal(model(x), expected)


def test_twice():
    model = network()
    accelerate(model)
    kinds = [type(m) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = accelerate(model)
    assert not report.replaced
    assert report.skipped == [("0.1", "Released", "already accelerated"), ("1", "Released", "already accelerated")]
    assert [type(m) for m in model.modules()] == kinds
    assert accelerate(nn.Sequential(coordatt_fast.CoordAtt(C, C))).skipped[0].reason == "already a coordatt_fast.CoordAtt"


def test_nothing_there():
    with pytest.warns(UserWarning, match="nothing to accelerate"):
        report = accelerate(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert report == coordatt_fast.Report()
    with pytest.raises(TypeError, match="an nn.Module, got a dict"):
        accelerate({})


def test_one_module_in_two_places():
    block = Released().double()
    model = nn.Sequential(block, nn.ReLU(), block)
    report = accelerate(model)
    assert [r.path for r in report.replaced] == ["0"]
    assert model[0] is model[2] is block
    assert explain(model[2], torch.zeros(1, C, 4, 5).double()).tier in ("fused", "reference")


def test_residual_wrapper_around_it():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fn = CoordAtt()

        def forward(self, x):
            return x + self.fn(x)

    model = Residual()
    assert [r.path for r in accelerate(model).replaced] == ["fn"]
    assert type(model) is Residual


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_wrappers(wrap):
    inner, (_, x, _) = CoordAtt().double().eval(), subject("the authors'")
    expected = inner(x)
    model = wrap(inner) if wrap is nn.DataParallel else wrap(inner, backend="eager")
    if wrap is torch.compile:
        model(x)  # what was compiled before has to notice
    assert [r.path for r in accelerate(model).replaced] == ["_orig_mod" if wrap is torch.compile else "module"]
    assert max(tolerances.errors(model(x), expected)) < tolerances.FORMULAS_AGREE


def test_distributed(tmp_path):
    def check():
        model = nn.parallel.DistributedDataParallel(network())
        assert [r.path for r in accelerate(model).replaced] == ["module.0.1", "module.1"]
        model(torch.randn(2, 3, 6, 5).double()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check()  # the model ends in there: one that outlives the group may hang torch for good (GIL against a join)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("where", ["half", "bfloat16", "meta"])
def test_other_dtypes_and_devices(where):
    module = CoordAtt()
    module = module.to("meta") if where == "meta" else module.to(getattr(torch, where))
    accelerated(module)
    p = next(module.parameters())
    x = torch.zeros(2, C, 5, 7, dtype=p.dtype, device=p.device)
    with contextlib.nullcontext() if where != "meta" else use_backend("auto"):
        out = module(x)
    assert (out.dtype, out.device, out.shape) == (x.dtype, x.device, x.shape)


def test_called_in_odd_modes():
    modules = [CoordAtt() for _ in range(4)]
    with torch.inference_mode():
        accelerated(modules[0])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        accelerated(modules[1])
    with torch.device("meta"):
        accelerated(modules[2])
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: calls.append(args))
    accelerated(modules[3])
    assert not calls and list(nn.modules.module._global_forward_hooks) == [handle.id]
    handle.remove()


# Copies, compilers, exporters ----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["released", "in a Sequential", "nested block", "other names, activation in forward"])
def test_copies(name, way, cpu):
    module, x, grad = subject(name)
    accelerated(module)
    if way == "deepcopy":
        twin = copy.deepcopy(module)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    agree(results(twin, x, grad), results(module, x, grad), limit=1e-15)
    assert type(twin) is type(module) and explain(twin, x).tier == "fused"
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert not torch.equal(twin(x), module(x))
    assert restore(twin) == [""] and type(twin).__name__ in str(GOOD[name][0])


def test_state_dicts_both_ways():
    ours, theirs = accelerated(Released()), Released()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, C, 5, 7)
    assert max(tolerances.errors(ours.eval()(x), theirs.eval()(x))) < 1e-5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["the authors'", "nested block", "GroupNorm", "fixed size"])
def test_compiles_without_graph_breaks(name, training):
    module, x, grad = subject(name)
    expected = results(copy.deepcopy(module).train(training), x, grad)
    accelerated(module.train(training))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = {n.replace("_orig_mod.", ""): t for n, t in results(compiled, x, grad).items()}
    agree(got, expected, but=[squeeze_bias(module)] if training else ())


@pytest.mark.parametrize("name", ["the authors'", "in a Sequential", "means, no norm", "no norm, activation in forward"])
def test_scripts(name):
    module, x, _ = subject(name)
    expected = module.eval()(x)
    scripted = torch.jit.script(nn.Sequential(accelerated(module)))
    assert max(tolerances.errors(scripted(x), expected)) < tolerances.FORMULAS_AGREE


def test_exports_with_a_size_of_its_own():
    """The authors' pools do not export with dynamic sizes; the reference by the module's children does."""
    module, x, _ = subject("released")
    expected = module.eval()(x[:, :, :4, :5])
    accelerated(module)
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    with use_backend("auto"):
        program = torch.export.export(module, (x,), dynamic_shapes=[sizes])
    assert max(tolerances.errors(program.module()(x[:, :, :4, :5]), expected)) < tolerances.FORMULAS_AGREE


def test_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    module, x, _ = subject("released", torch.float32)
    expected = module.eval()(x[:, :, :4, :5])
    file = io.BytesIO()
    axes = {"x": {0: "n", 2: "h", 3: "w"}}
    with use_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerated(module)
        torch.onnx.export(module, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x[:, :, :4, :5].numpy()})
    assert max(tolerances.errors(torch.from_numpy(got), expected)) < 1e-5


def test_traces_and_transforms():
    module, x, _ = subject("released")
    expected = accelerated(module.eval())(x)
    with use_backend("auto"):
        for other in (torch.fx.symbolic_trace(module), torch.jit.trace(module, x)):
            assert max(tolerances.errors(other(x), expected)) < tolerances.FORMULAS_AGREE
        got = torch.func.functional_call(module, dict(module.named_parameters()), (x,))
        assert torch.equal(got, expected)
        got = torch.vmap(module)(x[:, None])[:, 0]
        assert max(tolerances.errors(got, expected)) < tolerances.FORMULAS_AGREE


def _around(wrap):
    class Wrapped(PaperCoordAtt):
        def forward(self, x):
            return wrap(super().forward, x)

    return Wrapped


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f, x: f(x).clamp(-8, 8),
        lambda f, x: f(x.clamp(max=12)),
        lambda f, x: f(x).clamp(-6e4, 6e4),
        lambda f, x: torch.nan_to_num(f(x)),
        lambda f, x: f(torch.nan_to_num(x)),
    ],
)
def test_what_clamps_or_cleans_values_is_left_alone(wrap):
    model = nn.Sequential(_around(wrap)(32, 32))
    with pytest.warns(UserWarning, match="nothing to accelerate"):
        report = accelerate(model)
    assert not report.replaced and "another way" in report.skipped[0].reason
