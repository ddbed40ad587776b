"""``spo iterate``: the configuration of each round, the ledger, and real iterations."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import load_file

import spo
from spo import cli
from spo.config.checks import problems, warnings
from spo.config.compose import compose
from spo.config.groups import group_members
from spo.config.iterations import iteration_arguments
from spo.errors import UserError
from spo.pages.sweep_table import FIRST_RATE, print_sweep
from spo.records.iteration import Round, read_iteration
from spo.records.sweep import SweepJob
from spo.resources import conf_dir
from spo.runs.identity import identity
from spo.runs.launch import below_swept_groups
from spo.stages import iterate as stage
from spo.stages.evaluate import evaluate_command
from spo.stages.iterate import first_round, iterate, round_config
from spo.stages.train import train
from tests.commands import TINY, enter, numbers, rows
from tests.commands import spo as run_spo
from tests.iterations import make_iteration
from tests.test_kills import killed

ITERATIONS = group_members([conf_dir()])["iteration"]
SMALLEST = [TINY, "logger=record", "trainer.enable_progress_bar=false", "trainer.max_steps=2"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the histories of earlier rounds, of ten steps each."""
    monkeypatch.setattr(stage, "last_step", lambda run_dir: 0 if run_dir.name == "round-0" else 10)


def composed(*overrides: str, directory: Path = Path("/iterations/x")) -> Any:
    return compose([*overrides], run_dir=directory)


# --- the configuration of a round ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ITERATIONS)
def test_round_0_evaluates_the_first_model(name: str) -> None:
    rewards = ["iteration.rewards=[plot,brevity]"] if name == "sequential" else []
    own = first_round(composed(f"iteration={name}", *rewards), Path("/iterations/x"))
    assert own.paths.run == "/iterations/x/round-0" and own.trainer.max_steps == 0 and own.iteration is None
    assert own.method.name == "sft" and own.regularizer._target_.endswith("NoRegularizer")
    assert own.sft.max_steps > 0 and list(own.evaluation.against) == ["reference", "chosen"]


def test_round_0_does_not_warn_of_coefficients_that_later_rounds_read() -> None:
    own = first_round(composed("iteration=dpo", "alpha=0.3", "beta=0.3"), Path("/iterations/x"))
    assert not [note for note in warnings(own) if "alpha" in note or "beta" in note]


def test_a_reference_that_follows_is_the_policy_before_the_round(steps: None) -> None:
    cfg, directory = composed("iteration=dpo"), Path("/iterations/x")
    first, third = (round_config(cfg, directory, number) for number in (1, 3))
    assert first.model.path == "/iterations/x/round-0/policy" and first.model.start is None
    assert list(first.evaluation.against) == ["reference", "chosen"] and not first.evaluation.further_kl
    assert third.model.path == "/iterations/x/round-2/policy" and third.model.start is None
    assert list(third.evaluation.against) == ["reference", "chosen", "/iterations/x/round-0"]
    assert third.evaluation.further_kl == {"first": "/iterations/x/round-0/policy"}
    assert (third.sft.max_steps, third.model.initial, third.iteration.first_step) == (0, None, 20)
    assert third.iteration.source.policies == [f"/iterations/x/round-{number}/policy" for number in range(3)]
    assert third.iteration.source.round == 3 and "rounds" not in third.iteration


def test_samples_of_the_rounds_are_independent(steps: None) -> None:
    """Win rates against an earlier round would otherwise compare samples with the same random numbers."""
    seeds = []
    for words in ([], ["seed=5"], ["evaluation.seed=7"]):
        cfg, directory = composed("iteration=dpo", *words), Path("/iterations/x")
        rounds = [first_round(cfg, directory), *(round_config(cfg, directory, number) for number in (1, 2, 3))]
        seeds += [own.evaluation.seed for own in rounds]
    assert len(set(seeds)) == 12 and seeds[::4] == [0, 5, 7]
    own = round_config(composed("iteration=dpo"), Path("/iterations/x"), 2)
    own.seed = 5
    assert own.evaluation.seed == seeds[6], "the runs of several seeds are one setting to spo compare"


def test_a_reference_that_stays_is_the_first_model(steps: None) -> None:
    own = round_config(composed("iteration=spo"), Path("/iterations/x"), 3)
    assert own.model.path == "/iterations/x/round-0/policy" and own.model.start == "/iterations/x/round-2/policy"
    assert list(own.evaluation.against) == ["reference", "chosen", "/iterations/x/round-2"]
    assert not own.evaluation.further_kl


