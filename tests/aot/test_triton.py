"""What the compiler makes of the Triton kernels for GPUs that are not here: no spills, shared memory within the
limits, accesses as wide as a row allows.

    pytest tests/aot        about five minutes on two cores; not part of a plain pytest run
"""

import concurrent.futures
import functools
import multiprocessing
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from sweep import TARGETS, Map, compile_all

# Where networks run it, and two shapes whose rows are no multiple of anything. nchw is the layout with tables.
SHAPES = [
    ((32, 96, 112, 112), 8), ((32, 128, 80, 80), 8), ((32, 144, 56, 56), 8), ((32, 256, 40, 40), 8),
    ((32, 192, 28, 28), 8), ((32, 512, 20, 20), 16), ((32, 384, 14, 14), 12), ((32, 960, 7, 7), 30),
    ((3, 17, 13, 21), 8), ((1, 2048, 7, 7), 64),
]  # fmt: skip
FEW = [((32, 96, 56, 56), 8), ((1, 960, 7, 7), 30)]
HALF = ("float32", "bfloat16")

SWEEP = [("sm_90", Map(*shape, "float32", False)) for shape in SHAPES]
SWEEP += [("sm_90", Map(*shape, "bfloat16", False)) for shape in SHAPES[2::2]]
SWEEP += [("sm_90", Map(*shape, dtype, True)) for shape, dtype in zip((*FEW, SHAPES[-2]), HALF + HALF)]
SWEEP += [("sm_90", Map(*FEW[0], dtype, False)) for dtype in ("float16", "float64")]
SWEEP += [
    (target, Map(*shape, dtype, dtype == "bfloat16"))
    for target in TARGETS
    if target != "sm_90"
    for shape, dtype in zip(FEW, HALF)
]

SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB a block may have
# Passes over a map: element by element, whatever the rows are, or row by row.
FLAT, BY_ROWS = ("gate_kernel", "spread_kernel", "gate_logits_kernel"), ("pool_kernel", "reduce_kernel")
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@pytest.fixture(scope="module")
def compiled():
    """(target, map) -> its kernels, compiled by two processes as the tests come to them."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(2, mp_context=context, initializer=_start) as pool,
    ):
        parts = {}
        for index, (target, of) in enumerate(SWEEP):
            own = Path(folder, str(index))
            own.mkdir()
            parts[target, of] = pool.submit(compile_all, target, of, own)
        yield lambda *key: parts[key].result()
        pool.shutdown(cancel_futures=True)


def _start():
    import os

    os.environ.pop("TRITON_INTERPRET", None)


def widest_access(row_bytes: int) -> int:
    """Bits of the widest load or store whose size divides a row."""
    return next(bits for bits in (128, 64, 32, 16) if row_bytes % (bits // 8) == 0)


@functools.cache
def expected_bits(kernel: str, of: Map) -> int:
    _, c, h, w = of.shape
    if of.nhwc:
        return widest_access(c * BYTES[of.dtype])
    return widest_access((h * w if kernel in FLAT else w) * BYTES[of.dtype])


@pytest.mark.parametrize("target, of", SWEEP, ids=[f"{target}-{of}" for target, of in SWEEP])
def test_code(target, of, compiled):
    found = compiled(target, of)
    assert len(found) >= 10
    for code in found:
        assert code.spills == 0, code
        assert code.shared <= SHARED[target] * 1024, code
        if target == "gfx942" or code.kernel not in FLAT + BY_ROWS:
            continue
        assert code.loads >= expected_bits(code.kernel, of), code
        if code.kernel in FLAT:
            assert code.stores >= expected_bits(code.kernel, of), code
