"""Checkpoints of the authors' released network and of the article's class, into each other."""

import pytest
import tolerances
import torch
from paper import PaperCoordAtt
from test_accelerate import spread
from torch import nn
from variants import C, Released

from coordatt_fast import CoordAtt, accelerate, checkpoints

BLOCK = ("conv1", "bn1", "conv2", "conv3")


class Inverted(nn.Module):
    """The released network's layout: the attention is conv.6 of every expanded block."""

    def __init__(self, attention):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C), nn.ReLU6(),
            nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False), nn.BatchNorm2d(C), nn.ReLU6(),
            attention, nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x)


class Network(nn.Module):
    """conv2 and conv3 also stand elsewhere, where they are nobody's gates."""

    def __init__(self, attention):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, C, 1), nn.Conv2d(C, C, 3, padding=1)
        self.bn1, self.conv3 = nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)
        self.features = nn.Sequential(*(Inverted(attention()) for _ in range(2)))

    def forward(self, x):
        return self.features(self.conv3(self.conv2(self.bn1(self.conv1(x)))))


def released():
    return spread(Network(Released)).eval()


def published():
    return spread(Network(lambda: PaperCoordAtt(C, C)), seed=9).eval()


def same(ours, theirs):
    x = torch.randn(2, 3, 5, 8)
    return max(tolerances.errors(ours(x), theirs(x))) < 1e-5


def test_the_names():
    state = released().state_dict()
    assert {k.split(".")[4] for k in state if k.startswith("features.1.conv.6.")} == set(BLOCK)
    there = checkpoints.from_released(state)
    assert list(there) == [
        k.replace("6.conv2.", "6.conv_h.").replace("6.conv3.", "6.conv_w.") for k in state
    ]
    assert all(a is b for a, b in zip(there.values(), state.values()))
    assert list(checkpoints.to_released(there)) == list(state)
    assert list(checkpoints.from_released(there)) == list(there)


@pytest.mark.parametrize("make", [lambda: PaperCoordAtt(C, C), lambda: CoordAtt(C, C)], ids=["article", "ours"])
def test_released_weights_in_models_of_the_articles_names(make):
    theirs, ours = released(), Network(make).eval()
    ours.load_state_dict(checkpoints.from_released(theirs.state_dict()), strict=True)
    assert same(ours, theirs)
    back = Network(Released).eval()
    back.load_state_dict(checkpoints.to_released(ours.state_dict()), strict=True)
    assert same(back, theirs)


def test_rows_and_columns_are_not_exchanged():
    theirs, ours = spread(Released()).eval(), CoordAtt(C, C).eval()
    ours.load_state_dict(checkpoints.from_released(theirs.state_dict()))
    x = torch.randn(2, C, 5, 8)
    assert max(tolerances.errors(ours(x), theirs(x))) < 1e-5
    ours.conv_h, ours.conv_w = ours.conv_w, ours.conv_h
    assert max(tolerances.errors(ours(x), theirs(x))) > 1e-2


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("source", [released, published])
@pytest.mark.parametrize("target", [released, published])
def test_load(prefix, source, target):
    theirs, ours = source(), target()
    checkpoints.load(ours, {prefix + k: v for k, v in theirs.state_dict().items()})
    assert same(ours, theirs)


def test_load_into_wrapped_and_accelerated_models():
    theirs, model = released(), published()
    accelerate(model)
    checkpoints.load(nn.DataParallel(model), theirs.state_dict())
    assert same(model, theirs)


def test_what_does_not_match_is_named():
    model, state = published(), released().state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    del state["features.0.conv.6.conv2.bias"]
    state["features.1.conv.6.conv1.weight"] = torch.zeros(16, C, 1, 1)
    state["head.weight"] = torch.zeros(3)
    with pytest.raises(RuntimeError) as error:
        checkpoints.load(model, state)
    text = str(error.value)
    assert "missing features.0.conv.6.conv_h.bias" in text
    assert "unexpected head.weight" in text
    assert f"features.1.conv.6.conv1.weight has shape [16, {C}, 1, 1], the model's has [8, {C}, 1, 1]" in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_both_names_at_once():
    state = Released().state_dict()
    state["conv_h.weight"] = state["conv2.weight"].clone()
    with pytest.raises(ValueError, match=r"conv_h\.weight is in the checkpoint under both names"):
        checkpoints.from_released(state)
