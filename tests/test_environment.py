"""docs/environment.md has every variable that the package, the library and the build read, and they mean what it
says.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What other projects define.
FOREIGN = {"XDG_CACHE_HOME", "PATH"}


def test_every_variable_is_in_the_table():
    table = (ROOT / "docs/environment.md").read_text()
    named = set(re.findall(r"^\| (.+?) \|", table, re.M))
    listed = {name for cell in named for name in re.findall(r"`([A-Z_]+)`", cell)}
    read = set()
    sources = [*ROOT.glob("coordatt_fast/*.py"), *ROOT.glob("kernels/*.py"), ROOT / "setup.py"]
    for path in [*sources, *(ROOT / "csrc").rglob("*.cpp")]:
        text = path.read_text()
        read |= set(
            re.findall(r"""(?:environ|environ\.get|getenv|switch|wrong)[(\[]\s*["']([A-Z_]+)["']""", text)
        )
        read |= set(re.findall(r'"(COORDATT_FAST_[A-Z_]+)"', text))
    assert {"COORDATT_FAST_BACKEND", "COORDATT_FAST_LIBRARY", "COORDATT_FAST_KEEP_MB", "MAX_JOBS"} <= read
    assert read - FOREIGN <= listed


PROGRAM = """
import coordatt_fast
from coordatt_fast.backends import INTERPRETED
try:
    import triton.knobs
    assert INTERPRETED == triton.knobs.runtime.interpret
except ImportError:
    pass
print(INTERPRETED)
"""


def test_the_interpreter_is_read_as_triton_reads_it():
    env = os.environ | {"TRITON_INTERPRET": "TRUE"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.strip() == "True", result.stderr
