"""The twin of a module: same classes and settings, random float64 weights on the CPU, for recognise.py to try
out; and where it is tried out.
"""

import contextlib
import math
import types

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from coordatt_fast.wiring import blank

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


class Different(Exception):
    """The module computes something else, or that cannot be told; the message says why."""


def noise(shape, generator: torch.Generator) -> Tensor:
    """Normal numbers. Drawn in float32, which takes a fifth of the time, and scaled: float64 in every bit."""
    t = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return t.double().mul_(math.pi / 3)


def twin_of(module: nn.Module, generator: torch.Generator | None, memo: dict) -> nn.Module:
    """A module of the same classes and settings with random float64 tensors (without a generator: the same
    parameters and a copy of its buffers) and no hooks."""
    if id(module) in memo:
        return memo[id(module)]
    kind = nn.BatchNorm2d if type(module) is nn.SyncBatchNorm else type(module)
    twin = memo[id(module)] = object.__new__(kind)
    original = module.__dict__
    d = dict(original) | blank()
    d["training"] = original["training"]
    d["_non_persistent_buffers_set"] = set(original["_non_persistent_buffers_set"])
    d.pop("_compiled_call_impl", None)
    twin.__dict__.update(d)
    norm = isinstance(module, NORMS)

    def draw(name, like):
        if generator is None:
            return like.detach()
        t = noise(like.shape, generator)
        if name == "running_var":
            return 0.1 + t.square()
        if name == "weight":
            # Wide enough to meet every piece of the activation; gates spread over (0.05, 0.95).
            return 4 * (0.6 * t).exp() if norm else t * 1.2 / math.sqrt(max(1, math.prod(like.shape[1:])))
        return t

    for name, p in original["_parameters"].items():
        twin._parameters[name] = None if p is None else nn.Parameter(draw(name, p))
    for name, b in original["_buffers"].items():
        if b is not None:
            counter = torch.zeros(b.shape, dtype=b.dtype, device="cpu")
            b = draw(name, b).clone() if b.is_floating_point() else counter
        twin._buffers[name] = b
    for name, child in original["_modules"].items():
        twin._modules[name] = None if child is None else twin_of(child, generator, memo)
    own = original.get("forward")
    if own is not None:
        if not isinstance(own, types.MethodType) or own.__self__ is not module:
            raise Different(f"a {type(module).__name__} in it has a forward of its own")
        twin.__dict__["forward"] = types.MethodType(own.__func__, twin)
    return twin


@contextlib.contextmanager
def laboratory():
    """What a probe runs in: the caller's modes, hooks and random numbers neither matter nor change."""
    hooks = {name: dict(getattr(module_hooks, name)) for name in _GLOBAL_HOOKS}
    for name in _GLOBAL_HOOKS:
        getattr(module_hooks, name).clear()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            # A mode costs every call something; it is there for who builds under another default device.
            contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
        ):
            yield
    finally:
        for name, entries in hooks.items():
            getattr(module_hooks, name).update(entries)
