"""The tracker for Weights & Biases, read from the files that its client writes offline."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml

from spo.tracking import RunDescription
from spo.tracking.wandb import WandbTracker
from tests.commands import SECRETS, TINY, Sweep, environment, rows, shared_cache, spo, sweep
from tests.wandb_files import Offline

METHODS = ("spo", "dpo", "ipo")


def assert_same_history(offline: Offline, run: Path) -> None:
    """Assert that W&B has exactly the rows of the history, at the same steps."""
    recorded, shown = rows(run / "history.jsonl"), offline.history
    steps = [row.pop("step") for row in recorded]
    assert [row["_step"] for row in shown] == [row["trainer/global_step"] for row in shown] == steps
    for row, seen in zip(recorded, shown, strict=True):
        assert {key: seen.get(key) for key in row} == pytest.approx(row, nan_ok=True)


@pytest.fixture
def swept(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(tmp_path_factory)


@pytest.fixture
def six(swept: Sweep) -> dict[tuple[str, int], Offline]:
    return {(method, seed): Offline(swept.directory(method, seed)) for method in METHODS for seed in (1, 2)}


def test_sweep_jobs_are_wandb_runs_of_one_group(six: dict[tuple[str, int], Offline]) -> None:
    assert len({offline.run.run_id for offline in six.values()}) == 6
    assert {offline.run.run_group for offline in six.values()} == {"sweep"}
    for (method, _), offline in six.items():
        assert offline.run.job_type == method and method in offline.run.tags


def test_run_names_hold_method_coefficients_and_seed(six: dict[tuple[str, int], Offline]) -> None:
    names = {key: offline.run.display_name for key, offline in six.items()}
    assert names["spo", 1] == "spo_alpha-0.03_beta-0.1_seed-1"
    assert names["dpo", 2] == "dpo_beta-0.2_seed-2"
    assert names["ipo", 1] == "ipo_beta-1_seed-1"
    assert len(set(names.values())) == 6


def test_wandb_config_is_the_resolved_config_with_provenance(swept: Sweep, six: dict[tuple[str, int], Offline]) -> None:
    for (method, seed), offline in six.items():
        run = swept.directory(method, seed)
        config = offline.config
        provenance = config.pop("provenance")
        assert config == yaml.safe_load((run / "config.yaml").read_text())
        assert provenance == json.loads((run / "provenance.json").read_text())


def test_curves_and_summary_match_the_run_directory(swept: Sweep, six: dict[tuple[str, int], Offline]) -> None:
    for (method, seed), offline in six.items():
        run = swept.directory(method, seed)
        assert_same_history(offline, run)
        final = json.loads((run / "metrics.json").read_text())
        assert {key: offline.summary.get(key) for key in final} == pytest.approx(final)


def test_samples_are_logged_as_a_table(swept: Sweep, six: dict[tuple[str, int], Offline]) -> None:
    for (method, seed), offline in six.items():
        [file] = offline.folder.glob("files/media/table/samples*.table.json")
        table, samples = json.loads(file.read_text()), rows(swept.directory(method, seed) / "samples.jsonl")
        for row in samples:  # the list of all completions of the reference is no cell
            del row["references"]
        assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == samples


def test_secrets_of_the_environment_are_not_written(swept: Sweep) -> None:
    files = [file for file in swept.folder.rglob("*") if file.is_file()]
    assert len(files) > 60
    for file in files:
        content = file.read_bytes()
        assert all(secret.encode() not in content for secret in SECRETS.values()), file
    assert all(secret not in swept.done.stdout + swept.done.stderr for secret in SECRETS.values())


# --- interrupted runs ----------------------------------------------------------------------------------------------

# Connections to other computers are recorded and rejected.
NO_NETWORK = """
import os, socket
def watched(name):
    original = getattr(socket.socket, name)
    def connect(self, address):
        if self.family == socket.AF_UNIX or str(address[0]).startswith(("127.", "localhost", "::1")):
            return original(self, address)
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{address}\\n")
        raise OSError("no network")
    setattr(socket.socket, name, connect)
watched("connect"), watched("connect_ex")
"""


def cut_off(folder: Path, cache: Path) -> tuple[list[str], dict[str, str]]:
    """Return a command prefix and an environment without network, account and settings."""
    (folder / "blocked").mkdir()
    (folder / "blocked" / "sitecustomize.py").write_text(NO_NETWORK)
    kept = {k: v for k, v in environment(cache).items() if not k.startswith(("WANDB", "HF_"))}
    path = os.pathsep.join(filter(None, [str(folder / "blocked"), kept.get("PYTHONPATH")]))
    variables = kept | {"PYTHONPATH": path, "HOME": str(folder), "ATTEMPTS": str(folder / "attempts")}
    alone = ["unshare", "--map-root-user", "--net"]  # isolates wandb's own process too, where Linux permits
    try:
        able = subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        able = False
    return alone if able else [], variables


def test_killed_offline_run_resumes_with_every_step_once(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    prefix, variables = cut_off(tmp_path, shared_cache(tmp_path_factory))
    words = [*prefix, str(Path(sys.executable).with_name("spo")), "train", TINY, "trainer.max_steps=40"]
    words += ["trainer.val_check_interval=5", "trainer.log_every_n_steps=1", "probe.num_prompts=1"]
    words += ["regularizer.refresh_every=20", "hydra.run.dir=run"]
    run = tmp_path / "run"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(words, cwd=tmp_path, env=variables, stdout=log, stderr=log)
        while not ((run / "history.jsonl").exists() and len(rows(run / "history.jsonl")) > 7):
            assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    [before] = run.glob("wandb/offline-run-*")
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    offline = Offline(run)
    assert [row["step"] for row in rows(run / "history.jsonl")] == list(range(41))
    assert_same_history(offline, run)
    assert offline.run.run_id == json.loads((run / "wandb_run.json").read_text())["id"]
    assert before.name.endswith(offline.run.run_id) and before.name != offline.folder.name
    assert [moved.name for moved in (run / "wandb" / "superseded").iterdir()] == [before.name]
    assert not (tmp_path / "attempts").exists()
    synced = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "sync", "--dry-run", run / "wandb"],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert re.findall(r"\S+\.wandb", synced.stderr + synced.stdout) == ["run/wandb/latest-run/" + offline.name]


def described(folder: Path, recorded: Sequence[Mapping[str, Any]] = ()) -> RunDescription:
    return RunDescription("a", "group", "spo", ["spo"], {"seed": 1}, folder, recorded)


def closed(tracker: WandbTracker) -> None:
    """Close a run and wait until wandb's own process has written its file."""
    tracker.close()
    wandb.teardown()


