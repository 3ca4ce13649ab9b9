"""A compact MobileNetV2 with a pluggable attention block, for measuring what attention costs in a whole
network."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.networks import make_divisible, mobilenetv2_blocks

MakeAttention = Callable[[int], nn.Module]


def conv_bn(
    inp: int, out: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> list[nn.Module]:
    conv = nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out)] + ([nn.ReLU6(inplace=True)] if relu else [])


class InvertedResidual(nn.Module):
    """Expand, depthwise, attention, project (Sandler et al., CVPR 2018).

    Attention follows the depthwise convolution in blocks that expand, as in the CoordAtt authors' mbv2_ca.
    """

    def __init__(
        self, inp: int, expanded: int, out: int, stride: int, attention: MakeAttention | None
    ) -> None:
        super().__init__()
        expands = expanded != inp
        self.expand = nn.Sequential(*conv_bn(inp, expanded, 1)) if expands else nn.Identity()
        self.depthwise = nn.Sequential(*conv_bn(expanded, expanded, 3, stride, groups=expanded))
        self.attention = attention(expanded) if attention and expands else nn.Identity()
        self.project = nn.Sequential(*conv_bn(expanded, out, 1, relu=False))
        self.residual = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.attention(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """``[N, 3, H, W]`` to ``[N, classes]``. ``attention(channels)`` builds the block; ``None`` leaves it
    out."""

    def __init__(
        self, attention: MakeAttention | None = None, width_mult: float = 1.0, classes: int = 1000
    ) -> None:
        super().__init__()
        blocks = mobilenetv2_blocks(width_mult)
        last = make_divisible(1280 * max(1.0, width_mult))
        self.features = nn.Sequential(
            OrderedDict(
                stem=nn.Sequential(*conv_bn(3, blocks[0][0], 3, stride=2)),
                blocks=nn.Sequential(*(InvertedResidual(*block, attention) for block in blocks)),
                head=nn.Sequential(*conv_bn(blocks[-1][2], last, 1)),
            )
        )
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def settle_statistics(model: nn.Module, images: Tensor) -> None:
    """Run ``images`` through once in training mode with momentum 1, so that eval sees the photographs'
    statistics."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)
