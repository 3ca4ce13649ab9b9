"""Builds coordatt_fast/lib/libcoordatt_fast.so with ninja, or installs pure Python and says why in
lib/build.json.

Environment: CXX, MAX_JOBS, DEBUG=1 (-O1 -g), SANITIZE=address,undefined, COORDATT_FAST_NO_BUILD=1 (skip on
purpose). Where nvcc is found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda) the library has CUDA kernels too:
TORCH_CUDA_ARCH_LIST says for which GPUs, FORCE_CUDA=0 leaves them out, FORCE_CUDA=1 fails without nvcc. The
library sees only libtorch's stable ABI and no Python, so one build serves every Python and every torch >=
2.11.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "coordatt_fast/__init__.py").read_text()).group(1)
LIBRARY = "libcoordatt_fast.so"
TORCH_TARGET = (
    "0x020b000000000000ULL"  # 2.11, the oldest torch whose stable ABI has all that library.cpp uses
)

WARNINGS = ["-Wall", "-Wextra", "-Werror=switch"]
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
AVX512_BY_NAME = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "cd")), AVX512[1]]

# What the CUDA kernels are compiled for where TORCH_CUDA_ARCH_LIST says nothing, as far as nvcc knows it; the
# newest of them as PTX too, for GPUs newer than nvcc.
CUDA_ARCHS = "8.0 9.0 10.0 12.0"
CUDA_NAMES = {"Ampere": "8.0 8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0 12.0+PTX"}
# 128: the bodies of loops that one architecture has no use for.
NVCC = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-diag-suppress=128", "-Icsrc"]

# These are compiled once per SIMD level; every other file of csrc/cpu once, for any CPU.
PER_LEVEL = ("pool", "mix", "gate", "norm")


class Skip(Exception):
    """Why there will be no compiled library."""


def wrong(name: str, why: str) -> SystemExit:
    """The end of a build for which a variable of the environment has a value that cannot be used."""
    return SystemExit(f"coordatt_fast: {name}={os.environ.get(name, '')}: {why}")


def switch(name: str) -> bool | None:
    """What a variable that is 0 or 1 says; None where it is empty or not set."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise wrong(name, "expected 0 or 1")
    return None if value == "" else value == "1"


def answer(command: list[str], problem: Callable[[str], SystemExit], given: str = "") -> str:
    """What a tool prints when given a text. Where it fails, raises problem of what went wrong."""
    settings = dict(capture_output=True, text=True, errors="replace", timeout=60)
    try:
        done = subprocess.run(command, input=given, **settings)
    except (OSError, subprocess.SubprocessError) as error:
        raise problem(f"{shlex.join(command)} does not run: {error}") from None
    if done.returncode or not done.stdout.strip():
        ended = f"ended with status {done.returncode}" if done.returncode else "printed nothing"
        said = (done.stderr.strip().splitlines() or [""])[-1]
        raise problem(f"{shlex.join(command)} {ended}{': ' if said else ''}{said}")
    return done.stdout.strip()


def _torch_here() -> tuple[Path, str] | None:
    """Folder and version of the torch that this interpreter would import, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    found: dict[str, str] = {}
    exec((folder / "version.py").read_text(), found)
    return folder, found["__version__"]


@functools.cache
def find_torch() -> tuple[Path, str] | None:
    """The torch to build against; from inside pip's isolated build, the one of the interpreter outside.

    Isolation works through PYTHONPATH and the like, which -I ignores.
    """
    if found := _torch_here():
        return found
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    origin = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True).stdout.strip()
    if not origin:
        return None
    found = {}
    exec(Path(origin).with_name("version.py").read_text(), found)
    return Path(origin).parent, found["__version__"]


def find_compiler() -> list[str]:
    """The C++ compiler as a command line."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        try:
            command = shlex.split(name)
        except ValueError as error:
            raise wrong("CXX", f"{error}; expected a command") from None
        if command and shutil.which(command[0]):
            return command
    raise Skip(
        f"no C++ compiler: CXX={wanted} was not found"
        if wanted
        else "no C++ compiler: none of c++, g++, clang++"
    )


