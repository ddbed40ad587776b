"""`spo compare`: its numbers follow from the files, and unfair comparisons are rejected."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import yaml

from spo import cli
from spo.comparison.choice import better
from spo.comparison.compare import Comparison, Method, compare
from spo.comparison.refusals import find_problems
from spo.comparison.runs import CannotCompare, find_runs
from spo.comparison.scores import scores_by_prompt, share_random_numbers, win_shares
from spo.evaluation.winrate import win_rates
from spo.pages.comparison_files import columns, to_csv, to_dict, to_markdown
from spo.pages.comparison_table import print_comparison
from spo.pages.comparison_words import describe_difference, describe_duels
from spo.resources import conf_dir
from spo.stats import Bootstrap, holm
from tests.commands import TINY, spo
from tests.comparison_runs import write_run, write_sweep

QUICK = Bootstrap(draws=400)


def compared(*paths: Path, **options: Any) -> Comparison:
    return compare(find_runs(paths), bootstrap=QUICK, **options)


def method(comparison: Comparison, name: str) -> Method:
    return next(one for one in comparison.methods if one.name == name)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change each row of a JSON lines file, or the value of a JSON file."""
    if file.suffix == ".jsonl":
        rows = lines(file)
        for row in rows:
            change(row)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))


# --- what it says --------------------------------------------------------------------------------------------------


def test_estimates_are_means_over_seeds_and_prompts(tmp_path: Path) -> None:
    comparison = compared(write_sweep(tmp_path, prompts=40, samples=2))
    assert [len(one.settings) for one in comparison.methods] == [1, 1, 1]
    assert comparison.prompts == 40 and list(comparison.seeds) == [1, 2, 3] and comparison.select is None
    for name in ("spo", "dpo", "ipo"):
        runs = sorted(tmp_path.glob(f"method-{name}_*"))
        verdicts = [fmean(row["verdict"] for row in lines(run / "samples.jsonl")) for run in runs]
        metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
        estimates = method(comparison, name).estimates
        assert math.isclose(estimates["win_rate"].value, fmean(verdicts))
        for key in ("kl", "entropy", "distinct_2", "self_bleu", "length", "reward"):
            one = estimates[key]
            assert math.isclose(one.value, fmean(each[f"eval/{key}"] for each in metrics)), key
            assert one.low is not None and one.high is not None and one.low < one.value < one.high
    values = [one.estimates["win_rate"].value for one in comparison.methods]
    assert values == sorted(values, reverse=True)


def test_defaults_of_methods_may_differ(tmp_path: Path) -> None:
    """The learning rate that a method is best at is the default of the model, and no part of the initial model."""
    for method, rate in (("spo", 0.002), ("dpo", 0.001)):
        write_run(tmp_path, method=method, changes={"model.default_lr": rate, "optimizer.lr": rate})
    assert len(compared(tmp_path).methods) == 2
    write_run(tmp_path, method="ipo", changes={"model.default_lr": 0.002, "model.hidden_size": 8})
    with pytest.raises(CannotCompare, match=r"the initial model differs between runs: model.hidden_size"):
        compared(tmp_path)


@pytest.mark.parametrize("old", [None, "absent"])
def test_samples_of_earlier_versions_without_a_split_count(tmp_path: Path, old: str | None) -> None:
    named, unnamed = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    rewrite(unnamed / "samples.jsonl", lambda row: row.pop("split") if old else row.update(split=None))
    one, other = compared(tmp_path / "a"), compared(tmp_path / "b")
    assert one.prompts == other.prompts == 48 and named.name == unnamed.name
    assert one.methods[0].estimates == other.methods[0].estimates and one.methods[0].estimates["win_rate"].low


def test_best_setting_is_selected_without_the_test_split(tmp_path: Path) -> None:
    for beta, val, test in ((0.1, 0.7, 0.2), (0.2, 0.6, 0.9), (0.3, 0.65, 0.5)):
        for seed in (1, 2):
            run = write_run(tmp_path, method="dpo", seed=seed, beta=beta)
            numbers = {"val/win_rate": val + (0.1 if seed == 1 else -0.1), "eval/win_rate": test, "val/loss": beta}
            rewrite(run / "metrics.json", lambda metrics, numbers=numbers: metrics.update(numbers))
    [found] = compared(tmp_path).methods
    assert found.best.label == "beta 0.1" and len(found.settings) == 3
    assert found.best.selection is not None and math.isclose(found.best.selection, 0.7)
    assert math.isclose(found.estimates["win_rate"].value, 0.2)
    [by_loss] = compared(tmp_path, select="val/loss").methods  # of a loss, the lowest is the best
    assert by_loss.best.label == "beta 0.1"
    [by_length] = compared(tmp_path, metric="eval/length").methods
    assert by_length.best.label == "beta 0.1"


