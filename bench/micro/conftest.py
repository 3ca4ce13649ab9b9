"""The shapes and grad modes all suites share."""

import pytest
import torch

from bench.cases import Case

# Wide and shallow, in the middle, and the deepest maps, where the channel-mixing middle decides.
SHAPES = {
    "early": (1, 96, 56, 56),
    "middle": (1, 384, 14, 14),
    "mix": (1, 960, 7, 7),
    "batch": (32, 192, 28, 28),
    "detector": (1, 256, 80, 80),
}


@pytest.fixture(
    params=SHAPES.values(), ids=[f"{name}-{'x'.join(map(str, shape))}" for name, shape in SHAPES.items()]
)
def shape(request) -> tuple[int, int, int, int]:
    return request.param


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(params=["nchw", "channels_last"])
def layout(request) -> str:
    return request.param


@pytest.fixture
def case(shape, dtype, layout, benchmark) -> Case:
    """The case under test; bytes and shape go into the saved results."""
    case = Case(shape, "eval", dtype, layout)
    benchmark.extra_info.update(case.as_dict(), threads=torch.get_num_threads())
    return case
