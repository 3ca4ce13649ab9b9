"""What stands before a block, in modules of one's own that hold both: the plain network is always the truth."""

import copy

import pytest
import seeds
import torch
from test_accelerate import spread
from test_neighbours import C, Conv, LouderConv, agree, block, fails, image, joined, results, same_bits
from torch import nn

from coordatt_fast import accelerate, restore
from coordatt_fast.containers import steps_of

# Modules of one's own ------------------------------------------------------------------------------


class Inverted(nn.Module):
    """As timm has it."""

    def __init__(self):
        super().__init__()
        self.conv_pw = nn.Conv2d(3, C, 1)
        self.bn1 = nn.BatchNorm2d(C)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_dw = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.bn2 = nn.BatchNorm2d(C)
        self.act2 = nn.ReLU(inplace=True)
        self.aa = nn.Identity()
        self.se = block()
        self.conv_pwl = nn.Conv2d(C, 3, 1)
        self.bn3 = nn.BatchNorm2d(3)
        self.drop_path = nn.Identity()
        self.has_skip, self.last = True, None

    def forward(self, x):
        shortcut = x
        x = self.act1(self.bn1(self.conv_pw(x)))
        x = self.bn2(self.conv_dw(x))
        x = self.aa(self.act2(x))
        x = self.se(x)
        x = self.bn3(self.conv_pwl(x))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        if self.last is not None:
            x = self.last(x)
        return x


class Bottleneck(nn.Module):
    """As ResNets have it: nothing between normalisation and block, and a sum in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.ca = nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), block()
        self.downsample, self.relu = nn.Conv2d(3, C, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.ca(self.bn(self.conv(x)))
        out += self.downsample(x)
        return self.relu(out)


class C3(nn.Module):
    """As YOLO forks have it."""

    def __init__(self):
        super().__init__()
        self.cv1, self.cv2 = Conv(3, C // 2), Conv(3, C // 2)
        self.cv3, self.ca = Conv(C, C), block()

    def forward(self, x):
        return self.ca(self.cv3(torch.cat((self.cv1(x), self.cv2(x)), 1)))


class Called(nn.Module):
    """A method of its own, and a child called twice, the block's too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 1)
        self.bn, self.act, self.block = nn.BatchNorm2d(C), nn.SiLU(), block()

    def once(self, x):
        return self.block(self.act(self.bn(x)))

    def forward(self, x):
        y = self.once(self.stem(x))
        z = self.once(y)
        z *= y
        return z


