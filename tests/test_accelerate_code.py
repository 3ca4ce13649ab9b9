"""accelerate() and what a few inputs cannot show: forwards that draw, count, branch or look elsewhere are left alone,
and what the code of an accelerated module depends on is watched.
"""

import copy
import os
import pickle
import random
import threading
import time
from collections import OrderedDict

import numpy as np
import pytest
import tolerances
import torch
import torch.nn.functional as F
from paper import PaperCoordAtt
from test_accelerate import accelerated, spread
from torch import nn

from coordatt_fast import accelerate, explain, restore

C = 24
CALLS, SWITCH, ONE = [0], False, 1.0


def clamped(x):
    return x.clamp(-1e3, 1e3)


class _Counter:
    seen = 0


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.hardswish(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardswish_backward(g.clamp(-1, 1), x)


def _state(default=[0]):  # noqa: B006
    default[0] += 1
    return default[0] % 50 == 0


def _hooked(y):
    if y.requires_grad:
        y.register_hook(lambda g: g.clamp(-1e3, 1e3))
    return y


# What the map is put through before (x) or after (y) the block: each does something on some inputs, modes or calls only.
BEFORE = {
    "torch's generator": lambda self, x: x * 2 if self.training and torch.rand(1) < 0.02 else x,
    "Python's generator": lambda self, x: x * 2 if random.random() < 0.02 else x,
    "numpy's generator": lambda self, x: x * 2 if np.random.rand() < 0.02 else x,
    "the clock": lambda self, x: x * 2 if time.time() % 60 < 1 else x,
    "the environment": lambda self, x: x * 2 if os.environ.get("COORDATT_TEST") else x,
    "the thread": lambda self, x: x if threading.current_thread() is threading.main_thread() else x * 2,
    "clamp in training": lambda self, x: x.clamp(-1e3, 1e3) if self.training else x,
    "far clamp": lambda self, x: x.clamp(-1e30, 1e30),
    "nan_to_num in training": lambda self, x: torch.nan_to_num(x) if self.training else x,
    "where": lambda self, x: torch.where(x > 1e20, 1e20, x),
    "dtype": lambda self, x: x.clamp(-8, 8) if x.dtype in (torch.float32, torch.half) else x,
    "dtype by name": lambda self, x: x.clamp(-8, 8) if "16" in str(x.dtype) else x,
    "element size": lambda self, x: x * 2 if x.element_size() == 2 else x,
    "cast": lambda self, x: x.half().to(x.dtype) if x.element_size() == 2 else x,
    "layout": lambda self, x: x * 2 if x.is_contiguous(memory_format=torch.channels_last) else x,
    "strides": lambda self, x: x * 2 if x.stride(1) == 1 else x,
    "device": lambda self, x: x * 2 if x.is_cuda else x,
    "tall maps": lambda self, x: x * 2 if x.shape[2] > 64 else x,
    "square maps": lambda self, x: x * 2 if x.size(2) == x.size(-1) else x,
    "one by one": lambda self, x: x * 2 if tuple(x.shape[2:]) == (1, 1) else x,
    "many images": lambda self, x: x * 2 if len(x) > 100 else x,
    "odd sizes": lambda self, x: x * 2 if x.shape[3] % 97 == 0 else x,
    "numel": lambda self, x: x * 2 if x.numel() > 1e6 else x,
    "smaller of two": lambda self, x: x * (min(x.shape[2], 64) / x.shape[2]),
    "a part of large maps": lambda self, x: torch.cat([x[:, :, :64], x[:, :, 64:] * 2], 2),
    "zeros": lambda self, x: x + 1 if not x.any() else x,
    "values": lambda self, x: x * 2 if x.abs().max() > 1e20 else x,
    "grad mode": lambda self, x: x if torch.is_grad_enabled() else x * 1.0001,
    "requires_grad": lambda self, x: x if x.requires_grad else x * 1.0001,
    "autocast": lambda self, x: x * 2 if torch.is_autocast_enabled() else x,
    "inference mode": lambda self, x: x * 2 if torch.is_inference_mode_enabled() else x,
    "class of x": lambda self, x: x * 2 if type(x) is not torch.Tensor else x,
    "a default": lambda self, x: x * 2 if _state() else x,
    "a list": lambda self, x: (CALLS.append(1), x * 2 if len(CALLS) % 50 == 0 else x)[1],
    "a class attribute that counts": lambda self, x: x * 2 if setattr(_Counter, "seen", _Counter.seen + 1) else x,
    "an own list": lambda self, x: x * 2 if self.log.append(1) or len(self.log) > 50 else x,
    "an own set": lambda self, x: x * 2 if self.seen.add(len(self.seen)) or len(self.seen) > 50 else x,
    "a hook on the input's gradient": lambda self, x: _hooked(x * 1),
    "the gradient's clamp": lambda self, x: x * 1 + (x - x.detach()) * 0,
    "a custom function": lambda self, x: Swish.apply(x) - Swish.apply(x) + x,
    "a try": lambda self, x: x * 2 if self.tries(x) else x,
    "its own hooks": lambda self, x: x * 2 if self._forward_hooks else x,
    "the class of a part": lambda self, x: x * 2 if isinstance(self.bn1, nn.SyncBatchNorm) else x,
    "a part's setting": lambda self, x: x * 2 if self.bn1.eps > 1 else x,
    "a part's mode": lambda self, x: x * 2 if self.bn1.training != self.training else x,
    "its class": lambda self, x: x * 2 if self.__class__.__name__.startswith("Accelerated") else x,
    "tiles": lambda self, x: torch.cat([t * 1 for t in x.split(32, dim=2)], 2),
    "chunks": lambda self, x: x if len(x.chunk(40, 2)) < 30 else x * 2,
    "a narrow part": lambda self, x: x + 0 * x.narrow(2, 0, 1).mean(),
    "a reshape that fits some maps": lambda self, x: x.reshape(x.shape[0], x.shape[1], 7, -1).view_as(x),
    "a squeeze that drops single images": lambda self, x: x.squeeze().view_as(x),
    "a table": lambda self, x: x * TABLE[x.shape[2]],
    "an own table": lambda self, x: x * self.table[x.shape[2]],
    "a table in place": lambda self, x: x * ((1.0,) * 33 + (0.5,) * 99)[x.shape[2]],
    "the truth of a part of a table": lambda self, x: x * 2 if ((1,) * 99)[33 : x.shape[2]] else x,
    "digits": lambda self, x: x * 2 if len("%x" % x.shape[2]) > 1 else x,  # noqa: UP031
    "a mark on the input": lambda self, x: x * 2 if getattr(x, "marked", False) else x,
    "an error as a branch": lambda self, x: self.halves(x),
    "an activation made in forward": lambda self, x: x + 0 * Counts()(x),
    "an activation of a class kept": lambda self, x: x + 0 * self.kind()(x),
    "functions in a list": lambda self, x: x + 0 * self.functions[0](x),
    "a child in training alone": lambda self, x: self.in_training(x) if self.training else x,
    "its own truth": lambda self, x: x if self else x * 2,
    "a dictionary's entry": lambda self, x: x * self.settings["scale"],
    "names in a table": lambda self, x: x * 2 if any([getattr(self, n, False) for n in ("late",)]) else x,
    "a pattern": lambda self, x: matched(self, x),  # noqa: F821
    "a child's setting": lambda self, x: x * self.in_training.scale,
    "a function's attribute": lambda self, x: x * clamped.mul,
    "eval of a string": lambda self, x: eval("x * 2 if x.shape[2] > 64 else x"),
    "a hidden name": lambda self, x: x * 2 if getattr(x, "sha" + "pe")[2] > 64 else x,
}
AFTER = {
    "hook on the gradient": _hooked,
    "clamp of huge results": lambda y: y.clamp(-1e25, 1e25),
    "other layout": lambda y: y.mT.contiguous().mT,
    "addition of little": lambda y: y + 1e-30,
}


TABLE = (1.0,) * 33 + (0.5,) * 100
clamped.mul = 1.0
exec(  # a syntax that Python 3.9 does not know, and linters rewrite
    "def matched(self, x):\n    match self:\n        case nn.Module(late=True):\n            return x * 2\n    return x"
)


class Counts(nn.Module):
    scale = 1.0

    def forward(self, y):
        CALLS[0] += 1
        return y


class OnlyUnderAutocast(nn.Module):
    scale = 1.0

    def forward(self, x):
        return x * 0.5 if torch.is_autocast_enabled("cpu") else x


def _halves(self, x):
    try:
        a, b = x.split([20, 20], 2)
    except RuntimeError:
        return x
    return torch.cat([b, a], 2)


def _tries(self, x):
    try:
        return x.shape[2] > 64
    except Exception:
        return False


def hostile(name):
    """The block with a piece of the table around it."""
    before, after = BEFORE.get(name, lambda self, x: x), AFTER.get(name, lambda y: y)

    class Hostile(PaperCoordAtt):
        tries, halves, kind, scale = _tries, _halves, Counts, 2.0

        def forward(self, x):
            return after(PaperCoordAtt.forward(self, before(self, x)))

    module = Hostile(C, C)
    module.log, module.seen, module.table = [], set(), TABLE
    module.functions, module.settings = [clamped], OrderedDict(scale=1.0)
    if "child" in name:
        module.in_training = OnlyUnderAutocast()
    if name == "its own truth":
        Hostile.__bool__ = lambda self: not hasattr(self, "late")
    return module


@pytest.mark.parametrize("name", [*BEFORE, *AFTER])
def test_left_alone(name):
    module = hostile(name)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for _ in range(3):  # what draws may be lucky once
        with pytest.warns(UserWarning, match="nothing to accelerate"):
            report = accelerate(module)
        (row,) = report.skipped
        assert not report.replaced and row.reason, str(report)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]
    assert module.log == [] and module.seen == set() and CALLS == [0] and _Counter.seen == 0


