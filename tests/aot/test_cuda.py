"""What nvcc makes of the CUDA kernels for GPUs that are not here: no spills, registers for as many blocks as the
launches count on, and the instructions that the kernels are built on.

    pytest tests/aot/test_cuda.py       half a minute after a build, three without one
    FORCE_CUDA=1                        fails where nvcc is missing, in place of skipping
"""

import pytest

pytest.importorskip("triton", reason="triton, whose wheel has the disassembler, is not installed")

from cuda_code import ARCHS, DTYPES, build_script, compile_all, kernels_in_sources

PASSES = {"pool", "gate", "reduce", "spread"}  # 256 threads, blocks_per_processor of them wanted on an SM
BY_LAYOUT = PASSES | {"resident"}
KERNELS = sorted(BY_LAYOUT | {"one_pass", "statistics", "rows", "update"})  # one_pass is nchw alone

FILLED = BY_LAYOUT | {"one_pass"}  # their maps come through stages of shared memory
WRITE_MAPS = {"gate", "spread", "one_pass", "resident", "reduce"}  # reduce: dx of the gate alone
DEPENDENT = {"gate", "statistics", "rows", "spread"}  # may start while the kernel before still runs
LET_START = {"pool", "statistics", "reduce", "rows"}  # allow the kernel after to

REGISTERS_OF_SM, THREADS_OF_PASS, BLOCKS = 65536, 256, 3  # geometry.h


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    nvcc = build_script()["find_nvcc"]()
    if nvcc is None:
        pytest.skip("nvcc was not found; FORCE_CUDA=1 makes this an error")
    return compile_all(nvcc, tmp_path_factory.mktemp("cubin"))


@pytest.fixture(params=ARCHS)
def arch(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernels(request, arch, compiled):
    """All instances of one kernel for one architecture."""
    return [kernel for kernel in compiled[arch] if kernel.name == request.param]


def in_nchw(kernel):
    return kernel.layout == "nchw" or kernel.name == "one_pass"


def test_every_kernel_is_looked_at(arch, compiled):
    assert kernels_in_sources() == set(KERNELS)
    found = sorted((kernel.name, kernel.dtype, kernel.layout) for kernel in compiled[arch])
    layouts = {name: ("nchw", "nhwc") if name in BY_LAYOUT else ("",) for name in KERNELS}
    assert found == sorted((name, d, layout) for name in KERNELS for d in DTYPES.values() for layout in layouts[name])


def test_no_spills(kernels):
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.count(r"\b(?:LDL|STL)\b") == 0, kernel


def test_registers(kernels):
    """Leave room for the blocks that geometry.h wants on an SM; float64 is allowed to have fewer."""
    for kernel in kernels:
        if kernel.name in PASSES and kernel.dtype != "float64":
            assert -(-kernel.registers // 8) * 8 * THREADS_OF_PASS * BLOCKS <= REGISTERS_OF_SM, kernel


def test_copies_into_shared_memory(kernels, arch):
    """Bulk copies where they exist and planes are runs of memory; 16 bytes a thread elsewhere."""
    for kernel in kernels:
        bulk, by_thread = kernel.count(r"\bUBLKCP\.S\.G\b"), kernel.count(r"\bLDGSTS\.E\.BYPASS\.128\b")
        if kernel.name not in FILLED:
            assert not bulk and not by_thread, kernel
        elif in_nchw(kernel) and arch != "sm_80":
            assert bulk and not by_thread, kernel
        else:
            assert by_thread and not bulk, kernel


def test_stores(kernels):
    for kernel in kernels:
        if kernel.name in WRITE_MAPS:
            assert kernel.count(r"\bSTG\.E\.128\b"), kernel


def test_clusters(kernels, arch):
    """one_pass adds up its cluster's parts through distributed shared memory, between barriers of the cluster."""
    for kernel in kernels:
        barriers = kernel.count(r"\bUCGABAR_ARV\b"), kernel.count(r"\bUCGABAR_WAIT\b")
        loads = kernel.count(r"\bLD\.E(?:\.64)? R\d+, \[")  # without a descriptor: not of global memory
        if kernel.name == "one_pass" and arch != "sm_80":
            assert min(barriers) >= 2 and loads, kernel
        else:
            assert barriers == (0, 0) and not loads, kernel


def test_dependent_launches(kernels, arch):
    for kernel in kernels:
        newer = arch != "sm_80"
        assert bool(kernel.count(r"\bACQBULK\b")) == (newer and kernel.name in DEPENDENT), kernel
        assert bool(kernel.count(r"\bPREEXIT\b")) == (newer and kernel.name in LET_START), kernel


def test_nothing_is_added_in_any_order(kernels):
    """No atomic additions of floating-point numbers: results are the same bits every time."""
    for kernel in kernels:
        found = kernel.count(r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG|REDAS)\.\S*(?:F16|BF16|F32|F64)")
        assert not found, kernel
