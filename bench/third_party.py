"""Importing torchvision, which timm and ultralytics need, beside a torch built for CPUs only."""

import sys

import torch

_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")


def import_torchvision():
    """torchvision for CUDA beside a torch without it: its operators' schemas are missing, nothing else."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            _SCHEMAS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