def test_selection_falls_back_with_a_note(tmp_path: Path) -> None:
    for beta in (0.1, 0.2):
        write_run(tmp_path, method="dpo", beta=beta, without=["val/win_rate", "val/reward"])
    comparison = compared(tmp_path)
    assert comparison.select == "val/rewards/accuracies"
    assert any("not all runs have val/win_rate" in note for note in comparison.notes)
    assert any("one seed" in note for note in comparison.notes)
    with pytest.raises(CannotCompare, match="favors the luckiest setting"):
        compared(tmp_path, select="eval/win_rate")
    with pytest.raises(CannotCompare, match="not all runs have it") as error:
        compared(tmp_path, select="val/win_rate")
    assert "val/rewards/accuracies" in str(error.value)


def test_setting_labels_show_varying_keys_without_derived_ones(tmp_path: Path) -> None:
    for steps in (60, 120):
        changes = {"trainer.max_steps": steps, "scheduler.num_training_steps": steps}
        write_run(tmp_path / str(steps), alpha=0.1, changes=changes)
    [found] = compared(tmp_path).methods
    assert [one.label for one in found.settings] == ["trainer.max_steps 60", "trainer.max_steps 120"]
    [alone] = compared(write_run(tmp_path / "alone", alpha=0.1)).methods
    assert alone.best.label == "alpha 0.1, beta 0.1"


def test_kl_and_entropy_scores_vary_as_samples_around_the_recorded_mean(tmp_path: Path) -> None:
    [run] = find_runs([write_run(tmp_path)]).runs
    for name in ("kl", "entropy", "win_rate_length_controlled"):
        scores = scores_by_prompt(run, name)
        assert len(scores) == 48
        assert math.isclose(fmean(scores.values()), run.record.metric(f"eval/{name}") or 0.0)
    ratio = [row["logp_policy"] - row["logp_reference"] for row in run.samples]
    assert np.allclose(np.diff(list(scores_by_prompt(run, "kl").values())), np.diff(ratio))
    assert scores_by_prompt(run, "distinct_2") == {} and scores_by_prompt(run, "unheard_of") == {}


def test_metrics_that_single_losses_add_come_last_in_the_table(tmp_path: Path) -> None:
    def add(metrics: dict[str, float]) -> None:
        metrics |= {"eval/method/gap": 0.25, "eval/reference/method/gap": 0.0, "val/method/gap": 0.5}

    rewrite(write_run(tmp_path, method="spo", alpha=0.1) / "metrics.json", add)
    without = ("eval/rewards/accuracies", "eval/rewards/margins", "val/rewards/accuracies", "val/rewards/margins")
    write_run(tmp_path, method="dpo", without=without)
    comparison = compared(tmp_path)
    assert columns(comparison)[-1] == "method/gap" and "reference/method/gap" not in columns(comparison)
    ours, theirs = (
        next(method.estimates.get("method/gap") for method in comparison.methods if method.name == name)
        for name in ("spo", "dpo")
    )
    assert ours is not None and ours.value == 0.25 and theirs is None
    print_comparison(comparison)


def test_selecting_by_a_metric_without_a_known_direction_is_noted(tmp_path: Path) -> None:
    for alpha in (0.1, 0.3):
        rewrite(
            write_run(tmp_path, alpha=alpha) / "metrics.json",
            lambda metrics, alpha=alpha: metrics.update({"val/method/gap": alpha}),
        )
    notes = compared(tmp_path, select="val/method/gap").notes
    assert "Settings were selected by the largest val/method/gap, whose better direction is unknown." in notes
    assert not any("unknown" in note for note in compared(tmp_path, select="val/reward").notes)


def test_equal_length_interval_agrees_with_the_evaluation(tmp_path: Path) -> None:
    folder = write_run(tmp_path, prompts=200)
    rows = lines(folder / "samples.jsonl")
    rates = win_rates(
        [row["verdict"] for row in rows],
        [row["tokens"] - row["reference_tokens"] for row in rows],
        [row["prompt_id"] for row in rows],
        Bootstrap(draws=1000),
    )
    rewrite(folder / "metrics.json", lambda metrics: metrics.update({f"eval/{key}": v for key, v in rates.items()}))
    one = compared(folder).methods[0].estimates["win_rate_length_controlled"]
    assert math.isclose(one.value, rates["win_rate_length_controlled"])
    assert one.low == pytest.approx(rates["win_rate_length_controlled_ci_low"], abs=0.012)
    assert one.high == pytest.approx(rates["win_rate_length_controlled_ci_high"], abs=0.012)


