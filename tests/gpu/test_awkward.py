"""Every backend in awkward shapes, dtypes, layouts, norms and activations, within tolerances.py."""

import pytest
from harness import FLOATS, LAYOUTS, Case
from on_gpu import compare
from paper import ACTIVATIONS
from shapes import AWKWARD, FEW

pytestmark = pytest.mark.usefixtures("backend")
SHAPES = [*FEW, "one-channel", "H=1", "W=1", "W=14", "W=20", "mid=1", "mid=88", "mid>C", "deep"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, layout):
    for norm in ("batch", "running"):
        compare(Case(*AWKWARD[shape], layout=layout, norm=norm))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", ["primes", "W=7", "large"])
def test_dtypes(shape, dtype, layout):
    for norm in ("batch", "running"):
        compare(Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm=norm))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_x_with_float32_parameters(dtype):
    compare(Case(*AWKWARD["primes"], dtype=FLOATS[dtype], autocast=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_options(norm, activation):
    for skip, bias, affine in ((False, True, True), (True, False, False)):
        case = Case(*AWKWARD["primes"], norm=norm, activation=activation, skip=skip, bias=bias, affine=affine)
        compare(case)
