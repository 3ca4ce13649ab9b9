"""The truth of a call together with how far from it a correct program may be, element by element.

tolerances.py measures plain PyTorch's error on the same data and allows a multiple of it. That is a sample:
among 100,000 random cases some have an activation at its kink, a variance of nearly zero, or luck. Here the
allowed error follows from the values instead. Every quantity is a ball: its value in float64, and an error
that is carried along by the rules of first-order rounding analysis, with the unit roundoff of the dtype that
the kernels add up in and that of the dtype in which a result is stored. Where a slope jumps inside a ball, the
jump is part of the error. A wrong tail, a wrong stride or a missing term is off by 1e2 to 1e6 times as much.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch

# For what the analysis leaves out (another order of the products, terms of second order). Of what it allows with
# this factor, 11,500 cases at every SIMD level reached 0.15 in the fused tier, and in half precision the half that
# the rounding of the result alone makes; the hybrid tier, with PyTorch's own children, reached 0.81.
SAFETY = 3.0

# How the moments of a map are added up (csrc/cpu/norm.cpp): in the dtype of the sums at most 4,096 elements of a plane,
# in at least 8 parts, or 32 pixels in a row; those are joined in float64.
STRETCH, PARTS, PIXELS = 4096, 8, 32


@dataclass
class Ball:
    v: np.ndarray
    e: np.ndarray

    def __getitem__(self, key):
        return Ball(self.v[key], self.e[key])

    def reshape(self, *shape):
        return Ball(self.v.reshape(shape), self.e.reshape(shape))

    def swap(self):
        return Ball(self.v.swapaxes(-1, -2), self.e.swapaxes(-1, -2))


def exact(v):
    return Ball(v, np.zeros_like(v))


class Arithmetic:
    """Operations on balls. unit: of what sums run in; store, tiny: unit and smallest number of what every
    result is rounded to (of the same dtype where nothing is stored in between)."""

    def __init__(self, sums: torch.dtype, store: torch.dtype) -> None:
        self.unit, self.store = (torch.finfo(dtype).eps / 2 for dtype in (sums, store))
        # Subnormal numbers may be flushed; float16's, the only ones of a usual size, are not.
        small = torch.finfo(store)
        self.tiny = small.smallest_normal * (small.eps if store is torch.float16 else 1)
        self.most = min(torch.finfo(sums).max, small.max) / 4
        self.overflows = self.at_a_jump = False

    def rounded(self, v, e, mass=0.0, count=0):
        """v, off by e, after adding up count terms whose magnitudes sum to mass."""
        size = np.abs(v)
        self.overflows |= bool(np.any(size > self.most)) or bool(np.any(mass > self.most))
        return Ball(v, e + self.unit * (2 + count / 2) * mass + 2 * self.store * size + self.tiny)

    def mul(self, a, b):
        return self.rounded(a.v * b.v, np.abs(a.v) * b.e + np.abs(b.v) * a.e + a.e * b.e)

    def add(self, a, b):
        return self.rounded(a.v + b.v, a.e + b.e, np.abs(a.v) + np.abs(b.v))

    def sub(self, a, b):
        return self.add(a, Ball(-b.v, b.e))

    def sum(self, a, axes, divide=False):
        count = prod(a.v.shape[axis] for axis in axes)
        by = count if divide and count else 1
        v, e, mass = (t.sum(axis=axes, keepdims=True) / by for t in (a.v, a.e, np.abs(a.v)))
        return self.rounded(v, e + self.tiny, mass, count)

    def mean(self, a, axes):
        return self.sum(a, axes, divide=True)

    def matmul(self, a, b):
        sizes = np.abs(a.v), np.abs(b.v)
        error = sizes[0] @ b.e + a.e @ (sizes[1] + b.e)
        return self.rounded(a.v @ b.v, error, sizes[0] @ sizes[1], a.v.shape[-1])

    def moments(self, x, axes):
        """Mean and biased variance over axes of an exact x: by stretches, each about its own rounded mean, the pivot,
        joined in float64. Of the sizes of x themselves only that of the pivots' rounding is left, and the result's."""
        count, plane = prod(x.v.shape[axis] for axis in axes), prod(x.v.shape[-2:])
        part = self.unit * (2 + PARTS + max(PIXELS, min(plane, STRETCH) / PARTS) / 2)
        over = lambda t: t.mean(axis=axes, keepdims=True)
        mean = over(x.v)
        off = x.v - mean
        mean, off = mean + over(off), off - over(off)
        var, sizes = over(off * off), over(np.abs(x.v))
        about_pivots = 2 * over(np.abs(off)) + part * sizes
        square = var + part * part * over(x.v * x.v)
        joined = np.finfo(np.float64).eps * (2 + count / PIXELS) * sizes
        return (
            self.rounded(mean, part * about_pivots + joined),
            self.rounded(var, 6 * part * square + 2 * np.sqrt(var) * joined + joined * joined, square),
        )

    def normalised(self, x, mean, inv, gamma, beta):
        """gamma * (x - mean) * inv + beta as one fma of x by a scale and a shift that are folded beforehand."""
        infinite = np.isinf(x.v)  # which is no overflow
        finite = np.where(infinite, 0.0, x.v)
        off, scale = finite - mean.v, (inv.v + inv.e) * np.abs(gamma)
        e = scale * mean.e + np.abs(off * gamma) * inv.e
        mass = scale * (np.abs(finite) + np.abs(mean.v)) + np.abs(beta)
        u = self.rounded(off * inv.v * gamma + beta, e, mass)
        return Ball(np.where(infinite, (x.v - mean.v) * inv.v * gamma, u.v), np.where(infinite, 0.0, u.e))

    def inverse_root(self, var, eps):
        """1 / sqrt(var + eps), by the ends of the interval: var may be smaller than its error."""
        v = 1 / np.sqrt(np.maximum(var.v, 0) + eps)
        low = 1 / np.sqrt(np.maximum(var.v - var.e, 0) * (1 - 4 * self.unit) + eps)
        return self.rounded(v, np.maximum(low - v, v - 1 / np.sqrt(np.maximum(var.v, 0) + var.e + eps)), v)

    def sigmoid(self, s):
        v = _sigmoid(s.v)
        e = np.maximum(_sigmoid(s.v + s.e) - v, v - _sigmoid(s.v - s.e))
        return self.rounded(v, e, 4 * v)


def _sigmoid(s):
    e = np.exp(-np.abs(s))
    return np.where(s >= 0, 1 / (1 + e), e / (1 + e))


@dataclass(frozen=True)
class Activation:
    """function, slope; steepest: the largest slope; bend: the largest curvature; jumps of the slope (at, by); grows:
    whether it falls nowhere."""

    function: object
    slope: object
    steepest: float
    bend: float
    jumps: tuple = ()
    grows: bool = False

    def __call__(self, ops, u):
        v, slope = self.function(u.v), self.slope(u.v)
        e = self.steepest * u.e
        if self.grows:  # what it cuts off it does not hand on
            e = np.minimum(e, np.maximum(self.function(u.v + u.e) - v, v - self.function(u.v - u.e)))
            e = np.where(np.isinf(u.v) & (u.e == 0), 0.0, e)
        y = ops.rounded(v, e, 4 * (np.abs(v) + np.minimum(np.abs(u.v), 8)))
        near = u.e + 8 * ops.store * (np.abs(u.v) + 1)
        e = self.bend * near + 0.0
        for at, by in self.jumps:
            hit = (np.abs(u.v - at) <= near) & ~np.isinf(u.v)
            ops.at_a_jump |= bool(hit.any())
            e = e + by * hit
        return y, ops.rounded(slope, e, 4 * np.ones_like(slope))


def _through_torch(name):
    """function and slope by torch in float64, for activations that only the hybrid tier has."""
    module = getattr(torch.nn, name)()

    def slope(u):
        t = torch.from_numpy(np.ascontiguousarray(u)).requires_grad_()
        return torch.autograd.grad(module(t).sum(), t)[0].numpy()

    return lambda u: module(torch.from_numpy(np.ascontiguousarray(u))).numpy(), slope


def _hard_swish_slope(u):
    return np.where(u <= -3, 0.0, np.where(u >= 3, 1.0, (2 * u + 3) / 6))


def _silu_slope(u):
    s = _sigmoid(u)
    return s * (1 + u * (1 - s))


ACTIVATIONS = {
    "hard_swish": Activation(
        lambda u: u * np.clip(u + 3, 0, 6) / 6, _hard_swish_slope, 1.5, 1 / 3, ((-3, 0.5), (3, 0.5))
    ),
    "silu": Activation(lambda u: u * _sigmoid(u), _silu_slope, 1.1, 0.5),
    "relu": Activation(lambda u: np.where(u < 0, 0.0, u), lambda u: (u > 0) * 1.0, 1, 0, ((0, 1),), True),
    "relu6": Activation(
        lambda u: np.clip(u, 0, 6), lambda u: ((u > 0) & (u < 6)) * 1.0, 1, 0, ((0, 1), (6, 1)), True
    ),
    "GELU": Activation(*_through_torch("GELU"), 1.2, 0.8),
    "Tanh": Activation(*_through_torch("Tanh"), 1, 0.8),
    "Mish": Activation(*_through_torch("Mish"), 1.1, 1),
    "LeakyReLU": Activation(*_through_torch("LeakyReLU"), 1, 0, ((0, 1),)),
    "ELU": Activation(*_through_torch("ELU"), 1, 1),
}


def _real(t):
    return None if t is None else t.detach().double().numpy()


class Before(NamedTuple):
    """What stands before the block: norm "batch" or "running", of the tensors named before.weight and so on in
    params; momentum None: without running statistics."""

    norm: str
    activation: str | None
    eps: float
    momentum: float | None


def run(x, params, grad, *, norm, activation, skip, eps, sums, middle, momentum=0.1, groups=1, before=None):
    """Every result of a call as balls under the names of harness.py, whether something may overflow, and whether
    an activation is so near a jump of its slope that rounding decides on which side.

    params maps parameter and buffer names to tensors (missing or None: absent). norm is "batch", "running",
    "none", "group" or "instance" (the last two with groups groups of channels). sums, middle: the dtype that
    sums run in, and that in which what lies between pool and gates is stored. momentum None: without running
    statistics. before: what x goes through first, stored nowhere. Without grad only the forward results are returned.
    """
    with np.errstate(all="ignore"):
        return _run(x, params, grad, norm, activation, skip, eps, sums, middle, momentum, groups, before)


def _run(x, params, grad, norm, activation, skip, eps, sums, middle, momentum, groups, before):
    ops, mid = Arithmetic(sums, sums), Arithmetic(sums, middle)
    xs, results = exact(_real(x)), {}
    if before is not None:
        xs, back = _before(ops, xs, params, before, results)
    n, _, height, width = xs.v.shape
    w1, wh, ww = (exact(_real(params[k + ".weight"])[:, :, 0, 0]) for k in ("conv1", "conv_h", "conv_w"))
    b1, bh, bw = (_column(params.get(k + ".bias")) for k in ("conv1", "conv_h", "conv_w"))
    gamma, beta = _column(params.get("bn1.weight")), _column(params.get("bn1.bias"))
    m = w1.v.shape[0]

    rows, columns = mid.mean(xs, (3,)), mid.mean(xs, (2,))
    p = Ball(*(np.concatenate([r[:, :, :, 0], k[:, :, 0]], axis=2) for r, k in zip(_pair(rows), _pair(columns))))
    z = mid.matmul(w1, p)
    if b1 is not None:
        z = mid.add(z, b1)
    zhat, inv = None, None
    split = {"instance": (n, m, 1, -1), "group": (n, groups, m // groups, -1)}.get(norm, (n, m, 1, height + width))
    axes = {"batch": (0, 3), "group": (2, 3), "instance": (3,)}.get(norm)
    if norm != "none":
        parts = z.reshape(*split)
        if axes is None:
            mean, var = (_column(params["bn1.running_" + k])[:, :, :, None] for k in ("mean", "var"))
        else:
            mean = mid.mean(parts, axes)
            off = mid.sub(parts, mean)
            var = mid.mean(mid.mul(off, off), axes)
        if norm == "batch":
            count = n * (height + width)
            results.update(_running(mid, params, "bn1", mean, var, momentum, count))
        inv = mid.inverse_root(var, eps)
        zhat = mid.mul(mid.sub(parts, mean), inv)
        u = zhat.reshape(n, m, height + width)
        u = u if gamma is None else mid.add(mid.mul(u, gamma), beta)
    else:
        u = z
    y, slope = ACTIVATIONS[activation](mid, u)
    y_h, y_w = y[:, :, :height], y[:, :, height:]
    s_h, s_w = mid.matmul(wh, y_h), mid.matmul(ww, y_w)
    a_h = ops.sigmoid(s_h if bh is None else mid.add(s_h, bh))[:, :, :, None]
    a_w = ops.sigmoid(s_w if bw is None else mid.add(s_w, bw))[:, :, None, :]
    out = ops.mul(ops.mul(xs, a_w), a_h)
    results["out"] = ops.add(out, xs) if skip else out
    if grad is None:
        return results, ops.overflows or mid.overflows, ops.at_a_jump or mid.at_a_jump
    g = exact(_real(grad))

    def logits(a, other, axis):
        one = ops.rounded(1 - a.v, a.e, np.ones_like(a.v))
        return mid.mul(ops.mul(a, one), mid.sum(ops.mul(ops.mul(g, xs), other), (axis,)))

    ds_h, ds_w = logits(a_h, a_w, 3)[:, :, :, 0], logits(a_w, a_h, 2)[:, :, 0]
    grads = {"conv_h.weight": mid.sum(mid.matmul(ds_h, y_h.swap()), (0,))[0]}
    grads["conv_w.weight"] = mid.sum(mid.matmul(ds_w, y_w.swap()), (0,))[0]
    grads["conv_h.bias"], grads["conv_w.bias"] = mid.sum(ds_h, (0, 2)), mid.sum(ds_w, (0, 2))
    dy_h, dy_w = mid.matmul(wh.swap(), ds_h), mid.matmul(ww.swap(), ds_w)
    dy = Ball(*(np.concatenate(pair, axis=2) for pair in zip(_pair(dy_h), _pair(dy_w))))
    du = mid.mul(dy, slope)
    if norm != "none":
        along = mid.mul(du, zhat.reshape(n, m, height + width))
        grads["bn1.weight"], grads["bn1.bias"] = mid.sum(along, (0, 2)), mid.sum(du, (0, 2))
        dz = (du if gamma is None else mid.mul(du, gamma)).reshape(*split)
        if axes is not None:
            drift = mid.mul(zhat, mid.mean(mid.mul(dz, zhat), axes))
            dz = mid.sub(mid.sub(dz, mid.mean(dz, axes)), drift)
        du = mid.mul(dz, inv).reshape(n, m, height + width)
    grads["conv1.weight"] = mid.sum(mid.matmul(du, p.swap()), (0,))[0]
    grads["conv1.bias"] = mid.sum(du, (0, 2))
    if norm in ("batch", "instance"):  # the mean takes any shift out again
        grads["conv1.bias"].v[:] = 0
    dp = mid.matmul(w1.swap(), du)
    dp_h = ops.mul(dp[:, :, :height], exact(np.array(1 / width)))[:, :, :, None]
    dp_w = ops.mul(dp[:, :, height:], exact(np.array(1 / height)))[:, :, None, :]
    dx = ops.add(ops.mul(ops.mul(g, a_w), a_h), ops.add(dp_h, dp_w))
    grads["x"] = ops.add(dx, g) if skip else dx
    if before is not None:
        grads.update(back(grads["x"]))
    results.update({"d " + name: ball for name, ball in grads.items()})
    return results, ops.overflows or mid.overflows, ops.at_a_jump or mid.at_a_jump


def _before(ops, xs, params, before, results):
    """The map that the block sees, and a function from its gradient to those of x, weight and bias."""
    axes, batch = (0, 2, 3), before.norm == "batch"
    vector = lambda name: None if params.get(name) is None else _real(params[name])[:, None, None]
    if batch:
        mean, var = ops.moments(xs, axes)
        count = xs.v.size // xs.v.shape[1]
        results.update(_running(ops, params, "before", mean, var, before.momentum, count))
    else:
        mean, var = (exact(vector("before.running_" + k)[None]) for k in ("mean", "var"))
    gamma, beta = vector("before.weight"), vector("before.bias")
    gamma = np.ones_like(mean.v) if gamma is None else gamma
    inv = ops.inverse_root(var, before.eps)
    u = ops.normalised(xs, mean, inv, gamma, 0 * mean.v if beta is None else beta)
    y, slope = (u, None) if before.activation is None else ACTIVATIONS[before.activation](ops, u)

    def back(dy):
        du = dy if slope is None else ops.mul(dy, slope)
        off = np.where(np.isinf(xs.v), np.nan, xs.v - mean.v)
        zhat = ops.mul(ops.rounded(off, mean.e + 0 * off), inv)
        along, whole = ops.mul(du, zhat), du
        if batch:
            du = ops.sub(ops.sub(du, ops.mean(du, axes)), ops.mul(zhat, ops.mean(along, axes)))
        dx = ops.mul(du, ops.mul(inv, exact(gamma)))
        return {"x": dx, "before.weight": ops.sum(along, axes), "before.bias": ops.sum(whole, axes)}

    return y, back


def _pair(ball):
    return ball.v, ball.e


def _column(t):
    return None if t is None else exact(_real(t)[None, :, None])


def _running(ops, params, of, mean, var, momentum, count):
    results = {}
    for name, batch, scale in (("mean", mean, 1.0), ("var", var, count / max(1, count - 1))):
        name = f"{of}.running_{name}"
        old = params.get(name)
        if old is not None and momentum is not None:
            batch = ops.mul(batch.reshape(-1), exact(np.array(scale * momentum)))
            results[name] = ops.add(exact(_real(old) * (1 - momentum)), batch)
    return results


def allowed(ball: Ball, got: torch.Tensor, safety: float = SAFETY) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The truth, how far off got may be, and where both are finite numbers of got's dtype; all of got's shape."""
    store = torch.finfo(got.dtype)
    with np.errstate(all="ignore"):
        v, e = ball.v.reshape(got.shape), ball.e.reshape(got.shape)
        tiny = store.smallest_normal * (store.eps if got.dtype is torch.float16 else 1)
        bar = safety * e + store.eps * np.abs(v) + tiny
        return v, bar, np.isfinite(v) & np.isfinite(bar) & (np.abs(v) + bar < store.max)


def exceeds(got: torch.Tensor, ball: Ball, safety: float = SAFETY) -> tuple[float, str]:
    """The largest error in units of what is allowed, inf where got is not finite, and where it is, in words.

    Over the elements whose truth and bar are finite numbers of got's dtype.
    """
    value = got.detach().double().numpy()
    if not value.size:
        return 0.0, ""
    with np.errstate(all="ignore"):
        v, bar, sure = allowed(ball, got, safety)
        ratio = np.where(sure, np.abs(value - v) / bar, 0.0)
        ratio = np.nan_to_num(ratio, nan=np.inf)
    place = np.unravel_index(ratio.argmax(), ratio.shape)
    where = f"worst at {[int(i) for i in place]}: got {value[place]!r}, truth {v[place]!r} +- {bar[place]:.3g}"
    return float(ratio[place]), where
