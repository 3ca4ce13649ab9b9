"""An attack on the package that does not end by itself: make attack MINUTES=60. See docs/attack.md."""

import tempfile
from pathlib import Path

from hypothesis.configuration import set_hypothesis_home_dir

# What hypothesis caches stays out of the tree.
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "coordatt-fast-hypothesis")
