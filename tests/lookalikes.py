"""Modules that look like Coordinate Attention and compute something else, or cannot be told to: accelerate()
has to leave them alone.

BAD[name] = (constructor for [N, 24, H, W], words of the reason).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from variants import C, CA_Block, CoorAttention, CoordAtt, WithDropout


class SimpleCoordAttn(nn.Module):
    """Linear layers, the gates added before one sigmoid."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act = nn.Linear(C, 8), nn.SiLU()
        self.fc_h, self.fc_w = nn.Linear(8, C), nn.Linear(8, C)

    def forward(self, x):
        s_h = self.fc_h(self.act(self.fc1(x.mean(3).mT))).mT
        s_w = self.fc_w(self.act(self.fc1(x.mean(2).mT))).mT
        return x * (s_h[..., None] + s_w[:, :, None]).sigmoid()


class CA_BlockUnusedNorm(CA_Block):
    """Declares the normalisation and never calls it."""

    def forward(self, x):
        _, _, h, w = x.size()
        y = torch.cat((x.mean(3, keepdim=True).mT, x.mean(2, keepdim=True)), 3)
        y_h, y_w = self.relu(self.conv_1x1(y)).split([h, w], 3)
        return x * self.sigmoid_h(self.F_h(y_h.mT)) * self.sigmoid_w(self.F_w(y_w))


