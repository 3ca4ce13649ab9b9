"""The published networks: how many parameters, which places, what they compute, their names, and their
initialisation.
"""

import math
from pathlib import Path

import pytest
import seeds
import tolerances
import torch
from paper import PaperCoordAtt
from torch import nn
from torch.nn import functional as F
from variants import Released

from coordatt_fast import CoordAtt, checkpoints, explain
from coordatt_fast.models import efficientnet_b0_ca, mobilenet_v2_ca, mobilenext_ca

NETWORKS = [mobilenet_v2_ca, mobilenext_ca, efficientnet_b0_ca]

# Channels and side of the map at every place for 224 x 224, counted by hand from the networks' tables.
PLACES = {
    "mobilenet_v2_ca": [(96, 56), (144, 56), (144, 28), *[(192, 28)] * 2, (192, 14), *[(384, 14)] * 4,
                        *[(576, 14)] * 2, (576, 7), *[(960, 7)] * 3],
    "mobilenext_ca": [(96, 56), (144, 56), *[(192, 28)] * 3, *[(288, 14)] * 3, *[(384, 14)] * 3,
                      *[(576, 7)] * 4, *[(960, 7)] * 2, (1280, 7)],
    "mobilenext_ca, first": [(32, 112), (96, 56), *[(192, 28)] * 2, *[(288, 14)] * 2, *[(384, 14)] * 3,
                             *[(576, 7)] * 3, *[(960, 7)] * 3],
    "efficientnet_b0_ca": [(32, 112), (96, 56), (144, 56), (144, 28), (240, 28), (240, 14), *[(480, 14)] * 3,
                           *[(672, 14)] * 2, (672, 7), *[(1152, 7)] * 4],
}  # fmt: skip


# Gradients of that size are zero by algebra; the largest entries of the others are above 1e-4.
VANISHES = 1e-13


def count(model):
    return sum(p.numel() for p in model.parameters())


def paper(channels, reduction=32):
    return PaperCoordAtt(channels, channels, reduction)


def spread(model, seed=5):
    """Normalisations with weights and statistics of their own, as after some training."""
    g = seeds.generator(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t, low, high in (
                (module.weight, 0.7, 1.3),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.1, 0.4),
            ):
                t.data.copy_(low + (high - low) * torch.rand(t.shape, generator=g, dtype=torch.float64))
    return model


# Parameters and places ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, arguments, exact, published",
    [
        (mobilenet_v2_ca, {}, 3_950_648, "3.95"),
        (mobilenet_v2_ca, {"reduction": 16}, 4_366_850, "4.37"),
        (mobilenet_v2_ca, {"attention": None}, 3_504_872, "3.5"),
        (mobilenext_ca, {}, 4_088_113, "4.09"),
        (mobilenext_ca, {"after": "first"}, 3_971_626, None),
        (mobilenext_ca, {"attention": None}, 3_535_416, "3.5"),
        (efficientnet_b0_ca, {}, 5_381_804, "5.4"),
    ],
)
def test_parameters(make, arguments, exact, published):
    """Exactly these, which round to the paper's tables 2 to 5."""
    assert count(make(**arguments)) == exact
    if published is not None:
        assert f"{exact / 1e6:.{len(published.partition('.')[2])}f}" == published


@pytest.mark.parametrize("width_mult, exact", [(0.75, 2_891_631), (0.5, 2_095_568)])
def test_width_multiplier(width_mult, exact):
    """The published widths of MobileNetV2: 2.89 M and 2.10 M, with the block in the same 16 places."""
    model = mobilenet_v2_ca(width_mult=width_mult)
    assert count(model) == exact
    assert sum(isinstance(m, CoordAtt) for m in model.modules()) == 16
    assert model.classifier[1].in_features == 1280


def test_the_head_only_grows():
    assert mobilenet_v2_ca(width_mult=1.4).classifier[1].in_features == 1792


