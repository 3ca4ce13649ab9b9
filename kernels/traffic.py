"""How many elements and bytes every kernel reads and writes, from its own index arithmetic: no GPU, no run.

An access is an element under a true mask, as the kernel is written: what the compiler drops or the hardware
repeats is not in it. Letters are the kernels' constants.
"""

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import NamedTuple

import torch

from coordatt_fast.codes import NORM_BATCH, NORM_GIVEN, NORM_NONE

from .entries import Entry

_MAPS = ("x_ptr", "g_ptr", "grad_ptr", "out_ptr", "dx_ptr")


class Moved(NamedTuple):
    """Bytes. read, written: a tensor counts once per launch that touches it, as memory gives and takes it at
    least; loaded, stored: every access, as the caches serve them.
    """

    read: int
    written: int
    loaded: int
    stored: int


class _Tally(dict):
    """(elements read, elements written) by name; of arguments that are None nothing is counted."""

    def read(self, count: int, *names: str) -> None:
        for name in names:
            if name in self:
                self[name] = (self[name][0] + count, self[name][1])

    def write(self, count: int, *names: str) -> None:
        for name in names:
            if name in self:
                self[name] = (self[name][0], self[name][1] + count)


def _images(a) -> int:
    return a.programs // math.ceil(a.C / a.BC)


def _small(a) -> SimpleNamespace:
    """Elements of the launch's maps, of their rows' and columns' small tensors, and of both."""
    lines = _images(a) * a.C
    return SimpleNamespace(
        map=lines * a.H * a.W, rows=lines * a.H, columns=lines * a.W, both=lines * (a.H + a.W)
    )


def _normalisation(t: _Tally, a, programs: int) -> None:
    if a.NORM != NORM_NONE:
        t.read(programs * a.M, "mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr")


def _blocks_of_rows(t: _Tally, a, programs: int, name: str) -> None:
    """Two numbers per m from every block of rows."""
    t.read(programs * 2 * min(a.blocks_of_rows, a.NBP) * a.M, name)


def _planes(t: _Tally, a, small: str) -> None:
    """Sums over rows and columns; rows wider than a tile are added up in memory."""
    e, tiles = _small(a), math.ceil(a.W / a.BW)
    t.read(e.rows * (tiles - 1), small)
    t.write(e.rows * tiles + e.columns, small)


def _contract(t: _Tally, a, small: str, weights: str, lines: int) -> None:
    t.read(_images(a) * a.C * lines, small)
    t.read(_images(a) * math.ceil(lines / a.LB) * a.C * a.M, weights)
    t.write(a.programs * lines * a.M, "partial_ptr")


def _expand(t: _Tally, a, weights: str, bias: str, lines: int) -> None:
    tiles = _images(a) * math.ceil(lines / a.LB)
    t.read(tiles * a.C * a.M, weights)
    t.read(tiles * a.C, bias)
    t.write(_images(a) * a.C * lines, "gates_ptr")


def _apply_gates(t: _Tally, a, source: str, target: str) -> None:
    e = _small(a)
    t.read(e.map, source)
    t.read(2 * e.map, "gates_ptr")
    t.write(e.map, target)


def _open_gates(t: _Tally, a) -> None:
    e = _small(a)
    t.read(e.rows, "s_h_ptr")
    t.read(e.columns, "s_w_ptr")
    t.write(e.both, "gates_ptr")


def _reduce_planes(t: _Tally, a) -> None:
    e = _small(a)
    t.read(e.map, "g_ptr", "x_ptr")
    t.read(e.columns + e.rows * math.ceil(a.W / a.BW), "gates_ptr")
    _planes(t, a, "ds_ptr")


def _move_statistics(t: _Tally, a) -> None:
    t.read(1, "tracked_ptr")
    t.write(1, "tracked_ptr")
    t.read(a.M, "running_mean_ptr", "running_var_ptr")
    t.write(min(a.rows, 1) * a.M, "running_mean_ptr", "running_var_ptr")


def _pool(t: _Tally, a) -> None:
    t.read(_small(a).map, "x_ptr")
    _planes(t, a, "means_ptr")
    if a.partial_ptr is not None:
        _contract(t, a, "means_ptr", "w1_ptr", a.H + a.W)


def _gate(t: _Tally, a) -> None:
    if a.NORM == NORM_BATCH:
        _blocks_of_rows(t, a, a.programs, "stats_ptr")
        t.read(a.programs * a.M, "gamma_ptr", "beta_ptr")
        if a.UPDATE > 0:
            _move_statistics(t, a)
    else:
        _normalisation(t, a, a.programs)
    if a.TRAIN:
        t.write(a.M, "saved_mean_ptr", "saved_var_ptr")
        t.read(a.M if a.NORM == NORM_GIVEN else 0, "var_ptr")
    else:
        t.read(a.programs * a.M, "b1_ptr")
    t.read(a.programs * (a.H + a.W) * a.BLOCKS * a.M, "z_ptr")
    _expand(t, a, "wh_ptr", "bh_ptr", a.H)
    _expand(t, a, "ww_ptr", "bw_ptr", a.W)
    _apply_gates(t, a, "x_ptr", "out_ptr")


def _gate_logits(t: _Tally, a) -> None:
    _open_gates(t, a)
    _apply_gates(t, a, "x_ptr", "out_ptr")


