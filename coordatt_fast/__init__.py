"""Coordinate Attention (Hou, Zhou, Feng, CVPR 2021, arXiv 2103.02907), moving the feature map as few times as possible."""

from pathlib import Path

__version__ = "0.1.0"

# The Triton kernels are the top-level folder kernels/ of the repository, installed as coordatt_fast.kernels. In an
# editable install, and for a Python started in the repository, they are still beside this package.
_root = Path(__file__).parent.parent
if not (_root / "coordatt_fast/kernels").exists() and (_root / "kernels").is_dir() and (_root / "csrc").is_dir():
    __path__.append(str(_root))

from coordatt_fast.backends import backends, use_backend  # noqa: E402
from coordatt_fast.functional import coord_att  # noqa: E402
from coordatt_fast.module import CoordAtt  # noqa: E402
from coordatt_fast.plan import explain  # noqa: E402

__all__ = ["CoordAtt", "backends", "coord_att", "explain", "use_backend"]
