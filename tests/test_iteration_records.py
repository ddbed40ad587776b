"""Tests of the ledger of an iteration, and of the metrics that stand for its rounds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spo.metrics.catalogue import CHOSEN
from spo.metrics.rounds import Measured, round_metrics, win_rate_keys
from spo.records.iteration import (
    Iteration,
    NotAnIterationError,
    Round,
    is_iteration,
    parse_iteration,
    read_iteration,
    with_own_rounds,
    write_iteration,
)
from tests.iterations import make_iteration

ROUNDS = [Round(0, "round-0", "round-0", "finished", 1.5), Round(1, "round-1", "round-1/extrapolated", "running")]


def test_ledger_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Iteration(
        "accelerated", "first", 3, [*ROUNDS, Round(2, "round-2", "round-2", "failed", 3.0, ["long"])], {"a": 1}
    )
    write_iteration(tmp_path / "new", written)
    assert is_iteration(tmp_path / "new") and not is_iteration(tmp_path)
    assert read_iteration(tmp_path / "new") == written
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["iterate.json"]


def test_a_moved_round_names_the_rounds_beside_it(tmp_path: Path) -> None:
    old, own = tmp_path / "old", tmp_path / "new"
    write_iteration(own, Iteration("dpo", "previous", 3, ROUNDS))
    for folder in (own / "round-0/policy", own / "round-1/extrapolated", old / "round-0/policy", old / "round-7"):
        folder.mkdir(parents=True)
    config = {
        "paths": {"iteration": str(old), "run": str(old / "round-1")},
        "model": {"path": f"{old}/round-0/policy", "start": None, "name": f"{old}er/round-0/policy"},
        "against": ["reference", f"{old}/round-7", f"{old}/round-1/extrapolated"],
    }
    before = json.dumps(config)
    for run_dir in (own / "round-1", own / "round-1/extrapolated"):
        found = with_own_rounds(config, run_dir)
        assert found["model"] == {
            "path": f"{own}/round-0/policy",  # Even though the old place has one, maybe of another iteration.
            "start": None,
            "name": f"{old}er/round-0/policy",
        }
        assert found["against"] == ["reference", f"{old}/round-7", f"{own}/round-1/extrapolated"]
        assert found["paths"]["iteration"] == str(own)
    assert json.dumps(config) == before
    (tmp_path / "link").symlink_to(own / "round-1")
    assert with_own_rounds(config, tmp_path / "link") == found
    (tmp_path / "alone").mkdir()
    for alone in (with_own_rounds(config, tmp_path / "alone"), with_own_rounds(config, old / "round-1")):
        assert alone == config
    assert with_own_rounds({}, own / "round-1") == {} and with_own_rounds({"paths": None}, own) == {"paths": None}


def test_keys_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    write_iteration(tmp_path, Iteration("dpo", "previous", 1, ROUNDS))
    content = json.loads((tmp_path / "iterate.json").read_text())
    content["new"] = content["rounds"][0]["new"] = 1
    assert parse_iteration(content) == read_iteration(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"reference": "last"},
        {"planned": True},
        {"settings": []},
        {"rounds": {}},
        {"rounds": [{"number": 0}]},
        {"rounds": [{"number": 0, "directory": "a", "measured": "a", "status": "begun"}]},
        {"rounds": [{"number": 0, "directory": "a", "measured": "a", "alarms": [1]}]},
        {"rounds": [{"number": 0, "directory": "a", "measured": "a", "seconds": "1"}]},
        {"rounds": [{"number": number, "directory": "a", "measured": "a"} for number in (1, 1)]},
    ],
)
def test_damaged_ledger_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    whole = {"name": "dpo", "reference": "previous", "planned": 1, "rounds": []}
    assert parse_iteration(whole) is not None
    (tmp_path / "iterate.json").write_text(json.dumps(whole | change))
    with pytest.raises(NotAnIterationError, match=r"iterate\.json is damaged.*move it away"):
        read_iteration(tmp_path)


def test_other_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAnIterationError, match=r"does not have iterate\.json"):
        read_iteration(tmp_path)
    with pytest.raises(NotAnIterationError, match="is not a directory"):
        read_iteration(tmp_path / "nowhere")


def test_iteration_is_finished_when_each_planned_round_is() -> None:
    done = [replace(one, status="finished") for one in ROUNDS]
    assert Iteration("dpo", "previous", 1, done).is_finished
    assert not Iteration("dpo", "previous", 1, ROUNDS).is_finished
    assert not Iteration("dpo", "previous", 2, done).is_finished
    with pytest.raises(KeyError):
        Iteration("dpo", "previous", 2, done).round(2)


@pytest.mark.parametrize("reference", ["previous", "first"])
def test_metrics_have_names_that_do_not_depend_on_the_reference(reference: str, tmp_path: Path) -> None:
    iteration = make_iteration(tmp_path, reference=reference)
    start, one, two = (round_metrics(tmp_path, iteration, number) for number in range(3))
    assert list(start.win_rates) == ["data"] and start.kl_first == start.kl == Measured(0.0, 0.0, 0.0)
    assert one.win_rates["previous"] == one.win_rates["first"] and one.kl == one.kl_first
    assert two.win_rates["previous"].value == pytest.approx(0.61)
    assert two.win_rates["first"].value == pytest.approx(0.72)
    assert two.win_rates["data"].value == pytest.approx(0.458)
    assert two.kl_first is not None and two.kl is not None
    assert two.kl_first.value == pytest.approx(6.0 if reference == "previous" else two.kl.value)
    assert two.length == Measured(54.0, 52.4, 55.6) and two.distinct_2 == Measured(0.61 - 0.08 * 2)


def test_metrics_of_an_extrapolated_policy_stand_for_its_round(tmp_path: Path) -> None:
    iteration = make_iteration(tmp_path, reference="first", extrapolated=True)
    assert not (tmp_path / "round-2" / "metrics.json").exists()
    found = round_metrics(tmp_path, iteration, 3)
    assert list(found.win_rates) == ["previous", "first", "data"]
    assert win_rate_keys(iteration, 3)["previous"] == ["win_rate/extrapolated", "win_rate/round-2"]
    file = tmp_path / "round-3" / "extrapolated" / "metrics.json"
    file.write_text(file.read_text().replace("win_rate/extrapolated", "win_rate/round-2"))
    assert round_metrics(tmp_path, iteration, 3) == found


def test_round_without_metrics_is_empty(tmp_path: Path) -> None:
    iteration = make_iteration(tmp_path, last="running")
    found = round_metrics(tmp_path, iteration, 3)
    assert not found.win_rates and found.kl is found.length is None


def test_data_is_the_opponent_of_that_name(tmp_path: Path) -> None:
    iteration = make_iteration(tmp_path)
    assert win_rate_keys(iteration, 0) == {"data": [f"win_rate/{CHOSEN}"]}
