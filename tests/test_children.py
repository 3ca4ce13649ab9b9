"""Hooks and replaced children: they run, they are honoured, and the numbers are the paper's with the same
change.
"""

import types

import pytest
import seeds
import tolerances
import torch
from harness import Case, build, data, run
from paper import HSwish, PaperCoordAtt
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from coordatt_fast import CoordAtt, accelerate, explain, plan

CASE = Case((2, 12, 5, 7), 8, dtype=torch.float64)
CHILDREN = ["pool_h", "pool_w", "conv1", "bn1", "act", "conv_h", "conv_w"]


def compare_changed(change, *, norm="batch", tier="hybrid", shift_cancels=False):
    """Applies the same change to our module and to the paper's; results must agree and the tier must be the
    one named.

    shift_cancels: the norm takes out conv1's bias, whose gradient is then noise around zero in both.
    """
    case = CASE.but(norm=norm)
    d = data(case)
    results = []
    for cls in (PaperCoordAtt, CoordAtt):
        module = build(cls, case, d.params)
        seeds.seed(7)
        change(module)
        if cls is CoordAtt and tier:
            assert explain(module, d.x).tier == tier, str(explain(module, d.x))
        results.append(run(module, d.x, d.grad))
    theirs, ours = results
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        if name == "d conv1.bias" and (norm == "batch" or shift_cancels):
            continue
        assert (value is None) == (ours[name] is None), name
        if value is not None:
            assert max(tolerances.errors(ours[name], value)) < tolerances.FORMULAS_AGREE, name
    return ours


@pytest.fixture(autouse=True)
def _any_backend_but_only_one(request):
    """Hybrid calls run on the compiled pool and gate where they are there."""
    from coordatt_fast import backends, use_backend

    with use_backend("cpu" if backends()["cpu"].available else "reference"):
        yield


@pytest.fixture
def hybrid():
    from coordatt_fast import backends

    return "hybrid" if backends()["cpu"].available else None


@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.parametrize("norm", ["batch", "running"])
def test_forward_hook(child, norm):
    calls = []

    def hook(module, args, out):
        calls.append(out.shape)
        return out * 1.5 + 0.25

    compare_changed(lambda m: getattr(m, child).register_forward_hook(hook), norm=norm, tier=None)
    assert len(calls) == 2 and calls[0] == calls[1], f"paper and ours each once, same shape: {calls}"


@pytest.mark.parametrize("child", CHILDREN)
def test_forward_pre_hook(child):
    calls = []

    def hook(module, args):
        calls.append(args[0].shape)
        return (args[0] * 0.5 - 0.1,)

    compare_changed(lambda m: getattr(m, child).register_forward_pre_hook(hook), tier=None)
    assert len(calls) == 2 and calls[0] == calls[1]


@pytest.mark.parametrize("child", CHILDREN)
def test_backward_hook(child):
    seen = []

    def hook(module, grad_input, grad_output):
        seen.append(grad_output[0])
        return tuple(None if g is None else 2 * g for g in grad_input)

    compare_changed(lambda m: getattr(m, child).register_full_backward_hook(hook), tier=None)
    assert len(seen) == 2
    assert max(tolerances.errors(seen[1], seen[0])) < tolerances.FORMULAS_AGREE


@pytest.mark.parametrize("child", CHILDREN)
def test_backward_pre_hook(child):
    hook = lambda module, grad_output: tuple(3 * g for g in grad_output)
    compare_changed(lambda m: getattr(m, child).register_full_backward_pre_hook(hook), tier=None)


def test_hooks_on_the_module_itself():
    """These run outside the block: the fused path stays."""
    calls = []
    hook = lambda m, i, out: calls.append(1) or out * 2
    from coordatt_fast import backends

    tier = "fused" if backends()["cpu"].available else None
    compare_changed(lambda m: m.register_forward_hook(hook), tier=tier)
    assert len(calls) == 2


