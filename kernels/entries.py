"""Every kernel as it would be compiled for given maps, without a GPU: for ahead-of-time sweeps."""

import contextlib
import threading
from itertools import chain
from typing import NamedTuple

import torch

from coordatt_fast.codes import NEEDS_ALL, NORM_BATCH, NORM_GIVEN

from . import launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


class Entry(NamedTuple):
    """What triton.compiler.ASTSource takes (fn, signature, constexprs, attrs), and triton.compile (options).

    arguments are those of the launch, tensors on the meta device; programs is its grid.
    """

    fn: object
    signature: dict
    constexprs: dict
    attrs: dict
    options: dict
    programs: int
    arguments: dict


def _entry(kernel, programs, arguments, constants) -> Entry:
    fn = getattr(kernel, "fn", kernel) if not hasattr(kernel, "arg_names") else kernel
    names = list(kernel.arg_names)
    if names[: len(arguments)] != list(arguments._fields):
        raise TypeError(f"{fn.__name__} takes {names[: len(arguments)]}, is given {arguments._fields}")
    given = arguments._asdict() | constants
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(names):
        value = given[name]
        if name in constants or value is None or (type(value) is int and value == 1):
            signature[name], constexprs[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attrs[i,] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif type(value) is int:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp64"  # eps and momentum
    return Entry(fn, signature, constexprs, attrs, launch.OPTIONS, programs, given)


_recording = threading.RLock()


@contextlib.contextmanager
def record(into: list[Entry]):
    """Within the block, this thread's calls of launch's functions append what they would launch, and launch
    nothing."""
    with _recording:
        before, thread = launch._run, threading.get_ident()

        def run(*call):
            if threading.get_ident() == thread:
                into.append(_entry(*call))
            else:
                before(*call)

        launch._run = run
        try:
            yield
        finally:
            launch._run = before


def by_operator(
    shape, mid: int, dtype: torch.dtype, nhwc: bool = False, norm: int = NORM_BATCH, activation: int = 0,
    skip: bool = False, param_dtype: torch.dtype | None = None, needs: int = NEEDS_ALL,
) -> dict[str, list[Entry]]:  # fmt: skip
    """The launches of every operator of launch, by its name, for a map of this shape [N, C, H, W].

    mid is M; norm and activation are the operators' codes; under NORM_BATCH inference takes given statistics.
    needs: what attend_backward is asked for.
    """
    n, c, h, w = shape

    def make(*size, dtype=param_dtype or dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    layout = torch.channels_last if nhwc else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
    acc = launch.accumulate_dtype(dtype)
    first = (make(mid, c, 1, 1), make(mid), *((make(mid), make(mid)) if norm else (None, None)))
    given = (make(mid), make(mid)) if norm else (None, None)
    last = (1e-5, make(c, mid, 1, 1), make(c), make(c, mid, 1, 1), make(c))
    batch = given if norm == NORM_GIVEN else (None, None)
    found = {}

    def call(name, *arguments):
        with record(found.setdefault(name, [])):
            return getattr(launch, name)(*arguments)

    call("attend", x, *first, *given, *last, activation, skip)
    results = call("attend_train", x, *first, *batch, *last, norm, activation, skip)
    if norm == NORM_BATCH:
        moved = (*given, make(dtype=torch.int64))
        call("attend_train_update", x, *first, *batch, *last, norm, activation, skip, *moved, 0.1)
        call("update_running_stats", *moved, results[2], *results[4:], 0.1)
    weights = (first[0], *first[2:], last[0], last[1], last[3])
    call("attend_backward", x, x, *results[1:], *weights, norm, activation, skip, needs)
    call("pool", x)
    call("pool_backward", make(n, c, h + w, 1, dtype=acc), x)
    s_h, s_w = make(n, c, h, 1, dtype=dtype), make(n, c, 1, w, dtype=dtype)
    call("gate", x, s_h, s_w, skip)
    call("gate_backward", x, x, s_h, s_w, skip)
    return found


def entries(*arguments, **keywords) -> list[Entry]:
    """The launches of by_operator(*arguments, **keywords), one after the other."""
    return list(chain.from_iterable(by_operator(*arguments, **keywords).values()))
