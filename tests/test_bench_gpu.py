"""The GPU benchmark, as far as it goes without a GPU: cases, checks, tables, files, what it reads from other programs."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

pytest.importorskip("numpy", reason="the benchmark's requirements are not installed")

from bench import machine  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.gpu import __main__ as gpu  # noqa: E402
from bench.gpu import cases, clocks, report, sanitizer, traffic  # noqa: E402
from bench.gpu import tests as gpu_tests  # noqa: E402
from bench.gpu.ours import Ours  # noqa: E402

TRITON = Ours("triton")


def test_gpu_benchmark_tries_out_on_a_cpu(tmp_path, capsys):
    """All of it but the device's own clock and graphs: cases, checks, table, files."""
    assert gpu.main(["--device", "cpu", "--quick", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert "ALL CHECKS PASSED" in (tmp_path / "gpu.txt").read_text()
    found = json.loads((tmp_path / "gpu.json").read_text())
    phases = {"eval", "forward", "backward", "step"}
    assert {phase for result in found["sweep"] for phase in result["speedup"]} == phases
    assert {phase for result in found["sweep"] for phase in result["host"]} == phases
    assert set(found["parts"]) == {*gpu.PARTS} and not found["left"]
    assert "eval" in capsys.readouterr().out


def test_gpu_traffic_reads_the_profilers_table():
    head = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    rows = traffic.rows(
        "==PROF== Connected\n" + head
        + '"0","7","pool_kernel(float*)","dram__bytes_read.sum","Mbyte","1,234.5"\n'
        + '"0","7","pool_kernel(float*)","gpu__time_duration.sum","us","12.0"\n'
        + '"1","7","gate_kernel","dram__bytes_write.sum","Kbyte","2"\n'
    )
    assert rows[0] == {"kernel": "pool_kernel", "dram__bytes_read.sum": 1234.5e6, "gpu__time_duration.sum": 12e-6}
    assert rows[1] == {"kernel": "gate_kernel", "dram__bytes_write.sum": 2000}


def test_gpu_traffic_says_why_it_has_no_numbers(monkeypatch):
    monkeypatch.setattr(traffic, "cuda_tool", lambda name: None)
    found = traffic.traffic((1, 8, 7, 7), "float32", "nchw", TRITON)
    assert found["reason"] == "ncu was not found"
    assert "not measured, ncu was not found" in traffic.table(found)
    monkeypatch.setitem(sys.modules, "coordatt_fast.kernels", None)
    assert traffic.predicted((1, 8, 7, 7), "float32", "nchw", TRITON) == []


def test_gpu_traffic_puts_predictions_beside_measurements():
    pytest.importorskip("triton")
    predicted = traffic.predicted((1, 8, 7, 7), "float32", "nchw", TRITON)
    assert [p["kernel"] for p in predicted] == [
        "pool_kernel", "gate_kernel", "pool_kernel", "stats_kernel", "gate_kernel",
        "reduce_kernel", "mix_backward_kernel", "weights_kernel", "spread_kernel",
    ]  # fmt: skip
    launches = [{"kernel": name} | dict.fromkeys(traffic.METRICS, 1.0) for name in ("pool_kernel", "fill")]
    found = {"shape": [1, 8, 7, 7], "ours": "triton", "dtype": "float32", "layout": "nchw", "launches": launches, "reason": ""}
    lines = traffic.table(found | {"predicted": predicted}).splitlines()
    assert "predicted" in lines[1] and "predicted" not in lines[2]


def test_gpu_traffic_of_the_cuda_backend():
    """Two bytes a byte of x by the one-launch ways, three by the chain."""
    for way, inference, training in (("chain", 3, 3), ("cluster:4", 2, 3), ("resident", 3, 2)):
        found = traffic.predicted((2, 8, 7, 7), "bfloat16", "nchw", Ours("cuda", way))
        moved = [(p["read"] + p["written"]) / (2 * 8 * 49 * 2) for p in found]
        split = {"chain": 2, "cluster:4": 1, "resident": 2}[way]
        assert sum(moved[:split]) == inference and sum(moved[split:-3]) == training and sum(moved[-3:]) == 4
        assert found[0]["kernel"] == ("one_pass_kernel" if way == "cluster:4" else "pool_kernel")
    launch = {"kernel": "one_pass_kernel"} | dict.fromkeys(traffic.METRICS, 1.0)
    title = {"shape": [2, 8, 7, 7], "dtype": "bfloat16", "layout": "nchw", "ours": "cuda cluster:4", "reason": ""}
    predicted = traffic.predicted((2, 8, 7, 7), "bfloat16", "nchw", Ours("cuda", "cluster:4"))
    lines = traffic.table(title | {"launches": [launch], "predicted": predicted}).splitlines()
    assert lines[0].startswith("cuda cluster:4, 2x8x7x7") and "predicted  1.00 x   1.00 x" in lines[1]


def test_templates_are_named_by_their_kernel():
    rows = traffic.rows(
        '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","7","void coordatt::cuda::one_pass_kernel<float>(coordatt::cuda::OnePass)","dram__bytes_read.sum","byte","2"\n'
    )
    assert rows[0]["kernel"] == "one_pass_kernel"


def spread(seconds):
    return {"median": seconds, "p10": seconds, "p90": seconds}


def result(shape, way_seconds, **changes):
    """As cases.measure would have it on a GPU."""
    case = {"shape": list(shape), "mode": "eval", "dtype": "bfloat16", "layout": "nchw", "device": "cuda", "count": 1}
    found = cases.Result(case, "x".join(map(str, shape)))
    found.ours = [*way_seconds, "triton"]
    plain = way_seconds | {"triton": 4e-6, "eager": 40e-6, "compile": 20e-6, "compile-mean": 10e-6, "copy": 3e-6}
    found.seconds["eval"] = {k: spread(s) for k, s in plain.items()}
    found.seconds["eval"] |= {k + "-graph": spread(s / 2) for k, s in plain.items() if k != "copy"}
    found.bandwidth["eval"] = {name: 1e12 for name in found.ours}
    found.copy_bandwidth = 2e12
    found.host["eval"] = {"cuda chain": spread(5e-6)}
    found.outlines["eval"] = {
        name: {"blocks": 64, "cluster": 4, "held": 0 if name == "cuda chain" else 33} for name in way_seconds
    }
    found.estimated["eval"] = "cluster:8"
    return vars(found) | changes


WAYS = {"cuda chain": 4e-6, "cuda cluster:4": 2e-6, "cuda cluster:8": 3e-6}


def test_tables():
    """Of each of ours: over eager, the best of torch.compile, Triton; alone and graphed."""
    large, small = result((256, 96, 112, 112), WAYS), result((1, 96, 14, 14), WAYS)
    rows = [row.split() for row in report.summary([large, small]).splitlines()[1:]]
    of = lambda batch, *name: next(r for r in rows if r[2] == batch and r[4 : 4 + len(name)] == [*name])
    assert of("1", "cuda", "cluster:4")[6:] == ["20.00x", "5.00x", "2.00x", "20.00x", "5.00x", "2.00x", "-"]
    assert of("256", "triton")[5:] == ["10.00x", "2.50x", "-", "10.00x", "2.50x", "-", "50%", "to", "50%"]
    assert not report.failures(large)
    assert "cuda cluster:4 2.0 us 20.00x eager 10.00x compile 5.00x compile-mean 50% of copy" in report.line(large)


def test_ways_show_what_the_estimate_loses():
    text = report.ways([result((1, 96, 14, 14), WAYS)])
    assert "cluster:4 1.0* (64 blocks, 33 held)" in text and "chain 2.0 (64 blocks)" in text
    assert "estimated cluster:8 (+50%)" in text and "copy 3.0" in text
    assert "cuda chain 5.0 / 2.0" in report.hosts([result((1, 96, 14, 14), WAYS)])
    assert report.ways([]) == report.hosts([]) == ""


def test_ours_that_did_not_run_is_a_failure():
    broken = result((1, 96, 14, 14), WAYS, left_out={"cuda cluster:4-graph eval": "RuntimeError: no", "compile eval": "no"})
    assert report.failures(broken) == ["cuda cluster:4-graph eval: RuntimeError: no"]


def test_the_hosts_clock_is_stopped_while_the_device_catches_up():
    made, waited = [], []
    clock = clocks.OnHost(lambda: made.append(1), synchronise=lambda: waited.append(len(made)))
    assert clock.run(2 * clocks.UNSYNCHRONISED + 1) > 0
    assert waited == [0, clocks.UNSYNCHRONISED, 2 * clocks.UNSYNCHRONISED, len(made)]


class Device:
    """In place of torch.cuda: a clock that counts calls as milliseconds; nothing waits."""

    def __init__(self, monkeypatch):
        self.calls, self.replays = 0, 0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.calls

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                device.replays += 1
                device.calls += clocks.IN_A_GRAPH

        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        for name, fake in {
            "Event": Event, "CUDAGraph": Graph, "Stream": stream, "current_stream": stream,
            "stream": lambda s: contextlib.nullcontext(), "graph": lambda g: contextlib.nullcontext(),
            "synchronize": lambda: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)

    def call(self):
        self.calls += 1


def test_the_devices_clock(monkeypatch):
    """Seconds of a call, also where a graph holds ten."""
    device = Device(monkeypatch)
    assert clocks.on_device("cuda", device.call, torch.inference_mode).run(7) == 7e-3
    graph = clocks.graphed(device.call, torch.inference_mode)
    assert device.calls == 7 + 3 + clocks.IN_A_GRAPH
    assert graph.run(4) == pytest.approx(4e-3) and device.replays == 4


def test_small_maps_are_graphed_and_single_images_timed_on_the_host(monkeypatch):
    device = Device(monkeypatch)
    case = Case((1, 4, 3, 3), device="cuda")
    found = cases.Result(case.as_dict(), case.name, ours=["cuda chain", "cuda cluster:2"])
    entered = {name: cases.Call(device.call) for name in (*found.ours, "eager")}
    x = torch.zeros(case.shape)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: device.call())
    for phase in ("eval", "backward"):
        cases.time_phase(case, phase, entered, x, True, 2, 1e-3, found)
    graphs = {name + cases.GRAPHED for name in entered}
    assert set(found.seconds["eval"]) == {*entered, *graphs, "copy"}
    assert set(found.seconds["backward"]) == {*entered, "copy"}
    assert found.speedup["eval"]["cuda cluster:2"]["eager-graph"]["median"] == pytest.approx(1)
    assert found.bandwidth["eval"] == {"cuda chain": 3 * 144e3, "cuda cluster:2": 2 * 144e3}
    assert set(found.host["eval"]) == {*entered} and found.copy_bandwidth == 2 * 144e3

    def refused(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(clocks, "graphed", refused)
    cases.time_phase(case, "step", entered, x, True, 2, 1e-3, found)
    assert "cuda chain-graph step" in found.left_out and "cuda chain" in found.seconds["step"]


def test_what_the_budget_leaves_out_is_listed(tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--budget", "0", "--parts", "sweep", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["left"]["sweep"]) == 4 and set(found["parts"]) == {"sweep"}
    assert "left out, sweep: 4: 1x16x7x9 float32 nchw;" in capsys.readouterr().out


def test_a_case_that_breaks_the_device_ends_the_parts_that_need_it(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(cases, "measure", broken)
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["trouble"]) == 1 and found["left"]["sweep"] == ["all: CUDA is not usable any more in this process"]
    assert "CHECK FAILED: ways, 3x16x7x9 bfloat16 nchw: an illegal memory access" in capsys.readouterr().out


def test_tests_are_read():
    found = gpu_tests.read(
        "...F\n1.20s call     tests/gpu/test_gpu.py::test_a\nFAILED tests/gpu/test_gpu.py::test_b[cuda] - assert 0\n"
        "1 failed, 3 passed in 4.20s\n\n"
    )
    assert found["summary"] == "1 failed, 3 passed in 4.20s" and len(found["slowest"]) == 1
    assert found["failed"] == ["FAILED tests/gpu/test_gpu.py::test_b[cuda] - assert 0"]
    assert gpu_tests.read("")["summary"] == "no output"


def test_tests_that_do_not_end_are_stopped(tmp_path):
    said = "[gw0] [ 1%] PASSED tests/gpu/a.py::b\\n[gw1] [ 2%] FAILED tests/gpu/a.py::c[x]\\ncollected"
    program = f"import time; print('{said}', flush=True); time.sleep(60)"
    found = gpu_tests.run(3.0, tmp_path, [sys.executable, "-c", program])
    assert found["status"] == 124 and found["summary"] == "stopped after 3 s, 1 had passed: collected"
    assert found["failed"] == ["[gw1] [ 2%] FAILED tests/gpu/a.py::c[x]"]
    assert (tmp_path / "gpu-tests.txt").read_text().endswith("collected\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run here")
def test_tests_are_collected_and_skipped_without_a_gpu(tmp_path):
    what = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-k", "test_auto or any"]
    found = gpu_tests.run(120.0, tmp_path, what)
    assert found["status"] == 0 and "skipped" in found["summary"] and "passed" not in found["summary"]


REPORT = """========= COMPUTE-SANITIZER
made 36 calls
========= Invalid __global__ read of size 4 bytes
=========     at void coordatt::cuda::pool_kernel<float, (bool)0>(coordatt::cuda::PoolPass)+0x120
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Invalid __global__ read of size 4 bytes
=========     at void at::native::other_kernel<float>()+0x10
=========
========= ERROR SUMMARY: 2 errors
"""


def test_sanitizer_verdicts():
    found = sanitizer.verdict(REPORT)
    assert (found["errors"], found["in_our_kernels"]) == (2, 1) and "pool_kernel" in found["reports"][0]
    clean = sanitizer.verdict("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    assert (clean["errors"], clean["in_our_kernels"], clean["reports"]) == (0, 0, [])
    assert sanitizer.failures({"memcheck": found, "racecheck": clean}) == ["memcheck: 2 errors"]


def test_sanitizer_runs_every_tool(tmp_path):
    """A program in its place that says what it was started with."""
    program = tmp_path / "compute-sanitizer"
    text = f"#!{sys.executable}\nimport sys\nprint(sys.argv)\nprint({REPORT!r})\nsys.exit(9)\n"
    program.write_text(text)
    program.chmod(0o755)
    found = sanitizer.run(30.0, program=str(program))
    assert set(found) == {*sanitizer.TOOLS}
    assert {(said["errors"], said["status"], said["calls"]) for said in found.values()} == {(2, 9, 36)}
    assert "1 reports in our kernels, 36 calls" in sanitizer.table(found)
    program.write_text(f"#!{sys.executable}\nimport time\nprint('Device not supported', flush=True)\ntime.sleep(60)\n")
    found = sanitizer.run(3.0, ("memcheck",), str(program))
    assert "no verdict: stopped after 3 s" in sanitizer.table(found) and not sanitizer.failures(found)


def test_sanitizer_says_that_it_is_not_there(monkeypatch):
    monkeypatch.setattr(sanitizer, "cuda_tool", lambda name: None)
    assert "no verdict: compute-sanitizer was not found" in sanitizer.table(sanitizer.run(1.0))


def test_padded_maps_keep_their_layout():
    for layout in (torch.contiguous_format, torch.channels_last):
        t = torch.randn(3, 17, 13, 7, dtype=torch.bfloat16).contiguous(memory_format=layout)
        padded = sanitizer.padded(t)
        assert torch.equal(padded, t) and padded.stride() == t.stride()
        assert padded.untyped_storage().nbytes() % 16 == 0


def test_tools_are_found_in_a_toolkits_folder(tmp_path, monkeypatch):
    program = tmp_path / "bin/some-cuda-tool"
    program.parent.mkdir()
    program.write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert machine.cuda_tool("some-cuda-tool") is None
    program.chmod(0o755)
    assert machine.cuda_tool("some-cuda-tool") == str(program)
