"""The ops as torch's compilers and transforms see them: schemas, fakes, autograd, autocast, export."""

import itertools

import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, LAYOUTS, Case, data, feature_map
from shapes import AWKWARD, EMPTY
from test_forward import arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from coordatt_fast import codes, reference

pytestmark = pytest.mark.usefixtures("cpu")

SHAPE, MID = (2, 12, 5, 7), 8


def ops():
    return torch.ops.coordatt_fast


def sample(op, case, grad_needed=False):
    """Arguments of each op for one case."""
    d = data(case)
    p = dict(d.params)
    if case.norm == "batch":
        p.pop("bn1.running_mean", None), p.pop("bn1.running_var", None)
    a = arguments(p)
    head, tail = a[:6], a[6:]
    front = [d.x, *head, 1e-5, *tail]
    activation = list(reference.ACTIVATIONS).index(case.activation)
    norm = ["none", "running", "batch"].index(case.norm)
    n, c, h, w = case.shape
    if op == "attend":
        return (*front, activation, case.skip)
    if op == "attend_out":
        return (*front, activation, case.skip, torch.zeros_like(d.x))
    if op == "attend_train":
        return (*front, norm, activation, case.skip)
    running = (torch.zeros(case.mid), torch.ones(case.mid), torch.zeros((), dtype=torch.long))
    if case.dtype is torch.float64:
        running = (*(t.double() for t in running[:2]), running[2])
    if op == "attend_train_update":
        return (*front, norm, activation, case.skip, *running, 0.1)
    saved = ops().attend_train(*front, norm, activation, case.skip)[1:]
    if op == "attend_backward":
        weights = [a[0], a[2], a[3], 1e-5, a[6], a[8]]
        return (d.grad, d.x, *saved, *weights, norm, activation, case.skip, grad_needed or codes.NEEDS_ALL)
    if op == "update_running_stats":
        return (*running, saved[1], saved[3], saved[4], 0.1)
    generator = seeds.generator(5)
    s_h, s_w = (torch.randn(s, generator=generator).to(case.dtype) for s in ((n, c, h, 1), (n, c, 1, w)))
    strips = feature_map((n, c, h + w, 1), generator, case.dtype)
    return {
        "pool": (d.x,),
        "pool_backward": (strips, d.x),
        "gate": (d.x, s_h, s_w, case.skip),
        "gate_backward": (d.grad, d.x, s_h, s_w, case.skip),
    }[op]


OPS = ["attend", "attend_out", "attend_train", "attend_train_update", "attend_backward", "update_running_stats"]
OPS += ["pool", "pool_backward", "gate", "gate_backward"]
CASES = {
    "nchw float32 batch": Case(SHAPE, MID),
    "nhwc float32 running": Case(SHAPE, MID, layout="nhwc", norm="running"),
    "nhwc bfloat16 batch skip": Case(SHAPE, MID, torch.bfloat16, layout="nhwc", skip=True),
    "nchw float64 none silu": Case(SHAPE, MID, torch.float64, norm="none", activation="silu", bias=False),
    "nchw float16 autocast": Case(SHAPE, MID, torch.float16, autocast=True, norm="running"),
    "not affine": Case(SHAPE, MID, affine=False),
    "thin": Case((1, 3, 1, 9), 8, norm="running"),
    "empty": Case(EMPTY[0], MID, norm="running"),
}


def fits(op, case):
    return not (op in ("attend", "attend_out") and case.norm == "batch") and not (
        op in ("attend_train_update", "update_running_stats") and (case.norm != "batch" or 0 in case.shape)
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, case):
    case = CASES[case]
    if not fits(op, case):
        pytest.skip("the op has no such call")
    opcheck(getattr(ops(), op).default, sample(op, case))


@pytest.mark.parametrize("op", ["attend_train", "pool", "gate"])
@pytest.mark.parametrize("case", ["nchw float32 batch", "nhwc float32 running", "nchw float64 none silu"])
def test_opcheck_with_gradients(op, case):
    """Also runs AOT autograd over the registered formula and compares with eager."""
    args = sample(op, CASES[case])
    args = [a.detach().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    if op == "attend_train":  # running statistics take no gradient
        args[5], args[6] = (t if t is None else t.detach() for t in args[5:7])
    opcheck(getattr(ops(), op).default, tuple(args))


RELAYOUTS = {
    "dense": lambda t: t,
    "channel slice": lambda t: torch.cat([t, t], 1)[:, t.shape[1] :],
    "batch slice": lambda t: torch.cat([t, t], 0)[::2],
    "crop": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:1, :1].expand(t.shape),
}


