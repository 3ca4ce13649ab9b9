"""The Triton backend: its suite in the interpreter (tests/interpreted), and what it says where it cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coordatt_fast import CoordAtt, backends, explain, use_backend

FOLDER = Path(__file__).parent / "interpreted"


def python(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("part", ["1/3", "2/3", "3/3"])
def test_interpreted(part):
    """TRITON_INTERPRET is read when Triton is imported, so this suite has processes of its own."""
    pytest.importorskip("triton")
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--part", part, str(FOLDER), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]


def test_importing_the_package_loads_no_kernels():
    program = "import sys, coordatt_fast; print([m for m in sys.modules if m.startswith('coordatt_fast.kernels')])"
    assert python("-c", program).stdout.strip() == "[]"


WITHOUT = """
import sys
sys.modules["triton"] = None
import torch, coordatt_fast
print(coordatt_fast.backends()["triton"])
m = coordatt_fast.CoordAtt(16, 16).eval()
print(coordatt_fast.explain(m, torch.zeros(1, 16, 4, 4)).backend)
with coordatt_fast.use_backend("triton"):
    try:
        m(torch.zeros(1, 16, 4, 4))
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_without_triton(interpret):
    result = python("-c", WITHOUT, TRITON_INTERPRET=interpret)
    lines = result.stdout.splitlines()
    assert len(lines) == 3, result.stderr
    assert "available=False" in lines[0] and "triton does not import" in lines[0]
    assert lines[1] == ("cpu" if backends()["cpu"].available else "reference")
    assert "'triton'" in lines[2] and ("does not import" if interpret == "1" else "TRITON_INTERPRET") in lines[2]


def test_without_the_compiled_library():
    """Installed without a C++ compiler, Triton serves all the same."""
    program = """
import torch, coordatt_fast
assert not coordatt_fast.backends()["cpu"].available
m = coordatt_fast.CoordAtt(16, 16)
x = torch.zeros(2, 16, 4, 4, requires_grad=True)
print(coordatt_fast.explain(m, x).backend)
m(x).sum().backward()
print(x.grad is not None)
"""
    pytest.importorskip("triton")
    settings = dict(TRITON_INTERPRET="1", COORDATT_FAST_BACKEND="triton", COORDATT_FAST_LIBRARY="/nowhere/x.so")
    assert python("-c", program, **settings).stdout.split() == ["triton", "True"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_named_where_it_cannot_run():
    module, x = CoordAtt(16, 16), torch.zeros(1, 16, 4, 4)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*CPU tensors.*TRITON_INTERPRET=1"):
        module(x)
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
        explain(module, x)


def test_schemas_are_the_compiled_ones():
    if not backends()["cpu"].available:
        pytest.skip("the compiled library is not available")
    for name in ("attend", "attend_out", "attend_train", "attend_train_update", "attend_backward", "update_running_stats", "pool",
                 "pool_backward", "gate", "gate_backward"):  # fmt: skip
        compiled, ours = (
            str(getattr(namespace, name).default._schema).partition("::")[2]
            for namespace in (torch.ops.coordatt_fast, torch.ops.coordatt_fast_triton)
        )
        assert ours.replace("coordatt_fast_triton", "coordatt_fast") == compiled
