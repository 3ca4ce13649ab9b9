"""Coordinate Attention as people write it: subjects for accelerate().

Each is written from a description of the variant, small, and as unlike its neighbours as people's spellings
are. GOOD[name] = (constructor for [N, 24, H, W], tier, words the report must contain).
"""

import torch
import torch.nn.functional as F
from paper import HSwish, PaperCoordAtt
from torch import nn

C = 24
MAP = (9, 6)  # of x in the tests; the fixed-size variants are built for it


class CoordAtt(nn.Module):
    """The pattern of most copies; subclasses change what they must."""

    make_act, norm, bias = HSwish, nn.BatchNorm2d, True

    def __init__(self, inp=C, reduction=32):
        super().__init__()
        mid = max(8, inp // reduction)
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        self.conv1 = nn.Conv2d(inp, mid, 1, bias=self.bias)
        self.bn1 = self.norm(mid)
        self.act = self.make_act()
        self.conv_h = nn.Conv2d(mid, inp, 1, bias=self.bias)
        self.conv_w = nn.Conv2d(mid, inp, 1, bias=self.bias)

    def middle(self, y):
        return self.act(self.bn1(self.conv1(y)))

    def gates(self, x):
        h, w = x.shape[2:]
        y = self.middle(torch.cat((self.pool_h(x), self.pool_w(x).mT), 2))
        y_h, y_w = y.split((h, w), 2)
        return self.conv_h(y_h), self.conv_w(y_w.mT)

    def forward(self, x):
        s_h, s_w = self.gates(x)
        return x * s_h.sigmoid() * s_w.sigmoid()


class Released(nn.Module):
    """The names of the released checkpoint; gates expanded explicitly."""

    def __init__(self, inp=C, oup=C, groups=32):
        super().__init__()
        mid = max(8, inp // groups)
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        self.conv1 = nn.Conv2d(inp, mid, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, oup, kernel_size=1)
        self.conv3 = nn.Conv2d(mid, oup, kernel_size=1)
        self.relu = HSwish()

    def forward(self, x):
        _, _, h, w = x.size()
        of_rows, of_columns = self.pool_h(x), self.pool_w(x).permute(0, 1, 3, 2)
        y = self.relu(self.bn1(self.conv1(torch.cat([of_rows, of_columns], dim=2))))
        of_rows, of_columns = torch.split(y, [h, w], dim=2)
        gate_h = self.conv2(of_rows).sigmoid().expand(-1, -1, h, w)
        gate_w = self.conv3(of_columns.permute(0, 1, 3, 2)).sigmoid().expand(-1, -1, h, w)
        return x * gate_w * gate_h


class MeansAndSkip(nn.Module):
    """Means in forward, no bias, gate layer as a child, optional skip."""

    def __init__(self, channels=C, skip=True, norm=nn.BatchNorm2d):
        super().__init__()
        self.has_skip = skip
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=1, bias=False)
        self.bn1 = norm(16) if norm is not None else nn.Identity()
        self.act = nn.Hardswish(inplace=True)
        self.conv_h = nn.Conv2d(16, channels, kernel_size=1, bias=False)
        self.conv_w = nn.Conv2d(16, channels, kernel_size=1, bias=False)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        identity = x
        y = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(-1, -2)], dim=2)
        y = self.act(self.bn1(self.conv1(y)))
        y_h, y_w = torch.split(y, [x.shape[2], x.shape[3]], dim=2)
        out = x * self.gate(self.conv_h(y_h)) * self.gate(self.conv_w(y_w.transpose(-1, -2)))
        return out + identity if self.has_skip else out


