"""kernels/traffic.py against every address that the kernels touch in the interpreter."""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from coordatt_fast import CoordAtt, codes, explain
from coordatt_fast.kernels import entries, launch, tables, traffic

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FIRST, NEEDS_FEW = codes.NEEDS_X, 0b000100110  # the latter: conv1.weight, conv1.bias and conv_h.weight


class Touched:
    """Counts of one launch by argument: elements read and written, from the addresses under true masks."""

    def __init__(self, tensors: dict):
        self.names = sorted(tensors, key=lambda name: tensors[name].data_ptr())
        self.starts = np.array([tensors[name].data_ptr() for name in self.names], dtype=np.uint64)
        self.sizes = [t.untyped_storage().nbytes() for t in (tensors[name] for name in self.names)]
        self.counts = {name: [0, 0] for name in self.names}

    def add(self, which: int, pointers, mask) -> None:
        addresses = np.broadcast_to(pointers, mask.shape)[mask].ravel().astype(np.uint64)
        owners = np.searchsorted(self.starts, addresses, side="right") - 1
        for owner in np.unique(owners):
            mine = addresses[owners == owner]
            assert owner >= 0 and int(mine.max() - self.starts[owner]) < self.sizes[owner]
            self.counts[self.names[owner]][which] += len(mine)


@pytest.fixture
def checked(monkeypatch):
    """Compares the counts of every launch. Yields what was launched."""
    launched, touched, run = [], [], launch._run
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched_load(self, pointers, mask, *rest):
        touched[-1].add(0, pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        touched[-1].add(1, pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    def checked_run(kernel, programs, arguments, constants):
        # One memory per argument, so that an address belongs to one name.
        copies = arguments._make(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
        entry = entries._entry(kernel, programs, copies, constants)
        touched.append(Touched({k: v for k, v in entry.arguments.items() if isinstance(v, torch.Tensor)}))
        kernel[programs,](*copies, **constants, **launch.OPTIONS)
        found = {name: tuple(counts) for name, counts in touched[-1].counts.items()}
        assert traffic.count(entry) == found, kernel.fn.__name__
        for name, a, copy in zip(kernel.arg_names, arguments, copies):
            if isinstance(a, torch.Tensor) and found[name][1]:
                a.copy_(copy)
        launched.append(entry)

    monkeypatch.setattr(launch, "_run", checked_run)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
    yield launched
    assert run is not checked_run


def parameters(c, mid, dtype, affine=True):
    make = lambda *size: torch.rand(size, dtype=dtype) if affine or len(size) > 1 else None
    first = make(mid, c, 1, 1), make(mid), make(mid), make(mid)
    return first, (torch.rand(mid, dtype=dtype), torch.rand(mid, dtype=dtype)), (
        1e-5, make(c, mid, 1, 1), make(c), make(c, mid, 1, 1), make(c),
    )  # fmt: skip


def whole(x, mid, norm, affine=True, needs=(codes.NEEDS_ALL,)):
    """Every operator of the fused tier."""
    first, given, last = parameters(x.shape[1], mid, x.dtype, affine)
    launch.attend(x, *first, *(given if norm else (None, None)), *last, 0, False)
    none = (None, None)
    results = launch.attend_train(x, *first, *(given if norm == 1 else none), *last, norm, 0, True)
    weights = (first[0], *first[2:], last[0], last[1], last[3])
    for bits in needs:
        launch.attend_backward(x.flip(0), x, *results[1:], *weights, norm, 0, False, bits)


SHAPES = {
    "tails": ((2, 17, 5, 4), 3, torch.float32),
    "channels of several products": ((1, 40, 3, 19), 9, torch.float32),
    "wider than a tile, split weights": ((1, 2, 3, 300), 8, torch.float64),
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_exact(shape, layout, checked):
    (n, c, h, w), mid, dtype = SHAPES[shape]
    x = torch.rand(n, c, h, w, dtype=dtype).contiguous(memory_format=FORMATS[layout])
    whole(x, mid, 2, needs=(codes.NEEDS_ALL, FIRST, NEEDS_FEW))
    if shape != "tails":
        splits = [e.arguments["SPLIT"] for e in checked if e.fn.fn.__name__ == "weights_kernel"]
        assert splits[0] == ("split" in shape)
        return
    whole(x, mid, 1)
    whole(x, mid, 0, affine=False)
    first, running, last = parameters(c, mid, dtype)
    tracked = torch.tensor(3)
    for momentum in (0.1, None):
        launch.attend_train_update(x, *first, None, None, *last, 2, 0, False, *running, tracked, momentum)
        launch.update_running_stats(*running, tracked, torch.rand(n * (h + w), mid), *running, momentum)
    assert max(e.arguments.get("BLOCKS", 1) for e in checked) > 1


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_of_the_hybrid_tier_are_exact(shape, layout, checked):
    (n, c, h, w), _, dtype = SHAPES[shape]
    x = torch.rand(n, c, h, w, dtype=dtype).contiguous(memory_format=FORMATS[layout])
    s_h, s_w = torch.rand(n, c, h, 1, dtype=dtype), torch.rand(n, w, 1, c, dtype=dtype).permute(0, 3, 2, 1)
    means = launch.pool(x)
    launch.pool_backward(means, x)
    launch.gate(x, s_h, s_w, True)
    launch.gate_backward(x.flip(0), x, s_h, s_w, False)
    assert len(checked) == 4


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("shape", [(2, 17, 5, 4), (1, 2, 3, 1030), (64, 96, 112, 112), (256, 960, 7, 7)])
def test_maps_are_moved_as_few_times_as_possible(shape, nhwc):
    """Inference and the training forward pass 2 reads and 1 write, backward 3 and 1."""
    for dtype in (torch.float32, torch.bfloat16):
        found = entries.by_operator(shape, 8, dtype, nhwc)
        size = torch.Size(shape).numel() * dtype.itemsize
        for name, reads, writes in (("attend", 2, 1), ("attend_train_update", 2, 1), ("attend_backward", 3, 1)):
            full, small = traffic.bytes_moved(found[name])
            assert full == (reads * size, writes * size) * 2
            assert small.loaded >= small.read > 0 and small.stored >= small.written > 0
            if nhwc is False and shape[0] == 64:
                # Blocks of channels are chosen so that the small tensors stay a fraction.
                assert small.read + small.written < tables.PART_SHARE * (full.read + full.written)


def test_explain_reports_the_bytes_of_the_launches():
    module, x = CoordAtt(16, 16), torch.rand(2, 16, 5, 7)
    size = x.numel() * x.element_size()
    assert explain(module, x.clone().requires_grad_()).bytes == 7 * size
    plan = explain(module, x)  # dx is not asked for: the second pass of backward does not take place
    assert plan.passes == {"forward": (2, 1), "backward": (2, 0)} and plan.bytes == 5 * size
    with torch.no_grad():
        assert explain(module, x.bfloat16().float()).bytes == 3 * size
    assert explain(module, x[:0]).bytes == 0
