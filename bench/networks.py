"""Where CoordAtt sits in known networks: the shape of every instance, one image at a time.

A network is a list of ``Instance(channels, height, width)`` in network order, repeats included. ``distinct``
folds repeats into counts, which is what the benchmark measures.
"""

from collections import Counter
from dataclasses import dataclass

from coordatt_fast.models import MOBILENET_V2_STAGES, divisible


@dataclass(frozen=True, order=True)
class Instance:
    """The feature map one CoordAtt block receives, without the batch dimension."""

    channels: int
    height: int
    width: int

    @property
    def size(self) -> int:
        """Elements per image."""
        return self.channels * self.height * self.width


def mobilenetv2(
    width_mult: float = 1.0, height: int = 224, width: int = 224, output_stride: int = 32
) -> list[Instance]:
    """CoordAtt after the depthwise convolution of the 16 of 17 blocks that expand, as the authors' mbv2_ca.

    ``output_stride`` 16 or 8 replaces the last one or two strides by dilation, as DeepLabV3 does.
    """
    found, reached, channels = [], 2, divisible(32 * width_mult)
    height, width = (height + 1) // 2, (width + 1) // 2
    for expansion, out, repeats, first_stride in MOBILENET_V2_STAGES:
        for index in range(repeats):
            stride = first_stride if index == 0 and reached * first_stride <= output_stride else 1
            reached *= stride
            height, width = (height + stride - 1) // stride, (width + stride - 1) // stride
            if expansion > 1:
                found.append(Instance(channels * expansion, height, width))
            channels = divisible(out * width_mult)
    return found


def listed(text: str) -> list[Instance]:
    """Read ``"96x56 192x28*2"``: channels x side of a square map, ``*`` repeats."""
    found = []
    for word in text.split():
        shape, _, repeats = word.partition("*")
        channels, side = (int(part) for part in shape.split("x"))
        found += [Instance(channels, side, side)] * int(repeats or 1)
    return found


NETWORKS: dict[str, list[Instance]] = {
    "mobilenetv2": mobilenetv2(),
    "mobilenetv2_0.75": mobilenetv2(0.75),
    "mobilenetv2_0.5": mobilenetv2(0.5),
    # After a sandglass block's second depthwise convolution (as the published count of parameters), and after
    # its first (as the authors advise), input 224.
    "mobilenext": listed("96x56 144x56 192x28*3 288x14*3 384x14*3 576x7*4 960x7*2 1280x7"),
    "mobilenext_first": listed("32x112 96x56 192x28*2 288x14*2 384x14*3 576x7*3 960x7*3"),
    # In place of SE, input 224.
    "efficientnet_b0": listed("32x112 96x56 144x56 144x28 240x28 240x14 480x14*3 672x14*2 672x7 1152x7*4"),
    # On each block's output, input 224.
    "resnet50": listed("256x56*3 512x28*4 1024x14*6 2048x7*3"),
    # After the backbone's C3 stages, input 640.
    "yolov5s": listed("128x80 256x40 512x20"),
    # Before each detection head, input 640.
    "yolov8n": listed("64x80 128x40 256x20"),
    # In the backbone and again in the neck, input 640.
    "yolox_s": listed("64x80 128x40 256x20") * 2,
    "memseg": listed("128x64 256x32 512x16"),
    "ssdlite": mobilenetv2(height=320, width=320),
    "deeplabv3_512": mobilenetv2(height=512, width=512, output_stride=16),
    "deeplabv3_512_os8": mobilenetv2(height=512, width=512, output_stride=8),
    "deeplabv3": mobilenetv2(height=512, width=1024, output_stride=16),
    "deeplabv3_os8": mobilenetv2(height=512, width=1024, output_stride=8),
}


def distinct(instances: list[Instance]) -> dict[Instance, int]:
    """Each shape once, in network order, with how often it occurs."""
    return dict(Counter(instances))


def find(name: str) -> list[Instance]:
    """The instances of a network; ``all`` gives every network's together.

    Raises ``ValueError`` naming the known networks.
    """
    if name == "all":
        return [instance for instances in NETWORKS.values() for instance in instances]
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}, all")
    return NETWORKS[name]