def test_unanswered_verdicts_are_skipped(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    rewrite(folder / "samples.jsonl", lambda row: row.update(verdict=None) if row["prompt_id"].endswith("0") else None)
    [run] = find_runs([folder]).runs
    assert len(scores_by_prompt(run, "win_rate")) == 45
    assert compared(folder).methods[0].estimates["win_rate"].low is not None


def test_samples_are_resampled_where_prompts_are_exhaustive(tmp_path: Path) -> None:
    source = {"data.source._target_": "spo.data.enumerable.EnumerableSource"}
    [run] = find_runs([write_run(tmp_path, prompts=2, samples=30, changes=source)]).runs
    assert len(scores_by_prompt(run, "win_rate")) == 60


# --- differences ---------------------------------------------------------------------------------------------------


def test_same_loss_under_two_names_shows_no_difference(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for name in ("dpo", "renamed"):
            write_run(tmp_path, method=name, seed=seed, luck=0)
    comparison = compared(tmp_path)
    [difference] = comparison.differences
    assert difference.estimate.value == 0 and difference.p == 1 and not difference.significant
    assert "no difference in win rate is shown" in describe_difference(difference, comparison)
    assert all(duel.estimate is not None and duel.estimate.value == 0.5 for duel in comparison.duels)


def test_same_loss_with_other_random_numbers_shows_no_difference(tmp_path: Path) -> None:
    found = []
    for trial in range(8):
        for seed in (1, 2, 3):
            for name in ("one", "other"):
                write_run(tmp_path / str(trial), method=name, seed=seed, lift=0.8, changes={"data.limit": trial})
        found += [difference.significant for difference in compared(tmp_path / str(trial)).differences]
    assert sum(found) <= 1


def test_differences_cover_all_pairs_or_the_baseline(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for name, lift in (("good", 2.5), ("fair", 0.6), ("poor", -0.8)):
            write_run(tmp_path, method=name, seed=seed, lift=lift, prompts=80)
    comparison = compared(tmp_path)
    assert [(one.first, one.second) for one in comparison.differences] == [
        ("good", "fair"),
        ("good", "poor"),
        ("fair", "poor"),
    ]
    assert all(one.significant and one.paired and one.p >= one.estimate.p for one in comparison.differences)  # type: ignore[operator]
    assert describe_difference(comparison.differences[0], comparison).startswith(
        "good is better than fair in win rate ("
    )
    to_fair = compared(tmp_path, baseline="fair")
    assert [(one.first, one.second) for one in to_fair.differences] == [("good", "fair"), ("poor", "fair")]
    assert describe_difference(to_fair.differences[1], to_fair).startswith("poor is worse than fair")
    with pytest.raises(CannotCompare, match="--baseline nobody: there is no run of it; the methods are"):
        compared(tmp_path, baseline="nobody")
    by_kl = compared(tmp_path, metric="eval/kl")
    assert by_kl.higher is False
    values = [one.estimates["kl"].value for one in by_kl.methods]
    assert values == sorted(values)
    with pytest.raises(CannotCompare, match="--metric eval/charm: not all runs have it; they share eval/"):
        compared(tmp_path, metric="eval/charm")


def test_non_finite_numbers_are_none(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, method=name) for name in ("one", "two")]
    rewrite(paths[1] / "metrics.json", lambda metrics: metrics.update({"eval/win_rate": math.nan, "eval/kl": math.inf}))
    comparison = compared(tmp_path)
    assert comparison.metric == "eval/reward" and "kl" not in method(comparison, "two").estimates
    assert "compared by their reward" in comparison.notes[0]
    assert "nan" not in to_csv(comparison).lower()


def test_better_direction_comes_from_the_catalogue() -> None:
    assert better("eval/win_rate") and better("val/reward") and better("val/rewards/accuracies")
    assert better("val/loss") is False and better("eval/kl") is False and better("eval/self_bleu") is False
    assert better("eval/calibration/ece") is False and better("eval/calibration/log_loss") is False
    assert better("eval/length") is None and better("eval/entropy") is None


def test_duels_compare_rewards(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, method=name, prompts=3, samples=2) for name in ("one", "two")]
    for path, rewards in zip(paths, ([1, 5, 2, 2, 9, 9], [3, 3, 2, 2, 1, 1]), strict=True):
        of_rows = iter(rewards)
        rewrite(path / "samples.jsonl", lambda row, of_rows=of_rows: row.update(reward=next(of_rows)))
    one, two = find_runs(paths).runs
    assert list(win_shares(one, two).values()) == [0.5, 0.5, 1.0]
    assert list(win_shares(two, one).values()) == [0.5, 0.5, 0.0]
    duels = {(duel.first, duel.second): duel.estimate for duel in compared(tmp_path).duels}
    assert duels["one", "two"] is not None and math.isclose(duels["one", "two"].value, 2 / 3)
    assert duels["two", "one"] is not None and math.isclose(duels["two", "one"].value, 1 / 3)


def test_samples_with_the_same_random_numbers_do_not_meet(tmp_path: Path) -> None:
    """Sample i of equal seeds is alike in both runs: it meets samples of other numbers, or those of other seeds."""
    paths = [write_run(tmp_path / "two", method=name, prompts=1, samples=2) for name in ("one", "two")]
    for path, rewards in zip(paths, ([5, 2], [4, 3]), strict=True):
        of_rows = iter(rewards)
        rewrite(path / "samples.jsonl", lambda row, of_rows=of_rows: row.update(reward=next(of_rows)))
    # 5 meets 3 and 2 meets 4. All four comparisons would have the same mean by chance, so one more reward is changed.
    assert list(win_shares(*find_runs(paths).runs).values()) == [0.5]
    of_rows = iter([3, 3])
    rewrite(paths[0] / "samples.jsonl", lambda row: row.update(reward=next(of_rows)))
    assert list(win_shares(*find_runs(paths).runs).values()) == [0.25]  # 3 meets 3, and 3 meets 4.

    rewards = {("one", 1): 2, ("one", 2): 4, ("two", 1): 1, ("two", 2): 3}
    for (name, seed), reward in rewards.items():
        path = write_run(tmp_path / "single", method=name, seed=seed, prompts=2, samples=1)
        rewrite(path / "samples.jsonl", lambda row, reward=reward: row.update(reward=reward))
    comparison = compared(tmp_path / "single")
    duels = {(duel.first, duel.second): duel.estimate for duel in comparison.duels}
    assert duels["one", "two"] is not None and duels["one", "two"].value == 0.5  # 2 loses to 3, and 4 beats 1.
    assert not any("random numbers" in note for note in comparison.notes)
    one_seed = compared(*(tmp_path / "single").glob("*seed-1*"))
    assert any("random numbers" in note for note in one_seed.notes)
    # One seed against two: the run whose only opponent has its random numbers is left out.
    paths = [*(tmp_path / "single").glob("*two*"), *(tmp_path / "single").glob("*one*seed-1*")]
    against_one = compared(*paths, anyway=True)
    duels = {(duel.first, duel.second): duel.estimate for duel in against_one.duels}
    assert duels["one", "two"] is not None and duels["one", "two"].value == 0  # 2 loses to 3.
    assert not any("random numbers" in note for note in against_one.notes)


def test_a_missing_reward_does_not_let_equal_random_numbers_meet(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, method=name, prompts=1, samples=3) for name in ("one", "two")]
    for path, rewards in zip(paths, ([math.nan, 1, 5], [2, 1, 5]), strict=True):
        of_rows = iter(rewards)
        rewrite(path / "samples.jsonl", lambda row, of_rows=of_rows: row.update(reward=next(of_rows)))
    # 1 meets 2 and 5 and loses; 5 meets 2 and 1 and wins.
    assert list(win_shares(*find_runs(paths).runs).values()) == [0.5]
    assert list(win_shares(*reversed(find_runs(paths).runs)).values()) == pytest.approx([(0.5 + 0 + 1) / 3])