def test_momentum_starts_a_round_from_the_extrapolated_policy(steps: None) -> None:
    own = round_config(composed("iteration=accelerated"), Path("/iterations/x"), 2)
    assert own.model.path == "/iterations/x/round-1/extrapolated/policy"
    plain = round_config(composed("iteration=accelerated", "iteration.momentum=0"), Path("/iterations/x"), 2)
    assert plain.model.path == "/iterations/x/round-1/policy"


def test_further_references_and_rewards_of_a_round(steps: None) -> None:
    own = round_config(composed("iteration=alpha_spin"), Path("/iterations/x"), 2)
    assert own.extra_references == {"base": "/iterations/x/round-0/policy"}
    cfg = composed("iteration=dpo", "iteration.rewards=[plot,brevity,plot]")
    assert round_config(cfg, Path("/iterations/x"), 2).iteration.source.reward == "brevity"


def test_without_a_judge_the_evaluation_does_not_compare(steps: None) -> None:
    own = round_config(composed("iteration=spin", "judge=none"), Path("/iterations/x"), 2)
    assert list(own.evaluation.against) == ["reference"]


def test_the_configuration_of_the_iteration_stays_as_it_is(steps: None) -> None:
    cfg = composed("iteration=dpo")
    before = OmegaConf.to_yaml(cfg)
    first_round(cfg, Path("/iterations/x")), round_config(cfg, Path("/iterations/x"), 2)
    assert OmegaConf.to_yaml(cfg) == before


def test_checks_leave_the_configuration_as_it_is() -> None:
    cfg = composed("iteration=dpo")
    before = OmegaConf.to_yaml(cfg)
    assert problems(cfg) == []
    assert OmegaConf.to_yaml(cfg) == before, "an evaluation of the round with other data would keep the old one"


# --- the command line ----------------------------------------------------------------------------------------------


def test_rounds_are_written_out_and_directories_are_added() -> None:
    words = iteration_arguments(["iteration=dpo", "rounds=1,2", "-m"])
    assert words[2:] == ["iteration=dpo", "iteration.rounds=1,2", "-m"]
    assert [word.partition("=")[0] for word in words[:2]] == ["hydra.run.dir", "hydra.sweep.dir"]
    assert iteration_arguments(["hydra.run.dir=x", "hydra.sweep.dir=y"]) == ["hydra.run.dir=x", "hydra.sweep.dir=y"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "iteration=dpo"], "use spo iterate"),
        (["iterate"], "choose one, such as iteration=dpo"),
        (["iterate", "-m", "iteration=dpo", "rounds=1,2"], "a sweep takes a single value"),
        (["iterate", "rounds=2"], "iteration is not set: choose one"),
        (["iterate", "iteration=dpoo"], "did you mean dpo?"),
        (["iterate", "iteration=dpo", "rounds=0"], "iteration.rounds=0: must be at least 1"),
        (["iterate", "iteration=dpo", "judge=none"], "choose judge=MEMBER"),
        (["iterate", "iteration=dpo", "iteration.rewards=[a]"], "give one component for each round"),
        (["iterate", "iteration=alpha_spin", "method=dpo"], "does not read the reference 'base'"),
        (["iterate", "iteration=dpo", "data=enumerable", "model=tabular"], "every response of this data is known"),
        (["iterate", "iteration=dpo", "iteration.source.completions=1"], "a pair needs at least 2 completions"),
        (["iterate", "iteration=rso", "iteration.source.pairing.beta=-1"], "must be a positive number"),
        (["iterate", "iteration=accelerated", "iteration.momentum=1"], "iteration.momentum=1"),
        (["iterate", "iteration=dpo", "method=rosepo"], "choose another method"),
        (["iterate", "iteration=dpo", "iteration.source.prompts=0"], "a round needs a prompt to train on"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_refused_in_words(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, tmp_path / "cache", monkeypatch)
    assert cli.main(words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["iteration=dpo"], ["round-0"]),
        (["iteration=spo"], ["round-1", "round-2"]),
        (["iteration=spo", "iteration.rounds=2"], ["round-1"]),
        (["iteration=spo", "iteration.momentum=0.3"], ["extrapolated"]),
        (["iteration=dpo", "iteration.rounds=1"], []),
    ],
    ids=lambda value: " ".join(value),
)
def test_opponents_with_the_names_of_earlier_rounds_are_refused(
    words: list[str], names: list[str], tmp_path: Path, steps: None
) -> None:
    given = [tmp_path / name for name in ("round-0", "round-1", "round-2", "round-3", "extrapolated")]
    for run in given:
        run.mkdir()
        (run / "samples.jsonl").touch()
    cfg = composed(*words, f"evaluation.against=[{','.join(map(str, given))}]")
    found = [problem for problem in problems(cfg) if problem.startswith("evaluation.against")]
    refused = [run.name for run in given if any(f"{run} has the name of a run" in problem for problem in found)]
    assert refused == names and len(found) == len(names)
    # These are the names that rounds add by themselves.
    rounds = [round_config(cfg, Path("/iterations/x"), number) for number in range(1, cfg.iteration.rounds + 1)]
    added = {Path(name).name for own in rounds for name in own.evaluation.against if name.startswith("/iterations/x")}
    assert added == set(names)


