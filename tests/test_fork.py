"""A process that forks while another of its threads computes: the child computes too."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("cpu")

# Large results take the lock of the blocks that csrc/cpu/blocks.cpp keeps. One thread, because PyTorch's own pools of
# threads do not survive a fork.
PROGRAM = """
import ctypes, os, sys, threading, time, torch
from coordatt_fast import CoordAtt, use_backend

torch.set_num_threads(1)
torch.set_grad_enabled(False)
module, small, large = CoordAtt(16, 16).eval(), torch.randn(2, 16, 5, 7), torch.randn(1, 16, 134, 135)
expected = module(small), module(large)
strips = torch.randn(1, 16, 134 + 135, 1)

def spread():
    return torch.ops.coordatt_fast.pool_backward(strips, large)

# The more blocks wait, the longer each call looks through them, and holds the lock. Their pages go back to the system.
held = [spread() for _ in range(2000)]
for t in held:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(t.nbytes), 4)  # MADV_DONTNEED
del held, t
running = True

def compute():
    while running:
        spread()

def child():
    with use_backend("cpu"):
        for x, out in zip((small, large), expected):
            if not torch.equal(module(x), out):
                return 1
    return 0

threads = [threading.Thread(target=compute) for _ in range(2)]
for thread in threads:
    thread.start()
outcomes = {}
for _ in range(int(sys.argv[1])):
    process = os.fork()
    if process == 0:
        os._exit(child())
    end = time.monotonic() + 20
    while (found := os.waitpid(process, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.0005)
    if found[0] == 0:
        os.kill(process, 9)
        os.waitpid(process, 0)
        outcomes["hangs"] = outcomes.get("hangs", 0) + 1
        break
    outcome = os.waitstatus_to_exitcode(found[1])
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
running = False
print(outcomes)
"""


def test_children_do_not_hang():
    environment = {k: v for k, v in os.environ.items() if k != "COORDATT_FAST_POISON"}
    environment["COORDATT_FAST_KEEP_MB"] = "8192"
    arguments = [sys.executable, "-W", "ignore", "-c", PROGRAM, "150"]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert result.stdout == "{0: 150}\n", result.stdout + result.stderr
