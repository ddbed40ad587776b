"""Run the planted bugs: ``python -m tests.mutants [--all] [NAME ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from time import perf_counter

os.environ.setdefault("OMP_NUM_THREADS", "1")

from spo.stages.quiet import quiet_libraries
from tests.mutants.catalogue import MUTANTS
from tests.mutants.run import run_all, run_named


def main() -> int:
    """Run the mutants that are named, or all of them; return 1 if one survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants to run; none for all of them")
    parser.add_argument("--all", action="store_true", help="run the whole fast suite against each of them")
    given = parser.parse_args()
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"there is no mutant {unknown[0]}; there are {', '.join(known)}")
    mutants = [known[name] for name in given.names] or list(MUTANTS)
    quiet_libraries()
    started = perf_counter()
    if given.all:
        problems = [f"{name} survives the fast suite" for name in run_all(mutants)]
    else:
        problems = run_named(mutants).problems
    print(*problems, sep="\n")
    print(f"{len(mutants)} mutants in {perf_counter() - started:.0f} s, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
