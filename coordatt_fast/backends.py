"""What can compute Coordinate Attention here, and which of it the user has chosen."""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from coordatt_fast import library

NAMES = ("cpu", "cuda", "triton", "reference")
AUTO = "auto"

# As Triton reads it, when it is imported; its kernels then also run, slowly, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
# What auto takes beside cpu, and cuda (whose table is csrc/cuda/verified.h): backends whose tests have passed
# on a real device (make gpu).
VERIFIED: frozenset[str] = frozenset()
TRITON_DEVICES = ("cuda", "xpu")


@dataclass(frozen=True)
class Backend:
    """Whether a backend can run in this process, and why it can or cannot."""

    available: bool
    reason: str


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


@functools.cache
def built_with_cuda() -> dict | None:
    """What the library says of its CUDA kernels ("built"; "verified": [way, architecture]); None without."""
    loaded = library.load().loaded
    return json.loads(torch.ops.coordatt_fast.build_info())["cuda"] if loaded else None


def cuda_obstacle(kind: str) -> str | None:
    """Why the CUDA kernels cannot take tensors on this kind of device; None when they can."""
    if kind != "cuda":
        return f"it takes CUDA tensors, x is on {kind}"
    if not library.load().loaded:
        return library.load().reason
    return None if built_with_cuda() else "the library was built without CUDA (no nvcc, or FORCE_CUDA=0)"


def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _verified(name: str, kind: str, index: int) -> bool:
    if name == "triton":
        return name in VERIFIED
    if index >= torch.cuda.device_count():  # a fake tensor's
        return False
    return ["chain", _architecture(index)] in built_with_cuda()["verified"]


def serving(name: str, kind: str, index: int | None, long: bool) -> tuple[str | None, str]:
    """The backend that serves a map on this device where name was chosen; else None, and why there is none.

    long: H + W is beyond what the CUDA kernels take. auto takes cuda, then triton, each only where its tests
    have passed: cuda on that architecture, triton at all.
    """
    reasons = []
    for backend, obstacle in (("cuda", cuda_obstacle), ("triton", triton_obstacle)):
        if name not in (AUTO, backend):
            continue
        if (why := obstacle(kind)) is None and backend == "cuda" and long:
            why = "H + W is above 4096 (2048 in float64)"
        if why is None and name == AUTO and not _verified(backend, kind, index or 0):
            why = "it has not passed its tests on such a GPU yet; choose it by name"
        if why is None:
            return backend, ""
        reasons.append(why if name == backend else f"auto leaves out {backend!r}: {why}")
    return None, "; ".join(reasons)


# What torch.compiler.assume_constant_result does, without importing the compiler.
serving._dynamo_marked_constant = True


def _triton() -> tuple[bool, str]:
    if why := _import_triton():
        return False, why
    import triton

    version = f"triton {triton.__version__}"
    for kind in TRITON_DEVICES:
        device = getattr(torch, kind, None)
        if device is not None and device.is_available():
            reason = f"{version}, {device.get_device_name()}"
            return True, reason if "triton" in VERIFIED else f"{reason}; not yet verified, so not under auto"
    if INTERPRETED:
        return True, f"{version}, its interpreter on CPU tensors (TRITON_INTERPRET=1)"
    return False, f"{version}, but there is no GPU"


def _cuda() -> tuple[bool, str]:
    if why := cuda_obstacle("cuda"):
        return False, why
    kernels = f"compiled library, CUDA {built_with_cuda()['built']}"
    if not torch.cuda.is_available():
        return False, f"{kernels}, but torch finds no GPU"
    reason = f"{kernels}, {torch.cuda.get_device_name()}"
    return True, reason if _verified("cuda", "cuda", 0) else f"{reason}; not yet verified, so not under auto"


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
        "cuda": Backend(*_cuda()),
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
        self.entries: list[list[str]] = []  # the with blocks that are open, the innermost last


# Read at every call: what use_backend asked for in this thread, else COORDATT_FAST_BACKEND, else auto.
# An instance attribute, because on those the compiler sets a guard.
choice = _Choice()


class _Here:
    """choice as the thread sees it that made this, seen from any thread."""

    def __init__(self) -> None:
        self.__dict__ = choice.__dict__


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the with block, in this thread, calls use the backend of that name.

    "auto" takes the fastest that can run and falls back; a named one raises RuntimeError in a call it cannot
    serve. Of the blocks that are open the one entered last counts, in whatever order they are left. Raises
    ValueError for an unknown name. Compiled code is compiled again for another choice.
    """
    mine = [_valid(name, "the name of the backend")]
    # A generator may be closed in another thread than it was started in.
    here = choice if torch.compiler.is_compiling() else _Here()
    here.entries, here.name = [*here.entries, mine], name
    try:
        yield
    finally:
        entries = [entry for entry in here.entries if entry is not mine]
        here.entries, here.name = entries, entries[-1][0] if entries else _default
