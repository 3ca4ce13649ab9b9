"""Timing by interleaved rounds: every contestant runs one block per round, in shuffled order.

A machine that slows down slows every contestant of that round alike, so ratios are taken round by round and
only then summarised. Times are seconds per call.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from typing import Protocol

COSTLY_CALL = 0.5  # seconds; a call this long is not made again just to warm up
LONG_BLOCK = 0.05  # seconds; a block this long needs no warm-up block of its own in every round


class Contestant(Protocol):
    """Something that can be timed. rest is how long (s) its threads stay busy after a block."""

    rest: float

    def run(self, calls: int) -> float:
        """Make calls calls and return the seconds they took together."""


class Local:
    """A callable of this process. around is a context manager factory entered once per block (grad
    mode)."""

    rest = 0.0

    def __init__(
        self,
        call: Callable[[], object],
        around: Callable = nullcontext,
        synchronise: Callable[[], None] | None = None,
    ) -> None:
        self.call = call
        self.around = around
        self.synchronise = synchronise or (lambda: None)

    def run(self, calls: int) -> float:
        call = self.call
        with self.around():
            self.synchronise()
            start = time.perf_counter()
            for _ in repeat(None, calls):
                call()
            self.synchronise()
            return time.perf_counter() - start


@dataclass(frozen=True)
class Spread:
    """Median with the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        ordered = sorted(values)
        return cls(statistics.median(ordered), percentile(ordered, 0.1), percentile(ordered, 0.9))


def percentile(ordered: list[float], fraction: float) -> float:
    """Linear interpolation between the neighbours in an ascending list."""
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass
class Race:
    """What race measured: seconds per call of every round, by contestant."""

    rounds: dict[str, list[float]]
    calls: dict[str, int] = field(default_factory=dict)

    def seconds(self, name: str) -> Spread:
        return Spread.of(self.rounds[name])

    def speedup(self, name: str, over: str) -> Spread:
        """How many times faster name is than over: the ratio of each round, then the median."""
        return Spread.of(
            [slow / fast for fast, slow in zip(self.rounds[name], self.rounds[over], strict=True)]
        )


def calls_per_block(contestant: Contestant, block: float) -> tuple[int, float]:
    """How many calls fill block seconds, and what they took; finding out warms the contestant up."""
    calls, took = 1, contestant.run(1)
    if took >= COSTLY_CALL:
        return calls, took
    while True:
        took = contestant.run(calls)
        if took >= block or calls >= 1 << 20:
            return calls, took
        calls = max(calls * 2, int(calls * min(block / max(took, 1e-9), 100) * 1.1))


def race(
    contestants: Mapping[str, Contestant],
    *,
    rounds: int = 15,
    least_rounds: int = 3,
    block: float = 0.005,
    limit: float = float("inf"),
    seed: int = 0,
) -> Race:
    """Time the contestants against each other.

    Up to rounds rounds, fewer (not below least_rounds) when limit seconds are spent. Each block
    lasts at least block seconds and, unless that is long, follows one that is not timed, which wakes the
    threads and warms the caches.
    """
    shuffler = random.Random(seed)
    order = list(contestants)
    result = Race({name: [] for name in order})
    short: dict[str, bool] = {}
    began = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for name, contestant in contestants.items():
            result.calls[name], took = calls_per_block(contestant, block)
            short[name] = took < LONG_BLOCK
            time.sleep(contestant.rest)
        for index in range(rounds):
            if index >= least_rounds and time.perf_counter() - began > limit:
                break
            shuffler.shuffle(order)
            for name in order:
                contestant, calls = contestants[name], result.calls[name]
                time.sleep(contestant.rest)
                if short[name]:
                    contestant.run(calls)
                result.rounds[name].append(contestant.run(calls) / calls)
                time.sleep(contestant.rest)
    finally:
        if collecting:
            gc.enable()
    return result
