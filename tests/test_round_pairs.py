"""Errors about the training pairs of a round: too few of them, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from omegaconf import OmegaConf

from spo.data import DataError, Renderer, Row
from spo.stages import prepare
from tests.data.tokenizers_built_here import build
from tests.test_round_source import Given, rows, source

OTHERS = [*rows("selection", 20), *rows("test", 20)]


def prepared(number: int, dropped: dict[str, int], min_pairs: int = 8, own: Any = None, max_length: int = 64) -> Any:
    """Prepare the pairs of a round, with a number of training pairs beside those of the other splits."""
    cfg = OmegaConf.create({"data": {"seed": 0, "splits": {"selection": 0.1, "test": 0.1}, "min_pairs": min_pairs}})
    cfg.seed = 0
    made = source() if own is None else own
    given: Sequence[Row] = [*rows(number=number), *OTHERS]
    renderer = Renderer(build("adds_bos"), max_length, "drop_pair")
    return prepare._prepare_pairs(cfg, made, renderer, given, Counter(dropped), lambda *_: [])


def test_a_round_counts_its_own_training_pairs() -> None:
    assert len(prepared(8, {"tied": 40}).train) == 8
    words = r"the round has 7 training pairs, but data\.min_pairs=8 are needed \(tied: 41, unfinished: 2\): the judge "
    with pytest.raises(DataError, match=words) as caught:
        prepared(7, {"tied": 41, "unfinished": 2, "unfinished in the data": 90})
    assert "iteration.source.temperature" in str(caught.value) and "max_new_tokens" not in str(caught.value)


def test_training_pairs_that_are_too_long_do_not_count() -> None:
    with pytest.raises(DataError, match=r"only 0 of 20 training pairs are left, .*data\.truncation"):
        prepared(20, {}, max_length=3)


@pytest.mark.parametrize(
    ("dropped", "words"),
    [
        ({"unfinished": 30, "tied": 4}, "does not end within data.max_new_tokens; raise it"),
        ({"unfinished": 0, "identical": 30}, "repeat each other or the data's response; raise iteration.source.temp"),
        ({"tied": 1, "unfinished in the data": 50}, "add prompts to the data, or raise iteration.source.prompts"),
        ({}, "are needed: add prompts to the data"),
    ],
)
def test_the_remedy_fits_the_largest_cause(dropped: dict[str, int], words: str) -> None:
    for number in (0, 3):
        with pytest.raises(DataError) as caught:
            prepared(number, dropped)
        assert words in str(caught.value)
        assert ("set data.min_pairs lower" in str(caught.value)) == (number > 0)


def test_evaluations_on_other_data_and_ordinary_runs_count_all_pairs() -> None:
    assert len(prepared(1, {"tied": 40}, own=source(prompts=0)).train) == 1
    assert len(prepared(1, {"tied": 40}, own=Given([])).train) == 1
    with pytest.raises(DataError, match=r"only 41 of 41 pairs are left, but data\.min_pairs=42"):
        prepared(1, {}, 42, own=Given([]))


def test_ordinary_runs_without_a_sampled_pair_get_advice_of_their_own() -> None:
    with pytest.raises(DataError, match=r"\(unfinished: 9, tied: 3\): an unfinished completion .*pairs_per_prompt"):
        prepared(0, {"unfinished": 9, "tied": 3}, own=Given([]))
    with pytest.raises(DataError, match=r"\(unfinished: 0, tied: 3\): sample more completions of each prompt"):
        prepared(0, {"unfinished": 0, "tied": 3}, own=Given([]))
