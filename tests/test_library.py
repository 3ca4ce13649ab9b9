"""Files that are no library of ours: cut short, garbled, somebody else's. Importing the package survives each,
says what is wrong, and computes in plain PyTorch.

The files are tried one after the other in one process, which started without the library; one that is loaded
though it should not be would end that process (SIGBUS), or be mistaken for ours.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coordatt_fast import library

ROOT = Path(__file__).resolve().parent.parent

TRY_EACH = """
import json, os, sys
import coordatt_fast
from coordatt_fast import library
assert not library.load().loaded
for line in sys.stdin:
    path, length, build = json.loads(line)
    if length is not None:
        os.truncate(path, length)
    beside = os.path.join(os.path.dirname(path), "build.json")
    if build is not None:
        with open(beside, "w") as file:
            file.write(build)
    elif os.path.exists(beside) and os.path.isfile(beside):
        os.unlink(beside)
    os.environ["COORDATT_FAST_LIBRARY"] = path
    found = library.load.__wrapped__()
    print(json.dumps([found.loaded, found.reason, found.build]), flush=True)
"""


def outcomes(cases, start="/nonexistent/library.so"):
    """[loaded, reason, build] for each (path, length to cut it to or None, build.json's text or None)."""
    result = subprocess.run(
        [sys.executable, "-c", TRY_EACH],
        input="".join(json.dumps([str(path), *rest]) + "\n" for path, *rest in cases),
        cwd=ROOT,
        env=os.environ | {"COORDATT_FAST_LIBRARY": start},
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"ended by {cases[len(found) : len(found) + 1]}: {result.stderr[-2000:]}"
    assert len(found) == len(cases)
    for (path, *_), (loaded, reason, _) in zip(cases, found):
        assert loaded or (str(path) in reason and "COORDATT_FAST_LIBRARY" in reason), reason
        assert loaded or reason in result.stderr, "what was asked for and is not there is warned of"
    return found


@pytest.fixture
def ours(tmp_path, cpu):
    """A copy of the compiled library, alone in its folder."""
    (tmp_path / "lib").mkdir()
    return Path(shutil.copy(library.load().path, tmp_path / "lib"))


def ends(path):
    """Where the file's segments and sections end."""
    data = path.read_bytes()
    order = "<" if data[5] == 1 else ">"
    segments, sections = struct.unpack_from(f"{order}QQ", data, 32)
    _, segment_count, _, section_count = struct.unpack_from(f"{order}HHHH", data, 54)
    found = set()
    for i in range(segment_count):
        offset, _, _, length = struct.unpack_from(f"{order}QQQQ", data, segments + 56 * i + 8)
        found.add(offset + length)
    for i in range(section_count):
        offset, length = struct.unpack_from(f"{order}QQ", data, sections + 64 * i + 24)
        found.add(offset + length)
    return {end for end in found if end <= len(data)}


def test_cut_short_anywhere(ours):
    """Also where no build.json tells the size; the whole file, after all of them, still loads."""
    whole, size = ours.with_name("whole.so"), ours.stat().st_size
    shutil.copy(ours, whole)
    lengths = {
        0,
        1,
        4,
        5,
        17,
        63,
        64,
        65,
        100,
        624,
        1000,
        4096,
        65536,
        size // 3,
        size // 2,
        size - 64,
        size - 1,
    }
    lengths |= {end - 1 for end in ends(ours) if 0 < end < size} | {end for end in ends(ours) if end < size}
    builds = [None, json.dumps({"version": "0.1.0"}), json.dumps({"bytes": size})]
    cases = [(ours, length, build) for length in sorted(lengths, reverse=True) for build in builds]
    *cut, last = outcomes([*cases, (whole, None, None)])
    for (_, length, _), (loaded, reason, _) in zip(cases, cut):
        assert not loaded
        assert "cut short" in reason or "damaged" in reason or length < 4, reason
    assert last == [True, "", {}]


def test_not_ours(ours, tmp_path):
    """Files of every other kind."""
    fifo, text, header, other, unused = (
        tmp_path / name for name in ("fifo", "text.so", "head.so", "arm.so", "a")
    )
    os.mkfifo(fifo)
    text.write_text("not a library\n" * 100)
    data = bytearray(ours.read_bytes()[:4096])
    os.mkfifo(tmp_path / "build.json")  # beside them: never read
    header.write_bytes(data[:54] + b"\x07\x00\xff\xff\x07\x00\xff\xff" + data[62:])
    data[18:20] = (183).to_bytes(2, "little")
    other.write_bytes(data)
    loop = tmp_path / "loop.so"
    loop.symlink_to(loop)
    cases = {
        str(fifo): "not a regular file",
        str(tmp_path): "not a regular file",
        "/": "not a regular file",
        ".": "not a regular file",
        "/dev/null": "not a regular file",
        str(text): "not a shared library",
        str(header): "header is damaged",
        str(other): "for this processor",
        str(loop): "",
        str(text / "below"): "does not exist",
        str(unused): "does not exist",
        "/" + "a" * 5000: "",
        sys.executable if sys.executable.startswith("/") else "/bin/sh": "",
    }
    found = _where("libm.so.6") or str(text)
    if found != str(text):
        cases[found] = "does not have coordatt_fast's operators"
    for (path, words), (loaded, reason, _) in zip(
        cases.items(), outcomes([(p, None, None) for p in cases], found)
    ):
        assert not loaded and words in reason, (path, reason)


def _where(name):
    """The path of a library that this process has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("/" + name):
            return line.split(maxsplit=5)[5]
    return None


BUILDS = {
    "[]": True,
    "null": True,
    "3": True,
    '"text"': True,
    "": True,
    "{": True,
    "[" * 100_000: True,
    '{"version": 3, "bytes": "many", "skipped": null, "torch": [], "platform": {}}': True,
    '{"bytes": true}': True,
    '{"version": "9.9.9"}': "another version",
    '{"bytes": 5}': "damaged",
    '{"skipped": "on purpose"}': "on purpose",
    '{"skipped": ""}': "without the compiled library",
}


def test_build_json_of_any_content(ours):
    found = outcomes([(ours, None, build) for build in BUILDS])
    for (build, expected), (loaded, reason, kept) in zip(BUILDS.items(), found):
        assert loaded == (expected is True), (build[:50], reason)
        assert expected is True or expected in reason
        assert isinstance(kept, dict)


IMPORT = """
import torch, coordatt_fast
from coordatt_fast.__main__ import main
module, x = coordatt_fast.CoordAtt(8, 8), torch.ones(1, 8, 3, 4)
assert coordatt_fast.explain(module, x).tier == "reference" and module(x).isfinite().all()
main(["info"])
"""


def test_import_with_a_useless_library():
    """The whole of it: import, a call, what the command line prints. The name is not UTF-8."""
    name = b"\xff\xfe.so"
    result = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=ROOT,
        env={os.fsencode(k): os.fsencode(v) for k, v in os.environ.items()}
        | {b"COORDATT_FAST_LIBRARY": name, b"COORDATT_FAST_SIMD": b"avx2"},
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert b"COORDATT_FAST_LIBRARY" in result.stdout and b"COORDATT_FAST_LIBRARY" in result.stderr
    assert b"COORDATT_FAST_SIMD=avx2 has no effect: the compiled library is not loaded" in result.stderr


def test_another_version_that_loads(ours, monkeypatch):
    """No build.json beside it: the version is in the library too."""
    monkeypatch.setattr("coordatt_fast.__version__", "9.9.9")
    assert "coordatt_fast 0.1.0" in library._not_ours() and "build again" in library._not_ours()
    monkeypatch.undo()
    assert library._not_ours() is None
    monkeypatch.setattr(torch.ops.coordatt_fast, "build_info", lambda: "no JSON")
    assert "operators" in library._not_ours()
