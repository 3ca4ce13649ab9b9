"""How long accelerate() takes to examine one module: the published block at several widths.

    python -m bench.probe [--threads 1] [--rounds 25]

Medians with 10th and 90th percentiles, in milliseconds.
"""

import argparse
import time

import torch

from bench import machine
from bench.attention import PlainCoordAtt
from coordatt_fast import accelerate, restore
from coordatt_fast.interleaved import Spread

CHANNELS = (24, 96, 384, 960, 2048)


def seconds(channels: int, rounds: int) -> Spread:
    """Of accelerate on one module; the first call, which warms up, is not counted."""
    module, taken = PlainCoordAtt(channels, channels), []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        report = accelerate(module)
        taken.append(time.perf_counter() - began)
        assert report.replaced, str(report)
        restore(module)
    return Spread.of(taken[1:])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How long accelerate() takes for one module.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    facts = machine.describe("cpu")
    print(machine.line(facts))
    print(machine.busy(facts) or "idle as it began")
    for channels in CHANNELS:
        spread = seconds(channels, options.rounds)
        low, middle, high = (f"{1e3 * value:.1f}" for value in (spread.p10, spread.median, spread.p90))
        print(f"{channels:5d} channels  {middle} ms ({low}-{high})")


if __name__ == "__main__":
    main()
