"""Every public name as a typed user's code has it. Checked by mypy (make lint), never run."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import coordatt_fast
from coordatt_fast import (
    CoordAtt,
    Report,
    accelerate,
    backends,
    checkpoints,
    coord_att,
    explain,
    restore,
    use_backend,
)
from coordatt_fast.backends import Backend
from coordatt_fast.explanation import Passes, Plan
from coordatt_fast.models import mobilenet_v2_ca


def module(x: Tensor) -> None:
    block = CoordAtt(
        16, 16, reduction=8, activation="silu", bias=False, skip=True, mid_channels=4, inplace=True
    )
    block = CoordAtt(16, 16, device="cpu", dtype=torch.float64)
    assert_type(block.forward(x), Tensor)
    assert_type(block.conv1, nn.Conv2d)


def function(x: Tensor, w: Tensor, b: Tensor | None) -> None:
    out = coord_att(
        x, w, b, b, b, b, b, w, b, w, b, training=True, momentum=None, eps=1e-5, activation="relu"
    )
    assert_type(out, Tensor)
    assert_type(coord_att(x, w, b, b, b, b, b, w, b, w, b, num_batches_tracked=b, skip=True, out=x), Tensor)


def models(model: nn.Module) -> None:
    report = accelerate(model)
    assert_type(report, Report)
    assert_type(report.replaced[0].tier, str)
    assert_type(restore(model), list[str])
    assert_type(checkpoints.to_released(model.state_dict()), dict[str, Tensor])
    mobilenet_v2_ca()


def plans(module: nn.Module, x: Tensor) -> None:
    plan = explain(module, x)
    assert_type(plan, Plan)
    assert_type(plan.tier, str)
    assert_type(plan.bytes, int)
    assert_type(plan.passes, dict[str, Passes])


def choices() -> None:
    assert_type(backends(), dict[str, Backend])
    assert_type(backends()["cpu"].reason, str)
    with use_backend("cpu"):
        pass
    assert_type(coordatt_fast.__version__, str)
