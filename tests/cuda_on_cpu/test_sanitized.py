"""The CUDA kernels on the emulator, compiled with AddressSanitizer and UndefinedBehaviorSanitizer (make sanitized)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

PROGRAM = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
import importlib.util, itertools
import torch
torch.set_num_threads(1)
from coordatt_fast import ops
spec = importlib.util.spec_from_file_location("coordatt_cuda_on_cpu", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
ops._cpu = ops._Operators("cuda", ops.ROWS["cuda"], torch.ops.coordatt_fast_cuda_on_cpu)
import checking
from harness import FLOATS, LAYOUTS, Case, data
checking.reset(module)
shapes = ((2, 5, 3, 7), (1, 3, 40, 80), (1, 2, 3, 400))
calls = 0
for shape, dtype, layout in itertools.product(shapes, FLOATS, LAYOUTS):
    for device, way in ((checking.H200, "chain"), (checking.A100, "chain"), (checking.H200, "resident")):
        module.set_device(**device)
        module.set_forward(way)
        checking.agree_roughly(Case(shape, 8, FLOATS[dtype], layout=layout))
        calls += 1
    for cluster in (1, 2, 4):
        module.set_device(**checking.H200)
        module.set_forward(f"cluster:{cluster}")
        checking.agree_roughly(Case(shape, 8, FLOATS[dtype], layout=layout, norm="running"), backward=False)
        calls += 1
print("calls", calls)
"""


def library(name):
    """The sanitizer's runtime, which must be loaded first."""
    compiler = os.environ.get("CXX", "c++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


def test_sanitized():
    runtimes = [library(name) for name in ("libasan.so", "libubsan.so")]
    if None in runtimes:
        pytest.skip("this compiler brings no AddressSanitizer")
    from build import build

    path = build("address,undefined")
    environment = os.environ | {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    environment |= {"PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, "-c", PROGRAM, str(HERE), str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "calls 144" in result.stdout, result.stderr[-6000:]
