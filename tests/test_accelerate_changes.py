"""An accelerated module after changes: to its children, hooks, settings, dtype, and maps of another size."""

import copy

import pytest
import seeds
import tolerances
import torch
import variants
from test_accelerate import accelerated, agree, results, squeeze_bias, subject
from torch import nn
from torch.nn.utils import parametrizations
from variants import C, Released

from coordatt_fast import accelerate, explain, restore, use_backend


def both(name, change, training, dtype=torch.float64):
    """The same change to an accelerated module and to an untouched one: their results, and the tier."""
    module, x, grad = subject(name, dtype)
    ours = accelerated(copy.deepcopy(module))
    for m in (ours, module):
        m.train(training)
        seeds.seed(1)
        change(m)
    tier = explain(ours, x).tier
    expected = results(module, x, grad)
    agree(results(ours, x, grad), expected, but=[squeeze_bias(module)] if training else ())
    return tier


def freeze_norm(m):
    m.conv1.weight.requires_grad_(False)
    m.bn1.eval()


def other_settings(m):
    m.bn1.eps, m.bn1.momentum = 0.1, None


class Low(nn.Module):
    """A low-rank update beside a convolution."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Conv2d(base.in_channels, 2, 1, bias=False).double()
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False).double()

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


CHANGES = {
    "nothing": ("the authors'", lambda m: None, "fused"),
    "eval mode of the norm alone": ("the authors'", freeze_norm, "fused"),
    "eps and momentum": ("the authors'", other_settings, "fused"),
    "another known activation": ("SiLU", lambda m: setattr(m, "act1", nn.ReLU()), "fused"),
    "a known activation for an own one": ("released", lambda m: setattr(m, "relu", nn.SiLU()), "hybrid"),
    "another activation": ("the authors'", lambda m: setattr(m, "act", nn.Tanh()), "hybrid"),
    "another norm": ("released", lambda m: setattr(m, "bn1", nn.GroupNorm(2, 8).double()), "hybrid"),
    "SyncBatchNorm": ("released", lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m), "fused"),
    "low rank": ("released", lambda m: setattr(m, "conv1", Low(m.conv1)), "hybrid"),
    "low rank gate": ("released", lambda m: setattr(m, "conv3", Low(m.conv3)), "hybrid"),
    "hook on a part": ("released", lambda m: m.bn1.register_forward_hook(lambda m, i, o: 2 * o), "hybrid"),
    "hook on a gate": ("released", lambda m: m.conv3.register_forward_hook(lambda m, i, o: 2 * o), "hybrid"),
    "hook inside the activation": (
        "released",
        lambda m: m.relu.sigmoid.register_forward_hook(lambda m, i, o: 2 * o),
        "hybrid",
    ),
    "hook in another layout": (
        "concatenated along the width",
        lambda m: m.conv_1x1.register_forward_hook(lambda m, i, o: o * torch.arange(15.0).double()),
        "original",
    ),
    "hook on a pool": ("released", lambda m: m.pool_h.register_forward_hook(lambda m, i, o: 2 * o), "original"),
    "other pool": ("released", lambda m: setattr(m, "pool_h", nn.AdaptiveMaxPool2d((None, 1))), "original"),
    "other gate": ("sigmoid as child", lambda m: setattr(m, "sigmoid", nn.Hardsigmoid()), "original"),
    "hook on a holder": (
        "sigmoids in sequence",
        lambda m: m.conv_h.register_forward_hook(lambda m, i, o: 2 * o),
        "original",
    ),
    "longer sequence of a gate": ("sigmoids in sequence", lambda m: m.conv_w.append(nn.Tanh()), "original"),
    "longer sequence": ("in a Sequential", lambda m: m.conv.append(nn.Tanh()), "hybrid"),
    "dropout raised": ("dropout of nothing", lambda m: setattr(m.conv[2], "p", 1.0), "hybrid"),
    "a switch of its own": ("means, no bias, skip", lambda m: setattr(m, "has_skip", False), "original"),
    "a factor of its own": (
        "other names, activation in forward",
        lambda m: setattr(m, "sixth", 3),
        "original",
    ),
    "parametrised": ("released", lambda m: parametrizations.weight_norm(m.conv2), "fused"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change, training, cpu):
    name, change, tier = CHANGES[change]
    assert both(name, change, training) == tier


def test_the_modules_own_hooks_stay():
    """They run around the call, with the module itself; handles from before still remove them."""
    module, x, _ = subject("released")
    calls = []
    handle = module.register_forward_hook(lambda m, i, o: calls.append(m))
    accelerated(module)
    assert not calls
    module(x)
    handle.remove()
    module(x)
    assert calls == [module] and calls[0] is module


def test_hooks_on_children_survive_and_are_not_run_by_the_probe(cpu):
    module, x, _ = subject("released")
    seen = []
    handle = module.conv1.register_forward_hook(lambda m, i, o: seen.append(i[0].shape))
    accelerated(module)
    assert not seen and explain(module, x).tier == "hybrid"
    module(x)
    assert seen == [(3, C, sum(variants.MAP), 1)]
    handle.remove()
    assert explain(module, x).tier == "fused"


def test_global_hooks_see_the_modules_own_calls(cpu):
    module, x, _ = subject("concatenated along the width")
    accelerated(module)
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: names.append(type(m).__name__))
    try:
        assert explain(module, x).tier == "original"
        module(x)
    finally:
        handle.remove()
    assert names[:5] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "Sigmoid"]


def test_fuse_after_and_before(cpu):
    """YOLO's fuse() folds the norm and binds another forward; both orders compute what they did."""
    module, x, _ = subject("nested block")
    expected = module.eval()(x)
    accelerated(module)
    module.cv1.fuse()
    assert explain(module, x).tier == "hybrid" and "cv1" in explain(module, x).reason
    assert max(tolerances.errors(module(x), expected)) < tolerances.FORMULAS_AGREE
    restore(module)
    assert accelerate(module).replaced[0].differs.startswith("silu, no normalisation")
    assert max(tolerances.errors(module(x), expected)) < tolerances.FORMULAS_AGREE
    restored = copy.deepcopy(module)
    assert max(tolerances.errors(restored(x), expected)) < tolerances.FORMULAS_AGREE


