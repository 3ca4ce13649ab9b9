"""The whole module in inference: ours, the published module, and the floor of one clone."""

import torch

from bench import baselines, checks
from bench.cases import Case


def run(benchmark, case: Case, name: str) -> None:
    plain, x = case.plain(), case.tensor(1)
    function, module = baselines.local(name, plain, case)
    exact = checks.truth(plain, x, None)
    baseline = checks.errors(checks.results(plain, plain, x, None), exact)
    verdict = checks.judge(
        checks.errors(checks.results(function, module, x, None), exact), baseline, x.dtype, checks.OWN_FACTOR
    )
    assert verdict.passed, verdict
    benchmark.group = f"module, inference {case.name} {case.dtype} {case.layout}"
    benchmark.extra_info["bytes_moved"] = case.bytes_moved
    with torch.inference_mode():
        benchmark(function, x)


def test_ours(benchmark, case):
    run(benchmark, case, baselines.OURS)


def test_published(benchmark, case):
    run(benchmark, case, "eager")


def test_clone(benchmark, case):
    benchmark.group = f"module, inference {case.name} {case.dtype} {case.layout}"
    with torch.inference_mode():
        benchmark(case.tensor(1).clone)


def test_call_with_nothing_to_compute(benchmark):
    """What a call costs before any arithmetic."""
    case = Case((1, 16, 1, 1))
    module, x = baselines.ours(case.plain(), case), case.tensor(1)
    with torch.inference_mode():
        benchmark(module, x)
