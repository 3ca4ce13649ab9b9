"""explain() tells what a call does: checked against what the profiler sees it do. Explicit choices are kept
or raise.
"""

import importlib
import itertools
import os
import subprocess
import sys
import threading

import pytest
import tolerances
import torch
from harness import Case, build, data
from test_forward import arguments
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.profiler import ProfilerActivity, profile

from coordatt_fast import CoordAtt, backends, coord_att, explain, use_backend
from coordatt_fast.backends import _default, choice

CASE = Case((2, 12, 5, 7), 8, norm="running")
FUSED_OPS = {"coordatt_fast::attend", "coordatt_fast::attend_out"}
FUSED_OPS |= {"coordatt_fast::attend_train", "coordatt_fast::attend_train_update"}
HYBRID_OPS = {"coordatt_fast::pool", "coordatt_fast::gate"}


def executed(call):
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call()
    return {event.key for event in record.key_averages() if event.key.startswith("coordatt_fast::")}


def tier_seen(call):
    ops = executed(call)
    if ops & FUSED_OPS:
        return "fused"
    return "hybrid" if ops & HYBRID_OPS else "reference"


def hooked(m):
    m.conv1.register_forward_hook(lambda m, i, o: o)


def grouped(m):
    m.bn1 = nn.GroupNorm(4, 8)


