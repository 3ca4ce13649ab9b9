"""The attention blocks the benchmark compares: CoordAtt in plain PyTorch, twice, and squeeze-and-excitation.

These are baselines. They import nothing of ``coordatt_fast``, so that the truth a speed is checked against
does not come from the package under test.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainCoordAtt(nn.Module):
    """Coordinate Attention as people copy it into their networks (Hou, Zhou, Feng, CVPR 2021, section 3.2).

    ``forward`` maps ``[N, C, H, W]`` to the same shape; ``state_dict`` has the 11 keys of the published
    class.
    """

    def __init__(self, inp: int, oup: int, reduction: int = 32) -> None:
        super().__init__()
        mid = max(8, inp // reduction)
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        self.conv1 = nn.Conv2d(inp, mid, 1)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv_h = nn.Conv2d(mid, oup, 1)
        self.conv_w = nn.Conv2d(mid, oup, 1)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means over width ``[N, C, H, 1]`` and over height ``[N, C, W, 1]``."""
        return self.pool_h(x), self.pool_w(x).permute(0, 1, 3, 2)

    def act(self, y: Tensor) -> Tensor:
        return y * (F.relu6(y + 3) / 6)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        y = self.act(self.bn1(self.conv1(torch.cat(self.pool(x), dim=2))))
        y_h, y_w = torch.split(y, [height, width], dim=2)
        a_h = self.conv_h(y_h).sigmoid()
        a_w = self.conv_w(y_w.permute(0, 1, 3, 2)).sigmoid()
        return x * a_w * a_h


class MeanCoordAtt(PlainCoordAtt):
    """The same function with ``mean`` for the adaptive pools and a built-in activation.

    This is what a careful user would write today, and the stronger baseline under ``torch.compile``.
    """

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(dim=3, keepdim=True), x.mean(dim=2, keepdim=True).permute(0, 1, 3, 2)

    def act(self, y: Tensor) -> Tensor:
        return F.hardswish(y)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al., CVPR 2018). ``reduction`` 24 is the CoordAtt paper's comparison
    (table 4)."""

    def __init__(self, channels: int, reduction: int = 24) -> None:
        super().__init__()
        mid = max(8, channels // reduction)
        self.fc1 = nn.Conv2d(channels, mid, 1)
        self.fc2 = nn.Conv2d(mid, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.relu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * self.fc2(s).sigmoid()


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm in ``module`` non-trivial weights and statistics, so that a skipped norm shows
    up."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            for tensor, low, high in (
                (child.weight, 0.5, 1.5),
                (child.bias, -0.5, 0.5),
                (child.running_mean, -0.2, 0.2),
                (child.running_var, 0.5, 1.5),
            ):
                fresh = torch.empty(tensor.shape).uniform_(low, high, generator=generator)
                tensor.detach().copy_(fresh)
    return module


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
