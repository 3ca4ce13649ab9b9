"""Coordinate Attention in ultralytics' YOLO models: a name for their yamls, and acceleration that lasts.

    import coordatt_fast.ultralytics
    from ultralytics import YOLO

    coordatt_fast.ultralytics.register()
    yolo = YOLO("yolov8n-coordatt.yaml")  # with lines such as  - [-1, 1, CoordAtt, [c2, c2]]

    yolo = YOLO("best.pt")  # a model with a CoordAtt of your own
    print(coordatt_fast.ultralytics.accelerate(yolo))
    yolo.train(data="data.yaml")  # the network that this builds is accelerated too

ultralytics is imported when they are called. In a yaml, c2 stands for the channels of the layer above.
"""

import warnings

import torch
from torch import nn

from coordatt_fast.accelerate import Report, restore
from coordatt_fast.accelerate import accelerate as _accelerate
from coordatt_fast.module import CoordAtt

# When ultralytics has built and copied the network that it will train; when it has fused one to predict.
_EVENTS = ("on_pretrain_routine_end", "on_predict_start")


def register(name: str = "CoordAtt") -> None:
    """Makes coordatt_fast.CoordAtt the layer of that name in ultralytics' model yamls, for this process.

    Its arguments there are CoordAtt's: [c2, c2] or [c2, c2, 16]. Checkpoints that hold it also load where
    ultralytics admits known classes alone. ImportError without ultralytics; ValueError for a name that
    ultralytics uses for a layer of its own.
    """
    from ultralytics.nn import tasks

    present = getattr(tasks, name, CoordAtt)
    if getattr(present, "__module__", "").partition(".")[0] == "ultralytics":
        raise ValueError(f"name is {name!r}, which is a layer of ultralytics: choose another")
    setattr(tasks, name, CoordAtt)
    torch.serialization.add_safe_globals([CoordAtt])


def accelerate(yolo) -> Report:
    """accelerate() for an ultralytics model, lasting: also for what it builds to train or fuses to predict.

    yolo: a YOLO (RTDETR, ...) with a PyTorch network. TypeError for anything else. This works by callbacks of
    that object: training on several GPUs, for which ultralytics starts processes, runs the original blocks.
    """
    if not isinstance(getattr(yolo, "model", None), nn.Module) or not hasattr(yolo, "add_callback"):
        kind = type(yolo).__name__
        raise TypeError(f"accelerate takes an ultralytics model with a PyTorch network, got a {kind}")
    report = _accelerate(yolo.model)
    for event in _EVENTS:
        if _again not in yolo.callbacks.get(event, ()):
            yolo.add_callback(event, _again)
    return report


def _again(owner) -> None:
    """A trainer's network and its running average, or a predictor's, which fuse() may have changed."""
    average = getattr(getattr(owner, "ema", None), "ema", None)
    network = getattr(owner.model, "model", owner.model)  # a predictor's is inside a backend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is nothing was said before
        for model in (network, average):
            if isinstance(model, nn.Module):
                restore(model)
                _accelerate(model)
