"""Triton's kernels in its interpreter: collected only where TRITON_INTERPRET=1 was set before Python started.

tests/test_triton_suite.py runs this folder in processes of its own.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="2/3: the second of every three tests")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.option.part.split("/"))
    others = [item for i, item in enumerate(items) if i % parts != part - 1]
    config.hook.pytest_deselected(items=others)
    items[:] = items[part - 1 :: parts]


BAND = 67  # elements; odd, so that nothing is aligned by luck


def _fill(dtype):
    return torch.nan if dtype.is_floating_point else -7


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Every tensor of every launch lies between NaN, and no launch may touch them.

    Yields the names of the kernels launched.
    """
    from coordatt_fast import use_backend
    from coordatt_fast.kernels import launch

    launched, run = [], launch._run

    def guarded_run(kernel, programs, arguments, constants, *rest):
        placed = {}

        def place(t):
            if not isinstance(t, torch.Tensor) or not t.numel():
                return t
            span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
            key = t.data_ptr(), span
            if key not in placed:
                memory = torch.full((span + 2 * BAND,), _fill(t.dtype), dtype=t.dtype)
                flat = t.data.as_strided((span,), (1,), t.storage_offset())
                memory[BAND:-BAND] = flat
                placed[key] = memory, flat
            return placed[key][0].as_strided(t.shape, t.stride(), BAND)

        run(kernel, programs, tuple(map(place, arguments)), constants, *rest)
        name = kernel.fn.__name__
        launched.append(name)
        for memory, flat in placed.values():
            for band in (memory[:BAND], memory[-BAND:]):
                whole = torch.isnan(band) if band.dtype.is_floating_point else band == _fill(band.dtype)
                assert whole.all(), f"{name} wrote outside a tensor"
            flat.copy_(memory[BAND:-BAND])

    monkeypatch.setattr(launch, "_run", guarded_run)
    with torch.no_grad(), use_backend("triton"):
        with torch.enable_grad():
            yield launched