class CA_Block(nn.Module):
    """Concatenates along the width; ReLU; no bias; sigmoids as children."""

    def __init__(self, channel=C, reduction=16):
        super().__init__()
        self.conv_1x1 = nn.Conv2d(channel, channel // reduction, kernel_size=1, bias=False)
        self.relu = nn.ReLU()
        self.bn = nn.BatchNorm2d(channel // reduction)
        self.F_h = nn.Conv2d(channel // reduction, channel, kernel_size=1, bias=False)
        self.F_w = nn.Conv2d(channel // reduction, channel, kernel_size=1, bias=False)
        self.sigmoid_h = nn.Sigmoid()
        self.sigmoid_w = nn.Sigmoid()

    def forward(self, x):
        _, _, h, w = x.size()
        of_rows = torch.mean(x, dim=3, keepdim=True).permute(0, 1, 3, 2)
        of_columns = torch.mean(x, dim=2, keepdim=True)
        y = self.relu(self.bn(self.conv_1x1(torch.cat((of_rows, of_columns), 3))))
        y_h, y_w = y.split([h, w], 3)
        s_h = self.sigmoid_h(self.F_h(y_h.permute(0, 1, 3, 2)))
        s_w = self.sigmoid_w(self.F_w(y_w))
        return x * s_h.expand_as(x) * s_w.expand_as(x)


class CoordAttention(nn.Module):
    """SiLU; conv2 and conv3."""

    def __init__(self, channels=C, reduction=16):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 9, 1)
        self.bn1 = nn.BatchNorm2d(9, eps=1e-3, momentum=0.03)
        self.act1 = nn.SiLU(inplace=True)
        self.conv2 = nn.Conv2d(9, channels, 1)
        self.conv3 = nn.Conv2d(9, channels, 1)

    def forward(self, x):
        h, w = x.shape[-2:]
        of_rows = F.adaptive_avg_pool2d(x, (h, 1))
        of_columns = F.adaptive_avg_pool2d(x, (1, w)).permute(0, 1, 3, 2)
        y = self.act1(self.bn1(self.conv1(torch.cat([of_rows, of_columns], 2))))
        y_h, y_w = y.split([h, w], 2)
        return torch.sigmoid(self.conv2(y_h)) * torch.sigmoid(self.conv3(y_w.permute(0, 1, 3, 2))) * x


class CoordinateAttention2d(nn.Module):
    """Convolution, norm and activation in one Sequential; the width first; gates called conv_y and conv_x."""

    def __init__(self, in_dim=C, reduction_ratio=1):
        super().__init__()
        mid = in_dim // reduction_ratio
        self.conv = nn.Sequential(
            nn.Conv2d(in_dim, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU(inplace=True)
        )
        self.conv_x = nn.Conv2d(mid, in_dim, 1)
        self.conv_y = nn.Conv2d(mid, in_dim, 1)

    def forward(self, x):
        w = x.size(3)
        y = self.conv(torch.cat([x.mean(2, keepdim=True), x.mean(3, keepdim=True).mT], dim=3))
        return x * self.conv_x(y[..., :w]).sigmoid() * self.conv_y(y[..., w:].mT).sigmoid()


class PoolsInForward(CoordAtt):
    def __init__(self):
        super().__init__()
        del self.pool_h, self.pool_w
        self.bn1.eps, self.bn1.momentum = 1e-3, 0.03

    def gates(self, x):
        h, w = x.shape[2:]
        pool_h, pool_w = nn.AdaptiveAvgPool2d((h, 1)), nn.AdaptiveAvgPool2d((1, w))
        y_h, y_w = self.middle(torch.cat((pool_h(x), pool_w(x).permute(0, 1, 3, 2)), 2)).split((h, w), 2)
        return self.conv_h(y_h), self.conv_w(y_w.permute(0, 1, 3, 2))


class WithReLU(CoordAtt):
    make_act = nn.ReLU


class WithReLU6(CoordAtt):
    make_act = nn.ReLU6


class SigmoidChild(CoordAtt):
    def __init__(self):
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        s_h, s_w = self.gates(x)
        return x * self.sigmoid(s_w) * self.sigmoid(s_h)


class SigmoidsInSequence(CoordAtt):
    """The gates' convolutions inside Sequentials with their sigmoids."""

    def __init__(self):
        super().__init__()
        self.conv_h = nn.Sequential(self.conv_h, nn.Sigmoid())
        self.conv_w = nn.Sequential(self.conv_w, nn.Sigmoid())

    def forward(self, x):
        a_h, a_w = self.gates(x)
        return x * a_h * a_w


class FixedSize(CoordAtt):
    def __init__(self, size=MAP):
        super().__init__()
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((size[0], 1)), nn.AdaptiveAvgPool2d((1, size[1]))


class FixedKernels(CoordAtt):
    """AvgPool2d with the map's size as its kernel, for exporters without adaptive pools."""

    def __init__(self, size=MAP):
        super().__init__()
        self.pool_h, self.pool_w = nn.AvgPool2d((1, size[1])), nn.AvgPool2d((size[0], 1))


class WithGroupNorm(nn.Module):
    def __init__(self, channels=C, norm=lambda m: nn.GroupNorm(4, m)):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 1, bias=False)
        self.gn = norm(8)
        self.act = nn.SiLU()
        self.conv_h = nn.Conv2d(8, channels, 1)
        self.conv_w = nn.Conv2d(8, channels, 1)

    def forward(self, x):
        h, w = x.shape[2:]
        y = self.act(self.gn(self.conv1(torch.cat([x.mean(3, True), x.mean(2, True).mT], 2))))
        y_h, y_w = y.split([h, w], 2)
        return x * self.conv_h(y_h).sigmoid() * self.conv_w(y_w.mT).sigmoid()


class ConvBlock(nn.Module):
    """As in YOLO: fuse() folds the norm and binds another forward."""

    def __init__(self, c1, c2, act=None):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, 1, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))

    def fuse(self):
        self.conv = nn.utils.fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        del self.bn
        self.forward = self.forward_fuse


class NestedBlock(nn.Module):
    def __init__(self, c1=C, c2=C, act=None):
        super().__init__()
        self.cv1 = ConvBlock(c1, 8, act)
        self.cv2 = nn.Conv2d(8, c2, 1)
        self.cv3 = nn.Conv2d(8, c2, 1)
        self.i, self.f, self.type = 9, [-1, 6], "models.common.NestedBlock"

    def forward(self, x):
        h = x.size(2)
        y = self.cv1(torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).mT], 2))
        return x * self.cv2(y[:, :, :h]).sigmoid() * self.cv3(y[:, :, h:].mT).sigmoid()