def test_global_hook():
    """torch.nn.modules.module.register_module_forward_hook: profilers use it."""
    d = data(CASE)
    counts = []
    for cls in (PaperCoordAtt, CoordAtt):
        module, names = build(cls, CASE, d.params), []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda m, i, o: names.append(type(m).__name__)
        )
        try:
            module(d.x)
        finally:
            handle.remove()
        counts.append([n for n in names if n in ("Conv2d", "BatchNorm2d", "AdaptiveAvgPool2d")])
    assert sorted(counts[0]) == sorted(counts[1])


def test_removing_the_hook_brings_the_fused_path_back(cpu):
    d = data(CASE)
    module = build(CoordAtt, CASE, d.params)
    expected = run(build(CoordAtt, CASE, d.params), d.x, d.grad)
    handle = module.conv1.register_forward_hook(lambda m, i, o: o)
    assert explain(module, d.x).tier != "fused"
    handle.remove()
    assert explain(module, d.x).tier == "fused"
    got = run(module, d.x, d.grad)
    for name in expected:
        tolerances.assert_same_bits(got[name], expected[name], name)


def test_tensor_hooks_on_parameters_fire():
    """Gradient hooks sit on the parameters, not on the children: the fused path must feed them too."""

    def change(m):
        for p in m.parameters():
            p.register_hook(lambda g: 2 * g)

    compare_changed(change, tier=None)