def test_samples_of_all_prompts_meet_the_next_number(tmp_path: Path) -> None:
    changes = {"data.source._target_": "spo.data.EnumerableSource"}
    paths = [write_run(tmp_path, method=name, prompts=1, samples=3, changes=changes) for name in ("one", "two")]
    for path, rewards in zip(paths, ([1, 2, 3], [1, 2, 3]), strict=True):
        of_rows = iter(rewards)
        rewrite(path / "samples.jsonl", lambda row, of_rows=of_rows: row.update(reward=next(of_rows)))
    assert list(win_shares(*find_runs(paths).runs).values()) == [0.0, 0.0, 1.0]


def test_duels_are_corrected_and_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2, 3):
        for name, lift in (("good", 3.0), ("fair", 0.5), ("equal", 0.5)):
            write_run(tmp_path, method=name, seed=seed, lift=lift, prompts=80)
    comparison = compared(tmp_path)
    duels = {(duel.first, duel.second): duel for duel in comparison.duels}
    pairs = [("good", "fair"), ("good", "equal"), ("fair", "equal")]
    alone = [duels[pair].estimate.p for pair in pairs]  # type: ignore[union-attr]
    assert [duels[pair].p for pair in pairs] == holm(alone)  # type: ignore[arg-type]
    assert all(duels[one, two].p == duels[two, one].p for one, two in pairs)
    assert [duels[pair].significant for pair in pairs] == [True, True, False]
    one, other = duels["good", "fair"].estimate, duels["fair", "good"].estimate
    assert one is not None and other is not None and one.low is not None
    assert one.value + other.value == pytest.approx(1) and one.low + (other.high or 0) == pytest.approx(1)
    words = describe_duels(comparison)
    assert words.startswith("Head to head, good beats ") and "no difference is shown between" in words
    print_comparison(comparison)
    assert words[:40] in " ".join(capsys.readouterr().out.split())
    assert words in to_markdown(comparison) and to_dict(comparison)["head_to_head"] == words
    of_json = next(one for one in to_dict(comparison)["win_matrix"] if one["first"] == "good")
    assert of_json["p_corrected"] == duels["good", of_json["second"]].p and of_json["significant"]