class Counting(nn.Conv2d):
    calls: list = []  # noqa: RUF012

    def forward(self, x):
        y = super().forward(x)
        return y.clamp(-1, 1) if self.calls.append(1) or len(self.calls) > 3 else y


class Scaled(nn.Conv2d):
    factors = {"of everything": 1.5}  # noqa: RUF012

    def forward(self, x):
        return super().forward(x) * self.factors["of everything"] if x.shape[2] > 1 else super().forward(x)


class ByLayout(nn.Conv2d):
    def forward(self, x):
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y if y.is_contiguous() else y.clamp(-0.5, 0.5)


def test_a_part_of_ones_own_class_that_asks_how_its_input_lies_in_memory():
    module = PaperCoordAtt(C, C)
    module.conv1 = ByLayout(C, 8, 1)
    with pytest.warns(UserWarning):
        assert "is_contiguous" in accelerate(module).skipped[0].reason


def test_a_part_of_ones_own_class_may_compute_anything_but_keep_nothing():
    module = PaperCoordAtt(C, C)
    module.conv1 = Counting(C, 8, 1)
    with pytest.warns(UserWarning):
        assert "keeps something between calls" in accelerate(module).skipped[0].reason
    assert Counting.calls == []
    module.conv1 = Scaled(C, 8, 1)
    x = torch.randn(2, C, 7, 5)
    expected = module(x)
    assert accelerated(module) is module and explain(module, x).tier == "hybrid"
    assert max(tolerances.errors(module(x), expected)) < 1e-5


