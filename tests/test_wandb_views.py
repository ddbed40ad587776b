"""Tests of the views of W&B beside curves, read from the files that its client writes offline."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import wandb
import yaml
from omegaconf import OmegaConf

from spo import cli
from spo.config.compose import compose
from spo.records.iteration import Iteration, write_iteration
from spo.runs.provenance import git_remote
from spo.stages.description import describe
from spo.tracking import RunDescription
from spo.tracking.guard import make_guarded
from spo.tracking.wandb import WandbTracker
from tests.commands import TINY, enter, rows, shared_cache
from tests.wandb_files import Offline

PROVENANCE = {
    "command": "spo train method=spo",
    "git_sha": "0123abcd" * 5,
    "git_remote": "https://github.com/us/ours.git",
    "git_dirty": True,
    "data": {"path": "/secret/place/pairs.jsonl", "sha256": "d" * 64},
    "inputs": {"pairs_sha256": "e" * 64},
}
ROW = {"prompt": "a", "opponents": {"chosen": {"verdict": 1.0}}}


class Shown(NamedTuple):
    """An offline run, its tracker's folder, and the lines that the tracker printed."""

    run: Offline
    folder: Path
    printed: str


def described(folder: Path, **changes: Any) -> RunDescription:
    config = {"choices": {"data": "my set"}, "provenance": PROVENANCE}
    fields: dict[str, Any] = {
        "name": "a",
        "group": None,
        "job_type": "spo",
        "tags": ["spo", "x" * 70],
        "config": config,
    }
    return RunDescription(directory=folder, **fields | changes)


