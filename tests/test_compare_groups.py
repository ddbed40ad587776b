"""Groups of `spo compare`: by method and choice, by any keys, with edges of grids and the costs of training."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import spo
from spo import cli
from spo.comparison.choices import members
from spo.comparison.compare import Comparison, compare
from spo.comparison.groups import group_runs
from spo.comparison.runs import CannotCompare, find_runs
from spo.config.compose import compose
from spo.config.groups import group_members
from spo.pages.comparison_files import to_csv, to_dict, to_markdown
from spo.pages.comparison_page import write_page
from spo.pages.comparison_table import print_comparison
from spo.pages.comparison_words import describe_difference, describe_differences
from spo.pages.sweep_table import print_sweep
from spo.records.sweep import SweepJob
from spo.resources import conf_dir
from spo.stats import Bootstrap
from tests.comparison_runs import write_run
from tests.test_reports import Page

OLD = Path(__file__).parent / "old_runs" / "0.1.0"
CLASSES = {"global_kl": "GlobalKL", "local_kl": "LocalKL", "none": "NoRegularizer"}


def write(folder: Path, method: str, regularizer: str, seed: int = 1, **settings: Any) -> Path:
    """Write a run with a regularizer, in a folder of its own."""
    target = f"spo.regularizers.{CLASSES.get(regularizer, regularizer)}"
    changes = {"regularizer._target_": target, **settings.pop("changes", {})}
    place = folder / "-".join([regularizer, *(str(value).replace("/", "_") for value in changes.values())])[:80]
    return write_run(place, method=method, seed=seed, changes=changes, prompts=12, **settings)


def ablation(folder: Path, arms: Iterable[tuple[str, str]], seeds: Iterable[int] = (1, 2), **settings: Any) -> Path:
    """Write a sweep over pairs of a method and a regularizer."""
    for method, regularizer in arms:
        for seed in seeds:
            write(folder, method, regularizer, seed, **settings)
    return folder


def compared(*paths: Path, **options: Any) -> Comparison:
    return compare(find_runs(paths), bootstrap=Bootstrap(draws=200), **options)


def names(comparison: Comparison) -> set[str]:
    return {method.name for method in comparison.methods}


def refusal(*paths: Path, **options: Any) -> str:
    with pytest.raises(CannotCompare) as error:
        compared(*paths, **options)
    return str(error.value)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- the default ---------------------------------------------------------------------------------------------------


def test_choices_that_differ_within_a_method_are_groups(tmp_path: Path) -> None:
    ablation(tmp_path, [("spo", "global_kl"), ("spo", "local_kl"), ("dpo", "none")])
    comparison = compared(tmp_path)
    assert names(comparison) == {"spo, global_kl", "spo, local_kl", "dpo"}
    titles = {method.name: method.title for method in comparison.methods}
    assert titles["spo, local_kl"] == "Soft Preference Optimization, local_kl"
    assert titles["dpo"] == "Direct Preference Optimization"
    for method in comparison.methods:
        chosen = {run.config["regularizer._target_"] for run in method.best.runs}
        assert len(chosen) == 1 and len(method.settings) == 1 and method.best.seeds == [1, 2]
    markdown = to_markdown(comparison)
    assert "differ in their choice of regularizer are groups of their own" in markdown
    assert re.search(r'- "spo, \w+_kl" and "spo, \w+_kl": no difference in win rate is shown', markdown)
    page = Page(write_page(comparison, tmp_path / "page")).text
    assert '"spo, global_kl"' in page and '"spo, local_kl"' in page


def test_choice_that_follows_from_the_method_does_not_split_names(tmp_path: Path) -> None:
    ablation(tmp_path, [("spo", "global_kl"), ("dpo", "none"), ("ipo", "none")])
    comparison = compared(tmp_path)
    assert names(comparison) == {"spo", "dpo", "ipo"}
    assert comparison.groups.choices == () and "groups of their own" not in to_markdown(comparison)


def test_coefficient_that_a_choice_leaves_unread_does_not_split_names(tmp_path: Path) -> None:
    """Without a regularizer, nothing of SPO reads beta, so its runs do not have the group."""
    for regularizer in ("global_kl", "none"):
        for seed in (1, 2):
            run = write(tmp_path, "spo", regularizer, seed)
            if regularizer == "none":
                for name in ("identity.json", "config.yaml", "composed.yaml"):
                    _without(run / name, "beta")
    assert names(compared(tmp_path)) == {"spo, global_kl", "spo, regularizer none"}


def _without(file: Path, group: str) -> None:
    if not file.is_file():
        return
    content = yaml.safe_load(file.read_text())
    config = content.get("config", content)
    for key in [key for key in config if key.partition(".")[0] == group]:
        del config[key]
    file.write_text(json.dumps(content))


def test_many_differences_that_are_not_significant_are_counted(tmp_path: Path) -> None:
    for method in ("aa", "bb", "cc", "dd", "ee", "ff"):
        for seed in (1, 2):
            write_run(tmp_path, method=method, seed=seed, luck=seed, lift=0.5)
    comparison = compared(tmp_path)
    assert len(comparison.differences) == 15
    ((words, significant),) = describe_differences(comparison)
    assert "other 15 differences" in words and not significant
    few = replace(comparison, differences=comparison.differences[:10])
    assert [words for words, _ in describe_differences(few)] == [
        describe_difference(one, few) for one in few.differences
    ]


def test_numbers_stay_settings_within_each_choice(tmp_path: Path) -> None:
    for beta in (0.1, 0.2):
        ablation(tmp_path, [("spo", "global_kl"), ("spo", "local_kl")], beta=beta)
    comparison = compared(tmp_path)
    assert {method.name: len(method.settings) for method in comparison.methods} == {
        "spo, global_kl": 2,
        "spo, local_kl": 2,
    }
    assert {method.best.label for method in comparison.methods} <= {"beta 0.1", "beta 0.2"}


def test_unequal_numbers_of_settings_of_choices_are_refused_with_the_remedy(tmp_path: Path) -> None:
    ablation(tmp_path, [("spo", "global_kl"), ("spo", "local_kl")])
    ablation(tmp_path, [("spo", "global_kl")], beta=0.2)
    text = refusal(tmp_path)
    assert 'the numbers of settings tried differ: "spo, global_kl" 2, "spo, local_kl" 1' in text
    assert "with --by method, the choices of regularizer are settings of a method" in text
    [method] = compared(tmp_path, by="method").methods
    assert method.name == "spo" and len(method.settings) == 3


def test_equal_words_of_two_choices_keep_their_keys(tmp_path: Path) -> None:
    schedules = ("Constant", "Linear")
    for alpha in schedules:
        for beta in schedules:
            targets = {"alpha._target_": f"spo.schedules.{alpha}", "beta._target_": f"spo.schedules.{beta}"}
            write(tmp_path, "spo", "global_kl", changes=targets)
    expected = {f"spo, alpha {one}, beta {two}" for one in ("constant", "linear") for two in ("constant", "linear")}
    assert names(compared(tmp_path)) == expected


def test_values_that_the_user_changed_do_not_make_another_member(tmp_path: Path) -> None:
    for member in ("cpu", "gpu"):
        values = yaml.safe_load((conf_dir() / "trainer" / f"{member}.yaml").read_text())
        values["_target_"] = "lightning.pytorch.Trainer"
        del values["defaults"]
        write(tmp_path / member, "spo", "global_kl", changes={f"trainer.{key}": values[key] for key in sorted(values)})
    found = find_runs([tmp_path]).runs
    assert set(members(found, "trainer").values()) == {"cpu", "gpu"} and len({run.key for run in found}) == 2
    comparison = compared(tmp_path, anyway=True)
    assert names(comparison) == {"spo"} and len(comparison.methods[0].settings) == 2
    for run in found:  # the user chose them after all
        edit(run.path / "provenance.json", command=f"spo train trainer={run.path.parent.parent.name}")
    assert names(compared(tmp_path, anyway=True)) == {"spo, cpu", "spo, gpu"}


def test_own_member_of_a_shipped_class_is_a_group_of_its_own(tmp_path: Path) -> None:
    for name in ("global_kl", "mine"):
        run = write(tmp_path / name, "spo", "global_kl", changes={"regularizer.weight": len(name)})
        edit(run / "provenance.json", command=f"spo train --config-dir conf regularizer={name} seed=1")
    assert names(compared(tmp_path)) == {"spo, global_kl", "spo, mine"}


# --- members -------------------------------------------------------------------------------------------------------


def test_member_that_an_override_names_counts(tmp_path: Path) -> None:
    runs = [write(tmp_path, "spo", regularizer) for regularizer in ("global_kl", "mine.Near")]
    mine = runs[1].parent
    moved = mine.rename(tmp_path / "sweep")  # jobs of a sweep lie beside its ledger
    job = {
        "overrides": ["method=spo", "regularizer=near", "alpha=0.1"],
        "directory": runs[1].name,
        "status": "finished",
    }
    (moved / "sweep.json").write_text(json.dumps({"command": "", "jobs": [job]}))
    # A preset chose the same member in another run, which has no override of it.
    write(tmp_path / "preset", "spo", "mine.Near", changes={"optimizer.lr": 0.5})
    found = find_runs([tmp_path]).runs
    chosen = {str(run.path.relative_to(tmp_path).parts[0]): name for run, name in members(found, "regularizer").items()}
    assert chosen["sweep"] == chosen["preset"] == "near" and set(chosen.values()) == {"near", "global_kl"}
    assert set(members(found, "alpha").values()) == {None}  # the runs do not read it
    (moved / "sweep.json").unlink()
    assert "Near" in members(find_runs([tmp_path]).runs, "regularizer").values()
    edit(moved / runs[1].name / "provenance.json", command="spo train regularizer=near seed=1")
    assert "near" in members(find_runs([tmp_path]).runs, "regularizer").values()


def test_members_are_found_in_old_runs() -> None:
    found = find_runs([OLD / "sweep"]).runs
    assert {run.method: name for run, name in members(found, "regularizer").items()} == {
        "spo": "global_kl",
        "dpo": "none",
    }
    assert set(members(found, "data").values()) == {"stories"} and set(members(found, "judge").values()) == {"gold"}
    assert {method.name for method in compared(OLD / "sweep").methods} == {"spo", "dpo"}
    by = compared(OLD / "sweep", by="method,regularizer")
    assert names(by) == {"spo, global_kl", "dpo, regularizer none"}


@pytest.mark.slow
@pytest.mark.parametrize("group", ["alpha", "beta", "data", "judge", "model", "optimizer", "reference", "regularizer"])
def test_shipped_members_are_found_by_what_runs_record(group: str, tmp_path: Path) -> None:
    shipped = group_members([conf_dir()])[group]
    for member in shipped:
        run = write_run(tmp_path / member, changes={f"{group}._target_": member})
        cfg = compose([f"{group}={member}", *(["data=enumerable"] if member == "tabular" else [])])
        composed = OmegaConf.to_container(cfg, resolve=False)
        (run / "composed.yaml").write_text(yaml.safe_dump(composed))
    found = members(find_runs([tmp_path]).runs, group)
    assert {run.path.parent.name: name for run, name in found.items()} == {member: member for member in shipped}


# --- by keys -------------------------------------------------------------------------------------------------------


def test_by_regularizer_groups_one_method(tmp_path: Path) -> None:
    ablation(tmp_path, [("spo", "global_kl"), ("spo", "local_kl")])
    comparison = compared(tmp_path, by="regularizer", baseline="local_kl")
    assert names(comparison) == {"global_kl", "local_kl"}
    assert [(one.first, one.second) for one in comparison.differences] == [("global_kl", "local_kl")]
    assert to_dict(comparison)["by"] == ["regularizer"]
    assert "| group | best setting |" in to_markdown(comparison) and "made by regularizer." in to_markdown(comparison)


def test_methods_inside_of_a_group_are_refused(tmp_path: Path) -> None:
    arms = [(method, regularizer) for method in ("spo", "dpo") for regularizer in ("local_kl", "none")]
    ablation(tmp_path, arms)
    text = refusal(tmp_path, by="regularizer")
    assert "local_kl mixes the methods dpo, spo: write --by method,regularizer" in text
    marked = compared(tmp_path, by="regularizer", anyway=True)
    assert names(marked) == {"local_kl", "regularizer none"} and all(method.problems for method in marked.methods)
    for by in ("method,regularizer", ["method", "regularizer"]):
        assert names(compared(tmp_path, by=by)) == {
            f"{method}, {regularizer}" for method in ("spo", "dpo") for regularizer in ("local_kl", "regularizer none")
        }


def numbers_of_pairs(folder: Path, **changes: Any) -> Path:
    """Write runs with two numbers of pairs, where the digests of the pairs and a key of the source follow."""
    for pairs in (128, 512):
        for seed in (1, 2):
            keys = {"data.num_pairs": pairs, "data.source.num_pairs": pairs, **changes}
            digest = {"pairs_sha256": f"{pairs}" * 16}
            run = write(folder, "spo", "global_kl", seed, changes=keys, provenance=digest)
            composed = yaml.safe_load((run / "composed.yaml").read_text())
            composed["data"]["source"]["num_pairs"] = "${data.num_pairs}"
            (run / "composed.yaml").write_text(yaml.safe_dump(composed))
    return folder


def test_keys_that_groups_are_made_by_may_differ(tmp_path: Path) -> None:
    numbers_of_pairs(tmp_path)
    text = refusal(tmp_path)
    assert "the data differs between runs: data.num_pairs (128 or 512), data.source.num_pairs" in text
    assert "the preference pairs are not the same" in text
    comparison = compared(tmp_path, by="data.num_pairs")
    assert names(comparison) == {"data.num_pairs 128", "data.num_pairs 512"} and not comparison.problems
    assert [len(method.settings) for method in comparison.methods] == [1, 1]


def test_other_data_and_other_prompts_are_refused_in_groups_too(tmp_path: Path) -> None:
    numbers_of_pairs(tmp_path)
    runs = sorted(run.path for run in find_runs([tmp_path]).runs)
    edit(runs[0] / "provenance.json", inputs={"reference_sha256": "ab" * 32, "pairs_sha256": "other"})
    assert "the preference pairs are not the same for all runs (" in refusal(tmp_path, by="data.num_pairs")
    edit(runs[0] / "provenance.json", inputs={"reference_sha256": "other", "pairs_sha256": "128" * 16})
    assert "the reference models are not the same for all runs" in refusal(tmp_path, by="data.num_pairs")
    edit(runs[0] / "provenance.json", inputs={"reference_sha256": "ab" * 32, "pairs_sha256": "128" * 16})
    assert not compared(tmp_path, by="data.num_pairs").problems
    samples = runs[0] / "samples.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:-3]))
    assert "the test prompts are not the same" in refusal(tmp_path, by="data.num_pairs")


@pytest.mark.parametrize(
    ("by", "key", "values", "words"),
    [
        ("data.num_pairs", "data.path", ("a", "b"), 'data.path ("a" or "b")'),
        ("data", "data.path", ("a", "b"), 'data.path ("a" or "b")'),  # two files inside of the group `stories`
        ("judge._target_", "judge._target_", ("a.A", "a.B"), "the evaluation differs between runs: judge._target_"),
        ("trainer.max_steps", "trainer.max_steps", (60, 120), None),
        ("evaluation.policy", "evaluation.policy", ("best", "last"), None),
        ("optimizer.lr", "optimizer.lr", (0.001, 0.003), None),
        ("optimizer.lr", "trainer.max_steps", (60, 120), "the groups were trained for different lengths"),
    ],
)
def test_what_must_be_equal_leaves_out_the_keys_of_the_groups(
    tmp_path: Path, by: str, key: str, values: tuple[Any, Any], words: str | None
) -> None:
    for value, lr in zip(values, (0.001, 0.003), strict=True):
        own = {by: lr} if by == "optimizer.lr" else {}
        write(tmp_path, "spo", "global_kl", changes={"data.num_pairs": 64, **own, key: value})
    if words is not None:
        assert words in refusal(tmp_path, by=by)
    else:
        comparison = compared(tmp_path, by=by)
        assert len(comparison.methods) == 2 and not comparison.problems


def test_groups_by_data_take_equal_steps_but_not_equal_pairs(tmp_path: Path) -> None:
    for pairs in (128, 512):
        trained = {"trained/pairs": 60 * min(pairs, 130)}
        write(tmp_path, "spo", "global_kl", changes={"data.num_pairs": pairs}, trained=trained)
    assert not compared(tmp_path, by="data.num_pairs").problems
    edit_steps = next(run.path for run in find_runs([tmp_path]).runs) / "metrics.json"
    edit(edit_steps, **{"trained/steps": 50})
    text = refusal(tmp_path, by="data.num_pairs")
    assert re.search(r"the groups were trained for different lengths: data.num_pairs \d+ \d+ steps, data", text)
    for method in ("dpo", "ipo"):  # of groups with the same data, pairs count as well
        write(tmp_path / "more", method, "none", changes={"data.num_pairs": 64}, trained={"trained/pairs": len(method)})
        write(tmp_path / "more", method, "none", changes={"data.num_pairs": 32})
    assert not compared(tmp_path / "more", by="method,data.num_pairs").problems
    write(tmp_path / "more", "kto", "none", changes={"data.num_pairs": 64}, trained={"trained/pairs": 9})
    write(tmp_path / "more", "kto", "none", changes={"data.num_pairs": 32})
    assert '"dpo, data.num_pairs 64" 60 steps on 3 pairs' in refusal(tmp_path / "more", by="method,data.num_pairs")


@pytest.mark.parametrize("num_pairs", [128, None])
def test_pairs_that_are_drawn_by_the_seed_differ_between_seeds_alone(tmp_path: Path, num_pairs: int | None) -> None:
    for method in ("spo", "dpo"):
        for seed in (1, 2):
            digest = {"pairs_sha256": f"{seed}" * 64}
            keys = {"data.num_pairs": num_pairs, "data.subset_seed": seed, "data.source.subset_seed": seed}
            run = write(tmp_path, method, "none", seed, changes=keys, provenance=digest)
            composed = yaml.safe_load((run / "composed.yaml").read_text())
            composed["data"]["source"] |= {"subset_seed": "${data.subset_seed}"}
            if num_pairs is None:
                del composed["data"]["source"]["subset_seed"], composed["data"]["num_pairs"]
                identity = json.loads((run / "identity.json").read_text())
                identity["config"].pop("data.source.subset_seed")
                (run / "identity.json").write_text(json.dumps(identity))
            (run / "composed.yaml").write_text(yaml.safe_dump(composed))
    if num_pairs is None:  # without a subset the seed of the subset has no effect
        assert "the preference pairs are not the same for all runs" in refusal(tmp_path)
        return
    comparison = compared(tmp_path)
    assert not comparison.problems and [method.best.seeds for method in comparison.methods] == [[1, 2], [1, 2]]
    edit(run / "provenance.json", inputs={"reference_sha256": "ab" * 32, "pairs_sha256": "other"})
    assert "the preference pairs are not the same for all runs" in refusal(tmp_path)


def test_a_run_without_the_key_has_the_rest_of_the_name(tmp_path: Path) -> None:
    write(tmp_path, "spo", "global_kl", alpha=0.1)
    write(tmp_path, "dpo", "none")
    assert names(compared(tmp_path, by="method,alpha.value")) == {"spo, alpha 0.1", "dpo"}
    assert names(compared(tmp_path, by="method,alpha")) == {"spo, constant", "dpo"}
    assert names(compared(tmp_path, by="method,data.path")) == {"spo, data.path null", "dpo, data.path null"}


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("regulariser", "--by regulariser: no run has this key; did you mean regularizer"),
        ("lr", "--by lr: no run has this key; did you mean optimizer.lr?"),
        ("data.num_pair", "--by data.num_pair: no run has this key"),
        ("probe", "--by probe: no run has this key"),
        ("seed", "--by seed: runs of other seeds repeat a group"),
        ("evaluation.seed", "--by evaluation.seed: runs of other seeds repeat a group"),
        ("", "--by : no run has this key"),
    ],
)
def test_unknown_keys_are_refused_with_near_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str, words: str
) -> None:
    write(tmp_path, "spo", "global_kl")
    assert words in refusal(tmp_path, by=by)
    assert cli.main(["compare", str(tmp_path), "--by", f"method,{by}"]) == 1
    message = capsys.readouterr().err
    assert words in message and "A key is a config group (" in message and "regularizer" in message


def test_command_and_function_take_keys_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ablation(tmp_path, [("spo", "global_kl"), ("spo", "local_kl"), ("dpo", "none")], seeds=[1])
    assert cli.main(["compare", str(tmp_path), "--by", "method,regularizer", "--baseline", "spo, local_kl"]) == 0
    out = capsys.readouterr().out
    assert "3 groups" in out and "Groups are made by method and regularizer." in " ".join(out.split())
    made = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert made["by"] == ["method", "regularizer"] and made["baseline"] == "spo, local_kl"
    assert cli.main(["compare", str(tmp_path), "--baseline", "spo"]) == 1
    assert 'the methods are "spo, global_kl", "spo, local_kl", dpo' in capsys.readouterr().err
    for by in ("method,regularizer", ["method", "regularizer"]):
        assert names(spo.compare(tmp_path, by=by)) == {one["name"] for one in made["methods"]}
    assert cli.main(["compare", "--help"]) == 0
    assert "--by KEY[,KEY...]" in capsys.readouterr().out


def test_names_that_clash_are_written_with_their_keys(tmp_path: Path) -> None:
    for rate in (0.12345678, 0.12345679):
        write(tmp_path, "spo", "global_kl", changes={"optimizer.lr": rate})
    assert names(compared(tmp_path, by="optimizer.lr")) == {"optimizer.lr 0.12345678", "optimizer.lr 0.12345679"}
    assert group_runs([]).names == {}


# --- edges ---------------------------------------------------------------------------------------------------------


def grid(folder: Path, key: str, values: Iterable[Any], best: Any) -> Path:
    for value in values:
        run = write(folder, "dpo", "none", changes={key: value})
        edit(run / "metrics.json", **{"val/win_rate": 0.9 if value == best else 0.1})
    return folder


@pytest.mark.parametrize(
    ("key", "values", "best", "words"),
    [
        ("optimizer.lr", (0.0003, 0.001, 0.003), 0.003, "the largest optimizer.lr that was tried (0.003)"),
        ("optimizer.lr", (0.0003, 0.001, 0.003), 0.0003, "the smallest optimizer.lr that was tried (0.0003)"),
        ("optimizer.lr", (0.0003, 0.001, 0.003), 0.001, None),
        ("beta.value", (0.1, 0.2, 0.3), 0.3, "the largest beta that was tried (0.3)"),
        ("optimizer.lr", (0.001, 0.003), 0.003, None),  # either of two values is on an edge
        ("data.source.labels", ("hard", "soft", "weighted"), "weighted", None),
        ("optimizer.nesterov", (False, True), True, None),
        ("optimizer.weight_decay", (0.0, 0.1, 0.2), 0.0, None),
        ("optimizer.weight_decay", (0.0, 0.1, 0.2), 0.2, "the largest optimizer.weight_decay"),
        ("regularizer.refresh_every", (1, 2, 4), 1, None),
        ("regularizer.refresh_every", (1, 2, 4), 4, "the largest regularizer.refresh_every that was tried (4)"),
        ("model.init_seed", (1, 2, 3), 3, None),
    ],
)
def test_best_setting_on_the_edge_of_its_grid_is_noted(
    tmp_path: Path, key: str, values: tuple[Any, ...], best: Any, words: str | None
) -> None:
    comparison = compared(grid(tmp_path, key, values, best), anyway=True)
    found = [note for note in comparison.notes if "beyond" in note]
    if words is None:
        assert comparison.methods[0].best.values[key] == best and not found
    else:
        assert found == [
            f"The best setting of dpo has {found[0][28:].partition(':')[0]}: the optimum may lie beyond it."
        ]
        assert words in found[0]


def test_edge_is_on_every_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compared(grid(tmp_path, "optimizer.lr", (0.0003, 0.001, 0.003), 0.003))
    words = (
        "The best setting of dpo has the largest optimizer.lr that was tried (0.003): the optimum may lie beyond it."
    )
    print_comparison(comparison)
    assert words in " ".join(capsys.readouterr().out.split())
    assert words in to_dict(comparison)["notes"] and words in to_markdown(comparison)
    assert Page(write_page(comparison, tmp_path / "page")).text.count(words) == 1


# --- costs ---------------------------------------------------------------------------------------------------------


def test_seconds_and_sampled_tokens_are_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, seconds, tokens in ((1, 10.0, 3000), (2, 14.0, 4000)):
        trained = {"time/train_s": seconds, "trained/sampled_tokens": tokens}
        write(tmp_path, "spo", "global_kl", seed, trained=trained)
        write(tmp_path, "dpo", "none", seed, trained={"time/train_s": seconds / 4}, beta=0.3)
    comparison = compared(tmp_path)
    assert [
        (one["name"], one["trained"]) for one in sorted(to_dict(comparison)["methods"], key=lambda m: m["name"])
    ] == [
        ("dpo", {"steps": 60, "pairs": 1920, "sampled_tokens": 0, "train_s": 3.0}),
        ("spo", {"steps": 60, "pairs": 1920, "sampled_tokens": 3500, "train_s": 12.0}),
    ]
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(to_csv(comparison)))}
    assert rows["spo"]["time/train_s"] == "12.0" and rows["spo"]["trained/sampled_tokens"] == "3500.0"
    assert rows["dpo"]["time/train_s"] == "3.0" and rows["dpo"]["trained/sampled_tokens"] == "0.0"
    markdown = to_markdown(comparison)
    assert "| trained | training (s) | sampled (tokens) | win rate |" in markdown
    assert "| 60 steps, 1,920 pairs | 12.00 | 3,500 |" in markdown
    assert "| 60 steps, 1,920 pairs | 3.000 | 0 |" in markdown
    page = Page(write_page(comparison, tmp_path / "page")).text
    assert "training (s) sampled (tokens)" in page and "60 steps, 1,920 pairs 12.00 3,500" in page
    print_comparison(comparison)
    table = capsys.readouterr().out
    order = [method.name for method in comparison.methods]
    shown = re.search(r"training +(\S+) +(\S+)\s+s\b", table)
    sampled = re.search(r"sampled +(\S+) +(\S+)\s+tokens", table)
    assert shown and dict(zip(order, shown.groups(), strict=True)) == {"spo": "12.00", "dpo": "3.000"}
    assert sampled and dict(zip(order, sampled.groups(), strict=True)) == {"spo": "3,500", "dpo": "0"}


def test_costs_that_a_run_did_not_record_are_a_dash(tmp_path: Path) -> None:
    for seed in (1, 2):
        missing = ["time/train_s", "trained/sampled_tokens"] if seed == 2 else []
        write(tmp_path, "spo", "global_kl", seed, without=missing)
    comparison = compared(tmp_path)
    [method] = to_dict(comparison)["methods"]
    assert method["trained"]["train_s"] is None and method["trained"]["sampled_tokens"] is None
    assert method["settings"][0]["train_s"] is None
    assert "| 60 steps, 1,920 pairs | – | – |" in to_markdown(comparison)
    [row] = csv.DictReader(io.StringIO(to_csv(comparison)))
    assert row["time/train_s"] == row["trained/sampled_tokens"] == ""
    assert "60 steps, 1,920 pairs – –" in Page(write_page(comparison, tmp_path / "page")).text


def test_table_of_a_sweep_has_the_costs_of_each_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = []
    for seed, without in ((1, []), (2, ["time/train_s", "trained/sampled_tokens"])):
        run = write_run(tmp_path, seed=seed, without=without, trained={"time/train_s": 7.25})
        jobs.append(SweepJob([f"seed={seed}"], run.name, "finished"))
    jobs.append(SweepJob(["seed=3"], "absent", "failed", error="no memory"))
    print_sweep(jobs, tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"status +val/win_rate +training \(s\) +sampled \(tokens\)", out)
    assert re.search(r"seed=1 +finished +0\.\d+ +7\.250 +38,400", out)
    assert re.search(r"seed=2 +finished +0\.\d+ +– +–", out) and re.search(r"seed=3 +failed *\n", out)
    shutil.rmtree(tmp_path / jobs[0].directory)
