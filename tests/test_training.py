"""Training: every gradient and the running statistics, against float64."""

import itertools

import promises
import pytest
import tolerances
import torch
from harness import FLOATS, LAYOUTS, Case, beside, build, compare, data, fused, plain, run
from paper import ACTIVATIONS, PaperCoordAtt
from shapes import AWKWARD, EMPTY, FEW, TWO
from torch import nn

from coordatt_fast import CoordAtt, explain

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("shape", AWKWARD)
def test_shapes(shape, norm, dtype, layout):
    compare(Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm=norm), under_test=fused)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("shape", FEW)
def test_half_precision(shape, norm, dtype, autocast, layout):
    case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], autocast=autocast, layout=layout, norm=norm)
    compare(case, under_test=fused)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_options(norm, activation, bias, affine, skip):
    options = dict(norm=norm, activation=activation, bias=bias, affine=affine, skip=skip)
    for shape in TWO:
        compare(Case(*AWKWARD[shape], dtype=torch.float64, **options), under_test=fused)
    compare(Case(*AWKWARD["primes"], layout="nhwc", **options), under_test=fused)


NAMES = ["x"] + [f"{m}.{p}" for m in ("conv1", "bn1", "conv_h", "conv_w") for p in ("weight", "bias")]


def run_wanting(case, d, wanted):
    module = build(CoordAtt, case, d.params)
    for name, p in module.named_parameters():
        p.requires_grad_(name in wanted)
    x = d.x.detach().requires_grad_("x" in wanted)
    assert explain(module, x).tier == "fused"
    out = module(x)
    out.backward(d.grad)
    got = {"out": out.detach()} | {"d " + n: p.grad for n, p in module.named_parameters()} | {"d x": x.grad}
    if module.training:
        got["running_var"] = module.bn1.running_var
    return got


SUBSETS = [[n] for n in NAMES] + [[m for m in NAMES if m != n] for n in NAMES]
SUBSETS += [["conv_h.weight", "conv_w.weight"], ["conv_h.bias", "conv_w.bias"], ["bn1.weight", "bn1.bias"]]
SUBSETS += [["x", "bn1.weight"], ["conv1.weight", "conv1.bias"], ["x", "conv_w.bias"]]


@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda names: f"{len(names)}-{names[0]}")
def test_only_what_is_asked_for(wanted, norm):
    """Frozen parameters, frozen x: the gradients that are left are the same in every bit, the others stay
    None.
    """
    for shape, layout in zip(TWO, ("nhwc", "nchw")):
        case = Case(*AWKWARD[shape], norm=norm, layout=layout)
        d = data(case)
        everything, got = run_wanting(case, d, NAMES), run_wanting(case, d, wanted)
        for name, value in everything.items():
            if name.removeprefix("d ") in wanted or not name.startswith("d "):
                tolerances.assert_same_bits(got[name], value, name)
            else:
                assert got[name] is None, f"{name} was not asked for"


@pytest.mark.parametrize("training", [True, False])
def test_nothing_asked_for(training):
    case = Case(*AWKWARD["primes"], norm="batch" if training else "running")
    d = data(case)
    module = build(CoordAtt, case, d.params).requires_grad_(False)
    out = module(d.x)
    assert not out.requires_grad
    tolerances.assert_same_bits(out, fused(case, d)["out"])


