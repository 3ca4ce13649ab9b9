"""The hybrid tier's numbers: the module's own children between fused pool and gate are as exact as in plain
PyTorch, whatever kernels PyTorch has for the layouts that they are given.
"""

import functools

import pytest
import tolerances
import torch
from harness import FLOATS, LAYOUTS, Case, autocast, beside, build, data, draws, key, run
from paper import PaperCoordAtt
from torch import nn

from coordatt_fast import CoordAtt, accelerate, explain, use_backend

pytestmark = pytest.mark.usefixtures("cpu")


class Norm(nn.BatchNorm2d):
    """A subclass that computes the same, as SyncBatchNorm does in one process."""


class Wrapped(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def subclassed(m):
    m.bn1.__class__ = Norm


def hooked(m):
    m.conv1.register_forward_hook(lambda m, i, o: None)


def grouped(m):
    m.bn1 = nn.GroupNorm(1, m.bn1.num_features).to(m.conv1.weight.dtype)


def by_instance(m):
    m.bn1 = nn.InstanceNorm2d(m.bn1.num_features, affine=True).to(m.conv1.weight.dtype)


def without_statistics(m):
    m.bn1 = nn.BatchNorm2d(m.bn1.num_features, track_running_stats=False).to(m.conv1.weight.dtype)
    m.act.register_forward_pre_hook(lambda m, i: None)


def folded(m):
    """Convolution and normalisation in one child."""
    m.conv1, m.bn1 = Wrapped(m.conv1, m.bn1), nn.Identity()


CHANGES = {f.__name__: f for f in (subclassed, hooked, grouped, by_instance, without_statistics, folded)}


def changed(cls, change, case, d, dtype=None):
    module = build(cls, case, d.params, dtype)
    CHANGES[change](module)
    return module.train(case.norm == "batch")


def scaled(case, seed, scale):
    d = data(case, seed)
    d.x = d.x * scale
    return d


@functools.lru_cache(maxsize=64)
def yardstick(case, change, scale):
    def truth(d):
        """Mirrored, so that in float64 too plain PyTorch adds up in another order than its truth."""
        exact = changed(PaperCoordAtt, change, case, d, torch.float64)
        found = run(exact, d.x.double().flip(2, 3), d.grad.double().flip(2, 3))
        return found | {name: found[name].flip(2, 3) for name in ("out", "d x")}

    def plain(d):
        with autocast(case):
            return run(changed(PaperCoordAtt, change, case, d), d.x, d.grad)

    return tolerances.Yardstick(lambda seed: scaled(case, seed, scale), beside, truth, plain)


def compare(case, change, scale=1.0):
    def under_test(seed):
        d = scaled(case, seed, scale)
        module = changed(CoordAtt, change, case, d)
        with autocast(case):
            assert explain(module, d.x).tier == "hybrid"
            return run(module, d.x, d.grad)

    truth = yardstick(case.but(layout="nchw"), change, scale)
    tolerances.check(under_test, truth, key=key(case) + " hybrid", draws=draws(case.shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("change", CHANGES)
def test_as_exact_as_plain(change, dtype, norm, layout):
    compare(Case((2, 12, 9, 7), 9, FLOATS[dtype], layout=layout, norm=norm), change)


@pytest.mark.parametrize("change", CHANGES)
def test_under_autocast(change):
    compare(Case((2, 12, 9, 7), 9, torch.bfloat16, autocast=True), change)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("change", CHANGES)
def test_large_values_in_training(change, dtype, layout):
    """Sums of squares of a thousand are beyond float16's range: no reason for NaN in a gradient."""
    compare(Case((2, 16, 9, 7), 8, FLOATS[dtype], layout=layout), change, scale=1e3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mid", [7, 8, 9, 13])
@pytest.mark.parametrize("size", [(4, 4), (9, 7), (1, 5)])
def test_nan_stays_in_its_row_and_column(size, mid, dtype, layout):
    """Forward, and backward: where plain PyTorch has numbers, so does the hybrid tier."""
    case = Case((2, 12, *size), mid, FLOATS[dtype], norm="running")
    d = data(case)
    height, width = (n // 2 for n in size)
    d.x[0, 5, height, width] = float("nan")
    theirs = run(changed(PaperCoordAtt, "hooked", case, d), d.x, d.grad)
    ours = run(changed(CoordAtt, "hooked", case, d), d.x.contiguous(memory_format=LAYOUTS[layout]), d.grad)
    for name in ("out", "d x"):
        assert torch.equal(ours[name].isnan(), theirs[name].isnan()), name
    assert not ours["out"][1].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mid", [8, 9])
@pytest.mark.parametrize("bias", [0.3, 77.7])
@pytest.mark.parametrize("change", CHANGES)
def test_constant_squeeze(change, bias, mid, count, layout):
    """All squeezed values equal: normalised they are zero, and 1 / sqrt(eps) times any error in their mean."""
    torch.set_num_threads(count)  # which decides how PyTorch sums the mean
    case = Case((2, 16, 9, 7), mid, torch.float64, layout=layout)
    d = data(case)
    d.params["conv1.weight"].zero_()
    d.params["conv1.bias"].fill_(bias)
    ours = run(changed(CoordAtt, change, case, d), d.x, d.grad)
    theirs = run(changed(PaperCoordAtt, change, case, d), d.x, d.grad)
    assert max(tolerances.errors(ours["out"], theirs["out"])) <= 4 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 6, 3, 2), (2, 6, 1, 5)])
@pytest.mark.parametrize("mid", [1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_one_parameter_trains(change, mid, shape, layout):
    """And x does not: PyTorch's normalisations then read other strides than they have, or end the process."""
    case = Case(shape, mid, torch.float64, layout=layout, norm="batch" if mid > 1 or shape[0] > 1 else "running")
    d = data(case)
    theirs = changed(PaperCoordAtt, change, case, d)
    expected = run(theirs, d.x, d.grad)
    for name, _ in theirs.named_parameters():
        ours = changed(CoordAtt, change, case, d).requires_grad_(False)
        ours.get_parameter(name).requires_grad_(True)
        ours(d.x).backward(d.grad)
        scale = max(1.0, expected["d " + name].abs().max())
        assert (ours.get_parameter(name).grad - expected["d " + name]).abs().max() <= 1e-10 * scale, name


def test_children_see_the_same_values(cpu):
    """A hook on each child, in both tiers: same shapes, values to rounding."""
    case = Case((2, 12, 9, 7), 9)
    d = data(case)
    seen = {"cpu": [], "reference": []}
    for backend, calls in seen.items():
        module = build(CoordAtt, case, d.params)
        for name in ("conv1", "bn1", "act", "conv_h", "conv_w"):
            getattr(module, name).register_forward_hook(lambda m, i, o, calls=calls: calls.append((*i, o)))
        with use_backend(backend):
            module(d.x)
    for ours, theirs in zip(*seen.values(), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape and max(tolerances.errors(a, b)) < 1e-5


@pytest.mark.parametrize("change", ["subclassed", "hooked", "grouped", "without_statistics"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_accelerated(change, dtype):
    """A block of another class, taken over: its children get the same layouts."""
    case = Case((2, 16, 4, 4), 9, FLOATS[dtype], norm="running")
    d = data(case)
    theirs, ours = (build(PaperCoordAtt, case, d.params) for _ in range(2))
    accelerate(ours)
    for module in (theirs, ours):
        CHANGES[change](module)
    assert explain(ours, d.x).tier == "hybrid"
    large = d.x * 1e3
    for results in zip(*(run(m.train(), large, d.grad).items() for m in (theirs, ours)), strict=True):
        (name, expected), (_, got) = results
        assert got.isfinite().equal(expected.isfinite()), name
    d.x[0, 5, 2, 2] = float("nan")
    expected, got = (run(m.eval(), d.x, d.grad) for m in (theirs, ours))
    for name in ("out", "d x"):
        assert torch.equal(got[name].isnan(), expected[name].isnan()), name
