"""python -m tests.attack --minutes 60 [--seed n] [--part calls]: attacks until the time is over.

Prints counts per part, and for each failure its seed with the command that reproduces it. Exit status 1 where
there was one.
"""

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path

# Both are read when the library loads, and by the harness.
os.environ["COORDATT_FAST_POISON"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.filterwarnings("ignore")

PARTS = ("calls", "sequences", "lookalikes", "changes", "environment")
# Shares of the time, of two processes each: the first has calls alone.
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
    workers = []
    for team in TEAMS:
        command = [sys.executable, "-m", "tests.attack", "--minutes", str(chosen.minutes), "--seed", str(seed)]
        command += [f"--part={part}" for part in team]
        command += [f"--rounds={chosen.rounds}"] if chosen.rounds else []
        workers.append(subprocess.Popen(command))
    statuses = []
    try:
        statuses = [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        statuses = [worker.wait() or 1 for worker in workers]
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
