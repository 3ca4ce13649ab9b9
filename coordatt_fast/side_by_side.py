"""Two models side by side: how far their results are apart, and how many times as fast the second is.

What the command line's bench and verify compute; nothing of the package imports it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coordatt_fast import interleaved

# In float64 nearly all of rounding is gone: what is left beyond this is another function.
SAME_FUNCTION = 1e-9
# In float32 twice the original's own error is allowed. A deep network may amplify rounding, and a value that
# rounds to the other side of a ReLU's kink changes gradients outright, so this much is always accepted.
FACTOR = 2.0
FLOORS = {"outputs": 1e-4, "gradients": 1e-2, "statistics": 1e-4}
# A gradient that small beside the largest is one that a normalisation cancels: all that is left is rounding.
_CANCELLED = 1e-9


class Published(nn.Module):
    """The block as it is copied into networks, x [N, C, H, W] -> [N, C, H, W]: the baseline in plain PyTorch.

    Hou, Zhou, Feng, CVPR 2021, section 3.2. State dict and initialisation as CoordAtt's.
    """

    def __init__(self, channels: int, reduction: int = 32) -> None:
        super().__init__()
        squeezed = max(8, channels // reduction)
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv1 = nn.Conv2d(channels, squeezed, 1)
        self.bn1 = nn.BatchNorm2d(squeezed)
        self.conv_h, self.conv_w = nn.Conv2d(squeezed, channels, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        strips = torch.cat([self.pool_h(x), self.pool_w(x).permute(0, 1, 3, 2)], dim=2)
        u = self.bn1(self.conv1(strips))
        rows, columns = torch.split(u * F.relu6(u + 3) / 6, list(x.shape[2:]), dim=2)
        a_h, a_w = self.conv_h(rows).sigmoid(), self.conv_w(columns.permute(0, 1, 3, 2)).sigmoid()
        return x * a_w * a_h


# Results -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far results are from the original's in float64: root mean square of the error over that of the
    truth, in the tensor where it is largest.

    group: "outputs", "gradients" or "statistics"; dtype: what was computed in; tensor: its name; error: of
    the second model; original: the largest that the original has in this dtype, 0 for float64; allowed: the
    bound on error.
    """

    group: str
    dtype: torch.dtype
    tensor: str
    error: float
    original: float
    allowed: float

    @property
    def within(self) -> bool:
        return self.error <= self.allowed


