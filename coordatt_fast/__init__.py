"""Coordinate Attention (Hou, Zhou, Feng, CVPR 2021, arXiv 2103.02907) at the cost of moving the feature map a few times."""

from coordatt_fast.functional import coord_att
from coordatt_fast.module import CoordAtt

__version__ = "0.1.0"

__all__ = ["CoordAtt", "coord_att", "__version__"]
