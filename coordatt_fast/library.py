"""Finds and loads the compiled library, and can say why there is none."""

import functools
import json
import logging
import os
import platform
import re
import stat
import struct
import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path

import torch

log = logging.getLogger(__name__)

NAME = "libcoordatt_fast.so"
VARIABLE = "COORDATT_FAST_LIBRARY"


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


# Of build.json's entries those that something is decided by; of another type they say nothing.
_TYPES = {"version": str, "torch": str, "platform": str, "bytes": int, "skipped": str}


def _read_build(path: Path) -> dict:
    try:
        beside = path.with_name("build.json")
        build = json.loads(beside.read_text()) if beside.is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(build, dict):
        return {}
    return {name: value for name, value in build.items() if type(value) is _TYPES.get(name, type(value))}


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
    if elsewhere := os.environ.get(VARIABLE):
        return Path(elsewhere)
    here = Path(__file__).parent / "lib" / NAME
    if here.with_name("build.json").exists():
        return here
    installed = [
        Path(str(d.locate_file(f"coordatt_fast/lib/{NAME}"))) for d in distributions(name="coordatt_fast")
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


def _not_whole(path: Path) -> str | None:
    """Why path is no shared library for this processor, or not all of one; None where it is.

    Loading a file that was cut short would end the process (SIGBUS).
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        return "it is not a regular file"
    with path.open("rb") as file, open(torch._C.__file__, "rb") as of_torch:
        head, ours = file.read(64), of_torch.read(20)
        if head[:4] != b"\x7fELF":
            return "it is not a shared library (no ELF file)"
        size, least = about.st_size, 64
        if len(head) == 64:
            # Class and byte order; type and machine.
            if (head[4:6], head[16:20]) != (ours[4:6], ours[16:20]):
                return "it is not a shared library for this processor"
            order = "<" if head[5] == 1 else ">"
            segments, sections = struct.unpack_from(f"{order}QQ", head, 32)
            counts = struct.unpack_from(f"{order}HHHH", head, 54)
            for start, entry, count, layout in (
                (segments, *counts[:2], "4x4xQ16xQ16x"),  # offset, size in the file
                (sections, *counts[2:], "4xI16xQQ24x"),  # type, offset, size
            ):
                layout = struct.Struct(order + layout)
                if count and entry != layout.size:
                    return "its ELF header is damaged"
                least = max(least, start + count * entry)
                file.seek(min(start, size))
                table = file.read(count * entry)
                for *kind, offset, length in layout.iter_unpack(
                    table[: len(table) // layout.size * layout.size]
                ):
                    if kind != [8]:  # .bss has no place in the file
                        least = max(least, offset + length)
    return f"it is cut short: {size} bytes of at least {least}" if size < least else None


def _not_ours() -> str | None:
    """Why what was loaded cannot be this package's library, of this version; None when it is."""
    from coordatt_fast import __version__

    try:
        built = json.loads(torch.ops.coordatt_fast.build_info())["version"]
    except (AttributeError, RuntimeError, ValueError, LookupError, TypeError):
        return "it does not have coordatt_fast's operators"
    return (
        None if built == __version__ else f"it is coordatt_fast {built}, this is {__version__}: build again"
    )


def _load(path: Path) -> tuple[Library, bool]:
    """What became of the library at path, and whether the user should be warned."""
    from coordatt_fast import __version__

    build = _read_build(path)
    if "skipped" in build:
        why = f"installed without the compiled library: {build['skipped']}"
        return Library(False, path, why, build), False
    if not path.exists():
        why = "" if os.environ.get(VARIABLE) else ": the package was not built (pip install .)"
        return Library(False, path, f"{path} does not exist{why}", build), False
    if build.get("version", __version__) != __version__:
        why = f"{path} is of another version ({_mismatch(build)}): build again"
        return Library(False, path, why, build), False
    size = path.stat().st_size
    if build.get("bytes", size) != size:
        why = f"{path} is damaged: it has {size} bytes of {build['bytes']}"
        return Library(False, path, why, build), True
    problem: object
    try:
        if (problem := _not_whole(path)) is None:
            torch.ops.load_library(path)
            problem = _not_ours()
    except Exception as error:
        problem = error.__cause__ or error
    if problem is not None:
        return Library(False, path, f"{path} does not load ({_mismatch(build)}): {problem}", build), True
    return Library(True, path, "", build), False


@functools.cache
def load() -> Library:
    """Loads the library once per process. Never raises: what went wrong is in the reason."""
    path = Path(__file__).parent / "lib" / NAME
    try:
        path = _find()
        found, broken = _load(path)
    except Exception as error:
        why = f"looking for {path} raised {type(error).__name__}: {error}"
        found, broken = Library(False, path, why), True
    if os.environ.get(VARIABLE) and not found.loaded:
        found, broken = replace(found, reason=f"{found.reason} ({VARIABLE} is {path})"), True
    if broken:
        log.warning("coordatt_fast runs in plain PyTorch: %s", found.reason)
    if found.loaded:
        _warn_of_settings()
    if level := os.environ.get("COORDATT_FAST_SIMD"):
        try:
            torch.ops.coordatt_fast.set_simd_level(level)
        except Exception as error:
            problem = error if found.loaded else "the compiled library is not loaded"
            log.warning("COORDATT_FAST_SIMD=%s has no effect: %s", level, problem)
    return found
