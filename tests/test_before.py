"""The operators with a normalisation and an activation before the block, against both in float64."""

import functools
import itertools
from dataclasses import dataclass, replace

import harness
import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, LAYOUTS, Case
from paper import PaperCoordAtt
from shapes import AWKWARD
from torch import nn
from torch.library import opcheck

from coordatt_fast import CoordAtt, NormAct, before, coord_att, plan, use_backend
from coordatt_fast.codes import NORM_BATCH, NORM_GIVEN
from coordatt_fast.reference import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("cpu")

NAMES = ["none", *ACTIVATIONS]
# One value a channel is refused in training, by PyTorch.
SHAPES = [name for name, (shape, _) in AWKWARD.items() if shape[0] * shape[2] * shape[3] > 1]
FEW = ["primes", "W=7", "W=17", "W=130", "H=129", "C=129", "many-images", "large"]
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hard_swish": (-3.0, 3.0)}


@dataclass(frozen=True)
class Stacked:
    """A case of the block, with what stands before it."""

    case: Case
    norm: str = "batch"
    activation: str = "relu6"
    affine: bool = True

    def but(self, **changes):
        return replace(self, **changes)


class Stack(nn.Module):
    def __init__(self, stacked, block):
        super().__init__()
        self.norm = nn.BatchNorm2d(stacked.case.shape[1], affine=stacked.affine)
        self.act = nn.Identity() if stacked.activation == "none" else ACTIVATIONS[stacked.activation].make()
        self.att = block

    def forward(self, x):
        return self.att(self.act(self.norm(x)))


class Fused(Stack):
    def forward(self, x):
        n = self.norm
        code = NAMES.index(type(self).name) - 1
        of_norm = (
            n.weight,
            n.bias,
            n.running_mean,
            n.running_var,
            n.eps,
            NORM_BATCH if n.training else NORM_GIVEN,
        )
        stands = *of_norm, code, n.num_batches_tracked, n.momentum, n.training
        weights, norm, activation, skip, tracked, momentum, update, _, _ = plan.arguments(
            self.att.__dict__, x
        )
        return before.attention(x, stands, weights, norm, activation, skip, tracked, momentum, update)


def build(stacked, d, fused=False, dtype=None):
    case = stacked.case
    block = harness.build(CoordAtt if fused else PaperCoordAtt, case, d.params["att"], dtype)
    kind = type("Fused", (Fused,), {"name": stacked.activation}) if fused else Stack
    made = kind(stacked, block)
    made.norm.to(dtype or case.param_dtype)
    made.norm.load_state_dict(d.params["norm"], strict=False)
    made.train(case.norm == "batch")
    made.norm.train(stacked.norm == "batch")
    return made


def run(stacked, d, fused=False, dtype=None, backward=True):
    module = build(stacked, d, fused, dtype)
    x, grad = (t if dtype is None else t.to(dtype) for t in (d.x, d.grad))
    with harness.autocast(stacked.case):
        results = harness.run(module, x, grad if backward else None)
    for name, b in module.named_buffers():
        if b.is_floating_point():
            results[name] = b.clone()
    return results


@functools.lru_cache(maxsize=4096)
def data(stacked, seed=0):
    """harness.data, scaled and off zero, with no activation so near a kink that rounding decides on its side."""
    case = stacked.case
    d = harness.data(case.but(layout="nchw"), seed)
    g = seeds.generator(7000 + seed)
    c = case.shape[1]
    draw = lambda *size: torch.randn(size, generator=g, dtype=torch.float64)
    scale = (0.5 * draw(c)).exp()
    norm = {"weight": 1.5 + 0.5 * draw(c), "bias": 0.7 + 0.7 * draw(c)} if stacked.affine else {}
    norm |= {"running_mean": draw(c), "running_var": 2 * scale.square() * (0.3 * draw(c)).exp()}
    norm = {name: t.to(case.param_dtype) for name, t in norm.items()}
    x = d.x.double() * scale[:, None, None] + 2 * draw(c)[:, None, None]
    clear = 0.1 if case.dtype in (torch.bfloat16, torch.float16) else 1e-3
    for _ in range(20):
        x = x.to(case.dtype).double()
        module = nn.BatchNorm2d(c, affine=stacked.affine).double()
        module.load_state_dict(norm, strict=False)
        u = module.train(stacked.norm == "batch")(x).detach()
        near = sum(((u - kink).abs() < clear).int() for kink in KINKS.get(stacked.activation, ())) > 0
        if not isinstance(near, torch.Tensor) or not near.any():
            break
        slope = scale[:, None, None].expand_as(x)[near] / 1.5
        x[near] += 4 * clear * slope * torch.where(torch.rand(slope.shape, generator=g) < 0.5, -1.0, 1.0)
    x = x.to(case.dtype).contiguous(memory_format=LAYOUTS[case.layout])
    return harness.Data(
        x, d.grad.contiguous(memory_format=LAYOUTS[case.layout]), {"att": d.params, "norm": norm}
    )


