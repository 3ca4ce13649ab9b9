"""The suite on several workers: their number, their order, what is brought together, and that a hang ends the run."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import tolerances
import workers

execnet = pytest.importorskip("execnet", reason="pytest-xdist is not installed")

TESTS = Path(__file__).parent
OPTIONS = re.search(r"^WORKERS := (.*)$", (TESTS.parent / "Makefile").read_text(), re.MULTILINE)[1].split()


@pytest.mark.parametrize("cores, count", [(1, 0), (2, 2), (64, workers.MOST)])
def test_number_of_workers(cores, count, monkeypatch, pytestconfig):
    """As many as cores, up to a number; tests that are chosen run in one process, and so do all on one core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    sources = pytestconfig.ArgsSource

    def found(keyword, source):
        option = SimpleNamespace(keyword=keyword)
        config = SimpleNamespace(option=option, args_source=source, ArgsSource=sources)
        return workers.pytest_xdist_auto_num_workers(config)

    assert found("", sources.TESTPATHS) == count
    assert found("plan", sources.TESTPATHS) == found("", sources.ARGS) == 0


def test_longest_files_are_there():
    assert set(workers.LONGEST) <= {path.stem for path in TESTS.rglob("test_*.py")}


def test_observations_of_all_workers(monkeypatch):
    """As pytest-xdist sends them to the process that prints them."""
    mine, theirs = {("a", "out"): [1.0]}, {("a", "out"): [2.0, 3.0], ("b", "d x"): [4.0]}
    sent = {}
    monkeypatch.setattr(tolerances, "observed", defaultdict(list, theirs))
    workers.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace(workeroutput=sent)))
    monkeypatch.setattr(tolerances, "observed", defaultdict(list, mine))
    workers.pytest_testnodedown(SimpleNamespace(workeroutput=execnet.loads(execnet.dumps(sent))))
    workers.pytest_testnodedown(SimpleNamespace())  # one that crashed
    assert tolerances.observed == {("a", "out"): [1.0, 2.0, 3.0], ("b", "d x"): [4.0]}


def test_a_hang_ends_the_run(tmp_path):
    """Of a worker that took its place the same test would take as long again."""
    (tmp_path / "test_it.py").write_text("import time\ndef test_it(): time.sleep(600)\n")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nfaulthandler_timeout = 1\nfaulthandler_exit_on_timeout = true\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *OPTIONS, "-n", "2", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "in test_it" in result.stderr, result.stdout + result.stderr
    assert "FAILED test_it.py::test_it - worker" in result.stdout and "1 failed in" in result.stdout