def test_two_seeds_explain_wide_intervals(tmp_path: Path) -> None:
    two = compared(write_sweep(tmp_path / "two", seeds=(1, 2), prompts=12))
    assert any("Two seeds make wide intervals" in note for note in two.notes)
    assert "Two seeds make wide intervals" in to_markdown(two)
    three = compared(write_sweep(tmp_path / "three", seeds=(1, 2, 3), prompts=12))
    assert not any("wide" in note for note in three.notes)
    write_run(tmp_path / "mixed", method="one", seed=1)
    for seed in (1, 2, 3):
        write_run(tmp_path / "mixed", method="three", seed=seed)
    mixed = compared(tmp_path / "mixed", anyway=True)
    assert any(note.startswith("One seed of one:") for note in mixed.notes)


def evaluate_against(run: Path, opponent: Path, shares: list[float | None], **changes: Any) -> None:
    """Write the files of `spo evaluate RUN evaluation.against=[OPPONENT]`, with changes to the configuration."""
    folder = run / "evaluations" / f"{len(list(run.glob('evaluations/*')))}"
    folder.mkdir(parents=True)
    shutil.copy(run / "samples.jsonl", folder)
    verdicts = iter(shares)
    rewrite(folder / "samples.jsonl", lambda row: row.update(opponents={opponent.name: {"verdict": next(verdicts)}}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluation"]["against"] = [str(opponent)]
    for group, values in changes.items():
        config.setdefault(group, {}).update(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_duels_use_the_verdicts_of_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_run(tmp_path, method=name, prompts=4, judge=False) for name in ("one", "two")]
    with pytest.raises(CannotCompare, match="neither eval/win_rate nor eval/reward"):
        compared(tmp_path)
    assert all(duel.estimate is None for duel in compared(tmp_path, metric="eval/kl").duels)
    monkeypatch.chdir(tmp_path)
    evaluate_against(paths[0], paths[1].relative_to(tmp_path), [1.0, 0.5, None, 0.0], judge={"cache": "elsewhere"})
    one, two = find_runs(paths).runs
    assert list(win_shares(one, two).values()) == [1.0, 0.5, 0.0]
    assert list(win_shares(two, one).values()) == [0.0, 0.5, 1.0]


def test_verdicts_of_independent_samples_take_precedence(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path, method=name, prompts=4, judge=False) for name in ("one", "two"))
    evaluate_against(one, two, [1.0, 1.0, 1.0, 1.0])
    assert list(win_shares(*find_runs([one, two]).runs).values()) == [1.0, 1.0, 1.0, 1.0]
    assert share_random_numbers(*find_runs([one, two]).runs)
    evaluate_against(two, one, [1.0, 0.5, 0.0, 0.0], evaluation={"seed": 9})
    found = find_runs([one, two]).runs
    assert list(win_shares(*found).values()) == [0.0, 0.5, 1.0, 1.0]
    assert list(win_shares(*reversed(found)).values()) == [1.0, 0.5, 0.0, 0.0]
    assert not share_random_numbers(*found)


def test_verdicts_of_a_moved_iteration_are_found(tmp_path: Path) -> None:
    own, old = tmp_path / "own", tmp_path / "old"
    one, two = (write_run(own, method=name, prompts=4, judge=False) for name in ("one", "two"))
    evaluate_against(one, old / two.name, [1.0, 0.5, 0.0, 0.0], paths={"iteration": str(old)})
    assert win_shares(*find_runs([one, two]).runs) == {}
    (own / "iterate.json").touch()
    assert list(win_shares(*find_runs([one, two]).runs).values()) == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "changes",
    [{"judge": {"model": "another"}}, {"evaluation": {"temperature": 0.5}}, {"data": {"path": "others.jsonl"}}],
    ids=["judge", "evaluation", "data"],
)
def test_duels_ignore_verdicts_of_other_settings(tmp_path: Path, changes: dict[str, Any]) -> None:
    paths = [write_run(tmp_path, method=name, prompts=4, judge=False) for name in ("one", "two")]
    evaluate_against(*paths, [1.0, 1.0, 1.0, 1.0], **changes)
    one, two = find_runs(paths).runs
    assert win_shares(one, two) == {} and win_shares(two, one) == {}
    evaluate_against(*paths, [0.0, 0.0, 0.0, 0.0])
    one, two = find_runs(paths).runs
    assert set(win_shares(one, two).values()) == {0.0} and set(win_shares(two, one).values()) == {1.0}


