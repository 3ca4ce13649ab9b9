"""A process that measures: one thread count and one page state of malloc, both fixed before torch is loaded.

``run`` (the caller's side) starts ``python -m bench.lab`` with the environment set, sends the jobs as one
JSON line and yields results as they come.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from bench.timing import PAGES

MALLOC_SETTINGS = tuple(name for setting in PAGES.values() for name in setting)


@dataclass
class Jobs:
    """What one lab is asked to do. ``seconds`` is its share of the time budget (0: no limit).

    A job is ``{"kind": "network" or "instance", "case": ..., "effort": ..., "rivals": [...]}``, as plain
    data.
    """

    threads: int
    pages: str = "plain"
    seconds: float = 0.0
    jobs: list[dict] = field(default_factory=list)


def environment(pages: str) -> dict[str, str]:
    """This process's environment with the page state set and any other malloc setting removed."""
    kept = {name: value for name, value in os.environ.items() if name not in MALLOC_SETTINGS}
    return kept | PAGES[pages]


def run(jobs: Jobs) -> Iterator[dict]:
    """Start a lab and yield one result per job, in order; a job left for lack of time yields ``{"kind":
    "skipped"}``.

    Raises ``RuntimeError`` when the lab dies.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.lab"],
        env=environment(jobs.pages),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        process.stdin.write(json.dumps(asdict(jobs)) + "\n")
        process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        if process.wait():
            raise RuntimeError(f"the measuring process ended with code {process.returncode}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def perform(job: dict, runtimes, without_compile: bool) -> dict:
    """Carry out one job; torch is loaded only here, in the lab."""
    from bench import instances, whole_network
    from bench.cases import Case
    from bench.rivals import COMPILED

    effort = instances.Effort(**job["effort"])
    if job["kind"] == "network":
        return whole_network.measure(whole_network.NetworkCase(**job["case"]), effort)
    names = [name for name in job["rivals"] if not (without_compile and name in COMPILED)]
    result = instances.measure(Case(**job["case"]), names, runtimes, effort)
    for name in set(job["rivals"]) - set(names):
        result["left_out"][name] = "no time left to compile"
    return result


def work(jobs: Jobs, answers) -> None:
    import torch

    from bench.instances import Runtimes

    torch.set_num_threads(jobs.threads)
    runtimes = Runtimes(jobs.threads)
    start = time.perf_counter()
    try:
        for job in jobs.jobs:
            used = (time.perf_counter() - start) / jobs.seconds if jobs.seconds else 0.0
            began = time.perf_counter()
            if used > 1:
                result = {"kind": "skipped", "job": job}
            else:
                result = perform(job, runtimes, without_compile=used > 0.7)
            result |= {"threads": jobs.threads, "pages": jobs.pages, "took": time.perf_counter() - began}
            answers.write(json.dumps(result) + "\n")
            answers.flush()
    finally:
        runtimes.close()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output now and then
    work(Jobs(**json.loads(sys.stdin.readline())), answers)


if __name__ == "__main__":
    main()
