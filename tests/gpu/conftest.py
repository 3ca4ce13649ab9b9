"""Tests that need a GPU: run them with `pytest tests/gpu`. A plain pytest run skips this folder."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # harness, shapes, paper, tolerances


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent not in item.path.parents:
                continue
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(autouse=True)
def _plain_pytorch_may_run():
    """Adaptive pooling's backward, which plain PyTorch uses, raises on CUDA where determinism is insisted on."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture(params=["triton"])
def backend(request):
    """Each backend for CUDA tensors that can run here."""
    from harness import on_backend

    yield from on_backend(request.param)
    torch.cuda.empty_cache()
