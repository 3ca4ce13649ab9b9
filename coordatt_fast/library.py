"""Finds and loads the compiled library, and can say why there is none."""

import functools
import json
import logging
import os
import platform
import re
import sys
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

import torch

log = logging.getLogger(__name__)

NAME = "libcoordatt_fast.so"


@dataclass(frozen=True)
class Library:
    """What became of the compiled library in this process.

    loaded; path of the file; reason, in words, why it is not loaded (empty when it is); build: what setup.py
    wrote into build.json (version, torch, compiler, platform, simd, mode, bytes, or skipped), else empty.
    """

    loaded: bool
    path: Path
    reason: str = ""
    build: dict = field(default_factory=dict)


def _read_build(path: Path) -> dict:
    try:
        return json.loads(path.with_name("build.json").read_text())
    except (OSError, ValueError):
        return {}


def _mismatch(build: dict) -> str:
    """What the library was built for beside what is here, for messages."""
    from coordatt_fast import __version__

    built = f"built for coordatt_fast {build.get('version', '?')}, torch {build.get('torch', '?')}"
    here = f"found coordatt_fast {__version__}, torch {torch.__version__}"
    return f"{built}, {build.get('platform', '?')}; {here}, {sys.platform}-{platform.machine()}"


def _find() -> Path:
    """Where the library is, or would be.

    A Python started in the repository imports this package from the source tree; an installed wheel then has
    the library.
    """
    if elsewhere := os.environ.get("COORDATT_FAST_LIBRARY"):
        return Path(elsewhere)
    here = Path(__file__).parent / "lib" / NAME
    if here.with_name("build.json").exists():
        return here
    installed = [
        Path(d.locate_file(f"coordatt_fast/lib/{NAME}")) for d in distributions(name="coordatt_fast")
    ]
    return next((path for path in installed if path.with_name("build.json").exists()), here)


def _warn_of_settings() -> None:
    """Names the variables whose values csrc/cpu/environment.cpp takes for unset."""
    for name, pattern, wanted in (
        ("COORDATT_FAST_KEEP_MB", "[0-9]+", "a whole number of megabytes"),
        ("COORDATT_FAST_POISON", "[01]", "0 or 1"),
    ):
        value = os.environ.get(name)
        if value and not re.fullmatch(pattern, value):
            log.warning("%s=%s has no effect: expected %s", name, value, wanted)


@functools.cache
def load() -> Library:
    """Loads the library once per process. Never raises: what went wrong is in the reason."""
    from coordatt_fast import __version__

    path = _find()
    build = _read_build(path)
    if "skipped" in build:
        return Library(False, path, f"installed without the compiled library: {build['skipped']}", build)
    if not path.exists():
        chosen = os.environ.get("COORDATT_FAST_LIBRARY")
        why = "COORDATT_FAST_LIBRARY names it" if chosen else "the package was not built (pip install .)"
        return Library(False, path, f"{path} does not exist: {why}", build)
    if build.get("version", __version__) != __version__:
        return Library(False, path, f"{path} is of another version ({_mismatch(build)}): build again", build)
    size = path.stat().st_size
    if build.get("bytes", size) != size:
        # Loading a file that was cut short would end the process (SIGBUS).
        return Library(False, path, f"{path} is damaged: it has {size} bytes of {build['bytes']}", build)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"{path} does not load ({_mismatch(build)}): {error.__cause__ or error}"
        log.warning("coordatt_fast runs in plain PyTorch: %s", reason)
        return Library(False, path, reason, build)
    _warn_of_settings()
    if level := os.environ.get("COORDATT_FAST_SIMD"):
        try:
            torch.ops.coordatt_fast.set_simd_level(level)
        except RuntimeError as error:
            log.warning("COORDATT_FAST_SIMD=%s has no effect: %s", level, error)
    return Library(True, path, "", build)
