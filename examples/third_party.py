"""timm and ultralytics as they are on PyPI, with Coordinate Attention in their networks as their users put it
there.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from bench.attention import PlainCoordAtt
from bench.third_party import import_torchvision

import_torchvision()
# ultralytics writes its settings when it is imported, would install what it misses, sets variables that child
# processes inherit, and replaces torch.save.
_SETTINGS, _ENVIRONMENT, _SAVE = tempfile.TemporaryDirectory(), dict(os.environ), torch.save
os.environ |= {"YOLO_CONFIG_DIR": _SETTINGS.name, "YOLO_VERBOSE": "false"}
os.environ |= {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}

import timm  # noqa: E402
import timm.layers.coord_attn as timm_attention  # noqa: E402
import timm.utils  # noqa: E402
import ultralytics  # noqa: E402
import yaml  # noqa: E402
from ultralytics.cfg import get_cfg  # noqa: E402
from ultralytics.nn import tasks  # noqa: E402
from ultralytics.utils.torch_utils import ModelEMA  # noqa: E402

yolo_save, torch.save = torch.save, _SAVE
os.environ.clear()
os.environ.update(_ENVIRONMENT)

__all__ = ["ModelEMA", "timm", "timm_attention", "timm_network", "yolo_save", "yolov8n"]


class CoordAtt(PlainCoordAtt):
    """The block as users of ultralytics add it: a class of their own beside the model."""


tasks.CoordAtt = CoordAtt  # where the yaml's names are looked up


def timm_network(name: str, classes: int = 1000) -> nn.Module:
    """timm's network of that name with its own CoordAttn in every block; random weights."""
    options = {"se_layer": "coord"}
    if name.startswith("resnet"):
        # Its residual branches would start with weights of zero, where no block matters.
        options = {"block_args": {"attn_layer": "coord"}, "zero_init_last": False}
    return timm.create_model(name, num_classes=classes, **options)


def yolov8n() -> nn.Module:
    """YOLOv8n for 3 classes with the block before each detection head (by yaml) and after SPPF (by hand)."""
    folder = Path(ultralytics.__file__).parent
    spec = yaml.safe_load((folder / "cfg/models/v8/yolov8.yaml").read_text())
    *neck, _ = spec["head"]
    heads = [[level, 1, "CoordAtt", [c, c]] for level, c in ((15, 64), (18, 128), (21, 256))]
    spec |= {"scale": "n", "nc": 3, "head": [*neck, *heads, [[22, 23, 24], 1, "Detect", ["nc"]]]}
    model = tasks.DetectionModel(spec, ch=3, verbose=False)
    model.args = get_cfg()  # the trainer's: what its loss reads
    pool = model.model[9]
    after = nn.Sequential(pool, CoordAtt(256, 256))
    after.f, after.i, after.type = pool.f, pool.i, pool.type
    model.model[9] = after
    return model