HARMLESS = {
    "nothing": lambda self, x: x,
    "sizes of dense maps": lambda self, x: x.view(x.shape[0] * x.shape[1], *x.shape[2:]).view_as(x),
    "a known number of channels": lambda self, x: x.view(x.shape[0], 24, x.shape[2], x.shape[3]),
    "four dimensions": lambda self, x: x if x.dim() == 4 and torch.is_tensor(x) else x * 2,
    "a part of all": lambda self, x: x[:, :, : x.shape[2]],
    "half and double": lambda self, x: x / 2 + x * 0.5,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_words_are_taken(name, monkeypatch):
    monkeypatch.setitem(BEFORE, name, HARMLESS[name])
    accelerated(hostile(name))


def test_an_activation_of_ones_own_that_looks_at_sizes():
    class Act(nn.Module):
        def forward(self, x):
            return x * F.relu6(x + 3) / 6 if x.shape[2] < 64 else x

    module = PaperCoordAtt(C, C)
    module.act = Act()
    with pytest.warns(UserWarning):
        assert "looks at the size" in accelerate(module).skipped[0].reason


# Changes after accelerate ----------------------------------------------------------------------------


def scaled(x):
    return x * ONE


def _closure():
    factor = 1.0

    def apply(x):
        return x * factor

    def change(value):
        nonlocal factor
        factor = value

    return apply, change


from_closure, change_closure = _closure()


class Depends(PaperCoordAtt):
    """Depends on all that a class may: attributes, methods, properties, globals, names that are not there."""

    factor, part = 1.0, scaled

    def half(self, y):
        return y * 0.5

    @property
    def two(self):
        return 2

    def __init__(self, inp, oup):
        super().__init__(inp, oup)
        self.post, self.shortcut = nn.ModuleList(), nn.Sequential()

    def forward(self, x, gain=1.0):
        y = super().forward(from_closure(scaled(x))) * self.factor * gain
        for layer in self.post:
            y = layer(y)
        y = self.shortcut(y)
        if SWITCH or hasattr(self, "clamp") or getattr(self, "late", None) is not None:
            y = y.clamp(-1, 1)
        return self.half(y) * self.two


CHANGES = {
    "class attribute": lambda m, p: p.setattr(Depends, "factor", 3.0),
    "class attribute of the base": lambda m, p: p.setattr(PaperCoordAtt, "clamp", True, raising=False),
    "method of the class": lambda m, p: p.setattr(Depends, "half", lambda self, y: y),
    "forward of the base": lambda m, p: p.setattr(PaperCoordAtt, "forward", lambda self, x: x),
    "forward of the class": lambda m, p: p.setattr(Depends, "forward", lambda self, x: x + 1),
    "property": lambda m, p: p.setattr(Depends, "two", 5),
    "method of the instance": lambda m, p: setattr(m, "half", lambda y: y),
    "class attribute hidden": lambda m, p: setattr(m, "factor", 4.0),
    "added attribute": lambda m, p: setattr(m, "late", 1),
    "added attribute, asked for": lambda m, p: setattr(m, "clamp", False),
    "added child": lambda m, p: setattr(m, "late", nn.ReLU()),
    "added buffer": lambda m, p: m.register_buffer("late", torch.zeros(1)),
    "global": lambda m, p: p.setitem(globals(), "SWITCH", True),
    "global function": lambda m, p: p.setitem(globals(), "scaled", lambda x: x * 7),
    "global of a function": lambda m, p: p.setitem(globals(), "ONE", 3.0),
    "variable of an outer function": lambda m, p: change_closure(3.0),
    "code of a function, as on reloading": lambda m, p: p.setattr(scaled, "__code__", (lambda x: x * 9).__code__),
    "layer more": lambda m, p: m.post.append(nn.ReLU()),
    "layer more in a shortcut": lambda m, p: m.shortcut.append(nn.ReLU()),
    "hook on a shortcut": lambda m, p: m.shortcut.register_forward_hook(lambda m, i, o: o * 2),
    "attribute of type(module)": lambda m, p: p.setattr(type(m), "factor", 2.5),
    "default": lambda m, p: p.setattr(Depends.forward, "__defaults__", (3.0,)),
    "forward of a child's class": lambda m, p: p.setattr(type(m.act), "forward", lambda self, x: x),
    "forward of the instance": lambda m, p: setattr(m, "forward", lambda x: x),
}


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change, copied, monkeypatch):
    module = spread(Depends(C, C).double()).eval()
    ours = accelerated(copy.deepcopy(module))
    if copied:
        ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    x = torch.randn(2, C, 9, 6, dtype=torch.float64)
    before = module(x)
    assert explain(ours, x).tier != "original" and max(tolerances.errors(ours(x), before)) < tolerances.FORMULAS_AGREE
    for m in (module, ours):
        CHANGES[change](m, monkeypatch)
    expected = module(x)
    assert not torch.equal(expected, before) or "clamp" in change or "asked" in change
    assert torch.equal(ours(x), expected)
    assert "forward of the instance" == change or explain(ours, x).tier == "original"
    change_closure(1.0)


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x[0],
        lambda x: x[None],
        lambda x: [x, x],
        lambda x: {"feature": x},
    ],
    ids=["three dimensions", "five", "list", "dict"],
)
def test_other_inputs_run_the_modules_own_forward(given):
    class Takes(PaperCoordAtt):
        def forward(self, x):
            if x.dim() == 5:
                return self.forward(x[0])[None]
            return super().forward(x)

    module = spread(Takes(C, C).double()).eval()
    x = given(torch.randn(2, C, 9, 6, dtype=torch.float64))
    results = []
    for m in (module, accelerated(copy.deepcopy(module))):
        try:
            results.append(m(x))
        except Exception as error:
            results.append((type(error), str(error)))
    if isinstance(results[0], torch.Tensor):
        assert max(tolerances.errors(results[1], results[0])) < tolerances.FORMULAS_AGREE
    else:
        assert results[0] == results[1]


