"""What of ours takes part in the GPU benchmark: both backends, the CUDA one in each of its ways forward."""

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import coordatt_fast
from bench.cases import Case

INFERENCE = ("chain", "cluster:1", "cluster:2", "cluster:4", "cluster:8", "cluster:16")
TRAINING = ("chain", "resident")


@dataclass(frozen=True)
class Ours:
    """A backend, and for the CUDA one the way forward that is forced."""

    backend: str
    way: str = ""

    @property
    def name(self) -> str:
        return f"{self.backend} {self.way}".strip()


def operators():
    return torch.ops.coordatt_fast


def set_way(way: str) -> None:
    operators().set_cuda_forward(way)


@contextlib.contextmanager
def forced(way: str) -> Iterator[None]:
    set_way(way)
    try:
        yield
    finally:
        set_way("")


def outline(x: Tensor, training: bool) -> dict:
    """How a call on x goes forward under the way that is forced now."""
    mid = coordatt_fast.CoordAtt(x.shape[1], x.shape[1], device="meta").conv1.out_channels
    return json.loads(operators().cuda_forward_outline(x, mid, training))


@contextlib.contextmanager
def chosen(ours: Ours, around: Callable = nullcontext) -> Iterator[None]:
    """Calls within go to that backend, by that way, in the grad mode of around."""
    way = forced(ours.way) if ours.way else nullcontext()
    with way, coordatt_fast.use_backend(ours.backend), around():
        yield


def backends(device: str) -> dict[str, str]:
    """The backends to measure, and why each cannot be; an empty reason: it can.

    By name, so that none falls back unseen.
    """
    if not device.startswith("cuda"):
        return {"auto": ""}
    found = coordatt_fast.backends()
    return {name: "" if found[name].available else found[name].reason for name in ("cuda", "triton")}


def contestants(case: Case, x: Tensor, triton: bool = True) -> tuple[list[Ours], dict[str, dict], str]:
    """Ours for a case on x, the outlines of the CUDA backend's ways by name, and the way it would estimate.

    A way without room for the map is left out; so is Triton, whose kernels compile for seconds, if told to.
    """
    training = case.mode == "train"
    found, outlines, estimated = [], {}, ""
    for name, why in backends(case.device).items():
        if why or (name == "triton" and not triton):
            continue
        if name != "cuda":
            found.append(Ours(name))
            continue
        for way in TRAINING if training else INFERENCE:
            with forced(way):
                described = outline(x, training)
            if described["way"] == way:
                found.append(Ours(name, way))
                outlines[found[-1].name] = described
        with forced("any"):
            estimated = outline(x, training)["way"]
    return found, outlines, estimated
