"""What every GPU backend promises besides close numbers; each suite calls these on its own kernels.

under_test(case, d, backward=True) gives the package's results on the suite's kernels, and proves that they ran.
"""

import pytest
import seeds
import test_registration
import tolerances
import torch
from harness import Case, build, data, feature_map, plain, run, truth
from paper import PaperCoordAtt
from shapes import AWKWARD
from test_forward import arguments
from test_nonfinite import by_reference, not_finite, same_kind, stops_gradients
from test_registration import CASES, fits, sample
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
        theirs, ours = by_reference(case, d), under_test(case, d)
        for name in theirs:
            if name not in case.exactly_zero:
                same_kind(ours[name], theirs[name], name, {"not finite": not_finite})


def keeps_gradients_where_the_activation_is_flat(activation, under_test):
    for norm in ("batch", "running", "none"):
        for value in (torch.nan, -torch.inf):
            stops_gradients(Case((2, 5, 4, 3), 9, norm=norm, activation=activation), value, under_test)


# One pixel, one channel: what PyTorch takes for contiguous and for channels_last at a time.
AMBIGUOUS = [(1, 8, 1, 1), (2, 8, 1, 1), (1, 1, 1, 1), (2, 1, 5, 6), (1, 1, 5, 1), (2, 1, 1, 6), (1, 8, 5, 6), (2, 8, 1, 6)]
DENSE = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "channel slice": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "channels_last slice": lambda t: torch.cat([t, t], 1).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[
        :, : t.shape[1]
    ],
}


def returns_plain_strides(shape):
    """Of the result and of a leaf's gradient, in training, inference and the hybrid tier."""
    for dense in DENSE:
        x = DENSE[dense](torch.randn(shape))
        for skip in (False, True):
            for kind in ("training", "inference", "hybrid"):
                found = []
                for cls in (PaperCoordAtt, CoordAtt):
                    module = cls(shape[1], shape[1], skip=skip).train(kind == "training")
                    if kind == "hybrid":
                        module.bn1 = nn.GroupNorm(2, 8)
                    if kind == "inference":
                        with torch.no_grad():
                            found.append((module(x).stride(),))
                        continue
                    leaf = x.detach().requires_grad_()
                    out = module(leaf)
                    out.backward(torch.ones(shape))
                    found.append((out.stride(), leaf.grad.stride()))
                assert found[0] == found[1], f"{dense}, x {x.stride()}, skip {skip}, {kind}: {found}"


def counts_batches(start, momentum):
    """In a tensor of any dtype or device, as plain PyTorch."""
    case = Case((2, 5, 4, 3), 9, torch.float64)
    d = data(case)
    theirs, ours = (build(cls, case, d.params) for cls in (PaperCoordAtt, CoordAtt))
    for module in (theirs, ours):
        module.bn1.num_batches_tracked = start.clone()
        module.bn1.momentum = momentum
        for seed in range(3):
            x = data(case, seed).x
            module(x.requires_grad_(seed == 1)).sum()
    got, expected = ours.bn1.num_batches_tracked, theirs.bn1.num_batches_tracked
    assert got.dtype == expected.dtype and got.device == expected.device and got.shape == expected.shape
    assert got.is_meta or torch.equal(got, expected)
    for name in ("running_mean", "running_var"):
        assert max(tolerances.errors(getattr(ours.bn1, name), getattr(theirs.bn1, name))) < 1e-13, name


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
    generator = seeds.generator(3)
    x, grad = (feature_map(shape, generator, dtype, layout) for _ in range(2))
    seeds.seed(1)
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


def case_of(op):
    return CASES["nhwc float32 running" if op in ("attend", "attend_out") else "nchw float32 batch"]


def refuses_other_shapes(op, namespace):
    """Each 1x1 weight transposed, each vector as a column."""
    args = sample(op, case_of(op))
    function = getattr(namespace, op).default
    refused = 0
    for i, (argument, t) in enumerate(zip(function._schema.arguments, args)):
        backward = op == "attend_backward"
        counted = argument.name == "bn_bias" or (argument.name == "bn_weight" and not backward)
        saved = backward and argument.name in ("pooled", "squeezed", "gates", "mean", "var")
        if not torch.is_tensor(t) or counted or saved or argument.name in ("x", "grad", "num_batches_tracked"):
            continue
        given = list(args)
        given[i] = t.transpose(0, 1) if t.dim() == 4 else t.unsqueeze(1)
        with pytest.raises(RuntimeError, match=f"{argument.name} has shape|not what the forward pass saved"):
            function(*given)
        refused += 1
    assert refused >= 4


def emptied(t, spread=False):
    """t as it is while a sharded module's parameters are elsewhere: its sizes, and no memory."""
    t = torch.stack([t, t], -1)[..., 0] if spread else t.clone()
    t.untyped_storage().resize_(0)
    return t


def refuses_what_has_no_memory(op, namespace):
    """Each tensor of the operator, also as a view that would be copied before a kernel reads it."""
    args = sample(op, case_of(op))
    function = getattr(namespace, op).default
    for i, (argument, t) in enumerate(zip(function._schema.arguments, args)):
        sizes_alone = ("update_running_stats", "squeezed"), ("pool_backward", "x")
        if not torch.is_tensor(t) or (op, argument.name) in sizes_alone:
            continue
        for spread in (False, True) if t.dim() == 4 else (False,):
            given = list(args)
            given[i] = emptied(t, spread)
            with pytest.raises(RuntimeError, match="storage is empty"):
                function(*given)


SHAPED = ("attend", "attend_train", "attend_train_update", "attend_backward")


def refuses_wrong_tensors(op, namespace, monkeypatch):
    """monkeypatch: what the backward pass is given comes from this namespace's forward."""
    monkeypatch.setattr(test_registration, "ops", lambda: namespace)
    refuses_what_has_no_memory(op, namespace)
    if op in SHAPED:
        refuses_other_shapes(op, namespace)


def passes_opcheck(op, case, namespace):
    """What an operator says of itself: its schema, shapes without data, whether it has a gradient."""
    if not fits(op, case):
        return
    opcheck(
        getattr(namespace, op).default, sample(op, case),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
