"""pool: x [N, C, H, W] to its row and column means [N, C, H + W, 1], and back."""

import torch

from coordatt_fast import ops, reference


def test_forward(benchmark, case):
    x = case.tensor(1)
    benchmark.group = f"pool forward {case.name}"
    with torch.inference_mode():
        means = benchmark(ops.pool, x)
    torch.testing.assert_close(means.double(), reference.pool(x.double()), rtol=2e-2, atol=2e-2)


def test_backward(benchmark, case):
    x = case.tensor(1).requires_grad_()
    means = ops.pool(x)
    g = torch.ones_like(means)
    benchmark.group = f"pool backward {case.name}"
    (dx,) = benchmark(torch.autograd.grad, means, [x], g, retain_graph=True)
    torch.testing.assert_close(
        dx.double(),
        torch.full_like(dx, 1 / x.shape[2] + 1 / x.shape[3], dtype=torch.float64),
        rtol=2e-2,
        atol=2e-2,
    )
