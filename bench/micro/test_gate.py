"""gate: x [N, C, H, W] times the sigmoids of the row and column logits, and back."""

import torch
from torch import Tensor

from bench.cases import Case
from coordatt_fast import ops, reference


def logits(case: Case) -> tuple[Tensor, Tensor]:
    n, c, h, w = case.shape
    x = case.tensor(2)
    return x[..., :1].reshape(n, c, h, 1), x[:, :, :1].reshape(n, c, 1, w)


def test_forward(benchmark, case):
    x, (s_h, s_w) = case.tensor(1), logits(case)
    benchmark.group = f"gate forward {case.name}"
    with torch.inference_mode():
        out = benchmark(ops.gate, x, s_h, s_w, False)
    torch.testing.assert_close(
        out.double(), reference.gate(x.double(), s_h.double(), s_w.double()), rtol=2e-2, atol=2e-2
    )


def test_backward(benchmark, case):
    x = case.tensor(1).requires_grad_()
    s_h, s_w = (logit.requires_grad_() for logit in logits(case))
    out = ops.gate(x, s_h, s_w, False)
    g = case.tensor(3)
    benchmark.group = f"gate backward {case.name}"
    dx, _, _ = benchmark(torch.autograd.grad, out, [x, s_h, s_w], g, retain_graph=True)
    torch.testing.assert_close(
        dx.double(), reference.gate(g.double(), s_h.double(), s_w.double()).detach(), rtol=2e-2, atol=2e-2
    )
