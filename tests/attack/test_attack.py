"""A minute of the attack, the same in every run (another with make test SEED=n), and proof that it sees faults."""

import collections
import os
from dataclasses import replace

import bounds
import pytest
import torch
from hypothesis import given, seed
from paper import PaperCoordAtt

from attack import calls, changes, judge, passes, rounds, spellings
from attack.pieces import Piece
from coordatt_fast import backends, before, ops
from coordatt_fast.codes import NORM_GIVEN

SEED = int(os.environ.get("SEED") or 0)
CASES = {"calls": 1200, "sequences": 50, "lookalikes": 12, "changes": 10, "environment": 9}

pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="the compiled library is not available")


@pytest.mark.parametrize("part", CASES)
def test_attack(part):
    counts = collections.Counter()
    rounds.one(part, SEED, CASES[part], counts)
    print(dict(counts))


# What the attack itself has to see --------------------------------------------------------------------

WHOLE = calls.Call(shape=(2, 17, 5, 33), mid=9, skip=True)
STACKED = replace(WHOLE, form="function", before=calls.Before())
CALLS = {
    "module": WHOLE,
    "channels_last": replace(WHOLE, x_layout="channels_last", norm="running", activation="relu6"),
    "bfloat16": replace(WHOLE, dtype=torch.bfloat16),
    "float16 autocast": replace(WHOLE, dtype=torch.float16, autocast=True, shape=(1, 3, 1, 7)),
    "float64": replace(WHOLE, dtype=torch.float64, x="offset", activation="silu"),
    "function": replace(WHOLE, form="function", norm="running", shape=(2, 16, 16, 16)),
    "hybrid": replace(WHOLE, form="hybrid", hook="act"),
    "large": replace(WHOLE, x="large", grad="large"),
    "stacked": replace(STACKED, skip=False),
    "stacked, channels_last": replace(
        STACKED, x_layout="channels_last", norm="running", before=calls.Before("running", "silu", calls.OF_BEFORE)
    ),
    "stacked, bfloat16": replace(STACKED, dtype=torch.bfloat16, before=calls.Before(activation=None, wide=True)),
    "stacked, float64": replace(STACKED, dtype=torch.float64, x="offset", before=calls.Before(activation="hard_swish")),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_wrong_element_is_seen(name, monkeypatch):
    """Each result in turn has its largest element half as large again."""
    run, broken, found = calls._run, None, set()

    def off(call, module, x, grad, out=None):
        results, result = run(call, module, x, grad, out)
        if not isinstance(module, PaperCoordAtt):
            zero = {"d conv1.bias"} if call.norm == "batch" else set()
            found.update(n for n, t in results.items() if t.is_floating_point() and n not in zero)
        if broken in results:
            value = results[broken]
            place = torch.unravel_index(value.abs().float().argmax(), value.shape)
            value[place] *= 1.5
        return results, result

    monkeypatch.setattr(calls, "_run", off)
    calls.check(CALLS[name])
    for broken in sorted(found):
        with pytest.raises(AssertionError, match=f"{broken}: .* times what is allowed"):
            calls.check(CALLS[name])


@pytest.mark.parametrize("dtype", calls.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_wrong_element_of_a_pass_is_seen(layout, dtype, monkeypatch):
    """Each result of pool, gate and their backward passes has one element off by 2%."""
    call = passes.Pass((2, 9, 5, 17), dtype, x_layout=layout, skip=True)
    results, given = passes.run(call)
    passes.check(call)
    for name, value in results.items():
        broken = value.clone()
        place = torch.unravel_index(broken.abs().float().argmax(), broken.shape)
        broken[place] *= 1.02
        monkeypatch.setattr(passes, "run", lambda call: (results | {name: broken}, given))
        with pytest.raises(AssertionError, match=f"{name}: .* times what is allowed"):
            passes.check(call)


def test_a_kernel_that_leaves_out_a_tail_is_seen(monkeypatch):
    """The last row of the result without its column gate; the last column of a mean; a gradient not spread."""
    call = replace(WHOLE, norm="running", grad=None)
    attention = ops.attention

    def short(x, *arguments):
        out = attention(x, *arguments)
        out[..., -1] = out[..., -2]
        return out

    monkeypatch.setattr(ops, "attention", short)
    with pytest.raises(AssertionError, match="out: .* times what is allowed"):
        calls.check(call)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", calls.DTYPES, ids=str)
def test_moments_that_leave_out_a_tail_are_seen(dtype, layout, monkeypatch):
    """The last column of 33 counts neither in the mean nor in the variance."""
    call = replace(STACKED, dtype=dtype, x_layout=layout, grad=None, before=calls.Before("no statistics"))
    attention = before.attention

    def short(x, stands, *block):
        part = x[..., :-1].to(ops.accumulate_dtype(dtype))
        mean, var = part.mean((0, 2, 3)), part.var((0, 2, 3), unbiased=False)
        weight, bias = (t.to(mean.dtype) for t in stands[:2])
        return attention(x, (weight, bias, mean, var, stands[4], NORM_GIVEN, stands[6], None, 0.0, False), *block)

    monkeypatch.setattr(before, "attention", short)
    with pytest.raises(AssertionError, match="out: .* times what is allowed"):
        calls.check(call)


@given(calls.calls(forms=("module", "stacked")))
@seed(1)
@rounds.options(120)
def test_the_truth_is_the_papers(call):
    """The balls' values are those of the paper's module in float64, by autograd."""
    if call.x in calls.NOT_FINITE or call.grad in calls.NOT_FINITE or 0 in call.shape or call.x == "huge":
        return
    if calls.impossible(call):
        return
    of = call.before and replace(call.before, wide=False)
    call = replace(call, dtype=torch.float64, autocast=False, wide_norm=False, momentum=0.1, before=of)
    generator = torch.Generator().manual_seed(call.seed)
    params = calls._params(call, generator)
    x = calls.map_of(call.x, call.shape, generator, call.dtype)
    grad = None if call.grad is None else calls.map_of(call.grad, call.shape, generator, call.dtype)
    theirs, _ = calls._run(call, calls._module(PaperCoordAtt, call, calls._copies(params)), x, grad)
    norm = {"no statistics": "batch"}.get(call.norm, call.norm)
    balls, _, _ = bounds.run(
        x, params, grad, norm=norm, activation=call.activation, skip=call.skip, eps=call.eps,
        sums=torch.float64, middle=torch.float64, momentum=0.1 if call.norm == "batch" else None,
        before=calls.bounds_of_before(call),
    )  # fmt: skip
    for name, value in theirs.items():
        if value is not None and value.is_floating_point():
            ratio, where = bounds.exceeds(value, balls[name])
            assert ratio <= 1, f"{name}: {where}"


PLAIN = spellings.Recipe()
HOSTILE = [
    Piece("x", "clamp"), Piece("out", "hook that scales"), Piece("s_h", "temperature", "training"),
    Piece("a_w", "offset", "channels_last", "expression"), Piece("p", "detach", "large", "lambdas"),
    Piece("out", "noise", "numpy random", "helper"), Piece("y", "half the gradient"),
    Piece("x", "offset", "count in closure", "while"), Piece("given", "temperature", "high", "method"),
    Piece("subclass", "clamp", "environment"), Piece("activation", "dropout", "training"),
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE, ids=lambda p: f"{p.effect}, {p.condition}, {p.place}")
def test_the_judge_sees(piece, monkeypatch):
    """Each of these, taken over by force, is told from the untouched copy."""
    recipe = replace(PLAIN, pieces=(piece,), bound=0.5, every=30)
    files = [spellings.build(recipe), spellings.build(PLAIN)]
    hostile, good = (kind() for _, kind in files)
    judge.spread(hostile)
    good.load_state_dict(hostile.state_dict())
    pair = judge.Pair(files[1][0], files[0][0], good, hostile)
    try:
        with pytest.raises(AssertionError):
            judge.compare(pair, judge.random.Random(SEED))
    finally:
        for file, _ in files:
            spellings.forget(file)


def test_the_judge_takes_what_is_equal():
    assert judge.judge(PLAIN, SEED) == "taken"
    assert changes.check(changes.Change()) == "equal"