def test_resumed_online_run_keeps_its_id_and_logs_missing_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    class Online:
        starting_step = 11  # the server has the steps up to 10
        offline = disabled = False
        url = "https://wandb.example/run"
        finish = define_metric = staticmethod(lambda *_, **__: None)

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

    monkeypatch.setattr(wandb, "init", lambda **settings: opened.append(settings) or Online())
    recorded = [{"step": step, "train/loss": step / 10, "train/kl": None} for step in (5, 10, 15)]
    for _ in range(2):
        tracker = WandbTracker("spo", None, "online", str(tmp_path))
        tracker.describe(described(tmp_path, recorded))
        tracker.log_metrics({"train/loss": 2.0}, 20)
        tracker.close()
    assert {one["resume"] for one in opened} == {"allow"} and {one["mode"] for one in opened} == {"online"}
    assert len({one["id"] for one in opened}) == 1
    assert [step for step, _ in logged] == [15, 20] * 2
    assert logged[0][1]["train/loss"] == 1.5 and math.isnan(logged[0][1]["train/kl"])


def test_step_is_logged_once(tmp_path: Path) -> None:
    # A resumed online run repeats the steps after its last checkpoint.
    tracker = WandbTracker("spo", None, "offline", str(tmp_path))
    tracker.describe(described(tmp_path, [{"step": 4, "train/loss": 0.4}]))
    for step in (2, 4, 6):
        tracker.log_metrics({"train/loss": float(step)}, step)
    closed(tracker)
    shown = [(row["_step"], row["train/loss"]) for row in Offline(tmp_path).history]
    assert shown == [(4, 4.0), (6, 6.0)]


def test_further_opponents_are_columns_of_the_samples_table(tmp_path: Path) -> None:
    chosen = {"completion": "c", "verdict": 1.0}
    samples = [
        {"prompt": "a", "reward": None, "opponents": {"chosen": chosen}},
        {"prompt": "b", "reward": 2.0, "opponents": {"../other": {"completion": "d", "verdict": None}}},
        {"prompt": "c", "reward": 2.0},
    ]
    tracker = WandbTracker("spo", None, "offline", str(tmp_path))
    tracker.describe(described(tmp_path))
    tracker.conclude({}, samples)
    closed(tracker)
    [file] = Offline(tmp_path).folder.glob("files/media/table/samples*.table.json")
    table = json.loads(file.read_text())
    rows_of_table = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["opponents/chosen/completion"] for row in rows_of_table] == ["c", None, None]
    assert [row["opponents/../other/completion"] for row in rows_of_table] == [None, "d", None]
    assert [row["reward"] for row in rows_of_table] == [None, 2.0, 2.0]


def test_disabled_tracker_writes_nothing(tmp_path: Path) -> None:
    tracker = WandbTracker("spo", None, "disabled", str(tmp_path))
    tracker.describe(described(tmp_path, [{"step": 4, "train/loss": 0.4}]))
    tracker.log_metrics({"train/loss": 1.0}, 5)
    tracker.conclude({"eval/kl": 1.0}, [{"prompt": "a"}])
    tracker.close()
    assert not (tmp_path / "wandb").exists()


# --- several devices per job ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sweep_of_jobs_with_two_devices_has_one_wandb_run_per_job(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    words = ["train", "-m", TINY, "seed=1,2,3", "trainer.accelerator=cpu", "trainer.devices=2", "strategy=ddp"]
    words += ["hydra.sweep.dir=sweep"]
    spo(*words, folder=tmp_path, cache=shared_cache(tmp_path_factory), WANDB_MODE="offline")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]  # Lightning's processes do not create outputs/
    jobs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir() and not path.name.startswith("."))
    assert len(jobs) == 3
    runs = [Offline(job) for job in jobs]
    assert len({one.run.run_id for one in runs}) == 3 and {one.run.run_group for one in runs} == {"sweep"}
    assert [one.config["seed"] for one in runs] == [1, 2, 3]
    for job, one in zip(jobs, runs, strict=True):
        assert (job / "metrics.json").exists()
        assert_same_history(one, job)