def find_ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        if (program := Path(ninja.BIN_DIR) / "ninja").is_file():
            return str(program.resolve())
    if found := shutil.which("ninja"):
        return found
    raise Skip("ninja was not found (pip install ninja)")


def find_nvcc() -> str | None:
    """The CUDA compiler, where there is one and it is wanted."""
    force = switch("FORCE_CUDA")
    if force is False or os.environ.get("SANITIZE"):
        return None
    places = []
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            places.append(Path(home) / "bin/nvcc")
            if not places[-1].is_file():
                print(f"coordatt_fast: {name}={home} has no bin/nvcc", flush=True)
    places += [Path(found)] if (found := shutil.which("nvcc")) else []
    for place in [*places, Path("/usr/local/cuda/bin/nvcc")]:
        if place.is_file():
            return str(place)
    if force:
        raise SystemExit("coordatt_fast: FORCE_CUDA=1, but nvcc was not found; set CUDA_HOME")
    return None


class Cuda:
    """nvcc, and the GPUs to compile for."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        said = answer([nvcc, "--version"], self.broken)
        release = re.search(r"release (\d+\.\d+)", said)
        if release is None:
            raise self.broken(f"{nvcc} --version does not say which release it is")
        self.version = release.group(1)
        known = set(answer([nvcc, "--list-gpu-arch"], self.broken).split())
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
        self.archs: list[str] = []
        self.flags: list[str] = []
        names = re.split(r"[;,\s]+", (wanted or CUDA_ARCHS).strip(";, "))
        if not any(names):
            raise wrong("TORCH_CUDA_ARCH_LIST", "it names no GPU; for none at all set FORCE_CUDA=0")
        for name in names:
            for arch in CUDA_NAMES.get(name, name).split():
                self.add(arch, known, asked=name if wanted else "")
        if not self.archs:
            raise SystemExit(
                f"coordatt_fast: nvcc {self.version} ({nvcc}) knows no GPU from 8.0 on; "
                "FORCE_CUDA=0 builds without it"
            )
        if not wanted:
            newest = self.archs[-1].removeprefix("sm_")
            self.flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")

    @staticmethod
    def broken(why: str) -> SystemExit:
        return SystemExit(
            f"coordatt_fast: nvcc is broken: {why}; set CUDA_HOME to another, or FORCE_CUDA=0 for the CPU's "
            "kernels alone"
        )

    def add(self, arch: str, known: set[str], asked: str) -> None:
        """Compiles for arch as well; asked: how TORCH_CUDA_ARCH_LIST put it."""
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        digits = number[1] + number[2] if number else "0"
        early = number and number[3] and int(digits) < 90  # only newer ones have such a suffix
        if int(digits) < 80 or early or f"compute_{digits}" not in known:
            if not asked:
                return
            numbers = sorted(int(digits) for digits in re.findall(r"compute_(\d+)\b", " ".join(known)))
            right = " ".join(f"{n // 10}.{n % 10}" for n in numbers if n >= 80)
            raise wrong(
                "TORCH_CUDA_ARCH_LIST",
                f"{asked!r} is none of {right} (what nvcc {self.version} knows; with +PTX for newer GPUs "
                f"too), {', '.join(CUDA_NAMES)}; for none at all set FORCE_CUDA=0",
            )
        digits += number[3]
        if f"sm_{digits}" not in self.archs:
            self.archs.append(f"sm_{digits}")
            self.flags.append(f"-gencode=arch=compute_{digits},code=sm_{digits}")
        if number[4]:
            self.flags.append(f"-gencode=arch=compute_{digits},code=compute_{digits}")

    def folder(self) -> Path:
        """Of the libraries to link."""
        root = Path(self.nvcc).resolve().parents[1]
        if not (root / "include/cuda_runtime.h").is_file():  # nvcc on the path may be a script
            root = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
        for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
            if (root / name / "libcudart_static.a").is_file():
                return root / name
        raise SystemExit(f"coordatt_fast: libcudart_static.a was not found under {root}; set CUDA_HOME")


def other_cuda(torchs: str | None, nvccs: str) -> str | None:
    """Why a library of this nvcc may not serve that torch's GPUs; None when it does, or FORCE_CUDA is set."""
    if not torchs or torchs.split(".")[0] == nvccs.split(".")[0] or switch("FORCE_CUDA"):
        return None
    return (
        f"torch is built with CUDA {torchs}, nvcc is {nvccs}, which may need a newer driver than torch does; "
        "set CUDA_HOME to a CUDA of torch's major version, or FORCE_CUDA=1"
    )