def beside(d, index):
    near = harness.beside(harness.Data(d.x, d.grad, {}), index)
    g = seeds.generator(4000 + index)
    near.params = {part: {n: tolerances.beside(t, g) for n, t in p.items()} for part, p in d.params.items()}
    return near


@functools.lru_cache(maxsize=128)
def yardstick(stacked, backward):
    return tolerances.Yardstick(
        lambda seed: data(stacked, seed),
        beside,
        lambda d: run(stacked, d, dtype=torch.float64, backward=backward),
        lambda d: run(stacked, d, backward=backward),
    )


def under(names):
    return tuple(name.replace("d ", "d att.") for name in names)


def compare(stacked, backward=True):
    case = stacked.case
    if case.dtype is torch.float64:
        d = data(stacked)
        got, truth = run(stacked, d, True, backward=backward), run(stacked, d, backward=backward)
        for name, value in truth.items():
            if name not in under(case.exactly_zero + case.vanishing):
                assert max(tolerances.errors(got[name], value)) < tolerances.FORMULAS_AGREE, name
        return
    tolerances.check(
        lambda seed: run(stacked, data(stacked, seed), True, backward=backward),
        yardstick(stacked.but(case=case.but(layout="nchw")), backward),
        key="before, " + harness.key(case),
        draws=harness.draws(case.shape),
        exactly_zero=under(case.exactly_zero) if backward else (),
        vanishing=under(case.vanishing) if backward else (),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, norm, dtype, layout):
    compare(Stacked(Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm=norm), norm))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("shape", FEW)
def test_half_precision(shape, norm, dtype, autocast, layout):
    case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], autocast=autocast, layout=layout, norm=norm)
    compare(Stacked(case, norm))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("norms", list(itertools.product(["batch", "running"], ["batch", "running", "none"])))
def test_options(norms, activation, layout):
    for shape, dtype, skip, affine in (("primes", "float32", True, True), ("large", "float64", False, False)):
        case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm=norms[1], skip=skip)
        compare(Stacked(case, norms[0], activation, affine))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["relu6", "silu"])
