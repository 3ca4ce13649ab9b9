"""What can compute Coordinate Attention here, and which of it the user has chosen."""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from coordatt_fast import library

NAMES = ("cpu", "cuda", "triton", "reference")
AUTO = "auto"

# Triton reads this when it is imported; its kernels then also run, slowly, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") in ("1", "true", "on", "yes", "y")
NO_CUDA = "not part of this version"
# What auto takes beside cpu: backends whose tests have passed on a real device (make gpu).
VERIFIED: frozenset[str] = frozenset()
TRITON_DEVICES = ("cuda", "xpu")


@dataclass(frozen=True)
class Backend:
    """Whether a backend can run in this process, and why it can or cannot."""

    available: bool
    reason: str


def unverified(name: str) -> str:
    return f"auto leaves out {name!r}, which has not passed its tests on a GPU yet: choose it by name"


@functools.cache
def _import_triton() -> str | None:
    """Why the Triton kernels cannot be imported; None when they are."""
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"triton does not import: {error}"
    from coordatt_fast.kernels import launch  # noqa: F401

    return None


def triton_obstacle(kind: str) -> str | None:
    """Why Triton's kernels cannot take tensors on this kind of device; None when they can."""
    if kind == "cpu" and not INTERPRETED:
        return "Triton has no kernels for CPU tensors (only its interpreter, under TRITON_INTERPRET=1)"
    if kind not in ("cpu", *TRITON_DEVICES):
        return f"no backend for device {kind} in this version"
    return _import_triton()


# What torch.compiler.assume_constant_result does, without importing the compiler.
triton_obstacle._dynamo_marked_constant = True


def _triton() -> tuple[bool, str]:
    if why := _import_triton():
        return False, why
    import triton

    version = f"triton {triton.__version__}"
    for kind in TRITON_DEVICES:
        device = getattr(torch, kind, None)
        if device is not None and device.is_available():
            reason = f"{version}, {device.get_device_name()}"
            return True, reason if "triton" in VERIFIED else f"{reason}; {unverified('triton')}"
    if INTERPRETED:
        return True, f"{version}, its interpreter on CPU tensors (TRITON_INTERPRET=1)"
    return False, f"{version}, but there is no GPU"


def backends() -> dict[str, Backend]:
    """Every backend by name: cpu, cuda, triton, reference."""
    loaded = library.load()
    cpu = (
        f"compiled library, SIMD level {torch.ops.coordatt_fast.simd_level()}"
        if loaded.loaded
        else loaded.reason
    )
    return {
        "cpu": Backend(loaded.loaded, cpu),
        "cuda": Backend(False, NO_CUDA),
        "triton": Backend(*_triton()),
        "reference": Backend(True, "plain PyTorch"),
    }


def _valid(name: str, source: str) -> str:
    if name != AUTO and name not in NAMES:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join((AUTO, *NAMES))}")
    return name


_default = _valid(os.environ.get("COORDATT_FAST_BACKEND") or AUTO, "COORDATT_FAST_BACKEND")


class _Choice(threading.local):
    def __init__(self) -> None:
        self.name = _default


# Read at every call: what use_backend asked for in this thread, else COORDATT_FAST_BACKEND, else auto.
# An instance attribute, because on those the compiler sets a guard.
choice = _Choice()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the with block, in this thread, calls use the backend of that name.

    "auto" takes the fastest that can run and falls back; a named one raises RuntimeError in a call it cannot
    serve. Raises ValueError for an unknown name. Compiled code is compiled again for another choice.
    """
    before, choice.name = choice.name, _valid(name, "the name of the backend")
    try:
        yield
    finally:
        choice.name = before
