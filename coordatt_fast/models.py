"""The networks that Coordinate Attention was published in: MobileNetV2, MobileNeXt and EfficientNet-b0.

Hou, Zhou, Feng, "Coordinate Attention for Efficient Mobile Network Design" (CVPR 2021, arXiv 2103.02907),
section 4. Each takes x [N, 3, H, W] of floating dtype to logits [N, num_classes], whatever H and W. The block
is CoordAtt, or what `attention` builds for its places. Only MobileNetV2's code and weights were released.
"""

import functools
import math
from collections.abc import Callable

from torch import Tensor, nn

from coordatt_fast.module import CoordAtt

MakeAttention = Callable[[int], nn.Module]

# Expansion, channels, blocks, stride of the first block; EfficientNet's have the kernel's size too.
MOBILENET_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_EFFICIENTNET_B0 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
# Here the first number is the factor by which a block is narrower inside.
_MOBILENEXT = (
    (2, 96, 1, 2),
    (6, 144, 1, 1),
    (6, 192, 3, 2),
    (6, 288, 3, 2),
    (6, 384, 4, 1),
    (6, 576, 4, 2),
    (6, 960, 3, 1),
    (6, 1280, 1, 1),
)


def coordinate_attention(channels: int, reduction: int = 32) -> nn.Module:
    """The block of these networks: CoordAtt over [N, channels, H, W], squeezed to max(8, channels //
    reduction)."""
    return CoordAtt(channels, channels, reduction=reduction)


def mobilenet_v2_ca(
    num_classes: int = 1000,
    width_mult: float = 1.0,
    reduction: int = 32,
    *,
    attention: MakeAttention | None = coordinate_attention,
    dropout: float = 0.1,
) -> nn.Module:
    """MobileNetV2 with Coordinate Attention after the depthwise convolution of the 16 blocks that expand.

    The authors' released network (section 4.1, figure 3a), with its names, so that checkpoints.load reads its
    checkpoint; x [N, 3, H, W] to [N, num_classes]. 3,950,648 parameters at width 1.0 (published: 3.95 M).

    width_mult: multiplies all channels, rounded to multiples of 8; the last convolution never has fewer than
    1280. reduction: of the block; ignored where attention is given. attention: called with the number of
    channels, it returns the module for one place, [N, C, H, W] to the same; None leaves the places out.
    dropout: before the classifier. ValueError for a width_mult that is not positive.
    """
    make = _maker(attention, reduction)
    width = functools.partial(_width, width_mult, divisor=4 if width_mult == 0.1 else 8)
    channels = width(32)
    features: list[nn.Module] = [nn.Sequential(*_conv(3, channels, 3, 2, act=nn.ReLU6))]
    for expansion, out, repeats, first_stride in MOBILENET_V2_STAGES:
        for stride in (first_stride, *[1] * (repeats - 1)):
            inside = None if expansion == 1 else make
            features.append(_inverted(channels, expansion, width(out), 3, stride, nn.ReLU6, inside))
            channels = width(out)
    last = width(1280) if width_mult > 1 else 1280
    head = nn.Sequential(*_conv(channels, last, 1, act=nn.ReLU6))
    return _Network(features, head, last, num_classes, dropout)


def mobilenext_ca(
    num_classes: int = 1000,
    width_mult: float = 1.0,
    reduction: int = 32,
    *,
    after: str = "second",
    attention: MakeAttention | None = coordinate_attention,
    dropout: float = 0.1,
) -> nn.Module:
    """MobileNeXt (Zhou et al., ECCV 2020) with Coordinate Attention in its sandglass blocks (figure 3b).

    x [N, 3, H, W] to [N, num_classes]. Neither code nor weights of this network with the block were released.
    after: which depthwise convolution of a block the attention follows. After the "second", which 18 of the
    20 blocks have, the network has 4,088,113 parameters at width 1.0, the published 4.09 M. After the "first"
    (15 blocks), which the authors' repository recommends, it has 3,971,626.

    The other arguments are mobilenet_v2_ca's. ValueError for another value of after.
    """
    if after not in ("first", "second"):
        raise ValueError(f"after is {after!r}, expected 'first' or 'second'")
    make = _maker(attention, reduction)
    first, second = (make, None) if after == "first" else (None, make)
    width = functools.partial(_width, width_mult)
    channels = width(32)
    features: list[nn.Module] = [nn.Sequential(*_conv(3, channels, 3, 2, act=nn.ReLU6))]
    for narrowing, published, repeats, first_stride in _MOBILENEXT:
        out = 1280 if published == 1280 and width_mult < 1 else width(published)
        for stride in (first_stride, *[1] * (repeats - 1)):
            # A block that only changes the channels does without depthwise convolutions, except alone.
            alone = repeats == 1 and stride == 1
            leads = narrowing == 2 or alone or channels == out
            features.append(_sandglass(channels, narrowing, out, stride, leads, first, second))
            channels = out
    return _Network(features, None, channels, num_classes, dropout)