SITUATIONS = {
    "plain": (lambda m: None, "fused", ""),
    "training": (lambda m: m.train(), "fused", ""),
    "hook": (hooked, "hybrid", "conv1"),
    "GroupNorm": (grouped, "hybrid", "bn1"),
    "other activation": (lambda m: setattr(m, "act", nn.GELU()), "hybrid", "act"),
    "no normalisation": (lambda m: setattr(m, "bn1", nn.Identity()), "fused", ""),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_plan_is_what_happens(cpu, situation, grad):
    change, tier, word = SITUATIONS[situation]
    d = data(CASE)
    module = build(CoordAtt, CASE, d.params)
    change(module)
    with torch.set_grad_enabled(grad):
        plan = explain(module, d.x)
        assert (plan.tier, plan.backend) == (tier, "cpu"), str(plan)
        assert word in plan.reason and plan.reason
        assert tier_seen(lambda: module(d.x)) == tier
    for part in (plan.tier, plan.backend, plan.reason):
        assert part in str(plan)


def test_chosen_reference_runs_no_kernel():
    d = data(CASE)
    module = build(CoordAtt, CASE, d.params)
    with use_backend("reference"):
        plan = explain(module, d.x)
        assert (plan.tier, plan.backend) == ("reference", "reference") and "chosen" in plan.reason
        assert executed(lambda: module(d.x)) == set()
        assert executed(lambda: coord_att(d.x, *arguments(d.params))) == set()


def test_auto_takes_the_kernels_where_they_are():
    d = data(CASE)
    module = build(CoordAtt, CASE, d.params)
    expected = "fused" if backends()["cpu"].available else "reference"
    with use_backend("auto"):
        assert explain(module, d.x).tier == expected == tier_seen(lambda: module(d.x))
    if expected == "reference":
        assert backends()["cpu"].reason in explain(module, d.x).reason


def test_bytes_and_passes(cpu):
    """Forward 2 reads and 1 write of x; with a gradient to record 3 and 1 more."""
    for dtype in (torch.float32, torch.bfloat16):
        case = CASE.but(dtype=dtype)
        d = data(case)
        module, size = build(CoordAtt, case, d.params), d.x.numel() * d.x.element_size()
        with torch.no_grad():
            assert explain(module, d.x).bytes == 3 * size
        with_gradient = explain(module, d.x.requires_grad_())
        assert with_gradient.bytes == 7 * size
        assert sum(with_gradient.passes["forward"]) == 3 and sum(with_gradient.passes["backward"]) == 4


def test_explicit_choice_that_cannot_run_raises():
    d = data(CASE)
    module = build(CoordAtt, CASE, d.params)
    for name, entry in backends().items():
        if not entry.available:
            with use_backend(name), pytest.raises(RuntimeError, match=name):
                module(d.x)
    meta = module.to("meta")
    with use_backend("cpu"), pytest.raises(RuntimeError, match="cpu"):
        meta(d.x.to("meta"))
    assert meta(d.x.to("meta")).shape == d.x.shape


def test_choice_is_restored():
    """Nested, and also when the block raises."""
    d = data(CASE)
    module = build(CoordAtt, CASE, d.params)
    tier = lambda: explain(module, d.x).tier
    before = tier()
    with pytest.raises(KeyError), use_backend("reference"):
        with use_backend("auto"):
            assert tier() == before
        assert tier() == "reference"
        raise KeyError
    assert tier() == before


@pytest.fixture
def chosen():
    """The name that counts in this thread; every block of the test has to be left."""
    before = choice.name
    yield lambda: choice.name
    assert choice.name == before and choice.entries == []


def test_blocks_left_in_the_wrong_order(chosen):
    """What is open counts, the last entered first; each of the 3! orders."""
    start = chosen()
    for order in itertools.permutations(range(3)):
        names = ["reference", "auto", "reference"]
        blocks = [use_backend(name) for name in names]
        for block in blocks:
            block.__enter__()
        left = list(range(3))
        for index in order:
            blocks[index].__exit__(None, None, None)
            left.remove(index)
            assert chosen() == (names[left[-1]] if left else start), order


def test_generators_that_hold_a_block(chosen):
    """Two interleaved; one left by an exception, one never finished."""

    def steps(name):
        with use_backend(name):
            yield chosen()
            yield chosen()

    start = chosen()
    first, second = steps("reference"), steps("auto")
    assert [next(first), next(second)] == ["reference", "auto"]
    first.close()
    assert chosen() == "auto" and next(second) == "auto"
    with pytest.raises(KeyError):
        second.throw(KeyError)
    assert chosen() == start


def test_a_block_left_in_another_thread(chosen):
    """As where the garbage collector closes a generator: it ends where it began, and nowhere else."""
    start, there = chosen(), []

    def steps():
        with use_backend("reference"):
            yield

    def elsewhere(generator):
        with use_backend("auto"):
            generator.close()
            there.append(choice.name)
        there.append(choice.name)

    generator = steps()
    next(generator)
    thread = threading.Thread(target=elsewhere, args=(generator,))
    thread.start()
    thread.join()
    assert chosen() == start and there == ["auto", _default]


def test_an_unknown_name_leaves_the_choice_alone(chosen):
    with use_backend("reference"):
        for name in ("tpu", None, 3, "CPU"):
            with pytest.raises(ValueError, match="expected one of auto"), use_backend(name):
                pass
            assert chosen() == "reference"


def test_blocks_in_compiled_code(chosen):
    """Inside one graph, nested, and again after it."""
    d = data(CASE)
    module = build(CoordAtt, CASE, d.params)
    graphs = []

    def backend(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def call(x):
        with use_backend("reference"):
            y = module(x)
            with use_backend("auto"):
                y = module(y)
        return y

    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        for _ in range(2):
            assert max(tolerances.errors(compiled(d.x), call(d.x))) < 1e-5
    assert len(graphs) == 1 and len([t for t in graphs[0] if "sigmoid" in t]) >= 2
    fast = len([t for t in graphs[0] if "coordatt_fast" in t])
    assert fast == (1 if backends()["cpu"].available else 0)


def test_unknown_backend_names_the_valid_ones():
    with pytest.raises(ValueError, match="tpu.*auto.*cpu.*reference"):
        with use_backend("tpu"):
            pass


def test_backends_lists_all_with_reasons():
    listed = backends()
    assert list(listed) == ["cpu", "cuda", "triton", "reference"]
    assert listed["reference"].available
    for name, entry in listed.items():
        assert entry.reason, name


def test_a_library_that_was_built_loads():
    """Without this the whole suite could skip its way past a broken build."""
    from coordatt_fast import library

    status = library.load()
    if status.path.exists():
        assert status.loaded, status.reason
    assert backends()["cpu"].available == status.loaded


PROGRAM = """
import torch, coordatt_fast
m = coordatt_fast.CoordAtt(16, 16).eval()
x = torch.zeros(1, 16, 4, 4)
plan = coordatt_fast.explain(m, x)
m(x)
print(plan.tier, plan.backend)
"""


def program(value):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"COORDATT_FAST_BACKEND": value},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("value", ["reference", "auto", "cpu", "cuda", "nonsense"])
def test_environment_variable(value):
    result = program(value)
    available = backends()["cpu"].available
    if value in ("cuda", "nonsense") or (value == "cpu" and not available):
        assert result.returncode != 0 and value in result.stderr
        return
    assert result.returncode == 0, result.stderr
    fast = available and value != "reference"
    assert result.stdout.split() == (["fused", "cpu"] if fast else ["reference", "reference"])


def test_unusual_calls_say_why():
    """Each falls back with a reason that names the cause, and the call itself works."""
    d = data(CASE)
    module = build(CoordAtt, CASE, d.params)

    class Tagged(torch.Tensor):
        pass

    plan = explain(module, d.x.as_subclass(Tagged))
    assert plan.tier == "reference" and "Tagged" in plan.reason
    assert type(module(d.x.as_subclass(Tagged))) is Tagged
    reasons = []
    torch.func.vmap(lambda x: reasons.append(explain(module, x)) or module(x))(torch.stack([d.x, d.x]))
    assert reasons[0].tier == "reference" and reasons[0].reason
    meta = explain(build(CoordAtt, CASE, d.params).to("meta"), d.x.to("meta"))
    assert meta.tier == "reference" and "meta" in meta.reason


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: nn.utils.weight_norm(m.conv1), "conv1.weight is computed before each call, by a hook"),
        (lambda m: prune.l1_unstructured(m.conv_h, "bias", 0.5), "conv_h.bias is computed before each call"),
        (lambda m: parametrizations.spectral_norm(m.bn1), "bn1 is a ParametrizedBatchNorm2d"),
        (lambda m: setattr(m, "conv_w", nn.Conv1d(8, 12, 1)), "conv_w is a torch.nn.modules.conv.Conv1d"),
        (lambda m: m.bn1.register_forward_hook(print), "bn1 has hooks"),
        (lambda m: setattr(m.act, "forward", torch.relu), "act has a forward of its own"),
    ],
    ids=["weight_norm", "pruning", "parametrization", "class", "hook", "forward"],
)
def test_why_children_are_called(cpu, change, words):
    module = CoordAtt(12, 12)
    change(module)
    plan = explain(module, torch.randn(2, 12, 5, 7))
    assert plan.tier == "hybrid" and words in plan.reason, plan.reason