@pytest.mark.parametrize("momentum", [0.1, 0.03, None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_running_statistics(dtype, momentum):
    """Three steps, as nn.BatchNorm2d takes them; momentum None is the cumulative average."""
    case = Case(*AWKWARD["primes"], dtype=FLOATS[dtype])

    def steps(cls, drawn, dtype=None):
        module = build(cls, case, drawn[0].params, dtype)
        module.bn1.momentum = momentum
        for d in drawn:
            module(d.x.to(module.conv1.weight.dtype))
        assert module.bn1.num_batches_tracked.item() == len(drawn)
        return {n: getattr(module.bn1, n) for n in ("running_mean", "running_var")}

    draw = lambda start: [data(case, 10 * start + seed) for seed in range(3)]
    if case.dtype is torch.float64:
        expected, ours = (steps(cls, draw(0)) for cls in (PaperCoordAtt, CoordAtt))
        assert all(max(tolerances.errors(ours[n], expected[n])) < tolerances.FORMULAS_AGREE for n in ours)
        return
    yardstick = tolerances.Yardstick(
        draw,
        lambda drawn, index: [beside(d, index) for d in drawn],
        lambda drawn: steps(PaperCoordAtt, drawn, torch.float64),
        lambda drawn: steps(PaperCoordAtt, drawn),
    )
    tolerances.check(lambda start: steps(CoordAtt, draw(start)), yardstick, key=dtype, draws=3)


COUNTERS = {
    "int32": torch.tensor(0, dtype=torch.int32),
    "uint8": torch.tensor(3, dtype=torch.uint8),
    "float32": torch.tensor(2.0),
    "float16": torch.tensor(2046, dtype=torch.float16),
    "one dimension": torch.tensor([4]),
    "int64": torch.tensor(7),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("start", COUNTERS)
def test_batches_are_counted_in_any_dtype(start, momentum):
    promises.counts_batches(COUNTERS[start], momentum)


def test_counters_that_only_count():
    """Several numbers, or one on another device, as long as the momentum does not ask for it."""
    for start in (torch.zeros(3), torch.zeros((), dtype=torch.long, device="meta")):
        promises.counts_batches(start, 0.1)
        with pytest.raises((ValueError, RuntimeError)):
            promises.counts_batches(start, None)
    module = CoordAtt(8, 8)
    module.bn1.num_batches_tracked = torch.tensor(False)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 8, 4, 5))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_gradients_accumulate():
    case = Case(*AWKWARD["primes"])
    d = data(case)
    module = build(CoordAtt, case, d.params)
    once = {name: g.clone() for name, g in run(module, d.x, d.grad).items()}
    x = d.x.detach().requires_grad_()
    module(x).backward(d.grad)
    for name, p in module.named_parameters():
        tolerances.assert_same_bits(p.grad, 2 * once["d " + name], name)
    tolerances.assert_same_bits(x.grad, once["d x"], "x")


@pytest.mark.parametrize("shape", TWO)
def test_without_running_statistics(shape):
    """track_running_stats=False: batch statistics in training and in eval, forward and backward."""
    case = Case(*AWKWARD[shape], dtype=torch.float64)
    d = data(case)
    for training in (True, False):
        results = []
        for cls in (PaperCoordAtt, CoordAtt):
            module = build(cls, case, d.params)
            old = module.bn1
            module.bn1 = nn.BatchNorm2d(case.mid, track_running_stats=False, dtype=case.dtype)
            module.bn1.load_state_dict({"weight": old.weight, "bias": old.bias})
            module.train(training)
            if cls is CoordAtt:
                assert explain(module, d.x).tier == "fused"
            results.append(run(module, d.x, d.grad))
        theirs, ours = results
        assert theirs.keys() == ours.keys()
        for name in theirs:
            if name != "d conv1.bias":
                assert max(tolerances.errors(ours[name], theirs[name])) < tolerances.FORMULAS_AGREE, name
        assert not ours["d conv1.bias"].any()


@pytest.mark.parametrize("bn_training, module_training", list(itertools.product([True, False], repeat=2)))
def test_flag_of_the_norm_alone_decides(bn_training, module_training):
    """Frozen BN in a training network, and the reverse: bn1.training is what counts, as in the paper's
    module.
    """
    case = Case(*AWKWARD["primes"], dtype=torch.float64)
    d = data(case)
    results = []
    for cls in (PaperCoordAtt, CoordAtt):
        module = build(cls, case, d.params).train(module_training)
        module.bn1.train(bn_training)
        results.append(run(module, d.x, d.grad))
        results[-1]["mean"] = module.bn1.running_mean.clone()
        results[-1]["tracked"] = module.bn1.num_batches_tracked.double()
    theirs, ours = results
    for name in theirs:
        if not (bn_training and name == "d conv1.bias"):
            assert max(tolerances.errors(ours[name], theirs[name])) < tolerances.FORMULAS_AGREE, name


SETTINGS = {
    "track_running_stats off, buffers there": lambda bn: setattr(bn, "track_running_stats", False),
    "no counter": lambda bn: setattr(bn, "num_batches_tracked", None),
    "no counter, momentum None": lambda bn: [
        setattr(bn, n, None) for n in ("num_batches_tracked", "momentum")
    ],
    "buffers taken away": lambda bn: [setattr(bn, n, None) for n in ("running_mean", "running_var")],
    "buffers exchanged": lambda bn: setattr(bn, "running_mean", torch.ones_like(bn.running_mean)),
    "momentum and eps": lambda bn: [setattr(bn, n, v) for n, v in (("momentum", 0.5), ("eps", 0.1))],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_norm_changed_later(setting, training):
    """nn.BatchNorm2d reads its attributes at every call, and so do we: gradients and buffers as with the
    paper's.
    """
    case = Case(*AWKWARD["primes"], dtype=torch.float64)
    d = data(case)
    results = []
    for cls in (PaperCoordAtt, CoordAtt):
        module = build(cls, case, d.params).train(training)
        SETTINGS[setting](module.bn1)
        results.append(run(module, d.x, d.grad))
        results[-1] |= {n: b.double() for n, b in module.bn1.named_buffers() if b is not None}
    theirs, ours = results
    assert theirs.keys() == ours.keys()
    for name in theirs:
        if name != "d conv1.bias":
            assert max(tolerances.errors(ours[name], theirs[name])) < tolerances.FORMULAS_AGREE, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout, training):
    shape, mid = EMPTY
    case = Case(shape, mid, layout=layout, norm="batch" if training else "running")
    d = data(case)
    theirs, ours = plain(case, d), run(build(CoordAtt, case, d.params), d.x, d.grad)
    for name, value in theirs.items():
        tolerances.assert_same_bits(ours[name].abs(), value.abs(), name)


def test_output_used_more_than_once():
    """A loss that uses the output twice and a slice once: gradients arrive summed, not overwritten."""
    case = Case(*AWKWARD["primes"], dtype=torch.float64)
    d = data(case)
    results = []
    for cls in (PaperCoordAtt, CoordAtt):
        module = build(cls, case, d.params)
        x = d.x.detach().requires_grad_()
        out = module(x)
        (out.square().sum() + (out * d.grad).sum() + 3 * out[:, ::2, 1:].sum()).backward()
        results.append({"x": x.grad} | {n: p.grad for n, p in module.named_parameters()})
    for name in results[0]:
        if name != "conv1.bias":
            assert max(tolerances.errors(results[1][name], results[0][name])) < tolerances.FORMULAS_AGREE, (
                name
            )
