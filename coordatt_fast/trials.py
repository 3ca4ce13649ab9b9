"""Trials of a module's twin beside Coordinate Attention as wiring.py would compute it with the same parts."""

import math

import torch
from torch import Tensor, nn

from coordatt_fast import blind, reference
from coordatt_fast.code import Different, is_read
from coordatt_fast.twin import NORMS, noise, observed, state_of
from coordatt_fast.wiring import Wiring, find, walk

POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)
IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# Layers that may stand anywhere in it; all others only as one of its parts.
_PLACED = (*POOLS, *IDLE, nn.Sigmoid)
# Parts that the hybrid tier calls where they are of another class than torch's: what these compute is theirs.
CALLED = (nn.Conv2d, *NORMS)
# Two correct float64 programs agree to 1e-12; another formula differs by 1e-3 and more.
TOLERANCE = 1e-9
# In other dtypes, of the norm: the gates amplify how two orders of the same operations round.
_OWN_DTYPE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
_LARGE = 19  # H and W of the larger map
# N, H and W to run blind on: a threshold, a table or a number of digits shows in one of them. The last has no
# data; operators without data are Python and take 100 times as long as those of the first two.
_BLIND_SIZES = ((2, 1, 1), (1, 3, 5), (70_001, 10_007, 20_011))


def map_of(generator: torch.Generator, n: int, c: int, size: tuple[int, int]) -> Tensor:
    """Noise, and an offset per row and per column: strip means of noise alone would be near zero."""
    shapes = (n, c, *size), (n, c, size[0], 1), (n, c, 1, size[1])
    return sum(noise(shape, generator) for shape in shapes)


def _results(twin: nn.Module, call, x: Tensor, grad: Tensor | None, training: bool) -> dict[str, Tensor]:
    """Of one call and (given grad) its backward: output, buffers, gradients, under names for the reasons."""
    twin.train(training)
    before = state_of(twin)
    given, x = x, x.clone().requires_grad_()
    with torch.set_grad_enabled(grad is not None):
        out = call(x)
    if type(out) is not Tensor or out.shape != x.shape or out.dtype != x.dtype:
        raise Different("its output is no tensor of x's shape and dtype")
    if grad is not None:
        out.backward(grad)
    if state_of(twin) != before:
        raise Different("its forward sets attributes of the module")
    if not torch.equal(given, x.detach()):
        raise Different("its forward writes into x")
    results = {"output": out.detach()} | {n: b.double() for n, b in nn.Module.named_buffers(twin)}
    if grad is None:
        return results
    gradients = {f"gradient of {n}": p.grad for n, p in nn.Module.named_parameters(twin)}
    return results | {"gradient of x": x.grad} | gradients


def off_by(have: Tensor | None, wanted: Tensor | None) -> float:
    """The largest difference over the largest wanted value; infinite where only one is there, or for NaN."""
    if have is None or wanted is None:
        return 0.0 if have is wanted else math.inf
    if have.shape != wanted.shape:
        return math.inf
    off = _largest(have - wanted) / max(1.0, _largest(wanted))
    return off if off == off else math.inf


def _largest(t: Tensor) -> float:
    """The largest magnitude in t, NaN if there is one."""
    least, most = t.aminmax() if t.numel() else (t.new_zeros(()), t.new_zeros(()))
    return torch.maximum(most, -least).item()


def _agree(have: dict, wanted: dict, training: bool) -> None:
    for name in have:
        off = off_by(have[name], wanted[name])
        if off > TOLERANCE:
            mode = "training" if training else "eval"
            raise Different(f"in {mode} mode its {name} is not Coordinate Attention's (off by {off:.1g})")


def agree_here(make, wiring: Wiring, x: Tensor, pooled: Tensor, grad: Tensor | None, training: bool) -> None:
    """Raises Different unless the module computes on x what the fused tier does by its parts, and what the
    hybrid tier does by its children. Where the parts' gradients are the module's, so are the children's."""
    theirs, parts, children = make(), make(), make()

    def fused(x):
        y = wiring.by_parts(parts, pooled if grad is None else reference.pool(x))
        return wiring.gated(parts, x, y, fast=False)

    def hybrid(x):
        return wiring.gated(children, x, wiring.chained(children, pooled), fast=False)

    wanted = _results(theirs, theirs, x, grad, training)
    _agree(_results(parts, fused, x, grad, training), wanted, training)
    _agree(_results(children, hybrid, x, None, training), wanted, training)


def _same(have: Tensor, wanted: Tensor) -> bool:
    """Element by element, NaN and infinities included."""
    have, wanted = (torch.nan_to_num(t, 1e300, 2e300, -2e300) for t in (have, wanted))
    return bool(((have - wanted).abs_() <= wanted.abs_().add_(1).mul_(TOLERANCE)).all())


