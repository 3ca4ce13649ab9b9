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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench.timing import PAGES

ROOT = Path(__file__).parent.parent
MALLOC_SETTINGS = tuple(name for setting in PAGES.values() for name in setting)


@dataclass
class Jobs:
    """What one lab is asked to do. ``seconds`` is its share of the time budget (0: no limit).

    A job is plain data, made by ``schedule.plan``: kind ("network" or "instance"), case, effort, rivals, the
    seconds it is expected to take, and its place in the order of the report.
    """

    threads: int
    pages: str = "plain"
    seconds: float = 0.0
    jobs: list[dict] = field(default_factory=list)


def environment(pages: str) -> dict[str, str]:
    """This process's environment with the page state set, other malloc settings removed, bench importable."""
    kept = {name: value for name, value in os.environ.items() if name not in MALLOC_SETTINGS}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return kept | PAGES[pages] | {"PYTHONPATH": path}


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


def perform(job: dict, runtimes, share: float) -> dict:
    """Carry out one job within about ``share`` seconds; torch is loaded only here, in the lab.

    Where the share is less than the job is expected to need, rounds are cut, then nothing is compiled, and at
    worst the job is skipped.
    """
    from bench import instances, whole_network
    from bench.baselines import COMPILED
    from bench.cases import Case

    if share < 0.1 * job["expected"]:
        return {"kind": "skipped", "job": job}
    effort = instances.Effort(**job["effort"])
    effort = replace(effort, seconds=min(effort.seconds, 0.5 * share))
    if job["kind"] == "network":
        return whole_network.measure(whole_network.NetworkCase(**job["case"]), effort)
    if job["kind"] == "rivals":
        from bench import rivals

        return rivals.measure(whole_network.NetworkCase(**job["case"]), effort, job["rivals"])
    hurried = share < 0.6 * job["expected"]
    names = [name for name in job["rivals"] if not (hurried and name in COMPILED)]
    result = instances.measure(Case(**job["case"]), names, runtimes, effort)
    for name in set(job["rivals"]) - set(names):
        result["left_out"][name] = "no time left to compile"
    return result


def work(jobs: Jobs, answers) -> None:
    import torch

    from bench.instances import Runtimes

    torch.set_num_threads(jobs.threads)
    runtimes = Runtimes(jobs.threads)
    deadline = time.perf_counter() + (jobs.seconds or float("inf"))
    try:
        for index, job in enumerate(jobs.jobs):
            began = time.perf_counter()
            ahead = sum(later["expected"] for later in jobs.jobs[index:])
            result = perform(job, runtimes, (deadline - began) * job["expected"] / ahead)
            took = time.perf_counter() - began
            result |= {"order": job["order"], "threads": jobs.threads, "pages": jobs.pages, "took": took}
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
