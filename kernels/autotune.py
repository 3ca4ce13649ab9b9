"""Blocks of channels timed on first use on a GPU, with COORDATT_FAST_AUTOTUNE=1; else tables.py's stand."""

import contextlib
import json
import logging
import os
import threading
from functools import partial
from math import inf
from pathlib import Path

import torch
import triton

from coordatt_fast.codes import NEEDS_ALL, NORM_BATCH

from . import tables

log = logging.getLogger(__name__)

_wanted = os.environ.get("COORDATT_FAST_AUTOTUNE", "").strip()
if _wanted not in ("", "0", "1"):
    log.warning("COORDATT_FAST_AUTOTUNE=%s has no effect: expected 0 or 1", _wanted)
ON = _wanted == "1" and not triton.knobs.runtime.interpret
_found, _lock, _trial = {}, threading.Lock(), threading.local()  # _trial.bc: what this thread is timing


def chosen(constants_of):
    """constants_of with the fastest block of channels as its last argument; itself without autotuning."""
    if not ON:
        return constants_of
    return lambda *what: constants_of(*what, getattr(_trial, "bc", 0) or block(*what[:5]))


def block(shape, m: int, dtype: torch.dtype, device: torch.device, nhwc: bool) -> int:
    """The fastest block of channels for maps of this shape, timed once; 0, the table's, where none can be."""
    key = (*shape[1:], m, dtype, device, nhwc)
    # A stream that is being captured must not be waited for.
    if key not in _found and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        with _lock:
            _found[key] = _found.get(key) or _kept_or_timed(shape, m, dtype, device, nhwc)
    return _found.get(key, 0)


def _kept_or_timed(shape, m, dtype, device, nhwc) -> int:
    candidates = tables.candidates(*shape[1:], m, dtype.itemsize, nhwc)
    what = (torch.cuda.get_device_name(device), "triton", triton.__version__, dtype, *shape[1:], m, nhwc)
    key, folder = " ".join(map(str, what)), os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path, kept = Path(folder, "coordatt_fast", "autotune.json"), {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        kept = dict(json.loads(path.read_text()))
    if kept.get(key) in candidates:
        return kept[key]
    times = {bc: time_of(bc, shape, m, dtype, device, nhwc) for bc in candidates}
    best = min(times, key=times.get)
    if times[best] < inf:
        with contextlib.suppress(OSError):  # where there is no place, this process alone knows it
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(kept | {key: best}, indent=1) + "\n")
            whole.replace(path)  # at once, beside other processes
    return best


def time_of(bc: int, shape, m, dtype, device, nhwc) -> float:
    """Median milliseconds of step_of's in blocks of bc channels; inf where that does not fit the GPU."""
    _trial.bc, unfit = bc, contextlib.suppress(torch.OutOfMemoryError, triton.TritonError)
    try:
        with unfit, torch.cuda.device(device), torch.no_grad():
            return triton.testing.do_bench(step_of(shape, m, dtype, device, nhwc), 5, 20, quantiles=[0.5])
        return inf
    finally:
        _trial.bc = 0


def step_of(shape, m, dtype, device, nhwc):
    """Inference, training forward and backward on fresh tensors, which leave torch's random numbers alone."""
    from . import launch

    make = partial(torch.full, fill_value=0.5, dtype=dtype, device=device)
    x = make(shape).contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
    grad, w1, v, w2, b2 = x.clone(), *map(make, ((m, shape[1], 1, 1), (m,), (shape[1], m, 1, 1), (shape[1],)))

    def step():
        launch.attend(x, w1, v, v, v, v, v, 1e-5, w2, b2, w2, b2, 0, False)
        layers = (w1, v, v, v, None, None, 1e-5, w2, b2, w2, b2)
        _, *saved = launch.attend_train(x, *layers, NORM_BATCH, 0, False)
        launch.attend_backward(grad, x, *saved, w1, v, v, 1e-5, w2, w2, NORM_BATCH, 0, False, NEEDS_ALL)

    return step
