"""Finds and loads the compiled library, and can say why there is none."""

import functools
import json
import logging
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "lib"


@dataclass(frozen=True)
class Library:
    """What became of the compiled library in this process.

    loaded; path of the file; reason, in words, why it is not loaded (empty when it is); build: what setup.py
    wrote into build.json (version, torch, compiler, platform, simd, mode, or skipped), empty when there is
    none.
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


@functools.cache
def load() -> Library:
    """Loads the library once per process. Never raises: what went wrong is in the reason."""
    from coordatt_fast import __version__

    elsewhere = os.environ.get("COORDATT_FAST_LIBRARY")
    path = Path(elsewhere) if elsewhere else FOLDER / "libcoordatt_fast.so"
    build = _read_build(path)
    if "skipped" in build:
        return Library(False, path, f"installed without the compiled library: {build['skipped']}", build)
    if not path.exists():
        return Library(
            False, path, f"{path} does not exist: the package was not built (pip install .)", build
        )
    if build.get("version", __version__) != __version__:
        return Library(False, path, f"{path} is of another version ({_mismatch(build)}): build again", build)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"{path} does not load ({_mismatch(build)}): {error.__cause__ or error}"
        log.warning("coordatt_fast runs in plain PyTorch: %s", reason)
        return Library(False, path, reason, build)
    return Library(True, path, "", build)