def test_data_responses_are_an_opponent_once(steps: None) -> None:
    cfg = composed("iteration=dpo", "evaluation.against=[chosen,reference,chosen]")
    assert list(round_config(cfg, Path("/iterations/x"), 1).evaluation.against) == ["chosen", "reference"]


def test_functions_refuse_the_configuration_of_the_other_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="spo train trains a single run: use spo iterate"):
        train(composed("iteration=dpo", directory=tmp_path))
    with pytest.raises(UserError, match="choose one, such as iteration=dpo"):
        spo.iterate(composed(directory=tmp_path))
    assert not any(tmp_path.iterdir())


def test_a_directory_of_another_iteration_is_refused(tmp_path: Path) -> None:
    ledger = {"name": "spin", "reference": "previous", "planned": 3, "rounds": []}
    (tmp_path / "iterate.json").write_text(json.dumps(ledger))
    cfg = composed("iteration=dpo", directory=tmp_path)
    cfg.choices = {"iteration": "dpo"}
    with pytest.raises(UserError, match="holds the iteration spin"):
        iterate(cfg)


# --- real iterations -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accelerated(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two rounds with momentum, and return the directory."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("iterations") / "accelerated"
    words = [*SMALLEST, "iteration=accelerated", "iteration.rounds=2", "iteration.source.prompts=64"]
    iterate(compose([*words, f"paths.cache={cache_dir}"], run_dir=directory))
    return directory


@pytest.mark.slow
def test_an_iteration_is_a_ledger_over_runs(accelerated: Path) -> None:
    iteration = read_iteration(accelerated)
    assert (iteration.name, iteration.is_finished, iteration.planned) == ("accelerated", True, 2)
    assert [one.measured for one in iteration.rounds] == ["round-0", "round-1/extrapolated", "round-2/extrapolated"]
    assert "<svg" in (accelerated / "report.html").read_text()
    second = numbers(accelerated / "round-2/extrapolated")
    keys = ["win_rate", "win_rate/round-0", "win_rate/chosen", "kl", "kl/first", "entropy", "length", "distinct_2"]
    assert {f"eval/{key}" for key in keys} <= second.keys()
    # The first round's KL to its reference is that to the first model.
    assert numbers(accelerated / "round-0")["eval/kl"] == 0 < second["eval/kl/first"]