def tensors(value, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in a model's result (tensor, mapping, list or tuple of such), with names."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name or "output", value
    elif isinstance(value, (Mapping, list, tuple)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, entry in pairs:
            yield from tensors(entry, f"{name}.{key}" if name else f"output {key}")


def results(model: nn.Module, x: Tensor, training: bool) -> dict[str, dict[str, Tensor]]:
    """What a copy of model, in x's dtype, computes for x: its outputs by name; in training mode also the
    gradients of x and of every parameter (of a fixed random weighting of the outputs) and the running
    statistics. Random numbers that it draws start from the same seed in every call. ValueError where there is
    no tensor in its output, or none that depends on x or a parameter.
    """
    model = copy.deepcopy(model).to(x.dtype).train(training)
    x = x.detach().clone().requires_grad_(training)
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training):
        torch.manual_seed(0)
        result = model(x)
    outputs = dict(tensors(result))
    if not outputs:
        raise ValueError(f"its output, a {type(result).__name__}, holds no floating-point tensor")
    found = {"outputs": {name: value.detach() for name, value in outputs.items()}}
    if not training:
        return found
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y) for y in outputs.values()]
    total = sum((y * weight).sum() for y, weight in zip(outputs.values(), weights) if y.requires_grad)
    if not isinstance(total, Tensor):
        raise ValueError("no output of it has a gradient in training mode")
    total.backward()
    gradients = {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    found["gradients"] = {name: d for name, d in gradients.items() if d is not None}
    found["statistics"] = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return found


def awake(model: nn.Module) -> int:
    """Draws the normalisation weights that are all zero, as some networks start, since they would hide what
    is before them. Returns how many these were.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(getattr(m, "weight", None), nn.Parameter)
        and isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
    ]
    asleep = [m.weight for m in norms if not m.weight.any()]
    for weight in asleep:
        nn.init.uniform_(weight, 0.5, 1.5)
    return len(asleep)


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of every tensor's error over that of the truth, where that is finite; infinite where
    only one of the two is NaN or infinite, and for another shape."""

    def size(t: Tensor) -> float:
        finite = t.double()[t.isfinite()]
        return finite.square().mean().sqrt().item() if finite.numel() else 0.0

    if found.keys() != truth.keys():
        return {name: float("inf") for name in found.keys() ^ truth.keys()}
    largest = max(map(size, truth.values()), default=0.0)
    errors = {}
    for name, right in truth.items():
        have = found[name].double()
        if have.shape != right.shape:
            errors[name] = float("inf")
            continue
        same = (have == right) | (have.isnan() & right.isnan())
        scale = size(right) if size(right) > _CANCELLED * largest else largest
        wrong = torch.where(same, 0.0, have - right)
        errors[name] = size(wrong) / (scale or 1.0) if wrong.isfinite().all() else float("inf")
    return errors


def differences(
    original: nn.Module, other: nn.Module, x: Tensor, training: bool, floors: dict[str, float] = FLOORS
) -> list[Difference]:
    """other's results against original's in float64, computed in float64 and in x's dtype.

    In float64 a Difference may be SAME_FUNCTION; else FACTOR times what original itself is off in x's dtype
    (the larger of contiguous and channels_last for an x of four dimensions), or the group's floor. The models
    are copied, not run.
    """
    exact = x.double()
    truth = results(original, exact, training)
    in_float64 = results(other, exact, training)
    found = results(other, x, training)
    plain = [results(original, x, training)]
    if x.dim() == 4:
        turned = copy.deepcopy(original).to(memory_format=torch.channels_last)
        plain.append(results(turned, x.contiguous(memory_format=torch.channels_last), training))
    rows = []
    for group, right in truth.items():
        if not right:
            continue
        errors = _errors(in_float64[group], right)
        worst = max(errors, key=errors.get)
        rows.append(Difference(group, torch.float64, worst, errors[worst], 0.0, SAME_FUNCTION))
        if x.dtype is torch.float64:
            continue
        errors, own = _errors(found[group], right), [_errors(p[group], right) for p in plain]
        worst, own = max(errors, key=errors.get), max(max(e.values()) for e in own)
        allowed = max(FACTOR * own, floors[group])
        rows.append(Difference(group, x.dtype, worst, errors[worst], own, allowed))
    return rows


# Speed ---------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Of two calls that were measured in turn: seconds of each (medians), how many times as fast the second
    is (the median of every round's ratio, and their 10th and 90th percentiles), and the number of rounds."""

    first: float
    second: float
    ratio: float
    low: float
    high: float
    rounds: int


def pass_of(model: nn.Module, x: Tensor, training: bool, of_x: bool = False) -> Callable[[], object]:
    """A call of one forward pass of model; in training of a forward and backward pass, with of_x to x too."""
    model.train(training)
    if not training:

        def call():
            with torch.inference_mode():
                model(x)

        return call
    x = x.detach().clone().requires_grad_(of_x)
    with torch.no_grad():
        gradients = [torch.ones_like(value) for _, value in tensors(model(x))]

    def call():
        pairs = [(y, g) for (_, y), g in zip(tensors(model(x)), gradients, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
        x.grad = None
        for p in model.parameters():
            p.grad = None

    return call


def race(
    first: Callable[[], object], second: Callable[[], object], *, rounds: int = 15, limit: float = 20.0
) -> Speed:
    """Measures the two in turn for rounds rounds, or fewer (three at least) once limit seconds are over."""
    timed = interleaved.race(
        {"first": interleaved.Local(first), "second": interleaved.Local(second)}, rounds=rounds, limit=limit
    )
    ratio, count = timed.speedup("second", over="first"), len(timed.rounds["first"])
    medians = [timed.seconds(name).median for name in ("first", "second")]
    return Speed(*medians, ratio.median, ratio.p10, ratio.p90, count)
