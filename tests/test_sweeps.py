"""Sweeps: skipped, retried and waiting jobs, after failures, killed processes and concurrent starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from spo import cli
from spo.config.compose import compose
from spo.module import AlignmentModule
from spo.runs.checkpoints import last_checkpoint
from spo.runs.claim import Status, claim, finish, is_locked
from spo.runs.ledger import Ledger
from spo.runs.processes import SWEEP_VARIABLE
from tests.commands import TINY, entries, environment, history, job, numbers, shared_cache, spo

# Overrides for a whole run on an enumerable language in about two seconds.
STEPS = 6
FAST = (
    "data=enumerable",
    "model=tabular",
    "logger=record",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "trainer=cpu",
    "probe.num_prompts=1",
    "data.default_samples_per_prompt=2",
    "evaluation.bootstrap_samples=20",
    "evaluation.self_bleu_samples=4",
)
FRAGILE = '''
import os, signal
from pathlib import Path
from spo.losses import DPOLoss

class Fragile(DPOLoss):
    """Loss that fails while the file "broken" exists, and kills its process once if "deadly" exists."""

    def __call__(self, pair, *, alpha, beta):
        if Path("broken").exists():
            raise ValueError("the disc is full")
        if Path("deadly").exists() and any(Path("sweep").glob("*fragile*/checkpoints/last.ckpt")):
            Path("deadly").unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(pair, alpha=alpha, beta=beta)
'''


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


@pytest.fixture
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder that holds nothing but the method ``fragile``, and return it."""
    (tmp_path / "own/method").mkdir(parents=True)
    (tmp_path / "own/method/fragile.yaml").write_text(
        "name: fragile\ndefault_beta: 0.1\nregularizer_weight: 0.01\nloss:\n  _target_: fragile_loss.Fragile\n"
    )
    (tmp_path / "fragile_loss.py").write_text(FRAGILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPO_CACHE_DIR", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def ledger(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "sweep/sweep.json").read_text())["jobs"]


def statuses(folder: Path) -> dict[str, str]:
    return {entry["directory"]: entry["status"] for entry in ledger(folder)}


def directory(folder: Path, part: str) -> Path:
    [found] = [path for path in (folder / "sweep").iterdir() if path.is_dir() and part in read_overrides(path)]
    return found


def read_overrides(path: Path) -> str:
    [overrides] = {
        " ".join(e["overrides"]) for e in ledger(path.parent.parent) if e["directory"] == path.name and not e["same_as"]
    }
    return overrides


# --- the ledger, failures, the table -------------------------------------------------------------------------------


def test_sweep_skips_finished_jobs_and_retries_failed_ones(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "-m", "--config-dir", "own", "method=fragile,dpo", "alpha=0.5,1", *FAST, "hydra.sweep.dir=sweep"]
    (here / "broken").touch()
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert "4 jobs are 2 different runs" in err and "ValueError: the disc is full" in err
    assert re.search(
        r"failed: method=fragile alpha.value=0.5: ValueError: the disc is full\n  in \S*sweep/method-fragile_",
        out,
    )
    assert out.count("same as") == 2 and "2 finished, 2 failed" in out
    jobs = ledger(here)
    assert [(entry["status"], entry["same_as"] is None) for entry in jobs] == [
        ("failed", True),
        ("failed", False),
        ("finished", True),
        ("finished", False),
    ]
    assert [entry["same_as"] for entry in jobs[1::2]] == [entry["directory"] for entry in jobs[::2]]
    assert jobs[0]["overrides"][:3] == ["method=fragile", "alpha=constant", "alpha.value=0.5"]
    failed, finished = here / "sweep" / jobs[0]["directory"], here / "sweep" / jobs[2]["directory"]
    failure = json.loads((failed / "failure.json").read_text())
    assert failure["error"] == jobs[0]["error"] == "ValueError: the disc is full"
    assert failure["attempts"] == 1 and "fragile_loss.py" in failure["traceback"]
    assert not (finished / "failure.json").exists() and SWEEP_VARIABLE not in os.environ

    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert cli.main(words) == 1
    assert json.loads((failed / "failure.json").read_text())["attempts"] == 2
    (here / "broken").unlink()
    capsys.readouterr()
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert "1 of 2 runs is finished already: skipped" in err
    assert "1 of 2 runs is failed already: tried again" in err
    assert out.count("finished before: ") == 1 and "4 finished" in out
    assert not (failed / "failure.json").exists() and numbers(failed)
    assert [row["step"] for row in history(failed)] == list(range(STEPS + 1))
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {".lock", "spo.log"}


def test_directory_with_another_run_fails_its_job_only(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "-m", "method=dpo", *FAST, "hydra.sweep.dir=sweep"]
    assert cli.main([*words, "seed=1"]) == 0
    run = directory(here, "seed=1")
    identity = json.loads((run / "identity.json").read_text())
    identity["config"]["seed"] = 7
    (run / "identity.json").write_text(json.dumps(identity))
    metrics = (run / "metrics.json").read_bytes()
    assert cli.main([*words, "seed=1,2"]) == 1
    assert "holds another run" in capsys.readouterr().err
    assert sorted(statuses(here).values()) == ["failed", "finished"]
    assert (run / "metrics.json").read_bytes() == metrics and not (run / "failure.json").exists()


def test_sweep_directory_is_named_after_the_command(here: Path) -> None:
    named = [
        str(cli_plan(*overrides).sweep_dir.relative_to(here / "outputs/sweeps"))
        for overrides in (
            ["method=sft", "seed=1,2"],
            ["method=sft", "seed=1,2", "launcher=joblib", "rerun=true"],
            ["method=sft", "seed=1,3"],
            ["seed=1"],
        )
    ]
    assert named[0] == named[1] and len(set(named)) == 3
    assert named[0].startswith("method-sft_seed-1-2_") and named[3] == "seed-1"


def cli_plan(*overrides: str) -> Any:
    from spo.config.plan import plan

    return plan(overrides, multirun=True)


def test_ledger_keeps_jobs_of_earlier_commands(tmp_path: Path) -> None:
    sweep_ledger = Ledger(tmp_path)
    for name in ("a", "b", "gone"):
        (tmp_path / name).mkdir()
    sweep_ledger.begin("one", [(["seed=1"], "a"), (["seed=2"], "gone")])
    sweep_ledger.note(["seed=1"], "a", "finished")
    (tmp_path / "gone").rmdir()
    sweep_ledger.begin("two", [(["seed=3"], "b")])
    assert [(entry.directory, entry.status) for entry in sweep_ledger.entries()] == [
        ("a", "finished"),
        ("b", "unfinished"),
    ]
    assert json.loads((tmp_path / "sweep.json").read_text())["command"] == "two"


def test_ledger_keeps_all_concurrent_notes(tmp_path: Path) -> None:
    def note(seed: int) -> None:
        Ledger(tmp_path).note([f"seed={seed}"], f"seed-{seed}", "finished")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(note, range(40)))
    assert {entry.directory for entry in Ledger(tmp_path).entries()} == {f"seed-{seed}" for seed in range(40)}


