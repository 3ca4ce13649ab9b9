"""The harness for this backend: the package's results on Triton's kernels, held to tolerances.py."""

import harness
import promises
import tolerances
import torch
from harness import Case, build, data, run, truth

from coordatt_fast import CoordAtt, explain

# The interpreter cuts bfloat16 off where a GPU rounds to nearest: errors of one ulp in place of half.
TRUNCATED_ULPS = 3


def on_triton(case, d, backward=True):
    """The package, with proof that it was Triton's kernels that ran."""
    module = build(CoordAtt, case, d.params)
    with harness.autocast(case), torch.set_grad_enabled(backward):
        plan = explain(module, d.x)
        assert (plan.tier, plan.backend) == ("fused", "triton"), str(plan)
        return run(module, d.x, d.grad if backward else None)


def compare(case: Case, backward=True):
    if case.dtype is not torch.bfloat16:
        return harness.compare(case, backward, under_test=on_triton)
    d = data(case)
    got, expected, plain = (f(case, d, backward) for f in (on_triton, truth, harness.plain))
    for name, value in expected.items():
        if name in case.exactly_zero or name in case.vanishing:
            continue
        dtype = got[name].dtype
        assert dtype == plain[name].dtype, name
        ours, theirs = tolerances.errors(got[name], value), tolerances.errors(plain[name], value)
        floor = TRUNCATED_ULPS * torch.finfo(dtype).eps
        assert all(a <= 4 * b + floor for a, b in zip(ours, theirs)), (name, ours, theirs)


def agree(case: Case):
    promises.agrees(case, on_triton)
