"""What a module of any class does with its children, where that is a fixed sequence of calls, sums, products.

Its forward is read (code.py) and then run once, on a stand-in for the module and for the map: each child only
writes down that it was called. Whatever else forward does with the map ends that.
"""

import functools
import inspect
import operator
import types
from typing import NamedTuple

import torch
from torch import nn

from coordatt_fast import internals
from coordatt_fast.code import Code, Different, code_of, is_read, strange_words
from coordatt_fast.neighbours import run
from coordatt_fast.wiring import Watch, watch

_FUNCTIONS = {
    "add": operator.add,
    "iadd": operator.iadd,
    "mul": operator.mul,
    "imul": operator.imul,
    "cat": lambda *maps, dim: torch.cat(maps, dim),
}


class Step(NamedTuple):
    """One value: a chain of children called on another one, or a function of several.

    names: of the children; or function: a key of _FUNCTIONS. inputs: which values, by their order, the map is
    0. last: for each of them, whether nothing reads it later. dim: of "cat".
    """

    names: tuple[str, ...]
    function: str
    inputs: tuple[int, ...]
    last: tuple[bool, ...]
    dim: int


class Steps(NamedTuple):
    """How a module's forward runs its children.

    steps: None for a Sequential, whose children are read at each call. chain: the children's names, where
    forward calls them one after the other and does nothing else. kind: the class that was read. watch and
    codes: of what forward read.
    """

    steps: tuple[Step, ...] | None = None
    chain: tuple[str, ...] | None = None
    kind: type | None = None
    watch: Watch | None = None
    codes: tuple[Code, ...] = ()

    def changed(self, module: nn.Module, codes: tuple[Code, ...]) -> str | None:
        """Why forward may do something else by now; None where it does what it did."""
        for code in codes:
            if why := code.changed():
                return why
        d, kind, compiling = module.__dict__, type(module), internals.is_compiling()
        for name, child in d["_modules"].items():
            if child is None or name in d or not (compiling or getattr(kind, name, None) is None):
                return f"{name} is None now, or hidden by an attribute"
        return self.watch.changed(module) if self.watch else None

    def run(self, module: nn.Module, x):
        """What module's own forward returns for x."""
        children, values = module._modules, {0: x}
        for i, step in enumerate(self.steps or (), start=1):
            found = [values.pop(j) if last else values[j] for j, last in zip(step.inputs, step.last)]
            if step.function == "cat":
                values[i] = _FUNCTIONS["cat"](*found, dim=step.dim)
            elif step.function:
                values[i] = _FUNCTIONS[step.function](*found)
            else:
                values[i] = run([children[name] for name in step.names], found.pop())
        return values[i]


def steps_of(module: nn.Module) -> Steps:
    """What module's forward does; Different, with the reason, where that cannot be told or is something
    else."""
    kind, children = type(module), module._modules
    if not is_read(module):
        raise Different(f"{kind.__name__} is torch's own")
    if "forward" in module.__dict__:
        raise Different("its forward is replaced on the instance")
    if None in children.values():
        raise Different("a child is None")
    first, *others = list(inspect.signature(kind.forward).parameters.values())[1:] or [None]
    simple = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if first is None or first.kind not in simple or any(p.default is p.empty for p in others):
        raise Different("its forward does not take one input")
    code = code_of(kind)
    if strange := strange_words(module, code):
        raise Different(f"its forward uses {', '.join(sorted(set(strange)))}")
    if "training" in code.own | code.strings:
        raise Different("its forward depends on its mode")
    asked = (code.own | code.words | code.strings) & module.__dict__.keys()
    if any(isinstance(module.__dict__[name], (types.FunctionType, types.MethodType)) for name in asked):
        raise Different("its forward uses a function among its attributes")
    try:
        watched = watch((), module, [code], container=True)
    except ValueError as error:
        raise Different(str(error)) from error
    steps = _in_chains(*_recorded(module))
    if any(name in vars(k) for name in children for k in kind.__mro__):
        raise Different("a child has the name of an attribute of its class")
    chain = steps[0].names if len(steps) == 1 and steps[0].names else None
    return Steps(steps, chain, kind, watched, (code,))


