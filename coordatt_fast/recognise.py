"""Finds out whether a module of any class computes Coordinate Attention: by its structure, then by numbers.

The numbers come from a twin of the module with random float64 weights on the CPU, so that neither the module
nor the device it is on is touched.
"""

import inspect
import itertools
import math
import re

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from coordatt_fast import plan, reference
from coordatt_fast.twin import NORMS, Different, laboratory, noise, twin_of
from coordatt_fast.wiring import OWN, Path, Watch, Wiring, find, watch

_POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)

# Two maps, neither square nor one the other's transpose; a module built for one size is given that one.
# Larger ones, (5, 3) and (3, 4), take 10 ms longer at 2048 channels.
_SIZES = ((5, 2), (2, 4))
# Two correct float64 programs agree to 1e-12; another formula differs by 1e-3 and more.
_TOLERANCE = 1e-9
# So many values reach the activation that all of its pieces are met, whatever the number of channels.
_VALUES = 400
_LARGEST = 2**25

_NAME = re.compile(
    r"coor[a-z_]*att|^ca_?(block|conv|module|layer|att|$)|strip_?att|efficient_?local_?att|^ela$",
    re.IGNORECASE,
)
_MOST_MODULES = 40


# Structure -----------------------------------------------------------------------------------------


def is_suspect(module: nn.Module) -> bool:
    """Whether a user may take the module for Coordinate Attention, so that a report should mention it."""
    kind = type(module)
    if kind.__module__.startswith("torch.") or kind.forward is nn.Module.forward:
        return False
    if len(list(itertools.islice(module.modules(), _MOST_MODULES + 1))) > _MOST_MODULES:
        return False
    if _NAME.search(kind.__name__):
        return True
    strips = [m for m in module.children() if isinstance(m, _POOLS) and _strip(m)]
    shapes = [(m.in_channels, m.out_channels) for m in module.modules() if isinstance(m, nn.Conv2d)]
    return bool(strips) or any(
        c != m and (c, m) in shapes and shapes.count((m, c)) >= 2 for c, m in set(shapes)
    )


def _strip(pool: nn.Module) -> tuple[int | None, int | None] | None:
    """The (H, W) that a pool over rows or columns is built for, None where it takes any; None for another
    pool."""
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        size = pool.output_size
        if isinstance(size, tuple) and size != (1, 1) and 1 in size:
            return (None, size[1]) if size[0] == 1 else (size[0], None)
        return None
    size = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * 2
    if 1 in size and size != (1, 1):
        return (None, size[1]) if size[0] == 1 else (size[0], None)
    return None


