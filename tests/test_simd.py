"""Every SIMD level this machine has computes the same function to the same accuracy."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from harness import FLOATS, LAYOUTS, Case, compare, fused, supported_levels
from paper import ACTIVATIONS
from shapes import AWKWARD, FEW


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", FEW)
def test_forward(shape, dtype, layout, simd):
    case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm="running")
    compare(case, backward=False, under_test=fused)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", FEW)
def test_backward(shape, dtype, layout, simd):
    for norm in ("batch", "running"):
        compare(Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm=norm), under_test=fused)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_x_with_float32_parameters(dtype, layout, simd):
    for shape in FEW:
        compare(Case(*AWKWARD[shape], dtype=FLOATS[dtype], autocast=True, layout=layout), under_test=fused)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, simd):
    for skip in (False, True):
        for dtype in (torch.float32, torch.float64):
            compare(Case(*AWKWARD["W=17"], dtype=dtype, activation=activation, skip=skip), under_test=fused)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 flags")
def test_every_level_of_this_processor_is_offered(cpu):
    """Otherwise the tests above pass by testing one level only."""
    levels = supported_levels()
    assert levels[0] == "baseline"
    with open("/proc/cpuinfo") as info:
        flags = info.read()
    for level, flag in (("avx2", "avx2"), ("avx512", "avx512vl"), ("avx512_bf16", "avx512_bf16")):
        assert (level in levels) == (f" {flag} " in flags), f"{level}: levels {levels}"


def test_unknown_level_raises(cpu):
    with pytest.raises(RuntimeError, match="avx1024"):
        torch.ops.coordatt_fast.set_simd_level("avx1024")


PROGRAM = """
import torch, coordatt_fast
assert coordatt_fast.backends()["cpu"].available
print(torch.ops.coordatt_fast.simd_level())
m = coordatt_fast.CoordAtt(24, 24).eval()
x = torch.linspace(-2, 2, 2 * 24 * 7 * 9).reshape(2, 24, 7, 9)
with torch.no_grad(), coordatt_fast.use_backend("cpu"):
    out = m(x)
with torch.no_grad(), coordatt_fast.use_backend("reference"):
    assert torch.allclose(out, m(x), rtol=1e-5, atol=1e-6)
"""


@pytest.mark.parametrize("level", [supported_levels()[0], supported_levels()[-1]] if supported_levels() else [])
def test_environment_sets_the_level(level, cpu):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"COORDATT_FAST_SIMD": level},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == level


def test_unknown_level_in_the_environment_is_reported(cpu):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"COORDATT_FAST_SIMD": "avx1024"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 or "avx1024" in result.stderr, "an unknown level was taken in silence"
