"""What every GPU backend promises besides close numbers; each suite calls these on its own kernels.

under_test(case, d, backward=True) gives the package's results on the suite's kernels, and proves that they ran.
"""

import tolerances
import torch
from harness import Case, build, data, feature_map, plain, run, truth
from paper import PaperCoordAtt
from shapes import AWKWARD
from test_forward import arguments
from test_nonfinite import not_finite, same_kind
from test_registration import fits, sample
from torch import nn
from torch.library import opcheck

from coordatt_fast import CoordAtt, coord_att, explain, use_backend

PARAMETERS = [f"{m}.{p}" for m in ("conv1", "bn1", "conv_h", "conv_w") for p in ("weight", "bias")]
WANTED = [[n] for n in ("x", *PARAMETERS)] + [["conv_h.weight", "conv_w.weight"], ["x", "bn1.weight"]]
OPCHECKED = ["nchw float32 batch", "nhwc bfloat16 batch skip", "nchw float64 none silu", "empty"]


def agrees(case, under_test, backward=True):
    """float64, one draw: looks for a wrong formula, not for rounding."""
    d = data(case)
    got = under_test(case, d, backward)
    for name, value in truth(case, d, backward).items():
        if name not in case.exactly_zero:
            assert max(tolerances.errors(got[name], value)) < tolerances.FORMULAS_AGREE, name


def moves_running_statistics(dtype, momentum):
    case = Case((2, 5, 4, 3), 9, dtype)
    d = data(case)
    modules = [build(PaperCoordAtt, case, d.params, torch.float64), build(CoordAtt, case, d.params)]
    for module in modules:
        module.bn1.momentum = momentum
        for seed in range(3):
            module(data(case, seed).x.to(module.conv1.weight.dtype))
        assert module.bn1.num_batches_tracked.item() == 3
    bound = 1e-13 if case.dtype is torch.float64 else 1e-6
    for name in ("running_mean", "running_var"):
        expected, got = (getattr(m.bn1, name) for m in modules)
        assert max(tolerances.errors(got, expected)) < bound, name


def computes_only(wanted, case, d, everything):
    """The gradients of `wanted`, with the bits that they have among everything, and no others."""
    module = build(CoordAtt, case, d.params)
    for name, p in module.named_parameters():
        p.requires_grad_(name in wanted)
    x = d.x.detach().requires_grad_("x" in wanted)
    module(x).backward(d.grad)
    got = {n: p.grad for n, p in module.named_parameters()} | {"x": x.grad}
    for name in ("x", *PARAMETERS):
        if name in wanted:
            tolerances.assert_same_bits(got[name], everything["d " + name], name)
        else:
            assert got[name] is None, name


def takes_strides(relayout):
    case = Case((2, 9, 4, 5), 9, torch.float64)
    d = data(case)
    x, grad = relayout(d.x), relayout(d.grad)
    theirs, ours = (run(build(cls, case, d.params), x, grad) for cls in (PaperCoordAtt, CoordAtt))
    for name in theirs:
        if name != "d conv1.bias":
            assert max(tolerances.errors(ours[name], theirs[name])) < tolerances.FORMULAS_AGREE, name


def keeps_not_finite(case, value, under_test):
    """In the same places as plain PyTorch's; backward as far as test_nonfinite.py holds every backend to it."""
    d = data(case)
    d.x[1, 2, 3, 1] = value
    backward = value != value and case.activation == "hard_swish"
    theirs, ours = plain(case, d, backward), under_test(case, d, backward)
    for name in theirs:
        if name not in case.exactly_zero:
            same_kind(ours[name], theirs[name], f"{name}, {case}")


def keeps_gradients_not_finite(layout, value, under_test):
    for norm in ("batch", "running"):
        case = Case((2, 5, 4, 3), 9, layout=layout, norm=norm)
        d = data(case)
        d.grad[1, 2, 3, 1] = value
        theirs, ours = plain(case, d), under_test(case, d)
        for name in theirs:
            if name not in case.exactly_zero:
                same_kind(ours[name], theirs[name], name, {"not finite": not_finite})


def writes_out_and_inplace(layout, under_test):
    case = Case(*AWKWARD["primes"], layout=layout, norm="running", skip=True)
    d = data(case)
    expected = under_test(case, d, backward=False)["out"]
    crossways = d.x.new_zeros(d.x.shape).mT.contiguous().mT
    shifted = torch.cat([d.x.new_full((1,), torch.nan), d.x.flatten()])[1:].view(d.x.shape)
    with torch.no_grad():
        for out in (torch.empty_like(d.x), d.x.new_zeros(d.x.shape), crossways, shifted):
            coord_att(d.x, *arguments(d.params), skip=True, out=out)
            tolerances.assert_same_bits(out, expected)
        x = d.x.clone()
        coord_att(x, *arguments(d.params), skip=True, inplace=True)
        tolerances.assert_same_bits(x, expected)
        images = len(d.x)
        memory = torch.cat([d.x, d.x])
        coord_att(memory[:images], *arguments(d.params), skip=True, out=memory[1 : images + 1])
        tolerances.assert_same_bits(memory[1 : images + 1], expected)


def takes_empty_batches(layout, training):
    case = Case((0, 16, 5, 7), 8, layout=layout, norm="batch" if training else "running")
    d = data(case)
    theirs, ours = plain(case, d), run(build(CoordAtt, case, d.params), d.x, d.grad)
    for name, value in theirs.items():
        tolerances.assert_same_bits(ours[name].abs(), value.abs(), name)


def serves_hybrids(shape, dtype, layout, backend):
    """Another normalisation in between: pool, gate and their backward passes."""
    generator = torch.Generator().manual_seed(3)
    x, grad = (feature_map(shape, generator, dtype, layout) for _ in range(2))
    torch.manual_seed(1)
    module = CoordAtt(shape[1], shape[1], mid_channels=4, skip=True).to(dtype)
    module.bn1 = nn.GroupNorm(2, 4).to(dtype)
    plan = explain(module, x)
    assert (plan.tier, plan.backend) == ("hybrid", backend), str(plan)
    ours = run(module, x, grad)
    module.zero_grad()
    with use_backend("reference"):
        theirs = run(module.double(), x.double(), grad.double())
    bound = 16 * torch.finfo(dtype).eps
    for name in theirs:
        assert max(tolerances.errors(ours[name], theirs[name])) < bound, name


def passes_opcheck(op, case, namespace):
    """What an operator says of itself: its schema, shapes without data, whether it has a gradient."""
    if not fits(op, case):
        return
    arguments, keywords = sample(op, case)
    opcheck(
        getattr(namespace, op).default, arguments, keywords,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