CONTAINERS = {
    "inverted residual": (Inverted, [("se", "bn2", "ReLU")]),
    "bottleneck": (Bottleneck, [("ca", "bn", "")]),
    "C3": (C3, [("ca", "cv3.bn", "SiLU")]),
    "a method, twice": (Called, [("block", "bn", "SiLU")]),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name, training, calls):
    make, expected = CONTAINERS[name]
    plain = spread(make().double()).train(training)
    report = accelerate(ours := copy.deepcopy(plain))
    assert [(row.path, row.norm, row.activation) for row in report.neighbours] == expected
    agree(results(ours, image()), results(plain, image()))
    assert len(calls) == (2 if make is Called else 1)
    kept = image()
    ours(x := image())
    assert torch.equal(x, kept)
    assert torch.allclose(ours(x=image()), plain(x=image()))
    assert restore(ours) and [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert [set(vars(m)) for m in ours.modules()] == [set(vars(m)) for m in plain.modules()]


def changed_class(m):
    """Another forward for all modules of the class."""
    kind = getattr(type(m), "_coordatt_fast_class", type(m))
    original = kind.forward
    kind.forward = lambda self, x: original(self, x) * 2
    return lambda: setattr(kind, "forward", original)


CHANGES = {
    "no skip": ("inverted residual", lambda m: setattr(m, "has_skip", False), 0),
    "a child that was None": ("inverted residual", lambda m: setattr(m, "last", nn.Tanh()), 0),
    "a child more": ("inverted residual", lambda m: m.add_module("more", nn.Tanh()), 0),
    "a child that is gone": ("inverted residual", lambda m: m._modules.__setitem__("drop_path", None), None),
    "a hidden child": ("inverted residual", lambda m: m.__dict__.__setitem__("bn2", nn.Identity()), 0),
    "another class of forward": ("inverted residual", changed_class, 0),
    "another activation": ("inverted residual", lambda m: setattr(m, "act2", nn.GELU()), 0),
    "a known activation": ("inverted residual", lambda m: setattr(m, "act2", nn.SiLU()), 1),
    "something between": ("inverted residual", lambda m: setattr(m, "aa", nn.AvgPool2d(1)), 0),
    "another block": ("inverted residual", lambda m: setattr(m, "se", nn.Tanh()), 0),
    "hook between": (
        "inverted residual",
        lambda m: m.aa.register_forward_hook(lambda _, args, out: 2 * out),
        0,
    ),
    "hook on the convolution": (
        "inverted residual",
        lambda m: m.conv_dw.register_forward_hook(lambda _, args, out: 2 * out),
        1,
    ),
    "hook on a chain": ("C3", lambda m: m.cv3.register_forward_hook(lambda _, args, out: 2 * out), 0),
    "hook in a chain": ("C3", lambda m: m.cv3.bn.register_forward_hook(lambda _, args, out: 2 * out), 0),
    "a chain of another class": ("C3", lambda m: setattr(m.cv3, "__class__", LouderConv), 0),
    "a fused chain": (
        "C3",
        lambda m: [setattr(m.cv3, "forward", m.cv3.forward_fuse), delattr(m.cv3, "bn")],
        0,
    ),
    "the chain's activation": ("C3", lambda m: setattr(m.cv3, "act", nn.Tanh()), 0),
    "the chain's class": ("C3", lambda m: changed_class(m.cv3), 0),
    "a child more in the chain": ("C3", lambda m: m.cv3.add_module("more", nn.Tanh()), 0),
    "another chain": ("C3", lambda m: setattr(m, "cv3", spread(Conv(C, C).double())), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_containers_changed(change, calls):
    name, change, count = CHANGES[change]
    plain = spread(CONTAINERS[name][0]().double())
    ours = joined(copy.deepcopy(plain))
    if count is None:
        change(plain), change(ours)
        assert fails(ours, image())[0] is fails(plain, image())[0]
        return
    undo = []
    try:
        seeds.seed(5)
        undo.append(change(ours))
        calls.clear()
        found = results(ours, image())
        if callable(undo[0]):
            truth = results(plain, image())
        else:
            seeds.seed(5)
            change(plain)
            truth = results(plain, image())
    finally:
        if callable(undo[0]):
            undo[0]()
    (agree if count else same_bits)(found, truth)
    assert len(calls) == count


def test_an_attribute_on_its_class(calls):
    """What is set on type(module) hides a child, and may be anything."""
    ours = joined(spread(Inverted().double()))
    kind, before = type(ours), ours(image())
    kind.bn2 = nn.Identity()
    try:
        calls.clear()
        assert not torch.allclose(ours(image()), before) and not calls
    finally:
        del kind.bn2
    ours(image())
    assert calls


class OwnClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act, self.block = nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU(), block()


def left_alone(forward, **attributes):
    def make():
        model = type("Own", (OwnClass,), {"forward": forward})()
        for name, value in attributes.items():
            setattr(model, name, value)
        return model

    return make


def two_readers(self, x):
    y = self.bn(self.conv(x))
    return self.block(y) + y


def reader_of_the_activation(self, x):
    y = self.act(self.bn(self.conv(x)))
    return y * self.block(y)


def in_between(self, x):
    x = self.conv(x)
    y = self.bn(x)
    x += x
    return self.block(y) + x


def by_mode(self, x):
    y = self.bn(self.conv(x))
    return self.block(y if self.training else y * y)


def by_size(self, x):
    return self.block(self.bn(self.conv(x))) if x.shape[0] > 1 else self.conv(x)


def by_values(self, x):
    return self.block(self.bn(self.conv(x))) if (x > 0).all() else self.conv(x)


def functional(self, x):
    return self.block(torch.relu(self.bn(self.conv(x))))


def turned(self, x):
    return self.block(self.bn(self.conv(x).flip(3)))


def number(self, x):
    return self.block(self.bn(self.conv(x)) * 2)


def weights(self, x):
    return self.block(self.bn(self.conv(x))) * self.bn.weight.sum()


def counts(self, x):
    self.count = getattr(self, "count", 0) + 1
    return self.block(self.bn(self.conv(x)))


def forward_of_a_child(self, x):
    return self.block(self.bn.forward(self.conv(x)))


def several(self, x):
    y = self.bn(self.conv(x))
    return self.block(y), y


def attribute_that_is_a_function(self, x):
    return self.block(self.function(self.bn(self.conv(x))))


def noisy(self, x):
    return self.block(self.bn(self.conv(x + torch.rand(1))))


def by_grad_mode(self, x):
    return self.block(self.bn(self.conv(x))) if torch.is_grad_enabled() else self.conv(x)


def two_inputs(self, x, scale=1.0):
    return self.block(self.bn(self.conv(x)))


def another_name(self, image):
    return self.block(self.bn(self.conv(image)))


def caught(self, x):
    try:
        return self.block(self.bn(self.conv(x)))
    except RuntimeError:
        return x


LEFT_ALONE = {
    "two readers": left_alone(two_readers),
    "a reader of the activation": left_alone(reader_of_the_activation),
    "a sum in place in between": left_alone(in_between),
    "its mode": left_alone(by_mode),
    "the size": left_alone(by_size),
    "the values": left_alone(by_values),
    "a functional activation": left_alone(functional),
    "another function": left_alone(turned),
    "a number": left_alone(number),
    "a child's weights": left_alone(weights),
    "a counter": left_alone(counts),
    "a child's forward": left_alone(forward_of_a_child),
    "two results": left_alone(several),
    "a function among its attributes": left_alone(attribute_that_is_a_function, function=lambda x: x),
    "random numbers": left_alone(noisy),
    "the grad mode": left_alone(by_grad_mode),
    "two inputs": left_alone(two_inputs),
    "an input of another name": left_alone(another_name),
    "exceptions": left_alone(caught),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name, calls):
    model = spread(LEFT_ALONE[name]().double())
    kind, x = type(model), image(1 if name == "its mode" else 2)
    seeds.seed(6)
    expected = copy.deepcopy(model)(x)
    report = accelerate(model)
    assert not report.neighbours and type(model) is kind and "count" not in vars(model)
    seeds.seed(6)
    out = model(x)
    assert all(torch.equal(a, b) for a, b in zip(out, expected)) and not calls


def test_what_is_written_down():
    steps = steps_of(Inverted()).steps
    chain = ("conv_pw", "bn1", "act1", "conv_dw", "bn2", "act2", "aa", "se", "conv_pwl", "bn3", "drop_path")
    assert [(step.names, step.function, step.inputs, step.last) for step in steps] == [
        (chain, "", (0,), (False,)),
        ((), "add", (1, 0), (True, True)),
    ]
    assert [step.function for step in steps_of(Bottleneck()).steps] == ["", "", "iadd", ""]
    assert [step.function for step in steps_of(Called()).steps] == ["", "", "imul"]
    assert steps_of(Conv(3, C)).chain == ("conv", "bn", "act")
    assert steps_of(Inverted()).chain is None