def test_a_pickle_whose_class_was_changed_meanwhile(monkeypatch):
    module = accelerated(spread(Depends(C, C).double()).eval())
    text = pickle.dumps(module)
    monkeypatch.setattr(Depends, "half", lambda self, y: y * 4)
    loaded, x = pickle.loads(text), torch.randn(1, C, 5, 4, dtype=torch.float64)
    assert explain(loaded, x).tier == "original" and "is not what it was" in explain(loaded, x).reason
    assert torch.equal(loaded(x), Depends.forward(loaded, x))
    assert restore(loaded) == [""] and type(loaded) is Depends


# All or nothing, and no exception --------------------------------------------------------------------


class Registry(type):
    classes: list = []  # noqa: RUF012

    def __init__(cls, name, bases, namespace):
        super().__init__(name, bases, namespace)
        Registry.classes.append(name)
        if len(Registry.classes) > 1:
            raise RuntimeError("one is enough")


class Registered(PaperCoordAtt, metaclass=Registry):
    pass


class Listed(PaperCoordAtt):
    names: list = []  # noqa: RUF012

    def __init_subclass__(cls):
        Listed.names.append(cls.__name__)
        raise RuntimeError("not meant to be subclassed")


@pytest.mark.parametrize("cls", [Registered, Listed])
def test_registries_do_not_hear_of_it(cls):
    module = accelerated(cls(C, C))
    assert Registry.classes == ["Registered"] and Listed.names == []
    assert isinstance(module, cls) and restore(module) == [""] and type(module) is cls