def closed(tracker: WandbTracker) -> None:
    """Close a run and wait until wandb's own process has written its file."""
    tracker.close()
    wandb.teardown()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """Yield one offline run with everything that a tracker is given."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(b"weights")
    (folder / "policy.json").write_text(json.dumps({"model.safetensors": "f" * 64}))
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_NOTES", "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_NAME"):
            patch.delenv(name, raising=False)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        tracker = WandbTracker("spo", None, "offline", str(folder), log_model=True)
        tracker.describe(described(folder))
        for step, (rate, kl) in enumerate([(0.5, 0.0), (0.9, 3.0), (math.nan, 1.0), (0.7, 2.0)]):
            row = {
                "val/samples/win_rate": rate,
                "val/kl": kl,
                "val/loss": 2.0 - kl,
                "train/loss": kl,
                "val/entropy": kl,
            }
            tracker.log_metrics(row, step)
            tracker.show_validation_samples([{"step": earlier, **ROW} for earlier in range(step + 1)][:3])
        tracker.alert("health: entropy", "step 2: the entropy is 0.1 times its start", 2)
        tracker.conclude({"val/samples/win_rate": 0.7, "val/win_rate": 0.6, "eval/kl": 1.5}, [ROW])
        closed(tracker)
    yield Shown(Offline(folder), folder, "\n".join(printed))


# --- the run -------------------------------------------------------------------------------------------------------


def test_tags_fit_into_the_limit_of_the_server(shown: Shown) -> None:
    assert list(shown.run.run.tags) == ["spo", "x" * 64]


def test_single_run_has_no_group(shown: Shown) -> None:
    assert shown.run.run.run_group == ""


def test_command_is_the_default_of_the_notes(shown: Shown) -> None:
    assert shown.run.run.notes == "spo train method=spo"


def test_key_of_the_notes_replaces_the_command_and_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_NOTES", "of the shell")
    assert compose([]).logger.wandb.notes == "of the shell"
    assert compose(["logger.wandb.notes=typed"]).logger.wandb.notes == "typed"
    tracker = WandbTracker("spo", None, "disabled", str(tmp_path), notes="typed")
    tracker.describe(described(tmp_path))
    assert tracker._wandb_init["notes"] == "typed"
    tracker.close()


def test_git_state_is_that_of_the_provenance(shown: Shown) -> None:
    git = shown.run.run.git
    assert (git.commit, git.remote_url) == (PROVENANCE["git_sha"], PROVENANCE["git_remote"])
    assert shown.run.config["provenance"]["git_dirty"] is True


# --- metrics, samples and alarms -----------------------------------------------------------------------------------


def test_summary_has_the_best_and_the_last_value(shown: Shown) -> None:
    summary = shown.run.summary
    assert (summary["best/val/samples/win_rate"], summary["val/samples/win_rate"]) == (0.9, 0.7)
    assert (summary["best/val/loss"], summary["val/loss"]) == (-1.0, 0.0)
    assert summary["best/val/win_rate"] == summary["val/win_rate"] == 0.6
    best = {key for key in summary if key.startswith("best/")}
    # The KL starts at its best value; the entropy does not have a direction; training loss is noise.
    assert best == {"best/val/samples/win_rate", "best/val/loss", "best/val/win_rate"}


def test_validation_samples_are_one_table_over_steps(shown: Shown) -> None:
    def steps(at: int) -> list[int]:
        return [row["step"] for row in shown.run.table("validation_samples", at)]

    tables = [row["_step"] for row in shown.run.history if "validation_samples/path" in row]
    assert tables == [0, 1, 3]  # after one and two validations, and at the end
    assert (steps(0), steps(1), steps(2)) == ([0], [0, 1], [0, 1, 2])
    assert shown.run.table("validation_samples")[0]["opponents/chosen/verdict"] == 1.0
    assert shown.run.summary["validation_samples/nrows"] == 3


def test_alarms_are_alerts(shown: Shown) -> None:
    [alert] = shown.run.of_kind("alert")
    assert (alert.title, alert.level) == ("health: entropy", "WARN")
    assert alert.text == "step 2: the entropy is 0.1 times its start"


def test_resumed_run_shows_the_earlier_samples_and_the_best_of_all_steps(tmp_path: Path) -> None:
    samples = [{"step": step, **ROW} for step in (0, 5)]
    (tmp_path / "samples.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    recorded = [{"step": step, "val/win_rate": rate} for step, rate in ((0, 0.8), (5, None))]
    tracker = WandbTracker("spo", None, "offline", str(tmp_path))
    tracker.describe(described(tmp_path, recorded=recorded))
    tracker.log_metrics({"val/win_rate": 0.4}, 10)
    tracker.conclude({"val/win_rate": 0.4}, [])
    closed(tracker)
    run = Offline(tmp_path)
    assert [row["step"] for row in run.table("validation_samples")] == [0, 5]
    assert (run.summary["best/val/win_rate"], run.summary["val/win_rate"]) == (0.8, 0.4)


# --- artifacts -----------------------------------------------------------------------------------------------------


def test_policy_is_an_artifact_with_metrics_and_digests(shown: Shown) -> None:
    [model] = [one for one in shown.run.of_kind("artifact") if one.type == "model"]
    assert model.name == f"policy-{shown.run.run.run_id}"
    [file] = model.manifest.contents
    assert file.path == "model.safetensors"
    assert Path(file.local_path) == shown.folder / "policy" / "model.safetensors"  # not a copy
    metadata = json.loads(model.metadata)
    assert metadata["metrics"]["eval/kl"] == 1.5 and metadata["sha256"] == {"model.safetensors": "f" * 64}


def test_data_is_an_artifact_of_digests_alone(shown: Shown) -> None:
    [data] = [one for one in shown.run.of_kind("artifact") if one.type == "dataset"]
    digests = {"data_sha256": "d" * 64, "pairs_sha256": "e" * 64}
    assert data.name == "data-my-set" and json.loads(data.metadata) == digests
    [file] = data.manifest.contents
    assert json.loads(Path(file.local_path).read_text()) == digests


class Online:
    """An online run that keeps the calls that it receives."""

    offline = disabled = False
    url = "https://wandb.example/us/spo/runs/1"
    id, starting_step = "1", 7  # the server has the steps up to 6

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.summary = SimpleNamespace(update=lambda values: self.calls.append(("summary", values)))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **named: self.calls.append((name, values or named))


def online(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[WandbTracker, Online]:
    run = Online()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    return WandbTracker("spo", None, "online", str(folder), **settings), run


def test_online_data_is_an_input_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, run = online(tmp_path, monkeypatch, log_model=True)
    tracker.describe(described(tmp_path))
    tracker.conclude({}, [])
    tracker.close()
    artifacts = [(name, values[0].type) for name, values in run.calls if "artifact" in name]
    assert artifacts == [("use_artifact", "dataset"), ("log_artifact", "model")]


def test_no_artifact_without_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, run = online(tmp_path, monkeypatch)
    tracker.describe(described(tmp_path))
    tracker.conclude({}, [])
    assert tracker._log_model is False  # Lightning's own key would upload checkpoints.
    assert not [name for name, _ in run.calls if "artifact" in name]


def test_alert_that_the_server_has_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, run = online(tmp_path, monkeypatch)
    tracker.describe(described(tmp_path))
    for step in (6, 7):
        tracker.alert("health: entropy", str(step), step)
    assert [values["text"] for name, values in run.calls if name == "alert"] == ["7"]


# --- rounds of an iteration ----------------------------------------------------------------------------------------


def test_steps_of_a_round_continue_those_of_the_earlier_rounds(tmp_path: Path) -> None:
    samples = [{"step": 0, **ROW}]
    tracker = WandbTracker("spo", None, "offline", str(tmp_path))
    tracker.describe(described(tmp_path, group="mine", first_step=200, recorded=[{"step": 0, "val/loss": 2.0}]))
    tracker.show_validation_samples(samples)
    tracker.log_metrics({"val/loss": 1.0}, 5)
    tracker.alert("health: entropy", "step 5: the entropy is low", 5)
    tracker.conclude({"val/loss": 1.0}, [])
    closed(tracker)
    run = Offline(tmp_path)
    assert run.run.run_group == "mine"
    losses = [(row["_step"], row["trainer/global_step"], row["val/loss"]) for row in run.history if "val/loss" in row]
    assert losses == [(200, 200, 2.0), (205, 205, 1.0)]
    assert [row["_step"] for row in run.history if "validation_samples/path" in row] == [200, 205]
    assert len(run.of_kind("alert")) == 1


def test_resumed_round_logs_what_the_server_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, run = online(tmp_path, monkeypatch)
    run.starting_step = 207  # the server has the steps up to 206, which are those of the round up to 6
    recorded = [{"step": step, "train/loss": 1.0} for step in (0, 6, 7)]
    tracker.describe(described(tmp_path, first_step=200, recorded=recorded))
    for step in (6, 7):
        tracker.alert("health: entropy", str(step), step)
    logged = [values[0]["trainer/global_step"] for name, values in run.calls if name == "log"]
    assert logged == [207]
    assert [values["text"] for name, values in run.calls if name == "alert"] == ["7"]


# --- the line for a person -----------------------------------------------------------------------------------------


def test_offline_run_prints_one_line_that_uploads_it(shown: Shown) -> None:
    [line] = shown.printed.splitlines()
    found = re.fullmatch(r"W&B \(offline\): wandb sync (\S+)", line)
    assert found and Path(found[1]) == shown.run.folder
    synced = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "sync", "--dry-run", found[1]], capture_output=True, text=True
    )
    assert shown.run.name in synced.stderr + synced.stdout


def test_online_run_prints_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, run = online(tmp_path, monkeypatch)
    tracker.describe(described(tmp_path))
    tracker.close()
    assert capsys.readouterr().out == f"W&B: {run.url}\n"


def test_disabled_run_and_other_processes_print_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = WandbTracker("spo", None, "disabled", str(tmp_path), log_model=True)
    tracker.describe(described(tmp_path))
    tracker.alert("health: entropy", "text", 2)
    tracker.show_validation_samples([{"step": 0, **ROW}])
    tracker.conclude({"val/win_rate": 1.0}, [ROW])
    tracker.close()
    monkeypatch.setattr("spo.tracking.wandb.rank_zero_only.rank", 1)
    tracker, run = online(tmp_path, monkeypatch)
    tracker.describe(described(tmp_path))
    tracker.alert("health: entropy", "text", 8)
    tracker.close()
    assert capsys.readouterr().out == "" and not run.calls


def test_failure_of_an_alert_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, run = online(tmp_path, monkeypatch)
    tracker.describe(described(tmp_path))
    guarded: Any = make_guarded("wandb", lambda: tracker)

    def broken(**_: Any) -> None:
        raise ConnectionError("down")

    vars(run).update(alert=broken, log=broken)
    guarded.alert("health: entropy", "text", 8)
    guarded.show_validation_samples([{"step": 8, **ROW}])


# --- its description -----------------------------------------------------------------------------------------------


def description(run_dir: Path, *overrides: str) -> RunDescription:
    cfg = compose(overrides, run_dir=run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (run_dir / "provenance.json").write_text("{}")
    return describe(cfg, run_dir, recorded=[])


def test_data_and_model_are_tags_and_the_members_of_groups_are_in_the_config(tmp_path: Path) -> None:
    found = description(tmp_path, "method=dpo", "beta=0.1", "regularizer=local_kl", "tags=[mine]")
    assert found.tags == ["dpo", "beta-0.1", "seed-0", "data:stories", "model:tiny", "mine"]
    chosen = found.config["choices"]
    names = {group: chosen[group] for group in ("data", "model", "method", "regularizer", "reference", "strategy")}
    assert list(names.values()) == ["stories", "tiny", "dpo", "local_kl", "frozen", "auto"]
    assert "experiment" not in chosen and not any("/" in group for group in chosen)


def test_tags_name_files_and_models_of_the_hub(tmp_path: Path) -> None:
    overrides = [
        "model=hf",
        "model.path=us/model-7b",
        "model.num_parameters=1",
        "data=jsonl",
        "data.path=/a/pairs.jsonl",
    ]
    assert {"data:pairs.jsonl", "model:model-7b"} <= set(description(tmp_path, *overrides).tags)


def test_jobs_of_a_sweep_are_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert description(tmp_path / "runs" / "one").group is None
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "sweep.json").write_text("{}")
    assert description(tmp_path / "grid" / "job").group == "grid"  # resumed by itself
    monkeypatch.setenv("SPO_SWEEP", str(tmp_path / "runs"))
    assert description(tmp_path / "runs" / "one").group == "runs"


def test_rounds_of_an_iteration_are_a_group(tmp_path: Path) -> None:
    def found(folder: str, **iteration: Any) -> RunDescription:
        run_dir = tmp_path / folder
        cfg = compose(["method=dpo", "beta=0.1"], run_dir=run_dir)
        OmegaConf.update(cfg, "iteration", iteration or None, force_add=True)
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
        (run_dir / "provenance.json").write_text("{}")
        return describe(cfg, run_dir, recorded=[])

    for name in ("mine", "other"):
        write_iteration(tmp_path / name, Iteration("accelerated", "first", 3))
    trained = found("mine/round-2", round=2, first_step=200)
    assert (trained.name, trained.group) == ("round-2 dpo_beta-0.1_seed-0", "mine")
    assert trained.job_type == "dpo" and trained.first_step == 200
    assert {"dpo", "iteration:accelerated", "round-2"} <= set(trained.tags)
    beyond = found("mine/round-2/extrapolated", round=2)
    assert (beyond.name, beyond.group) == ("round-2 extrapolated dpo_beta-0.1_seed-0", "mine")
    assert beyond.first_step == 0 and "round-2" in beyond.tags
    assert found("alone").group is None and found("alone/deep/er").group is None
    (tmp_path / "sweep.json").write_text("{}")
    assert found("other/round-0").group == f"{tmp_path.name}/other"


@pytest.mark.parametrize(
    ("address", "shown_address"),
    [
        (
            "https://user:planted@t0ken@github.com/us/ours.git?private_token=planted#planted",
            "https://github.com/us/ours.git",
        ),
        ("ssh://planted@host:22/us/ours", "ssh://host:22/us/ours"),
        ("git@github.com:us/ours.git", "git@github.com:us/ours.git"),
        ("planted:planted@github.com:us/ours", "git@github.com:us/ours"),
        ("/home/planted/ours", None),
        ("file:///home/planted/ours", None),
        (None, None),
    ],
)
def test_address_of_the_repository_has_no_credentials(
    address: str | None, shown_address: str | None, tmp_path: Path
) -> None:
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    if address is not None:
        subprocess.run(["git", "-C", str(tmp_path), "config", "remote.origin.url", address], check=True)
    assert git_remote(tmp_path) == shown_address


# --- a whole run ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_shows_members_samples_and_alarms(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    enter(tmp_path, shared_cache(tmp_path_factory), monkeypatch)
    words = ["train", TINY, "callbacks=samples", "callbacks.samples.num_prompts=3", "callbacks.health.longer=1e-9"]
    assert cli.main([*words, "callbacks.health.shorter=1e9", "logger.wandb.log_model=true", "hydra.run.dir=run"]) == 0
    wandb.teardown()
    run, folder = Offline(tmp_path / "run"), tmp_path / "run"
    config: Mapping[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    assert run.config["choices"] == config["choices"] and config["choices"]["regularizer"] == "global_kl"
    assert [alert.title for alert in run.of_kind("alert")] == ["health: longer", "health: shorter"]
    assert [alarm["step"] for alarm in json.loads((folder / "health.json").read_text())] == [0, 0]
    samples = rows(folder / "samples.validation.jsonl")
    assert {row["step"] for row in samples} == {0, 2, 4}
    assert run.table("validation_samples") == samples
    best = max(row.get("val/samples/win_rate", 0.0) for row in rows(folder / "history.jsonl"))
    assert run.summary["best/val/samples/win_rate"] == best
    [model] = [one for one in run.of_kind("artifact") if one.type == "model"]
    files = {
        file.relative_to(folder / "policy").as_posix() for file in (folder / "policy").rglob("*") if file.is_file()
    }
    assert {file.path for file in model.manifest.contents} == files
    [line] = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    assert line == f"W&B (offline): wandb sync run/wandb/{run.folder.name}"
