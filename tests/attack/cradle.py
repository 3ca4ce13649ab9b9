"""Runs code in processes of its own, quickly: torch is imported once, and each piece of code gets a fork.

The package itself is not imported here, so every fork reads its environment and loads its library anew. Started
as a script; one JSON object a line in ("code", "env", "path", "timeout"), one out ("signal", "status", "text").
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback


def _born(order: dict, output) -> None:
    """The child's whole life."""
    os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in order["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.path[:0] = order["path"]
    status = 0
    try:
        exec(compile(order["code"], "<attack>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                _born(order, output)
            until, status = time.monotonic() + order["timeout"], None
            while time.monotonic() < until:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                status = None
                time.sleep(0.004)
            if status is None:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            output.seek(0)
            text = output.read().decode(errors="replace")
        answer = {"signal": -1, "status": None, "text": text}
        if status is not None:
            answer |= {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "status": status >> 8}
        sys.__stdout__.write(json.dumps(answer) + "\n")
        sys.__stdout__.flush()


class Cradle:
    """run(code) in a fork of a process that has torch and nothing else. signal -1 in the answer: it hung."""

    def __init__(self) -> None:
        self.process = None

    def run(self, code: str, env: dict | None = None, path: tuple = (), timeout: float = 120) -> dict:
        if self.process is None or self.process.poll() is not None:
            clean = {n: v for n, v in os.environ.items() if not n.startswith("COORDATT_FAST_")}
            clean |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
            command = [sys.executable, __file__]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean
            )
        order = {"code": code, "env": env or {}, "path": list(map(str, path)), "timeout": timeout}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


if __name__ == "__main__":
    _serve()
