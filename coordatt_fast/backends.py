"""What can compute Coordinate Attention here, and which of it the user has chosen."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from coordatt_fast import library

NAMES = ("cpu", "cuda", "triton", "reference")
AUTO = "auto"


@dataclass(frozen=True)
class Backend:
    """Whether a backend can run in this process, and why it can or cannot."""

    available: bool
    reason: str


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
        "cuda": Backend(False, "not part of this version"),
        "triton": Backend(False, "not part of this version"),
        "reference": Backend(True, "plain PyTorch"),
    }


def _valid(name: str, source: str) -> str:
    if name != AUTO and name not in NAMES:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join((AUTO, *NAMES))}")
    return name


_default = _valid(os.environ.get("COORDATT_FAST_BACKEND", AUTO), "COORDATT_FAST_BACKEND")


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
