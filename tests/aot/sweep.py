"""Compiles Triton kernels for GPUs that are not here, and reads what came out. A worker process runs this."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coordatt_fast.kernels import entries

TARGETS = {f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Map:
    """A feature map [N, C, H, W] and the squeezed channels M of its block."""

    shape: tuple
    mid: int
    dtype: str
    nhwc: bool

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.dtype}-{'nhwc' if self.nhwc else 'nchw'}"


@dataclass
class Code:
    """loads, stores: bits of the widest global access; spills: registers or bytes kept in local memory."""

    kernel: str
    loads: int
    stores: int
    spills: int
    shared: int
    registers: int


def widest(sass: str, access: str) -> int:
    """LDG.E.128 and its kin: bits of the widest; plain LDG.E is 32."""
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    found = re.findall(rf"\b{access}\.E((?:\.[A-Z0-9]+)*)", sass)
    return max((next((sizes[p] for p in text.split(".") if p in sizes), 32) for text in found), default=0)


def _output(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_nvidia(kernel: str, compiled, folder: Path) -> Code:
    path = folder / f"{kernel}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    sass = _output(TOOLS / "nvdisasm", "-c", path)
    usage = dict(re.findall(r"(\w+):(\d+)", _output(TOOLS / "cuobjdump", "-res-usage", path)))
    local = int(usage["STACK"]) + int(usage["LOCAL"]) + len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Code(
        kernel, widest(sass, "LDG"), widest(sass, "STG"), local, compiled.metadata.shared, int(usage["REG"])
    )


def read_amd(kernel: str, compiled) -> Code:
    text = compiled.asm["amdgcn"]
    number = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))
    spills = number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size")
    return Code(kernel, 0, 0, spills, compiled.metadata.shared, number("vgpr_count"))


def compile_all(target: str, of: Map, folder: Path) -> list[Code]:
    """Every launch of inference, training, backward and the hybrid tier on this map."""
    dtype = getattr(torch, of.dtype)
    found = []
    for entry in entries.entries(of.shape, of.mid, dtype, of.nhwc):
        source = ASTSource(
            fn=entry.fn, signature=entry.signature, constexprs=entry.constexprs, attrs=entry.attrs
        )
        compiled = triton.compile(source, target=TARGETS[target], options=entry.options)
        name = entry.fn.__name__
        found.append(read_amd(name, compiled) if target == "gfx942" else read_nvidia(name, compiled, folder))
    return found
