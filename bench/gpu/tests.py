"""tests/gpu in a process of its own, with an end to its time."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.lab import ROOT

WORKERS = 12
# pytest -v, with pytest-xdist and without.
VERDICT = r"\] (PASSED|FAILED|ERROR) tests/|::.* (PASSED|FAILED|ERROR)\b"


def command(folder: Path | None = None) -> list[str]:
    found = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=20", "tests/gpu"]
    if importlib.util.find_spec("xdist"):  # compiling takes most of the time
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        found += ["-n", str(max(1, min(WORKERS, cores - 2)))]
    return found + ([f"--junitxml={folder / 'gpu-tests.xml'}"] if folder else [])


def read(text: str) -> dict:
    """What pytest's output says: its closing line, and the tests that failed."""
    lines = [line for line in text.strip().splitlines() if line]
    closing = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    one_by_one = [(line, verdict) for line in lines for verdict in re.findall(VERDICT, line)]
    failed = [line[:400] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    # A run that was stopped has no summary: what it had said of each test by then.
    failed = failed or [line[:400] for line, (a, b) in one_by_one if "PASSED" not in (a, b)]
    passed = sum("PASSED" in verdict for _, verdict in one_by_one)
    slowest = [line for line in lines if re.match(r"\d+\.\d+s (call|setup|teardown) ", line)]
    summary = (closing or lines or ["no output"])[-1]
    return {"summary": summary, "passed": passed, "failed": failed, "slowest": slowest}


def run(seconds: float, folder: Path | None = None, what: list[str] | None = None) -> dict:
    """status: pytest's exit status, 124 where the time ran out."""
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        what or command(folder),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = 124
    found = read(output)
    if status == 124:
        found["summary"] = f"stopped after {seconds:.0f} s, {found['passed']} had passed: {found['summary']}"
    if folder:
        (folder / "gpu-tests.txt").write_text(output)
    return {"status": status, "took": time.perf_counter() - began} | found
