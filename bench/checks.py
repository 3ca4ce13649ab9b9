"""Correctness before speed: a contestant is timed only after its results agree with a float64 run.

Errors are relative to the largest absolute value of the tensor they belong to.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# An error this small is accepted whatever plain PyTorch's own error is (its luck should not decide).
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-13}
# Error allowed as a multiple of plain PyTorch's in the same dtype: our promise, and what we grant the rivals.
OWN_FACTOR, RIVAL_FACTOR = 2, 10
CONV1_BIAS = "gradient of conv1.bias"


@dataclass(frozen=True)
class Verdict:
    """``error`` and ``allowed`` of the tensor that comes closest to (or goes furthest past) what is
    allowed."""

    passed: bool
    tensor: str
    error: float
    allowed: float
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        relation = "within" if self.passed else "NOT within"
        return f"error {self.error:.1e} in {self.tensor}, {relation} {self.allowed:.1e}"


def results(function, module: nn.Module, x: Tensor, g: Tensor | None) -> dict[str, Tensor]:
    """What one call computes, by name.

    Without ``g`` the output alone; with it one training step: output, the gradient of every parameter and of
    x, and the running statistics afterwards. ``module`` owns the parameters that ``function`` uses.
    """
    if g is None:
        with torch.inference_mode():
            return {"output": function(x)}
    x = x.detach().requires_grad_()
    parameters = dict(module.named_parameters())
    out = function(x)
    gradients = torch.autograd.grad(out, [x, *parameters.values()], g)
    found = {"output": out.detach(), "gradient of x": gradients[0]}
    found |= {
        f"gradient of {name}": gradient for name, gradient in zip(parameters, gradients[1:], strict=True)
    }
    found |= {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    return found


def truth(plain: nn.Module, x: Tensor, g: Tensor | None, device: str = "cpu") -> dict[str, Tensor]:
    """The results of ``plain`` in float64 on the device, from the same (rounded) weights and inputs."""
    exact = copy.deepcopy(plain).to(device, torch.float64)
    x, g = (t if t is None else t.to(device, torch.float64) for t in (x, g))
    return results(exact, exact, x, g)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute error of every tensor over the tensor's scale; NaN anywhere gives NaN."""
    measured = {}
    for name, right in exact.items():
        scale = right.abs().max().item()
        if name == CONV1_BIAS:
            # Exactly zero under batch statistics: what is left is rounding noise of the size of its
            # neighbours.
            scale = max(scale, exact["gradient of conv1.weight"].abs().max().item())
        difference = (found[name].detach().to(right) - right).abs().max().item()
        measured[name] = difference / (scale or 1.0)
    return measured


def judge(found: dict[str, float], plain: dict[str, float], dtype: torch.dtype, factor: int) -> Verdict:
    """Compare errors with ``factor`` times plain PyTorch's own, tensor by tensor."""
    floor = FLOOR[dtype] * (factor / OWN_FACTOR)
    allowed = {name: max(factor * plain[name], floor) for name in found}
    failed = [name for name in found if not found[name] <= allowed[name]]
    worst = failed[0] if failed else max(found, key=lambda name: found[name] / allowed[name])
    return Verdict(not failed, worst, found[worst], allowed[worst])


def largest(measured: dict[str, float]) -> float:
    """The largest error, without conv1.bias: its gradient is exactly zero and plain PyTorch's mere noise."""
    return max(error for name, error in measured.items() if name != CONV1_BIAS)
