"""The suite on several workers of pytest-xdist, as make test starts it: how many, who gets what, what is brought together."""

import os

import pytest
import tolerances

# Longest first, so that no worker is left with one of them when the others have nothing more to do.
LONGEST = """
    test_triton_suite test_kernels test_training test_forward test_gpu_suite test_tails test_integration_compile
    test_install test_third_party test_attack test_memory test_simd test_compile test_bench_gpu test_other_blocks
""".split()
MOST = 8  # the longest of those files takes about an eighth of the whole suite's time


def rank(path) -> int:
    """The order of the files."""
    return LONGEST.index(path.stem) if path.stem in LONGEST else len(LONGEST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """-n auto: a worker on each core for the suite; tests that are chosen start sooner and read better in this process."""
    chosen = config.option.keyword or config.args_source is not config.ArgsSource.TESTPATHS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 0 if chosen or cores == 1 else min(cores, MOST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        """A file's tests stay together, because they share its fixtures; parts that are processes of their own do not."""

        def _split_scope(self, nodeid):
            return nodeid if "::test_interpreted[" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["observed"] = dict(tolerances.observed)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for key, ratios in getattr(node, "workeroutput", {}).get("observed", {}).items():
        tolerances.observed[key] += ratios