class Toolchain:
    """What is there to build with. Raises Skip where something is missing."""

    def __init__(self) -> None:
        if switch("COORDATT_FAST_NO_BUILD"):
            raise Skip("COORDATT_FAST_NO_BUILD was set")
        if not sys.platform.startswith("linux"):
            raise Skip(f"the compiled library is built on Linux only, this is {sys.platform}")
        self.cxx = find_compiler()
        self.ninja = find_ninja()
        torch = find_torch()
        if torch is None or not (torch[0] / "include/torch/csrc/stable/library.h").exists():
            raise Skip(
                "no torch >= 2.11 with its headers was found" + (f" (found {torch[1]})" if torch else "")
            )
        self.torch, self.torch_version = torch
        self.compiler = answer([*self.cxx, "--version"], self.broken).splitlines()[0]
        self.machine = answer([*self.cxx, "-dumpmachine"], self.broken).split("-")[0]
        self.try_out()
        nvcc = find_nvcc()
        self.cuda = Cuda(nvcc) if nvcc else None
        found: dict[str, str | None] = {}
        exec((self.torch / "version.py").read_text(), found)
        if self.cuda and (why := other_cuda(found.get("cuda"), self.cuda.version)):
            print(f"coordatt_fast: no CUDA kernels: {why}", flush=True)
            self.cuda = None

    @staticmethod
    def broken(why: str) -> SystemExit:
        named = f"CXX={os.environ['CXX']}: " if os.environ.get("CXX") else ""
        return SystemExit(
            f"coordatt_fast: {named}the C++ compiler is broken: {why}; set CXX to another, or "
            "COORDATT_FAST_NO_BUILD=1 to install without the compiled library, in pure Python"
        )

    def try_out(self) -> None:
        """Tells what is no C++ compiler from a fault in our sources."""
        command = [*self.cxx, "-std=c++17", "-x", "c++", "-E", "-"]
        if "COORDATT_FAST" not in answer(command, self.broken, "#include <vector>\nCOORDATT_FAST\n"):
            raise self.broken(f"{shlex.join(command)} does something else")
        for name in filter(None, os.environ.get("SANITIZE", "").split(",")):
            if not self.accepts([f"-fsanitize={name}"]):
                raise wrong("SANITIZE", f"no -fsanitize={name} in {self.cxx[0]}; expected address, undefined")

    def accepts(self, flags: list[str]) -> bool:
        command = [*self.cxx, *flags, "-x", "c++", "-fsyntax-only", "-"]
        return subprocess.run(command, input="int x;", capture_output=True, text=True).returncode == 0

    def levels(self) -> dict[str, list[str]]:
        """SIMD levels, lowest first, with the flags each one adds."""
        if self.machine == "aarch64":
            return {"neon": []}
        levels: dict[str, list[str]] = {"baseline": []}
        if self.machine == "x86_64":
            avx512 = AVX512 if self.accepts(AVX512) else AVX512_BY_NAME
            wider = {"avx2": AVX2, "avx512": avx512, "avx512_bf16": [*avx512, "-mavx512bf16"]}
            levels |= {name: flags for name, flags in wider.items() if self.accepts(flags)}
        return levels


