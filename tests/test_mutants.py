"""Planted bugs fail the tests that are named for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spo.losses import SPOLoss
from tests.mutants.catalogue import MUTANTS
from tests.mutants.plant import Mutant, edited_code, find_function

ROOT = Path(__file__).parents[1]
MIN_MUTANTS = 30


def test_catalogue_has_enough_mutants_with_names_of_their_own() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= MIN_MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_changes_the_code_of_its_function(mutant: Mutant) -> None:
    """The text that a mutant replaces is still there: adapt the mutant when you rewrite its function."""
    function = find_function(mutant.function)
    right = function.__code__
    with mutant.planted():
        assert function.__code__ is not right
    assert function.__code__ is right
    files = {name.partition("::")[0] for name in mutant.ids if not name.startswith("verify:")}
    assert all((ROOT / "tests" / file).is_file() for file in files)


def test_changed_text_is_an_error() -> None:
    function = find_function("spo.losses.spo.SPOLoss.__call__")
    assert function is SPOLoss.__call__
    with pytest.raises(LookupError, match="occurs 0 times"):
        edited_code(function, [("text that is not there", "")])
    with pytest.raises(LookupError, match="there is no"):
        find_function("spo.losses.spo.NoLoss")


@pytest.mark.slow
def test_named_tests_fail_on_every_mutant_and_pass_without() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.mutants"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"{len(MUTANTS)} mutants" in done.stdout and "0 problems" in done.stdout
