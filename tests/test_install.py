"""Every way of installing the package, in a clean environment that borrows only torch and the build tools.

The repository is copied with its object files, so that a build links instead of compiling everything again.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns("lib", "__pycache__", "*.egg-info")

PROGRAM = """
import json, torch, coordatt_fast, coordatt_fast.kernels
from coordatt_fast import CoordAtt, backends, explain
module, x = CoordAtt(16, 16).eval(), torch.randn(1, 16, 5, 6)
cpu = backends()["cpu"]
print(json.dumps({
    "file": coordatt_fast.__file__,
    "kernels": list(coordatt_fast.kernels.__path__),
    "cpu": cpu.available,
    "reason": cpu.reason,
    "tier": explain(module, x).tier,
    "sum": module(x).sum().item(),
}))
"""


def run(*command, cwd, env=None):
    """The finished process; settings of this one's environment that would steer the package are left out."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COORDATT_FAST", "PYTHON"))}
    kept["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja is beside this Python
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | (env or {}),
        capture_output=True,
        text=True,
        timeout=600,
    )


def succeed(*command, **where):
    result = run(*command, **where)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A copy of the repository, built objects included, nothing installed from it yet. Not to be changed."""
    copy = tmp_path_factory.mktemp("source") / "repository"
    copy.mkdir()
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
    ):
        shutil.copy2(ROOT / name, copy)
    for name in ("coordatt_fast", "csrc", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=NOT_COPIED)
    if (ROOT / "build/release").exists():
        shutil.copytree(ROOT / "build/release", copy / "build/release")
    return copy


@pytest.fixture
def source(pristine, tmp_path):
    """A copy of one's own."""
    return shutil.copytree(pristine, tmp_path / "repository")


class Environment:
    """A virtual environment that sees this one's packages, but not its editable install of ours; or a copy of one."""

    def __init__(self, folder, like=None):
        if like:
            shutil.copytree(like.folder, folder, symlinks=True)
        else:
            succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.folder, self.python = folder, folder / "bin/python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        (self.packages / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def install(self, *what, cwd, env=None):
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-index", "--no-deps")
        return succeed(*pip, "--no-build-isolation", *what, cwd=cwd, env=env)

    def ask(self, cwd, env=None):
        """PROGRAM's answer, and what it wrote to stderr."""
        result = succeed(self.python, "-c", PROGRAM, cwd=cwd, env=env)
        return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


def build_wheel(source, folder, env=None):
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    result = run(*pip, source, "-w", folder, cwd=folder.parent, env=env)
    return result, next(folder.glob("*.whl"), None) if folder.exists() else None


@pytest.fixture(scope="module")
def wheel(pristine, tmp_path_factory):
    """The wheel that this machine builds, with the library in it."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a C++ compiler")
    source = shutil.copytree(pristine, tmp_path_factory.mktemp("wheel") / "repository")
    result, path = build_wheel(source, source.parent / "dist")
    assert path, result.stdout[-3000:] + result.stderr[-3000:]
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment that has the wheel. Not to be changed."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "environment")
    environment.install(wheel, cwd=wheel.parent)
    return environment


def test_wheel(wheel, pristine, installed, tmp_path):
    """One wheel for every Python; it works from anywhere, the repository's root included."""
    assert wheel.name.startswith("coordatt_fast-") and "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("lib/libcoordatt_fast.so", "lib/build.json", "kernels/README.md", "module.py", "py.typed"):
        assert f"coordatt_fast/{name}" in names
    assert not [n for n in names if n.startswith(("csrc", "kernels", "tests", "bench"))]

    answer, _ = installed.ask(tmp_path)
    assert Path(answer["file"]).is_relative_to(installed.packages)
    assert answer["kernels"] == [str(installed.packages / "coordatt_fast/kernels")]
    assert answer["cpu"] and answer["tier"] == "fused"

    answer, _ = installed.ask(pristine)
    assert Path(answer["file"]).is_relative_to(pristine)
    assert str(pristine / "kernels") in answer["kernels"]
    assert answer["cpu"] and answer["tier"] == "fused"


def test_editable(source, environment, tmp_path, wheel):
    environment.install("--editable", source, cwd=tmp_path)
    for folder in (tmp_path, source):
        answer, _ = environment.ask(folder)
        assert Path(answer["file"]).is_relative_to(source)
        assert str(source / "kernels") in answer["kernels"]
        assert answer["cpu"] and answer["tier"] == "fused"
    assert json.loads((source / "coordatt_fast/lib/build.json").read_text())["torch"] == torch.__version__


@pytest.mark.parametrize(
    "env, words",
    [
        ({"CXX": "/nonexistent/g++"}, ["no C++ compiler", "/nonexistent/g++"]),
        ({"CXX": "", "PATH": "/nonexistent"}, ["no C++ compiler", "c++, g++, clang++"]),
        ({"COORDATT_FAST_NO_BUILD": "1"}, ["COORDATT_FAST_NO_BUILD"]),
    ],
    ids=["CXX", "PATH", "on purpose"],
)
def test_without_the_library(source, environment, tmp_path, env, words):
    """The install succeeds in pure Python, and says why to whoever asks."""
    result, path = build_wheel(source, tmp_path / "dist", env)
    assert path, result.stdout[-3000:] + result.stderr[-3000:]
    assert path.name.endswith("-py3-none-any.whl")
    environment.install(path, cwd=tmp_path)
    answer, errors = environment.ask(tmp_path)
    assert not answer["cpu"] and answer["tier"] == "reference"
    for word in words:
        assert word in answer["reason"]
    assert not errors, "chosen at installation: nothing to warn of at every start"
    printed = succeed(environment.python, "-m", "coordatt_fast", cwd=tmp_path).stdout
    assert answer["reason"] in printed

    result = run(environment.python, "-c", PROGRAM, cwd=tmp_path, env={"COORDATT_FAST_BACKEND": "cpu"})
    assert result.returncode and "RuntimeError" in result.stderr and words[0] in result.stderr


