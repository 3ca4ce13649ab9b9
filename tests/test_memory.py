"""Large outputs lie in blocks that the library keeps between calls: they must behave as any tensor's memory
does.
"""

import copy
import gc
import io
import os
import subprocess
import sys

import pytest
import tolerances
import torch
from harness import LAYOUTS, Case, build, data

from coordatt_fast import CoordAtt, library, use_backend

pytestmark = pytest.mark.usefixtures("cpu")

# A little over 1 MiB, from where blocks are used, and over 4 MiB, from where they are huge pages.
SHAPES = {"1.1 MiB": (1, 16, 134, 135), "4.6 MiB": (2, 32, 134, 140)}


@pytest.fixture(params=SHAPES)
def call(request):
    """A function that runs the block on a tensor without gradients, and its input."""
    case = Case(SHAPES[request.param], norm="running")
    d = data(case)
    module = build(CoordAtt, case, d.params)

    def run(x):
        with torch.no_grad():
            return module(x)

    return run, d.x


def expected(call, x):
    with use_backend("reference"):
        return call(x)


def right(got, x, call):
    assert max(tolerances.errors(got, expected(call, x))) < 1e-5


def test_living_outputs_never_share_memory(call):
    """Outputs that are still held, also only through a view or numpy, are not given away again."""
    run, x = call
    held = [(i, run(x * i)) for i in range(1, 4)]
    held.append((4, run(x * 4)[:, 1:, ::2]))
    held.append((5, torch.from_numpy(run(x * 5).numpy())))
    for _ in range(4):
        run(torch.full_like(x, torch.nan))
    gc.collect()
    starts = {t.untyped_storage().data_ptr() for _, t in held}
    assert len(starts) == len(held)
    for i, t in held:
        full = expected(run, x * i)
        assert max(tolerances.errors(t, full[:, 1:, ::2] if i == 4 else full)) < 1e-5, i


def test_saved_for_backward_stays(call):
    """An output that only autograd holds (saved by the next op) survives later calls."""
    run, x = call
    case = Case(tuple(x.shape), norm="running")
    d = data(case)
    results = []
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            module = build(CoordAtt, case, d.params)
            leaf = x.detach().requires_grad_()
            loss = module(leaf).square().mean()
            for _ in range(3):
                run(torch.full_like(x, torch.nan))
            loss.backward()
            results.append(leaf.grad)
    assert max(tolerances.errors(results[1], results[0])) < 1e-5


