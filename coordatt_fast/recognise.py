"""Finds out whether a module of any class computes Coordinate Attention: by its structure, by
numbers, and by what its code says.

The numbers come from a twin of the module with random float64 weights on the CPU, so that neither the module
nor the device it is on is touched.
"""

import inspect
import math
import re
import types

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from coordatt_fast import plan, reference
from coordatt_fast.code import Called, Code, Different, code_of, is_of_torch, is_read, strange_words
from coordatt_fast.trials import (
    CALLED,
    IDLE,
    POOLS,
    TOLERANCE,
    agree_beyond,
    agree_elsewhere,
    agree_here,
    map_of,
    off_by,
    runs_blind,
)
from coordatt_fast.twin import NORMS, laboratory, noise, observed, twin_of
from coordatt_fast.wiring import Path, Watch, Wiring, find, walk, watch

# Two maps, neither square nor one the other's transpose; a module built for one size is given that one.
# Larger ones, (5, 3) and (3, 4), take 10 ms longer at 2048 channels.
_SIZES = ((5, 2), (2, 4))
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
    modules = [m for _, m in walk(module)]
    if len(modules) > _MOST_MODULES:
        return False
    if _NAME.search(kind.__name__):
        return True
    strips = [m for m in module._modules.values() if isinstance(m, POOLS) and _strip(m)]
    convolutions = [m.__dict__ for m in modules if isinstance(m, nn.Conv2d)]
    shapes = [(d.get("in_channels"), d.get("out_channels")) for d in convolutions]
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
    for name, child in walk(module):
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
    for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__deepcopy__", "__copy__"):
        if getattr(kind, name, None) is not getattr(nn.Module, name, None):
            raise Different(f"{kind.__name__} overrides {name}")
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in variadic]
    if len(needed) > 1:
        raise Different(f"its forward takes {len(needed)} inputs: {', '.join(p.name for p in needed)}")
    for name, child in walk(module):
        if isinstance(child, IDLE) and getattr(child, "p", 0) > 0:
            raise Different(f"dropout ({name}, p={child.p}) in training")


# Numbers -------------------------------------------------------------------------------------------


class _Call:
    def __init__(self, path: Path, depth: int, args: tuple) -> None:
        self.path, self.depth, self.args, self.out = path, depth, args, None


def _traced(twin: nn.Module, x: Tensor) -> tuple[Tensor, list[_Call]]:
    """The output and which submodules forward called, in order."""
    calls, stack = [], []

    def watcher_at(path):
        def watcher(module, *args, **kwargs):
            call = _Call(path, len(stack), args)
            calls.append(call), stack.append(call)
            call.out = module.forward(*args, **kwargs)
            return stack.pop().out

        return watcher

    with observed(twin, watcher_at):
        return twin(x), calls


def recognise(module: nn.Module) -> Wiring:
    """How module computes Coordinate Attention; raises Different, with the reason, where it does not."""
    convolutions, norms = _parts(module)
    _check_class(module)
    fixed = [size for _, m in walk(module) if isinstance(m, POOLS) and (size := _strip(m))]
    height, width = (next((s[i] for s in fixed if s[i]), None) for i in (0, 1))
    sizes = [(height or h, width or w) for h, w in _SIZES]
    codes = _codes(module)
    try:
        with laboratory():
            return _probe(module, codes, convolutions, norms, list(dict.fromkeys(sizes)), (height, width))
    except (Different, KeyboardInterrupt):
        raise
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        raise Different(f"a probe of its forward raised {type(error).__name__}: {why}") from error


def _codes(module: nn.Module) -> dict[str, list[Code]]:
    """The code of every class in module that is not torch's, and of functions among the attributes, by path.

    Raises Different before anything is run that would write, count or depend on what lies outside.
    """
    codes = {}
    for path, child in walk(module):
        if not is_read(child):
            continue
        try:
            if isinstance(child, CALLED):
                Called(type(child))
                continue
            code = code_of(type(child))
            codes[path] = [code]
            for name in sorted((code.own | code.words) & child.__dict__.keys()):
                value = child.__dict__[name]
                if isinstance(value, types.MethodType) and value.__self__ is child:
                    codes[path].append(code_of(value.__func__, method=True))
                elif isinstance(value, types.FunctionType) and not is_of_torch(value):
                    codes[path].append(code_of(value))
        except Different as reason:
            raise Different(f"{path}: {reason}" if path else str(reason)) from None
    return codes