def efficientnet_b0_ca(
    num_classes: int = 1000,
    width_mult: float = 1.0,
    reduction: int = 32,
    *,
    attention: MakeAttention | None = coordinate_attention,
    dropout: float = 0.2,
) -> nn.Module:
    """EfficientNet-b0 (Tan and Le, ICML 2019) with Coordinate Attention where it has squeeze-and-excitation.

    Section 4.2, table 5. x [N, 3, H, W] to [N, num_classes]; all 16 blocks have attention, after their
    depthwise convolution. 5,381,804 parameters at width 1.0 (published: 5.4 M). Without stochastic depth,
    which is a matter of training. The arguments are mobilenet_v2_ca's.
    """
    make = _maker(attention, reduction)
    width = functools.partial(_width, width_mult)
    channels = width(32)
    features: list[nn.Module] = [nn.Sequential(*_conv(3, channels, 3, 2, act=nn.SiLU))]
    for expansion, out, repeats, first_stride, kernel in _EFFICIENTNET_B0:
        for stride in (first_stride, *[1] * (repeats - 1)):
            features.append(_inverted(channels, expansion, width(out), kernel, stride, nn.SiLU, make))
            channels = width(out)
    head = nn.Sequential(*_conv(channels, width(1280), 1, act=nn.SiLU))
    return _Network(features, head, width(1280), num_classes, dropout)


def _maker(attention: MakeAttention | None, reduction: int) -> MakeAttention | None:
    if attention is coordinate_attention:
        return functools.partial(coordinate_attention, reduction=reduction)
    return attention


def _width(width_mult: float, channels: int, divisor: int = 8) -> int:
    if not width_mult > 0:
        raise ValueError(f"width_mult is {width_mult}, expected more than 0")
    return divisible(channels * width_mult, divisor)


def divisible(value: float, divisor: int = 8) -> int:
    """value rounded to a multiple of divisor, never more than 10% down: the MobileNet papers' widths."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def _conv(inp, out, kernel, stride=1, groups=1, act: type[nn.Module] | None = None) -> list[nn.Module]:
    """Convolution without bias, normalisation, activation."""
    conv = nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out), *([] if act is None else [act(inplace=True)])]


def _attention(make: MakeAttention | None, channels: int) -> list[nn.Module]:
    return [] if make is None else [make(channels)]


def _inverted(inp, expansion, out, kernel, stride, act, make) -> nn.Module:
    """Expand, depthwise, attention, project (Sandler et al., CVPR 2018)."""
    inner = round(inp * expansion)
    layers = [] if expansion == 1 else _conv(inp, inner, 1, act=act)
    layers += _conv(inner, inner, kernel, stride, groups=inner, act=act)
    layers += [*_attention(make, inner), *_conv(inner, out, 1)]
    return _Block(layers, residual=stride == 1 and inp == out)


def _sandglass(inp, narrowing, out, stride, leads, first, second) -> nn.Module:
    """Depthwise, narrow, widen, depthwise; the first only where leads, the second there and where stride is
    2."""
    inner = inp // narrowing
    if inner < out / 6:
        inner = divisible(math.ceil(out / 6), 16)
    layers = []
    if leads:
        layers += [*_conv(inp, inp, 3, groups=inp, act=nn.ReLU6), *_attention(first, inp)]
    layers += [*_conv(inp, inner, 1), *_conv(inner, out, 1, act=nn.ReLU6)]
    if leads or stride == 2:
        layers += [*_conv(out, out, 3, stride, groups=out), *_attention(second, out)]
    return _Block(layers, residual=stride == 1 and inp == out)


class _Block(nn.Module):
    def __init__(self, layers: list[nn.Module], residual: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.residual else y


class _Network(nn.Module):
    """features, the last convolution (named conv in the released checkpoint), mean over the map,
    classifier."""

    def __init__(self, features, head: nn.Module | None, channels, num_classes, dropout) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.conv = head
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.conv is not None:
            x = self.conv(x)
        return self.classifier(x.mean((2, 3)))


def _initialise(module: nn.Module) -> None:
    """As the authors' released network does, the attention's convolutions included."""
    if isinstance(module, nn.Conv2d):
        fan = math.prod(module.kernel_size) * module.out_channels
        nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan))
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
