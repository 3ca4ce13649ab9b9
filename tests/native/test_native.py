"""The CPU kernels without torch (driver.cpp): for aarch64, cross-compiled and run under qemu-user, and for this
processor under AddressSanitizer and UndefinedBehaviorSanitizer at every SIMD level that it has.

    make native       a quarter of a minute once all is compiled, two to three without

The objects are those that setup.py builds, with its flags; for aarch64 the ones of an install. The library itself is
linked for aarch64 too, as far as that goes without an aarch64 torch.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CROSS = "aarch64-linux-gnu-g++"
SYSROOT = "/usr/aarch64-linux-gnu"
JOBS = 2  # compilers and drivers at a time
CASES = 1300  # what a driver runs at the least


def build(name, targets, **settings):
    """Builds targets below build/native/name, anew where sources have changed; the folder and the SIMD levels."""
    settings = {"FORCE_CUDA": "0", "SANITIZE": "", "DEBUG": "", "COORDATT_FAST_NO_BUILD": "", **settings}
    folder = ROOT / "build/native" / name
    folder.mkdir(parents=True, exist_ok=True)
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, settings):
        script = runpy.run_path(str(ROOT / "setup.py"))
        tools = script["Toolchain"]()
        levels = script["write_ninja"](tools, folder, folder / "unused.so")
    rules = folder / "build.ninja"
    text = rules.read_text()
    # Unoptimised code is compiled in a third of the time, and hides nothing from the sanitizers.
    text = text.replace("-O1 -g", "-O0").split("default ")[0]
    objects = re.findall(r"^build (\S+\.o): compile", text, re.MULTILINE)
    # The driver's own loops would take most of the time under sanitizers; its memory is watched all the same.
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{ROOT}/csrc", f"-I{HERE}"]
    sanitize = []
    if settings["SANITIZE"]:
        sanitize, flags = [f"-fsanitize={settings['SANITIZE']}"], [*flags, "-DON_HEAP"]
    lines = ["rule program", "  command = $cxx $in $flags -o $out"]
    mine = []
    for source in sorted(HERE.glob("*.cpp")):
        mine.append(f"{folder}/driver_{source.stem}.o")
        lines.append(f"build {mine[-1]}: compile {source}\n  flags = {shlex.join(flags)}")
    kernels = [path for path in objects if Path(path).stem not in ("library", "cpu_bindings")]
    lines.append(f"build {folder}/driver: program {' '.join([*mine, *kernels])}")
    lines.append(f"  flags = {shlex.join([*sanitize, '-pthread'])}")
    lines.append(f"build {folder}/library.so: link {' '.join(objects)}\n  flags = -lpthread\n")
    rules.write_text(text + "\n".join(lines))
    command = [tools.ninja, "-f", rules, "-j", str(JOBS), *(folder / target for target in targets)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    return folder, list(levels)


def run(*command):
    """Runs the driver's shares beside one another; what they print."""
    settings = os.environ | {"COORDATT_FAST_POISON": "1", "ASAN_OPTIONS": "detect_leaks=0"}
    settings |= {"UBSAN_OPTIONS": "print_stacktrace=1"}
    seed = os.environ.get("SEED") or "0"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings)
    shares = [subprocess.Popen([*command, seed, str(i), str(JOBS)], **pipes) for i in range(JOBS)]
    said = [share.communicate()[0] for share in shares]
    for share, text in zip(shares, said):
        assert share.returncode == 0, text[-8000:]
    counts = [re.findall(r"(\w+) (\d+)", text.splitlines()[-1]) for text in said]
    total = {name: sum(int(dict(count)[name]) for count in counts) for name, _ in counts[0]}
    assert total["failures"] == 0 and total["cases"] >= CASES
    assert len({re.search(r"^levels: .*", text, re.MULTILINE)[0] for text in said}) == 1
    print("\n".join([*said[0].splitlines()[:-1], f"both shares: {total}"]))
    return said[0]


@pytest.fixture(scope="module")
def aarch64():
    if not shutil.which(CROSS):
        pytest.skip(f"{CROSS} was not found (Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu)")
    folder, levels = build("aarch64", ["driver", "library.so"], CXX=CROSS)
    assert levels == ["neon"]
    return folder


def test_library_for_aarch64(aarch64):
    """All of the library compiles and links; what is left open is torch's, by names that torch exports."""
    tool = CROSS.replace("g++", "readelf")
    header, symbols = (
        subprocess.run(
            [tool, *flags, aarch64 / "library.so"], check=True, capture_output=True, text=True
        ).stdout
        for flags in (["-h"], ["-W", "--dyn-syms"])
    )
    assert re.search(r"Machine: +AArch64", header) and re.search(r"Type: +DYN", header)
    left = set(re.findall(r"GLOBAL +DEFAULT +UND (\S+)$", symbols, re.MULTILINE))
    left = {name for name in left if "@" not in name}  # the C and C++ libraries' have versions
    assert any(name.startswith("aoti_torch_") for name in left)
    known = set()
    for name in ("libtorch_cpu.so", "libc10.so"):
        command = ["nm", "-D", "--defined-only", "--format=posix", Path(torch.__file__).parent / "lib" / name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        known |= {line.split(" ")[0] for line in done.stdout.splitlines()}
    assert left <= known, f"nobody has {sorted(left - known)}"


def test_kernels_on_aarch64(aarch64):
    """Under emulation: right in every number, not a word on speed."""
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not qemu:
        pytest.skip("qemu-aarch64 was not found (Debian and Ubuntu: apt-get install qemu-user)")
    if not Path(SYSROOT).is_dir():
        pytest.skip(f"{SYSROOT}, with aarch64's C library, was not found")
    assert "levels: neon" in run(qemu, "-L", SYSROOT, aarch64 / "driver").splitlines()


def test_sanitized():
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    for name in ("libasan.so", "libubsan.so"):
        said = subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        if not os.path.isabs(said):
            pytest.skip(f"{shlex.join(compiler)} brings no {name}")
    folder, levels = build("sanitized", ["driver"], SANITIZE="address,undefined")
    said = run(folder / "driver")
    ran = re.search(r"^levels:(.*)", said, re.MULTILINE)[1].split()
    assert levels[0] in ran
    assert set(ran) | set(re.findall(r"^not run: (\w+):", said, re.MULTILINE)) == set(levels)
