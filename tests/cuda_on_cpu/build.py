"""Builds the CUDA kernels as C++ on the emulator: coordatt_cuda_on_cpu, a Python module.

python tests/cuda_on_cpu/build.py [address,undefined] prints its path.
"""

import fcntl
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH_TARGET = "0x020b000000000000ULL"  # as in setup.py
KERNELS = ("pool", "gate", "mix", "one_pass")


def build(sanitize: str = "") -> Path:
    """The module, compiled again where its sources have changed."""
    folder = ROOT / "build" / f"cuda_on_cpu{'-' + sanitize.replace(',', '-') if sanitize else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-Wno-attributes", "-ffp-contract=off", "-DCOORDATT_ON_CPU", f"-I{HERE}", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/cuda"]
    flags += ["-O0", f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined"] if sanitize else ["-O2"]
    for path in (*include_paths(), pybind11.get_include(), sysconfig.get_path("include")):
        flags += ["-isystem", path]
    stable = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    cuda = ROOT / "csrc/cuda"
    sources = [(cuda / f"{name}.cu", ["-x", "c++"]) for name in KERNELS]
    sources += [(cuda / f"{name}.cpp", []) for name in ("geometry", "forward", "backward", "alone")]
    sources += [(cuda / "bindings.cpp", stable), (HERE / "emulator.cpp", []), (HERE / "module.cpp", [])]
    lines = [
        "rule compile",
        f"  command = {os.environ.get('CXX', 'c++')} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {os.environ.get('CXX', 'c++')} -shared $in $flags -o $out",
    ]
    objects = []
    for path, more in sources:
        objects.append(f"{path.parent.name}_{path.stem}.o")
        lines.append(f"build {objects[-1]}: compile {path}\n  flags = {shlex.join([*flags, *more])}")
    module = f"coordatt_cuda_on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    libraries += [f"-fsanitize={sanitize}"] if sanitize else []
    lines.append(f"build {module}: link {' '.join(objects)}\n  flags = {shlex.join(libraries)}\n")
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder]
    with open(folder / "lock", "w") as lock:  # two workers build at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines))
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stdout[-8000:] + result.stderr)
    return folder / module


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
