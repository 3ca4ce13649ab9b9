"""What these tests share: feature maps and modules on the GPU, the CUDA backend's ways forward, comparisons.

tests/cuda_on_cpu/test_gpu_suite.py runs some of them on the emulator, with DEVICE and cuda_operators replaced.
"""

import contextlib
import json

import harness
import pytest
import seeds
import torch
from harness import build, feature_map, run
from paper import PaperCoordAtt

from coordatt_fast import CoordAtt, explain

DEVICE = "cuda"
INFERENCE = ("chain", "cluster:1", "cluster:2", "cluster:4", "cluster:8", "cluster:16")
TRAINING = ("chain", "resident")

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


# The CUDA backend's ways forward ----------------------------------------------------------------------


def cuda_operators():
    return torch.ops.coordatt_fast


def set_way(way):
    cuda_operators().set_cuda_forward(way)


@contextlib.contextmanager
def forced(way):
    set_way(way)
    try:
        yield
    finally:
        set_way("")


def outline(x, mid, training):
    """How the CUDA kernels would go forward: {"way": ..., "blocks": ..., ...}."""
    return json.loads(cuda_operators().cuda_forward_outline(x, mid, training))


def taken(way, x, mid, training):
    """Whether a call on x goes that way once it is forced."""
    with forced(way):
        found = outline(x, mid, training)["way"]
    assert found in (way, "chain"), found
    return found == way


# Data and modules -------------------------------------------------------------------------------------


def maps(shape, dtype=torch.float32, layout="nchw", count=2):
    g = seeds.generator(7)
    return [feature_map(shape, g, dtype, layout).to(DEVICE) for _ in range(count)]


def modules(channels, mid, dtype=torch.float32, training=True):
    """Ours and plain PyTorch's, the same weights, on the GPU."""
    seeds.seed(channels)
    plain = PaperCoordAtt(channels, channels, mid_channels=mid)
    with torch.no_grad():
        for name, t in (*plain.named_parameters(), *plain.named_buffers()):
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape) * 0.5 + (1.5 if name == "bn1.weight" else 0))
                if name == "bn1.running_var":
                    t.abs_().add_(0.3)
    ours = CoordAtt(channels, channels, mid_channels=mid)
    ours.load_state_dict(plain.state_dict())
    return [m.to(DEVICE, dtype).train(training) for m in (ours, plain)]


def step(module, x, grad):
    """A training step: output, gradients, buffers."""
    x = x.detach().requires_grad_()
    for p in module.parameters():
        p.grad = None
    out = module(x)
    out.backward(grad)
    found = {"out": out.detach(), "d x": x.grad} | {"d " + k: p.grad for k, p in module.named_parameters()}
    return found | {k: b.clone() for k, b in module.named_buffers() if b.is_floating_point()}


def infer(module, x):
    with torch.inference_mode():
        return module.eval()(x).clone()


def launches(call):
    """Names of the kernels that a warm call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    found = [name for name in found if "Synchronize" not in name]
    if not found:
        pytest.skip("the profiler sees no kernels here")
    return found


def captured(call):
    """A CUDA graph of the call, warmed up as torch asks for, and what the captured call returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


# Comparisons ------------------------------------------------------------------------------------------


def results(case, d, backward=True):
    """A case of harness.py on the GPU, its results on the CPU; on these very kernels."""
    module = build(CoordAtt, case, d.params).to(DEVICE)
    x, grad = d.x.to(DEVICE), d.grad.to(DEVICE) if backward else None
    cast = torch.autocast(DEVICE, dtype=case.dtype) if case.autocast else contextlib.nullcontext()
    with cast, torch.set_grad_enabled(backward):
        plan = explain(module, x)
        assert plan.tier == "fused", str(plan)
        found = run(module, x, grad)
    return {name: t.cpu() for name, t in found.items()}


def by(way):
    """results, forward by that way of the CUDA backend."""

    def under_test(case, d, backward=True):
        with forced(way):
            return results(case, d, backward)

    return under_test


def compare(case, backward=True, under_test=results):
    """Held to tolerances.py, against plain PyTorch and float64 on the CPU."""
    harness.compare(case, backward, under_test=under_test)


def same_bits(found, expected, message=""):
    assert found.shape == expected.shape and found.dtype == expected.dtype, message
    a, b = (t.detach().contiguous().flatten().view(torch.uint8) for t in (found, expected))
    assert torch.equal(a, b), f"{message}: {int((a != b).sum())} bytes differ"


def close(found, plain, truth):
    """Root mean square error at most twice plain PyTorch's own in the same dtype, plus one unit in the last place."""
    for name, right in truth.items():
        right = right.double()
        if name == "d conv1.bias" and not right.abs().max() > 1e-6:
            assert not found[name].any(), "exactly zero under batch statistics"
            continue
        rms = lambda t: (t.double() - right).square().mean().sqrt().item()
        unit = torch.finfo(found[name].dtype).eps * right.square().mean().sqrt().item()
        assert rms(found[name]) <= 2 * rms(plain[name]) + unit, f"{name}: {rms(found[name])}, plain {rms(plain[name])}"


# Maps too large for plain PyTorch ---------------------------------------------------------------------


def pieces(shape, most=1 << 27):
    """Slices over images and channels, each of at most that many elements."""
    n, c, h, w = shape
    channels = max(1, min(c, most // (h * w)))
    images = max(1, most // (channels * h * w))
    for first in range(0, n, images):
        for channel in range(0, c, channels):
            yield slice(first, first + images), slice(channel, channel + channels)


def piecewise(plain, x, grad):
    """(piece, out, d x) of plain, a PaperCoordAtt in float32, piece by piece in float32."""
    n, c, h, w = x.shape
    pooled = torch.empty(n, c, h + w, device=x.device)
    for piece in pieces(x.shape):
        t = x[piece].float()
        pooled[piece] = torch.cat([t.mean(3), t.mean(2)], dim=2)
    pooled.requires_grad_()
    s = plain.act(plain.bn1(plain.conv1(pooled.unsqueeze(3))))
    a_h = torch.sigmoid(plain.conv_h(s[:, :, :h]))
    a_w = torch.sigmoid(plain.conv_w(s[:, :, h:])).transpose(2, 3)
    d_h, d_w = torch.empty_like(a_h), torch.empty_like(a_w)
    with torch.no_grad():
        for piece in pieces(x.shape):
            product = x[piece].float() * grad[piece].float()
            d_h[piece] = (product * a_w[piece]).sum(3, keepdim=True)
            d_w[piece] = (product * a_h[piece]).sum(2, keepdim=True)
    (d_pooled,) = torch.autograd.grad((a_h, a_w), pooled, (d_h, d_w))
    d_rows, d_columns = d_pooled[:, :, :h, None] / w, d_pooled[:, :, None, h:] / h
    with torch.no_grad():
        for piece in pieces(x.shape):
            gates = a_h[piece] * a_w[piece]
            yield piece, x[piece].float() * gates, grad[piece].float() * gates + d_rows[piece] + d_columns[piece]
