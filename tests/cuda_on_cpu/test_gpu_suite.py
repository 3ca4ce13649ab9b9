"""tests/gpu and the GPU benchmark on the emulator, as far as they need no streams, graphs and events: that they run."""

import importlib
import json
import sys
from pathlib import Path

import checking
import pytest
import torch

TESTS = Path(__file__).parents[1]
for folder in (TESTS / "gpu", TESTS.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@pytest.fixture
def suite(monkeypatch):
    """tests/gpu's way tests, on CPU tensors."""
    import on_gpu

    emulated = torch.ops.coordatt_fast_cuda_on_cpu
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(on_gpu, "cuda_operators", lambda: emulated)
    monkeypatch.setattr(on_gpu, "set_way", checking.emulator.set_forward)
    return importlib.import_module("test_cuda_ways")


def test_inference(suite):
    checking.emulator.launches()
    suite.test_inference("primes", "float32")
    suite.test_inference("W=7", "bfloat16")
    assert {"one_pass_kernel", "pool_kernel", "gate_kernel"} == set(checking.kernels())


def test_training(suite):
    checking.emulator.launches()
    suite.test_training("primes", "float16")
    assert {"resident_kernel", "statistics_kernel", "spread_kernel"} <= set(checking.kernels())


def test_options(suite):
    suite.test_options("batch", "silu")
    suite.test_options("running", "hard_swish")
    suite.test_half_x_with_float32_parameters("bfloat16")


def test_numbers(suite, monkeypatch):
    """Sizes that the emulator gets through, on a device that has room for every way."""
    checking.emulator.set_device(arch=90, processors=132, shared_memory=232448)
    for name, size in {"7": ((2, 64, 7, 7), 8), "odd": ((1, 19, 13, 9), 8)}.items():
        monkeypatch.setitem(suite.SIZES, name, size)
        for dtype in ("float32", "bfloat16"):
            suite.test_numbers(name, dtype)
    x = torch.zeros(2, 64, 7, 7)
    assert suite.ways_taken(x, 8) == ([*suite.INFERENCE], [*suite.TRAINING])


def test_anything_else(suite):
    suite.test_strides("offset by one element")
    suite.test_strides("nhwc crop of columns")
    suite.test_not_finite("nchw", torch.inf)
    suite.test_gradient_not_finite("nhwc", torch.nan)
    suite.test_empty_batch("nchw", True)
    suite.test_empty_batch("nhwc", False)
    suite.test_out_and_inplace()


def test_a_wrong_result_is_seen(suite, monkeypatch):
    """Without its first wait the one-pass kernel reads what has not come yet."""
    emulator = checking.emulator
    suite.test_inference("primes", "float32")
    site = next(i for i, s in enumerate(emulator.sites()) if s.startswith("one_pass.cu"))
    emulator.skip(site)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(6):
            emulator.set_seed(seed)
            suite.test_inference("primes", "float32")


def test_maps_piece_by_piece(suite, monkeypatch):
    """The reference for maps beyond 32 bits is plain PyTorch's function and gradient."""
    import on_gpu

    cut = on_gpu.pieces
    monkeypatch.setattr(on_gpu, "pieces", lambda shape: cut(shape, most=2 * shape[2] * shape[3]))
    for shape in ((3, 5, 6, 7), (1, 1, 4, 2), (2, 4, 1, 3)):
        x, grad = on_gpu.maps(shape)
        _, plain = on_gpu.modules(shape[1], 8)
        expected = on_gpu.step(plain, x, grad)
        seen = torch.zeros(shape)
        for piece, out, dx in on_gpu.piecewise(plain, x, grad):
            assert torch.allclose(out, expected["out"][piece], rtol=1e-5, atol=1e-5)
            assert torch.allclose(dx, expected["d x"][piece], rtol=1e-3, atol=1e-4)
            seen[piece] += 1
        assert torch.equal(seen, torch.ones(shape))


def test_outline(suite):
    import on_gpu

    checking.emulator.set_device(arch=90, processors=132, shared_memory=232448)
    x = torch.zeros(5, 64, 14, 14)
    with on_gpu.forced("cluster:4"):
        found = on_gpu.outline(x, 8, False)
    assert found == found | {"way": "cluster:4", "cluster": 4, "blocks": 20, "groups": 4, "processors": 132}
    assert found["held"] >= 5 and found["shared"] > 64 * 14 * 14 * 4 // 4
    with on_gpu.forced("resident"):
        found = on_gpu.outline(x, 8, True)
    assert found["way"] == "resident" and found["blocks"] == 5 * found["groups"] <= found["held"]
    found = on_gpu.outline(x, 8, False)
    assert json.dumps(found) and found["way"] == "chain" and found["held"] == 0
