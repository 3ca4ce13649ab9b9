"""Every statement that waits in the kernels is needed: without any one of them the results are wrong, or the
emulator sees a deadlock."""

import itertools
import re
from pathlib import Path

import checking
import pytest
import seeds
import torch
from checking import A100, H200, on_cuda
from harness import Case, data, feature_map, run
from torch import nn

from coordatt_fast import CoordAtt

SOURCES = sorted(Path(__file__).resolve().parents[2].glob("csrc/cuda/*.cu*"))
WAITS = re.compile(r"\b(__syncthreads|barrier_wait|cluster_sync|grid_sync|grid_dependency_wait)\(")


def written_sites():
    """file:line of every waiting statement in the sources."""
    found = []
    for path in SOURCES:
        if path.name == "ptx.cuh":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if WAITS.search(line.partition("//")[0]):
                found.append(f"{path.name}:{number}")
    return found


def whole(case, backward=True):
    return lambda: on_cuda(case, data(case), backward)


def hybrid():
    generator = seeds.generator(3)
    x, grad = (feature_map((2, 6, 5, 7), generator) for _ in range(2))
    seeds.seed(1)
    module = CoordAtt(6, 6, mid_channels=4)
    module.bn1 = nn.GroupNorm(2, 4)
    return run(module, x, grad)


def update():
    mean, var, tracked = torch.zeros(600), torch.ones(600), torch.tensor(3)
    batch = torch.arange(600.0)
    torch.ops.coordatt_fast_cuda_on_cpu.update_running_stats(
        mean, var, tracked, torch.zeros(9, 600), batch, batch, None
    )
    return {"mean": mean, "var": var, "tracked": tracked}


# What together reaches every wait: way forward, device, call.
CALLS = [
    ("chain", H200, whole(Case((2, 9, 40, 64)))),
    ("chain", A100, whole(Case((1, 5, 70, 80)))),
    ("chain", H200, whole(Case((1, 9, 40, 64), 100, torch.float64, norm="running"))),
    ("chain", H200, whole(Case((2, 9, 40, 64), norm="running"), backward=False)),
    ("cluster:2", H200, whole(Case((9, 8, 40, 44), norm="running"), backward=False)),
    ("resident", H200, whole(Case((2, 9, 40, 44)), backward=False)),
    ("chain", H200, hybrid),
    ("chain", H200, update),
]


def result(call, seed):
    way, device, function = call
    torch.set_num_threads(1)  # the children between pool and gate are torch's own
    checking.emulator.set_forward(way)
    checking.emulator.set_device(**device)
    checking.emulator.set_seed(seed)
    checking._seeds = itertools.count(seed)
    return function()


@pytest.fixture(scope="module")
def expected(emulator):
    return [result(call, 0) for call in CALLS]


def differs(call, truth, seed):
    """Whether the call goes wrong under the schedules of this seed."""
    try:
        got = result(call, seed)
    except RuntimeError as error:
        assert "emulator" in str(error), error
        return True
    return any(not torch.equal(got[name], value) for name, value in truth.items())


SEEDS = range(6)


def test_nothing_is_left_out_and_all_is_well(expected):
    for call, truth in zip(CALLS, expected):
        for seed in SEEDS:
            assert not differs(call, truth, seed), (call, seed)


def test_every_wait_has_been_reached(expected):
    assert len(written_sites()) > 15
    assert set(written_sites()) <= set(checking.emulator.sites())


@pytest.mark.parametrize("site", written_sites())
def test_without(site, expected):
    emulator = checking.emulator
    emulator.skip(emulator.sites().index(site))
    try:
        for seed in SEEDS:
            for call, truth in zip(CALLS, expected):
                if differs(call, truth, seed):
                    return
    finally:
        emulator.skip(-1)
    pytest.fail(f"{site} makes no difference")


def test_a_different_result_is_a_difference(expected):
    """The comparison itself: other data, other bits."""
    truth = {name: value + 1 for name, value in expected[0].items()}
    assert differs(CALLS[0], truth, 0)


def test_a_block_without_room_is_refused():
    checking.emulator.set_device(90, 4, 500)
    case = Case((1, 4, 5, 4), 8)
    with pytest.raises(RuntimeError, match="do not fit into shared memory"):
        on_cuda(case, data(case))
