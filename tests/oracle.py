"""The function and its derivatives in numpy's long double: the truth for float64, and a check on the truth
itself.

Written from the equations, forward and backward by hand, without autograd and without torch arithmetic. On
x86 long double carries 64 mantissa bits, on aarch64 Linux 113: float64's own rounding (2^-53) becomes visible
against it.
"""

import numpy as np
import torch

REAL = np.longdouble
MOMENTUM = REAL(0.1)  # of the running statistics, as a double


def _real(tensor):
    return None if tensor is None else tensor.detach().double().cpu().numpy().astype(REAL)


def _sigmoid(v):
    e = np.exp(-np.abs(v))
    return np.where(v >= 0, 1 / (1 + e), e / (1 + e))


def _hard_swish(u):
    slope = np.where(u <= -3, 0, np.where(u >= 3, 1, (2 * u + 3) / REAL(6)))
    return u * np.clip(u + 3, 0, 6) / REAL(6), slope


def _silu(u):
    s = _sigmoid(u)
    return u * s, s * (1 + u * (1 - s))


ACTIVATIONS = {
    "hard_swish": _hard_swish,
    "silu": _silu,
    "relu": lambda u: (np.maximum(u, 0), (u > 0).astype(REAL)),
    "relu6": lambda u: (np.clip(u, 0, 6), ((u > 0) & (u < 6)).astype(REAL)),
}


def pool(x, grad):
    """Row means then column means [N, C, H + W, 1] of x, and the gradient of x."""
    xs, g = _real(x), _real(grad)[:, :, :, 0]
    height, width = xs.shape[2:]
    means = np.concatenate([xs.mean(axis=3), xs.mean(axis=2)], axis=2)[:, :, :, None]
    dx = g[:, :, :height, None] / REAL(width) + g[:, :, None, height:] / REAL(height)
    return _tensors({"out": means, "d x": np.broadcast_to(dx, xs.shape)})


def gate(x, s_h, s_w, grad, skip):
    """x * sigmoid(s_h) * sigmoid(s_w) (+ x) and the gradients of all three."""
    xs, h, w, g = _real(x), _real(s_h), _real(s_w), _real(grad)
    a_h, a_w = _sigmoid(h), _sigmoid(w)
    slope_h, slope_w = a_h * _sigmoid(-h), a_w * _sigmoid(-w)
    both = a_h * a_w + (1 if skip else 0)
    ds_h = slope_h * (g * xs * a_w).sum(axis=3, keepdims=True)
    ds_w = slope_w * (g * xs * a_h).sum(axis=2, keepdims=True)
    return _tensors({"out": xs * both, "d x": g * both, "d s_h": ds_h, "d s_w": ds_w})


def _tensors(results):
    return {k: torch.from_numpy(np.array(v, dtype=np.float64)) for k, v in results.items()}


def run(x, params, grad, *, norm, activation, skip, eps=1e-5):
    """Every result of one call as float64 tensors under the names of the harness (see harness.py).

    params maps the module's parameter and buffer names to tensors (missing or None where the case has none).
    norm is "batch", "running" or "none". Without grad only the forward results are returned.
    """
    eps = REAL(eps)
    xs, g = _real(x), _real(grad)
    n, _, height, width = xs.shape
    w1, wh, ww = (_real(params[k + ".weight"])[:, :, 0, 0] for k in ("conv1", "conv_h", "conv_w"))
    b1, bh, bw = (_real(params.get(k + ".bias")) for k in ("conv1", "conv_h", "conv_w"))
    gamma, beta = _real(params.get("bn1.weight")), _real(params.get("bn1.bias"))
    column = (None, slice(None), None)

    p = np.concatenate([xs.mean(axis=3), xs.mean(axis=2)], axis=2)
    z = np.einsum("mc,ncl->nml", w1, p)
    if b1 is not None:
        z = z + b1[column]
    rows = n * (height + width)
    if norm == "batch":
        mean = z.mean(axis=(0, 2))
        var = ((z - mean[column]) ** 2).mean(axis=(0, 2))
    elif norm == "running":
        mean, var = _real(params["bn1.running_mean"]), _real(params["bn1.running_var"])
    if norm == "none":
        inv, zhat, u = None, None, z
    else:
        inv = 1 / np.sqrt(var + eps)
        zhat = (z - mean[column]) * inv[column]
        u = zhat if gamma is None else zhat * gamma[column] + beta[column]
    y, slope = ACTIVATIONS[activation](u)
    s_h = np.einsum("cm,nmh->nch", wh, y[:, :, :height])
    s_w = np.einsum("cm,nmw->ncw", ww, y[:, :, height:])
    a_h = _sigmoid(s_h if bh is None else s_h + bh[column])
    a_w = _sigmoid(s_w if bw is None else s_w + bw[column])
    both = a_h[:, :, :, None] * a_w[:, :, None, :]
    results = {"out": xs * both + (xs if skip else 0)}
    if norm == "batch":
        for name, moved in (("bn1.running_mean", mean), ("bn1.running_var", var * rows / (rows - 1))):
            if name in params:
                results[name] = (1 - MOMENTUM) * _real(params[name]) + MOMENTUM * moved
    if g is not None:
        results.update(
            _backward(
                g, xs, both, a_h, a_w, p, y, slope, zhat, inv, column,
                weights=(w1, gamma, wh, ww), biased=(b1 is not None, bh is not None), norm=norm, skip=skip,
            )
        )  # fmt: skip
    return _tensors(results)


def _backward(g, xs, both, a_h, a_w, p, y, slope, zhat, inv, column, *, weights, biased, norm, skip):
    """The lines of the backward pass, from the forward's values."""
    (w1, gamma, wh, ww), (b1, bh), (height, width) = weights, biased, xs.shape[2:]
    ds_h = a_h * (1 - a_h) * (g * xs * a_w[:, :, None, :]).sum(axis=3)
    ds_w = a_w * (1 - a_w) * (g * xs * a_h[:, :, :, None]).sum(axis=2)
    grads = {
        "conv_h.weight": np.einsum("nch,nmh->cm", ds_h, y[:, :, :height])[:, :, None, None],
        "conv_w.weight": np.einsum("ncw,nmw->cm", ds_w, y[:, :, height:])[:, :, None, None],
    }
    if bh:
        grads["conv_h.bias"], grads["conv_w.bias"] = ds_h.sum(axis=(0, 2)), ds_w.sum(axis=(0, 2))
    dy = np.concatenate([np.einsum("cm,nch->nmh", wh, ds_h), np.einsum("cm,ncw->nmw", ww, ds_w)], axis=2)
    dz = dy * slope
    if norm != "none":
        if gamma is not None:
            grads["bn1.weight"] = (dz * zhat).sum(axis=(0, 2))
            grads["bn1.bias"] = dz.sum(axis=(0, 2))
            dz = dz * gamma[column]
        if norm == "batch":
            along = (dz * zhat).mean(axis=(0, 2))
            dz = dz - dz.mean(axis=(0, 2))[column] - zhat * along[column]
        dz = dz * inv[column]
    grads["conv1.weight"] = np.einsum("nml,ncl->mc", dz, p)[:, :, None, None]
    if b1:
        zero = norm == "batch"
        grads["conv1.bias"] = np.zeros(dz.shape[1], dtype=REAL) if zero else dz.sum(axis=(0, 2))
    dp = np.einsum("mc,nml->ncl", w1, dz)
    dx = g * both + dp[:, :, :height, None] / width + dp[:, :, None, height:] / height
    grads["x"] = dx + g if skip else dx
    return {"d " + name: value for name, value in grads.items()}