def test_gradients_do_not_share_memory(call):
    _, x = call
    case = Case(tuple(x.shape))
    module = build(CoordAtt, case, data(case).params)
    kept = []
    for scale in (1, 2, 3):
        leaf = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(module(leaf), leaf, x * scale)
        kept.append(dx)
    for scale, dx in zip((2, 3), kept[1:]):
        assert max(tolerances.errors(dx, kept[0] * scale)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_sizes_and_dtypes_in_between(call, layout):
    """A block that comes back for a smaller output, another dtype or layout is written whole: nothing old
    shows through.
    """
    run, x = call
    for shrink in (0, 1, 2, 5):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            case = Case(
                (*x.shape[:2], x.shape[2] - shrink, x.shape[3]), dtype=dtype, layout=layout, norm="running"
            )
            d = data(case)
            module = build(CoordAtt, case, d.params)
            with torch.no_grad():
                out = module(d.x)
                with use_backend("reference"):
                    reference = module.double()(d.x.double())
            assert tolerances.errors(out, reference)[0] < 1e-5 + torch.finfo(dtype).eps
            assert out.is_contiguous(memory_format=LAYOUTS[layout])
        del out
        right(run(x), x, run)


USES = {
    "in-place arithmetic": lambda t: t.mul_(2).add_(1),
    "deepcopy": copy.deepcopy,
    "save and load": lambda t: torch.load(_saved(t)),
    "numpy": lambda t: torch.from_numpy(t.numpy()),
    "reshape": lambda t: t.flatten(1).view(t.shape),
    "resize_ smaller": lambda t: t.resize_(t.shape[0], t.shape[1], 3, 3),
    "resize_ larger": lambda t: t.resize_(t.shape[0] + 1, *t.shape[1:])[:-1],
    "storage resized to nothing and back": lambda t: _resized(t),
    "set_": lambda t: torch.empty(0).set_(t),
    "shared": lambda t: t.share_memory_(),
    "pinned copy of the data": lambda t: t.clone(memory_format=torch.channels_last),
    "swapped data": lambda t: _swapped(t),
}


def _saved(t):
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return file


def _resized(t):
    kept, size = t.clone(), t.untyped_storage().nbytes()
    t.untyped_storage().resize_(0)
    t.untyped_storage().resize_(size)
    return t.copy_(kept)


def _swapped(t):
    other = torch.zeros_like(t)
    other.data = t
    return other


# The one difference, stated in docs/how-it-works.md: a large output's storage keeps its size.
RESIZING = ("resize_ larger", "storage resized to nothing and back")


@pytest.mark.parametrize("use", RESIZING)
def test_large_outputs_keep_their_size(call, use):
    run, x = call
    out = run(x)
    if out.nbytes < 1 << 20:
        pytest.skip("a small output is torch's own memory")
    with pytest.raises(RuntimeError, match="not resizable"):
        USES[use](out)
    assert out.untyped_storage().nbytes() >= x.nbytes


@pytest.mark.parametrize("use", [use for use in USES if use not in RESIZING])
def test_it_is_a_tensor_like_any_other(call, use):
    """What plain PyTorch allows with an output works with ours, and gives the same."""
    run, x = call
    theirs = USES[use](expected(run, x).clone())
    ours = USES[use](run(x))
    gc.collect()
    run(torch.full_like(x, torch.nan))
    assert theirs.shape == ours.shape and theirs.dtype == ours.dtype
    assert max(tolerances.errors(ours, theirs)) < 1e-5


def test_memory_comes_back_from_other_threads(call):
    """Outputs freed in a thread other than the one that made them, while others take new ones."""
    from concurrent.futures import ThreadPoolExecutor

    run, x = call

    def work(i):
        with use_backend("cpu"):
            out = run(x * (i % 5 + 1))
        return i % 5 + 1, out

    outputs = {i: expected(run, x * i) for i in range(1, 6)}
    with ThreadPoolExecutor(4) as pool:
        for i, out in pool.map(work, range(24)):
            assert max(tolerances.errors(out, outputs[i])) < 1e-5


PROGRAM = """
import resource, torch
from coordatt_fast import CoordAtt, use_backend

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

m, x = CoordAtt(32, 32).eval(), torch.ones(4, 32, 200, 200)
with torch.no_grad(), use_backend("cpu"):
    m(x[:1, :, :20, :20])
    start = resident()
    held = [m(x) for _ in range(25)]
    peak = resident()
    held.clear()
    print(int(start), int(peak), int(resident()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
@pytest.mark.parametrize("limit", ["0", "64", "-1"])
def test_what_is_kept_is_bounded(limit):
    """After 490 MB of outputs at once, at most COORDATT_FAST_KEEP_MB (256 unless told otherwise) are held on
    to.
    """
    environment = {k: v for k, v in os.environ.items() if k != "COORDATT_FAST_POISON"}
    environment["COORDATT_FAST_KEEP_MB"] = limit
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    start, peak, end = map(int, result.stdout.split())
    kept = int(limit) if limit in ("0", "64") else 256
    assert ("COORDATT_FAST_KEEP_MB=-1 has no effect" in result.stderr) == (limit == "-1")
    assert peak - start > 400
    assert end <= start + kept + 32, f"{end - start} MiB more than before"


def test_no_bound_at_all():
    """2 ** 43 megabytes are more bytes than 63 bits count."""
    environment = {k: v for k, v in os.environ.items() if k != "COORDATT_FAST_POISON"}
    environment["COORDATT_FAST_KEEP_MB"] = str(2**43)
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    _, peak, end = map(int, result.stdout.split())
    assert end > peak - 32


@pytest.mark.parametrize("name", ["COORDATT_FAST_KEEP_MB", "COORDATT_FAST_POISON"])
def test_values_without_effect_are_named(name, monkeypatch, caplog):
    usable = ["", "0", "1"] + (["64", "007", str(2**63), "9" * 40] if "KEEP" in name else [])
    for value in usable:
        monkeypatch.setenv(name, value)
        library._warn_of_settings()
    assert not caplog.records
    for value in ("abc", "-1", "1e99", " 1", "+1", "1_0", "0x10", "1.5", "\u0664", "true"):
        monkeypatch.setenv(name, value)
        caplog.clear()
        library._warn_of_settings()
        assert f"{name}={value} has no effect" in caplog.text
