"""No byte before or behind a tensor is touched: tensors end (or begin) at a page that may not be read.

The work runs in a process of its own, since a stray access there ends in a segmentation fault.
"""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("cpu")

PROGRAM = r"""
import ctypes, itertools, mmap, sys
import torch
torch.set_num_threads(2)
sys.path.insert(0, sys.argv[1])
from coordatt_fast import CoordAtt, coord_att, use_backend
from harness import FLOATS, LAYOUTS, Case, build, data
from shapes import AWKWARD, FEW

libc, size_t = ctypes.CDLL(None, use_errno=True), ctypes.c_size_t
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, size_t]
PAGE = mmap.PAGESIZE
mapped = []


def fenced(t, at_end):
    '''A copy of t, strides and all, between two pages that may not be touched, flush with one of them.'''
    size = t.numel() * t.element_size()
    inner = max(1, -(-size // PAGE)) * PAGE
    base = libc.mmap(None, inner + 2 * PAGE, 3, 0x22, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value)
    mapped.append((base, inner + 2 * PAGE))
    assert libc.mprotect(base, PAGE, 0) == 0 and libc.mprotect(base + PAGE + inner, PAGE, 0) == 0
    start = base + PAGE + (inner - size if at_end else 0)
    if size == 0:
        return t
    memory = (ctypes.c_char * size).from_address(start)
    flat = torch.frombuffer(memory, dtype=t.dtype)
    return flat.as_strided(t.shape, t.stride()).copy_(t)


dtype = sys.argv[2]
for shape in FEW:
    print(shape, flush=True)
    for layout, norm in itertools.product(LAYOUTS, ("running", "batch")):
        with use_backend("cpu"):
            case = Case(*AWKWARD[shape], dtype=FLOATS[dtype], layout=layout, norm=norm)
            d = data(case)
            for at_end in (True, False):
                p = {k: fenced(v, at_end) for k, v in d.params.items()}
                x, grad = fenced(d.x, at_end), fenced(d.grad, at_end)
                module = build(CoordAtt, case, d.params)
                for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                    tensor.data = fenced(tensor.data, at_end)
                x.requires_grad_()
                module(x).backward(grad)
                with torch.no_grad():
                    module(x)
                if norm == "running":
                    names = "conv1.weight conv1.bias bn1.weight bn1.bias bn1.running_mean bn1.running_var"
                    names += " conv_h.weight conv_h.bias conv_w.weight conv_w.bias"
                    out = fenced(d.x, at_end)
                    with torch.no_grad():
                        coord_att(x.detach(), *(p[n] for n in names.split()), out=out)
                n, c, h, w = case.shape
                s_h = fenced(torch.randn(n, c, h, 1).to(case.dtype), at_end)
                s_w = fenced(torch.randn(n, c, 1, w).to(case.dtype), at_end)
                ops = torch.ops.coordatt_fast
                q = fenced(ops.pool(x.detach()), at_end)
                ops.pool_backward(q, x.detach())
                ops.gate(x.detach(), s_h, s_w, True)
                ops.gate_backward(grad, x.detach(), s_h, s_w, False)
                del module, p, x, grad, s_h, s_w, q
                while mapped:
                    libc.munmap(*mapped.pop())
print("untouched")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's mmap and mprotect")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "float16"])
def test_fenced_pages(dtype):
    """Forward, backward and the two ops of the hybrid tier, with every tensor flush with either fence."""
    command = [sys.executable, "-c", PROGRAM, str(pathlib.Path(__file__).parent), dtype]
    result = subprocess.run(command, capture_output=True, text=True)
    done = result.stdout.split("\n")
    assert result.stdout.endswith("untouched\n"), f"{done[-2]}: {result.returncode} {result.stderr[-1000:]}"
