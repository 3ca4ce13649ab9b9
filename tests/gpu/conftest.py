"""Tests that need a GPU: run them with `pytest tests/gpu`. A plain pytest run skips this folder."""

import faulthandler
import fcntl
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # harness, shapes, paper, tolerances

HANGS_AFTER = 150  # seconds; compiling the slowest test's kernels takes a fraction of that


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent not in item.path.parents:
                continue
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


def watch():
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True, file=sys.__stderr__)


@pytest.fixture(autouse=True)
def _ends():
    """A kernel that waits for ever ends this process with a traceback; pytest-xdist names the test and goes on."""
    watch()
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def much_memory(_ends):
    """One such test at a time on this machine."""
    with open(Path(tempfile.gettempdir()) / f"coordatt_fast-gpu-tests-{os.getuid()}.lock", "w") as file:
        faulthandler.cancel_dump_traceback_later()
        fcntl.flock(file, fcntl.LOCK_EX)
        watch()
        yield
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _errors_show(request, _ends):
    """What a kernel did wrong is this test's failure, not a later one's."""
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        # After such an error CUDA refuses everything in this process.
        print(f"{request.node.nodeid}: {error}", file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"{request.node.nodeid}: {error}", returncode=1)


@pytest.fixture(autouse=True)
def _plain_pytorch():
    """Adaptive pooling's backward, which plain PyTorch uses, raises on CUDA where determinism is insisted on. Its
    convolutions are what ours are compared with, in the precision that they name."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """Each backend for CUDA tensors that can run here."""
    from harness import on_backend

    yield from on_backend(request.param)
    torch.cuda.empty_cache()


@pytest.fixture
def cuda():
    """The CUDA kernels; afterwards no way forward is forced."""
    import on_gpu
    from harness import on_backend

    yield from on_backend("cuda")
    on_gpu.set_way("")
    torch.cuda.empty_cache()


@pytest.fixture
def poison_off(monkeypatch):
    """torch.empty without the launch that fills it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