def test_duels_tell_opponents_of_equal_names_apart(tmp_path: Path) -> None:
    one = write_run(tmp_path / "first", method="one", prompts=4, judge=False)
    two = write_run(tmp_path / "first", method="two", prompts=4, judge=False)
    namesake = write_run(tmp_path / "second", method="two", prompts=4, judge=False, changes={"optimizer.lr": 0.1})
    assert two.name == namesake.name
    evaluate_against(one, namesake, [1.0, 1.0, 1.0, 1.0])
    found = find_runs([one, two, namesake]).runs
    assert win_shares(found[0], found[1]) == {} and len(win_shares(found[0], found[2])) == 4


# --- reading -------------------------------------------------------------------------------------------------------


def test_same_run_counts_once(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", seeds=(1, 2))
    first = next(sweep.glob("method-spo*"))
    shutil.copytree(first, tmp_path / "elsewhere" / "copy")
    shutil.copytree(first, sweep / f"{first.name}.1")  # what rerun=true moved aside
    (sweep / "comparison").mkdir()
    found = find_runs([sweep, first, tmp_path / "elsewhere"])
    assert len(found.runs) == 6
    assert [note for note in found.notes if "are the same run, which counts once" in note]
    assert all(len(one.best.runs) == 2 for one in compare(found, bootstrap=QUICK).methods)


def test_paths_without_a_run_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CannotCompare) as error:
        find_runs([tmp_path / "empty", tmp_path / "absent"])
    assert "2 problems" in str(error.value)
    assert "there is no run in it" in str(error.value) and "there is no such directory" in str(error.value)
    broken = write_run(tmp_path / "sweep")
    (broken / "identity.json").write_text("{")
    assert find_runs([tmp_path / "sweep"]).problems == [f"{broken.name}: its identity.json cannot be read"]


# --- refusing ------------------------------------------------------------------------------------------------------


def test_fair_comparison_has_no_problem(tmp_path: Path) -> None:
    assert not compared(write_sweep(tmp_path, grid=True, seeds=(1, 2), prompts=12)).problems


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.devices", 2),
        ("evaluation.batch_size", 8),
        ("callbacks.health.limit", 1),
        *((f"judge.{name}", 1) for name in ("cache", "concurrency", "requests_per_minute", "timeout_s", "max_retries")),
        *((f"judge.{name}", 1) for name in ("batch_size", "device", "input_price", "output_price")),
    ],
)
def test_operational_keys_do_not_make_another_setting(tmp_path: Path, key: str, value: Any) -> None:
    sweep = write_sweep(tmp_path, seeds=(1, 2))
    spoil_config(key, value)(sweep)
    assert not find_problems(find_runs([sweep]))


def spoil_budget(sweep: Path) -> None:
    write_run(sweep, method="dpo", beta=0.5, seed=1)
    write_run(sweep, method="dpo", beta=0.5, seed=2)


def spoil_config(key: str, value: Any) -> Callable[[Path], None]:
    def spoil(sweep: Path) -> None:
        shutil.rmtree(next(sweep.glob("method-ipo*seed-1")))
        write_run(sweep, method="ipo", seed=1, changes={key: value})

    return spoil


def spoil_trained(steps: int, pairs: int | None = None, **how: Any) -> Callable[[Path], None]:
    def spoil(sweep: Path) -> None:
        for seed in (1, 2):
            shutil.rmtree(next(sweep.glob(f"method-ipo*seed-{seed}")))
            trained = {"trained/steps": steps, "trained/pairs": 32 * steps if pairs is None else pairs}
            write_run(sweep, method="ipo", seed=seed, trained=trained, **how)

    return spoil


def spoil_old_history(sweep: Path) -> None:
    """Make all runs like those of version 0.1.0, and stop one of them early."""
    for run in sweep.glob("method-*"):
        metrics = json.loads((run / "metrics.json").read_text())
        kept = {key: value for key, value in metrics.items() if not key.startswith("trained/")}
        (run / "metrics.json").write_text(json.dumps(kept))
    file = next(sweep.glob("method-ipo*seed-1")) / "history.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:9]))


def spoil_digest(sweep: Path) -> None:
    shutil.rmtree(next(sweep.glob("method-ipo*seed-1")))
    write_run(sweep, method="ipo", seed=1, provenance={"pairs_sha256": "ef" * 32})


def spoil_prompts(sweep: Path) -> None:
    file = next(sweep.glob("method-ipo*seed-1")) / "samples.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))


def spoil_run(**how: Any) -> Callable[[Path], None]:
    def spoil(sweep: Path) -> None:
        shutil.rmtree(next(sweep.glob("method-ipo*seed-1")))
        write_run(sweep, method="ipo", seed=1, finished=False, **how)

    return spoil


