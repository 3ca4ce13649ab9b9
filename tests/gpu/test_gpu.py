"""What only a GPU can show, of every backend: launches, graphs, streams, devices, addresses beyond 32 bits, numbers at
full size, compared with the reference in float64 on the GPU (on_gpu.close)."""

import copy
import functools
import json
import os
import subprocess
import sys

import pytest
import seeds
import torch
from harness import FLOATS, LAYOUTS
from on_gpu import SIZES, close, launches, maps, modules, piecewise, same_bits, step

from coordatt_fast import explain, use_backend
from coordatt_fast.backends import ROWS, VERIFIED, built_with_cuda

pytestmark = pytest.mark.usefixtures("backend")

FULL_SIZE = [(size, dtype) for size in SIZES for dtype in ("float32", "bfloat16")]
FULL_SIZE += [(size, dtype) for size in ("14", "odd") for dtype in ("float16", "float64")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size, dtype", FULL_SIZE)
def test_numbers(size, dtype, layout, backend):
    shape, mid = SIZES[size]
    x, grad = maps(shape, FLOATS[dtype], layout)
    ours, plain = modules(shape[1], mid, FLOATS[dtype])
    assert explain(ours, x).backend == backend
    exact = copy.deepcopy(plain).double()
    truth = step(exact, x.double(), grad.double())
    if dtype == "float64":
        for name, value in step(ours, x, grad).items():
            scale = max(truth[name].abs().max().item(), 1.0)
            assert torch.allclose(value, truth[name], rtol=1e-9, atol=1e-9 * scale), name
    else:
        close(step(ours, x, grad), step(plain, x, grad), truth)
    with torch.inference_mode():
        truth = {"out": exact.eval()(x.double())}
        close({"out": ours.eval()(x)}, {"out": plain.eval()(x)}, truth)


def test_auto():
    """Takes cuda where csrc/cuda/verified.h, as it was built, names this architecture, then triton, then neither."""
    ours, _ = modules(64, 8)
    with use_backend("auto"):
        plan = explain(ours, maps((2, 64, 7, 7), count=1)[0])
    major, minor = torch.cuda.get_device_capability()
    if not ROWS["cuda"].missing() and ["chain", 10 * major + minor] in built_with_cuda()["verified"]:
        assert plan.backend == "cuda"
    elif "triton" in VERIFIED:
        assert plan.backend == "triton"
    else:
        assert plan.backend == "reference" and "not passed its tests on such a GPU" in plan.reason


@pytest.mark.parametrize("shape, mid", [((32, 96, 56, 56), 8), ((1, 960, 7, 7), 30)])
def test_launches(shape, mid, backend, poison_off):
    """Two in inference, three in training, four backward or (cuda) three, and no copies."""
    x, grad = maps(shape)
    ours, _ = modules(shape[1], mid)
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *ours.parameters()]
    forward = launches(lambda: ours(leaf))
    out = ours(leaf)
    backward = launches(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    with torch.inference_mode():
        ours.eval()
        inference = launches(lambda: ours(x))
    most = {"triton": 4, "cuda": 3}
    assert len(inference) <= 2, inference
    assert len(forward) <= 3, forward
    assert len(backward) <= most[backend], backward


def test_no_synchronisation():
    shape, mid = SIZES["middle"]
    x, grad = maps(shape)
    ours, _ = modules(shape[1], mid)
    cumulative = copy.deepcopy(ours)
    cumulative.bn1.momentum = None
    step(ours, x, grad), step(cumulative, x, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(ours, x, grad), step(cumulative, x, grad)
        with torch.inference_mode():
            ours.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_every_time(layout):
    for size in ("large", "7", "odd"):
        shape, mid = SIZES[size]
        x, grad = maps(shape, torch.bfloat16, layout)
        ours, _ = modules(shape[1], mid, torch.bfloat16)
        start = copy.deepcopy(ours.state_dict())
        torch.use_deterministic_algorithms(True)
        expected = step(ours, x, grad)
        for _ in range(5):
            ours.load_state_dict(start)
            for name, value in step(ours, x, grad).items():
                same_bits(value, expected[name], name)


def test_half_types_round_to_nearest():
    """A gate of exactly one half at every pixel: the product is x / 4 in float32, rounded once."""
    for dtype in (torch.bfloat16, torch.float16):
        x = maps((4, 64, 20, 20), dtype, count=1)[0]
        ours, _ = modules(64, 8, dtype, training=False)
        for conv in (ours.conv_h, ours.conv_w):
            torch.nn.init.zeros_(conv.weight), torch.nn.init.zeros_(conv.bias)
        with torch.inference_mode():
            assert torch.equal(ours(x), (x.float() * 0.25).to(dtype))


@pytest.mark.parametrize("size", ["middle", "7", "one image"])
def test_cuda_graph(size):
    """Inference and a training step, captured once and replayed on new input."""
    shape, mid = SIZES[size]
    x, grad, fresh = maps(shape, count=3)
    ours, _ = modules(shape[1], mid)
    eager = copy.deepcopy(ours)
    static = x.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(ours(static), [static, *ours.parameters()], grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(static)
        gradients = torch.autograd.grad(out, [static, *ours.parameters()], grad)
    eager.load_state_dict(ours.state_dict())
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    expected = step(eager, fresh, grad)
    assert torch.equal(out, expected["out"])
    for gradient, (name, p) in zip(gradients[1:], eager.named_parameters()):
        assert torch.equal(gradient, p.grad), name
    assert torch.equal(gradients[0], expected["d x"])
    assert torch.equal(ours.bn1.running_mean, eager.bn1.running_mean)
    assert torch.equal(ours.bn1.num_batches_tracked, eager.bn1.num_batches_tracked)

    ours.eval()
    with torch.inference_mode():
        still = x.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ours(still)
        still.copy_(fresh)
        graph.replay()
        assert torch.equal(out, ours(fresh))


def test_other_stream():
    """Work is queued behind what the current stream still computes, not on the default stream."""
    shape, mid = SIZES["middle"]
    x, grad = maps(shape)
    ours, _ = modules(shape[1], mid)
    expected = step(copy.deepcopy(ours), x, grad)
    late, side = torch.zeros_like(x), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        found = step(ours, late, grad)
    side.synchronize()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_device():
    x, grad = maps((4, 64, 20, 20))
    ours, _ = modules(64, 8)
    expected = step(copy.deepcopy(ours), x, grad)
    found = step(ours.to("cuda:1"), x.to("cuda:1"), grad.to("cuda:1"))
    for name, value in expected.items():
        assert torch.equal(found[name].cpu(), value.cpu()), name


@functools.cache
def free_gigabytes():
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0


BEYOND = {
    "images": ((700, 96, 112, 112), "float32"),  # 3.4 GB
    "one image": ((1, 206, 2048, 2044), "float32"),  # 3.4 GB
    "elements": ((1800, 96, 112, 112), "bfloat16"),  # 2.2e9
    "elements of one image": ((1, 516, 2048, 2044), "bfloat16"),  # 2.2e9
    "a long line": ((1, 33, 5000, 5000), "float32"),  # 3.3 GB
}


@pytest.mark.parametrize("size", BEYOND)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_beyond_32_bits(size, layout, backend, much_memory):
    """Every element of out and dx of maps whose bytes or elements no 32-bit number counts."""
    shape, dtype = BEYOND[size]
    if free_gigabytes() < 60:
        pytest.skip("needs 60 GB of GPU memory")
    if backend == "cuda" and shape[2] + shape[3] > 4096:
        pytest.skip("H + W is above what the CUDA kernels take")
    x, grad = (torch.randn(shape, device="cuda", dtype=FLOATS[dtype]).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    ours, plain = modules(shape[1], 8, FLOATS[dtype])
    leaf = x.requires_grad_()
    out = ours(leaf)
    (dx,) = torch.autograd.grad(out, leaf, grad)
    allowed = 1e-3 if dtype == "float32" else 3e-2
    for piece, right, right_dx in piecewise(plain.float(), x.detach(), grad):
        for name, found, expected in (("out", out, right), ("d x", dx, right_dx)):
            error = (found.detach()[piece].float() - expected).abs() - allowed * expected.abs()
            assert error.max() <= allowed, f"{name}, piece {piece}: {error.max()}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_network(layout):
    """One graph, forward and backward, inside torch.compile."""
    seeds.seed(0)
    build = lambda block: torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), block, torch.nn.Conv2d(32, 8, 1)
    )
    ours, plain = modules(32, 8)
    nets = [build(m).to("cuda", memory_format=LAYOUTS[layout]) for m in (ours, plain)]
    for index in ("0", "2"):
        nets[0].get_submodule(index).load_state_dict(nets[1].get_submodule(index).state_dict())
    compiled = torch.compile(nets[0], fullgraph=True)
    x = torch.randn(4, 3, 40, 56, device="cuda").contiguous(memory_format=LAYOUTS[layout])
    grad = torch.randn(4, 8, 40, 56, device="cuda")
    found, expected = step(compiled, x, grad), step(nets[1], x, grad)
    for (name, value), right in zip(found.items(), expected.values()):
        assert torch.allclose(value, right, rtol=1e-2, atol=1e-2 * right.abs().max().item() + 1e-4), name


def test_autocast():
    x = maps((4, 64, 20, 20), count=1)[0]
    ours, plain = modules(64, 8)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            half = x.to(dtype)
            out, right = ours(half), plain(half)
        assert out.dtype == right.dtype
        assert torch.allclose(out, right, rtol=3e-2, atol=3e-2)


def test_memory_kept_for_backward():
    """x, and tensors of size N * C * (H + W)."""
    x = maps((32, 96, 112, 112), count=1)[0].requires_grad_()
    ours, _ = modules(96, 8)
    ours(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = ours(x)
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    n, c, h, w = x.shape
    assert kept < 3 * n * c * (h + w) * 4, f"{kept / 1e6:.1f} MB"


def test_hybrid_tier(backend):
    """A normalisation that no kernel has: fused pool and gate around the module's own children."""
    x, grad = maps((4, 64, 20, 28))
    ours, plain = modules(64, 8)
    ours.bn1, plain.bn1 = (torch.nn.GroupNorm(2, 8).cuda() for _ in range(2))
    plan = explain(ours, x)
    assert (plan.tier, plan.backend) == ("hybrid", backend)
    close(step(ours, x, grad), step(plain, x, grad), step(copy.deepcopy(plain).double(), x.double(), grad.double()))


AUTOTUNED = """
import torch, coordatt_fast
module, x = coordatt_fast.CoordAtt(96, 96).cuda().eval(), torch.rand(4, 96, 28, 28, device="cuda")
state = torch.cuda.get_rng_state()
with torch.no_grad():
    first = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    graph.replay()
assert torch.equal(out, first) and torch.equal(state, torch.cuda.get_rng_state())
"""


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_autotune_keeps_what_it_timed(tmp_path):
    settings = {"COORDATT_FAST_AUTOTUNE": "1", "XDG_CACHE_HOME": str(tmp_path), "COORDATT_FAST_BACKEND": "triton"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", AUTOTUNED], env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (bc,) = json.loads((tmp_path / "coordatt_fast/autotune.json").read_text()).values()
    assert bc in (8, 16, 32, 64, 128)