@functools.cache
def toolchain() -> Toolchain | Skip:
    try:
        return Toolchain()
    except Skip as reason:
        return reason


def mode() -> tuple[str, list[str]]:
    """Name and flags of the kind of build that the environment asks for."""
    sanitize = os.environ.get("SANITIZE", "")
    # Other programs use this name too, with values of their own.
    debug = os.environ.get("DEBUG", "").strip() == "1" or bool(sanitize)
    flags = ["-O1", "-g"] if debug else ["-O3"]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    return "-".join(["debug" if debug else "release", *filter(None, sanitize.split(","))]), flags


def jobs() -> list[str]:
    """How many files ninja compiles at a time, as its option."""
    value = os.environ.get("MAX_JOBS", "").strip()
    if value and not re.fullmatch(r"0*[1-9][0-9]{0,4}", value):
        raise wrong("MAX_JOBS", "expected a positive number, how many files are compiled at a time")
    return ["-j", value] if value else []


def nvcc_rule(tools: Toolchain) -> list[str]:
    if not tools.cuda:
        return []
    host = shlex.join(["-ccbin", shutil.which(tools.cxx[0]), "-Xcompiler", "-fPIC,-fvisibility=hidden"])
    return [
        "rule nvcc",
        f"  command = {tools.cuda.nvcc} {host} -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $out",
    ]


