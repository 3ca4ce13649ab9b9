"""Where CoordAtt sits in known networks: the shape of every instance, one image at a time.

A network is a list of ``Instance(channels, height, width)`` in network order, repeats included. ``distinct``
folds repeats into counts, which is what the benchmark measures.
"""

from collections import Counter
from dataclasses import dataclass


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


# MobileNetV2 (Sandler et al., CVPR 2018, table 2): expansion t, channels c, blocks n, stride of the first
# block s.
MOBILENETV2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round to a multiple of ``divisor``, never more than 10% down (the MobileNet papers' rule)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def mobilenetv2_blocks(width_mult: float = 1.0, output_stride: int = 32) -> list[tuple[int, int, int, int]]:
    """The 17 inverted residuals as ``(channels in, expanded channels, channels out, stride)``.

    ``output_stride`` 16 or 8 replaces the last one or two strides by dilation, as DeepLabV3 does.
    """
    blocks, reached, inp = [], 2, make_divisible(32 * width_mult)
    for expansion, channels, repeats, first_stride in MOBILENETV2_STAGES:
        out = make_divisible(channels * width_mult)
        for index in range(repeats):
            stride = first_stride if index == 0 and reached * first_stride <= output_stride else 1
            reached *= stride
            blocks.append((inp, round(inp * expansion), out, stride))
            inp = out
    return blocks


def mobilenetv2(
    width_mult: float = 1.0, height: int = 224, width: int = 224, output_stride: int = 32
) -> list[Instance]:
    """CoordAtt after the depthwise convolution of every block that expands (16 of 17), as the authors'
    mbv2_ca."""
    height, width = (height + 1) // 2, (width + 1) // 2
    found = []
    for inp, expanded, _, stride in mobilenetv2_blocks(width_mult, output_stride):
        height, width = (height + stride - 1) // stride, (width + stride - 1) // stride
        if expanded != inp:
            found.append(Instance(expanded, height, width))
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