def _reduce(t: _Tally, a) -> None:
    _reduce_planes(t, a)
    _contract(t, a, "ds_ptr", "wh_ptr", a.H)
    _contract(t, a, "ds_ptr", "ww_ptr", a.W)


def _gate_backward(t: _Tally, a) -> None:
    _open_gates(t, a)
    _reduce_planes(t, a)
    _apply_gates(t, a, "g_ptr", "dx_ptr")


def _stats(t: _Tally, a) -> None:
    t.read(a.rows * a.BLOCKS * a.M, "partial_ptr")
    t.read(a.programs * a.M, "b1_ptr")
    t.write(a.rows * a.M, "squeezed_ptr")
    t.write(a.programs * 2 * a.M if a.NORM == NORM_BATCH else 0, "stats_ptr")


def _update(t: _Tally, a) -> None:
    t.read(a.M, "mean_ptr", "var_ptr")
    _move_statistics(t, a)


def _mix_backward(t: _Tally, a) -> None:
    _normalisation(t, a, a.programs)
    t.read(a.rows * a.BLOCKS * a.M, "partial_ptr")
    t.read(a.rows * a.M, "squeezed_ptr")
    t.write(a.rows * a.M, "du_ptr")
    t.write(a.programs * 2 * a.M, "sums_ptr")


# What the parts of the weights' gradients are of: rows, columns, both.
_RESULTS = (("dwh_ptr", "dbh_ptr"), ("dww_ptr", "dbw_ptr"), ("dw1_ptr",))


def _results(t: _Tally, a, splits: tuple) -> None:
    for (weights, *bias), count in zip(_RESULTS, splits):
        if count:
            t.write(a.C * a.M, weights)
            t.write(a.C, *bias)


def _weights(t: _Tally, a) -> None:
    _normalisation(t, a, a.programs)
    _blocks_of_rows(t, a, a.programs, "sums_ptr")
    t.write(a.M, "dgamma_ptr", "dbeta_ptr", "db1_ptr")
    groups, splits = math.ceil(a.C / a.BC), (a.splits_h, a.splits_w, a.splits_1)
    for left, lines, count in zip(("ds_ptr", "ds_ptr", "means_ptr"), (a.H, a.W, a.H + a.W), splits):
        if count:
            t.read(a.C * a.images * lines, left)
            t.read(groups * a.images * lines * a.M, "squeezed_ptr", "du_ptr")
    if a.SPLIT:
        t.write(sum(splits) * a.C * (a.M + 1), "parts_ptr")
    else:
        _results(t, a, splits)


def _spread(t: _Tally, a) -> None:
    splits = (a.splits_h, a.splits_w, a.splits_1)
    if a.programs > a.planes and a.SPLITS > 0:
        t.read(sum(splits) * a.C * (a.M + 1), "parts_ptr")
        _results(t, a, splits)
    a.programs = a.planes
    lines, e = a.H + a.W, _small(a)
    _normalisation(t, a, a.planes)
    _blocks_of_rows(t, a, a.planes, "sums_ptr")
    t.read(a.planes * lines * a.M, "du_ptr", "squeezed_ptr")
    t.read(_images(a) * math.ceil(lines / a.LB) * a.C * a.M, "w1_ptr")
    t.write(e.both, "dp_ptr")
    t.read(e.map, "grad_ptr")
    t.read(2 * e.map, "gates_ptr", "dp_ptr")
    t.write(e.map, "dx_ptr")


def _pool_backward(t: _Tally, a) -> None:
    t.read(2 * _small(a).map, "grad_ptr")
    t.write(_small(a).map, "dx_ptr")


_KERNELS = {
    "pool_kernel": _pool,
    "gate_kernel": _gate,
    "gate_logits_kernel": _gate_logits,
    "reduce_kernel": _reduce,
    "gate_backward_kernel": _gate_backward,
    "stats_kernel": _stats,
    "update_kernel": _update,
    "mix_backward_kernel": _mix_backward,
    "weights_kernel": _weights,
    "spread_kernel": _spread,
    "pool_backward_kernel": _pool_backward,
}


def count(entry: Entry) -> dict[str, tuple[int, int]]:
    """Elements read and written by a launch, for every tensor among its arguments."""
    tensors = (name for name, value in entry.arguments.items() if isinstance(value, torch.Tensor))
    tally = _Tally(dict.fromkeys(tensors, (0, 0)))
    _KERNELS[entry.fn.fn.__name__](tally, SimpleNamespace(**entry.arguments, programs=entry.programs))
    return dict(tally)


def bytes_moved(launches: Iterable[Entry]) -> tuple[Moved, Moved]:
    """Of the full-size maps (x, grad, out, dx), and of all other tensors."""
    totals = [[0] * 4, [0] * 4]
    for entry in launches:
        a = entry.arguments
        for name, counts in count(entry).items():
            t = a[name]
            full = name in _MAPS and tuple(t.shape[1:]) == (a["C"], a["H"], a["W"])
            there = math.prod(size for size, stride in zip(t.shape, t.stride()) if stride)
            for i, accesses in enumerate((*(min(there, n) for n in counts), *counts)):
                totals[0 if full else 1][i] += accesses * t.element_size()
    full, small = (Moved(*total) for total in totals)
    return full, small
