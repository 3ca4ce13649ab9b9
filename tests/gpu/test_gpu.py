"""What only a GPU can show: launches, graphs, streams, devices, addresses beyond 32 bits, and the numbers at full size.

Numbers are compared with the reference in float64 on the GPU: root mean square error at most twice plain
PyTorch's own in the same dtype, plus one unit in the last place.
"""

import copy
import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from harness import FLOATS, LAYOUTS, feature_map
from paper import PaperCoordAtt

from coordatt_fast import CoordAtt, explain, use_backend
from coordatt_fast.backends import VERIFIED

pytestmark = pytest.mark.usefixtures("backend")

SIZES = {
    "large": ((16, 96, 112, 112), 8),
    "yolo": ((4, 128, 80, 80), 8),
    "middle": ((32, 192, 28, 28), 8),
    "14": ((33, 384, 14, 14), 12),
    "7": ((64, 960, 7, 7), 30),
    "one image": ((1, 576, 14, 14), 18),
    "odd": ((3, 101, 37, 53), 9),
    "wide": ((2, 24, 3, 1030), 8),
    "one pixel": ((5, 64, 1, 1), 8),
}


def maps(shape, dtype=torch.float32, layout="nchw", count=2):
    g = torch.Generator().manual_seed(7)
    return [feature_map(shape, g, dtype, layout).cuda() for _ in range(count)]


def modules(channels, mid, dtype=torch.float32, training=True):
    """Ours and plain PyTorch's, the same weights, on the GPU."""
    torch.manual_seed(channels)
    plain = PaperCoordAtt(channels, channels, mid_channels=mid)
    with torch.no_grad():
        for name, t in (*plain.named_parameters(), *plain.named_buffers()):
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape) * 0.5 + (1.5 if name == "bn1.weight" else 0))
                if name == "bn1.running_var":
                    t.abs_().add_(0.3)
    ours = CoordAtt(channels, channels, mid_channels=mid)
    ours.load_state_dict(plain.state_dict())
    return [m.to("cuda", dtype).train(training) for m in (ours, plain)]


def step(module, x, grad):
    x = x.detach().requires_grad_()
    for p in module.parameters():
        p.grad = None
    out = module(x)
    out.backward(grad)
    found = {"out": out.detach(), "d x": x.grad} | {"d " + k: p.grad for k, p in module.named_parameters()}
    return found | {k: b.clone() for k, b in module.named_buffers() if b.is_floating_point()}


def close(found, plain, truth):
    for name, right in truth.items():
        right = right.double()
        if name == "d conv1.bias" and not right.abs().max() > 1e-6:
            assert not found[name].any(), "exactly zero under batch statistics"
            continue
        rms = lambda t: (t.double() - right).square().mean().sqrt().item()
        unit = torch.finfo(found[name].dtype).eps * right.square().mean().sqrt().item()
        assert rms(found[name]) <= 2 * rms(plain[name]) + unit, f"{name}: {rms(found[name])}, plain {rms(plain[name])}"


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
    """Takes only what is said to have passed these tests."""
    ours, _ = modules(64, 8)
    with use_backend("auto"):
        plan = explain(ours, maps((2, 64, 7, 7), count=1)[0])
    assert VERIFIED or (plan.backend == "reference" and "not passed its tests on a GPU" in plan.reason)


def launches(call):
    """Names of the kernels that a warm call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("shape, mid", [((32, 96, 56, 56), 8), ((1, 960, 7, 7), 30)])
def test_launches(shape, mid, monkeypatch):
    """At most two in inference, three in training, four backward, and no copies."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
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
    assert len(inference) <= 2, inference
    assert len(forward) <= 3, forward
    assert len(backward) <= 4, backward


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
                assert torch.equal(value.view(torch.uint8), expected[name].view(torch.uint8)), name


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


@pytest.mark.xdist_group("much memory")
@pytest.mark.parametrize("shape", [(700, 96, 112, 112), (1, 33, 5000, 5000)], ids=["images", "one image"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_beyond_32_bits(shape, layout):
    """A map of more than 3 GB: the last image and channel equal those of a small map with the same gates."""
    if free_gigabytes() < 40:
        pytest.skip("needs 40 GB of GPU memory")
    x = torch.randn(shape, device="cuda").contiguous(memory_format=LAYOUTS[layout])
    ours, plain = modules(shape[1], 8)
    leaf = x.requires_grad_()
    out = ours(leaf)
    (dx,) = torch.autograd.grad(out, leaf, x.detach())
    with torch.no_grad():
        # The reference image by image: batch statistics once, then frozen.
        rows = torch.cat([x.detach().mean(3), x.detach().mean(2)], dim=2)
        z = plain.conv1(rows.unsqueeze(3))
        u = plain.bn1(z)
        s = plain.act(u)
        a_h = torch.sigmoid(plain.conv_h(s[-1:, :, : shape[2]]))
        a_w = torch.sigmoid(plain.conv_w(s[-1:, :, shape[2] :].transpose(2, 3)))
        expected = x.detach()[-1:] * a_w * a_h
    assert torch.allclose(out[-1:], expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(dx).all()
    first = (x.detach()[-1:] * a_w * a_h - dx[-1:]).abs().max()
    assert first < 0.1, "dx is the gated gradient but for the small part through the pools"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_network(layout):
    """One graph, forward and backward, inside torch.compile."""
    torch.manual_seed(0)
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


def test_autotune_keeps_what_it_timed(tmp_path):
    settings = {"COORDATT_FAST_AUTOTUNE": "1", "XDG_CACHE_HOME": str(tmp_path), "COORDATT_FAST_BACKEND": "triton"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", AUTOTUNED], env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (bc,) = json.loads((tmp_path / "coordatt_fast/autotune.json").read_text()).values()
    assert bc in (8, 16, 32, 64, 128)
