"""The harness for this backend: the package's results on the emulated CUDA kernels, held to tolerances.py."""

import itertools

import harness
import promises
import tolerances
import torch
from harness import Case, build, data, run, truth

from coordatt_fast import CoordAtt, explain

H200 = dict(arch=90, processors=4, shared_memory=232448)  # but for the number of SMs
A100 = dict(arch=80, processors=4, shared_memory=166912)
RTX_5090 = dict(arch=120, processors=4, shared_memory=101376)

emulator = None  # the module; conftest.py sets it
_seeds = itertools.count()


def reset(module):
    global emulator
    emulator = module
    module.set_device(**H200)
    module.set_forward("chain")
    module.set_seed(0)
    module.skip(-1)
    module.launches()


def kernels():
    """Names of the kernels launched since the last call."""
    return [text.split()[0] for text in emulator.launches()]


def on_cuda(case, d, backward=True):
    """The package, with proof that it was these kernels that ran; each call under another schedule."""
    emulator.set_seed(next(_seeds))
    module = build(CoordAtt, case, d.params)
    with harness.autocast(case), torch.set_grad_enabled(backward):
        plan = explain(module, d.x)
        assert (plan.tier, plan.backend) == ("fused", "cuda"), str(plan)
        return run(module, d.x, d.grad if backward else None)


def compare(case: Case, backward=True):
    harness.compare(case, backward, under_test=on_cuda)


def agree_roughly(case: Case, backward=True):
    """One draw in any dtype, for runs that look for something else than rounding."""
    d = data(case)
    got = on_cuda(case, d, backward)
    for name, value in truth(case, d, backward).items():
        if name not in (*case.exactly_zero, *case.vanishing):
            assert max(tolerances.errors(got[name], value)) < 64 * torch.finfo(case.dtype).eps ** 0.75, name


def agree(case: Case, backward=True):
    promises.agrees(case, on_cuda, backward)
