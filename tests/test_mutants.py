"""Planted bugs fail the tests that are named for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from pydoc import locate

import pytest
from omegaconf import OmegaConf

from spo.losses import SPOLoss
from spo.resources import conf_dir
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


def test_every_method_has_two_mutants() -> None:
    """Mutants of a function that is not a method of a class count for every class of its file."""
    classes = set()
    for path in (conf_dir() / "method").glob("*.yaml"):
        found = locate(OmegaConf.load(path).loss._target_)
        assert isinstance(found, type)
        classes.add(f"{found.__module__}.{found.__qualname__}")
    of_file = {name.rpartition(".")[0] for name in classes}
    assert len(classes) > len(of_file) > 35
    for name in classes:
        file = name.rpartition(".")[0]
        others = tuple(f"{other}." for other in classes - {name})
        counted = [m.name for m in MUTANTS if m.function.startswith(f"{file}.") and not m.function.startswith(others)]
        assert len(counted) >= 2, f"{name} has the mutants {counted}: add others in tests/mutants/losses.py"


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
