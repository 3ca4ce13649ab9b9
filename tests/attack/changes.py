"""What changes after accelerate() must be seen: the same change to the taken module and to an untouched copy."""

import random
import types
import warnings
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from attack import judge, spellings
from coordatt_fast import accelerate

# A correct copy whose forward reads from everywhere; every one of these is neutral to begin with.
SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn

SCALE = 1.0
CONFIG = {"scale": 1.0, "extra": []}


def gated(s):
    return s.sigmoid()


class HSwish(nn.Module):
    slope = 6

    def forward(self, v):
        return v * F.relu6(v + 3) / self.slope


class Base(nn.Module):
    temperature = 1.0

    def squeeze(self, p):
        return self.act(self.bn1(self.conv1(p)))


class CoordAtt(Base):
    offset = 0.0

    def __init__(self, inp=6, m=4):
        super().__init__()
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv1, self.bn1, self.act = nn.Conv2d(inp, m, 1), nn.BatchNorm2d(m), ACT
        self.conv_h, self.conv_w = nn.Conv2d(m, inp, 1), nn.Conv2d(m, inp, 1)
        self.factor, self.options = 1.0, {"power": 1}

    def forward(self, x):
        h, w = x.shape[2:]
        y = self.squeeze(torch.cat([self.pool_h(x), self.pool_w(x).mT], 2))
        y_h, y_w = y.split([h, w], 2)
        READS
        return x * gated(self.conv_h(y_h)) * gated(self.conv_w(y_w.mT)) * self.factor