def spoil_code(sweep: Path) -> None:
    run = next(sweep.glob("method-ipo*seed-1"))
    shutil.copytree(run, sweep / "again")
    rewrite(sweep / "again" / "identity.json", lambda identity: identity.update(code="0.2.0+ff", digest="other"))


def spoil_job(sweep: Path) -> None:
    job = {
        "overrides": ["method=kto", "seed=1"],
        "directory": "method-kto",
        "status": "failed",
        "error": "no such loss",
    }
    (sweep / "sweep.json").write_text(json.dumps({"command": "", "jobs": [{**job, "same_as": None}]}))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (spoil_budget, "the numbers of settings tried differ: dpo 2, ipo 1, spo 1"),
        (lambda sweep: shutil.rmtree(next(sweep.glob("method-dpo*seed-2"))), "dpo: it lacks seed 2"),
        (spoil_digest, "the preference pairs are not the same for all runs (cdcdcdcd: "),
        (spoil_config("data.seed", 1), "the data differs between runs: data.seed (0 or 1)"),
        (spoil_config("sft.max_steps", 1), "the initial model differs between runs: sft.max_steps (1 or 300)"),
        (spoil_config("judge._target_", "x"), "the evaluation differs between runs: judge._target_ ("),
        (spoil_config("trainer.max_steps", 9), "the methods were trained for different lengths: "),
        (
            spoil_trained(18),
            "the methods were trained for different lengths: dpo 60 steps on 1,920 pairs, ipo 18 steps on 576 pairs",
        ),
        (spoil_trained(60, 1900), "dpo 60 steps on 1,920 pairs, ipo 60 steps on 1,900 pairs, spo 60 steps on 1,920"),
        (
            spoil_old_history,
            "dpo 60 steps of 32 pairs, ipo 18 steps of 32 pairs (seed 1), 60 steps of 32 pairs (seed 2), spo 60 steps",
        ),
        (spoil_prompts, "the test prompts are not the same for all runs (48 samples: "),
        (spoil_run(), "seed-1 is unfinished, at step 30"),
        (spoil_run(error="the loss is not finite"), "seed-1 is failed: the loss is not finite"),
        (spoil_code, "have the same setting and seed but are different runs (the code of spo differs)"),
        (spoil_job, "the job method=kto seed=1 is failed: no such loss"),
    ],
)
def test_unfair_comparison_is_rejected_or_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], words: str
) -> None:
    sweep = write_sweep(tmp_path, seeds=(1, 2))
    spoil(sweep)
    with pytest.raises(CannotCompare) as error:
        compared(sweep)
    assert words in str(error.value) and "add --anyway" in str(error.value)
    comparison = compared(sweep, anyway=True)
    print_comparison(comparison)
    flat = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert words[:20] in flat and "not a fair comparison" in flat and "(!)" in flat
    for text in (to_csv(comparison), to_markdown(comparison), json.dumps(to_dict(comparison), ensure_ascii=False)):
        assert words.replace('"', '\\"')[:40] in text


def test_seeds_may_draw_training_pairs_of_their_own(tmp_path: Path) -> None:
    def sweep(folder: Path, digest_of: Callable[[str, int], str]) -> Path:
        for method, seed in product(("spo", "ipo"), (1, 2)):
            inputs = {"pairs_sha256": digest_of(method, seed)}
            changes = {"data.num_pairs": 128, "data.subset_seed": seed}
            write_run(folder, method=method, seed=seed, provenance=inputs, changes=changes)
        return folder

    assert not compared(sweep(tmp_path / "fair", lambda _, seed: f"{seed}" * 64)).problems
    with pytest.raises(CannotCompare, match=r"pairs are not the same for all runs of a seed \(1i1i1i1i: .*seed-1"):
        compared(sweep(tmp_path / "unfair", lambda method, seed: f"{seed}{method[0]}" * 32))


def test_all_problems_are_reported_with_exit_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_sweep(tmp_path, seeds=(1, 2))
    for spoil in (spoil_budget, spoil_prompts, spoil_job):
        spoil(sweep)
    assert cli.main(["compare", str(sweep)]) == 1
    message = capsys.readouterr().err
    assert "the comparison has 3 problems:" in message and not (sweep / "comparison").exists()
    assert cli.main(["compare", str(sweep), "--anyway"]) == 0
    assert "not a fair comparison" in capsys.readouterr().out
    assert "This is not a fair comparison" in (sweep / "comparison" / "comparison.html").read_text()


def test_methods_without_a_finished_run_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, method="dpo")
    write_run(tmp_path, method="ipo", finished=False)
    comparison = compared(tmp_path, anyway=True)
    assert [one.name for one in comparison.methods] == ["dpo"]
    assert "ipo does not have a finished run" in comparison.notes
    shutil.rmtree(next(tmp_path.glob("method-dpo*")))
    with pytest.raises(CannotCompare, match="no run is finished"):
        compared(tmp_path, anyway=True)


