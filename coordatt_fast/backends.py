"""What can compute Coordinate Attention here, and which of it the user has chosen."""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from coordatt_fast import internals, library

AUTO = "auto"
# The compiled library's operators, in torch.ops.
COMPILED = "coordatt_fast"

# As Triton reads it, when it is imported; its kernels then also run, slowly, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
# Backends that have no table of verified GPUs (cuda has csrc/cuda/verified.h) and whose tests have passed on
# one (make gpu).
VERIFIED: frozenset[str] = frozenset()
TRITON_DEVICES = ("cuda", "xpu")


@dataclass(frozen=True)
class Backend:
    """Whether a backend can run in this process, and why it can or cannot."""

    available: bool
    reason: str


def _anywhere(kind: str, index: int) -> bool:
    return True


class Row(NamedTuple):
    """All that is said of a backend with kernels of its own.

    devices: kinds of the tensors it takes. namespace: its operators' in torch.ops. missing: why its operators
    are not there; None when they are. refuses: the error's words for tensors on another kind of device.
    verified: whether its tests have passed on the device of that kind and index, so that auto takes it.
    describe: for backends(). long: whether it takes lines of any length (see is_long of ops.py). joined:
    whether it has kernels for batch statistics of several processes.
    """

    devices: tuple[str, ...]
    namespace: str
    missing: Callable[[], str | None]
    refuses: Callable[[str], str]
    verified: Callable[[str, int], bool]
    describe: Callable[[], Backend]
    long: bool = True
    joined: bool = False

    def obstacle(self, kind: str, long: bool) -> str | None:
        """Why it cannot take maps on this kind of device; None when it can. long: as in serving."""
        if kind not in self.devices:
            return self.refuses(kind)
        if why := self.missing():
            return why
        return "H + W is above 4096 (2048 in float64)" if long and not self.long else None


# cpu -------------------------------------------------------------------------------------------------


def _cpu_missing() -> str | None:
    loaded = library.load()
    return None if loaded.loaded else loaded.reason


def _describe_cpu() -> Backend:
    if why := _cpu_missing():
        return Backend(False, why)
    return Backend(True, f"compiled library, SIMD level {torch.ops.coordatt_fast.simd_level()}")


# cuda ------------------------------------------------------------------------------------------------


@functools.cache
def built_with_cuda() -> dict:
    """What the library says of its CUDA kernels ("built"; "verified": [way, architecture]); {} without."""
    loaded = library.load().loaded
    return (json.loads(torch.ops.coordatt_fast.build_info())["cuda"] or {}) if loaded else {}


def _cuda_missing() -> str | None:
    if why := _cpu_missing():
        return why
    return None if built_with_cuda() else "the library was built without CUDA (no nvcc, or FORCE_CUDA=0)"


@functools.cache
def _cuda_verified(kind: str, index: int) -> bool:
    if index >= torch.cuda.device_count():  # a fake tensor's
        return False
    major, minor = torch.cuda.get_device_capability(index)
    return ["chain", 10 * major + minor] in built_with_cuda()["verified"]


def _describe_cuda() -> Backend:
    if why := _cuda_missing():
        return Backend(False, why)
    kernels = f"compiled library, CUDA {built_with_cuda()['built']}"
    if not torch.cuda.is_available():
        return Backend(False, f"{kernels}, but torch finds no GPU")
    return _on_gpu(f"{kernels}, {torch.cuda.get_device_name()}", _cuda_verified("cuda", 0))


def _on_gpu(what: str, verified: bool) -> Backend:
    return Backend(True, what if verified else f"{what}; not yet verified, so not under auto")


# triton ----------------------------------------------------------------------------------------------


@functools.cache
def _triton_missing() -> str | None:
    """Imports the kernels."""
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"triton does not import: {error}"
    from coordatt_fast.kernels import launch  # noqa: F401

    return None


def _triton_refuses(kind: str) -> str:
    if kind == "cpu":
        return "Triton has no kernels for CPU tensors (only its interpreter, under TRITON_INTERPRET=1)"
    return f"no backend for device {kind} in this version"


def _triton_verified(kind: str, index: int) -> bool:
    return "triton" in VERIFIED


def _describe_triton() -> Backend:
    if why := _triton_missing():
        return Backend(False, why)
    import triton

    version = f"triton {triton.__version__}"
    for kind in TRITON_DEVICES:
        device = getattr(torch, kind, None)
        if device is not None and device.is_available():
            return _on_gpu(f"{version}, {device.get_device_name()}", _triton_verified(kind, 0))
    if INTERPRETED:
        return Backend(True, f"{version}, its interpreter on CPU tensors (TRITON_INTERPRET=1)")
    return Backend(False, f"{version}, but there is no GPU")


# All of them -----------------------------------------------------------------------------------------

# In the order in which auto tries them.
ROWS = {
    "cpu": Row(
        ("cpu",), COMPILED, _cpu_missing, "it takes CPU tensors, x is on {}".format,
        _anywhere, _describe_cpu, joined=True,
    ),
    "cuda": Row(
        ("cuda",), COMPILED, _cuda_missing, "it takes CUDA tensors, x is on {}".format,
        _cuda_verified, _describe_cuda, long=False,
    ),
    "triton": Row(
        (*TRITON_DEVICES, *(["cpu"] if INTERPRETED else [])), "coordatt_fast_triton", _triton_missing,
        _triton_refuses, _triton_verified, _describe_triton,
    ),
}  # fmt: skip
NAMES = (*ROWS, "reference")
# The choices that leave CPU tensors to the compiled library.
SERVED_BY_CPU = frozenset() if _cpu_missing() else frozenset((AUTO, "cpu"))


def serving(name: str, kind: str, index: int | None, long: bool) -> tuple[str | None, str]:
    """The backend that serves a map on this device where name was chosen; else None, and why there is none.

    long: H + W is beyond what the CUDA kernels take. auto takes the first backend that can and whose tests
    have passed on such a device.
    """
    if name in ROWS:
        why = ROWS[name].obstacle(kind, long)
        return (name, "") if why is None else (None, why)
    if name != AUTO:
        return None, "this backend was chosen"
    reasons = []
    for backend, row in ROWS.items():
        if kind not in row.devices:
            continue
        why = row.obstacle(kind, long)
        if why is None and not row.verified(kind, index or 0):
            why = "it has not passed its tests on such a GPU yet; choose it by name"
        if why is None:
            return backend, ""
        reasons.append(f"auto leaves out {backend!r}: {why}")
    return None, "; ".join(reasons) or f"no backend for device {kind} in this version"


internals.mark_constant(serving)


def backends() -> dict[str, Backend]:
    """Every backend by name: cpu, cuda, triton, reference."""
    found = {name: row.describe() for name, row in ROWS.items()}
    return found | {"reference": Backend(True, "plain PyTorch")}


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
    here: Any = choice if torch.compiler.is_compiling() else _Here()
    here.entries, here.name = [*here.entries, mine], name
    try:
        yield
    finally:
        entries = [entry for entry in here.entries if entry is not mine]
        here.entries, here.name = entries, entries[-1][0] if entries else _default
