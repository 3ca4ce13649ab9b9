"""The CUDA kernels' machine code: from the build's object files where those are up to date, else compiled once more."""

import concurrent.futures
import re
import runpy
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from sweep import TOOLS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
DTYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel template; layout is empty where the kernel has none."""

    name: str
    dtype: str
    layout: str
    registers: int
    stack: int  # bytes, local memory included
    sass: str

    def __repr__(self) -> str:
        return f"{self.name} {self.dtype} {self.layout}: {self.registers} registers, {self.stack} bytes of stack"

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))


def build_script() -> dict:
    """What setup.py defines, without a build."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def output(*command, cwd=None) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, cwd=cwd).stdout


def kernels_in_sources() -> set[str]:
    """Names of the kernel templates, without their common ending."""
    found = set()
    for path in SOURCES:
        text = path.read_text()
        found.update(re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)_kernel\(", text))
        assert text.count("__global__") == len(re.findall(r"__global__ void [^;{]*?_kernel\(", text)), path
    return found


def up_to_date(path: Path, script: dict) -> bool:
    """Whether an object file of the build holds what the sources and setup.py say, for all of ARCHS."""
    rules = path.with_name("build.ninja")
    if not path.is_file() or shlex.join(script["NVCC"]) not in rules.read_text():
        return False
    question = (script["find_ninja"](), "-f", rules.relative_to(ROOT), "-n", path.relative_to(ROOT))
    if "no work to do" not in output(*question, cwd=ROOT):
        return False
    return set(ARCHS) <= set(re.findall(r"\.(sm_\w+)\.cubin", output(TOOLS / "cuobjdump", "-lelf", path)))


def object_of(source: Path, folder: Path, nvcc: str, script: dict) -> Path:
    built = ROOT / f"build/release/cuda_{source.stem}.o"
    if up_to_date(built, script):
        return built
    target = folder / f"cuda_{source.stem}.o"
    archs = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in ARCHS]
    result = subprocess.run([nvcc, *script["NVCC"], *archs, "-c", source, "-o", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


def read(cubin: Path) -> list[Kernel]:
    """The kernels of one file for one architecture."""
    usage = {}
    for name, registers, stack, local in re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output(TOOLS / "cuobjdump", "-res-usage", cubin)
    ):
        usage[name] = int(registers), int(stack) + int(local)
    found = []
    for section in output(TOOLS / "nvdisasm", "-c", cubin).split("\t.section\t.text.")[1:]:
        symbol = section[: section.index(",")]
        name, dtype, nhwc = re.fullmatch(
            r"_ZN8coordatt4cuda\d+(\w+?)_kernelI(f|d|6__half|13__nv_bfloat16)(?:Lb([01])E)?EEvNS0_\d+\w+E", symbol
        ).groups()
        layout = {None: "", "0": "nchw", "1": "nhwc"}[nhwc]
        found.append(Kernel(name, DTYPES[dtype], layout, *usage[symbol], section))
    return found


def compile_all(nvcc: str, folder: Path) -> dict[str, list[Kernel]]:
    """Architecture -> its kernels."""
    script = build_script()
    found: dict[str, list[Kernel]] = {arch: [] for arch in ARCHS}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = pool.map(lambda source: object_of(source, folder, nvcc, script), SOURCES)
        for path in objects:
            output(TOOLS / "cuobjdump", "-xelf", "all", path.resolve(), cwd=folder)
        cubins = [path for path in sorted(folder.glob("*.cubin")) if path.suffixes[-2][1:] in found]
        for path, kernels in zip(cubins, pool.map(read, cubins)):
            found[path.suffixes[-2][1:]] += kernels
    return found