# --- outputs -------------------------------------------------------------------------------------------------------


def test_csv_json_and_markdown_contain_the_same_numbers(tmp_path: Path) -> None:
    comparison = compared(write_sweep(tmp_path, grid=True, seeds=(1, 2), prompts=20))
    plain = json.loads(json.dumps(to_dict(comparison)))
    table = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert [row["method"] for row in table] == [one["name"] for one in plain["methods"]]
    for row, of_json in zip(table, plain["methods"], strict=True):
        assert row["setting"] == of_json["best"] and int(row["trials"]) == of_json["trials"] == 9
        assert float(row["win_rate"]) == of_json["metrics"]["win_rate"]["value"]
        assert float(row["kl_low"]) == of_json["metrics"]["kl"]["low"]
        assert sum(setting["best"] for setting in of_json["settings"]) == 1
        assert all(len(setting["runs"]) == 2 for setting in of_json["settings"])
    assert plain["select"] == "val/win_rate" and len(plain["differences"]) == 3 and len(plain["win_matrix"]) == 6
    markdown = to_markdown(comparison)
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len(rows) == 5 and len({row.count("|") for row in rows}) == 1
    assert f"{method(comparison, 'dpo').estimates['win_rate'].value:.3f} [" in markdown
    assert all(one["words"] in markdown for one in plain["differences"])


def test_tables_hold_no_commands_for_the_terminal(tmp_path: Path) -> None:
    write_run(tmp_path, method="spo", changes={"method.name": "a\x1b[2J\x07b"})
    write_run(tmp_path, method="dpo")
    comparison = compared(tmp_path, anyway=True)
    for text in (to_csv(comparison), to_markdown(comparison)):
        assert "a␛[2J␇b" in text and "\x1b" not in text and "\x07" not in text


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "-", "dpo", "a=b"])
def test_csv_cells_are_text_to_a_spreadsheet(name: str, tmp_path: Path) -> None:
    write_run(tmp_path, method="spo", changes={"method.name": name})
    write_run(tmp_path, method="dpo")
    comparison = compared(tmp_path, anyway=True)
    found = {row["method"] for row in csv.DictReader(io.StringIO(to_csv(comparison), newline=""))}
    assert found == {"dpo", name if name in ("dpo", "a=b") else f"'{name}".replace("\r", " ")}
    rows = list(csv.reader(io.StringIO(to_csv(comparison), newline="")))
    for cell in (cell for row in rows for cell in row if cell[:1] in tuple("=+-@\t\r")):
        float(cell)  # Only a negative number may begin so.


def test_compare_writes_next_to_the_runs_or_into_the_given_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = write_sweep(Path("sweep"), seeds=(1,), prompts=12)
    assert cli.main(["compare", "sweep"]) == 0
    names = {"comparison.html", "comparison.json", "comparison.md", "table.csv"}
    assert {file.name for file in (sweep / "comparison").iterdir()} == names
    out = capsys.readouterr().out
    assert "win rate" in out and "sweep/comparison/comparison.html" in out
    again = {file.name: file.read_bytes() for file in (sweep / "comparison").iterdir()}
    runs = [str(path) for path in sorted(sweep.glob("method-*"))]
    assert cli.main(["compare", *runs, "--out", "here", "--baseline", "dpo"]) == 0
    assert {file.name for file in Path("here").iterdir()} == names
    assert cli.main(["compare", *runs]) == 0  # the same runs: the same files, byte by byte
    assert {file.name: file.read_bytes() for file in (sweep / "comparison").iterdir()} == again
    assert cli.main(["compare"]) == 2
    assert "usage: spo compare SWEEP_OR_RUN" in capsys.readouterr().err


@pytest.mark.slow
def test_sweep_of_one_loss_under_two_names_end_to_end(tmp_path: Path, cache_dir: Path) -> None:
    twin = tmp_path / "conf" / "method" / "twin.yaml"
    twin.parent.mkdir(parents=True)
    twin.write_text((conf_dir() / "method" / "dpo.yaml").read_text().replace("name: dpo", "name: twin"))
    words = ["train", "--config-dir", "conf", "-m", TINY, "method=dpo,twin", "seed=1,2"]
    spo(*words, "logger=record", "hydra.sweep.dir=sweep", folder=tmp_path, cache=cache_dir)
    done = spo("compare", "sweep", folder=tmp_path, cache=cache_dir)
    assert "no difference in win rate is shown (0, p = 1.00)" in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "sweep" / "comparison" / "comparison.json").read_text())
    assert found["problems"] == [] and [one["name"] for one in found["methods"]] == ["dpo", "twin"]
    assert found["methods"][0]["metrics"] == found["methods"][1]["metrics"]
    assert all(one["win_rate"]["value"] == 0.5 for one in found["win_matrix"])
