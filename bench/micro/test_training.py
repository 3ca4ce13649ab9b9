"""Forward and backward of the whole module: ours and the published module."""

from dataclasses import replace

from bench import baselines, checks
from bench.cases import Case
from bench.instances import training_step


def run(benchmark, case: Case, name: str) -> None:
    case = replace(case, mode="train")
    plain, x, g = case.plain(), case.tensor(1), case.tensor(2)
    exact = checks.truth(plain, x, g)
    baseline = checks.errors(checks.results(*baselines.local("eager", plain, case), x, g), exact)
    function, module = baselines.local(name, plain, case)
    verdict = checks.judge(
        checks.errors(checks.results(function, module, x, g), exact), baseline, x.dtype, checks.OWN_FACTOR
    )
    assert verdict.passed, verdict
    benchmark.group = f"module, training {case.name} {case.dtype} {case.layout}"
    benchmark.extra_info["bytes_moved"] = case.bytes_moved
    benchmark(training_step(function, module, x, g))


def test_ours(benchmark, case):
    run(benchmark, case, baselines.OURS)


def test_published(benchmark, case):
    run(benchmark, case, "eager")
