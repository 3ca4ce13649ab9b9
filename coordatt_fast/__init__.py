"""Coordinate Attention (Hou, Zhou, Feng, CVPR 2021, arXiv 2103.02907) in few passes over the feature map.

CoordAtt is the drop-in module, coord_att the function; accelerate(model) makes every such block of a model
run by this package, whatever its class, and restore(model) undoes it; explain(module, x) tells how a call
runs and why; backends() and use_backend(name) list and choose what computes it.
"""

from pathlib import Path

__version__ = "0.1.0"

# The top-level folder kernels/ installs as coordatt_fast.kernels; in an editable install, and for a Python
# started in the repository, it is still beside this package.
_root = Path(__file__).parent.parent
if (
    not (_root / "coordatt_fast/kernels").exists()
    and (_root / "kernels").is_dir()
    and (_root / "csrc").is_dir()
):
    __path__.append(str(_root))

from coordatt_fast import layers  # noqa: E402
from coordatt_fast.accelerate import Report, accelerate, restore  # noqa: E402
from coordatt_fast.backends import backends, use_backend  # noqa: E402
from coordatt_fast.explanation import explain  # noqa: E402
from coordatt_fast.functional import NormAct, coord_att  # noqa: E402
from coordatt_fast.module import CoordAtt  # noqa: E402

__all__ = [
    "CoordAtt",
    "NormAct",
    "Report",
    "accelerate",
    "backends",
    "coord_att",
    "explain",
    "layers",
    "restore",
    "use_backend",
]
