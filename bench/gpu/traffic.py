"""DRAM bytes of our kernels as the hardware counts them (ncu), in units of one full-size tensor.

python -m bench.gpu.traffic --shape 64,96,112,112        one call of every phase, to run under a profiler
traffic(shape, dtype, layout, ours)                      runs that under ncu and reads its table

Beside them stand the bytes that each launch has to move at least: Triton's as counted from the kernels' code,
CUDA's the full-size tensors alone.
"""

import argparse
import csv
import io
import re
import subprocess
import sys

import torch

import coordatt_fast
from bench.baselines import ours
from bench.cases import DTYPES, LAYOUTS, Case
from bench.gpu.ours import Ours, chosen
from bench.lab import ROOT
from bench.machine import cuda_tool

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-9, "us": 1e-6, "ms": 1e-3}
UNITS |= {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3}
# Full-size tensors that the CUDA backend's launches read and write: inference, training, backward.
CHAIN = {"pool_kernel": (1, 0), "gate_kernel": (1, 1)}
CHAIN_IN_TRAINING = {"pool_kernel": (1, 0), "statistics_kernel": (0, 0), "gate_kernel": (1, 1)}
BACKWARD = {"reduce_kernel": (2, 0), "rows_kernel": (0, 0), "spread_kernel": (1, 1)}


def once(case: Case) -> None:
    """Inference, then a training step, after a first round of each that compiles."""
    x, g = case.tensor(1), case.tensor(2)
    module = ours(case.plain(), case)
    for profiled in (False, True):
        if profiled:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        module.eval()
        with torch.inference_mode():
            module(x)
        module.train()
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(module(leaf), [leaf, *module.parameters()], g)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def rows(text: str) -> list[dict]:
    """One dict a kernel launch from ncu's CSV: kernel, and per metric bytes or seconds."""
    start = text.find('"ID"')
    launches: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO(text[start:] if start >= 0 else "")):
        if row["Metric Name"] in METRICS:
            named = re.search(r"\b\w+_kernel\b", row["Kernel Name"])
            kernel = named[0] if named else row["Kernel Name"].split("(")[0]
            launch = launches.setdefault(row["ID"], {"kernel": kernel})
            launch[row["Metric Name"]] = (
                float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
            )
    return list(launches.values())


def predicted(shape: tuple, dtype: str, layout: str, ours: Ours) -> list[dict]:
    """Every launch of once() with the bytes it has to read and write; none where triton does not import."""
    if ours.backend == "cuda":
        size = Case(shape, dtype=dtype).output_bytes
        inference = {"one_pass_kernel": (1, 1)} if ours.way.startswith("cluster") else CHAIN
        training = {"resident_kernel": (1, 1)} if ours.way == "resident" else CHAIN_IN_TRAINING
        return [
            {"kernel": kernel, "read": reads * size, "written": writes * size}
            for launched in (inference, training, BACKWARD)
            for kernel, (reads, writes) in launched.items()
        ]
    try:
        from coordatt_fast.kernels import entries, traffic
    except ImportError:
        return []
    mid = coordatt_fast.CoordAtt(shape[1], shape[1], device="meta").conv1.out_channels
    found = entries.by_operator(shape, mid, DTYPES[dtype], layout == "channels_last")
    launches = []
    for operator in ("attend", "attend_train_update", "attend_backward"):
        for entry in found[operator]:
            full, small = traffic.bytes_moved([entry])
            moved = {"read": full.read + small.read, "written": full.written + small.written}
            launches.append({"kernel": entry.fn.fn.__name__, **moved})
    return launches


def traffic(shape: tuple, dtype: str, layout: str, ours: Ours, seconds: float = 120) -> dict:
    """Every launch of inference and a training step with its DRAM bytes; a reason where ncu cannot."""
    found = {"shape": list(shape), "dtype": dtype, "layout": layout, "ours": ours.name}
    found |= {"launches": [], "reason": ""}
    found["predicted"] = predicted(shape, dtype, layout, ours)
    if not (profiler := cuda_tool("ncu")):
        return found | {"reason": "ncu was not found"}
    command = [
        profiler, "--csv", "--clock-control", "none", "--profile-from-start", "off",
        "--metrics", ",".join(METRICS), sys.executable, "-m", "bench.gpu.traffic",
        "--shape", ",".join(map(str, shape)), "--dtype", dtype, "--layout", layout,
        "--backend", ours.backend, "--way", ours.way,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return found | {"reason": f"ncu took longer than {seconds:.0f} s"}
    found["launches"] = rows(done.stdout)
    if not found["launches"]:
        found["reason"] = (done.stdout + done.stderr).strip()[-300:] or f"ncu ended with {done.returncode}"
    return found


def table(found: dict) -> str:
    """Each launch: its DRAM reads and writes, measured and predicted, in units of one full-size tensor."""
    size = Case(tuple(found["shape"]), dtype=found["dtype"]).output_bytes
    name = "x".join(map(str, found["shape"]))
    title = f"{found['ours']}, {name} {found['dtype']} {found['layout']}"
    title += f": DRAM bytes by ncu, x = {size / 1e6:.0f} MB"
    left, lines = list(found["predicted"]), []
    for launch in found["launches"]:
        # Launches come in order; others than ours have no prediction.
        same = next((p for p in left if p["kernel"] == launch["kernel"]), None)
        expected = ""
        if same is not None:
            left.remove(same)
            expected = f"   predicted {same['read'] / size:5.2f} x  {same['written'] / size:5.2f} x"
        lines.append(
            f"  {launch['kernel']:40.40} read {launch[METRICS[0]] / size:5.2f} x  "
            f"written {launch[METRICS[1]] / size:5.2f} x  {launch[METRICS[2]] * 1e6:8.1f} us{expected}"
        )
    if found["reason"]:
        title += f": not measured, {found['reason']}"
        lines = [
            f"  {p['kernel']:40.40} predicted: read {p['read'] / size:5.2f} x  "
            f"written {p['written'] / size:5.2f} x"
            for p in left
        ]
    return "\n".join([title, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.traffic", description=__doc__)
    parser.add_argument("--shape", required=True, help="N,C,H,W")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw")
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--way", default="", help="forward, of the cuda backend; default: its own choice")
    options = parser.parse_args()
    shape = tuple(int(size) for size in options.shape.split(","))
    with chosen(Ours(options.backend, options.way)):
        once(Case(shape, dtype=options.dtype, layout=options.layout, device="cuda"))


if __name__ == "__main__":
    main()
