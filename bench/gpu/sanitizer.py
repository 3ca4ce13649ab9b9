"""compute-sanitizer over the CUDA backend: each way forward, backward and the passes alone, on a few shapes.

python -m bench.gpu.sanitizer                  one run of the calls, to start under a tool
run(seconds)                                   that under each of TOOLS, side by side, and their verdicts

Every tensor gets memory of its own (no caching allocator), so that an access beside it shows.
"""

import os
import re
import signal
import subprocess
import sys
import time

import torch
from torch import nn

import coordatt_fast
from bench.cases import DTYPES, LAYOUTS
from bench.gpu.ours import INFERENCE, TRAINING, Ours, chosen, outline
from bench.lab import ROOT
from bench.machine import cuda_tool

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Aligned rows and rows of any length, several images to a cluster, several pieces to a block.
SHAPES = ((2, 16, 14, 14), (3, 17, 13, 7), (1, 8, 56, 56))
MID = 8


def padded(t: torch.Tensor) -> torch.Tensor:
    """The same, in whole 16 bytes of memory: the kernels read those around a run."""
    per = 16 // t.element_size()
    memory = torch.zeros(-(-t.numel() // per) * per, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, t.stride()).copy_(t)


def calls(device: str = "cuda", shapes=SHAPES) -> list[str]:
    """One call of everything; what was called."""
    made = []
    backend = "cuda" if device.startswith("cuda") else "auto"
    for shape in shapes:
        for dtype, layout in (("float32", "nchw"), ("bfloat16", "nchw"), ("float32", "channels_last")):
            torch.manual_seed(0)
            module = coordatt_fast.CoordAtt(shape[1], shape[1], mid_channels=MID).to(device, DTYPES[dtype])
            x = torch.randn(shape).to(device, DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
            x, grad = padded(x), padded(torch.ones_like(x))
            for way in dict.fromkeys((*INFERENCE, *TRAINING)):
                with chosen(Ours(backend, way)):
                    if way in INFERENCE and outline(x, False)["way"] == way:
                        with torch.inference_mode():
                            module.eval()(x)
                        made.append(f"{shape} {dtype} {layout} {way}")
                    if way in TRAINING and outline(x, True)["way"] == way:
                        leaf = x.detach().requires_grad_()
                        module.train()(leaf).backward(grad)
                        made.append(f"{shape} {dtype} {layout} {way} and backward")
            module.bn1 = nn.GroupNorm(2, MID).to(device, DTYPES[dtype])
            with chosen(Ours(backend, "chain")):
                leaf = x.detach().requires_grad_()
                module(leaf).backward(grad)
            made.append(f"{shape} {dtype} {layout} pool, gate and backward")
    return made


def verdict(text: str) -> dict:
    """From a tool's output: how many errors, and the first reports; ours: those that name our kernels."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    counted = [re.findall(r"(\d+) (?:error|hazard)", summary) for summary in summaries]
    reports = [r.strip() for r in re.split(r"\n=+ *\n", text) if "SUMMARY" not in r]
    reports = [r for r in reports if re.search(r"coordatt::cuda|Invalid|hazard|Race|Uninit|Barrier", r)]
    ours = [r for r in reports if "coordatt::cuda" in r]
    return {
        "summary": summaries[-1] if summaries else "",
        "errors": int(counted[-1][0]) if counted and counted[-1] else None,
        "in_our_kernels": len(ours),
        "reports": [r[:1500] for r in (ours or reports)[:4]],
    }


def run(seconds: float, tools: tuple[str, ...] = TOOLS, program: str | None = None) -> dict:
    """By tool its verdict, or the reason why it has none."""
    if not (program := program or cuda_tool("compute-sanitizer")):
        return {tool: {"reason": "compute-sanitizer was not found"} for tool in tools}
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    until, running, found = time.monotonic() + seconds, {}, {}
    for tool in tools:
        # API errors are the answers to questions such as which clusters fit.
        line = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        line += [sys.executable, "-m", "bench.gpu.sanitizer"]
        running[tool] = subprocess.Popen(
            line,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    for tool, process in running.items():
        try:
            output, _ = process.communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            found[tool] = verdict(output) | {"reason": f"stopped after {seconds:.0f} s"}
            continue
        found[tool] = verdict(output) | {"status": process.returncode}
        done = re.search(r"made (\d+) calls", output)
        found[tool]["calls"] = int(done[1]) if done else 0
        if not done or found[tool]["errors"] is None:
            found[tool]["reason"] = output.strip()[-500:] or f"ended with {process.returncode}"
    return found


def table(found: dict) -> str:
    rows = ["compute-sanitizer, the CUDA backend:"]
    for tool, said in found.items():
        reports = f", {said['in_our_kernels']} reports in our kernels" if said.get("in_our_kernels") else ""
        text = "no verdict"
        if said.get("summary"):
            text = f"{said['summary']}{reports}, {said.get('calls', 0)} calls"
        reason = said.get("reason", "").replace("\n", " ")
        rows.append(f"  {tool:10} {text}" + (f": {reason}" if reason else ""))
        rows += [f"    {line}" for report in said.get("reports", [])[:1] for line in report.splitlines()[:6]]
    return "\n".join(rows)


def failures(found: dict) -> list[str]:
    """The tools that found something in our kernels."""
    return [f"{tool}: {said['summary']}" for tool, said in found.items() if said.get("in_our_kernels")]


if __name__ == "__main__":
    made = calls()
    torch.cuda.synchronize()
    print(f"made {len(made)} calls")