def test_every_level(simd, activation, dtype, layout):
    for shape in ("primes", "W=7", "W=17", "C=129"):
        case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout)
        compare(Stacked(case, activation=activation))
        compare(Stacked(case.but(norm="running"), "running", activation), backward=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("shape", ["W=28", "large", "deep", "one-image-each"])
def test_any_number_of_threads(shape, norm, layout):
    """The same bits."""
    case = Case(*AWKWARD.get(shape, ((3, 130, 9, 40), 8)), layout=layout, norm=norm)
    stacked = Stacked(case, norm)
    d = data(stacked)
    torch.set_num_threads(1)
    first = run(stacked, d, True)
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        for name, value in run(stacked, d, True).items():
            tolerances.assert_same_bits(value, first[name], f"{name}, {count} threads")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_mean(layout, dtype):
    """A mean of 100 standard deviations: the variance is not lost in the sum of squares."""
    stacked = Stacked(Case((3, 6, 30, 41), 8, dtype=FLOATS[dtype], layout=layout), activation="none")
    d = data(stacked)
    d = harness.Data(d.x * 0.01 + 1, d.grad, d.params)
    truth = run(stacked, harness.Data(d.x.double(), d.grad.double(), d.params), dtype=torch.float64)
    got, theirs = run(stacked, d, True), run(stacked, d)
    for name in ("out", "norm.running_var", "d x", "d norm.weight"):
        ours, plain = (max(tolerances.errors(r[name], truth[name])) for r in (got, theirs))
        eps = torch.finfo(got[name].dtype).eps
        assert ours <= 2 * plain + eps, (name, ours, plain)


def test_outliers_first():
    """The first elements of a plane far from all others."""
    for layout in LAYOUTS:
        stacked = Stacked(Case((2, 5, 20, 23), 8, layout=layout), activation="none")
        d = data(stacked)
        x = d.x.clone()
        x[:, :, 0, :16] = 1e4
        truth = run(stacked, harness.Data(x.double(), d.grad.double(), d.params), dtype=torch.float64)
        got = run(stacked, harness.Data(x, d.grad, d.params), True)
        for name in ("norm.running_mean", "norm.running_var"):
            assert max(tolerances.errors(got[name], truth[name])) < 4 * torch.finfo(torch.float32).eps, name


def test_not_finite():
    """NaN and infinities come out where plain PyTorch has them."""
    for layout, activation, norm, bad in itertools.product(
        LAYOUTS, NAMES, ["batch", "running"], [float("nan"), float("inf"), -float("inf")]
    ):
        stacked = Stacked(
            Case(*AWKWARD["primes"], layout=layout, norm=norm, dtype=torch.float64), norm, activation
        )
        d = data(stacked)
        x = d.x.clone()
        x[1, 3, 5, 2] = bad
        got, plain = (run(stacked, harness.Data(x, d.grad, d.params), fused) for fused in (True, False))
        for name in plain:
            if name != "d att.conv1.bias":
                same = [torch.nan_to_num(r[name], nan=7e77).isfinite() for r in (got, plain)]
                nan = [r[name].isnan() for r in (got, plain)]
                assert torch.equal(*nan) and torch.equal(*same), (name, layout, activation, norm, bad)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_running_statistics(dtype, momentum):
    """Three steps; momentum None is the cumulative average."""
    stacked = Stacked(Case(*AWKWARD["primes"], dtype=FLOATS[dtype]))
    modules = [build(stacked, data(stacked), True), build(stacked, data(stacked), False, torch.float64)]
    for module, backward in itertools.product(modules, [True, False]):
        module.norm.momentum = module.att.bn1.momentum = momentum
        for seed in range(3):
            with torch.set_grad_enabled(backward):
                module(data(stacked, seed).x.to(module.norm.weight.dtype))
        assert module.norm.num_batches_tracked.item() == (6 if not backward else 3)
    ours, theirs = (dict(m.named_buffers()) for m in modules)
    for name, b in theirs.items():
        bound = 1e-12 if FLOATS[dtype] is torch.float64 else 16 * torch.finfo(FLOATS[dtype]).eps
        if b.is_floating_point():
            assert max(tolerances.errors(ours[name], b)) < bound, name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_given_statistics_need_no_count(backend):
    """With the cumulative average, before the first batch and outside training."""
    stacked = Stacked(Case(*AWKWARD["primes"], dtype=torch.float64, norm="running"), "running")
    d = data(stacked)
    module = build(stacked, d)
    a, n = module.att, module.norm
    none = torch.tensor(0)
    stands = NormAct(
        n.weight,
        n.bias,
        n.running_mean,
        n.running_var,
        momentum=None,
        num_batches_tracked=none,
        activation="relu6",
    )
    of_bn = a.bn1.weight, a.bn1.bias, a.bn1.running_mean, a.bn1.running_var
    weights = (
        a.conv1.weight,
        a.conv1.bias,
        *of_bn,
        a.conv_h.weight,
        a.conv_h.bias,
        a.conv_w.weight,
        a.conv_w.bias,
    )
    with use_backend(backend):
        out = coord_att(d.x, *weights, before=stands, momentum=None, num_batches_tracked=none)
    assert max(tolerances.errors(out.detach(), module(d.x).detach())) < tolerances.FORMULAS_AGREE
    assert none == 0


WANTED = [
    "x",
    "norm.weight",
    "norm.bias",
    "att.conv1.weight",
    "att.bn1.weight",
    "att.conv_h.weight",
    "att.conv_w.bias",
]


@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("wanted", WANTED)
def test_only_what_is_asked_for(wanted, norm):
    for layout in LAYOUTS:
        stacked = Stacked(Case(*AWKWARD["primes"], layout=layout, norm=norm), norm)
        d = data(stacked)
        everything = run(stacked, d, True)
        for names in ([wanted], [name for name in WANTED if name != wanted]):
            module = build(stacked, d, True)
            for name, p in module.named_parameters():
                p.requires_grad_(name in names)
            x = d.x.detach().requires_grad_("x" in names)
            module(x).backward(d.grad)
            got = dict(module.named_parameters()) | {"x": x}
            for name, leaf in got.items():
                if name in names:
                    tolerances.assert_same_bits(leaf.grad, everything["d " + name], name)
                else:
                    assert leaf.grad is None


@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_second_derivatives(activation, norm):
    stacked = Stacked(Case((2, 3, 3, 2), 2, dtype=torch.float64, norm=norm), norm, activation)
    d = data(stacked)
    module = build(stacked, d, True)
    module.norm.momentum = 0.0

    def function(x, weight, bias):
        return torch.func.functional_call(module, {"norm.weight": weight, "norm.bias": bias}, (x,))

    inputs = [d.x.clone(), *(d.params["norm"][n].clone() for n in ("weight", "bias"))]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=1e-10)