@pytest.mark.parametrize("relayout", RELAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_fake_has_the_strides_of_the_real_one(op, layout, relayout):
    """The compiler plans memory by the fake: size, strides, dtype must be what the kernel returns, layout by
    layout.
    """
    for case, needs in itertools.product(list(CASES.values())[:5], (0x1FF, 0x001, 0x002, 0x1FE)):
        case = case.but(layout=layout)
        if not fits(op, case) or (needs != 0x1FF and op != "attend_backward"):
            continue
        args = list(sample(op, case, needs))
        place = 1 if op in ("attend_backward", "gate_backward", "pool_backward") else 0
        if op != "update_running_stats":
            args[place] = RELAYOUTS[relayout](args[place])
        if op == "attend_out":
            args[-1] = torch.empty_strided(args[0].shape, args[0].stride()).to(args[0].dtype)
            if relayout != "dense":
                args[-1] = torch.empty_like(args[0])
        call = getattr(ops(), op).default
        with FakeTensorMode() as mode:
            fake = lambda v: mode.from_tensor(v) if torch.is_tensor(v) else v
            expected = call(*map(fake, args))
        got = call(*args)
        as_tuple = lambda r: () if r is None else (r,) if torch.is_tensor(r) else r
        assert len(as_tuple(got)) == len(as_tuple(expected))
        for index, (a, b) in enumerate(zip(as_tuple(got), as_tuple(expected))):
            real, planned = (a.shape, a.stride(), a.dtype), (b.shape, b.stride(), b.dtype)
            assert real == planned, f"result {index}, {case}: {real}, fake says {planned}"


@pytest.mark.parametrize("case", CASES)
def test_needs_decide_what_is_computed(case):
    """attend_backward gives an empty tensor for what is not wanted, and the same bits for what is."""
    args = sample("attend_backward", CASES[case])
    everything = ops().attend_backward(*args)
    assert all(t.numel() or 0 in CASES[case].shape for t in everything[:2])
    for needs in [1 << i for i in range(9)] + [0x1FE, 0b110000110, 0]:
        got = ops().attend_backward(*args[:-1], needs)
        for i in range(9):
            if needs >> i & 1:
                tolerances.assert_same_bits(got[i], everything[i], f"output {i} of needs {needs:09b}")
            else:
                assert got[i].shape == (0,), f"output {i} of needs {needs:09b} was not asked for"


@pytest.mark.parametrize("dtype", FLOATS)
def test_attend_is_attend_train(dtype):
    """Inference and training forward are one function: the same bits where both run, and the saved tensors
    are true.
    """
    for layout in LAYOUTS:
        for norm in ("running", "none"):
            case = Case(*AWKWARD["primes"], dtype=FLOATS[dtype], layout=layout, norm=norm)
            out, pooled, squeezed, gates, mean, var = ops().attend_train(*sample("attend_train", case))
            assert (
                max(tolerances.errors(ops().attend(*sample("attend", case)), out))
                <= torch.finfo(out.dtype).eps
            )
            n, c, h, w = case.shape
            acc = torch.promote_types(case.dtype, torch.float32)
            d = data(case)
            x = d.x.double()
            rows, columns = (
                x.mean(3).transpose(1, 2).reshape(n * h, c),
                x.mean(2).transpose(1, 2).reshape(n * w, c),
            )
            expected = torch.cat([rows, columns])
            assert pooled.dtype == squeezed.dtype == gates.dtype == mean.dtype == var.dtype == acc
            slack = 64 * torch.finfo(acc).eps
            assert max(tolerances.errors(pooled, expected)) <= slack
            z = expected @ d.params["conv1.weight"].double()[:, :, 0, 0].T + d.params["conv1.bias"].double()
            assert max(tolerances.errors(squeezed, z)) <= slack
            product = gates[: n * h].reshape(n, h, 1, c) * gates[n * h :].reshape(n, 1, w, c)
            assert (
                max(tolerances.errors(out, x * product.permute(0, 3, 1, 2)))
                <= slack + torch.finfo(out.dtype).eps
            )
            stats = ["bn1.running_mean", "bn1.running_var"]
            used = [d.params[k].to(acc) for k in stats] if norm == "running" else [mean * 0, mean * 0 + 1]
            assert torch.equal(mean, used[0]) and torch.equal(var, used[1])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_running_stats(momentum):
    """Biased variance in, unbiased out; None averages over num_batches_tracked; each of the three may be
    missing.
    """
    rows, mid = 7, 5
    squeezed, mean, var = torch.randn(rows, mid), torch.randn(mid), torch.rand(mid)
    for present in itertools.product([True, False], repeat=2):
        running = [torch.full((mid,), 2.0) if there else None for there in present]
        tracked = torch.tensor(3)
        ops().update_running_stats(*running, tracked, squeezed, mean, var, momentum)
        assert tracked.item() == 4
        factor = 0.1 if momentum else 1 / 4
        for value, new in zip(running, (mean, var * rows / (rows - 1))):
            if value is not None:
                assert torch.allclose(value, (1 - factor) * 2 + factor * new, rtol=1e-6, atol=1e-6)
