"""The package as a kernel of the Hugging Face Hub: put together, loaded by kernels, mapped onto CoordAtt by kernelize."""

import copy
import functools
import hashlib
import io
import json
import logging
import os
import pickle
import subprocess
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

pytest.importorskip("tomllib", reason="hub/assemble.py needs Python 3.11")
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


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """build/hub, made by the command."""
    out = tmp_path_factory.mktemp("tutorial") / "build/hub"
    command = [sys.executable, "-m", "hub.assemble", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def kernel(hub):
    return kernels.get_local_kernel(hub)


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

    model = mapped(block())
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


# The folder -----------------------------------------------------------------------------------------


def test_the_folder_is_as_kernels_wants_it(hub):
    """By kernels' own readers of build.toml, metadata and digests."""
    from kernels.variants import parse_variant

    _rust = kernels._rust
    backends = {str(backend) for backend in _rust.Build.open(hub).general.backends}
    variants = sorted(path for path in (hub / "build").iterdir() if path.is_dir())
    assert {f"torch-{backend}" for backend in backends} <= {path.name for path in variants}
    found = set()
    for path in variants:
        assert parse_variant(path.name).variant_str == path.name
        metadata = _rust.Metadata.read_from_file(path / "metadata.json")
        metadata.digest.validate(_rust.Digest.hash_variant(_rust.DigestAlgorithm.SHA256, path))
        assert metadata.name.python_name == "coordatt_fast" and metadata.license == "mit"
        assert metadata.id.isidentifier() and str(metadata.backend.backend_type).lower() in metadata.id
        found.add(metadata.id)
    assert len(found) == len(variants)
    if coordatt_fast.backends()["cpu"].available:
        assert any(path.name.startswith("torch-stable-abi211-cpu-") for path in variants)
    extension = {
        str(path.relative_to(hub / "torch-ext/coordatt_fast")) for path in (hub / "torch-ext").rglob("*.*")
    }
    metadata = json.loads((hub / "build/torch-cpu/metadata.json").read_text())
    assert extension | {"coordatt_fast/__init__.py"} == set(metadata["digest"]["files"])
    assert {"layers.py", "kernels/gate.py", "lib/build.json"} <= extension


STRANGER = """
import importlib.util, os, pathlib, sys, torch
sys.modules["coordatt_fast"] = None  # an import of it raises
from kernels import LayerRepository, Mode, get_kernel, get_local_kernel, kernelize, use_kernel_mapping
from test_integration_kernels_block import Block

hub = pathlib.Path(sys.argv[1])
x, module = torch.randn(2, 24, 5, 4), Block(24, 24).eval()
wanted = module(x)
layer = LayerRepository("someone/coordatt-fast", layer_name="CoordAtt", version=0)
with use_kernel_mapping({"CoordAtt": {"cpu": layer}}):
    kernelize(module, mode=Mode.TRAINING, device="cpu", use_fallback=False)
assert torch.allclose(module(x), wanted, atol=1e-6)
cached = sys.modules[module.forward.__func__.__module__.partition(".")[0]]
assert cached.library.load().path.is_symlink() or not cached.backends()["cpu"].available
print(cached.__name__, cached.backends()["cpu"].available)
os.environ["LOCAL_KERNELS"] = f"someone/else={hub}"
assert get_kernel("someone/else", version=0).backends() == cached.backends()
for variant in sorted((hub / "build").glob("torch-*")):
    kernel = get_local_kernel(variant)
    for path in variant.rglob("*.py"):
        name = ".".join(path.relative_to(variant).with_suffix("").parts)
        needs_library = name == "joined" and not kernel.backends()["cpu"].available
        if path.name != "__init__.py" and not name.startswith("kernels.") and not needs_library:
            importlib.import_module(f"{kernel.__name__}.{name}")
    ours = kernel.CoordAtt(24, 24).eval()
    ours.load_state_dict(module.state_dict())
    assert torch.allclose(ours(x), wanted, atol=1e-6)
    spec = importlib.util.spec_from_file_location("older", variant / "coordatt_fast/__init__.py")
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    assert older.layers is kernel.layers and set(older.__all__) == set(kernel.__all__)
"""


@pytest.fixture
def cache(hub, tmp_path):
    """HF_HOME with the kernel as the Hub's client keeps what it has downloaded: links to files named by content."""
    folder, revision = tmp_path / "hub/kernels--someone--coordatt-fast", "0" * 40
    for place in ("refs", "blobs"):
        (folder / place).mkdir(parents=True)
    (folder / "refs/v0").write_text(revision)
    for path in (hub / "build").rglob("*.*"):
        if path.is_file() and path.suffix != ".pyc":
            blob = folder / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.exists() or blob.hardlink_to(path)
            link = folder / "snapshots" / revision / path.relative_to(hub)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return tmp_path


def test_from_a_cache_without_the_package(hub, cache, tmp_path):
    """Every variant, and all of them in one process, where nothing of coordatt_fast can be imported."""
    (tmp_path / "test_integration_kernels_block.py").write_text(
        "import kernels\nfrom paper import PaperCoordAtt\n\n\n"
        '@kernels.use_kernel_forward_from_hub("CoordAtt")\nclass Block(PaperCoordAtt):\n    pass\n'
    )
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    command = [sys.executable, "-c", STRANGER, str(hub)]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    name, available = result.stdout.split()
    assert name.startswith("_coordatt_fast_cpu_") and available == str(
        coordatt_fast.backends()["cpu"].available
    )


@COMPILED
def test_each_copy_has_its_own_operators(kernel):
    x = image()
    ours, theirs = torch.ops.coordatt_fast, getattr(torch.ops, kernel.__name__)
    assert kernel.__name__ != "coordatt_fast" and torch.equal(ours.pool(x), theirs.pool(x))
    assert (
        ours.pool.default.name() == "coordatt_fast::pool"
        and theirs.pool.default.name() == f"{kernel.__name__}::pool"
    )
    ours.set_simd_level("baseline" if ours.simd_level() != "neon" else "neon")
    assert theirs.simd_level() == kernel.backends()["cpu"].reason.split()[-1]
    ours.set_simd_level(theirs.simd_level())


@pytest.mark.parametrize("line", [
    "import coordatt_fast.ops", 'torch.ops.coordatt_fast_new.pool', 'torch.library.custom_op("coordatt_fast::new")',
])  # fmt: skip
def test_what_it_cannot_rewrite_is_refused(line):
    from hub.assemble import rewritten

    with pytest.raises(SystemExit, match="do not know how to rewrite"):
        rewritten(f"import torch\n{line}\n", ".")


def test_a_library_that_is_not_fit_is_refused():
    from hub.assemble import renamed, too_new

    with pytest.raises(SystemExit, match="no place for the operators' namespace"):
        renamed(b"\x7fELF", "_coordatt_fast_cpu_0")
    wanted = b"\0GLIBC_2.28\0GLIBC_2.34\0GLIBCXX_3.4.24\0GLIBCXX_3.4.30\0CXXABI_1.3.9\0"
    assert too_new(wanted) == ["GLIBC 2.34", "GLIBCXX 3.4.30"]


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
    near(
        space["blocks"](model[1](model[0](images))),
        nn.Sequential.forward(space["blocks"], model[1](model[0](images))),
    )
