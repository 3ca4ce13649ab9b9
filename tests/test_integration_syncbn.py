"""SyncBatchNorm inside the fused passes: two gloo processes with a part of the batch each.

All scenes run in one pair of processes, which write down what they got; the tests compare it with plain
PyTorch in one process on the joined batch, in float64. There every process has a copy of its own of the
parameters, whose gradients are then those of its own images: what SyncBatchNorm leaves to
DistributedDataParallel to average.
"""

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from unittest import mock

import pytest
import tolerances
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import LAYOUTS, Case, autocast, build, data, draws, key, run, yardstick
from paper import PaperCoordAtt
from torch import nn
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from coordatt_fast import CoordAtt, accelerate, explain, joined, ops, plan

pytestmark = [
    pytest.mark.usefixtures("cpu"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
]

SHAPE, MID = (5, 24, 7, 6), 32
EXACT = Case(SHAPE, MID, torch.float64)


def nothing(module):
    pass


def cumulative(module):
    module.bn1.momentum = None
    module.bn1.num_batches_tracked.fill_(4)


def counted_in_float(module):
    cumulative(module)
    module.bn1.num_batches_tracked = module.bn1.num_batches_tracked.float()


def other_settings(module):
    module.bn1.momentum, module.bn1.eps = 0.3, 0.05


def frozen_affine(module):
    module.bn1.weight.requires_grad_(False), module.bn1.bias.requires_grad_(False)


def frozen_squeeze(module):
    module.conv1.weight.requires_grad_(False), module.conv1.bias.requires_grad_(False)


def frozen(module):
    module.requires_grad_(False)


def untracked(module):
    module.bn1.track_running_stats = False
    module.bn1.running_mean = module.bn1.running_var = module.bn1.num_batches_tracked = None


def frozen_norm(module):
    module.bn1.eval()


@dataclass(frozen=True)
class Scene:
    """change: settings, also of the truth. make: how the module is made; call: how it is called. needs_x:
    whether x requires a gradient. group: see _groups. joined: whether that makes the statistics those of all
    images."""

    case: Case = EXACT
    sizes: tuple = (2, 3)
    change: Callable = nothing
    make: str = "CoordAtt"
    call: str = "eager"
    needs_x: bool = True
    group: str | None = None
    joined: bool = True


SCENES = {
    "nchw": Scene(),
    "channels_last": Scene(EXACT.but(layout="nhwc")),
    "SiLU, skip, no bias": Scene(EXACT.but(activation="silu", skip=True, bias=False)),
    "one image and many": Scene(sizes=(4, 1)),
    "no images in one process": Scene(sizes=(0, 5)),
    "one row": Scene(EXACT.but(shape=(5, 24, 1, 9)), sizes=(1, 4)),
    "one pixel": Scene(EXACT.but(shape=(5, 24, 1, 1))),
    "not affine": Scene(EXACT.but(affine=False)),
    "momentum and eps": Scene(change=other_settings),
    "momentum None": Scene(change=cumulative),
    "batches counted in float": Scene(change=counted_in_float),
    "no running statistics": Scene(change=untracked),
    "frozen affine": Scene(change=frozen_affine),
    "frozen squeeze": Scene(change=frozen_squeeze),
    "frozen squeeze, x needs no gradient": Scene(change=frozen_squeeze, needs_x=False),
    "only x needs a gradient": Scene(change=frozen),
    "x needs no gradient": Scene(needs_x=False),
    "no gradients": Scene(call="no_grad"),
    "into x": Scene(make="inplace", call="no_grad"),
    "checkpointed": Scene(call="checkpoint"),
    "compiled": Scene(call="compile"),
    "differentiated for more": Scene(call="create_graph"),
    "DDP": Scene(make="DDP"),
    "accelerated": Scene(make="accelerated"),
    "accelerated, then converted": Scene(make="converted"),
    "accelerated, channels_last": Scene(EXACT.but(layout="nhwc"), make="accelerated"),
    "eval": Scene(EXACT.but(norm="running"), joined=False),
    "norm in eval": Scene(change=frozen_norm, joined=False),
    "a group of the same processes": Scene(group="same"),
    "a group for each process": Scene(group="alone", joined=False),
    "a group that one process is in": Scene(group="one", joined=False),
    "accelerated, a group for each process": Scene(make="accelerated", group="alone", joined=False),
}
DTYPES = {
    "float32": Case(SHAPE, MID),
    "float32 channels_last": Case(SHAPE, MID, layout="nhwc"),
    "bfloat16": Case(SHAPE, MID, torch.bfloat16),
    "bfloat16 autocast": Case(SHAPE, MID, torch.bfloat16, autocast=True),
    "bfloat16 autocast channels_last": Case(SHAPE, MID, torch.bfloat16, autocast=True, layout="nhwc"),
    "float16": Case(SHAPE, MID, torch.float16),
}
SCENES |= {name: Scene(case) for name, case in DTYPES.items()}


# In the two processes ------------------------------------------------------------------------------


def _groups(rank):
    """Every process has to make all groups, in one order."""
    alone = [dist.new_group([r]) for r in range(2)]
    # Outside of it there is no group, but a number.
    return {None: None, "same": dist.new_group([0, 1]), "alone": alone[rank], "one": alone[0]}


def _module(scene, params, group):
    """The module, and what is called in its place."""
    cls = CoordAtt if scene.make in ("CoordAtt", "inplace", "DDP") else PaperCoordAtt
    cls = functools.partial(cls, inplace=True) if scene.make == "inplace" else cls
    module = build(cls, scene.case, params)
    if scene.make == "converted":
        assert accelerate(module).replaced
    # DistributedDataParallel refuses modules on the CPU that are converted before.
    call = nn.parallel.DistributedDataParallel(module) if scene.make == "DDP" else module
    call = nn.SyncBatchNorm.convert_sync_batchnorm(call, group)
    module = call.module if scene.make == "DDP" else call
    assert type(module.bn1) is nn.SyncBatchNorm
    if scene.make == "accelerated":
        assert accelerate(module).replaced
    scene.change(module)
    return module, torch.compile(module, backend="eager") if scene.call == "compile" else call


def _called(scene, module, call, x, grad):
    """Results of one step, under the names of harness.run."""
    if scene.call == "no_grad":
        with torch.no_grad():
            result = {"out": call(x)}
        assert scene.make != "inplace" or result["out"] is x
    else:
        x.requires_grad_(scene.needs_x)
        out = checkpoint(call, x, use_reentrant=False) if scene.call == "checkpoint" else call(x)
        leaves = {"x": x} | dict(module.named_parameters())
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if scene.call == "create_graph":
            found = torch.autograd.grad(out, wanted.values(), grad, create_graph=True)
            with pytest.raises(RuntimeError, match="differentiated twice"):
                found[0].sum().backward()
        else:
            out.backward(grad)
            found = [leaf.grad for leaf in wanted.values()]
        result = {"out": out.detach()} | {f"d {name}": g.detach() for name, g in zip(wanted, found)}
    if module.training:
        result |= dict(module.named_buffers())
    return {name: t.clone() for name, t in result.items()}


def _part(scene, t, rank):
    start = sum(scene.sizes[:rank])
    return t[start : start + scene.sizes[rank]].clone()


def _step(scene, seed, rank, group):
    d = data(scene.case, seed)
    (module, call), x = _module(scene, d.params, group), _part(scene, d.x, rank)
    with autocast(scene.case), mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather:
        how = explain(module, x)
        result = _called(scene, module, call, x, _part(scene, d.grad, rank))
    assert (how.tier, how.backend) == ("fused", "cpu"), str(how)
    assert ("2 processes" in how.reason) == scene.joined, how.reason
    # Two processes make no group of more than one that differs from all: it is seen in the call alone.
    groups = {call.kwargs.get("group") for call in gather.call_args_list}
    assert groups == ({group or dist.group.WORLD} if scene.joined else set())
    return result


def _reasons():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(CoordAtt(16, 16))
    x = torch.zeros(1, 16, 3, 3)
    with mock.patch.object(ops, "operators", lambda x: ops._OPERATORS["triton"]):
        how = explain(module, x)
    assert how.tier == "hybrid" and "SyncBatchNorm" in how.reason, str(how)
    with pytest.raises(RuntimeError, match="x has 8 channels"):
        module(x[:, :8])
    x.requires_grad_()
    out = module(x)
    with pytest.raises(RuntimeError, match="under torch.func"):
        torch.func.vmap(lambda grad: torch.autograd.grad(out, x, grad))(torch.ones(2, *out.shape))


def _work(rank, folder):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        groups, found = _groups(rank), {}
        for name, scene in SCENES.items():
            seeds = range(max(draws(SHAPE), tolerances.DRAWS) if name in DTYPES else 1)
            found[name] = [_step(scene, seed, rank, groups[scene.group]) for seed in seeds]
        _reasons()
        torch.save(found, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


# In the tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process got: per scene, a dict of results for each draw."""
    folder = str(tmp_path_factory.mktemp("processes"))
    mp.start_processes(_work, (folder,), nprocs=2, start_method="spawn")
    return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(2)]


def _truth(scene, ranks):
    """The results of these processes in plain PyTorch: their images in one, each with its own parameters."""
    d = data(scene.case)
    modules = [build(PaperCoordAtt, scene.case, d.params) for _ in ranks]
    for module in modules:
        scene.change(module)
    norm = copy.deepcopy(modules[0].bn1)
    norm.weight = norm.bias = None
    maps = [_part(scene, d.x, rank).requires_grad_(scene.needs_x) for rank in ranks]
    squeezed = []
    for module, x in zip(modules, maps):
        pooled = torch.cat([module.pool_h(x), module.pool_w(x).transpose(2, 3)], dim=2)
        squeezed.append(module.conv1(pooled))
    normal = norm(torch.cat(squeezed)).split([len(x) for x in maps])
    if scene.call == "checkpoint":  # calls it again in backward
        norm(torch.cat(squeezed))
    results = []
    for module, x, u in zip(modules, maps, normal):
        if module.bn1.weight is not None:
            u = u * module.bn1.weight[:, None, None] + module.bn1.bias[:, None, None]
        h, w = x.shape[2:]
        s_h, s_w = module.act(u).split([h, w], dim=2)
        out = x * module.conv_h(s_h).sigmoid() * module.conv_w(s_w.transpose(2, 3)).sigmoid()
        results.append({"out": out + x if scene.case.skip else out})
    if scene.call != "no_grad":
        outs = [result["out"] for result in results]
        torch.autograd.backward(outs, [_part(scene, d.grad, rank) for rank in ranks])
    for module, x, result in zip(modules, maps, results):
        result["out"] = result["out"].detach()
        leaves = {"x": x} | dict(module.named_parameters())
        if scene.call != "no_grad":
            result |= {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
        if module.training:
            result |= {f"bn1.{name}": buffer for name, buffer in norm.named_buffers()}
    return results


@pytest.mark.parametrize("scene", [name for name in SCENES if name not in DTYPES])
def test_one_process_on_the_joined_batch(scene, processes):
    got, scene = [process[scene][0] for process in processes], SCENES[scene]
    expected = _truth(scene, (0, 1)) if scene.joined else [*_truth(scene, (0,)), *_truth(scene, (1,))]
    if scene.make == "DDP":
        for name in expected[0].keys() - {"d x"}:
            if name.startswith("d "):
                expected[0][name] = expected[1][name] = (expected[0][name] + expected[1][name]) / 2
    cancels = ["d conv1.bias"] if scene.case.norm == "batch" and scene.change is not frozen_norm else []
    for rank in range(2):
        assert got[rank].keys() == expected[rank].keys()
        for name, value in expected[rank].items():
            ours = got[rank][name]
            assert (ours.shape, ours.dtype) == (value.shape, value.dtype), name
            if name in cancels:
                # Its sum over the processes is zero by algebra, and so is what each of them gives.
                assert (expected[0][name] + expected[1][name]).abs().max() < tolerances.FORMULAS_AGREE
                assert not torch.count_nonzero(ours)
            elif name == "bn1.num_batches_tracked":
                assert torch.equal(ours, value)
            elif value.numel():
                error = max(tolerances.errors(ours, value))
                assert error < tolerances.FORMULAS_AGREE, (rank, name, error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes(dtype, processes):
    """The parameters' gradients of both processes together are those of the joined batch."""
    case, results = DTYPES[dtype], []
    for first, second in zip(*(process[dtype] for process in processes)):
        result = {}
        for name, value in first.items():
            if name in ("out", "d x"):
                result[name] = torch.cat([value, second[name]])
            elif name.startswith("d "):
                result[name] = (value.double() + second[name].double()).to(value.dtype)
            elif value.is_floating_point():
                tolerances.assert_same_bits(value, second[name], name)
                result[name] = value
        results.append(result)
    tolerances.check(
        results.__getitem__,
        yardstick(case.but(layout="nchw"), True),
        key=key(case),
        draws=draws(SHAPE),
        exactly_zero=case.exactly_zero,
    )


# In one process, as if another had the same images ---------------------------------------------------


@pytest.fixture
def mirrored(monkeypatch):
    monkeypatch.setattr(plan, "_process_group", lambda sync: "two processes")
    monkeypatch.setattr(joined, "_gathered", lambda t, group: torch.stack([t, t]))


def _mirrored_step(case):
    d = data(case)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(build(CoordAtt, case, d.params))
    return run(module, d.x, d.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_simd_level(layout, simd, mirrored):
    case = EXACT.but(layout=layout, shape=(5, 37, 7, 6))
    d = data(case)
    got, expected = _mirrored_step(case), run(build(CoordAtt, case, d.params), d.x, d.grad)
    rows = 5 * (7 + 6)
    moved = expected["bn1.running_var"] - 0.9 * d.params["bn1.running_var"]
    expected["bn1.running_var"] += (2 * rows / (2 * rows - 1) * (rows - 1) / rows - 1) * moved
    assert not torch.count_nonzero(got.pop("d conv1.bias"))
    for name, value in got.items():
        assert max(tolerances.errors(value, expected[name])) < tolerances.FORMULAS_AGREE, name


def test_threads_give_the_same_bits(mirrored):
    for layout in LAYOUTS:
        case = Case((3, 40, 17, 19), MID, layout=layout)
        expected = _mirrored_step(case)
        for count in (2, 3):
            torch.set_num_threads(count)
            for name, value in _mirrored_step(case).items():
                tolerances.assert_same_bits(value, expected[name], name)
        torch.set_num_threads(1)


class Record(TorchDispatchMode):
    """Keeps the arguments of the package's operators as they were before the call."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "coordatt_fast":
            self.calls[func] = [a.clone() if torch.is_tensor(a) else a for a in args]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16 autocast channels_last"])
def test_operators(dtype, mirrored):
    """Schemas and what the compiler is told of the results."""
    case = DTYPES[dtype]
    record = Record()
    record.calls = {}
    with record, autocast(case):
        _mirrored_step(case)
    assert sorted(op.name() for op in record.calls) == sorted(
        f"coordatt_fast::attend_{half}_{part}"
        for half in ("train", "backward")
        for part in ("local", "joined")
    )
    for op, args in record.calls.items():
        opcheck(op, args)


def test_flops(mirrored):
    case = Case(SHAPE, MID)
    with (
        mock.patch.object(plan, "_process_group", lambda sync: None),
        FlopCounterMode(display=False) as alone,
    ):
        _mirrored_step(case)
    with FlopCounterMode(display=False) as both:
        _mirrored_step(case)
    assert alone.get_total_flops() == both.get_total_flops() > 0


def test_alone_it_is_a_batch_norm():
    """Without a process group, and for what is then sent through it: the same bits."""
    case = Case(SHAPE, MID)
    d = data(case)
    for training in (True, False):
        modules = [build(CoordAtt, case, d.params).train(training) for _ in range(2)]
        modules[1] = nn.SyncBatchNorm.convert_sync_batchnorm(modules[1])
        assert type(modules[1].bn1) is nn.SyncBatchNorm and explain(modules[1], d.x).tier == "fused"
        results = []
        for module in modules:
            x = d.x.clone().requires_grad_()
            out = module(x)
            out.backward(d.grad)
            results.append([out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_one_process_in_a_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(CoordAtt(24, 24))
        found = plan.arguments(module.__dict__, torch.zeros(SHAPE))
        assert type(found) is tuple and found[-2] is None
    finally:
        dist.destroy_process_group()
