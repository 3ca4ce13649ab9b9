"""onnxruntime and OpenVINO, each in a process of its own.

Both keep thread pools that go on spinning after a call and slow down whatever runs next to them. So each gets
a process that only works when told to, and the caller lets it fall asleep before timing anything else:

    python -m bench.foreign onnxruntime --threads 2

reads one JSON request a line (``load`` a model and an input, then ``run`` n calls) and answers with one JSON
line. Outputs are written into the same buffer on every call, which both runtimes offer and which spares them
page faults.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import numpy as np

RUNTIMES = ("onnxruntime", "openvino")


class Foreign:
    """The caller's end: a contestant (see ``timing.Contestant``) that runs in its own process."""

    rest = 0.03

    def __init__(self, runtime: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.foreign", runtime, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request) -> dict:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of {self.process.args[3]} ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def load(self, model: Path, x: np.ndarray) -> np.ndarray:
        """Load an ONNX file (input ``x``, output ``y`` of the same shape) and return its output for ``x``."""
        source, target = model.with_suffix(".x.npy"), model.with_suffix(".y.npy")
        np.save(source, x)
        self.ask(load=str(model), x=str(source), y=str(target))
        return np.load(target)

    def run(self, calls: int) -> float:
        return self.ask(run=calls)["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def prepare_onnxruntime(model: str, x: np.ndarray, y: np.ndarray, threads: int) -> Callable[[], object]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    result = onnxruntime.OrtValue.ortvalue_from_numpy(y)
    binding.bind_ortvalue_output("y", result)

    def call() -> np.ndarray:
        session.run_with_iobinding(binding)
        return result

    return call


def prepare_openvino(model: str, x: np.ndarray, y: np.ndarray, threads: int) -> Callable[[], object]:
    import openvino

    settings = {
        # Left to itself OpenVINO computes in bfloat16 where the CPU can: another function, at 3e-4 error.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))

    def call() -> object:
        request.infer()
        return request.get_output_tensor()

    return call


PREPARE = {"onnxruntime": prepare_onnxruntime, "openvino": prepare_openvino}


def as_array(result: object) -> np.ndarray:
    """An OrtValue or an OpenVINO tensor as a numpy array."""
    return result.numpy() if callable(getattr(result, "numpy", None)) else result.data


def serve(runtime: str, threads: int) -> None:
    """Answer requests until standard input closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the runtimes print to standard output now and then
    call = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "load" in request:
                x = np.load(request["x"])
                call = PREPARE[runtime](request["load"], x, np.empty_like(x), threads)
                np.save(request["y"], as_array(call()))
                answer = {}
            else:
                start = time.perf_counter()
                for _ in repeat(None, request["run"]):
                    call()
                answer = {"seconds": time.perf_counter() - start}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    serve(options.runtime, options.threads)


if __name__ == "__main__":
    main()
