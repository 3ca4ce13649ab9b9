"""The twin of a module: same classes and settings, random float64 weights on the CPU, for recognise.py to try
out; and where it is tried out.
"""

import contextlib
import functools
import math
import random
import sys
import types
import weakref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from coordatt_fast.code import Different
from coordatt_fast.wiring import OWN, blank, snapshot, walk

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
_WATCHER = "_coordatt_fast_watcher"


def noise(shape, generator: torch.Generator) -> Tensor:
    """Normal numbers. Drawn in float32, which takes a fifth of the time, and scaled: float64 in every bit."""
    t = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return t.double().mul_(math.pi / 3)


def twin_of(module: nn.Module, generator: torch.Generator | None, memo: dict) -> nn.Module:
    """A module of the same classes and settings with random float64 tensors (without a generator: the same
    parameters and a copy of its buffers). No hook runs in it, not even a global one; see observed."""
    if id(module) in memo:
        return memo[id(module)]
    kind = nn.BatchNorm2d if type(module) is nn.SyncBatchNorm else type(module)
    twin = memo[id(module)] = object.__new__(kind)
    original = module.__dict__
    d = {name: snapshot(value) for name, value in original.items() if name not in OWN} | blank()
    d["training"] = original["training"]
    d["_non_persistent_buffers_set"] = set(original["_non_persistent_buffers_set"])
    # What nn.Module calls in place of all that it does around forward.
    d["_compiled_call_impl"] = functools.partial(_call, weakref.ref(twin))
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


def _call(twin, *args, **kwargs):
    twin = twin()
    watcher = twin.__dict__.get(_WATCHER)
    return twin.forward(*args, **kwargs) if watcher is None else watcher(twin, *args, **kwargs)


@contextlib.contextmanager
def observed(twin: nn.Module, make_watcher):
    """Every call of a module below twin goes to make_watcher(path)(module, *args, **kwargs)."""
    below = {path: child for path, child in walk(twin) if path}
    for path, child in below.items():
        child.__dict__[_WATCHER] = make_watcher(tuple(path.split(".")))
    try:
        yield
    finally:
        for child in below.values():
            del child.__dict__[_WATCHER]


def state_of(twin: nn.Module) -> dict:
    """All attributes that are plain values, by path."""
    return {
        (path, name): snapshot(value)
        for path, module in walk(twin)
        for name, value in module.__dict__.items()
        if name not in OWN and name != _WATCHER
    }


class _Generators:
    """Where the random numbers of torch, Python and numpy are."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self.numpy = getattr(numpy, "random", None)
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        self.legacy = self.numpy and self.numpy.get_state()

    def moved(self) -> bool:
        now = _Generators()
        if not torch.equal(self.torch, now.torch) or self.python != now.python:
            return True
        if not self.numpy:
            return False
        (kind, keys, *rest), (kind_now, keys_now, *rest_now) = self.legacy, now.legacy
        return (kind, *rest) != (kind_now, *rest_now) or keys.tobytes() != keys_now.tobytes()

    def put_back(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.numpy:
            self.numpy.set_state(self.legacy)


@contextlib.contextmanager
def laboratory():
    """What a probe runs in: the caller's modes and random numbers neither matter nor change.

    Raises Different at the end where random numbers were drawn.
    """
    before = _Generators()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            # Only where there is one, as a device mode slows every call down.
            contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
        ):
            yield
        if before.moved():
            raise Different("it draws random numbers")
    finally:
        before.put_back()
