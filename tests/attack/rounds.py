"""Rounds of a part, each with a seed of its own that reproduces it."""

import collections
import os
import random
import sys
import time
import traceback
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from attack import calls, changes, environment, judge, passes, sequences, spellings

# Cases of one round: some seconds each.
EXAMPLES = {"calls": 400, "sequences": 40, "lookalikes": 20, "changes": 20, "environment": 12}


def options(examples: int, **more) -> settings:
    return settings(
        max_examples=examples, deadline=None, database=None, print_blob=True, derandomize=False,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False, **more,
    )  # fmt: skip


def one(part: str, number: int, examples: int, counts: collections.Counter) -> None:
    """One round. Raises what its first failure raised, made as small as it gets."""
    torch.manual_seed(number)
    random.seed(number)
    if part == "sequences":
        run = lambda: run_state_machine_as_test(
            seed(number)(counted(sequences.Lives, counts)), settings=options(examples, stateful_step_count=30)
        )
    elif part == "lookalikes":
        run = _property(
            part,
            st.tuples(spellings.recipes(), st.just(number)) | st.tuples(spellings.recipes(hostile=False), st.just(number)),
            lambda pair: ("harmless, " if pair[0].harmless else "hostile, ") + judge.judge(*pair),
            number, examples, counts,
        )  # fmt: skip
    else:
        strategy, check = {
            "calls": (calls.calls() | calls.calls() | calls.calls() | passes.passes(), _check_call),
            "changes": (changes.changed(), changes.check),
            "environment": (environment.situations(), environment.check),
        }[part]
        run = _property(part, strategy, check, number, examples, counts)
    run()


def note(part, number, case="") -> None:
    """Where the attack is, for who finds this process ended by a signal."""
    if at := os.environ.get("ATTACK_AT"):
        Path(at).write_text(f"{part} {number} {case!r}")


def _note_counts(counts: dict) -> None:
    """What it has done until now, likewise."""
    if at := os.environ.get("ATTACK_AT"):
        Path(at + ".counts").write_text("\n".join(map(_in_words, counts, counts.values())))


def _in_words(part: str, counts: collections.Counter) -> str:
    numbers = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    return f"{part}: {numbers or '0 cases'}"


def _check_call(case):
    (passes if isinstance(case, passes.Pass) else calls).check(case)


def _property(part, strategy, check, number, examples, counts):
    @seed(number)
    @options(examples)
    @given(strategy)
    def attack(case):
        counts["cases"] += 1
        note(part, number, case)
        if what := check(case):
            counts[what] += 1

    return attack


def counted(machine, counts):
    class Counted(machine):
        def teardown(self):
            counts["cases"] += 1
            super().teardown()

    Counted.__name__ = Counted.__qualname__ = machine.__name__
    return Counted


def run(parts: list, first: int, minutes: float, rounds: int | None) -> int:
    """Rounds of the parts in turn until the time is over; 1 where one has failed."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    until, number = time.monotonic() + 60 * minutes, first
    counts = {part: collections.Counter() for part in parts}
    spent, failures = collections.Counter(), []
    while time.monotonic() < until and (rounds is None or number < first + rounds):
        # The part that has had the least time so far.
        for part in parts if rounds is not None else [min(parts, key=lambda p: spent[p])]:
            start = time.monotonic()
            note(part, number)
            try:
                one(part, number, EXAMPLES[part], counts[part])
            except KeyboardInterrupt:
                until = 0
            except BaseException as error:
                failures.append((part, number))
                print(f"--- {part}, seed {number}: {_reproduce(part, number)}", flush=True)
                traceback.print_exception(error, limit=-4, file=sys.stdout)
            spent[part] += time.monotonic() - start
            _note_counts(counts)
        number += 1
    environment.cradle.close()
    for part in parts:
        failed = [number for name, number in failures if name == part]
        print(f"{_in_words(part, counts[part])}; {len(failed)} failures; {spent[part]:.0f} s", flush=True)
    for part, number in failures:
        print(f"{part}, seed {number}: {_reproduce(part, number)}", flush=True)
    return int(bool(failures))


def _reproduce(part, number):
    return f"python -m tests.attack --part {part} --rounds 1 --seed {number}"