def agree_beyond(make, wiring: Wiring, x: Tensor) -> None:
    """Raises Different for what clamps or cleans values: tries large ones everywhere, in eval mode NaN and
    infinities among them."""

    def amplified(training):
        twin = make().train(training)
        # Behind a normalisation values are large where its weight is.
        norm = None if wiring.bn1 is None else find(twin, wiring.bn1)
        if getattr(norm, "weight", None) is not None:
            norm._parameters["weight"] = nn.Parameter(norm.weight.detach() * 1e6)
        return twin

    for training in (False, True):
        given = x * 1e6
        if not training:
            given[0, 0, 0, 0], given[-1, -1, -1, 0], given[-1, 0, 0, -1] = math.nan, math.inf, -math.inf
        with torch.no_grad():
            theirs, ours, parts = (amplified(training) for _ in range(3))
            pooled = reference.pool(given)
            y = wiring.chained(ours, pooled)
            same = _same(wiring.gated(ours, given, y, fast=False), theirs(given))
            if not (same and _same(wiring.by_parts(parts, pooled), y)):
                raise Different(
                    "it treats large or non-finite values in another way than Coordinate Attention"
                )


def agree_elsewhere(make, wiring: Wiring, module: nn.Module, c: int, generator) -> None:
    """Raises Different unless it also agrees on maps of one zero, and, to rounding, on a larger square one in
    the module's own dtypes and channels_last."""
    dtypes = (p.dtype for p in nn.Module.parameters(module))
    dtype = next((d for d in dtypes if d.is_floating_point), torch.float64)
    large = noise((1, c, _LARGE, 1), generator) + noise((1, c, 1, _LARGE), generator)
    large = large.to(dtype, memory_format=torch.channels_last)
    zeros = torch.zeros(2, c, 1, 1, dtype=torch.float64)
    for x, limit in ((zeros, TOLERANCE), (large, _OWN_DTYPE.get(dtype, TOLERANCE))):
        for training in (False, True):
            theirs, ours = make().train(training), make().train(training)
            if x is large:
                _cast_like(theirs, module), _cast_like(ours, module)
            with torch.no_grad():
                out = theirs(x)
                wanted = wiring.gated(ours, x, wiring.chained(ours, reference.pool(x)), fast=False)
            if out.dtype != wanted.dtype or not _near(out, wanted, limit):
                raise Different("it computes something else for other sizes, layouts or dtypes")


def _cast_like(twin: nn.Module, module: nn.Module) -> None:
    for tensors in (nn.Module.parameters, nn.Module.buffers):
        for t, like in zip(tensors(twin), tensors(module)):
            t.data = t.data.to(like.dtype)


def _near(have: Tensor, wanted: Tensor, limit: float) -> bool:
    """By their norms; where one has no finite norm, the other may have none."""
    wide = torch.float64 if wanted.dtype == torch.float64 else torch.float32
    off, scale = torch.dist(have.to(wide), wanted.to(wide)), torch.linalg.vector_norm(wanted, dtype=wide)
    return bool(off <= limit * scale) or not (scale.isfinite() or torch.linalg.vector_norm(have).isfinite())


def runs_blind(make, wiring: Wiring) -> None:
    """Raises Different unless both modes do the same for every size, by layers that have a place in it.

    On tensors that hide their sizes, see blind.py. A convolution or normalisation of the user's own class may
    look: the module's own is what is called.
    """
    parts = wiring.conv1, wiring.bn1, wiring.act, wiring.conv_h, wiring.conv_w

    def watcher_at(path):
        is_part = any(part is not None and path[: len(part)] == part for part in parts)

        def watcher(module, *args, **kwargs):
            is_chain = isinstance(module, nn.Sequential)
            is_own = is_read(module) and not isinstance(module, CALLED)
            if module._modules or is_chain or is_own:
                return module.forward(*args, **kwargs)
            name, kind = ".".join(path), type(module).__name__
            if is_read(module) and not wiring.as_published:
                raise Different(f"{name}, a {kind}, would be given its input in another layout")
            if not is_part and not isinstance(module, _PLACED):
                raise Different(f"{name}, a {kind}, has no place in Coordinate Attention")
            args, kwargs = blind.opened((args, kwargs))
            return blind.closed(module.forward(*args, **kwargs))

        return watcher

    for training in (False, True):
        traces = []
        for n, h, w in _BLIND_SIZES:
            huge = (n, h, w) == _BLIND_SIZES[-1]
            twin = (_without_data(make()) if huge else make()).train(training)
            weight = find(twin, wiring.conv1).weight
            h, w = (own or free for own, free in zip(wiring.size or (None, None), (h, w)))
            x = torch.ones(n, weight.shape[1], h, w, dtype=torch.float64, device="meta" if huge else "cpu")
            with observed(twin, watcher_at):
                traces.append(blind.run(twin, x, tuple(weight.shape[:2])))
        if any(trace != traces[0] for trace in traces):
            raise Different("its forward does something else for other sizes")


def _without_data(twin: nn.Module) -> nn.Module:
    for _, module in walk(twin):
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(p.to("meta"))
        for name, b in module._buffers.items():
            if b is not None and b.is_floating_point():
                module._buffers[name] = b.to("meta")
    return twin