class WithDropout(nn.Module):
    def __init__(self, channels=C, p=0.2):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8), nn.Dropout(p), nn.Hardswish()
        )
        self.to_h, self.to_w = nn.Conv2d(8, channels, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x):
        h, w = x.shape[2:]
        y_h, y_w = self.conv(torch.cat([x.mean(3, True), x.mean(2, True).mT], 2)).split([h, w], 2)
        return x * self.to_h(y_h).sigmoid() * self.to_w(y_w.mT).sigmoid()


class CoorAttention(nn.Module):
    """Other names for everything, and an activation in forward: F.relu6(x + 3) / 6 times x."""

    def __init__(self, channel=C, sixth=6):
        super().__init__()
        self.poolh, self.poolw = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.convx = nn.Conv2d(channel, 8, 1)
        self.normx = nn.BatchNorm2d(8)
        self.row, self.col = nn.Conv2d(8, channel, 1), nn.Conv2d(8, channel, 1)
        self.sixth = sixth

    def non_linear(self, y):
        return y * F.relu6(y + 3, inplace=True) / self.sixth

    def forward(self, input):
        h, w = input.shape[2:]
        both = torch.cat([self.poolh(input), self.poolw(input).permute(0, 1, 3, 2)], 2)
        rows, columns = self.non_linear(self.normx(self.convx(both))).split([h, w], 2)
        return input * self.row(rows).sigmoid() * self.col(columns.permute(0, 1, 3, 2)).sigmoid()


class CoordAttBlock(CoordAtt):
    """A floor of its own for the middle's width."""

    def __init__(self, channels=C, internal_reduce=4, min_internal_dims=3):
        super().__init__(channels)
        mid = max(min_internal_dims, channels // internal_reduce)
        self.conv1, self.bn1 = nn.Conv2d(channels, mid, 1), nn.BatchNorm2d(mid)
        self.conv_h, self.conv_w = nn.Conv2d(mid, channels, 1), nn.Conv2d(mid, channels, 1)


class NoNorm(CoordAtt):
    def __init__(self):
        super().__init__()
        del self.bn1

    def middle(self, y):
        return F.silu(self.conv1(y))


class WithGELU(CoordAtt):
    make_act = nn.GELU


class HeavyswishAct(nn.Module):
    """Hard-swish as some write it by mistake: without the division by six."""

    def forward(self, x):
        return x * F.relu6(x + 3)


class WithoutDivision(CoordAtt):
    make_act = HeavyswishAct


GOOD = {
    "the authors'": (lambda: PaperCoordAtt(C, C), "fused", ""),
    "released": (Released, "fused", "conv_h is conv2, conv_w is conv3"),
    "means, no bias, skip": (MeansAndSkip, "fused", "no bias, adds x"),
    "means, no bias": (lambda: MeansAndSkip(skip=False), "fused", "no bias"),
    "means, no norm": (lambda: MeansAndSkip(norm=None), "fused", "no normalisation"),
    "concatenated along the width": (CA_Block, "fused", "relu, no bias, conv1 is conv_1x1"),
    "SiLU": (CoordAttention, "fused", "silu"),
    "in a Sequential": (CoordinateAttention2d, "fused", "conv1 is conv.0, bn1 is conv.1, conv_h is conv_y"),
    "pools in forward": (PoolsInForward, "fused", ""),
    "ReLU": (WithReLU, "fused", "relu"),
    "ReLU6": (WithReLU6, "fused", "relu6"),
    "sigmoid as child": (SigmoidChild, "fused", ""),
    "sigmoids in sequence": (SigmoidsInSequence, "fused", "conv_h is conv_h.0"),
    "fixed size": (FixedSize, "fused", "for maps of 9 x 6"),
    "fixed square": (lambda: FixedSize((7, 7)), "fused", "for maps of 7 x 7"),
    "fixed kernels": (FixedKernels, "fused", "for maps of 9 x 6"),
    "GroupNorm": (WithGroupNorm, "hybrid", "silu, GroupNorm"),
    "InstanceNorm": (lambda: WithGroupNorm(norm=nn.InstanceNorm2d), "hybrid", "InstanceNorm2d"),
    "SyncBatchNorm": (lambda: WithGroupNorm(norm=nn.SyncBatchNorm), "fused", "SyncBatchNorm"),
    "nested block": (NestedBlock, "fused", "conv1 is cv1.conv, bn1 is cv1.bn"),
    "dropout of nothing": (lambda: WithDropout(p=0.0), "fused", ""),
    "other names, activation in forward": (CoorAttention, "fused", "conv1 is convx"),
    "floor of its own": (CoordAttBlock, "fused", ""),
    "no norm, activation in forward": (NoNorm, "fused", "silu, no normalisation"),
    "GELU": (WithGELU, "hybrid", "GELU"),
    "hard-swish without the sixth, as a child": (WithoutDivision, "hybrid", "HeavyswishAct"),
}
