"""Clocks of the GPU benchmark: the device's own, that of a replayed CUDA graph, and the host's."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import repeat

import torch

from coordatt_fast.interleaved import Contestant, Local

IN_A_GRAPH = 10  # calls that one graph holds, so that what a replay costs is shared
UNSYNCHRONISED = 16  # calls the host makes before it waits: far less than fills the device's queue


class OnStream:
    """A callable timed by events of the current stream; launches count where they outlast the work.

    calls: how many one call of it makes.
    """

    rest = 0.0

    def __init__(self, call: Callable[[], object], around: Callable = nullcontext, calls: int = 1) -> None:
        self.call = call
        self.around = around
        self.calls = calls
        self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run(self, calls: int) -> float:
        with self.around():
            self.start.record()
            for _ in repeat(None, calls):
                self.call()
            self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3 / self.calls


class OnHost:
    """The seconds the host takes to make the calls; the device catches up outside of what is timed."""

    rest = 0.0

    def __init__(
        self, call: Callable[[], object], around: Callable = nullcontext, synchronise: Callable | None = None
    ) -> None:
        self.call = call
        self.around = around
        self.synchronise = synchronise or torch.cuda.synchronize

    def run(self, calls: int) -> float:
        call, seconds = self.call, 0.0
        with self.around():
            for first in range(0, calls, UNSYNCHRONISED):
                self.synchronise()
                start = time.perf_counter()
                for _ in repeat(None, min(UNSYNCHRONISED, calls - first)):
                    call()
                seconds += time.perf_counter() - start
            self.synchronise()
        return seconds


def on_device(device: str, call: Callable[[], object], around: Callable = nullcontext) -> Contestant:
    return OnStream(call, around) if device.startswith("cuda") else Local(call, around)


def on_host(device: str, call: Callable[[], object], around: Callable = nullcontext) -> Contestant:
    return OnHost(call, around, None if device.startswith("cuda") else lambda: None)


def graphed(
    call: Callable[[], object], around: Callable = nullcontext, calls: int = IN_A_GRAPH
) -> Contestant:
    """Replays of a CUDA graph of some calls, warmed up as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), around():
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with around(), torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return OnStream(graph.replay, calls=calls)