def _parts(module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The 1x1 convolutions and the normalisations below module by name, where there is nothing else with
    parameters."""
    convolutions, norms = {}, {}
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise Different("it is a ScriptModule")
        if ".quantized" in type(child).__module__ or ".ao.nn." in type(child).__module__:
            raise Different(f"{name} is a quantised {type(child).__name__}")
        if isinstance(child, LazyModuleMixin):
            raise Different(f"{name or 'it'} is lazy: call the model once, then accelerate it")
        if "parametrizations" in child._modules:
            raise Different(f"{name} is parametrised")
        tensors = [n for d in (child._parameters, child._buffers) for n, t in d.items() if t is not None]
        if isinstance(child, NORMS):
            norms[name] = child
            continue
        convolution = isinstance(child, nn.Conv2d)
        others = sorted(set(tensors) - {"weight", "bias"}) if convolution else tensors
        if others:
            where = ".".join(filter(None, (name, others[0])))
            raise Different(f"{where} is no part of Coordinate Attention")
        if convolution:
            if not plan.pointwise(child.__dict__):
                size = " x ".join(map(str, child.kernel_size))
                raise Different(f"{name} is a {size} convolution, not a plain 1x1 one")
            convolutions[name] = child
    shapes = [(c.in_channels, c.out_channels) for c in convolutions.values()]
    outer, inner = shapes[0] if shapes else (0, 0)
    if sorted(shapes) not in (sorted([s, s[::-1], s[::-1]]) for s in {(outer, inner), (inner, outer)}):
        found = ", ".join(f"{n} {c.in_channels} -> {c.out_channels}" for n, c in convolutions.items())
        raise Different(f"expected 1x1 convolutions C -> m, m -> C, m -> C, found {found or 'none'}")
    if len(norms) > 1:
        raise Different(f"{len(norms)} normalisations: {', '.join(norms)}")
    return convolutions, norms


def _check_class(module: nn.Module) -> None:
    """Raises Different for what a module of ours could not stand for."""
    kind = type(module)
    if "forward" in module.__dict__:
        raise Different("its forward is replaced on the instance")
    for name in ("__call__", "__reduce__", "__reduce_ex__", "__deepcopy__"):
        if getattr(kind, name, None) is not getattr(nn.Module, name, None):
            raise Different(f"{kind.__name__} overrides {name}")
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in variadic]
    if len(needed) > 1:
        raise Different(f"its forward takes {len(needed)} inputs: {', '.join(p.name for p in needed)}")
    for name, child in module.named_modules():
        if isinstance(child, _IDLE) and getattr(child, "p", 0) > 0:
            raise Different(f"dropout ({name}, p={child.p}) in training")


# Numbers -------------------------------------------------------------------------------------------


class _Call:
    def __init__(self, path: Path, depth: int, args: tuple) -> None:
        self.path, self.depth, self.args, self.out = path, depth, args, None


def _traced(twin: nn.Module, x: Tensor) -> tuple[Tensor, list[_Call]]:
    """The output and which submodules forward called, in order."""
    calls, stack, handles = [], [], []

    def enter(path):
        def hook(module, args):
            calls.append(_Call(path, len(stack), args))
            stack.append(calls[-1])

        return hook

    def leave(module, args, out):
        stack.pop().out = out

    for name, child in twin.named_modules():
        if name:
            handles.append(child.register_forward_pre_hook(enter(tuple(name.split(".")))))
            handles.append(child.register_forward_hook(leave))
    try:
        out = twin(x)
    finally:
        for handle in handles:
            handle.remove()
    return out, calls


def _results(twin: nn.Module, call, x: Tensor, grad: Tensor | None, training: bool) -> dict[str, Tensor]:
    """Of one call and (given grad) its backward: output, buffers, gradients, under names for the reasons."""
    twin.train(training)
    before = {name: value for name, value in vars(twin).items() if name not in OWN}
    given, x = x, x.clone().requires_grad_()
    with torch.set_grad_enabled(grad is not None):
        out = call(x)
    if type(out) is not Tensor or out.shape != x.shape or out.dtype != x.dtype:
        raise Different("its output is no tensor of x's shape and dtype")
    if grad is not None:
        out.backward(grad)
    after = {name: value for name, value in vars(twin).items() if name not in OWN}
    if before.keys() != after.keys() or any(after[name] is not value for name, value in before.items()):
        raise Different("its forward sets attributes of the module")
    if not torch.equal(given, x.detach()):
        raise Different("its forward writes into x")
    results = {"output": out.detach()} | {n: b.double() for n, b in twin.named_buffers()}
    if grad is None:
        return results
    gradients = {f"gradient of {n}": p.grad for n, p in twin.named_parameters()}
    return results | {"gradient of x": x.grad} | gradients


def _error(have: Tensor | None, wanted: Tensor | None) -> float:
    if have is None or wanted is None:
        return 0.0 if have is wanted else math.inf
    if have.shape != wanted.shape:
        return math.inf
    error = _largest(have - wanted) / max(1.0, _largest(wanted))
    return error if error == error else math.inf


def _largest(t: Tensor) -> float:
    """The largest magnitude in t, NaN if there is one."""
    least, most = t.aminmax() if t.numel() else (t.new_zeros(()), t.new_zeros(()))
    return torch.maximum(most, -least).item()


def _agree(have: dict, wanted: dict, training: bool) -> None:
    for name in have:
        error = _error(have[name], wanted[name])
        if error > _TOLERANCE:
            mode = "training" if training else "eval"
            raise Different(f"in {mode} mode its {name} is not Coordinate Attention's (off by {error:.1g})")


def _same(have: Tensor, wanted: Tensor) -> bool:
    """Element by element, NaN and infinities included."""
    have, wanted = (torch.nan_to_num(t, 1e300, 2e300, -2e300) for t in (have, wanted))
    return bool(((have - wanted).abs_() <= wanted.abs_().add_(1).mul_(_TOLERANCE)).all())


def _agree_beyond(make, wiring: Wiring, x: Tensor) -> None:
    """Raises Different for what clamps or cleans values: tries large ones, NaN and infinities among them."""
    given = x * 1e6
    given[0, 0, 0, 0], given[-1, -1, -1, 0], given[-1, 0, 0, -1] = math.nan, math.inf, -math.inf
    with torch.no_grad():
        theirs, ours, pooled = make().eval(), make().eval(), reference.pool(given)
        y = wiring.chained(ours, pooled)
        same = _same(wiring.gated(ours, given, y, fast=False), theirs(given))
        if not (same and _same(wiring.by_parts(ours, pooled), y)):
            raise Different("it treats large or non-finite values in another way than Coordinate Attention")


def _map(generator: torch.Generator, n: int, c: int, size: tuple[int, int]) -> Tensor:
    """Noise, and an offset per row and per column: strip means of noise alone would be near zero."""
    shapes = (n, c, *size), (n, c, size[0], 1), (n, c, 1, size[1])
    return sum(noise(shape, generator) for shape in shapes)


def recognise(module: nn.Module) -> Wiring:
    """How module computes Coordinate Attention; raises Different, with the reason, where it does not."""
    convolutions, norms = _parts(module)
    _check_class(module)
    fixed = [size for m in module.modules() if isinstance(m, _POOLS) and (size := _strip(m))]
    height, width = (next((s[i] for s in fixed if s[i]), None) for i in (0, 1))
    sizes = [(height or h, width or w) for h, w in _SIZES]
    try:
        with laboratory():
            return _probe(module, convolutions, norms, list(dict.fromkeys(sizes)), (height, width))
    except (Different, KeyboardInterrupt):
        raise
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        raise Different(f"a probe of its forward raised {type(error).__name__}: {why}") from error


def _probe(module, convolutions, norms, sizes, fixed) -> Wiring:
    shapes = [(k.in_channels, k.out_channels) for k in convolutions.values()]
    m, c = max(shapes, key=shapes.count)
    n = max(2, -(-_VALUES // (m * sum(sizes[0]))))
    if n * c * math.prod(sizes[0]) > _LARGEST:
        n = 1
    if n * c * math.prod(sizes[0]) > _LARGEST:
        raise Different(f"its pools are built for {sizes[0]}, too large to try")

    template = twin_of(module, torch.Generator("cpu").manual_seed(1), {})
    generator = torch.Generator("cpu").manual_seed(0)
    maps = [_map(generator, n, c, size) for size in sizes]
    x = maps[0]

    def make():
        return twin_of(template, None, {})

    with torch.no_grad():
        kept = _checksums(template)
        _, calls = _traced(make().eval(), x[:1])
        _unchanged(template, kept)
        order = _order(calls, convolutions, norms)
        for name in convolutions:
            # A normalisation's weight spreads the activation's inputs; where there is none, conv1's does.
            factor = 0.4 if name != order[0] else 1.0 if norms else 5.0
            template.get_submodule(name).weight.mul_(factor)
        kept = _checksums(template)
        twin = make().eval()
        out, calls = _traced(twin, x)
    wiring = _match(module, twin, x, out, calls, order, norms)
    if any(fixed):
        wiring = wiring._replace(size=fixed)
    for x in maps:
        pooled, grad = reference.pool(x), noise(x.shape, generator)
        for training in (False, True):
            # Outputs and statistics in every mode and size, but the gradients, which cost most, once in each.
            whole = x is (maps[-1] if training else maps[0])
            _agree_here(make, wiring, x, pooled, grad if whole else None, training)
    _agree_beyond(make, wiring, x)
    _unchanged(template, kept)
    return wiring


def _checksums(module: nn.Module) -> list[int]:
    return [p.detach().view(torch.int64).sum().item() for p in module.parameters()]


def _unchanged(module: nn.Module, checksums: list[int]) -> None:
    if _checksums(module) != checksums:
        raise Different("its forward writes into its parameters")


def _agree_here(make, wiring: Wiring, x: Tensor, pooled: Tensor, grad: Tensor | None, training: bool) -> None:
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


def _order(calls: list[_Call], convolutions: dict, norms: dict) -> list[str]:
    """The convolutions' names in the order of their calls."""
    names = [".".join(call.path) for call in calls]
    for name in (*convolutions, *norms):
        if (count := names.count(name)) != 1:
            often = "never called" if count == 0 else f"called {count} times"
            raise Different(f"{name} has a place in it but is {often}")
    order = [name for name in names if name in convolutions]
    squeeze = convolutions[order[0]]
    shape = squeeze.out_channels, squeeze.in_channels
    if any((convolutions[n].in_channels, convolutions[n].out_channels) != shape for n in order[1:]):
        raise Different(f"{order[0]}, called first, is not the convolution C -> m")
    return order


def _within(path: Path, others) -> bool:
    return any(path == other[: len(path)] for other in others)


def _match(module, twin, x, out, calls, order, norms) -> Wiring:
    """The wiring whose output in eval mode is out."""
    squeeze, *gates = (tuple(name.split(".")) for name in order)
    norm = tuple(next(iter(norms)).split(".")) if norms else None
    chain = _chain(calls, squeeze, gates, norm)
    act = _activation_leaf(twin, calls, chain, squeeze, norm)
    kind = act_type = None
    if act is not None:
        leaf = find(twin, act)
        kind = _activation_kind(leaf)
        act_type = None if type(leaf) in plan.CODES else type(leaf)
    found, pooled = [], reference.pool(x)
    for conv_h, conv_w in (gates, gates[::-1]):
        for tail in (None,) if act is not None else (None, *reference.ACTIVATIONS):
            parts = (squeeze, norm, act, conv_h, conv_w)
            wiring = Wiring(*parts, chain, tail, tail or kind, act_type, False, None, (), (), True)
            with torch.no_grad():
                plain = wiring.gated(twin, x, wiring.chained(twin, pooled), fast=False)
            found.append((_error(plain, out), wiring))
            found.append((_error(plain + x, out), wiring._replace(skip=True)))
        if matching := [wiring for error, wiring in found if error <= _TOLERANCE]:
            break
    if not matching:
        least = min(error for error, _ in found)
        raise Different(f"its output is not Coordinate Attention's (off by {least:.1g} in a numeric probe)")
    if len(matching) > 1:
        raise Different("a numeric probe cannot tell its activation")
    strict, soft = _watches(module, matching[0], calls)
    published = _as_published(calls, matching[0], x)
    return matching[0]._replace(strict=strict, soft=soft, as_published=published)


def _chain(calls, squeeze, gates, norm) -> tuple[Path, ...]:
    """What forward itself calls from the squeezing convolution up to the first gate's."""
    top = [call for call in calls if call.depth == 0]
    start = next(i for i, call in enumerate(top) if _within(call.path, [squeeze]))
    stop = next(i for i, call in enumerate(top) if _within(call.path, gates))
    chain = tuple(call.path for call in top[start:stop])
    if not chain:
        raise Different("one child makes more than one of its convolutions")
    if norm is not None and not any(_within(path, [norm]) for path in chain):
        raise Different(f"{'.'.join(norm)} is not called between the convolutions")
    if any(type(v) is not Tensor or v.dim() != 4 for call in top[start:stop] for v in (*call.args, call.out)):
        raise Different(f"{'.'.join(chain[0])} and what follows it do not work on maps")
    return chain


def _activation_leaf(twin, calls, chain, squeeze, norm) -> Path | None:
    """The child that is the activation: the only one in the chain that is no convolution or norm."""
    parts = [squeeze] if norm is None else [squeeze, norm]
    found = []
    for call in calls:
        path = call.path
        in_chain = any(path[: len(top)] == top for top in chain)
        below = any(path[: len(p)] == p for p in (*parts, *found))
        if in_chain and not below and not _within(path, parts):
            found.append(path)
    found = [path for path in found if not isinstance(find(twin, path), _IDLE)]
    if len(found) > 1:
        raise Different(f"more than an activation follows: {', '.join('.'.join(p) for p in found)}")
    return found[0] if found else None


def _activation_kind(leaf: nn.Module) -> str | None:
    """Which of the kernels' activations leaf computes, with its gradient, in both modes; None for others."""
    grid = torch.cat([torch.linspace(-9, 9, 361, dtype=torch.float64), torch.tensor([-60.0, 60.0]).double()])
    grid = grid.reshape(1, 1, -1, 1) + 1e-3
    for name, function in reference.ACTIVATIONS.items():
        pairs = []
        for call in (leaf.eval(), leaf.train(), function):
            x = grid.clone().requires_grad_()
            y = call(x * 1)
            pairs.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
        if all(_error(t, wanted) <= _TOLERANCE for pair in pairs[:2] for t, wanted in zip(pair, pairs[2])):
            leaf.eval()
            return name
    leaf.eval()
    return None


def _watches(module, wiring: Wiring, calls) -> tuple[tuple[Watch, ...], tuple[Watch, ...]]:
    """On all that was called or holds what was called, but for the parts that plan.py reads at each call."""
    parts = [p for p in (wiring.conv1, wiring.bn1, wiring.conv_h, wiring.conv_w) if p is not None]
    if wiring.act is not None and wiring.act_type is None:
        parts.append(wiring.act)
    called = {call.path for call in calls}
    strict, soft = [], []
    try:
        strict.append(watch((), module, container=False))
        for name, child in module.named_modules():
            path = tuple(name.split("."))
            if not name or any(path[: len(p)] == p for p in parts) or not _within(path, called):
                continue
            holder = _within(path, parts)
            in_chain = any(path[: len(top)] == top for top in wiring.chain)
            (soft if in_chain else strict).append(watch(path, child, container=holder))
    except ValueError as error:
        raise Different(str(error)) from error
    return tuple(strict), tuple(soft)


def _as_published(calls, wiring: Wiring, x: Tensor) -> bool:
    given = {call.path: call.args[0] for call in calls if len(call.args) == 1}
    n, _, h, w = x.shape
    m = given[wiring.conv_h].shape[1]
    squeezed = _error(given[wiring.conv1], reference.pool(x)) <= _TOLERANCE
    rows, columns = given[wiring.conv_h].shape, given[wiring.conv_w].shape
    return squeezed and rows == (n, m, h, 1) and columns == (n, m, 1, w)
