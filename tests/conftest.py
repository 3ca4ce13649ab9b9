"""Poisoned memory for every test, seeds, and the fixtures that choose backend and SIMD level."""

import os

# The library's scratch memory and its results start as NaN; read when the library loads.
os.environ["COORDATT_FAST_POISON"] = "1"
# Threads that wait leave the core to the other workers; read when OpenMP's library loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import seeds
import torch

# torch.empty and its kin come back filled with NaN, so an element nobody wrote cannot look right by luck.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

import tolerances  # noqa: E402
import workers  # noqa: E402
from harness import on_backend, supported_levels  # noqa: E402
from workers import (  # noqa: E402, F401
    pytest_sessionfinish,
    pytest_testnodedown,
    pytest_xdist_auto_num_workers,
    pytest_xdist_make_scheduler,
)

# Suites with a process or a machine of their own: collected only where the command names them.
SEPARATE = ("aot", "gpu", "interpreted", "native", "test_sanitized.py")


def pytest_ignore_collect(collection_path, config):
    name = collection_path.name
    named = name if name.endswith(".py") else f"tests/{name}"
    if name in SEPARATE and not any(named in str(arg) for arg in config.invocation_params.args):
        return True


def pytest_generate_tests(metafunc):
    if "simd" in metafunc.fixturenames:
        levels = supported_levels()
        missing = pytest.param("none", marks=pytest.mark.skip(reason="the compiled library is not available"))
        metafunc.parametrize("simd", levels or [missing], indirect=True)


def pytest_collection_modifyitems(config, items):
    """Level avx512_bf16 is avx512 compiled with the instructions that store bfloat16: for other dtypes the same code.
    Tests of a level that go through the dtypes by themselves show that its tables have them."""
    same = set()
    for item in items:
        drawn = getattr(item, "callspec", None) and item.callspec.params
        if drawn and drawn.get("simd") == "avx512_bf16" and drawn.get("dtype", "bfloat16") != "bfloat16":
            same.add(item)
    if same:
        config.hook.pytest_deselected(items=list(same))
        items[:] = [item for item in items if item not in same]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: workers.rank(item.path))


@pytest.fixture(autouse=True)
def _fresh_state():
    seeds.seed(0)
    torch.set_num_threads(
        1
    )  # test_determinism.py shows that more give the same bits; waiting threads cost minutes
    yield
    torch.set_num_threads(1)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    assert torch.are_deterministic_algorithms_enabled(), "a test switched the poison off"


@pytest.fixture
def cpu():
    """The compiled kernels."""
    yield from on_backend("cpu")


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each backend that can run here."""
    yield from on_backend(request.param)


@pytest.fixture
def calls(monkeypatch):
    """Of the operator for a normalisation, an activation and a block: the arguments of each."""
    from coordatt_fast import backends, before

    if not backends()["cpu"].available:
        pytest.skip(backends()["cpu"].reason)
    made, operator = [], before.attention

    def counted(*args):
        made.append(args)
        return operator(*args)

    monkeypatch.setattr(before, "attention", counted)
    return made


@pytest.fixture
def simd(request, cpu):
    start = torch.ops.coordatt_fast.simd_level()
    torch.ops.coordatt_fast.set_simd_level(request.param)
    assert torch.ops.coordatt_fast.simd_level() == request.param
    yield request.param
    torch.ops.coordatt_fast.set_simd_level(start)


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """build/hub, as make hub writes it."""
    out = tmp_path_factory.mktemp("hub") / "build/hub"
    command = [sys.executable, "-m", "hub.assemble", "--out", str(out)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def kernel(hub):
    """The package as Hugging Face's kernels loads it from there."""
    import kernels

    return kernels.get_local_kernel(hub)


def pytest_terminal_summary(terminalreporter):
    if not tolerances.observed:
        return
    terminalreporter.section(
        "error against the truth over plain PyTorch's own, root mean square (median, largest)"
    )
    names = sorted({name for _, name in tolerances.observed})
    for key in sorted({key for key, _ in tolerances.observed}):
        cells = []
        for name in names:
            ratios = tolerances.observed.get((key, name))
            if ratios:
                cells.append(f"{name} {statistics.median(ratios):.2f} {max(ratios):.2f}")
        terminalreporter.write_line(f"{key}: " + ";  ".join(cells))
