"""The kernels of the hybrid tier by themselves: pool, gate and their backward passes, with bars as narrow as theirs.

Between them the children round to the map's dtype; in half precision that hides what a kernel does wrong.
"""

from dataclasses import dataclass

import bounds
import numpy as np
import torch
from hypothesis import strategies as st

from attack.calls import LEVELS
from attack.tensors import DTYPES, FINITE, LAYOUTS, laid_out, map_of, shapes


@dataclass(frozen=True)
class Pass:
    """One call of each of the four operators."""

    shape: tuple = (1, 1, 1, 1)
    dtype: torch.dtype = torch.float32
    x: str = "normal"
    x_layout: str = "contiguous"
    grad: str = "normal"
    grad_layout: str = "contiguous"
    turned: bool = False  # gates and their gradients with channels innermost
    skip: bool = False
    threads: int = 1
    simd: str = LEVELS[-1]
    seed: int = 0


@st.composite
def passes(draw):
    one_of = lambda values: draw(st.sampled_from(tuple(values)))
    return Pass(
        draw(shapes()), one_of(DTYPES), one_of(FINITE), one_of(LAYOUTS), one_of(FINITE), one_of(LAYOUTS),
        draw(st.booleans()), draw(st.booleans()), one_of((1, 1, 2, 3)), one_of(LEVELS), draw(st.integers(0, 2**31)),
    )  # fmt: skip


def run(call: Pass) -> tuple[dict, dict]:
    """The operators' results, and what they were given, by name."""
    generator = torch.Generator().manual_seed(call.seed)
    n, c, h, w = call.shape
    x = laid_out(map_of(call.x, call.shape, generator, call.dtype), call.x_layout)
    grad = laid_out(map_of(call.grad, call.shape, generator, call.dtype), call.grad_layout)
    small = [map_of("normal", size, generator, call.dtype) for size in ((n, c, h, 1), (n, c, 1, w), (n, c, h + w, 1))]
    if call.turned:
        small = [t.contiguous(memory_format=torch.channels_last) for t in small]
    s_h, s_w, dp = small
    ops = torch.ops.coordatt_fast
    torch.set_num_threads(call.threads)
    ops.set_simd_level(call.simd)
    try:
        results = {"pooled": ops.pool(x), "d x of pool": ops.pool_backward(dp, x), "out": ops.gate(x, s_h, s_w, call.skip)}
        names = "d x of gate", "d s_h", "d s_w"
        results |= dict(zip(names, ops.gate_backward(grad, x, s_h, s_w, call.skip)))
    finally:
        ops.set_simd_level(LEVELS[-1])
        torch.set_num_threads(1)
    return results, {"x": x, "grad": grad, "s_h": s_h, "s_w": s_w, "dp": dp}


def truth(call: Pass, given: dict) -> tuple[dict, bool]:
    """The same as balls, and whether something may overflow."""
    sums = torch.float64 if call.dtype is torch.float64 else torch.float32
    ops = bounds.Arithmetic(sums, sums)
    x, g, s_h, s_w, dp = (bounds.exact(t.double().numpy()) for t in given.values())
    h, w = call.shape[2:]
    with np.errstate(all="ignore"):
        rows, columns = ops.mean(x, (3,)), ops.mean(x, (2,)).swap()
        pooled = bounds.Ball(*(np.concatenate(pair, axis=2) for pair in ((rows.v, columns.v), (rows.e, columns.e))))
        across = ops.mul(dp[:, :, :h], bounds.exact(np.array(1 / w)))
        down = ops.mul(dp[:, :, h:].swap(), bounds.exact(np.array(1 / h)))
        a_h, a_w = ops.sigmoid(s_h), ops.sigmoid(s_w)
        gated = lambda t: ops.mul(ops.mul(t, a_w), a_h)
        slope = lambda a: ops.mul(a, ops.rounded(1 - a.v, a.e, np.ones_like(a.v)))
        both = ops.mul(g, x)
        balls = {
            "pooled": pooled, "d x of pool": ops.add(across, down),
            "out": ops.add(gated(x), x) if call.skip else gated(x),
            "d x of gate": ops.add(gated(g), g) if call.skip else gated(g),
            "d s_h": ops.mul(slope(a_h), ops.sum(ops.mul(both, a_w), (3,))),
            "d s_w": ops.mul(slope(a_w), ops.sum(ops.mul(both, a_h), (2,))),
        }  # fmt: skip
    return balls, ops.overflows


def check(call: Pass) -> None:
    """AssertionError with all that is wrong."""
    results, given = run(call)
    if not given["x"].numel():
        return
    balls, overflows = truth(call, given)
    wrong = []
    for name, value in results.items():
        if value.dtype != call.dtype:
            wrong.append(f"{name} is {value.dtype}")
        ratio, where = bounds.exceeds(value, balls[name])
        if not (overflows or ratio <= 1):
            wrong.append(f"{name}: {ratio:.3g} times what is allowed; {where}")
    assert not wrong, "\n".join([repr(call), *wrong])