@pytest.mark.slow
def test_the_extrapolated_weights_are_those_of_the_formula(accelerated: Path) -> None:
    weights = [load_file(accelerated / f"{run}/policy/model.safetensors") for run in ("round-1", "round-2")]
    found = load_file(accelerated / "round-2/extrapolated/policy/model.safetensors")
    for name, trained in weights[1].items():
        torch.testing.assert_close(found[name], trained + 0.3 * (trained - weights[0][name]), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_finished_iteration_trains_nothing_again(accelerated: Path, cache_dir: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in accelerated.rglob("model.safetensors")}
    words = [*SMALLEST, "iteration=accelerated", "iteration.rounds=2", "iteration.source.prompts=64"]
    iterate(compose([*words, f"paths.cache={cache_dir}"], run_dir=accelerated))
    assert {file: file.stat().st_mtime_ns for file in accelerated.rglob("model.safetensors")} == before
    changed = compose([*words, f"paths.cache={cache_dir}", "iteration.source.completions=3"], run_dir=accelerated)
    with pytest.raises(UserError, match=r"round-1 holds another run.*\n.*iteration.source.completions: 5 there, 3 now"):
        iterate(changed)


@pytest.mark.slow
def test_a_moved_iteration_is_evaluated_as_before(accelerated: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(accelerated, moved)
    shutil.copytree(accelerated / "round-2", tmp_path / "alone")
    before = evaluate_command(accelerated / "round-2/extrapolated", [])
    accelerated.rename(tmp_path / "away")
    try:
        after = evaluate_command(moved / "round-2/extrapolated", [])
        with pytest.raises(UserError, match="there is no such folder"):
            evaluate_command(tmp_path / "alone", [])
    finally:
        (tmp_path / "away").rename(accelerated)
    assert after == before and "eval/win_rate/round-0" in after


@pytest.mark.slow
def test_a_round_is_evaluated_on_other_data_without_its_completions(
    accelerated: Path, cache_dir: Path, tmp_path: Path
) -> None:
    pairs = [{"prompt": f"Once {i}", "chosen": f"a cat {i}.", "rejected": f"a dog {i}."} for i in range(40)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    before = set(cache_dir.glob("completions_for_pairs/*"))
    # No judge is needed, as for the data of a run that is not a round.
    words = ["data=jsonl", f"data.path={file}", "evaluation.num_prompts=2"]
    for name in ("round-1", "round-2"):  # Round 2 was compared with samples of round 0, which are of other prompts.
        found = evaluate_command(accelerated / name, words)
        assert "eval/kl" in found and not any(key.startswith("eval/win_rate") for key in found)
    assert 0 <= found["eval/rewards/accuracies"] <= 1
    assert set(cache_dir.glob("completions_for_pairs/*")) == before


SLOW = ("alpha_spin", "sequential")
"""Iterations that the slow suite trains: with a further reference, and with rewards of their own."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.nightly) for name in ITERATIONS],
)
def test_every_iteration_trains(name: str, cache_dir: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    rewards = ["experiment=sequential"] if name == "sequential" else [f"iteration={name}"]
    words = [*SMALLEST, *rewards, "iteration.rounds=2", "iteration.source.prompts=48", f"paths.cache={cache_dir}"]
    iterate(compose(words, run_dir=tmp_path))
    assert read_iteration(tmp_path).is_finished
    last = numbers(tmp_path / "round-2")
    assert last["data/pairs_used"] > 40 and last["eval/kl"] > 0
    assert last["train/grad_norm"] > 0


def check_kills(name: str, seed: int, folder: Path) -> None:
    """Kill an iteration at two random moments, let it finish, and compare it with one that was not killed.

    Both have caches of their own. The first model in the shared cache of the tests may be that of two devices, which
    round in other places than a single one does.
    """
    words = [
        "iterate",
        f"iteration={name}",
        *SMALLEST,
        "rounds=2",
        "iteration.source.prompts=48",
        "model.dtype=float64",
    ]
    generator, started = random.Random(seed), time.monotonic()
    run_spo(*words, "hydra.run.dir=whole", folder=folder, cache=folder / "cache")
    seconds = time.monotonic() - started
    command = [str(Path(sys.executable).with_name("spo")), *words, "hydra.run.dir=broken"]
    for _ in range(2):
        if not killed(command, folder, folder / "another cache", generator.uniform(0.3, 0.95) * seconds, generator):
            break
    run_spo(*words, "hydra.run.dir=broken", folder=folder, cache=folder / "another cache")
    assert read_iteration(folder / "broken").is_finished
    for run in (f"round-{number}" for number in range(3)):
        assert numbers(folder / "broken" / run) == pytest.approx(numbers(folder / "whole" / run), rel=1e-9, abs=1e-9)
        texts = [
            [row["completion"] for row in rows(folder / one / run / "samples.jsonl")] for one in ("whole", "broken")
        ]
        assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_killed_iteration_ends_as_one_that_was_not(tmp_path: Path) -> None:
    check_kills("spo", 1, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "seed"), [("accelerated", 2), ("alpha_spin", 3), ("dpo", 4), ("rso", 5)])
def test_iterations_of_other_kinds_survive_kills(name: str, seed: int, tmp_path: Path) -> None:
    check_kills(name, seed, tmp_path)


@pytest.mark.nightly
def test_an_iteration_is_the_same_on_two_devices(cache_dir: Path, tmp_path: Path) -> None:
    words = ["iterate", "iteration=dpo", *SMALLEST, "rounds=2", "iteration.source.prompts=48", "model.dtype=float64"]
    words += ["trainer.accelerator=cpu"]
    run_spo(*words, "hydra.run.dir=one", "trainer.devices=1", folder=tmp_path, cache=cache_dir)
    run_spo(*words, "hydra.run.dir=two", "trainer.devices=2", "strategy=ddp", folder=tmp_path, cache=cache_dir)
    for run in (f"round-{number}" for number in range(3)):
        assert numbers(tmp_path / "two" / run) == pytest.approx(numbers(tmp_path / "one" / run), rel=1e-9, abs=1e-9)


@pytest.mark.nightly
def test_iterations_are_swept(cache_dir: Path, tmp_path: Path) -> None:
    words = ["iterate", "-m", "iteration=dpo,sppo", *SMALLEST, "rounds=1", "iteration.source.prompts=48"]
    run_spo(*words, "hydra.sweep.dir=sweep", folder=tmp_path, cache=cache_dir)
    directories = sorted(file.parent for file in tmp_path.glob("sweep/*/iterate.json"))
    assert [read_iteration(directory).name for directory in directories] == ["dpo", "sppo"]


def test_the_table_of_a_sweep_has_the_last_round_against_the_first_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    make_iteration(tmp_path / "a", 2)
    print_sweep([SweepJob(["iteration=dpo"], "a", "finished")], tmp_path)
    rate = json.loads((tmp_path / "a/round-2/metrics.json").read_text())["eval/win_rate/round-0"]
    shown = capsys.readouterr().out
    assert FIRST_RATE in shown and f"{rate:.3f}" in shown


def test_values_below_a_swept_group_wait_for_the_jobs() -> None:
    words = ["iteration=dpo,sppo", "iteration.rounds=1", "iteration.rewards=[a,b]", "seed=1,2", "sft.max_steps=3"]
    assert below_swept_groups(words) == [
        "iteration=dpo,sppo", "iteration.rounds=choice(1)", "iteration.rewards=choice([a,b])", *words[3:]
    ]  # fmt: skip


def test_a_configuration_is_composed_while_hydra_runs_a_sweep() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert compose(["method=sft"]).method.name == "sft"
        assert GlobalHydra.instance().hydra is running


# --- the ledger ----------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of a finished iteration of two rounds, the first of which another setting does not fit."""
    make_iteration(tmp_path, 2)

    def refuse(cfg: Any, directory: Path, one: Round) -> dict[str, float]:
        if one.number == 1:
            raise UserError("another run")
        return {}

    monkeypatch.setattr(stage, "_train_round", refuse)
    return tmp_path


def test_a_rejected_setting_leaves_the_ledger_as_it_was(refused: Path) -> None:
    before = read_iteration(refused)
    with pytest.raises(UserError, match="another run"):
        iterate(composed("iteration=dpo", "iteration.source.completions=3", directory=refused))
    assert read_iteration(refused) == before


def test_a_rejected_command_leaves_the_ledger_as_it_was(refused: Path) -> None:
    before = (refused / "iterate.json").read_bytes()
    with pytest.raises(UserError, match="another run"):
        iterate(composed("iteration=dpo", "iteration.rounds=4", directory=refused))
    assert (refused / "iterate.json").read_bytes() == before


def test_other_limits_change_the_alarms_of_finished_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_iteration(tmp_path, 2)
    monkeypatch.setattr(stage, "_train_round", lambda cfg, directory, one: {})
    found = []
    for limit in (100, 0.001):
        words = [f"iteration.limits.max_length_ratio={limit}", "iteration.limits.min_length_ratio=null"]
        iterate(composed("iteration=dpo", "iteration.rounds=2", *words, directory=tmp_path))
        iteration = read_iteration(tmp_path)
        found.append([sum(words.startswith("length:") for words in one.alarms) for one in iteration.rounds])
        assert iteration.settings["limits"]["max_length_ratio"] == limit
    assert found == [[0, 0, 0], [0, 1, 1]]


def test_fewer_rounds_take_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_iteration(tmp_path, 2)
    monkeypatch.setattr(stage, "_train_round", lambda cfg, directory, one: {})
    iterate(composed("iteration=dpo", "iteration.rounds=1", directory=tmp_path))
    assert (read_iteration(tmp_path).planned, len(read_iteration(tmp_path).rounds)) == (2, 3)


def test_another_momentum_is_another_iteration(refused: Path) -> None:
    with pytest.raises(UserError, match=r"iteration.momentum=0.0, not 0.3: choose another hydra.run.dir"):
        iterate(composed("iteration=dpo", "iteration.momentum=0.3", directory=refused))


def test_a_round_is_the_same_where_the_iteration_was_moved(tmp_path: Path, steps: None) -> None:
    digests = []
    for name in ("here", "there"):
        for number in range(3):
            (tmp_path / name / f"round-{number}" / "policy").mkdir(parents=True)
        own = round_config(composed("iteration=dpo", directory=tmp_path / name), tmp_path / name, 3)
        digests.append(identity(own)["config"])
    assert digests[0] == digests[1]