def arguments(stacked, module, x, train):
    n, a = module.norm, module.att
    stands = (n.weight, n.bias, n.running_mean, n.running_var, n.eps)
    stands += (NORM_BATCH if n.training else NORM_GIVEN,) * train + (NAMES.index(stacked.activation) - 1,)
    b = a.bn1
    weights = (a.conv1.weight, a.conv1.bias, b.weight, b.bias, b.running_mean, b.running_var, b.eps)
    weights += (a.conv_h.weight, a.conv_h.bias, a.conv_w.weight, a.conv_w.bias)
    return (x, *stands, *weights, *(NORM_BATCH if b.training else NORM_GIVEN,) * train, 0, False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "running"])
def test_registration(norm, layout):
    """Schema, fake, autograd and what the compiler makes of them."""
    operators = torch.ops.coordatt_fast
    for shape, dtype in itertools.product(["primes", "one-channel"], [torch.float32, torch.bfloat16]):
        stacked = Stacked(Case(*AWKWARD[shape], layout=layout, norm=norm, dtype=dtype), norm)
        d = data(stacked)
        module = build(stacked, d, True)
        x = d.x.detach().requires_grad_()
        made = arguments(stacked, module, x, True)
        opcheck(operators.norm_attend_train.default, made, atol=1e-2 if dtype is torch.bfloat16 else None,
                rtol=1e-2 if dtype is torch.bfloat16 else None)  # fmt: skip
        if norm == "running":
            detached = [
                t.detach() if isinstance(t, torch.Tensor) else t for t in arguments(stacked, module, x, False)
            ]
            opcheck(operators.norm_attend.default, tuple(detached))
        results = operators.norm_attend_train(
            *(t.detach() if isinstance(t, torch.Tensor) else t for t in made)
        )
        settings = (1e-5, NORM_BATCH if norm == "batch" else NORM_GIVEN, 3)
        a = module.att
        backward = (
            d.grad,
            d.x,
            *results[1:],
            module.norm.weight.detach(),
            module.norm.bias.detach(),
            *settings,
        )
        backward += (a.conv1.weight.detach(), a.bn1.weight.detach(), a.bn1.bias.detach(), 1e-5)
        backward += (a.conv_h.weight.detach(), a.conv_w.weight.detach(), settings[1], 0, False, 2047)
        opcheck(operators.norm_attend_backward.default, backward)


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_compiled(norm):
    stacked = Stacked(Case(*AWKWARD["primes"], norm=norm), norm)
    d = data(stacked)
    eager, traced = build(stacked, d, True), build(stacked, d, True)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    leaves = [d.x.detach().requires_grad_() for _ in range(2)]
    for module, x in zip((eager, compiled), leaves):
        module(x).backward(d.grad)
    tolerances.assert_same_bits(leaves[0].grad, leaves[1].grad)
    for (name, ours), theirs in zip(eager.named_parameters(), traced.parameters()):
        tolerances.assert_same_bits(ours.grad, theirs.grad, name)
    for (name, ours), theirs in zip(eager.named_buffers(), traced.buffers()):
        assert torch.equal(ours, theirs), name


BAD = [
    (1, torch.zeros(3), "before_weight has shape"),
    (2, torch.zeros(17, dtype=torch.float64), "before_bias must have x's dtype"),
    (3, None, "before_norm 1 needs"),
    (5, -1.0, "before_eps is -1"),
    (6, 0, "before_norm must be"),
    (7, 4, "before_activation must be"),
    (7, -2, "before_activation must be"),
]


@pytest.mark.parametrize("index, value, message", BAD)
def test_what_does_not_fit_is_refused(index, value, message):
    stacked = Stacked(Case(*AWKWARD["primes"], norm="running"), "running")
    d = data(stacked)
    made = [
        t.detach() if isinstance(t, torch.Tensor) else t
        for t in arguments(stacked, build(stacked, d, True), d.x, True)
    ]
    made[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.coordatt_fast.norm_attend_train(*made)