def test_ledger_marks_running_jobs_without_a_process_as_failed(tmp_path: Path) -> None:
    sweep_ledger = Ledger(tmp_path)
    jobs = sweep_ledger.begin("command", [([f"seed={seed}"], f"seed-{seed}") for seed in (1, 2, 3)])
    for entry in jobs[:2]:
        sweep_ledger.note(entry.overrides, entry.directory, "running")
        (tmp_path / entry.directory).mkdir()
    cfg = compose(["seed=1"], run_dir=tmp_path / "seed-1")
    with claim(tmp_path / "seed-1", cfg):
        assert is_locked(tmp_path / "seed-1")
        assert [entry.directory for entry in sweep_ledger.abandoned(jobs)] == ["seed-2"]
        after = sweep_ledger.settle(jobs, died=True)
    assert [entry.status for entry in after] == ["running", "failed", "unfinished"]
    assert "killed" in json.loads((tmp_path / "seed-2/failure.json").read_text())["error"]


def test_job_waits_for_another_process_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SWEEP_VARIABLE, str(tmp_path))
    cfg = compose(["seed=1"], run_dir=tmp_path / "run")

    def second() -> Status:
        with claim(tmp_path / "run", cfg) as status:
            return status

    with ThreadPoolExecutor(1) as pool:
        with claim(tmp_path / "run", cfg) as first:
            waiting = pool.submit(second)
            until(lambda: "waiting for it" in capsys.readouterr().err)
            assert first is Status.NEW and not waiting.done()
            finish(tmp_path / "run", {"eval/kl": 1.0})
        assert waiting.result() is Status.FINISHED


