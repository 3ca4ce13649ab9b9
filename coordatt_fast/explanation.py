"""explain(module, x): how a call runs, which passes it makes, and why."""

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import BatchNorm2d, Conv2d, Module
from torch.nn.utils import parametrize

from coordatt_fast import checks, internals, neighbours, ops, plan
from coordatt_fast.codes import NEEDS_PARAMETERS, NEEDS_X, NORM_BATCH
from coordatt_fast.neighbours import CONTAINER
from coordatt_fast.plan import FUSED, HYBRID, ORIGINAL, REFERENCE, Detour


class Passes(NamedTuple):
    """Reads and writes of tensors as large as the feature map."""

    reads: int
    writes: int


@dataclass(frozen=True)
class Plan:
    """How one call of a CoordAtt runs.

    tier: "fused", "hybrid" or "reference"; "original" where the module runs a forward that is not ours.
    backend: "cpu", "cuda", "triton" or "reference".
    reason: in words.
    passes: over full-size tensors, "forward" and, where a gradient is recorded, "backward"; for "original"
    those of plain PyTorch.
    bytes: what these passes move for this x.
    """

    tier: str
    backend: str
    reason: str
    passes: dict[str, Passes]
    bytes: int

    def __str__(self) -> str:
        passes = ", ".join(f"{name} {p.reads} reads and {p.writes} writes" for name, p in self.passes.items())
        return f"{self.tier} tier, {self.backend} backend: {self.reason}\n{passes}; {self.bytes / 1e6:.3g} MB"


def _passes(tier: str, pools: bool, skip: bool) -> dict[str, Passes]:
    """Of the dispatched operators; docs/how-it-works.md derives them."""
    if tier == FUSED:
        forward, backward = Passes(2, 1), Passes(3, 1)
    elif tier == HYBRID:
        forward, backward = (Passes(3, 1), Passes(7, 5)) if pools else (Passes(2, 1), Passes(5, 3))
    else:
        forward, backward = (Passes(6, 3), Passes(14, 9)) if skip else (Passes(4, 2), Passes(12, 8))
    return {"forward": forward, "backward": backward}


