"""One call, three ways: the truth, plain PyTorch, and the package, on the same data.

A Case says what is computed; data(case, seed) draws its tensors; compare(case) runs the three and applies
tolerances.py. Results are dicts of tensors: "out", "d x", "d conv1.weight", ... and the running statistics
under their buffer names.
"""

import contextlib
import functools
from dataclasses import dataclass, replace

import bounds
import oracle
import pytest
import seeds
import tolerances
import torch
from paper import PaperCoordAtt
from torch import nn

from coordatt_fast import CoordAtt, backends, explain, use_backend

FLOATS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "neon")


def supported_levels():
    """SIMD levels the compiled library runs on this machine; empty where it is not there."""
    from coordatt_fast import backends

    if not backends()["cpu"].available:
        return []
    found, start = [], torch.ops.coordatt_fast.simd_level()
    for level in LEVELS:
        try:
            torch.ops.coordatt_fast.set_simd_level(level)
        except (RuntimeError, ValueError):
            continue
        found.append(level)
    torch.ops.coordatt_fast.set_simd_level(start)
    return found


def on_backend(name):
    """The body of a fixture: the backend by explicit choice, so that it raises instead of falling back."""
    entry = backends()[name]
    if not entry.available:
        pytest.skip(f"backend {name}: {entry.reason}")
    with use_backend(name):
        yield name


@dataclass(frozen=True)
class Case:
    shape: tuple
    mid: int = 8
    dtype: torch.dtype = torch.float32
    autocast: bool = False  # x in dtype, parameters float32
    layout: str = "nchw"
    norm: str = "batch"  # "batch", "running" or "none"
    activation: str = "hard_swish"
    bias: bool = True
    affine: bool = True
    skip: bool = False

    @property
    def param_dtype(self):
        return torch.float32 if self.autocast else self.dtype

    @property
    def exactly_zero(self):
        """conv1's bias moves every value and their mean alike, so batch normalisation cancels it."""
        return ("d conv1.bias",) if self.norm == "batch" and self.bias else ()

    @property
    def vanishing(self):
        n, c, height, width = self.shape
        cancels = self.norm == "batch" and (c == 1 or n * (height + width) == 2)
        return ("d conv1.weight",) if cancels else ()

    def but(self, **changes):
        return replace(self, **changes)


@dataclass
class Data:
    x: torch.Tensor
    grad: torch.Tensor
    params: dict
    spelled: bool = True  # plain PyTorch's hard-swish: the paper's steps, or else nn.Hardswish


def feature_map(shape, generator, dtype=torch.float32, layout="nchw"):
    """Noise plus an offset per row and per column, so that strip means differ from strip to strip at any
    size.
    """
    n, c, h, w = shape
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
    x = draw(n, c, h, w) + draw(n, c, h, 1) + draw(n, c, 1, w)
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def data(case, seed=0):
    """Weights large enough that the gates spread over (0.05, 0.95): with default ones they are all near one
    half. No activation so near a kink that rounding may decide on which side it is.
    """
    return _data(case, seed, _without_kinks(case.but(layout="nchw", skip=False), seed))


@functools.lru_cache(maxsize=4096)
def _without_kinks(case, seed):
    """How many draws come before the first that has no activation within its rounding error of a kink."""
    if case.dtype is torch.float64 or not case.shape[0]:  # of 1e9 activations one is
        return 0
    for attempt in range(100):
        d = _data(case, seed, attempt)
        options = dict(norm=case.norm, activation=case.activation, skip=False, eps=1e-5)
        if not bounds.run(d.x, d.params, None, sums=torch.float32, middle=torch.float32, **options)[2]:
            return attempt
    raise AssertionError(f"no draw of {case} keeps away from the kinks of {case.activation}")


def _data(case, seed, attempt):
    g = seeds.generator(1000 + seed + 100_000 * attempt)
    draw = lambda *size: torch.randn(size, generator=g, dtype=torch.float64)
    channels, mid = case.shape[1], case.mid
    params = {"conv1.weight": draw(mid, channels, 1, 1) * 1.2 / channels**0.5}
    for name in ("conv_h", "conv_w"):
        params[name + ".weight"] = draw(channels, mid, 1, 1) * 1.5 / mid**0.5
    if case.bias:
        params["conv1.bias"] = draw(mid) * 0.5
        params["conv_h.bias"], params["conv_w.bias"] = draw(channels) * 0.5, draw(channels) * 0.5
    if case.norm != "none":
        if case.affine:
            params["bn1.weight"], params["bn1.bias"] = 1 + 0.4 * draw(mid), 0.7 * draw(mid)
        params["bn1.running_mean"], params["bn1.running_var"] = 0.5 * draw(mid), 0.5 + draw(mid).square()
    params = {k: v.to(case.param_dtype) for k, v in params.items()}
    x = feature_map(case.shape, g, case.dtype, case.layout)
    grad = feature_map(case.shape, g, case.dtype, case.layout)
    return Data(x, grad, params)