def _probe(module, codes, convolutions, norms, sizes, fixed) -> Wiring:
    shapes = [(k.in_channels, k.out_channels) for k in convolutions.values()]
    m, c = max(shapes, key=shapes.count)
    n = max(2, -(-_VALUES // (m * sum(sizes[0]))))
    if n * c * math.prod(sizes[0]) > _LARGEST:
        n = 1
    if n * c * math.prod(sizes[0]) > _LARGEST:
        raise Different(f"its pools are built for {sizes[0]}, too large to try")

    template = twin_of(module, torch.Generator("cpu").manual_seed(1), {})
    generator = torch.Generator("cpu").manual_seed(0)
    maps = [map_of(generator, n, c, size) for size in sizes]
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
            find(template, tuple(name.split("."))).weight.mul_(factor)
        kept = _checksums(template)
        twin = make().eval()
        out, calls = _traced(twin, x)
    wiring = _match(module, codes, twin, x, out, calls, order, norms)
    if any(fixed):
        wiring = wiring._replace(size=fixed)
    for x in maps:
        pooled, grad = reference.pool(x), noise(x.shape, generator)
        for training in (False, True):
            # Outputs and statistics in every mode and size, but the gradients, which cost most, once in each.
            whole = x is (maps[-1] if training else maps[0])
            agree_here(make, wiring, x, pooled, grad if whole else None, training)
    agree_beyond(make, wiring, x)
    if wiring.size is None:  # one built for its own size ran on that
        agree_elsewhere(make, wiring, module, c, generator)
    _unchanged(template, kept)
    for path in codes:
        place = find(module, tuple(filter(None, path.split("."))))
        if strange := [word for code in codes[path] for word in strange_words(place, code)]:
            words = ", ".join(sorted(set(strange)))
            raise Different(f"its forward uses {words}, which Coordinate Attention does not")
    runs_blind(make, wiring)
    return wiring


def _checksums(module: nn.Module) -> list[int]:
    return [p.detach().view(torch.int64).sum().item() for p in nn.Module.parameters(module)]


def _unchanged(module: nn.Module, checksums: list[int]) -> None:
    if _checksums(module) != checksums:
        raise Different("its forward writes into its parameters")


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


def _match(module, codes, twin, x, out, calls, order, norms) -> Wiring:
    """The wiring whose output in eval mode is out."""
    squeeze, *gates = (tuple(name.split(".")) for name in order)
    norm = tuple(next(iter(norms)).split(".")) if norms else None
    chain = _chain(calls, squeeze, gates, norm)
    act = _activation_leaf(twin, calls, chain, squeeze, norm)
    kind = act_type = None
    if act is not None:
        leaf = find(twin, act)
        kind = _activation_kind(leaf)
        act_type = None if plan.activation_code(leaf) is not None else type(leaf)
    found, pooled = [], reference.pool(x)
    for conv_h, conv_w in (gates, gates[::-1]):
        for tail in (None,) if act is not None else (None, *reference.ACTIVATIONS):
            wiring = Wiring(
                conv1=squeeze, bn1=norm, act=act, conv_h=conv_h, conv_w=conv_w, chain=chain,
                tail=tail, activation=tail or kind, act_type=act_type,
            )  # fmt: skip
            with torch.no_grad():
                plain = wiring.gated(twin, x, wiring.chained(twin, pooled), fast=False)
            found.append((off_by(plain, out), wiring))
            found.append((off_by(plain + x, out), wiring._replace(skip=True)))
        if matching := [wiring for off, wiring in found if off <= TOLERANCE]:
            break
    if not matching:
        least = min(off for off, _ in found)
        raise Different(f"its output is not Coordinate Attention's (off by {least:.1g} in a numeric probe)")
    if len(matching) > 1:
        raise Different("a numeric probe cannot tell its activation")
    if not out.is_contiguous():
        raise Different("its output has another layout than its input")
    strict, soft = _watches(module, codes, matching[0])
    distinct = dict.fromkeys(code for path in sorted(codes) for code in codes[path])
    published = _as_published(calls, matching[0], x)
    return matching[0]._replace(strict=strict, soft=soft, codes=tuple(distinct), as_published=published)


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
    found = [path for path in found if not isinstance(find(twin, path), IDLE)]
    if len(found) > 1:
        raise Different(f"more than an activation follows: {', '.join('.'.join(p) for p in found)}")
    return found[0] if found else None


def _activation_kind(leaf: nn.Module) -> str | None:
    """Which of the kernels' activations leaf computes, with its gradient, in both modes; None for others."""
    grid = torch.cat([torch.linspace(-9, 9, 361, dtype=torch.float64), torch.tensor([-60.0, 60.0]).double()])
    grid = grid.reshape(1, 1, -1, 1) + 1e-3
    for name, activation in reference.ACTIVATIONS.items():
        pairs = []
        for call in (leaf.eval(), leaf.train(), activation.function):
            x = grid.clone().requires_grad_()
            y = call(x * 1)
            pairs.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
        if all(off_by(t, wanted) <= TOLERANCE for pair in pairs[:2] for t, wanted in zip(pair, pairs[2])):
            leaf.eval()
            return name
    leaf.eval()
    return None


def _watches(module, codes, wiring: Wiring) -> tuple[tuple[Watch, ...], tuple[Watch, ...]]:
    """On all that is in it, but for the parts that plan.py reads at each call."""
    parts = [p for p in (wiring.conv1, wiring.bn1, wiring.conv_h, wiring.conv_w) if p is not None]
    if wiring.act is not None and wiring.act_type is None:
        parts.append(wiring.act)
    strict, soft = [], []
    try:
        strict.append(watch((), module, codes.get(""), container=False))
        for name, child in walk(module):
            path = tuple(name.split("."))
            if not name or any(path[: len(p)] == p for p in parts):
                continue
            in_chain = any(path[: len(top)] == top for top in wiring.chain)
            (soft if in_chain else strict).append(watch(path, child, codes.get(name), container=True))
    except ValueError as error:
        raise Different(str(error)) from error
    return tuple(strict), tuple(soft)


def _as_published(calls, wiring: Wiring, x: Tensor) -> bool:
    given = {call.path: call.args[0] for call in calls if len(call.args) == 1}
    n, _, h, w = x.shape
    m = given[wiring.conv_h].shape[1]
    squeezed = off_by(given[wiring.conv1], reference.pool(x)) <= TOLERANCE
    rows, columns = given[wiring.conv_h].shape, given[wiring.conv_w].shape
    return squeezed and rows == (n, m, h, 1) and columns == (n, m, 1, w)