def _by_launches(passes: dict[str, Passes], mid: int, norm: int, x: Tensor) -> tuple[dict[str, Passes], str]:
    """The same passes as the Triton kernels' launches for x make them; without dx backward is one pass."""
    from coordatt_fast.kernels import entries, traffic

    nhwc = x.stride(1) == 1 and x.shape[1] > 1
    needs = NEEDS_PARAMETERS | (NEEDS_X if x.requires_grad else 0)
    found = entries.by_operator(x.shape, mid, x.dtype, nhwc, needs=needs)
    counted, size = {}, x.numel() * x.element_size()
    for name, operator in (("forward", "attend"), ("backward", "attend_backward")):
        if name in passes:
            full, _ = traffic.bytes_moved(found[operator])
            counted[name] = Passes(full.read // size, full.written // size)
    return counted, ""


def _by_cuda_way(passes: dict[str, Passes], mid: int, norm: int, x: Tensor) -> tuple[dict[str, Passes], str]:
    """The same passes by the way that the CUDA kernels go forward: in one launch x is read once."""
    if x.is_meta:
        return passes, ""
    way = ops.cuda_forward_way(x, mid, "backward" in passes or norm == NORM_BATCH)
    once = {} if way == "chain" else {"forward": Passes(1, 1)}
    return passes | once, f"; forward by {way}"


# Backends whose passes depend on the map, and the words that explain adds.
_SEVERAL_WAYS = {"triton": _by_launches, "cuda": _by_cuda_way}


def _foreign_forward(module: Module) -> str | None:
    """Why a call of the module runs another forward than this package's; None when it does not."""
    forward, own = type(module).forward, module.__dict__.get("forward")
    if own is not None and (getattr(own, "__self__", None), getattr(own, "__func__", None)) != (
        module,
        forward,
    ):
        return "its forward was replaced on the instance"
    ours = getattr(forward, "__module__", None) or ""
    if ours.partition(".")[0] != __name__.partition(".")[0] or hasattr(forward, "__wrapped__"):
        return f"{type(module).__name__} has a forward of its own, in place of this package's or around it"
    return None


def _around(module: Module) -> str:
    """What else takes part in a call of the module, for the reason."""
    parts = []
    if module._forward_pre_hooks:
        parts.append("; its forward pre-hooks may hand it another x")
    if module._forward_hooks:
        parts.append("; its forward hooks may return something else")
    return "".join(parts)


def _refuse(children: dict, x: Tensor, found: tuple | Detour, checked: bool) -> None:
    """Raises what a call by these children would raise for x, as far as that is certain without computing.

    checked: whether the call checks its tensors before PyTorch does, which takes wrong ones without images.
    """
    if checked:
        plan.check_plain(children, x)
    if not plan.is_eager(x):
        return
    if x.layout is not torch.strided:
        raise NotImplementedError(f"x has the layout {x.layout}, expected torch.strided")
    if not checked and x.numel():
        plan.check_plain(children, x)
    conv1 = children.get("conv1")
    if type(conv1) is Conv2d and not plan.special_pools(children):
        hooks = internals.global_forward_pre_hooks or conv1._forward_pre_hooks
        if not (hooks or "forward" in conv1.__dict__):
            checks.convolution(x, conv1.weight, "conv1.weight", conv1.groups, plan.autocast(x))
    inplace = type(found) is tuple and found[-1] is not None
    if inplace and not torch.is_grad_enabled() and internals.shares_memory(x):
        shared = f"x has elements that share memory: strides {x.stride()}"
        raise RuntimeError(f"{shared}; inplace=True writes into it")


def explain(module: Module, x: Tensor) -> Plan:
    """How module(x) would run now: in this grad mode, under this autocast and use_backend. Computes nothing.

    module is a CoordAtt or was accelerated (TypeError otherwise), or an accelerated Sequential of nothing but
    a block and what it takes in. Raises what the call itself would raise before computing, and for an x that
    its first convolution does not take. Hooks are not run, and what an accelerated module's own forward
    raises (tier "original") is not foreseen.
    """
    if isinstance(module, Module) and any(map(parametrize.is_parametrized, module.modules())):
        # Looking at a parametrized weight computes it, which may draw random numbers and change buffers.
        with torch.random.fork_rng(devices=()):
            return _explain(copy.deepcopy(module), x)
    return _explain(module, x)


def _is_joined(module) -> bool:
    """Whether it was accelerated as a whole: a chain from a normalisation to a block."""
    if CONTAINER not in getattr(module, "__dict__", {}) or not neighbours.is_sequence(type(module)):
        return False
    parts = [*neighbours.flat(module._modules.values())]
    if not all(isinstance(part, Module) for part in parts) or len(parts) < 2:
        return False
    first, *between, last = parts
    followers = all(type(part) in neighbours.FOLLOWERS for part in between)
    return isinstance(first, BatchNorm2d) and followers and neighbours.is_block(last)


def _explain_joined(module: Module, x: Tensor) -> Plan:
    """Of a normalisation, perhaps an activation, and a block."""
    *waiting, block = neighbours.flat(module._modules.values())
    plan_of_block = _explain(block, x)
    found = neighbours.arguments(waiting, block, x) if neighbours.is_plain_call(x) else None
    if found is None:
        reason = f"{plan_of_block.reason}; what stands before it runs by itself"
        return replace(plan_of_block, reason=reason + _around(module))
    names = " and ".join(type(part).__name__ for part in waiting)
    # The statistics of the batch are one more read of x.
    passes = {"forward": Passes(3 if found[0][5] == NORM_BATCH else 2, 1), "backward": Passes(6, 1)}
    passes = {name: passes[name] for name in plan_of_block.passes}
    moved = sum(p.reads + p.writes for p in passes.values()) * x.numel() * x.element_size()
    return replace(
        plan_of_block, reason=f"the block takes in {names}{_around(module)}", passes=passes, bytes=moved
    )


def _explain(module: Module, x: Tensor) -> Plan:
    if _is_joined(module):
        return _explain_joined(module, x)
    kept = getattr(module, "__dict__", {}).get("_coordatt_fast")
    accelerated = None if kept is None else kept.wiring
    found: Any
    foreign = _foreign_forward(module) if isinstance(module, Module) else None
    if accelerated is not None:
        skip, pools = accelerated.skip, False
        found = Detour(ORIGINAL, foreign) if foreign else accelerated.arguments(module, x, accelerated.codes)
    elif (
        isinstance(module, Module)
        and set(plan.CHILDREN) <= module._modules.keys()
        and "_inplace" in module.__dict__
    ):
        skip, pools = module.skip, plan.special_pools(module._modules)
        found = Detour(ORIGINAL, foreign) if foreign else plan.arguments(module.__dict__, x)
    else:
        name = f"{type(module).__module__}.{type(module).__name__}"
        raise TypeError(f"explain takes a coordatt_fast.CoordAtt or an accelerated module, got a {name}")
    if type(found) is tuple:
        tier, reason = FUSED, "every child is what the fused kernels compute"
        if found[-2] is not None:
            processes = torch.distributed.get_world_size(found[-2])
            reason = f"{reason}; batch statistics of {processes} processes"
    else:
        tier, reason = found
    if tier != ORIGINAL:
        if accelerated is None:
            _refuse(module._modules, x, found, checked=True)
        elif tier == FUSED or accelerated.chain[:1] == (accelerated.conv1,):
            _refuse(accelerated.children(module), x, found, checked=tier == FUSED)
    passes = _passes(tier, pools, skip)
    if not (
        torch.is_grad_enabled()
        and (getattr(x, "requires_grad", False) or any(p.requires_grad for p in module.parameters()))
    ):
        del passes["backward"]
    elif tier != ORIGINAL and x.is_inference():
        raise RuntimeError("x was made in inference mode and cannot be saved for backward: clone it")
    backend = ops.operators(x).name if tier in (FUSED, HYBRID) else REFERENCE
    if tier == FUSED and x.numel() and backend in _SEVERAL_WAYS:
        weights, norm, *_ = found
        passes, way = _SEVERAL_WAYS[backend](passes, weights[0].shape[0], norm, x)
        reason += way
    size = x.numel() * x.element_size() if isinstance(x, Tensor) else 0
    moved = sum(p.reads + p.writes for p in passes.values()) * size
    return Plan(tier, backend, reason + _around(module), passes, moved)