def build(cls, case, params, dtype=None):
    """A module of cls with the case's configuration and the given parameters, training flag set."""
    channels = case.shape[1]
    module = cls(
        channels, channels, activation=case.activation, bias=case.bias, skip=case.skip, mid_channels=case.mid
    )
    if case.norm == "none":
        module.bn1 = nn.Identity()
    elif not case.affine:
        module.bn1 = nn.BatchNorm2d(case.mid, affine=False)
    module.to(dtype or case.param_dtype)
    missing, unexpected = module.load_state_dict(params, strict=False)
    assert not unexpected and set(missing) <= {"bn1.num_batches_tracked"}, (missing, unexpected)
    return module.train(case.norm == "batch")


def run(module, x, grad=None):
    """Results of one call of the module on x, and of its backward when grad is given. x itself is not
    touched.
    """
    if grad is None:
        with torch.no_grad():
            results = {"out": module(x)}
    else:
        x = x.detach().requires_grad_()
        out = module(x)
        out.backward(grad)
        results = {"out": out.detach(), "d x": x.grad}
        results.update({"d " + name: p.grad for name, p in module.named_parameters()})
    if module.training:
        results.update({k: v.clone() for k, v in module.named_buffers() if v.is_floating_point()})
    return results


def autocast(case):
    return torch.autocast("cpu", dtype=case.dtype) if case.autocast else contextlib.nullcontext()


def truth(case, d, backward=True):
    grad = d.grad if backward else None
    if case.dtype is torch.float64:
        return oracle.run(d.x, d.params, grad, norm=case.norm, activation=case.activation, skip=case.skip)
    module = build(PaperCoordAtt, case, d.params, torch.float64)
    return run(module, d.x.double(), None if grad is None else grad.double())


def plain(case, d, backward=True):
    module = build(PaperCoordAtt, case, d.params)
    if case.activation == "hard_swish" and not d.spelled:
        module.act = nn.Hardswish()
    with autocast(case):
        return run(module, d.x, d.grad if backward else None)


def beside(d, index):
    """The same a few ulps off, x and its gradient in the two memory formats by turns, and so hard-swish: the gradient
    of its steps may happen to be rounded to few digits, whose mean batch normalisation then has without an error.
    """
    g = seeds.generator(3000 + index)
    layout = list(LAYOUTS.values())[index % 2]
    x, grad = (tolerances.beside(t, g).contiguous(memory_format=layout) for t in (d.x, d.grad))
    params = {name: tolerances.beside(t, g) for name, t in d.params.items()}
    return Data(x, grad, params, spelled=index // 2 % 2 == 0)


def fast(case, d, backward=True):
    """The package on whatever backend is chosen."""
    with autocast(case):
        return run(build(CoordAtt, case, d.params), d.x, d.grad if backward else None)


def fused(case, d, backward=True):
    """The package, with proof that it was the compiled kernels that ran (tests ask for backend cpu
    explicitly).
    """
    module = build(CoordAtt, case, d.params)
    with autocast(case), torch.set_grad_enabled(backward):
        plan = explain(module, d.x)
        assert (plan.tier, plan.backend) == ("fused", "cpu"), str(plan)
        return run(module, d.x, d.grad if backward else None)


def draws(shape):
    """Small shapes are drawn more often, so that the errors compared are taken over many elements."""
    n, c, h, w = shape
    return max(3, min(12, 4096 // max(1, n * c * h * w)))


@functools.lru_cache(maxsize=128)
def yardstick(case, backward, draw=data):
    """Truth and plain PyTorch's error; the memory format of x is no part of either, so layouts share one."""
    return tolerances.Yardstick(
        lambda seed: draw(case, seed),
        beside,
        lambda d: truth(case, d, backward),
        lambda d: plain(case, d, backward),
    )


def compare(case, backward=True, under_test=fast, floor=tolerances.FLOOR_ULPS, draw=data):
    """Fails unless under_test is as close to the truth as tolerances.py demands, over all draws."""
    tolerances.check(
        lambda seed: under_test(case, draw(case, seed), backward),
        yardstick(case.but(layout="nchw"), backward, draw),
        key=key(case),
        draws=draws(case.shape),
        floor=floor,
        exactly_zero=case.exactly_zero if backward else (),
        vanishing=case.vanishing if backward else (),
    )


def key(case):
    return str(case.dtype).removeprefix("torch.") + (" autocast" if case.autocast else "")


def gradients(function, inputs, grad):
    """{"out", "d <name>"} of function(**inputs) for the named input tensors."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = function(**leaves)
    out.backward(grad)
    return {"out": out.detach()} | {"d " + name: leaf.grad for name, leaf in leaves.items()}