# --- damaged checkpoints -------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    file.write_bytes(whole)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_damaged_checkpoint_is_skipped_with_a_note(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    assert last_checkpoint(tmp_path) == (None, -1, None)
    folder.mkdir()
    for name, step in (("last", 8), ("best", 5), ("step-3", 3), ("step-6", 6)):
        torch.save({"global_step": step, "weights": torch.ones(1000, 20)}, folder / f"{name}.ckpt")
    assert last_checkpoint(tmp_path) == (str(folder / "last.ckpt"), 8, None)
    assert caplog.text == ""
    damage(folder / "last.ckpt")
    assert last_checkpoint(tmp_path) == (str(folder / "step-6.ckpt"), 6, None)
    [record] = caplog.records
    assert record.getMessage() == f"{folder}/last.ckpt is damaged: the run resumes from step-6.ckpt at step 6"
    for name in ("best", "step-3", "step-6"):
        damage(folder / f"{name}.ckpt")
    assert last_checkpoint(tmp_path) == (None, -1, None)
    assert "are damaged: the run starts again, since it does not have another checkpoint" in caplog.text


def test_run_with_damaged_checkpoints_restarts_with_the_same_result(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job(tmp_path / "whole", cache, *FAST, "method=dpo")
    step = AlignmentModule.training_step

    def interrupted(self: AlignmentModule, window: Any, batch_idx: int) -> None:
        if self.global_step == 5:
            raise RuntimeError("the power is gone")
        step(self, window, batch_idx)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr(AlignmentModule, "training_step", interrupted)
        job(broken, cache, *FAST, "method=dpo")
    for checkpoint in (broken / "checkpoints").iterdir():
        cut(checkpoint)
    assert job(broken, cache, *FAST, "method=dpo") == {**whole, "notes/damaged_checkpoints": 2.0}
    assert history(broken) == history(tmp_path / "whole")
    assert not (broken / "failure.json").exists()


# --- killed processes ----------------------------------------------------------------------------------------------


def until(holds: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until a condition holds."""
    while not holds():
        assert process is None or process.poll() is None, "the process ended too early"
        time.sleep(0.02)


def start(words: list[str], folder: Path, cache: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [Path(sys.executable).with_name("spo"), *words],
        cwd=folder,
        env=environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def every_run_is_whole(folder: Path, count: int, last_step: int) -> None:
    runs = [path for path in (folder / "sweep").iterdir() if path.is_dir()]
    assert len(runs) == count and set(statuses(folder).values()) == {"finished"}
    for run in runs:
        assert numbers(run) and not (run / "failure.json").exists()
        assert [row["step"] for row in history(run)] == list(range(last_step + 1))


LONG = (*FAST, "trainer.max_steps=40", "trainer.val_check_interval=5")


@pytest.mark.parametrize(
    ("launcher", "all_of_it"),
    [
        pytest.param("local", True, marks=pytest.mark.slow),
        pytest.param("local", False, marks=pytest.mark.nightly),
        pytest.param("joblib", True, marks=pytest.mark.nightly),
        pytest.param("joblib", False, marks=pytest.mark.slow),
    ],
    ids=lambda value: {True: "every process", False: "the first process"}.get(value, value),
)
def test_killed_sweep_finishes_every_job_once_when_repeated(
    launcher: str, all_of_it: bool, cache: Path, tmp_path: Path
) -> None:
    words = ["train", "-m", *LONG, f"launcher={launcher}", "method=dpo", "seed=1,2,3", "hydra.sweep.dir=sweep"]
    process = start(words, tmp_path, cache)
    until(lambda: any('"step": 10' in file.read_text() for file in tmp_path.glob("sweep/*/history.jsonl")), process)
    if all_of_it:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.parent for path in tmp_path.glob("sweep/*/metrics.json")}
    assert len(finished) < 3
    before = {run: (run / "metrics.json").stat().st_mtime_ns for run in finished}
    spo(*words, folder=tmp_path, cache=cache)
    every_run_is_whole(tmp_path, 3, 40)
    assert {run: (run / "metrics.json").stat().st_mtime_ns for run in finished} == before
    if launcher == "local" and all_of_it:
        run = directory(tmp_path, "seed=1")
        assert numbers(run) == job(tmp_path / "unbroken", cache, *LONG, "method=dpo", "seed=1")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["launcher=joblib"], id="joblib", marks=pytest.mark.slow),
        pytest.param(
            ["strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
            id="two devices",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_job_whose_process_dies_does_not_stop_other_jobs(settings: list[str], here: Path, cache: Path) -> None:
    words = ["train", "-m", "--config-dir", "own", "method=fragile,dpo", *FAST, *settings, "hydra.sweep.dir=sweep"]
    (here / "deadly").touch()
    done = spo(*words, folder=here, cache=cache, status=1)
    failed = directory(here, "method=fragile")
    assert statuses(here) == {failed.name: "failed", directory(here, "method=dpo").name: "finished"}
    words_of_failure = json.loads((failed / "failure.json").read_text())["error"]
    assert f"failed: method=fragile: {words_of_failure.splitlines()[0]}" in done.stdout
    if "launcher=joblib" in settings:  # with several devices another process may live to report it
        assert words_of_failure == "its process was killed by signal 9"
    spo(*words, folder=here, cache=cache)
    every_run_is_whole(here, 2, STEPS)


@pytest.mark.nightly
def test_launcher_restarts_after_a_worker_is_killed(here: Path, cache: Path) -> None:
    words = ["train", "-m", *LONG, "launcher=joblib", "method=dpo", "seed=1,2,3", "hydra.sweep.dir=sweep"]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("spo"), *words],
        cwd=here,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: any('"step": 10' in file.read_text() for file in here.glob("sweep/*/history.jsonl")))
    [worker, *_] = [pid for pid in children(process.pid) if b"LokyProcess" in command_of(pid)]
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "starting the rest again" in err and "3 finished" in out
    every_run_is_whole(here, 3, 40)


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # of each thread
    return [int(word) for file in lists for word in file.read_text().split()]


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


# --- the shared cache ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_concurrent_jobs_fill_a_cold_cache_once(tmp_path: Path) -> None:
    words = ["train", "-m", TINY, "launcher=joblib", "logger=record", "reference=precomputed", "method=dpo,ipo"]
    spo(*words, "hydra.sweep.dir=sweep", folder=tmp_path, cache=tmp_path / "cache")
    every_run = [path for path in (tmp_path / "sweep").iterdir() if path.is_dir()]
    assert len(every_run) == 2
    logs = "".join((run / "spo.log").read_text() for run in every_run)
    # Each of the three splits has prompts of its own to sample for.
    made = {"making the reference model": 1, "prompts for the preference pairs": 3, "scoring the pairs": 1}
    assert {message: logs.count(message) for message in made} == made
    assert {kind: len(entries(tmp_path / "cache", kind)) for kind in ("sft", "pairs")} == {"sft": 1, "pairs": 1}
    assert len(list((tmp_path / "cache/reference_logps").glob("*.sqlite"))) == 1