class _Value:
    """Stands for a map. Sums, products and torch.cat are written down; nothing else can be done with it."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, recorder: "_Recorder", index: int) -> None:
        self._recorder, self._index = recorder, index

    def _two(self, other, function: str, turned: bool = False):
        if type(other) is not _Value:
            raise Different("its forward computes with something else than maps")
        first, second = (other, self) if turned else (self, other)
        return self._recorder.write("", function, first, second)

    __add__ = functools.partialmethod(_two, function="add")
    __iadd__ = functools.partialmethod(_two, function="iadd")
    __mul__ = functools.partialmethod(_two, function="mul")
    __imul__ = functools.partialmethod(_two, function="imul")
    __radd__ = functools.partialmethod(_two, function="add", turned=True)
    __rmul__ = functools.partialmethod(_two, function="mul", turned=True)

    def _look(self, *_):
        raise Different("its forward looks at its input")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __len__ = __iter__ = __getitem__ = _look

    @classmethod
    def __torch_function__(cls, function, _types, args=(), kwargs=None):
        dim = {"dim": 0} | dict(zip(("dim",), args[1:])) | (kwargs or {})
        known = function in (torch.cat, torch.concat, torch.concatenate) and args and len(args) <= 2
        if not known or list(dim) != ["dim"] or type(dim["dim"]) is not int:
            raise Different(f"its forward calls {getattr(function, '__name__', function)}")
        maps = list(args[0])
        if not maps or any(type(value) is not cls for value in maps):
            raise Different("its forward computes with something else than maps")
        return maps[0]._recorder.write("", "cat", *maps, dim=dim["dim"])


class _Recorder:
    """What was done, in order: the child's name or the function, the inputs, dim."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, tuple[int, ...], int]] = []

    def write(self, name: str, function: str, *inputs: _Value, dim: int = 0) -> _Value:
        self.calls.append((name, function, tuple(value._index for value in inputs), dim))
        return _Value(self, len(self.calls))

    def child(self, name: str):
        def call(*args, **kwargs):
            if kwargs or len(args) != 1 or type(args[0]) is not _Value:
                raise Different(f"{name} takes other inputs than one map")
            return self.write(name, "", args[0])

        return call


def _recorded(module: nn.Module) -> tuple[list, int]:
    """The calls of children and functions that its forward makes, and which of their values it returns."""
    recorder = _Recorder()
    stand_in = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    children = {name: recorder.child(name) for name in module._modules}
    stand_in.__dict__.update(_parameters={}, _buffers={}, _modules=children)
    try:
        out = type(module).forward(stand_in, _Value(recorder, 0))
    except Different:
        raise
    except Exception as error:
        raise Different(f"its forward raised {type(error).__name__}: {error}") from error
    if type(out) is not _Value or not recorder.calls:
        raise Different("its forward returns something else than a map that it made")
    return recorder.calls, out._index


def _in_chains(calls: list, result: int) -> tuple[Step, ...]:
    """The calls with those in a row, where nobody else reads what is handed on, put together."""
    if result != len(calls):
        raise Different("its forward goes on after its result is made")
    reads = [i for *_, inputs, _ in calls for i in inputs]
    rows: list[list] = []  # name, function, inputs and dim as they are, but the names of a row in one
    order = {0: 0}  # the values by their new order
    for i, (name, function, inputs, dim) in enumerate(calls, start=1):
        if name and rows and rows[-1][0] and inputs == (i - 1,) and reads.count(i - 1) == 1:
            rows[-1][0] += (name,)
        else:
            rows.append([(name,) if name else (), function, tuple(order.get(j) for j in inputs), dim])
        order[i] = len(rows)
    later: set = set()
    steps = []
    for names, function, inputs, dim in reversed(rows):
        last = tuple(j not in later and j not in inputs[k + 1 :] for k, j in enumerate(inputs))
        later |= set(inputs)
        steps.append(Step(names, function, inputs, last, dim))
    return tuple(reversed(steps))