def test_replicas_of_data_parallel(cpu, monkeypatch):
    """As nn.DataParallel makes them, with copies in place of those on other devices."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    copies = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    module = CoordAtt(12, 12)
    x = torch.randn(2, 12, 5, 7)
    (replica,) = replicate.replicate(module, [0])
    plan = explain(replica, x)
    assert plan.tier == "hybrid" and "replica of nn.DataParallel" in plan.reason, plan.reason
    assert max(tolerances.errors(replica(x), module(x).double())) < 1e-6


def test_command_line():
    """python -m coordatt_fast prints versions, every backend with its reason, SIMD level, threads."""
    result = subprocess.run([sys.executable, "-m", "coordatt_fast"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    import coordatt_fast

    for word in (
        coordatt_fast.__version__,
        torch.__version__,
        sys.version.split()[0],
        *backends(),
        "threads",
    ):
        assert word in result.stdout, word
    for entry in backends().values():
        assert entry.reason in result.stdout
    if backends()["cpu"].available:
        assert torch.ops.coordatt_fast.simd_level() in result.stdout


def test_reference_and_kernels_agree_through_the_switch(cpu):
    d = data(CASE)
    module = build(CoordAtt, CASE, d.params)
    fast = module(d.x)
    with use_backend("reference"):
        slow = module(d.x)
    assert not fast.equal(slow) or fast.numel() < 10, "both calls ran the same code?"
    assert max(tolerances.errors(fast, slow)) < 1e-5


def test_explain_takes_this_packages_modules():
    from paper import PaperCoordAtt

    with pytest.raises(TypeError, match=r"paper\.PaperCoordAtt"):
        explain(PaperCoordAtt(8, 8), torch.zeros(1, 8, 3, 3))


def test_inplace_and_out_exclude_each_other():
    d = data(CASE)
    with pytest.raises(ValueError, match="inplace"):
        coord_att(d.x, *arguments(d.params), inplace=True, out=torch.empty_like(d.x))