@pytest.mark.parametrize("name", PLACES)
def test_places(name):
    """Every block is there, in order, and is given the map that the paper says; none is anywhere else."""
    name, _, first = name.partition(", ")
    seen = []

    class Recorder(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.channels = channels

        def forward(self, x):
            n, c, h, w = x.shape
            assert (n, c, h) == (1, self.channels, w)
            seen.append((c, h))
            return x

    make = {m.__name__: m for m in NETWORKS}[name]
    arguments = {"after": "first"} if first else {}
    model = make(attention=Recorder, **arguments).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert seen == PLACES[f"{name}, first" if first else name]
    default = [m for m in make(**arguments).modules() if isinstance(m, CoordAtt)]
    assert [m.conv1.in_channels for m in default] == [c for c, _ in seen]
    assert [m.conv1.out_channels for m in default] == [max(8, c // 32) for c, _ in seen]
    assert not any(isinstance(m, CoordAtt) for m in make(attention=None, **arguments).modules())


def test_attention_follows_the_depthwise_convolution():
    """And comes before the projection, or in MobileNeXt's case after the second depthwise one."""
    for make, projects in ((mobilenet_v2_ca, True), (efficientnet_b0_ca, True), (mobilenext_ca, False)):
        for block in make().features[1:]:
            layers = list(block.conv)
            for place in (i for i, m in enumerate(layers) if isinstance(m, CoordAtt)):
                before = [m for m in layers[:place] if isinstance(m, nn.Conv2d)][-1]
                assert before.groups == before.out_channels
                after = [m for m in layers[place:] if isinstance(m, nn.Conv2d)]
                assert [m.kernel_size for m in after] == ([(1, 1)] if projects else [])


def test_the_table_of_the_benchmark_agrees(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    networks = pytest.importorskip("bench.networks")
    for name, table in (
        ("mobilenet_v2_ca", "mobilenetv2"),
        ("mobilenext_ca", "mobilenext"),
        ("mobilenext_ca, first", "mobilenext_first"),
        ("efficientnet_b0_ca", "efficientnet_b0"),
    ):
        assert [(i.channels, i.height) for i in networks.find(table)] == PLACES[name]


# What they compute --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", NETWORKS)
def test_any_map_and_number_of_classes(make):
    model = make(num_classes=7, width_mult=0.25).eval()
    assert model(torch.zeros(2, 3, 33, 50)).shape == (2, 7)


def step(model, x, training):
    """Loss, and backward: every result by name."""
    model = model.train(training)
    x = x.clone().requires_grad_()
    seeds.seed(1)  # dropout
    out = model(x)
    F.cross_entropy(out, torch.arange(len(x)) % out.shape[1]).backward()
    found = {"out": out.detach(), "d x": x.grad}
    found |= {f"d {name}": p.grad for name, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", NETWORKS)
def test_step_equals_that_of_the_plain_blocks(make, training, cpu):
    """Output, every gradient and the running statistics, in float64, against the paper's block in the same
    places."""
    ours = spread(make(num_classes=10, width_mult=0.5).double())
    plain = make(num_classes=10, width_mult=0.5, attention=paper).double()
    plain.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 3, 64, 48, dtype=torch.float64)
    block = next(m for m in ours.modules() if isinstance(m, CoordAtt)).train(training)
    sample = torch.zeros(3, block.conv1.in_channels, 7, 9, dtype=torch.float64)
    assert explain(block, sample).tier == "fused"
    have, wanted = step(ours, x, training), step(plain, x, training)
    assert have.keys() == wanted.keys()
    for name, truth in wanted.items():
        if truth.abs().max() < VANISHES:  # cancelled by the next batch normalisation: rounding is left
            assert have[name].abs().max() < VANISHES, name
            continue
        assert max(tolerances.errors(have[name], truth)) < tolerances.FORMULAS_AGREE, name


def test_a_broken_block_would_be_seen(cpu):
    """The comparison above, with the gates of one of the blocks exchanged."""
    ours = spread(mobilenet_v2_ca(10, 0.5).double())
    plain = mobilenet_v2_ca(10, 0.5, attention=paper).double()
    plain.load_state_dict(ours.state_dict())
    block = ours.features[9].conv[6]
    block.conv_h, block.conv_w = block.conv_w, block.conv_h
    x = torch.randn(3, 3, 64, 48, dtype=torch.float64)
    have, wanted = step(ours, x, False)["out"], step(plain, x, False)["out"]
    assert max(tolerances.errors(have, wanted)) > 1e3 * tolerances.FORMULAS_AGREE


# Names --------------------------------------------------------------------------------------------

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def released_names():
    """The keys of the released checkpoint, written out from its code."""

    def pair(prefix, conv, norm):
        return [f"{prefix}{conv}.weight", *[f"{prefix}{norm}.{n}" for n in NORM]]

    names = pair("features.0.", 0, 1) + pair("features.1.conv.", 0, 1) + pair("features.1.conv.", 3, 4)
    for block in range(2, 18):
        prefix = f"features.{block}.conv."
        names += pair(prefix, 0, 1) + pair(prefix, 3, 4)
        for child in ("conv1", "conv2", "conv3"):
            names += [f"{prefix}6.{child}.weight", f"{prefix}6.{child}.bias"]
        names += [f"{prefix}6.bn1.{n}" for n in NORM]
        names += pair(prefix, 7, 8)
    return [*names, *pair("conv.", 0, 1), "classifier.1.weight", "classifier.1.bias"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_loads_the_released_checkpoints_names(prefix):
    theirs = spread(mobilenet_v2_ca(10, attention=lambda c: Released(c, c))).eval()
    state = {prefix + name: t for name, t in theirs.state_dict().items()}
    assert sorted(state) == sorted(prefix + name for name in released_names())
    ours = mobilenet_v2_ca(10).eval()
    checkpoints.load(ours, state)
    back = checkpoints.to_released(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(t, back[name]) for name, t in theirs.state_dict().items())
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        exact = theirs.double()(x.double())
        plain = theirs.float()(x)
        limit = 2 * max(tolerances.errors(plain, exact)) + 1e-6
        assert max(tolerances.errors(ours(x), exact)) < limit


# Initialisation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", NETWORKS)
def test_initialisation(make):
    """Normal with variance 2 / (kernel area * outputs), biases zero, norms one, classifier normal(0.01)."""
    model = make()
    scaled = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            scale = math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels))
            values = module.weight.detach() / scale
            scaled.append(values.flatten())
            # Five standard errors of a standard deviation.
            assert abs(values.std().item() - 1) < 5 / math.sqrt(2 * values.numel()), name
            assert abs(values.mean().item()) < 5 / math.sqrt(values.numel()), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.running_mean.any()
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.01)
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)) and module.bias is not None:
            assert not module.bias.any(), name
    together = torch.cat(scaled)
    within = (together.abs() < 1).double().mean().item()  # of a normal distribution; a uniform one has 0.577
    assert within == pytest.approx(math.erf(1 / math.sqrt(2)), abs=2e-3)


@pytest.mark.parametrize("make", NETWORKS)
def test_wrong_arguments(make):
    with pytest.raises(ValueError, match="width_mult is 0"):
        make(width_mult=0)
    with pytest.raises(ValueError, match="reduction is 0"):
        make(reduction=0)


def test_wrong_place():
    with pytest.raises(ValueError, match="after is 'third', expected 'first' or 'second'"):
        mobilenext_ca(after="third")
