"""Real networks of timm and ultralytics as the tests use them: what should be found in them, what to feed them, and
the loss that they are trained with.
"""

import sys
from pathlib import Path

import seeds
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.third_party import (
    CoordAtt,
    ModelEMA,
    timm,
    timm_attention,
    timm_network,
    yolo_save,
    yolov8n,
)

__all__ = ["NETWORKS", "ModelEMA", "Network", "timm", "timm_attention", "yolo_save"]


def plain_block():
    """The block as users of ultralytics add it, known to its yamls by its name."""
    return CoordAtt


class Network:
    """A real network, what accelerate should find in it, and one step's loss as its users train it."""

    classes = 5

    def __init__(self, make, paths, cls, differs, takes_in=None):
        self.make, self.paths, self.cls, self.differs = make, paths, cls, differs
        # Of each block: its path, the normalisation before it, the activation between.
        self.neighbours = [(path, *takes_in(path)) for path in paths] if takes_in else []

    @property
    def changed(self):
        """The paths of all modules whose class changes: the blocks, and what holds them and is read."""
        if not self.neighbours:
            return self.paths
        return [changed for path in self.paths for changed in (path.rpartition(".")[0], path)]

    def build(self, dtype=torch.float32):
        """The network, seeded, with normalisations that are not at their start."""
        seeds.seed(0)
        model = self.make()
        g = seeds.generator(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Some start at a weight of zero, which hides whatever is before them.
                for tensor, mean in ((module.weight, 1.0), (module.bias, 0.0), (module.running_mean, 0.0)):
                    tensor.data.copy_(mean + 0.1 * torch.randn(tensor.shape, generator=g))
                module.running_var.copy_(0.8 + 0.4 * torch.rand(module.running_var.shape, generator=g))
        return model.to(dtype)

    def batch(self, dtype=torch.float32, seed=2):
        """Images of 64 x 96 and their labels."""
        g = seeds.generator(seed)
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
    def batch(self, dtype=torch.float32, seed=2):
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


def _in_efficientnet(path):
    around = path.rpartition(".")[0]
    return f"{around}.{'bn1' if around == 'blocks.0.0' else 'bn2'}", "SiLU"


def _in_resnet(path):
    return f"{path.rpartition('.')[0]}.bn3", ""


NETWORKS = {
    "timm efficientnet_b0": Network(
        lambda: timm_network("efficientnet_b0", Network.classes),
        _efficientnet_paths(),
        "CoordAttn",
        "silu, no bias",
        _in_efficientnet,
    ),
    "timm resnet50": Network(
        lambda: timm_network("resnet50", Network.classes),
        _resnet_paths(),
        "CoordAttn",
        "no bias",
        _in_resnet,
    ),
    "ultralytics yolov8n": Detector(
        yolov8n, ["model.9.1", "model.22", "model.23", "model.24"], "CoordAtt", ""
    ),
}
