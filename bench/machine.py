"""The machine and the versions a measurement belongs to."""

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch

import coordatt_fast

PACKAGES = ("torch", "numpy", "timm", "onnxruntime", "openvino")


def read(path: str) -> str:
    """A file's text without surrounding blanks; empty where there is no such file."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    name = found.group(1) if found else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)", "", name).strip()


def size_in_bytes(text: str) -> int:
    """``"2048K"`` as bytes."""
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", text).groups()
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def caches() -> dict[str, int]:
    """Bytes of the first core's data caches, ``{"L1": ..., "L2": ..., "L3": ...}``; empty where the kernel
    hides it."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if read(f"{index}/type") in ("Data", "Unified"):
            sizes[f"L{read(f'{index}/level')}"] = size_in_bytes(read(f"{index}/size"))
    return sizes


def readable(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 1 << 20 else f"{size / 2**10:g} KiB"


def fits_in(size: int, sizes: dict[str, int]) -> str:
    """The first cache level that holds ``size`` bytes, or ``memory``."""
    return next((level for level, capacity in sorted(sizes.items()) if size <= capacity), "memory")


def libc() -> str:
    """``glibc`` or another name: only glibc's malloc understands the settings of ``timing.PAGES``."""
    return platform.libc_ver()[0] or "unknown"


def busy_cores(seconds: float = 1.0) -> float:
    """Cores that others keep busy: sampled while this process sleeps. Zero where the kernel does not say."""

    def idle_and_total() -> tuple[int, int]:
        ticks = [int(field) for field in read("/proc/stat").partition("\n")[0].split()[1:9]]
        return sum(ticks[3:5]), sum(ticks)

    if not read("/proc/stat"):
        return 0.0
    before = idle_and_total()
    time.sleep(seconds)
    idle, total = (after - start for after, start in zip(idle_and_total(), before, strict=True))
    return round((1 - idle / max(total, 1)) * os.cpu_count(), 2)


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    if not found:
        return "none"
    return subprocess.run([found, "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the path, or where toolkits are put."""
    if found := shutil.which(name):
        return found
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    places = [path for home in homes for path in Path(home).glob(f"bin/{name}")]
    for folder in ("usr/local/cuda*/bin", f"usr/local/cuda*/{name}", "opt/nvidia/*/*"):
        places += sorted(Path("/").glob(f"{folder}/{name}"))
    return next((str(path) for path in places if os.access(path, os.X_OK) and path.is_file()), None)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe(device: str) -> dict:
    """All that a reader needs to place the numbers."""
    memory = re.search(r"MemTotal:\s+(\d+) kB", read("/proc/meminfo"))
    thp = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": caches(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "busy_cores": busy_cores(),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "huge_pages": thp.group(1) if thp else "unknown",
        "virtual": "hypervisor" in read("/proc/cpuinfo"),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "compiler": compiler(),
        "versions": {"coordatt_fast": coordatt_fast.__version__} | {name: version(name) for name in PACKAGES},
        "settings": {name: value for name, value in os.environ.items() if name.startswith("COORDATT_FAST_")},
        "accelerator": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def line(facts: dict) -> str:
    """The facts in two readable lines."""
    sizes = ", ".join(f"{level} {readable(size)}" for level, size in facts["caches"].items())
    where = "virtual machine, " if facts["virtual"] else ""
    versions = ", ".join(
        f"{name} {number}" for name, number in facts["versions"].items() if number != "not installed"
    )
    versions += "".join(f", {name}={value}" for name, value in facts["settings"].items())
    accelerator = f"{facts['accelerator']}, " if facts["accelerator"] else ""
    return (
        f"{accelerator}{facts['cpu']}, {facts['cores']} cores, {facts['simd']} ({where}{sizes}), "
        f"{facts['memory_gib']:g} GiB, huge pages {facts['huge_pages']}\n"
        f"{facts['system']}, Python {facts['python']}, {versions}, {facts['compiler']}, {facts['date'][:10]}"
    )


def busy(facts: dict) -> str:
    """A warning when others were computing on this machine as the run began; empty when it was idle."""
    if facts["busy_cores"] < 0.3:
        return ""
    return (
        f"!!! THE MACHINE WAS BUSY: {facts['busy_cores']:.1f} of {facts['cores']} cores in use as it began. "
        "Do not trust the times."
    )


def slug(facts: dict) -> str:
    """A folder name for this machine, without its host name."""
    name = facts["accelerator"] or facts["cpu"]
    words = re.findall(r"[a-z0-9.]+", name.lower().replace("processor", ""))
    return "-".join(words + [f"{facts['cores']}cores"])
