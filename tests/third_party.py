"""timm and ultralytics as they are on PyPI, with Coordinate Attention in their networks as their users put it
there.
"""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from paper import PaperCoordAtt
from torch import nn

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


import_torchvision()
# ultralytics writes its settings when it is imported, would install what it misses, sets variables that child
# processes inherit, and replaces torch.save.
_SETTINGS, _ENVIRONMENT, _SAVE = tempfile.TemporaryDirectory(), dict(os.environ), torch.save
os.environ |= {"YOLO_CONFIG_DIR": _SETTINGS.name, "YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}

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

__all__ = ["NETWORKS", "VERSIONS", "ModelEMA", "Network", "timm", "timm_attention", "yolo_save"]
VERSIONS = {name: version(name) for name in ("timm", "ultralytics")}


class CoordAtt(PaperCoordAtt):
    """The block as users of ultralytics add it: a class of their own beside the model."""


tasks.CoordAtt = CoordAtt  # where the yaml's names are looked up


def yolov8n():
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


class Network:
    """A real network, what accelerate should find in it, and one step's loss as its users train it."""

    classes = 5

    def __init__(self, make, paths, cls, differs):
        self.make, self.paths, self.cls, self.differs = make, paths, cls, differs

    def build(self, dtype=torch.float32):
        """The network, seeded, with normalisations that are not at their start."""
        torch.manual_seed(0)
        model = self.make()
        g = torch.Generator().manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Some start at a weight of zero, which hides whatever is before them.
                for tensor, mean in ((module.weight, 1.0), (module.bias, 0.0), (module.running_mean, 0.0)):
                    tensor.data.copy_(mean + 0.1 * torch.randn(tensor.shape, generator=g))
                module.running_var.copy_(0.8 + 0.4 * torch.rand(module.running_var.shape, generator=g))
        return model.to(dtype)

    def batch(self, dtype, seed=2):
        """Images of 64 x 96 and their labels."""
        g = torch.Generator().manual_seed(seed)
        return {
            "img": torch.rand(2, 3, 64, 96, generator=g).to(dtype),
            "label": torch.tensor([1, 4]),
        }

    def outputs(self, model, images):
        """Every tensor that the network gives, by name."""
        return {"output": model(images)}

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch["img"]), batch["label"])


class Detector(Network):
    def batch(self, dtype, seed=2):
        images = super().batch(dtype, seed)["img"]
        boxes = [[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.5], [0.6, 0.4, 0.5, 0.5]]
        return {
            "img": images,
            "cls": torch.tensor([[0.0], [1.0], [2.0]]),
            "bboxes": torch.tensor(boxes),
            "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        }

    def outputs(self, model, images):
        found = model(images)
        raw = found if isinstance(found, dict) else found[1]
        tensors = {name: value for name, value in raw.items() if torch.is_tensor(value)}
        return tensors if isinstance(found, dict) else tensors | {"decoded": found[0]}

    def loss(self, model, batch):
        loss, _ = model(batch)
        return loss.sum()


def _efficientnet_paths():
    depths = (1, 2, 2, 3, 3, 4, 1)
    return [f"blocks.{i}.{j}.se" for i, depth in enumerate(depths) for j in range(depth)]


def _resnet_paths():
    return [f"layer{i + 1}.{j}.se" for i, depth in enumerate((3, 4, 6, 3)) for j in range(depth)]


NETWORKS = {
    "timm efficientnet_b0": Network(
        lambda: timm.create_model("efficientnet_b0", se_layer="coord", num_classes=Network.classes),
        _efficientnet_paths(),
        "CoordAttn",
        "silu, no bias",
    ),
    "timm resnet50": Network(
        lambda: timm.create_model("resnet50", block_args={"attn_layer": "coord"}, num_classes=Network.classes),
        _resnet_paths(),
        "CoordAttn",
        "no bias",
    ),
    "ultralytics yolov8n": Detector(
        yolov8n, ["model.9.1", "model.22", "model.23", "model.24"], "CoordAtt", ""
    ),
}
