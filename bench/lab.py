"""A process that measures: one thread count and one page state of malloc, both fixed before torch is loaded.

The caller's side: ``run`` starts ``python -m bench.worker`` with the environment set, sends the jobs as one
JSON line and yields results as they come.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
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
        [sys.executable, "-m", "bench.worker"],
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