def test_source_that_does_not_compile(source, tmp_path):
    """With a compiler there, an error is an error; the message tells the way out."""
    dispatch = source / "csrc/cpu/dispatch.cpp"
    dispatch.write_text("#error broken on purpose\n" + dispatch.read_text())
    result, path = build_wheel(source, tmp_path / "dist")
    assert result.returncode and path is None
    assert "broken on purpose" in result.stdout + result.stderr
    assert "COORDATT_FAST_NO_BUILD=1" in result.stdout + result.stderr


def cut_short(library, build):
    library.write_bytes(library.read_bytes()[:1000])


def overwritten(library, build):
    library.write_bytes(bytes(library.stat().st_size))


def of_another_torch(library, build):
    overwritten(library, build)
    build["torch"] = "2.99.0"


def of_another_version(library, build):
    build["version"] = "0.0.1"


def removed(library, build):
    library.unlink()


@pytest.mark.parametrize(
    "harm, words",
    [
        (cut_short, ["damaged", "1000"]),
        (overwritten, ["does not load", "built for", torch.__version__]),
        (of_another_torch, ["does not load", "built for", "torch 2.99.0", "found", torch.__version__]),
        (of_another_version, ["another version", "0.0.1"]),
        (removed, ["does not exist"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_library_that_does_not_load(installed, tmp_path, harm, words):
    """Reported with what it was built for and what is there; the reference still computes; a demand raises."""
    environment = Environment(tmp_path / "environment", installed)
    folder = environment.packages / "coordatt_fast/lib"
    build = json.loads((folder / "build.json").read_text())
    harm(folder / "libcoordatt_fast.so", build)
    (folder / "build.json").write_text(json.dumps(build))
    answer, errors = environment.ask(tmp_path)
    assert not answer["cpu"] and answer["tier"] == "reference"
    for word in words:
        assert word in answer["reason"], answer["reason"]
    assert ("does not load" in errors) == ("does not load" in words), "what is broken is warned of"

    result = run(environment.python, "-c", PROGRAM, cwd=tmp_path, env={"COORDATT_FAST_BACKEND": "cpu"})
    assert result.returncode and "RuntimeError" in result.stderr and words[0] in result.stderr


def test_command_line(installed, tmp_path):
    printed = succeed(installed.python, "-m", "coordatt_fast", cwd=tmp_path).stdout
    assert str(installed.packages / "coordatt_fast/lib/libcoordatt_fast.so") in printed
    assert "cpu         yes" in printed and torch.__version__ in printed
    script = installed.python.parent / "coordatt-fast"
    assert succeed(script, "info", cwd=tmp_path).stdout == printed
    model = "from coordatt_fast import CoordAtt\nclass Mine(CoordAtt): pass\ndef make(): return Mine(8, 8)\n"
    (tmp_path / "mine.py").write_text(model)
    result = run(script, "verify", "mine:make", "--input", "1,8,5,6", cwd=tmp_path)
    assert result.returncode == 1 and "already a coordatt_fast.CoordAtt" in result.stdout, result.stderr
    result = run(script, "bench", "--shape", "1,8,5,6", "--rounds", "1", cwd=tmp_path)
    assert result.returncode == 0 and "times as fast" in result.stdout, result.stdout + result.stderr


def test_library_needs_no_python(wheel, tmp_path):
    """Neither Python's symbols nor its library, and no path of the machine that built it."""
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("needs nm and readelf")
    library = zipfile.ZipFile(wheel).extract("coordatt_fast/lib/libcoordatt_fast.so", tmp_path)
    symbols = succeed("nm", "-D", library, cwd=tmp_path).stdout
    assert not [line for line in symbols.splitlines() if " _Py" in line or " Py" in line]
    dynamic = succeed("readelf", "-d", library, cwd=tmp_path).stdout
    assert "libpython" not in dynamic and "libtorch_python" not in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "libtorch_cpu.so" in dynamic


def test_source_distribution(source, tmp_path):
    """Holds the whole repository: what a build reads, and what make test, make bench and make examples do."""
    wanted = [
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        ".gitignore",
        "kernels/README.md",
        "coordatt_fast/module.py",
    ]
    for name in ("bench", "docs", "examples", "hub", "requirements", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    shutil.copy(ROOT / ".gitignore", source)
    for name in ("bench", "csrc", "docs", "examples", "hub", "requirements", "tests"):
        wanted += [p.relative_to(source) for p in (source / name).rglob("*") if p.is_file()]
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    succeed(sys.executable, "-c", code, cwd=source)
    names = tarfile.open(next(tmp_path.glob("*.tar.gz"))).getnames()
    held = {name.partition("/")[2] for name in names}
    assert not {str(path) for path in wanted} - held
    assert not [name for name in held if name.startswith(("build/", "coordatt_fast/lib/"))]
