"""The CUDA backend's ways forward as work for a GPU: launches, streams, CUDA graphs, torch.compile."""

import copy

import pytest
import torch
from on_gpu import (
    INFERENCE,
    TRAINING,
    captured,
    forced,
    infer,
    launches,
    maps,
    modules,
    same_bits,
    step,
    taken,
)

from coordatt_fast import explain

pytestmark = pytest.mark.usefixtures("cuda")

SHAPE, MID = (24, 96, 14, 14), 8
KERNELS = {
    ("chain", False): ["pool_kernel", "gate_kernel"],
    ("chain", True): ["pool_kernel", "statistics_kernel", "gate_kernel"],
    ("resident", True): ["resident_kernel"],
}
BACKWARD = ["reduce_kernel", "rows_kernel", "spread_kernel"]


def needs(way, x, mid, training):
    if not taken(way, x, mid, training):
        pytest.skip(f"{way} has no room for {tuple(x.shape)} on this device")


def are(found, expected):
    assert len(found) == len(expected) and all(b in a for a, b in zip(found, expected)), found


@pytest.mark.parametrize("way", INFERENCE)
def test_launches_of_inference(way, poison_off):
    x = maps(SHAPE, count=1)[0]
    needs(way, x, MID, False)
    ours, _ = modules(SHAPE[1], MID, training=False)
    with forced(way), torch.inference_mode():
        assert way in explain(ours, x).reason
        are(launches(lambda: ours(x)), KERNELS.get((way, False), ["one_pass_kernel"]))


@pytest.mark.parametrize("way", TRAINING)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_launches_of_training(way, layout, poison_off):
    x, grad = maps(SHAPE, layout=layout)
    needs(way, x, MID, True)
    ours, _ = modules(SHAPE[1], MID)
    leaf = x.detach().requires_grad_()
    with forced(way):
        are(launches(lambda: ours(leaf)), KERNELS[way, True])
        out = ours(leaf)
        inputs = [leaf, *ours.parameters()]
        are(launches(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)), BACKWARD)


@pytest.mark.parametrize("way", INFERENCE)
def test_inference_in_a_cuda_graph(way):
    """Captured once, replayed on new input, several times in a row and with other work in between."""
    x, fresh = maps(SHAPE)
    needs(way, x, MID, False)
    ours, _ = modules(SHAPE[1], MID, training=False)
    with forced(way), torch.inference_mode():
        graph, out = captured(lambda: ours(x))
        expected = ours(fresh)
    with torch.inference_mode():
        x.copy_(fresh)
        for _ in range(3):
            out.zero_()
            graph.replay()
            ours(fresh)
            graph.replay()
            same_bits(out, expected, way)


@pytest.mark.parametrize("way", TRAINING)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_training_step_in_a_cuda_graph(way, layout):
    x, grad, fresh = maps(SHAPE, layout=layout, count=3)
    needs(way, x, MID, True)
    ours, _ = modules(SHAPE[1], MID)
    static = x.clone().requires_grad_()
    eager = copy.deepcopy(ours)

    def training_step():
        out = ours(static)
        return out, torch.autograd.grad(out, [static, *ours.parameters()], grad)

    with forced(way):
        graph, (out, gradients) = captured(training_step)
        eager.load_state_dict(ours.state_dict())
        with torch.no_grad():
            static.copy_(fresh)
        for _ in range(3):
            graph.replay()
            expected = step(eager, fresh, grad)
            same_bits(out.detach(), expected["out"], way)
            names = ["d x", *("d " + name for name, _ in eager.named_parameters())]
            for name, gradient in zip(names, gradients):
                same_bits(gradient, expected[name], name)
            for mine, theirs in zip(ours.buffers(), eager.buffers()):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("way", [*INFERENCE, "resident"])
def test_streams(way):
    """Behind what the current stream still computes; several streams at a time, the same bits on each."""
    training = way == "resident"
    x, grad = maps(SHAPE)
    needs(way, x, MID, training)
    ours, _ = modules(SHAPE[1], MID)
    call = (lambda m, t: step(m, t, grad)) if training else (lambda m, t: {"out": infer(m, t)})
    with forced(way):
        expected = call(copy.deepcopy(ours), x)
        found = []
        for _ in range(4):
            side, module, late = torch.cuda.Stream(), copy.deepcopy(ours), torch.zeros_like(x)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(10_000_000)
                late.copy_(x)
                found.append(call(module, late))
        torch.cuda.synchronize()
    for results in found:
        for name, value in expected.items():
            same_bits(results[name], value, f"{name}, {way}")


@pytest.mark.parametrize("way", [*INFERENCE, "resident"])
def test_beside_other_kernels(way):
    """While large products occupy the device: a grid or a cluster that needs room waits for it."""
    training = way == "resident"
    x, grad = maps(SHAPE)
    needs(way, x, MID, training)
    ours, _ = modules(SHAPE[1], MID)
    start = copy.deepcopy(ours.state_dict())
    call = (lambda: step(ours.train(), x, grad)) if training else (lambda: {"out": infer(ours, x)})
    busy, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    with forced(way):
        expected = call()
        busy.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(busy):
            for _ in range(30):
                b = a @ a
        for _ in range(10):
            ours.load_state_dict(start)
            for name, value in call().items():
                same_bits(value, expected[name], f"{name}, {way}")
    torch.cuda.current_stream().wait_stream(busy)
    assert b.isfinite().all()


@pytest.mark.parametrize("way", ["any", "chain"])
@pytest.mark.parametrize("training", [True, False])
def test_compiled(way, training):
    """One graph, whichever way its operators then go."""
    x, grad = maps(SHAPE)
    ours, _ = modules(SHAPE[1], MID, training=training)
    other = copy.deepcopy(ours)
    with forced(way):
        compiled = torch.compile(ours, fullgraph=True)
        found, expected = step(compiled, x, grad), step(other, x, grad)
        for (name, value), right in zip(found.items(), expected.values()):
            scale = right.abs().max().item()
            assert torch.allclose(value, right, rtol=1e-5, atol=1e-5 * scale), name
        with torch.inference_mode():
            same_bits(torch.compile(ours.eval(), fullgraph=True)(x), other.eval()(x), way)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("way", ["chain", "cluster:4", "resident"])
def test_other_device(way):
    """The current device is another than x's."""
    x, grad = maps(SHAPE)
    ours, _ = modules(SHAPE[1], MID)
    with forced(way):
        expected = step(copy.deepcopy(ours), x, grad), infer(copy.deepcopy(ours), x)
        there = copy.deepcopy(ours).to("cuda:1")
        found = step(there, x.to("cuda:1"), grad.to("cuda:1")), infer(copy.deepcopy(ours).to("cuda:1"), x.to("cuda:1"))
    for name, value in expected[0].items():
        same_bits(found[0][name].cpu(), value.cpu(), name)
    same_bits(found[1].cpu(), expected[1].cpu())
    torch.cuda.synchronize("cuda:1")