def test_attributes_that_frameworks_set():
    """YOLO numbers its layers after building them."""
    module, x, _ = subject("nested block")
    accelerated(module)
    tier = explain(module, x).tier
    module.np, module.stride = 7, torch.ones(3)
    assert explain(module, x).tier == tier and module.f == [-1, 6]


@pytest.mark.parametrize("name", ["fixed size", "fixed kernels"])
def test_other_sizes_of_a_fixed_size_variant(name, cpu):
    module, x, _ = subject(name)
    others = [torch.randn(2, C, h, w).double() for h, w in ((10, 6), (9, 7), (6, 9), (8, 6), (18, 12))]
    expected = [outcome(module, other) for other in others]
    assert any(isinstance(e, str) for e in expected)
    accelerated(module)
    assert explain(module, x).tier == "fused"
    for other, wanted in zip(others, expected):
        plan = explain(module, other)
        assert plan.tier == "original" and plan.reason == "the pools are built for maps of 9 x 6"
        got = outcome(module, other)
        assert got == wanted if isinstance(wanted, str) else torch.equal(got, wanted)


def outcome(module, x):
    try:
        return module.eval()(x)
    except RuntimeError as error:
        return str(error)


def test_wrong_inputs_raise_as_before():
    module = accelerated(Released())
    for x, error in (
        (torch.randn(2, C + 1, 5, 6), RuntimeError),
        (torch.randn(C, 5, 6), ValueError),
        (torch.randn(2, C, 5, 6).double(), RuntimeError),
        (torch.ones(2, C, 5, 6, dtype=torch.int64), (NotImplementedError, RuntimeError)),
    ):
        with pytest.raises(error):
            Released()(x)
        with pytest.raises(error):
            module(x)


def test_dtype_changed_afterwards(cpu):
    module, x, _ = subject("released", torch.float32)
    expected = module.eval()(x)
    accelerated(module).bfloat16()
    assert explain(module, x.bfloat16()).tier == "fused"
    assert tolerances.errors(module(x.bfloat16()).float(), expected)[0] < 0.02


def test_second_derivatives():
    module, x, _ = subject("in a Sequential")
    small = x[:1, :, :2, :3].detach().requires_grad_()
    with use_backend("auto"):
        assert torch.autograd.gradgradcheck(accelerated(module.eval()), small, atol=1e-4)