"""
READS = {
    "nothing": "pass",
    "class": "x = x * self.temperature + self.offset",
    "global": "x = x * SCALE * CONFIG['scale']",
    "both": "x = (x * self.temperature + self.offset) * SCALE",
    "getattr": "x = x * getattr(self, 'gain', 1.0)",
    "options": "x = x ** self.options['power'] if self.options['power'] != 1 else x",
}


def _forward(self, x):
    return x * 2


def _method(self, p):
    return self.act(self.bn1(self.conv1(p))) * 0.5


def _all_three(m, change):
    for conv in (m.conv1, m.conv_h, m.conv_w):
        change(conv)


# Each gets the file, the class and the module.
CHANGES = {
    "nothing": lambda file, cls, m: None,
    "class attribute": lambda file, cls, m: setattr(cls, "offset", 0.5),
    "attribute of the base class": lambda file, cls, m: setattr(file.Base, "temperature", 2.0),
    "attribute added over the class's": lambda file, cls, m: setattr(m, "temperature", 2.0),
    "attribute added": lambda file, cls, m: setattr(m, "gain", 3.0),
    "class attribute added": lambda file, cls, m: setattr(cls, "gain", 3.0),
    "attribute changed": lambda file, cls, m: setattr(m, "factor", 2.0),
    "attribute in place": lambda file, cls, m: m.options.update(power=2),
    "attribute to a tensor": lambda file, cls, m: setattr(m, "factor", torch.tensor(2.0)),
    "global": lambda file, cls, m: setattr(file, "SCALE", 2.0),
    "global in place": lambda file, cls, m: file.CONFIG.update(scale=2.0),
    "function": lambda file, cls, m: setattr(file, "gated", torch.tanh),
    "method of the class": lambda file, cls, m: setattr(cls, "squeeze", _method),
    "method of the base class": lambda file, cls, m: setattr(file.Base, "squeeze", _method),
    "method of the instance": lambda file, cls, m: setattr(m, "squeeze", types.MethodType(_method, m)),
    "forward of the class": lambda file, cls, m: setattr(cls, "forward", _forward),
    "forward of the instance": lambda file, cls, m: setattr(m, "forward", types.MethodType(_forward, m)),
    "code of the forward": lambda file, cls, m: setattr(cls.forward, "__code__", _forward.__code__),
    "code of a function": lambda file, cls, m: setattr(file.gated, "__code__", (lambda s: s.tanh()).__code__),
    "forward of a child's class": lambda file, cls, m: setattr(file.HSwish, "forward", _forward),
    "attribute of a child's class": lambda file, cls, m: setattr(file.HSwish, "slope", 5),
    "attribute of a child": lambda file, cls, m: setattr(m.act, "slope", 5),
    "forward of a child": lambda file, cls, m: setattr(m.conv_h, "forward", lambda v: v.sum(1, True).expand(-1, 6, -1, -1)),
    "activation": lambda file, cls, m: setattr(m, "act", nn.Tanh()),
    "activation removed": lambda file, cls, m: setattr(m, "act", nn.Identity()),
    "norm": lambda file, cls, m: setattr(m, "bn1", nn.GroupNorm(2, 4)),
    "norm removed": lambda file, cls, m: setattr(m, "bn1", nn.Identity()),
    "pool": lambda file, cls, m: setattr(m, "pool_h", nn.AdaptiveMaxPool2d((None, 1))),
    "convolutions exchanged": lambda file, cls, m: m._modules.update(conv_h=m.conv_w, conv_w=m.conv_h),
    "eps": lambda file, cls, m: setattr(m.bn1, "eps", 0.3),
    "momentum": lambda file, cls, m: setattr(m.bn1, "momentum", 0.9),
    "norm frozen": lambda file, cls, m: setattr(m.bn1, "training", False),
    "bias removed": lambda file, cls, m: _all_three(m, lambda conv: conv.register_parameter("bias", None)),
    "weight": lambda file, cls, m: setattr(m.conv_h, "weight", nn.Parameter(torch.full((6, 4, 1, 1), 0.3))),
    "tied": lambda file, cls, m: setattr(m.conv_h, "weight", m.conv_w.weight),
    "data": lambda file, cls, m: m.conv_h.weight.data.mul_(2),
    "parametrised": lambda file, cls, m: parametrizations.weight_norm(m.conv1),
    "pruned": lambda file, cls, m: nn.utils.prune.ln_structured(m.conv1, "weight", 0.5, 2, 0),
    "hook": lambda file, cls, m: m.register_forward_hook(lambda m, args, out: out * 2),
    "hook before": lambda file, cls, m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "hook on a child": lambda file, cls, m: m.conv_h.register_forward_hook(lambda m, args, out: out * 2),
    "hook before a child": lambda file, cls, m: m.bn1.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "hook on a pool": lambda file, cls, m: m.pool_h.register_forward_hook(lambda m, args, out: out * 2),
    "hook on the activation": lambda file, cls, m: m.act.register_forward_hook(lambda m, args, out: out * 2),
    "hook backward": lambda file, cls, m: m.conv1.register_full_backward_hook(lambda m, given, got: (given[0] * 2,)),
    "child added": lambda file, cls, m: m.add_module("more", nn.Tanh()),
    "stride": lambda file, cls, m: setattr(m.conv1, "padding", (0, 0)),
}  # fmt: skip
ACTIVATIONS = ("HSwish()", "nn.Hardswish()", "nn.SiLU()", "nn.ReLU()")


@dataclass(frozen=True)
class Change:
    reads: str = "nothing"
    activation: str = "nn.Hardswish()"
    first: str = "nothing"
    second: str = "nothing"
    seed: int = 0


@st.composite
def changed(draw):
    one_of = lambda values: draw(st.sampled_from(tuple(values)))
    second = one_of(CHANGES) if draw(st.booleans()) else "nothing"
    return Change(one_of(READS), one_of(ACTIVATIONS), one_of(CHANGES), second, draw(st.integers(0, 2**31)))


def build(change):
    text = SOURCE.replace("READS", READS[change.reads]).replace("ACT", change.activation)
    return spellings.load(text, "CoordAtt", "linecache")


def check(change: Change) -> str:
    """"refused" or "equal"; AssertionError where a change was not seen."""
    files = [build(change) for _ in range(2)]
    try:
        torch.manual_seed(change.seed)
        theirs, ours = files[1][1](), files[0][1]()
        judge.spread(theirs)
        ours.load_state_dict(theirs.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not accelerate(ours).replaced:
                return "refused"
        for name in (change.first, change.second):
            outcome = [_apply(name, file, cls, module) for (file, cls), module in zip(files, (ours, theirs))]
            assert outcome[0] == outcome[1], f"{name}: {outcome[0]} once accelerated, else {outcome[1]}"
        try:
            rng = random.Random(change.seed)
            pair = judge.Pair(files[0][0], files[1][0], ours, theirs)
            judge.compare(pair, rng, phases=6, load=False)
        except AssertionError as error:
            raise AssertionError(f"{change}\n{error}") from None
        return "equal"
    finally:
        for made, _ in files:
            spellings.forget(made)


def _apply(name, file, cls, module):
    try:
        CHANGES[name](file, cls, module)
    except Exception as error:
        return f"raises {type(error).__name__}"
    return "done"