class Scale(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * 2


class LoRA(nn.Module):
    """A low-rank update beside a frozen convolution."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        out_channels, in_channels = base.weight.shape[:2]
        self.down = nn.Parameter(torch.randn(rank, in_channels, 1, 1, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(out_channels, rank, 1, 1, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + nn.functional.conv2d(nn.functional.conv2d(x, self.down), self.up)


class ConvSubclass(nn.Conv2d):
    """Looks like a Conv2d to isinstance, computes something else."""

    def forward(self, x):
        return super().forward(x) * 3


class NormSubclass(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def swap(name, make):
    return lambda m: setattr(m, name, make(getattr(m, name)).to(torch.float64))


def subclassed(cls):
    def make(old):
        new = object.__new__(cls)
        new.__dict__ = dict(old.__dict__)
        return new

    return make


REPLACED = {
    "GroupNorm": swap("bn1", lambda old: nn.GroupNorm(4, 8)),
    "InstanceNorm2d": swap("bn1", lambda old: nn.InstanceNorm2d(8, affine=True)),
    "subclass of BatchNorm2d": swap("bn1", subclassed(NormSubclass)),
    "two norms": swap("bn1", lambda old: nn.Sequential(old, nn.GroupNorm(2, 8))),
    "GELU": swap("act", lambda old: nn.GELU()),
    "own activation": swap("act", lambda old: Scale()),
    "h_swish as the original spells it": swap("act", lambda old: HSwish()),
    "PReLU": swap("act", lambda old: nn.PReLU(8)),
    "Identity as activation": swap("act", lambda old: nn.Identity()),
    "subclass of Conv2d": swap("conv1", subclassed(ConvSubclass)),
    "LoRA conv1": swap("conv1", LoRA),
    "LoRA conv_h": swap("conv_h", LoRA),
    "LoRA conv_w": swap("conv_w", LoRA),
    "grouped conv1": swap("conv1", lambda old: nn.Conv2d(12, 8, 1, groups=4)),
    "grouped conv_w": swap("conv_w", lambda old: nn.Conv2d(8, 12, 1, groups=2)),
    "3x3 conv1": swap("conv1", lambda old: nn.Conv2d(12, 8, 3, padding=1)),
    "3x3 conv_w": swap("conv_w", lambda old: nn.Conv2d(8, 12, 3, padding=1)),
    "dilated 3x3 conv_h": swap("conv_h", lambda old: nn.Conv2d(8, 12, 3, padding=2, dilation=2)),
    "pruned conv_h": lambda m: prune.l1_unstructured(m.conv_h, "weight", amount=0.5),
    "pruned conv1": lambda m: prune.random_unstructured(m.conv1, "weight", amount=0.5),
}


class Noisy(nn.Module):
    """A weight that is drawn anew at each use."""

    def forward(self, weight):
        return nn.functional.dropout(weight, 0.3, self.training)


class Tagged(torch.Tensor):
    """A tensor of another class."""


class Tagging(nn.Module):
    def forward(self, weight):
        return weight.as_subclass(Tagged)


PARAMETRIZED = {
    "weight_norm": lambda m: parametrizations.weight_norm(m.conv1),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.conv_h),
    "orthogonal, all": lambda m: [parametrizations.orthogonal(c) for c in (m.conv1, m.conv_h, m.conv_w)],
    "bias": lambda m: parametrize.register_parametrization(m.conv_w, "bias", nn.Softplus()),
    "noisy": lambda m: [parametrize.register_parametrization(c, "weight", Noisy()) for c in (m.conv_h, m.conv1)],
    "another class": lambda m: parametrize.register_parametrization(m.conv1, "weight", Tagging()),
}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", PARAMETRIZED)
def test_parametrized(change, dtype, training, accelerated, cpu):
    """Two steps, with the same random numbers and power iterations as in plain PyTorch; explain takes none."""
    case = CASE.but(norm="batch" if training else "running", dtype=torch.float64)
    d = data(case)
    theirs, ours = (build(cls, case, d.params) for cls in (PaperCoordAtt, PaperCoordAtt if accelerated else CoordAtt))
    if accelerated:
        accelerate(ours)
    for module in (theirs, ours):
        seeds.seed(7)
        PARAMETRIZED[change](module)
        module.to(dtype)
    ours.load_state_dict(theirs.state_dict())
    fused = change != "another class" and dtype is not torch.bfloat16
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0}[dtype]
    for _ in range(2):
        results = []
        for module in (theirs, ours):
            seeds.seed(11)
            if module is ours:
                before = {name: t.clone() for name, t in ours.state_dict().items()}
                assert explain(ours, d.x.to(dtype)).tier == ("fused" if fused else "hybrid")
                after = ours.state_dict().items()
                assert all(torch.allclose(t, before[name], 0, 0, equal_nan=True) for name, t in after)
            results.append(run(module, d.x.to(dtype), d.grad.to(dtype)) | {"random": torch.get_rng_state().double()})
            with torch.no_grad():
                for p in module.parameters():
                    p.sub_(0.1 * p.grad).grad = None
        for name, expected in results[0].items():
            if dtype is torch.bfloat16 and name != "random":
                continue  # rounding, two steps on
            if name != "d conv1.bias" or not training:  # batch statistics take this bias out again
                scale = max(1.0, expected.abs().max())
                assert (results[1][name].double() - expected.double()).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("change", REPLACED)
def test_replaced_child(change, norm, hybrid):
    compare_changed(REPLACED[change], norm=norm, tier=hybrid, shift_cancels=change == "InstanceNorm2d")


def test_forward_replaced_on_the_instance(hybrid):
    """YOLO's fuse() and quantisers bind another forward to one instance."""

    def change(m):
        m.conv_h.forward = types.MethodType(lambda self, x: nn.Conv2d.forward(self, x) * -2, m.conv_h)

    compare_changed(change, tier=None)


def test_norm_folded_away(cpu):
    """torch.ao's fuse_modules folds bn1 into conv1 and leaves an Identity: still fused, still right."""
    case = CASE.but(norm="running")
    d = data(case)
    module, theirs = (build(cls, case, d.params) for cls in (CoordAtt, PaperCoordAtt))
    module.conv1 = torch.nn.utils.fuse_conv_bn_eval(module.conv1.eval(), module.bn1.eval())
    module.bn1 = nn.Identity()
    assert explain(module, d.x).tier == "fused"
    with torch.no_grad():
        assert max(tolerances.errors(module(d.x), theirs(d.x))) < tolerances.FORMULAS_AGREE


@pytest.mark.parametrize(
    "act, name", [(nn.SiLU, "silu"), (nn.ReLU, "relu"), (nn.ReLU6, "relu6"), (nn.Hardswish, "hard_swish")]
)
def test_activation_exchanged_for_a_known_one(cpu, act, name):
    """Read at call time: swapping act for another known activation stays fused and computes the new one."""
    for start in ("hard_swish", "relu"):
        case = CASE.but(activation=start)
        d = data(case)
        ours, theirs = (build(cls, case, d.params) for cls in (CoordAtt, PaperCoordAtt))
        ours.act = theirs.act = act()
        assert explain(ours, d.x).tier == "fused"
        got, expected = run(ours, d.x, d.grad), run(theirs, d.x, d.grad)
        for key in expected:
            if key != "d conv1.bias":
                assert max(tolerances.errors(got[key], expected[key])) < tolerances.FORMULAS_AGREE, key


def test_a_known_class_with_other_settings_is_another_activation(cpu, monkeypatch):
    """As GELU(approximate="tanh") would be beside a GELU that the kernels compute."""
    monkeypatch.setattr(plan, "MADE", plan.MADE | {"gelu": nn.GELU()})
    block = CoordAtt(8, 8).eval()
    for act, code in (
        (nn.GELU(), 4), (nn.GELU("tanh"), None), (nn.ReLU(inplace=True), 2), (nn.Mish(), None),
    ):  # fmt: skip
        block.act = act
        assert plan.activation_code(act) == code
        assert explain(block, torch.ones(1, 8, 3, 4)).tier == ("hybrid" if code is None else "fused")


def test_act_with_inplace_flag():
    """nn.Hardswish(inplace=True) must not write into something that is needed later."""
    compare_changed(lambda m: setattr(m, "act", nn.Hardswish(inplace=True)), tier=None)
    compare_changed(lambda m: setattr(m, "act", nn.ReLU(inplace=True)), tier=None)


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_sync_norm_outside_of_a_group(norm, cpu):
    compare_changed(nn.SyncBatchNorm.convert_sync_batchnorm, norm=norm, tier="fused")


@pytest.mark.parametrize("change", ["GroupNorm", "GELU", "LoRA conv_h"])
def test_hybrid_layouts(change, hybrid):
    """The hybrid tier keeps channels_last as the fused one does."""
    case = CASE.but(layout="nhwc")
    d = data(case)
    modules = [build(cls, case, d.params) for cls in (PaperCoordAtt, CoordAtt)]
    for module in modules:
        seeds.seed(7)
        REPLACED[change](module)
    theirs, ours = (run(m, d.x, d.grad) for m in modules)
    for name, value in theirs.items():
        if value is not None and name != "d conv1.bias":
            assert max(tolerances.errors(ours[name], value)) < tolerances.FORMULAS_AGREE, name
    for name in ("out", "d x"):
        assert ours[name].is_contiguous(memory_format=torch.channels_last), name


def test_subclass_of_the_block():
    """A subclass that wraps forward keeps its own arithmetic."""

    class Doubled(CoordAtt):
        def forward(self, x):
            return 2 * super().forward(x)

    d = data(CASE)
    ours, theirs = build(Doubled, CASE, d.params), build(PaperCoordAtt, CASE, d.params)
    assert max(tolerances.errors(ours(d.x), 2 * theirs(d.x))) < tolerances.FORMULAS_AGREE


def test_quantised_child():
    """A child without parameters of its own (weights in another form) is called, not read."""

    class Packed(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.scale = conv.weight.abs().max().item() / 127
            self.register_buffer("packed", (conv.weight.detach() / self.scale).round().to(torch.int8))
            self.bias = conv.bias

        def forward(self, x):
            return nn.functional.conv2d(x, self.packed.to(x.dtype) * self.scale, self.bias)

    compare_changed(lambda m: setattr(m, "conv1", Packed(m.conv1)), norm="running", tier=None)
