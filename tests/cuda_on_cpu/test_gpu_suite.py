"""tests/gpu and the GPU benchmark on the emulator, as far as they need no streams, graphs and events: that they run."""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import checking
import pytest
import torch

TESTS = Path(__file__).parents[1]
for folder in (TESTS / "gpu", TESTS.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@pytest.fixture
def suite(monkeypatch):
    """tests/gpu's way tests, on CPU tensors."""
    import on_gpu

    emulated = torch.ops.coordatt_fast_cuda_on_cpu
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(on_gpu, "cuda_operators", lambda: emulated)
    monkeypatch.setattr(on_gpu, "set_way", checking.emulator.set_forward)
    return importlib.import_module("test_cuda_ways")


def test_inference(suite):
    checking.emulator.launches()
    suite.test_inference("primes", "float32")
    suite.test_inference("W=7", "bfloat16")
    assert {"one_pass_kernel", "pool_kernel", "gate_kernel"} == set(checking.kernels())


def test_training(suite):
    checking.emulator.launches()
    suite.test_training("primes", "float16")
    assert {"resident_kernel", "statistics_kernel", "spread_kernel"} <= set(checking.kernels())


def test_options(suite):
    suite.test_options("batch", "silu")
    suite.test_options("running", "hard_swish")
    suite.test_half_x_with_float32_parameters("bfloat16")


def test_numbers(suite, monkeypatch):
    """Sizes that the emulator gets through, on a device that has room for every way."""
    checking.emulator.set_device(arch=90, processors=132, shared_memory=232448)
    for name, size in {"7": ((2, 64, 7, 7), 8), "odd": ((1, 19, 13, 9), 8)}.items():
        monkeypatch.setitem(suite.SIZES, name, size)
        for dtype in ("float32", "bfloat16"):
            suite.test_numbers(name, dtype)
    x = torch.zeros(2, 64, 7, 7)
    assert suite.ways_taken(x, 8) == ([*suite.INFERENCE], [*suite.TRAINING])


def test_anything_else(suite):
    suite.test_strides("offset by one element")
    suite.test_strides("nhwc crop of columns")
    suite.test_not_finite("nchw", torch.inf)
    suite.test_gradient_not_finite("nhwc", torch.nan)
    suite.test_empty_batch("nchw", True)
    suite.test_empty_batch("nhwc", False)
    suite.test_out_and_inplace()


def test_a_wrong_result_is_seen(suite, monkeypatch):
    """Without its first wait the one-pass kernel reads what has not come yet."""
    emulator = checking.emulator
    suite.test_inference("primes", "float32")
    site = next(i for i, s in enumerate(emulator.sites()) if s.startswith("one_pass.cu"))
    emulator.skip(site)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(6):
            emulator.set_seed(seed)
            suite.test_inference("primes", "float32")


def test_maps_piece_by_piece(suite, monkeypatch):
    """The reference for maps beyond 32 bits is plain PyTorch's function and gradient."""
    import on_gpu

    cut = on_gpu.pieces
    monkeypatch.setattr(on_gpu, "pieces", lambda shape: cut(shape, most=2 * shape[2] * shape[3]))
    for shape in ((3, 5, 6, 7), (1, 1, 4, 2), (2, 4, 1, 3)):
        x, grad = on_gpu.maps(shape)
        _, plain = on_gpu.modules(shape[1], 8)
        expected = on_gpu.step(plain, x, grad)
        seen = torch.zeros(shape)
        for piece, out, dx in on_gpu.piecewise(plain, x, grad):
            assert torch.allclose(out, expected["out"][piece], rtol=1e-5, atol=1e-5)
            assert torch.allclose(dx, expected["d x"][piece], rtol=1e-3, atol=1e-4)
            seen[piece] += 1
        assert torch.equal(seen, torch.ones(shape))


def test_outline(suite):
    import on_gpu

    checking.emulator.set_device(arch=90, processors=132, shared_memory=232448)
    x = torch.zeros(5, 64, 14, 14)
    with on_gpu.forced("cluster:4"):
        found = on_gpu.outline(x, 8, False)
    assert found == found | {"way": "cluster:4", "cluster": 4, "blocks": 20, "groups": 4, "processors": 132}
    assert found["held"] >= 5 and found["shared"] > 64 * 14 * 14 * 4 // 4
    with on_gpu.forced("resident"):
        found = on_gpu.outline(x, 8, True)
    assert found["way"] == "resident" and found["blocks"] == 5 * found["groups"] <= found["held"]
    found = on_gpu.outline(x, 8, False)
    assert json.dumps(found) and found["way"] == "chain" and found["held"] == 0


class Stream:
    """In place of torch.cuda's: everything is done at once."""

    def wait_stream(self, other):
        pass


class Graph:
    """In place of a CUDA graph: the call again, by the same way, its results where the first ones are."""

    way = ""  # forced now

    def __init__(self, call):
        self.call, self.found, self.way = call, call(), Graph.way

    def replay(self):
        before = Graph.way
        Graph.force(self.way)
        pairs = [(self.found, self.call())]
        Graph.force(before)
        while pairs:
            to, new = pairs.pop()
            if isinstance(to, torch.Tensor):
                to.data.copy_(new.data)
            else:
                pairs += zip(to, new)

    @staticmethod
    def force(way):
        Graph.way = way
        checking.emulator.set_forward(way)


@pytest.fixture
def runs(suite, monkeypatch):
    """tests/gpu's launches, graphs and streams, without any of them."""
    found = importlib.import_module("test_cuda_runs")

    def launches(call):
        call()
        checking.emulator.launches()
        call()
        return checking.kernels()

    def captured(call):
        graph = Graph(call)
        return graph, graph.found

    monkeypatch.setattr(found, "launches", launches)
    monkeypatch.setattr(found, "captured", captured)
    monkeypatch.setattr(found, "SHAPE", (3, 32, 7, 7))
    monkeypatch.setattr(sys.modules["on_gpu"], "set_way", Graph.force)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    checking.emulator.set_device(arch=90, processors=132, shared_memory=232448)
    return found


def test_runs(runs):
    for way in runs.INFERENCE:
        runs.test_launches_of_inference(way, None)
        runs.test_inference_in_a_cuda_graph(way)
        runs.test_streams(way)
    for way in runs.TRAINING:
        for layout in ("nchw", "nhwc"):
            runs.test_launches_of_training(way, layout, None)
            runs.test_training_step_in_a_cuda_graph(way, layout)
    runs.test_streams("resident")


@pytest.mark.parametrize("training", [True, False])
def test_compiled(runs, training):
    runs.test_compiled("any", training)


@pytest.fixture
def gpu_bench(monkeypatch):
    """The GPU benchmark's contestants on the emulator."""
    pytest.importorskip("numpy", reason="the benchmark's requirements are not installed")
    import coordatt_fast
    from bench.gpu import ours

    emulated = torch.ops.coordatt_fast_cuda_on_cpu
    monkeypatch.setattr(ours, "operators", lambda: emulated)
    monkeypatch.setattr(ours, "set_way", checking.emulator.set_forward)
    monkeypatch.setattr(ours, "backends", lambda device: {"cuda": "", "triton": "no GPU"})
    monkeypatch.setattr(coordatt_fast, "use_backend", lambda name: contextlib.nullcontext())
    checking.emulator.set_device(arch=90, processors=132, shared_memory=232448)
    return importlib.import_module("bench.gpu.__main__")


def test_benchmark(gpu_bench, tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--rounds", "2", "--parts", "ways"]
    assert gpu_bench.main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    (ways,) = found["ways"]
    names = [f"cuda {way}" for way in ("chain", "cluster:1", "cluster:2", "cluster:4", "cluster:8", "cluster:16")]
    assert list(ways["outlines"]["eval"]) == names and {*names, "copy"} == set(ways["seconds"]["eval"])
    assert set(ways["seconds"]["forward"]) == {"cuda chain", "cuda resident", "copy"}
    assert set(ways["seconds"]["backward"]) == {"cuda chain", "copy"}
    assert ways["estimated"]["eval"].startswith("cluster:") and ways["estimated"]["train"] == "resident"
    # Three bytes moved a byte of x, or two.
    moved = [ways["bandwidth"]["eval"][n] * ways["seconds"]["eval"][n]["median"] for n in names]
    assert [round(m / (3 * 16 * 7 * 9 * 2)) for m in moved] == [3, 2, 2, 2, 2, 2]
    text = capsys.readouterr().out
    assert "estimated cluster:" in text and "held)" in text and "ALL CHECKS PASSED" in text


def test_a_wrong_way_gets_no_time(gpu_bench, tmp_path, monkeypatch):
    from bench.gpu import cases, sanitizer

    emulator, timed = checking.emulator, set()

    def time_phase(case, phase, entered, *rest):
        timed.update(f"{name} {'eval' if phase == 'eval' else 'train'}" for name in entered)

    monkeypatch.setattr(cases, "time_phase", time_phase)
    sanitizer.calls("cpu", ((1, 16, 7, 9),))  # reaches every site
    emulator.skip(next(i for i, s in enumerate(emulator.sites()) if s.startswith("one_pass.cu")))
    emulator.set_seed(3)
    arguments = ["--device", "cpu", "--quick", "--rounds", "2", "--parts", "ways", "--out", str(tmp_path)]
    assert gpu_bench.main(arguments) == 1
    assert "CHECK FAILED" in (tmp_path / "gpu.txt").read_text()
    (ways,) = json.loads((tmp_path / "gpu.json").read_text())["ways"]
    passed = {name for name, check in ways["checks"].items() if check["passed"]}
    assert passed == timed and timed < {*ways["checks"]}


def test_sanitizers_calls(gpu_bench):
    from bench.gpu import sanitizer

    checking.emulator.launches()
    made = sanitizer.calls("cpu", ((2, 16, 14, 14),))
    assert sum("float32 nchw cluster" in call for call in made) == 5
    assert sum("resident and backward" in call for call in made) == 3
    launched = set(checking.kernels())
    every = {"pool", "statistics", "gate", "reduce", "rows", "spread", "one_pass", "resident"}
    assert launched == {f"{name}_kernel" for name in every}
