"""setup.py's CUDA half: which nvcc, for which GPUs, and what the library says of it. Mostly with a script in nvcc's place."""

import json
import os
import re
import runpy
import shutil
import sys
import tarfile
from pathlib import Path
from unittest import mock

import pytest
from test_install import ROOT, Environment, build_wheel, pristine, run, source, succeed, wheel  # noqa: F401

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.99" ;;
  --list-gpu-arch) printf 'compute_%s\\n' {archs} ;;
  *) exit 1 ;;
esac
"""

PROGRAM = """
import torch, coordatt_fast
coordatt_fast.backends()
print(torch.ops.coordatt_fast.build_info())
"""


@pytest.fixture
def script(monkeypatch):
    """What setup.py defines, without a build and without this process's settings."""
    for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "SANITIZE", "DEBUG", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def nvcc(tmp_path):
    def make(release="13.0", archs="75 80 86 89 90 100 120", home="cuda"):
        path = tmp_path / home / "bin/nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(NVCC.format(release=release, archs=archs))
        path.chmod(0o755)
        return path

    return make


def gencodes(cuda):
    return [flag.rpartition("code=")[2] for flag in cuda.flags]


@pytest.mark.parametrize(
    "wanted, archs, codes",
    [
        ("9.0", ["sm_90"], ["sm_90"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90"], ["sm_80", "sm_90", "compute_90"]),
        (" 8.0, 8.6 ", ["sm_80", "sm_86"], ["sm_80", "sm_86"]),
        ("9.0 9.0+PTX", ["sm_90"], ["sm_90", "compute_90"]),
        ("9.0a", ["sm_90a"], ["sm_90a"]),
        ("Hopper", ["sm_90"], ["sm_90", "compute_90"]),
        ("Ampere;12.0", ["sm_80", "sm_86", "sm_120"], ["sm_80", "sm_86", "compute_86", "sm_120"]),
        ("", ["sm_80", "sm_90", "sm_100", "sm_120"], ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]),
    ],
)
def test_architectures(script, nvcc, monkeypatch, wanted, archs, codes):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    cuda = script["Cuda"](str(nvcc()))
    assert (cuda.version, cuda.archs, gencodes(cuda)) == ("13.0", archs, codes)


def test_architectures_that_an_older_nvcc_knows(script, nvcc):
    """By default what it does not know is left out, and the newest that it knows serves newer GPUs."""
    cuda = script["Cuda"](str(nvcc("12.4", "75 80 90")))
    assert gencodes(cuda) == ["sm_80", "sm_90", "compute_90"]
    with pytest.raises(SystemExit, match=r"nvcc 10\.2 .* knows no GPU from 8\.0 on; FORCE_CUDA=0"):
        script["Cuda"](str(nvcc("10.2", "61 70 75", home="old")))


@pytest.mark.parametrize("wanted, part", [("7.5", "7.5"), ("8.0;13.7", "13.7"), ("nonsense", "nonsense"), ("sm_90", "sm_90")])
def test_architectures_that_are_none(script, nvcc, monkeypatch, wanted, part):
    """The message has the variable, its value, what is wrong with it and what is right."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(SystemExit) as caught:
        script["Cuda"](str(nvcc()))
    for word in (f"TORCH_CUDA_ARCH_LIST={wanted}", f"'{part}' is none of 8.0 8.6 8.9 9.0 10.0 12.0 ", "nvcc 13.0", "Hopper", "FORCE_CUDA=0"):
        assert word in str(caught.value)


def test_which_nvcc(script, nvcc, monkeypatch):
    """CUDA_HOME goes before CUDA_PATH, and both before PATH; FORCE_CUDA=0 takes none."""
    first, second, third = (nvcc(home=home) for home in ("first", "second", "third"))
    monkeypatch.setenv("PATH", f"{third.parent}:{os.environ['PATH']}")
    assert script["find_nvcc"]() == str(third)
    monkeypatch.setenv("CUDA_PATH", str(second.parents[1]))
    assert script["find_nvcc"]() == str(second)
    monkeypatch.setenv("CUDA_HOME", str(first.parents[1]))
    assert script["find_nvcc"]() == str(first)
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert script["find_nvcc"]() is None


def test_no_nvcc(script, monkeypatch):
    """The library is built without CUDA, but where FORCE_CUDA demands it."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert script["find_nvcc"]() is None
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="FORCE_CUDA=1, but nvcc was not found; set CUDA_HOME"):
        script["find_nvcc"]()


def test_another_cuda_than_torchs(script, monkeypatch):
    """Its runtime is linked in, and asks for a driver that torch may do without."""
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    other = script["other_cuda"]
    assert other(None, "13.0") is None and other("13.2", "13.0") is None
    assert "torch is built with CUDA 12.8, nvcc is 13.0" in other("12.8", "13.0")
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert other("12.8", "13.0") is None


def has_nvcc():
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, {"FORCE_CUDA": ""}):
        return runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]() is not None


def installed(wheel, folder):  # noqa: F811
    """build_info() and build.json of a wheel, installed by itself."""
    environment = Environment(folder / "environment")
    environment.install(wheel, cwd=folder)
    said = succeed(environment.python, "-c", PROGRAM, cwd=folder).stdout.splitlines()[-1]
    return json.loads(said), json.loads((environment.packages / "coordatt_fast/lib/build.json").read_text())


def test_with_cuda(wheel, tmp_path):  # noqa: F811
    """The library with CUDA loads beside any torch, this one for CPUs too, and says what it was built for."""
    if not has_nvcc() or os.environ.get("FORCE_CUDA") == "0":
        pytest.skip("nvcc was not found")
    info, build = installed(wheel, tmp_path)
    assert build["cuda"]["archs"] and all(re.fullmatch(r"sm_\d+[af]?", arch) for arch in build["cuda"]["archs"])
    assert info["cuda"]["built"] == f"{build['cuda']['nvcc']}: {' '.join(build['cuda']['archs'])}"


def test_without_cuda(source, tmp_path):  # noqa: F811
    result, path = build_wheel(source, tmp_path / "dist", {"FORCE_CUDA": "0"})
    assert path, result.stdout[-3000:] + result.stderr[-3000:]
    info, build = installed(path, tmp_path)
    assert info["cuda"] is None and build["cuda"] is None and build["simd"]


def test_wheel_of_the_source_distribution(pristine, tmp_path):  # noqa: F811
    """What the source distribution holds is enough for a wheel, CUDA included where it is here."""
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    succeed(sys.executable, "-c", code, cwd=shutil.copytree(pristine, tmp_path / "copy"))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "unpacked")
    held = {Path(name).name for name in names if "/csrc/cuda/" in name}
    assert held == {path.name for path in (ROOT / "csrc/cuda").iterdir()}
    unpacked = next((tmp_path / "unpacked").iterdir())
    if (pristine / "build/release").exists():
        shutil.copytree(pristine / "build/release", unpacked / "build/release")
    result, path = build_wheel(unpacked, tmp_path / "dist")
    assert path, result.stdout[-3000:] + result.stderr[-3000:]
    assert "-py3-none-linux_" in path.name
