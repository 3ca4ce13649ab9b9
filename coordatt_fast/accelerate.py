"""accelerate(model): every module that computes Coordinate Attention, whatever its class, runs fused."""

import functools
import inspect
import logging
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from coordatt_fast import neighbours, ops, plan
from coordatt_fast.found import Neighbours, are_known, neighbours_in
from coordatt_fast.module import CoordAtt, Scriptable
from coordatt_fast.neighbours import BLOCK as _ATTRIBUTE
from coordatt_fast.neighbours import CONTAINER, is_plain_call, is_sequence
from coordatt_fast.recognise import is_suspect, recognise
from coordatt_fast.wiring import Wiring, as_constant, kept, walk

log = logging.getLogger(__name__)


class Subclassed(nn.Module):
    """What accelerate makes of a module: a subclass of the module's own class, with another forward before
    it.

    The object, its children, parameters, attributes and hooks stay what they are, so that optimizers, state
    dicts and every reference to it remain valid. Made by accelerate only.
    """

    def __init_subclass__(cls, **kwargs) -> None:
        """Ends here: what a class of the user's does with its subclasses is not meant for these."""


class Accelerated(Subclassed):
    """A block that computes Coordinate Attention."""

    def forward(self, x):
        kept = self.__dict__.get(_ATTRIBUTE)
        if kept is None:
            return super().forward(x)
        wiring = as_constant(id(kept)) if plan.is_compiling() else kept.wiring
        found = wiring.arguments(self, x, kept.wiring.codes)
        if type(found) is tuple:
            try:
                return ops.attention(x, *found)
            except RuntimeError:
                plan.check_plain(wiring.children(self), x)
                raise
        if found.tier == plan.ORIGINAL:
            return super().forward(x)
        return wiring.by_children(self, x, fast=found.tier == plan.HYBRID)

    def __reduce_ex__(self, protocol):
        return _blank, (self._coordatt_fast_class,), self.__getstate__()

    def __prepare_scriptable__(self) -> nn.Module:
        wiring = self.__dict__[_ATTRIBUTE].wiring
        return Scriptable(wiring.children(self), wiring.skip, self.training)


class Joined(Subclassed):
    """A module that holds a block, and right before it a normalisation that the block takes in."""

    def __new__(cls, *args, **kwargs):
        """A module of the class itself: parts of a Sequential are made so."""
        return cls._coordatt_fast_class(*args, **kwargs)

    def forward(self, x):
        kept = self.__dict__.get(CONTAINER)
        if kept is not None and is_plain_call(x):
            steps = as_constant(id(kept)) if plan.is_compiling() else kept.wiring
            own = self._coordatt_fast_own
            if len(own.__dict__) == own._coordatt_fast_size and not steps.changed(self, kept.wiring.codes):
                return steps.run(self, x)
        return super().forward(x)

    def __reduce_ex__(self, protocol):
        return _blank, (self._coordatt_fast_class, Joined), self.__getstate__()

    def __prepare_scriptable__(self) -> nn.Module:
        cls: Any = self._coordatt_fast_class
        plain = object.__new__(cls)
        plain.__dict__.update(self.__dict__, _modules=dict(self._modules))
        del plain.__dict__[CONTAINER]
        return plain


def _forward_of_sequence(self, input):
    if CONTAINER in self.__dict__ and is_plain_call(input) and is_sequence(type(self)):
        own = self._coordatt_fast_own
        if len(own.__dict__) == own._coordatt_fast_size:
            return neighbours.run(self._modules.values(), input)
    return super(Subclassed, self).forward(input)


def _forward_of_any(self, *args, **kwargs):
    """For classes whose forward has optional inputs or another name for x."""
    if len(args) == 1 and not kwargs:
        return self._coordatt_fast_base.forward(self, args[0])
    return self._coordatt_fast_class.forward(self, *args, **kwargs)


