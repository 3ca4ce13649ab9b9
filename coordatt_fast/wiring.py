"""Which of a foreign module's children play which part, and how it runs by them."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coordatt_fast import ops, plan, reference
from coordatt_fast.code import Absent, Code, is_data, is_of_torch, owner
from coordatt_fast.plan import Detour

Path = tuple[str, ...]

# Stand in for what a foreign module does in its forward or under another name; never called.
_POOL_H, _POOL_W = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
_NO_NORM = nn.Identity()


class Watch(NamedTuple):
    """What a submodule was when the module was examined; the finding holds while it still is that.

    attributes: those that its code reads, Absent where the class's own must not be hidden by one.
    missing: names that its code asks for and that were nowhere.
    """

    path: Path
    kind: type | None
    attributes: tuple[tuple[str, object], ...]
    missing: tuple[str, ...]
    children: Path | None

    def changed(self, module: nn.Module) -> str | None:
        path, kind, attributes, missing, children = self
        for name in path:
            module = module._modules.get(name)
            if module is None:
                return f"{'.'.join(path)} is gone"
        d = module.__dict__
        if kind is not None:
            if type(module) is not kind:
                return f"{'.'.join(path)} is a {type(module).__name__} now"
            if (
                plan.observed(module)
                if plan.is_compiling()
                else d["_forward_hooks"]
                or d["_forward_pre_hooks"]
                or d["_backward_hooks"]
                or d["_backward_pre_hooks"]
            ):
                return f"{'.'.join(path)} has hooks"
            if "forward" in d:
                return f"{'.'.join(path)} has a forward of its own"
        for name, value in attributes:
            if d.get(name, Absent) != value:
                return f"{'.'.join((*path, name))} has changed"
        for name in missing:
            if hasattr(module, name):
                return f"{'.'.join((*path, name))} is new"
        if children is not None and tuple(d["_modules"]) != children:
            return f"{'.'.join(path)} has other children now"
        return None


class Wiring(NamedTuple):
    """How a module computes Coordinate Attention.

    conv1, bn1, act, conv_h, conv_w: paths of the leaves that play these parts; bn1 and act may be absent.
    chain: the children that forward calls between the pools and the gates' convolutions, in order.
    tail: the activation that forward itself applies after them, if any.
    activation: what act, or tail, was found to be; None for one that no kernel knows.
    act_type: act's class where it is one of the user's own.
    size: (H, W) of x where pools are built for one size, None for each free one.
    strict: submodules after whose change the module runs its own forward; soft: ... the hybrid tier.
    codes: of the module's class and of all others that are not torch's and that it calls.
    as_published: whether the children are given tensors laid out as in CoordAtt, so that hooks see the same.
    """

    conv1: Path
    bn1: Path | None
    act: Path | None
    conv_h: Path
    conv_w: Path
    chain: tuple[Path, ...]
    tail: str | None
    activation: str | None
    act_type: type | None
    skip: bool = False
    size: tuple[int | None, int | None] | None = None
    strict: tuple[Watch, ...] = ()
    soft: tuple[Watch, ...] = ()
    codes: tuple[Code, ...] = ()
    as_published: bool = True

    def children(self, module: nn.Module) -> dict[str, nn.Module]:
        """The parts under CoordAtt's names, with stand-ins for what is no child. KeyError for one that is
        gone."""
        if self.act is None:
            act = plan.MADE.get(self.activation)
        else:
            act = find(module, self.act)
            if self.act_type is not None and type(act) is self.act_type:
                act = plan.MADE.get(self.activation, act)
        return {
            "pool_h": _POOL_H,
            "pool_w": _POOL_W,
            "conv1": find(module, self.conv1),
            "bn1": _NO_NORM if self.bn1 is None else find(module, self.bn1),
            "act": act,
            "conv_h": find(module, self.conv_h),
            "conv_w": find(module, self.conv_w),
        }

    def arguments(self, module: nn.Module, x, codes: tuple[Code, ...]) -> tuple | Detour:
        """As plan.arguments; also tells when the module has to run its own forward."""
        if isinstance(x, Tensor):
            if x.dim() != 4:
                return Detour(plan.ORIGINAL, f"x has {x.dim()} dimensions")
        elif not isinstance(x, torch.fx.Proxy):
            return Detour(plan.ORIGINAL, f"x is a {type(x).__name__}")
        if len(module._coordatt_fast_own.__dict__) != module._coordatt_fast_size:
            return Detour(plan.ORIGINAL, "its class has other attributes now")
        for code in codes:
            if why := code.changed():
                return Detour(plan.ORIGINAL, why)
        for watch in self.strict:
            if why := watch.changed(module):
                return Detour(plan.ORIGINAL, why)
        if self.size is not None and isinstance(x, Tensor):
            for have, built in zip(x.shape[2:], self.size):
                if built is not None and have != built:
                    size = " x ".join("any" if s is None else str(s) for s in self.size)
                    return Detour(plan.ORIGINAL, f"the pools are built for maps of {size}")
        soft = None
        for watch in self.soft:
            if soft := watch.changed(module):
                break
        if soft is None:
            try:
                children = self.children(module)
            except KeyError as missing:
                soft = f"no child of the name {missing}"
        if soft is None:
            if self.activation is None and self.act is None:
                soft = "there is no activation"
            else:
                found = plan.arguments({"_modules": children, "skip": self.skip}, x)
        if soft is not None:
            found = Detour(plan.HYBRID, soft)
            if why := plan.obstacle(x):
                found = Detour(plan.REFERENCE, why)
        if type(found) is not tuple and (why := self._only_original(module)):
            return Detour(plan.ORIGINAL, why)
        return found

    def _only_original(self, module: nn.Module) -> str | None:
        """Why the children cannot be called in place of the module's own forward."""
        try:
            leaves = [find(module, path) for path in (self.conv_h, self.conv_w, *self.chain)]
        except KeyError as missing:
            return f"no child of the name {missing}"
        if plan.observed(nn.Identity()):
            return "there are global module hooks"
        if not self.as_published:
            for leaf in leaves:
                if any(plan.observed(part) for part in leaf.modules()):
                    return "its children have hooks and are given tensors in another layout than CoordAtt's"
        return None

    def by_children(self, module: nn.Module, x: Tensor, fast: bool) -> Tensor:
        """The hybrid (fast) and reference tiers, around the module's own children."""
        pooled = ops.pool(x) if fast else reference.pool(x)
        return self.gated(module, x, self.chained(module, pooled, fast), fast)

    def gated(self, module: nn.Module, x: Tensor, y: Tensor, fast: bool) -> Tensor:
        """The rest of that, from the squeezed features y [N, M, H + W, 1] on."""
        y_h, y_w = reference.split(plan.laid_out(find(module, self.conv_h), y, fast), x)
        s_h, s_w = find(module, self.conv_h)(y_h), find(module, self.conv_w)(y_w)
        fast = fast and plan.gate_fits(x, s_h, s_w)
        return ops.gate(x, s_h, s_w, self.skip) if fast else reference.gate(x, s_h, s_w, self.skip)

    def chained(self, module: nn.Module, pooled: Tensor, fast: bool = False) -> Tensor:
        """The squeezed features [N, M, H + W, 1] of pooled [N, C, H + W, 1] by the module's own children."""
        y = pooled
        for path in self.chain:
            child = find(module, path)
            y = child(plan.laid_out(child, y, fast))
        return y if self.tail is None else reference.ACTIVATIONS[self.tail].function(y)

    def by_parts(self, module: nn.Module, pooled: Tensor) -> Tensor:
        """The same as the fused tier computes them, in plain PyTorch: for the proof that it may."""
        y = find(module, self.conv1)(pooled)
        if self.bn1 is not None:
            y = find(module, self.bn1)(y)
        if self.activation is not None:
            return reference.ACTIVATIONS[self.activation].function(y)
        return y if self.act is None else find(module, self.act)(y)


