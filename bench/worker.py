"""The process that ``lab.run`` starts: does the jobs it is sent, one JSON line each, and ends."""

import json
import os
import sys
import time
from dataclasses import replace

import torch

from bench import instances, other_blocks, whole_network
from bench.baselines import ANY_COMPILED
from bench.cases import Case
from bench.lab import Jobs


def perform(job: dict, runtimes, share: float) -> dict:
    """Carry out one job within about ``share`` seconds.

    Where the share is less than the job is expected to need, rounds are cut, then nothing is compiled, and at
    worst the job is skipped.
    """
    if share < 0.1 * job["expected"]:
        return {"kind": "skipped", "job": job}
    effort = instances.Effort(**job["effort"])
    effort = replace(effort, seconds=min(effort.seconds, 0.5 * share))
    if job["kind"] == "network":
        return whole_network.measure(whole_network.NetworkCase(**job["case"]), effort)
    if job["kind"] == "blocks":
        return other_blocks.measure(whole_network.NetworkCase(**job["case"]), effort, job["blocks"])
    hurried = share < 0.6 * job["expected"]
    names = [name for name in job["rivals"] if not (hurried and name in ANY_COMPILED)]
    result = instances.measure(Case(**job["case"]), names, runtimes, effort)
    for name in set(job["rivals"]) - set(names):
        result["left_out"][name] = "no time left to compile"
    return result


def work(jobs: Jobs, answers) -> None:
    torch.set_num_threads(jobs.threads)
    runtimes = instances.Runtimes(jobs.threads)
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