class CAConv(CoordAtt):
    """A convolution behind the gates."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())

    def forward(self, x):
        return self.conv(super().forward(x))


class TwoInputs(CoordAtt):
    def forward(self, x, y):
        s_h, s_w = self.gates(x + y)
        return x * s_h.sigmoid() * s_w.sigmoid()


class SigmoidOfProduct(CoordAtt):
    def forward(self, x):
        s_h, s_w = self.gates(x)
        return x * torch.sigmoid(s_h * s_w)


class Additive(CoordAtt):
    def forward(self, x):
        s_h, s_w = self.gates(x)
        return x * (s_h.sigmoid() + s_w.sigmoid())


class CoordAtt3D(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(C, 8, 1), nn.BatchNorm3d(8)
        self.conv_h, self.conv_w = nn.Conv3d(8, C, 1), nn.Conv3d(8, C, 1)

    def forward(self, x):
        y = F.hardswish(self.bn1(self.conv1(x.mean((3, 4), keepdim=True))))
        return x * self.conv_h(y).sigmoid() * self.conv_w(y).sigmoid()


class EMA(nn.Module):
    """Grouped, cross-spatial: strip pools, a 1x1 and a 3x3 convolution over channel groups."""

    def __init__(self, factor=4):
        super().__init__()
        self.groups = factor
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.gn = nn.GroupNorm(C // factor, C // factor)
        self.conv1x1 = nn.Conv2d(C // factor, C // factor, 1)
        self.conv3x3 = nn.Conv2d(C // factor, C // factor, 3, padding=1)

    def forward(self, x):
        n, c, h, w = x.shape
        g = x.reshape(n * self.groups, -1, h, w)
        rows, columns = self.conv1x1(torch.cat([self.pool_h(g), self.pool_w(g).mT], 2)).split([h, w], 2)
        near = self.gn(g * rows.sigmoid() * columns.mT.sigmoid())
        weights = (near.mean((2, 3), keepdim=True).softmax(1) * self.conv3x3(g)).sum(1, keepdim=True)
        return (g * weights.sigmoid()).reshape(n, c, h, w)


class TripletCoordAtt(CoordAtt):
    """A third branch over all of the map."""

    def __init__(self):
        super().__init__()
        self.conv_c = nn.Conv2d(8, C, 1)

    def forward(self, x):
        a_c = self.conv_c(self.middle(x.mean((2, 3), keepdim=True))).sigmoid()
        return super().forward(x) * a_c


class StripPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv_h = nn.Conv2d(C, C, (3, 1), padding=(1, 0))
        self.conv_w = nn.Conv2d(C, C, (1, 3), padding=(0, 1))
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x):
        return x * self.conv(F.relu(self.conv_h(self.pool_h(x)) + self.conv_w(self.pool_w(x)))).sigmoid()


class EfficientLocalAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv = nn.Conv1d(C, C, 7, padding=3, groups=C, bias=False)
        self.gn = nn.GroupNorm(4, C)

    def forward(self, x):
        a_h = self.gn(self.conv(self.pool_h(x)[..., 0])).sigmoid()
        a_w = self.gn(self.conv(self.pool_w(x)[:, :, 0])).sigmoid()
        return x * a_h[..., None] * a_w[:, :, None]


class ChannelAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(C, 8, 1), nn.Conv2d(8, C, 1)

    def forward(self, x):
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class SpatialAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        return x * self.conv(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid()


def named(cls, name):
    return type(name, (cls,), {"__module__": __name__})


class SharedSqueeze(CoordAtt):
    """The squeeze runs over rows and columns apart: other batch statistics in training."""

    def gates(self, x):
        y_h, y_w = self.middle(self.pool_h(x)), self.middle(self.pool_w(x))
        return self.conv_h(y_h), self.conv_w(y_w)


class FunctionalDropout(CoordAtt):
    def middle(self, y):
        return F.dropout(super().middle(y), 0.2, self.training)


class Detached(CoordAtt):
    """Same output, other gradients."""

    def forward(self, x):
        s_h, s_w = self.gates(x.detach())
        return x * s_h.sigmoid() * s_w.sigmoid()


class DetachedInTraining(CoordAtt):
    def forward(self, x):
        s_h, s_w = self.gates(x.detach() if self.training else x)
        return x * s_h.sigmoid() * s_w.sigmoid()


class Squeeze(nn.Module):
    """The middle as a block of its own, whose forward does more than call its children."""

    def __init__(self, more):
        super().__init__()
        self.conv, self.bn, self.act, self.more = nn.Conv2d(C, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), more

    def forward(self, x):
        if self.more == "detached":
            x = x.detach()
        y = self.act(self.bn(self.conv(x)))
        if self.more == "undone outside":
            return y * 2 if self.training else y
        return y.clamp(-1e4, 1e4) if self.more == "clamped" else y * 1.5 if self.more == "scaled" else y


class OtherSqueeze(nn.Module):
    """Its children compute what it computes; its parts, called one by one, do not (undone outside: the reverse)."""

    def __init__(self, more):
        super().__init__()
        self.squeeze, self.conv_h, self.conv_w = Squeeze(more), nn.Conv2d(8, C, 1), nn.Conv2d(8, C, 1)

    def forward(self, x):
        y = self.squeeze(torch.cat((x.mean(3, True), x.mean(2, True).mT), 2))
        if self.squeeze.more == "undone outside" and self.training:
            y = y / 2
        y_h, y_w = y.split(x.shape[2:], 2)
        return x * self.conv_h(y_h).sigmoid() * self.conv_w(y_w.mT).sigmoid()


class MeanOfThreeColumns(CoordAtt):
    """The means of maps three columns wide, not of others."""

    def __init__(self):
        super().__init__()
        self.pool_h = self.pool_w = nn.Identity()

    def gates(self, x):
        y = self.middle(torch.cat((x[..., :3].mean(3, True), x.mean(2, True).mT), 2))
        y_h, y_w = y.split(x.shape[2:], 2)
        return self.conv_h(y_h), self.conv_w(y_w.mT)


class ClampsItsWeights(CoordAtt):
    def forward(self, x):
        self.conv1.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class FrozenGatesInTraining(CoordAtt):
    def forward(self, x):
        s_h, s_w = self.gates(x)
        return x * s_h.sigmoid() * s_w.sigmoid() if not self.training else x * s_h.sigmoid()


class WrongNorm(CoordAtt):
    """The batch statistics are never used, not even in training."""

    def middle(self, y):
        bn = self.bn1
        return self.act(
            F.batch_norm(self.conv1(y), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, eps=bn.eps)
        )


class HardGates(CoordAtt):
    def forward(self, x):
        s_h, s_w = self.gates(x)
        return x * F.hardsigmoid(s_h) * F.hardsigmoid(s_w)


class MaxPools(CoordAtt):
    def __init__(self):
        super().__init__()
        self.pool_h, self.pool_w = nn.AdaptiveMaxPool2d((None, 1)), nn.AdaptiveMaxPool2d((1, None))


class GatesCrossed(CoordAtt):
    """The row gate comes from the column features: runs on square maps only, and is another function."""

    def gates(self, x):
        s_h, s_w = super().gates(x)
        return s_w.mT, s_h.mT


class KeepsItsGates(CoordAtt):
    def forward(self, x):
        self.last = self.gates(x)
        return x * self.last[0].sigmoid() * self.last[1].sigmoid()


class TensorAttribute(CoordAtt):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(())

    def forward(self, x):
        return super().forward(x) * self.scale


class Lazy(CoordAtt):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.LazyConv2d(8, 1)


class BuiltAtFirstCall(nn.Module):
    """Named as the module, and empty until it is called."""

    def forward(self, x):
        if not hasattr(self, "inner"):
            self.inner = CoordAtt(x.shape[1])
        return self.inner(x)


class ThreeByThree(CoordAtt):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(C, 8, 3, padding=1)


class OtherChannels(CoordAtt):
    def __init__(self):
        super().__init__()
        self.conv_w = nn.Conv2d(8, 1, 1)


def parametrised():
    module = CoordAtt()
    parametrizations.weight_norm(module.conv1)
    return module


def pruned():
    module = CoordAtt()
    prune.l1_unstructured(module.conv_h, "weight", amount=0.5)
    return module


def forward_on_the_instance():
    module = CoordAtt()
    module.forward = lambda x: 2 * x
    return module


def quantised():
    module = CoordAtt()
    module.conv1 = torch.ao.nn.quantized.Conv2d(C, 8, 1)
    return module


BAD = {
    "linear and additive": (SimpleCoordAttn, "fc1.weight is no part"),
    "norm declared, never called": (CA_BlockUnusedNorm, "bn has a place in it but is never called"),
    "convolution behind it": (CAConv, "conv.0 is a 3 x 3 convolution"),
    "two inputs": (TwoInputs, "its forward takes 2 inputs: x, y"),
    "sigmoid of the product": (SigmoidOfProduct, "its output is not Coordinate Attention's"),
    "gates added": (Additive, "its output is not Coordinate Attention's"),
    "dropout": (WithDropout, "dropout (conv.2, p=0.2) in training"),
    "dropout in forward": (FunctionalDropout, "in training mode its output is not"),
    "three dimensions": (CoordAtt3D, "conv1.weight is no part"),
    "EMA": (EMA, "conv3x3 is a 3 x 3 convolution"),
    "triplet": (TripletCoordAtt, "expected 1x1 convolutions C -> m, m -> C, m -> C, found conv1 24 -> 8"),
    "strip pooling": (StripPooling, "conv_h is a 3 x 1 convolution"),
    "local attention": (EfficientLocalAttention, "conv.weight is no part"),
    "channel attention": (named(ChannelAttention, "CA_Block"), "found fc1 24 -> 8, fc2 8 -> 24"),
    "spatial attention": (named(SpatialAttention, "CAModule"), "conv is a 7 x 7 convolution"),
    "squeeze called twice": (SharedSqueeze, "conv1 has a place in it but is called 2 times"),
    "other gradients": (Detached, "in eval mode its gradient of x is not"),
    "other gradients in training": (DetachedInTraining, "in training mode its gradient of x is not"),
    "block that scales": (lambda: OtherSqueeze("scaled"), "in eval mode its output is not"),
    "block that detaches": (lambda: OtherSqueeze("detached"), "in eval mode its gradient of x is not"),
    "block undone outside": (lambda: OtherSqueeze("undone outside"), "in training mode its output is not"),
    "block that clamps": (lambda: OtherSqueeze("clamped"), "it treats large or non-finite values in another way"),
    "mean of three columns": (MeanOfThreeColumns, "in eval mode its output is not"),
    "clamps its weights": (ClampsItsWeights, "its forward writes into its parameters"),
    "other in training": (FrozenGatesInTraining, "in training mode its output is not"),
    "frozen statistics": (WrongNorm, "bn1 has a place in it but is never called"),
    "hard gates": (HardGates, "its output is not Coordinate Attention's"),
    "maximum pools": (MaxPools, "its output is not Coordinate Attention's"),
    "gates crossed": (GatesCrossed, "a probe of its forward raised RuntimeError"),
    "keeps its gates": (KeepsItsGates, "its forward sets attributes"),
    "tensor attribute": (TensorAttribute, "scale is a tensor outside parameters and buffers"),
    "missing sixth": (lambda: CoorAttention(sixth=1), "its output is not Coordinate Attention's"),
    "lazy": (Lazy, "conv1 is lazy"),
    "built at the first call": (named(BuiltAtFirstCall, "DynamicCoordAtt"), "found none"),
    "3x3": (ThreeByThree, "conv1 is a 3 x 3 convolution"),
    "other channels": (OtherChannels, "found conv1 24 -> 8, conv_h 8 -> 24, conv_w 8 -> 1"),
    "parametrised": (parametrised, "conv1 is parametrised"),
    "pruned": (pruned, "conv_h.weight_mask is no part"),
    "forward on the instance": (forward_on_the_instance, "its forward is replaced on the instance"),
    "quantised": (quantised, "conv1 is a quantised Conv2d"),
}
