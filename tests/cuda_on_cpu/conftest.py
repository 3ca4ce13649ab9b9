"""The CUDA kernels, run on the CPU by emulator.h: every test here has them in the CPU kernels' place."""

import importlib.util
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # checking, build

import checking


@pytest.fixture(scope="session")
def module():
    """The emulated module with its operators, built and imported once."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("Python.h is not here, which a Python module in C++ needs (python3-dev)")
    from build import build
    from coordatt_fast import ops

    spec = importlib.util.spec_from_file_location("coordatt_cuda_on_cpu", build())
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    found.operators = ops._Operators("cuda", ops.ROWS["cuda"], torch.ops.coordatt_fast_cuda_on_cpu)
    ops._register(found.operators)
    return found


@pytest.fixture(scope="module", autouse=True)
def emulator(module):
    """The emulated kernels in the place of the CPU's."""
    from coordatt_fast import ops, plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_cpu", module.operators)
        patch.setattr(plan, "SERVED_BY_CPU", frozenset(("auto", "cpu")))
        checking.reset(module)
        yield module


@pytest.fixture(autouse=True)
def fresh(emulator):
    checking.reset(emulator)
    yield
    checking.reset(emulator)
