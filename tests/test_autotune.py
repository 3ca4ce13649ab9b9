"""COORDATT_FAST_AUTOTUNE with a scripted timer: what is chosen, what is kept, when nothing is timed."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from coordatt_fast.kernels import autotune, entries, launch, tables

GPU = torch.device("cuda", 0)
SHAPE = (4, 96, 14, 14)
WHAT = (SHAPE, 8, torch.float32, GPU, False)
CANDIDATES = tables.candidates(*SHAPE[1:], 8, 4, False)


class Timer:
    """In place of autotune.time_of; fastest: the bc that it favours."""

    def __init__(self, fastest):
        self.fastest, self.timed = fastest, []

    def __call__(self, bc, *what):
        self.timed.append(bc)
        return 1.0 if bc == self.fastest else 2.0


@pytest.fixture
def timer(monkeypatch, tmp_path):
    made = Timer(CANDIDATES[-1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "time_of", made)
    monkeypatch.setattr(autotune, "_found", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


@pytest.fixture
def file(tmp_path):
    return tmp_path / "coordatt_fast/autotune.json"


def test_the_fastest_is_timed_once(timer):
    assert len(CANDIDATES) > 1 and CANDIDATES[0] == tables.sizes(*SHAPE[1:], 8, 4, False).BC
    for batch in (4, 4, 32):
        assert autotune.block((batch, *SHAPE[1:]), *WHAT[1:]) == timer.fastest
    assert timer.timed == list(CANDIDATES)
    autotune.block(*WHAT[:4], True)
    assert len(timer.timed) > len(CANDIDATES)


def test_kept_on_disk(timer, file):
    autotune.block(*WHAT)
    autotune.block(SHAPE, 16, *WHAT[2:])
    kept = json.loads(file.read_text())
    assert len(kept) == 2 and all("Some GPU" in key and "triton" in key for key in kept)
    assert os.listdir(file.parent) == [file.name]
    autotune._found.clear()
    timer.timed.clear()
    assert autotune.block(*WHAT) == timer.fastest and timer.timed == []


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff", "impossible"])
def test_a_corrupt_file_is_ignored(text, timer, file):
    file.parent.mkdir()
    if text == "impossible":
        autotune.block(*WHAT)
        text = json.dumps(dict.fromkeys(json.loads(file.read_text()), "12"))
        autotune._found.clear()
    file.write_bytes(text.encode("latin-1"))
    assert autotune.block(*WHAT) == timer.fastest
    assert list(json.loads(file.read_text()).values()) == [timer.fastest]


def test_no_place_for_a_file(timer, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert autotune.block(*WHAT) == timer.fastest


def test_nothing_is_timed_while_a_graph_is_captured(timer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert autotune.block(*WHAT) == 0 and timer.timed == []
    assert autotune.block(*WHAT) == timer.fastest


def test_nothing_is_timed_on_other_devices(timer):
    for device in ("cpu", "meta"):
        assert autotune.block(SHAPE, 8, torch.float32, torch.device(device), False) == 0
    assert timer.timed == []


def test_the_table_stands_where_nothing_fits(timer, file, monkeypatch):
    monkeypatch.setattr(autotune, "time_of", lambda *what: math.inf)
    assert autotune.block(*WHAT) == CANDIDATES[0] and not file.exists()


def test_what_is_timed_uses_the_candidate(monkeypatch):
    """Recorded, not run: inference, training forward and backward with blocks of the candidate's size."""
    monkeypatch.setattr(autotune, "ON", True)
    monkeypatch.setattr(launch, "_constants_of", autotune.chosen(launch._constants_of))
    before, launches = torch.get_rng_state(), {}
    for bc in CANDIDATES:
        with entries.record(launches.setdefault(bc, [])):
            monkeypatch.setattr(autotune._trial, "bc", bc, raising=False)
            autotune.step_of(SHAPE, 8, torch.float32, torch.device("meta"), False)()
    for bc, found in launches.items():
        assert len(found) == 9
        assert found[0].arguments["BC"] == bc and found[0].programs == 4 * math.ceil(96 / bc)
    assert torch.equal(before, torch.get_rng_state())


PROGRAM = """
from coordatt_fast.kernels import autotune, launch
print(autotune.ON, hasattr(launch._constants_of, "cache_info"))
"""


@pytest.mark.parametrize(
    "settings, on",
    [({}, False), ({"COORDATT_FAST_AUTOTUNE": "0"}, False), ({"COORDATT_FAST_AUTOTUNE": "1"}, True),
     ({"COORDATT_FAST_AUTOTUNE": "always"}, False),
     ({"COORDATT_FAST_AUTOTUNE": "1", "TRITON_INTERPRET": "1"}, False)],
)  # fmt: skip
def test_off_by_default_and_in_the_interpreter(settings, on):
    env = {k: v for k, v in os.environ.items() if k not in ("COORDATT_FAST_AUTOTUNE", "TRITON_INTERPRET")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env | settings, capture_output=True, text=True
    )
    assert result.stdout.split() == [str(on), str(not on)], result.stderr
    warned = "COORDATT_FAST_AUTOTUNE=always has no effect: expected 0 or 1" in result.stderr
    assert warned == ("always" in settings.values())