@functools.cache
def _subclass(cls: Any, base: Any) -> Any:
    # The original class by name: its place in the order varies where a framework subclasses this one.
    namespace: dict[str, Any] = {"__module__": __name__, "__doc__": base.__doc__}
    namespace |= {"_coordatt_fast_class": cls, "_coordatt_fast_base": base}
    # A plain signature where there is one: torch.fx and exporters take their inputs' names from it.
    if base is Joined and is_sequence(cls):
        namespace["forward"] = _forward_of_sequence
    elif list(inspect.signature(cls.forward).parameters)[1:] != ["x"]:
        namespace["forward"] = _forward_of_any
    # Without what a metaclass of the user's does to new classes, registries for instance.
    made = type.__new__(type(cls), f"Accelerated{cls.__name__}", (base, cls), namespace)
    # What is set on type(module) later hides what the original class has: wiring.py counts the names.
    made._coordatt_fast_own = made
    made._coordatt_fast_size = len(made.__dict__) + 1
    return made


def _blank(cls: type, base: type = Accelerated) -> nn.Module:
    """A module of the class that accelerate made of cls, without its state, for copies and pickles."""
    return object.__new__(_subclass(cls, base))


class Replaced(NamedTuple):
    """A module that accelerate took over.

    path: in the model, "" for the model itself; cls: its class's name; tier: "fused" or "hybrid", where
    nothing else interferes with a call; differs: how it differs from CoordAtt(inp, oup), in words.
    """

    path: str
    cls: str
    tier: str
    differs: str


class Skipped(NamedTuple):
    """A module that looks like Coordinate Attention and was left alone, and why."""

    path: str
    cls: str
    reason: str


@dataclass
class Report:
    """What accelerate did: the modules it took over, those it left alone with reasons, and what blocks take
    in of what stands before them. str() is for reading."""

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    neighbours: list[Neighbours] = field(default_factory=list)

    def __str__(self) -> str:
        count = len(self.replaced)
        lines = [f"{count} module{'s' * (count != 1)} accelerated, {len(self.skipped)} left alone"]
        for path, cls, tier, differs in self.replaced:
            lines.append(f"  {path or '(the model)'}  {cls}: {tier}{', ' if differs else ''}{differs}")
        for path, cls, reason in self.skipped:
            lines.append(f"  {path or '(the model)'}  {cls}: left alone, {reason}")
        for path, cls, norm, activation in self.neighbours:
            lines.append(f"  {path}  {cls}: takes in {norm}{' and ' if activation else ''}{activation}")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Makes every module in model that computes Coordinate Attention run by this package, in place, together
    with the BatchNorm2d and the activation right before it.

    A module is recognised by its structure (1x1 convolutions C -> m, m -> C, m -> C, at most one
    normalisation, no other parameters) and then has to prove itself: a twin of it with random weights must
    give the outputs, gradients and running statistics of Coordinate Attention in eval and in training mode,
    and the code of its forward must say nothing that could make other inputs an exception. Names do not
    matter. What computes something else, or may, is left alone; so is one whose examination raises.

    A normalisation and an activation are taken in by the block after them, CoordAtt's too, where the module
    that holds them is a Sequential, or has a forward whose code shows that nobody else sees what they
    compute. Whatever makes a difference when it is called (a hook, another flag, dtype or child) makes these
    parts run by themselves.

    The objects stay the same and only change their class, to a subclass of their own: parameters, state
    dict, hooks, attributes and references to them are untouched; so are random numbers. model may be a
    wrapper (torch.compile, DataParallel, DistributedDataParallel), on any device, in any dtype, or be such a
    module itself. restore(model) undoes it.

    Returns a Report; UserWarning when there is nothing to accelerate. TypeError for a model that is no
    nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes an nn.Module, got a {type(model).__name__}")
    report = Report()
    taken: set[int] = set()  # modules that run fused, or hold one that does
    left: set[int] = set()  # look-alikes, and what holds one
    already = False
    # Children come after their parents in walk(): the innermost module that fits is the one.
    for path, module in reversed(walk(model)):
        name = type(module).__name__
        children = list(module.__dict__.get("_modules", {}).values())
        if isinstance(module, (Accelerated, CoordAtt)):
            already = True
            kind = "a coordatt_fast.CoordAtt" if isinstance(module, CoordAtt) else "accelerated"
            report.skipped.append(Skipped(path, name.removeprefix("Accelerated"), f"already {kind}"))
            taken.add(id(module))
        elif any(id(child) in taken for child in children):
            taken.add(id(module))
        else:
            try:
                wiring = recognise(module) if is_suspect(module) else None
                if wiring is not None:
                    described = _describe(module, wiring)
                    _take_over(module, wiring)
                    report.replaced.append(Replaced(path, name, *described))
                    taken.add(id(module))
                elif any(id(child) in left for child in children):
                    left.add(id(module))
            except Exception as reason:  # also what a class's own code raises: then it is left alone
                if not any(id(child) in left for child in children):
                    report.skipped.append(Skipped(path, name, str(reason)))
                left.add(id(module))
    report.replaced.reverse()
    report.skipped.reverse()
    _join(model, report)
    log.info("coordatt_fast: %s", report)
    if not report.replaced and not already:
        warnings.warn(f"accelerate found nothing to accelerate: {report}", stacklevel=2)
    return report


