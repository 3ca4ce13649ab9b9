"""The harness for this backend: the package's results on Triton's kernels, held to tolerances.py."""

import harness
import promises
import tolerances
import torch
from harness import Case, build, run

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
    floor = TRUNCATED_ULPS if case.dtype is torch.bfloat16 else tolerances.FLOOR_ULPS
    harness.compare(case, backward, on_triton, floor)


def agree(case: Case):
    promises.agrees(case, on_triton)