class ForwardOfTorch(PaperCoordAtt):
    forward = torch.relu


class NoChannels(nn.Conv2d):
    def __init__(self):
        super().__init__(C, 8, 1)
        del self.in_channels


class ChildrenRaise(PaperCoordAtt):
    def children(self):
        raise RuntimeError("no children")

    named_modules = modules = named_children = children


class Pickles(PaperCoordAtt):
    def __getstate__(self):
        return {"state": {k: v for k, v in self.__dict__.items() if k in ("_modules", "training")}}

    def __setstate__(self, state):
        nn.Module.__init__(self)
        self.__dict__.update(state["state"], skip=False)


def without_channels():
    module = PaperCoordAtt(C, C)
    module.conv1 = NoChannels()
    return module


@pytest.mark.parametrize("make", [lambda: ForwardOfTorch(C, C), without_channels, lambda: ChildrenRaise(C, C)])
def test_odd_classes_neither_raise_nor_stop_the_others(make):
    first, odd, last = PaperCoordAtt(C, C), make(), PaperCoordAtt(C, C)
    kind = type(odd)
    report = accelerate(nn.Sequential(first, odd, last))
    assert {row.path for row in report.replaced} >= {"0", "2"}
    if "1" not in [row.path for row in report.replaced]:
        assert type(odd) is kind and report.skipped[0].path == "1"


def test_own_pickling():
    module = Pickles(C, C)
    with pytest.warns(UserWarning):
        assert "overrides __getstate__" in accelerate(module).skipped[0].reason
    copy.deepcopy(module)


def test_keywords_and_restore_after_a_framework_has_subclassed():
    module = spread(PaperCoordAtt(C, C).double()).eval()
    x = torch.randn(2, C, 5, 4, dtype=torch.float64)
    expected = module(x)
    accelerated(module)
    module.__class__ = type("Sharded", (type("Mixin", (), {}), type(module)), {})
    for out in (module(x), module(x=x), copy.deepcopy(module)(x)):
        assert max(tolerances.errors(out, expected)) < tolerances.FORMULAS_AGREE
    assert restore(module) == [""] and torch.equal(module(x), expected) and torch.equal(module(x=x), expected)


def test_hooks_of_the_process_stay_where_they_are():
    """Calls in another thread meet the global hooks all the while."""
    missed, stop = [], threading.Event()
    relu, x = nn.ReLU(), torch.zeros(1)

    def call():
        while not stop.is_set():
            before = seen[0]
            relu(x)
            missed.append(seen[0] == before)

    seen = [0]

    def hook(module, args, out):
        seen[0] += module is relu

    handle = nn.modules.module.register_module_forward_hook(hook)
    thread = threading.Thread(target=call)
    thread.start()
    try:
        for _ in range(10):
            restore(accelerated(PaperCoordAtt(C, C)))
    finally:
        stop.set(), thread.join(), handle.remove()
    assert missed and not any(missed)


def test_an_activation_from_a_custom_function_is_left_alone():
    """Its backward pass is code of its own that no probe of values sees whole."""

    class Act(nn.Module):
        def forward(self, x):
            return Swish.apply(x)

    module = PaperCoordAtt(C, C)
    module.act = Act()
    with pytest.warns(UserWarning):
        assert not accelerate(module).replaced