class Kept:
    """What accelerate leaves on a module: its wiring (or its steps, containers.py), the same object on all
    modules that are wired alike.

    Compiled code is guarded by which object it is, and takes what it says for constants; modules that are
    compiled one by one share their code.
    """

    def __init__(self, wiring: Any) -> None:
        self.wiring = wiring
        _KEPT[id(self)] = self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return kept, (self.wiring,)


_KEPT = weakref.WeakValueDictionary()


def kept(wiring: Any) -> Kept:
    return next((known for known in list(_KEPT.values()) if known.wiring == wiring), None) or Kept(wiring)


def as_constant(which: int) -> Any:
    """For compiled code; without its codes, which change by themselves."""
    return _KEPT[which].wiring._replace(codes=())


# What torch.compiler.assume_constant_result does, without importing the compiler.
as_constant._dynamo_marked_constant = True


def find(module: nn.Module, path: Path) -> nn.Module:
    """The submodule at path; KeyError where there is none."""
    for name in path:
        module = module._modules[name]
        if module is None:
            raise KeyError(name)
    return module


def blank() -> dict:
    """The instance dictionary of a module that nothing was done to."""
    return {name: type(value)() if name in _CONTAINERS else value for name, value in _BLANK.items()}


def walk(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """named_modules() of a module whose class may have one of its own."""
    found, seen, waiting = [], set(), [("", module)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        children = module.__dict__.get("_modules", {})
        waiting += [(f"{path}.{n}" if path else n, c) for n, c in reversed(children.items()) if c is not None]
    return found


def watch(path: Path, module: nn.Module, codes: list[Code] | None, *, container: bool) -> Watch:
    """A Watch on module as it is now: on what its codes read, or on all attributes where it is torch's own.

    ValueError for an attribute whose changes could not be seen.
    """
    d, kind, attributes = module.__dict__, type(module), []
    asked = sorted({name for code in codes or () for name in code.own | code.strings})
    for name in d if codes is None else asked:
        if name in OWN or name == "forward":
            continue
        value = d.get(name, Absent)
        if isinstance(value, Tensor):
            raise ValueError(f"{'.'.join((*path, name))} is a tensor outside parameters and buffers")
        if value is not Absent and not (_is_plain(value) if codes is None else is_data(value)):
            raise ValueError(f"changes of {'.'.join((*path, name))} could not be seen")
        if value is not Absent or not is_of_torch(owner(kind, name)):
            attributes.append((name, snapshot(value)))
    missing = tuple(name for name in asked if not hasattr(module, name))
    children = tuple(d["_modules"]) if container else None
    return Watch(path, kind if path else None, tuple(attributes), missing, children)


_BLANK = nn.Module().__dict__
_CONTAINERS = frozenset(name for name, value in _BLANK.items() if isinstance(value, (dict, set)))
OWN = frozenset(_BLANK) | {"_compiled_call_impl"}
_PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)
_FUNCTIONS = (type(lambda: None), type(len))


def _is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, (*_PLAIN_TYPES, *_FUNCTIONS))


def snapshot(value):
    """A copy of plain containers; any other value itself."""
    if type(value) is dict:
        return {key: snapshot(entry) for key, entry in value.items()}
    if type(value) in (list, set):
        return type(value)(map(snapshot, value))
    return value
