"""The block under PyTorch's data parallelism: gloo, two processes that share one file; both sides must equal one process
on the joined batch where nothing depends on batch statistics.
"""

import copy

import pytest
import seeds
import tolerances
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from paper import PaperCoordAtt
from torch import nn

import coordatt_fast
from coordatt_fast import CoordAtt, accelerate, explain, restore

C, WORLD = 24, 2


def _ours():
    module = CoordAtt(C, C)
    module.load_state_dict(PaperCoordAtt(C, C).state_dict())
    return module.double()


def _accelerated():
    module = PaperCoordAtt(C, C).double()
    assert accelerate(module).replaced
    return module


MAKERS = {"CoordAtt": _ours, "accelerated": _accelerated}


def _wrapped(way, module):
    if way == "DDP":
        return nn.parallel.DistributedDataParallel(module)
    if way == "replicate":
        from torch.distributed._composable.replicate import replicate

        return replicate(module)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module)


def _gradient(parameter):
    grad = parameter.grad
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def _check(way, name, rank):
    """One step over this process's half against the whole batch in plain PyTorch; the normalisation is frozen."""
    seeds.seed(0)
    module = MAKERS[name]()
    module.bn1.running_mean.normal_(), module.bn1.running_var.uniform_(0.5, 2)
    plain = PaperCoordAtt(C, C).double()
    plain.load_state_dict(module.state_dict())
    plain.bn1.eval()
    x = torch.randn(4, C, 9, 6, dtype=torch.float64)
    grad = torch.randn_like(x)
    expected = plain(x)
    (expected * grad).sum().div(WORLD).backward()
    wrapped = _wrapped(way, module)
    module.bn1.eval()
    half = slice(2 * rank, 2 * rank + 2)
    out = wrapped(x=x[half])
    (out * grad[half]).sum().backward()
    assert max(tolerances.errors(out.detach(), expected[half].detach())) < tolerances.FORMULAS_AGREE
    for (key, p), q in zip(module.named_parameters(), plain.parameters()):
        assert max(tolerances.errors(_gradient(p), q.grad)) < tolerances.FORMULAS_AGREE, (way, name, key)
    if way == "replicate":  # a shard's parameters are there during the call alone
        assert explain(module, x).tier == "fused"
    if name == "accelerated":
        assert restore(module) == [""]
        again = wrapped(x[half])
        assert max(tolerances.errors(again.detach(), expected[half].detach())) < tolerances.FORMULAS_AGREE
    # what was wrapped ends before its group: torch may hang where it outlives it
    del wrapped, module


def _work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        for way in ("DDP", "replicate", "fully_shard"):
            for name in MAKERS:
                _check(way, name, rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(tmp_path):
    mp.start_processes(_work, (str(tmp_path),), nprocs=WORLD, start_method="spawn")


def test_data_parallel_on_the_cpu():
    module = _ours().eval()
    x = torch.randn(2, C, 5, 4, dtype=torch.float64)
    assert torch.equal(nn.DataParallel(module)(x), module(x))


@pytest.mark.parametrize("name", MAKERS)
def test_state_dict_of_a_shard_loads_into_the_original(name, tmp_path):
    """torch.distributed.checkpoint in one process, without a group."""
    import torch.distributed.checkpoint as dcp

    seeds.seed(1)
    module, plain = MAKERS[name](), PaperCoordAtt(C, C).double()
    dcp.save(module.state_dict(), checkpoint_id=tmp_path / "step", no_dist=True)
    state = copy.deepcopy(plain.state_dict())
    dcp.load(state, checkpoint_id=tmp_path / "step", no_dist=True)
    plain.load_state_dict(state)
    x = torch.randn(2, C, 5, 4, dtype=torch.float64)
    assert max(tolerances.errors(module.eval()(x), plain.eval()(x))) < tolerances.FORMULAS_AGREE
    assert coordatt_fast.explain(module, x).tier in ("fused", "reference")
