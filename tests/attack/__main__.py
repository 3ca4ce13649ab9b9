"""python -m tests.attack --minutes 60 [--seed n] [--part calls]: attacks until the time is over.

Prints counts per part, and for each failure its seed with the command that reproduces it. Exit status 1 where
there was one.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

# Both are read when the library loads, and by the harness.
os.environ["COORDATT_FAST_POISON"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.filterwarnings("ignore")

PARTS = ("calls", "sequences", "lookalikes", "changes", "environment")
# A process each; a team's parts share its time.
TEAMS = (("calls", "sequences"), ("lookalikes", "changes", "environment"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="for how long (default: 60)")
    parser.add_argument("--seed", type=int, help="of the first round (default: a random one)")
    parser.add_argument("--part", choices=PARTS, action="append", help="this part alone, in this process")
    parser.add_argument("--rounds", type=int, help="at most so many rounds of each part")
    chosen = parser.parse_args()
    seed = chosen.seed if chosen.seed is not None else int.from_bytes(os.urandom(4), "little")
    if chosen.part:
        from attack import rounds

        return rounds.run(chosen.part, seed, chosen.minutes, chosen.rounds)
    print(f"seed {seed}", flush=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return int(any(list(pool.map(lambda team: watched(team, seed, chosen), TEAMS))))


def watched(team: tuple, seed: int, chosen) -> bool:
    """Runs a team in a process, and another one from the next seed on where a signal has ended it. Whether any
    failed."""
    until, failed = time.monotonic() + 60 * chosen.minutes, False
    last = seed + chosen.rounds if chosen.rounds else None
    with tempfile.TemporaryDirectory() as folder:
        at, counts = Path(folder, "at"), Path(folder, "at.counts")
        while (left := (until - time.monotonic()) / 60) > 0 and (last is None or seed < last):
            command = [sys.executable, "-X", "faulthandler", "-m", "tests.attack"]
            command += [f"--minutes={left}", f"--seed={seed}", *(f"--part={part}" for part in team)]
            command += [f"--rounds={last - seed}"] if last else []
            worker = subprocess.Popen(command, env=os.environ | {"ATTACK_AT": str(at)})
            status = worker.wait()
            failed |= status != 0
            if status >= 0:
                break
            part, seed, case = ((at.read_text() if at.exists() else "").split(" ", 2) + ["", "", ""])[:3]
            print(f"--- {part}, seed {seed}: ended by signal {-status}: python -m tests.attack --part {part} "
                  f"--rounds 1 --seed {seed}\n{case}", flush=True)  # fmt: skip
            if counts.exists():
                print(f"until then:\n{counts.read_text()}", flush=True)
                counts.unlink()
            seed = int(seed or last or 0) + 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