def _take_over(module: nn.Module, wiring: Wiring) -> None:
    cls = _subclass(type(module), Accelerated)  # type: ignore[arg-type]  # mypy: Module.__hash__
    object.__setattr__(module, "__class__", cls)
    module.__dict__[_ATTRIBUTE] = kept(wiring)


def _join(model: nn.Module, report: Report) -> None:
    """Lets the blocks take in the normalisations before them, in every module that holds both."""
    for path, module in reversed(walk(model)):
        try:
            found = None if isinstance(module, Subclassed) else neighbours_in(module, path)
        except Exception as reason:  # also what a class's own code raises: then it is left alone
            log.debug("coordatt_fast: %s: %s", path, reason)
            continue
        if found is not None:
            steps, chains, rows = found
            for chain, inner in chains:
                chain.__dict__[CONTAINER] = kept(inner)
            cls: Any = type(module)
            object.__setattr__(module, "__class__", _subclass(cls, Joined))
            module.__dict__[CONTAINER] = kept(steps)
            report.neighbours += reversed(rows)
    report.neighbours.reverse()


def restore(model: nn.Module) -> list[str]:
    """Undoes accelerate: every module in model runs its own forward again. Returns their paths, those of
    modules around blocks included.

    The modules are the very objects they always were; parameters keep their present values.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore takes an nn.Module, got a {type(model).__name__}")
    paths = []
    for path, module in walk(model):
        kept = [module.__dict__.pop(name, None) for name in (_ATTRIBUTE, CONTAINER)]
        if isinstance(module, Subclassed) and kept != [None, None]:
            # A class that a framework made of ours meanwhile stays: the original forward runs without the
            # rest.
            if type(module) is module._coordatt_fast_own:
                object.__setattr__(module, "__class__", module._coordatt_fast_class)
            paths.append(path)
    return paths


def _describe(module: nn.Module, wiring: Wiring) -> tuple[str, str]:
    """The tier of an undisturbed call, and how the module differs from CoordAtt(inp, oup)."""
    children = wiring.children(module)
    convolutions = [children[name] for name in ("conv1", "conv_h", "conv_w")]
    bn1, act = children["bn1"], children["act"]
    differs = []
    if wiring.activation != "hard_swish":
        name = wiring.activation or (type(act).__name__ if wiring.act else "no activation")
        differs.append(name)
    if wiring.bn1 is None:
        differs.append("no normalisation")
    elif type(bn1) is not nn.BatchNorm2d:
        differs.append(type(bn1).__name__)
    if all(conv.bias is None for conv in convolutions):
        differs.append("no bias")
    elif any(conv.bias is None for conv in convolutions):
        differs.append("bias in some convolutions")
    if wiring.skip:
        differs.append("adds x")
    if wiring.size is not None:
        differs.append("for maps of " + " x ".join("any" if s is None else str(s) for s in wiring.size))
    for name in ("conv1", "bn1", "conv_h", "conv_w"):
        path = getattr(wiring, name)
        if path is not None and path != (name,):
            differs.append(f"{name} is {'.'.join(path)}")
    return plan.FUSED if are_known(children) else plan.HYBRID, ", ".join(differs)