def write_ninja(tools: Toolchain, folder: Path, output: Path) -> dict[str, list[str]]:
    """Writes folder/build.ninja, which makes output; paths in it are relative to the repository root."""
    base = [*COMMON, *WARNINGS, *mode()[1]]
    levels = tools.levels()

    def define(name: str, value: str) -> str:
        return f'-D{name}="{value}"'

    def escape(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def flags(parts: list[str]) -> str:
        return shlex.join(parts).replace("$", "$$")

    objects: list[str] = []
    lines = [
        "ninja_required_version = 1.3",
        f"builddir = {escape(str(folder))}",
        f"cxx = {flags(tools.cxx)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        *nvcc_rule(tools),
        "rule link",
        "  command = $cxx -shared $in $flags -o $out",
        "  description = link $out",
    ]

    def compile_file(source: Path, name: str, parts: list[str], rule: str = "compile") -> None:
        objects.append(escape(str(folder / f"{name}.o")))
        lines.append(f"build {objects[-1]}: {rule} {escape(str(source))}\n  flags = {flags(parts)}")

    include = tools.torch / "include"
    torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-Icsrc"]
    torch_flags += ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    torch_flags += [
        define("COORDATT_VERSION", VERSION),
        define("COORDATT_TORCH_BUILT", tools.torch_version),
        define("COORDATT_COMPILER", tools.compiler),
    ]
    if tools.cuda:
        torch_flags.append(define("COORDATT_CUDA", f"{tools.cuda.version}: {' '.join(tools.cuda.archs)}"))
    compile_file(Path("csrc/library.cpp"), "library", [*base, *torch_flags])

    compiled = [f"-DCOORDATT_HAVE_{level.upper()}" for level in levels]
    for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        source = path.relative_to(ROOT)
        if path.stem == "bindings":
            compile_file(source, "cpu_bindings", [*base, *torch_flags])
            continue
        if path.stem not in PER_LEVEL:
            compile_file(source, path.stem, [*base, "-Icsrc", *compiled])
            continue
        for level, extra in levels.items():
            if level == "avx512_bf16" and path.stem == "mix":
                continue  # it computes in float32 or float64
            parts = [*base, *KERNEL, *extra, "-Icsrc", f"-DCOORDATT_SIMD_{level.upper()}"]
            compile_file(source, f"{path.stem}_{level}", parts)

    if tools.cuda:
        for path in sorted((ROOT / "csrc/cuda").glob("*.c*")):
            source, name = path.relative_to(ROOT), f"cuda_{path.stem}"
            if path.suffix == ".cu":
                compile_file(source, name, [*NVCC, *tools.cuda.flags], rule="nvcc")
            elif path.suffix == ".cpp":
                compile_file(source, name, [*base, *(torch_flags if path.stem == "bindings" else ["-Icsrc"])])

    link = [
        f"-L{tools.torch / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-Wl,--as-needed",
        "-ltorch_cpu",
        "-lc10",
    ]
    if tools.cuda:
        link += [f"-L{tools.cuda.folder()}", "-lcudart_static", "-ldl", "-lrt"]
    link.append("-lpthread")
    sanitize = [flag for flag in mode()[1] if flag.startswith("-fsanitize")]
    link += sanitize or ["-Wl,-z,defs"]
    lines.append(f"build {escape(str(output))}: link {' '.join(objects)}\n  flags = {flags(link)}")
    lines.append(f"default {escape(str(output))}\n")
    (folder / "build.ninja").write_text("\n".join(lines))
    return levels


class BuildLibrary(build_ext):
    """build_ext that makes the library and build.json; --inplace puts them into the source tree."""

    def _lib(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "coordatt_fast/lib"

    def run(self) -> None:
        lib, tools = self._lib(), toolchain()
        lib.mkdir(parents=True, exist_ok=True)
        about: dict[str, object] = {"version": VERSION, "platform": f"{sys.platform}-{platform.machine()}"}
        if isinstance(tools, Skip):
            (lib / LIBRARY).unlink(missing_ok=True)
            about["skipped"] = str(tools)
            print(f"coordatt_fast: no compiled library, pure Python: {tools}")
        else:
            levels = self.compile(tools, lib / LIBRARY)
            about["bytes"] = (lib / LIBRARY).stat().st_size
            about |= {
                "torch": tools.torch_version,
                "compiler": tools.compiler,
                "simd": list(levels),
                "mode": mode()[0],
                "cuda": {"nvcc": tools.cuda.version, "archs": tools.cuda.archs} if tools.cuda else None,
            }
        (lib / "build.json").write_text(json.dumps(about, indent=2) + "\n")

    def compile(self, tools: Toolchain, target: Path) -> dict[str, list[str]]:
        folder = Path(self.get_finalized_command("build").build_base) / mode()[0]
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        output = folder / LIBRARY
        levels = write_ninja(tools, folder, output)
        print(
            f"coordatt_fast {VERSION}: {tools.compiler}, torch {tools.torch_version}, {', '.join(levels)}; "
            + (f"nvcc {tools.cuda.version}, {', '.join(tools.cuda.archs)}" if tools.cuda else "no CUDA"),
            flush=True,
        )
        command = [tools.ninja, "-f", str(folder / "build.ninja"), *jobs()]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise SystemExit(
                "coordatt_fast: compiling the library failed (see above). "
                "COORDATT_FAST_NO_BUILD=1 installs without it, in pure Python"
                + ("; FORCE_CUDA=0 with the CPU's kernels alone." if tools.cuda else ".")
            )
        # A new file under the name: a process that has the old library mapped keeps it whole.
        partial = target.with_suffix(".new")
        shutil.copyfile(ROOT / output, partial)
        partial.chmod(0o755)
        partial.replace(target)
        return levels

    def get_outputs(self) -> list[str]:
        names = ["build.json"] if isinstance(toolchain(), Skip) else [LIBRARY, "build.json"]
        return [str(self._lib() / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """py3-none-<platform> with the library in it, py3-none-any without."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = isinstance(toolchain(), Skip)

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


def missing_torch() -> list[str]:
    """torch as a build requirement, where there is a compiler and neither this nor the outer interpreter has
    one.

    Not in pyproject.toml: an isolated build would then fetch a second torch, perhaps another version than the
    user's.
    """
    try:
        find_compiler()
    except Skip:
        return []
    return [] if switch("COORDATT_FAST_NO_BUILD") or find_torch() else ["torch>=2.11"]


setup(
    ext_modules=[Extension("coordatt_fast.lib.libcoordatt_fast", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    setup_requires=missing_torch(),
)
