"""Runs a forward on a tensor that does not let its sizes be looked at, only handed on.

What runs so does the same for every map: it cannot branch on N, H, W, dtype, layout, device or values, and no
function with a threshold, a size or a position of its own goes unseen. code.py has the words it may use.
"""

import threading

import torch
from torch import Tensor

from coordatt_fast import internals
from coordatt_fast.code import FUNCTIONS, Different

# What was looked at in this thread's run: a forward may catch the exception.
_noticed = threading.local()

_GETTERS = {getattr(torch.Tensor, name).__get__: name for name in ("shape", "ndim", "mT")}
_THRESHOLDS = frozenset({-3.0, 0.0, 1.0, 3.0, 6.0})
_CLAMPS = ("clamp", "clamp_", "clip", "clip_", "hardtanh", "hardtanh_")
_ARITHMETIC = frozenset(
    "add radd iadd sub subtract mul rmul imul multiply div divide truediv itruediv true_divide".split()
)
# Between them an intermediate result overflows no earlier than the activation's own x (x + 3).
_FACTORS = (0.01, 100.0)


def _different(why: str) -> Different:
    _noticed.why = why
    return Different(why)


def _look(self, *args, **kwargs):
    raise _different("its forward looks at the size of its input")


def _hide(cls: type) -> type:
    """Every way to learn what the number is raises Different."""
    for name in (
        "eq ne lt le gt ge bool int float complex trunc floor ceil round abs invert sub rsub mod rmod "
        "floordiv rfloordiv divmod rdivmod pow rpow and rand or ror xor rxor lshift rlshift rshift rrshift "
        "format repr str hash"
    ).split():
        setattr(cls, f"__{name}__", _look)
    return cls


@_hide
class Size(int):
    """N, H or W, or a sum or product of them."""

    def __add__(self, other):
        return _combined(int.__add__, self, other)

    def __mul__(self, other):
        if type(other) is int:  # channels
            return Size(int.__mul__(self, other))
        return _combined(int.__mul__, self, other)

    def __truediv__(self, other):
        return _combined(int.__truediv__, self, other)

    def __rtruediv__(self, other):
        return Share(other / opened(self)) if type(other) in (int, float) else NotImplemented

    def __neg__(self):
        return Size(int.__neg__(self))

    __radd__, __rmul__ = __add__, __mul__


@_hide
class Share(float):
    """One over a size."""


def _combined(function, a, b):
    if isinstance(b, Tensor):
        return NotImplemented
    if type(b) is not Size:
        raise _different("its forward computes with the size of its input and another number")
    value = function(a, b)
    return Size(value) if type(value) is int else Share(value)


def opened(value):
    """value as a layer of torch's takes it: what is hidden in it is shown again."""
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor) if type(value) is Blind else value
    if type(value) is Size:
        return int.__index__(value)
    if type(value) is Share:
        return float.__pos__(value)
    if isinstance(value, slice):
        return slice(*map(opened, (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: opened(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(opened, value)) if type(value) in (tuple, list) else tuple(map(opened, value))
    return value


def closed(value):
    """value as a blind forward sees it."""
    if isinstance(value, torch.Size):
        # The channels of a map are the module's own, and known to it.
        return tuple(size if d == 1 and len(value) == 4 else Size(size) for d, size in enumerate(value))
    if isinstance(value, Tensor):
        return value.as_subclass(Blind)
    if isinstance(value, (tuple, list)):
        return type(value)(map(closed, value))
    return value


class Blind(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _GETTERS.get(function) or getattr(function, "__name__", "?")
        if function not in _GETTERS:
            if function not in FUNCTIONS:
                if name == "__get__":
                    name = function.__self__.__name__
                raise _different(f"its forward uses {name}, which Coordinate Attention does not")
            _look_at(name, args, kwargs)
        _noticed.trace.append((name, _described(args), _described(kwargs)))
        with internals.WithoutSubclasses():
            out = function(*opened(args), **{key: opened(value) for key, value in kwargs.items()})
            if name in ("size", "shape") and isinstance(out, int):
                dim = args[1] if len(args) > 1 else kwargs["dim"]
                known = args[0].as_subclass(Tensor).dim() == 4 and dim in (1, -3)
                return out if known else Size(out)
            return closed(out)

    def __getattr__(self, name: str):
        raise _different(f"its forward asks its input for {name}")


def _described(value):
    """A call's arguments, the same for all sizes."""
    if isinstance(value, Tensor):
        return "tensor"
    if type(value) in (Size, Share):
        return "size"
    if isinstance(value, slice):
        return "slice", *map(_described, (value.start, value.stop, value.step))
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((key, _described(entry)) for key, entry in value.items())
    return repr(value)


def _is_free(value, also=()) -> bool:
    """Whether a size is the map's, or one of those that are the same for every map."""
    if isinstance(value, (tuple, list)):
        return all(_is_free(entry, also) for entry in value)
    return value is None or type(value) is Size or (type(value) is int and (value == 1 or value in also))


def _look_at(name: str, args: tuple, kwargs: dict) -> None:
    """Raises Different for arguments that would make a function of all maps one of some."""
    if name == "__getitem__":
        index = args[1] if type(args[1]) is tuple else (args[1],)
        for entry in index:
            parts = (entry.start, entry.stop) if isinstance(entry, slice) and entry.step is None else (entry,)
            if not all(part is None or part is Ellipsis or type(part) is Size for part in parts):
                raise _different("its forward takes a fixed part of a map")
        return
    given = [*args[1:], *kwargs.values()]
    fixed = "its forward is built for maps of one size"
    if name.startswith(("split", "tensor_split", "adaptive", "avg_pool")):
        sizes = args[1] if len(args) > 1 else given[0]
        if not _is_free(sizes) or (name.startswith("avg") and len(given) > 1):
            raise _different(fixed)
        return
    if name == "narrow":
        if len(given) != 3 or not (_is_free(given[1], (0,)) and type(given[2]) is Size):
            raise _different(fixed)
        return
    if name.strip("_") in ("view", "reshape", "expand", "broadcast_to"):
        if not _is_free(given, (-1, *_noticed.channels)):
            raise _different(fixed)
        return
    if name.strip("_") == "squeeze":
        shape = args[0].as_subclass(Tensor).shape
        if len(given) != 1 or type(given[0]) is not int or shape[given[0]] != 1:
            raise _different("its forward drops dimensions of one, which may be the map's own")
        return
    numbers = [v for v in given if type(v) in (int, float)]
    if name in _CLAMPS:
        if not all(float(v) in _THRESHOLDS for v in numbers):
            raise _different(f"its forward clamps values to {', '.join(map(str, numbers))}")
    elif name.strip("_") in _ARITHMETIC:
        for v in numbers:
            if v != 0 and not _FACTORS[0] <= abs(v) <= _FACTORS[1]:
                raise _different(f"its forward computes with the constant {v}")


def run(call, x: Tensor, channels: tuple) -> list:
    """call(x), blindly: what was done to tensors, in order, without their sizes.

    channels: the sizes that are the module's own. Raises Different for what cannot run so.
    """
    _noticed.why, _noticed.trace, _noticed.channels = None, [], channels
    with torch.no_grad():
        call(x.as_subclass(Blind))
    if _noticed.why:
        raise Different(_noticed.why)
    return _noticed.trace
