"""The layout that the compiler hands to the operators is the one it has: no conversion before them and after them.

Read from inductor's code and from the strides that the operators get; its own kernels are not compiled, as
their numbers do not matter here (test_compile.py has them).
"""

import re
import types

import pytest
import seeds
import torch
import torch._inductor.config
from harness import LAYOUTS
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from coordatt_fast import CoordAtt, internals

CHANNELS, SHAPE = 16, (2, 16, 5, 7)


class Layouts(TorchDispatchMode):
    """For each call of an operator of ours, in order: its name, and whether x, grad and its result are channels_last."""

    def __init__(self):
        super().__init__()
        self.seen = []

    @classmethod
    def is_infra_mode(cls):
        return True  # compiled code runs under it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "coordatt_fast" and "update" not in str(func):
            maps = [*args[: 2 if "backward" in str(func) else 1], out[0] if isinstance(out, tuple) else out]
            self.seen.append((str(func).split(".")[1], {m.stride(1) == 1 for m in maps}))
        return out


class Network(nn.Module):
    """x to a convolution, BN, ReLU6, the block, and what comes after it."""

    def __init__(self, after):
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.block = CoordAtt(CHANNELS, CHANNELS)
        self.last = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.after = after

    def forward(self, x):
        return self.after(self, self.block(F.relu6(self.norm(self.first(x)))))


def compiled(after, layout, training, prepare=lambda net: None, **options):
    """Inductor's code, graph by graph, and what the operators were given."""
    seeds.seed(0)
    torch._dynamo.reset()
    net = Network(after).to(memory_format=LAYOUTS[layout]).train(training)
    prepare(net)
    x = torch.randn(SHAPE).contiguous(memory_format=LAYOUTS[layout])
    net.compile(fullgraph=True, **options)

    def call():
        with torch.set_grad_enabled(training):
            out = net(x)
            if training:
                out.sum().backward()

    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(force_disable_caches=True):
        patch.setattr(AsyncCompile, "cpp_pybinding", lambda *args: lambda *args: None)
        _, codes = run_and_get_code(call)
        with Layouts() as layouts:
            call()
    return codes, layouts.seen


def kernels(code, begin, end):
    """How often inductor's own kernels run between two calls."""
    body = code[code.index("def call(") :]
    between = re.search(rf"{begin}(?:(?!{begin}).)*?{end}", body, re.DOTALL)
    assert between, body
    return len(re.findall(r"^\s*cpp_fused", between[0], re.MULTILINE))


CONV = r"(?:extern_kernels\.(?:convolution|mm)|_convolution_pointwise\.default)\("
CONV_BACKWARD = r"convolution_backward\.default\("
MODES = {
    "default": {},
    "dynamic": {"dynamic": True},
    "freezing": {"options": {"freezing": True}},
    "max-autotune": {"mode": "max-autotune"},
}


@pytest.mark.parametrize("mode, layout", [("default", "nhwc"), *((mode, "nchw") for mode in MODES)])
def test_inference_converts_nothing(cpu, mode, layout):
    (code,), seen = compiled(lambda net, y: net.last(y), layout, False, **MODES[mode])
    assert seen == [("attend", {True})]
    assert kernels(code, CONV, r"attend\.default\(") <= 1  # BN and ReLU6
    assert kernels(code, r"attend\.default\(", CONV) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_converts_nothing(cpu, layout):
    (forward, backward), seen = compiled(lambda net, y: net.last(y), layout, True)
    assert seen == [("attend_train", {True}), ("attend_backward", {True})]
    assert kernels(forward, CONV, r"attend_train\.default\(") == 1
    assert kernels(forward, r"attend_train\.default\(", CONV) == 0
    assert kernels(backward, CONV_BACKWARD, r"attend_backward\.default\(") == 0
    assert kernels(backward, r"attend_backward\.default\(", CONV_BACKWARD) <= 2  # of ReLU6 and BN


def test_hybrid_tier_converts_nothing(cpu):
    (_, backward), seen = compiled(
        lambda net, y: net.last(y), "nhwc", True, lambda net: setattr(net.block, "act", nn.GELU())
    )
    assert seen[:2] == [("pool", {True}), ("gate", {True})] and seen[2] == ("gate_backward", {True})
    assert kernels(backward, CONV_BACKWARD, r"gate_backward\.default\(") == 0


AFTER = {
    "mean": lambda net, y: y.mean((2, 3)),
    "max pool": lambda net, y: net.last(F.max_pool2d(y, 2)),
    "halves": lambda net, y: net.last(torch.cat(y.chunk(2, 1)[::-1], 1)),
}


@pytest.mark.parametrize("after", AFTER)
def test_gradient_comes_in_the_layout_of_x(cpu, after):
    """The operator would copy it: a conversion that the code does not show."""
    _, seen = compiled(AFTER[after], "nhwc", True)
    assert seen == [("attend_train", {True}), ("attend_backward", {True})]


def test_a_torch_without_the_tag(monkeypatch):
    op = types.SimpleNamespace(tags=[])
    monkeypatch.setattr(torch, "Tag", object())
    internals.take_any_layout(op)
    assert not hasattr(op, "_tags")
