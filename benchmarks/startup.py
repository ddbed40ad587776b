"""Times of the commands that train nothing, as a table of seconds.

Usage: ``python -m benchmarks.startup [--runs N] [--imports COMMAND]``, from the folder of the repository.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.comparison_runs import write_sweep

COMMANDS = {
    "help": "--help",
    "compose": "train --cfg job",
    "compose a sweep": "train --cfg job -m method=spo,dpo,ipo beta=0.01,0.1,1 seed=1,2",
    "compare": "compare sweep",
    "report": "report sweep/method-dpo_beta-0.1_seed-1",
    "dashboard": "dashboard entity/project --spec nowhere",
    "refuse a configuration": "train method=dpp",
}
"""Commands of the table, run in a folder with a sweep of two seeds and three methods. The last one reads the signature
of everything that a run would be made of, torch and lightning included."""


def seconds(command: Sequence[str], folder: Path) -> float:
    """Return the wall-clock seconds of one process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "spo", *command], cwd=folder, capture_output=True)
    return time.perf_counter() - started


def imports(command: Sequence[str], folder: Path, shown: int = 20) -> None:
    """Print the modules that take longest to import, with the seconds of each including its own imports."""
    words = [sys.executable, "-X", "importtime", "-m", "spo", *command]
    lines = subprocess.run(words, cwd=folder, capture_output=True, text=True).stderr.splitlines()
    rows = [line.split("|") for line in lines if line.startswith("import time:") and "cumulative" not in line]
    for _, cumulative, module in sorted(rows, key=lambda row: -int(row[1]))[:shown]:
        print(f"{int(cumulative) / 1e6:8.3f}  {module.strip()}")


def main() -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5, help="runs of each command")
    parser.add_argument("--imports", choices=COMMANDS, help="show the slowest imports of one of the commands instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sweep(folder / "sweep", seeds=(1, 2))
        if given.imports:
            return imports(COMMANDS[given.imports].split(), folder)
        print(f"{'median':>8}{'fastest':>9}{'slowest':>9}  command")
        for words in COMMANDS.values():
            times = [seconds(words.split(), folder) for _ in range(given.runs)]
            print(f"{median(times):8.2f}{min(times):9.2f}{max(times):9.2f}  spo {words}", flush=True)


if __name__ == "__main__":
    main()
