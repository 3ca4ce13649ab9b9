"""Derivatives against finite differences in float64, first and second order."""

import pytest
import seeds
import torch
from harness import LAYOUTS, Case, build, data
from paper import ACTIVATIONS, PaperCoordAtt
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from coordatt_fast import CoordAtt, use_backend


def problem(layout="nchw", shape=(2, 3, 4, 5), mid=2, **options):
    """A function of x and all parameters, as gradcheck wants it; buffers are fresh on each call."""
    case = Case(shape, mid, dtype=torch.float64, layout=layout, **options)
    d = data(case)
    module = build(CoordAtt, case, d.params)
    names = [n for n, _ in module.named_parameters()]

    def function(x, *parameters):
        buffers = {n: b.clone() for n, b in module.named_buffers()}
        return functional_call(module, dict(zip(names, parameters)) | buffers, (x,))

    return function, [t.detach().clone().requires_grad_() for t in (d.x, *module.parameters())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_order(backend, activation, norm, layout):
    function, inputs = problem(layout, activation=activation, norm=norm)
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 7), (3, 2, 5, 1), (1, 9, 2, 2)])
def test_first_order_of_thin_shapes(backend, shape, norm):
    function, inputs = problem(shape=shape, norm=norm, skip=True)
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("options", [{"bias": False}, {"affine": False}, {"skip": True}], ids=str)
def test_first_order_of_options(backend, options):
    function, inputs = problem(**options)
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("norm", ["batch", "running", "none"])
@pytest.mark.parametrize("activation", ["hard_swish", "silu"])
def test_second_order(backend, activation, norm):
    """Gradient penalties differentiate the gradient: it must carry its own graph, through the reference."""
    function, inputs = problem(shape=(2, 2, 2, 3), activation=activation, norm=norm)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_batched_gradients(backend, norm):
    """is_grads_batched, as vectorised Jacobians use it: one backward pass for several gradients at once."""
    function, inputs = problem(norm=norm)
    out = function(*inputs)
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    together = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        alone = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        for a, b in zip(together, alone):
            assert torch.allclose(a[i], b, rtol=1e-9, atol=1e-12)


def test_hessian(backend):
    """Reverse over reverse and forward over reverse give the same second derivatives as the paper's module."""
    case = Case((1, 2, 2, 3), 2, torch.float64, norm="running")
    d = data(case)
    ours, theirs = (build(cls, case, d.params) for cls in (CoordAtt, PaperCoordAtt))
    expected = torch.autograd.functional.hessian(lambda x: theirs(x).square().sum(), d.x)
    hessian = torch.autograd.functional.hessian
    assert torch.allclose(hessian(lambda x: ours(x).square().sum(), d.x), expected)
    assert torch.allclose(hessian(lambda x: ours(x).square().sum(), d.x, vectorize=True), expected)
    with use_backend("auto"):
        assert torch.allclose(torch.func.hessian(lambda x: ours(x).square().sum())(d.x), expected)


@pytest.mark.parametrize("op", ["pool", "gate"])
def test_ops(cpu, op):
    g = seeds.generator(0)
    draw = lambda *size: torch.randn(size, generator=g, dtype=torch.float64).requires_grad_()
    if op == "pool":
        assert gradcheck(torch.ops.coordatt_fast.pool, (draw(2, 3, 4, 5),))
    else:
        for skip in (False, True):
            inputs = (draw(2, 3, 4, 5), draw(2, 3, 4, 1), draw(2, 3, 1, 5))
            assert gradcheck(lambda *t: torch.ops.coordatt_fast.gate(*t, skip), inputs)
