"""Full disks, folders that cannot be written, damaged files, leftovers of killed processes, and homes of others."""

from __future__ import annotations

import errno
import json
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from lightning.pytorch.loggers import CSVLogger, Logger

import spo
from spo import cli
from spo.comparison.runs import find_runs
from spo.config.checks import quick_problems
from spo.config.compose import compose
from spo.data.logps_store import LogpsStore
from spo.errors import DataError, JudgeError, UserError, placed_by, user_message
from spo.evaluation.judges.pairwise import VerdictStore
from spo.notes import collect_notes
from spo.records import cache, store
from spo.records.cache import cached
from spo.records.files import read_json, read_mapping, replacing, write_json, write_text
from spo.records.leftovers import MAX_WRITING_S, remove_abandoned_builds
from spo.runs.claim import Status, claim, finish, write_failure
from spo.runs.identity import identity
from spo.runs.ledger import Ledger
from spo.runs.saved_config import load_config
from spo.stages.clean import clean_command
from spo.tracking.guard import HOME_PLACES, make_guarded, writable_home

ROOT = Path(spo.__file__).parents[1]
EXACT = (
    "method=dpo",
    "model=tabular",
    "data=enumerable",
    "judge=none",
    "logger=record",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.enable_progress_bar=false",
    "evaluation.num_prompts=2",
    "evaluation.bootstrap_samples=10",
    "probe.num_prompts=0",
)


def fails(number: int, path: Path | None = None) -> Callable[..., Any]:
    """Return a function that fails as the system would."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number), *([] if path is None else [str(path)]))

    return fail


# --- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space there"),
        (errno.EDQUOT, "the disk quota is used up; free some space there"),
        (errno.EFBIG, "the system does not allow a file of this size"),
        (errno.EROFS, "the file system is read-only; set hydra.run.dir"),
        (errno.EACCES, "permission is denied; make the folder writable"),
        (errno.ENOTDIR, "a part of this path is not a folder"),
        (errno.EISDIR, "there is a folder in place of a file; move it away"),
        (errno.ENAMETOOLONG, "the name is too long"),
        (errno.EIO, "the disk cannot be read or written"),
    ],
)
def test_errors_of_the_file_system_name_the_path_and_a_remedy(number: int, words: str, tmp_path: Path) -> None:
    file = tmp_path / "run" / "metrics.json"
    with pytest.raises(UserError) as caught, placed_by("set hydra.run.dir", tmp_path / "run"):
        fails(number, file)()
    assert str(caught.value).startswith(f"{file}: {words}") and "hydra.run.dir" in str(caught.value)
    message = user_message(OSError(number, "", str(file)))
    assert message is not None and words.partition(";")[0] in message and "SPO_CACHE_DIR" in message


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_error_without_a_path_gets_that_of_the_run(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}: the disk is full"), placed_by("set hydra.run.dir", tmp_path):
        raise error


@pytest.mark.parametrize("error", [KeyError("a"), OSError("no such model"), RuntimeError("a bug"), ConnectionError()])
def test_other_errors_stay_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), placed_by("set hydra.run.dir", tmp_path):
        raise error
    assert user_message(error) is None


def test_full_disk_of_the_output_is_not_a_traceback(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "spo", "--help"], stdout=full, stderr=-1, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("spo: the output of this command cannot be written: No space left")


# --- writing -------------------------------------------------------------------------------------------------------


def test_half_written_file_never_replaces_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.json"
    write_text(file, "good")

    def write_half(path: Path, text: str, **options: Any) -> int:
        path.write_bytes(text[:2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError) as caught:
        write_text(file, "longer")
    assert caught.value.filename == str(file) and caught.value.errno == errno.ENOSPC
    assert [path.read_text() for path in tmp_path.iterdir()] == ["good"]


def test_half_written_folder_never_replaces_a_good_one(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    for text in ("old", "new"):
        with replacing(folder) as temporary:
            (temporary / "weights").write_text(text)
    with pytest.raises(OSError), replacing(folder) as temporary:
        (temporary / "weights").write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (folder / "weights").read_text() == "new" and list(tmp_path.iterdir()) == [folder]


def test_failure_on_a_full_disk_is_the_one_that_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the disk is full; free some"), claim(tmp_path, compose([], run_dir=tmp_path)):
        monkeypatch.setattr(Path, "write_text", fails(errno.ENOSPC))
        write_json(tmp_path / "metrics.json", {})


# --- the cache -----------------------------------------------------------------------------------------------------


def build(folder: Path | None) -> None:
    assert folder is not None
    (folder / "content").write_text("expensive")


def test_cache_that_cannot_be_written_works_as_far_as_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = cached(tmp_path, "sft", {"a": 1}, build)
    monkeypatch.setattr(cache, "FileLock", fails(errno.EROFS))
    monkeypatch.setattr(os, "utime", fails(errno.EROFS))
    assert cached(tmp_path, "sft", {"a": 1}, build) == entry
    with pytest.raises(UserError, match=r"read-only; set paths\.cache \(or SPO_CACHE_DIR\)"):
        cached(tmp_path, "sft", {"a": 2}, build)


def test_full_disk_leaves_no_entry_behind(tmp_path: Path) -> None:
    def fill(folder: Path | None) -> None:
        build(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"the disk is full; free some space there, or set paths\.cache"):
        cached(tmp_path, "sft", {}, fill)
    assert [path.suffix for path in (tmp_path / "sft").iterdir()] == [".lock"]
    assert (cached(tmp_path, "sft", {}, build) / "content").read_text() == "expensive"


def test_file_in_place_of_an_entry_is_replaced(tmp_path: Path) -> None:
    entry = cached(tmp_path, "sft", {}, build)
    (entry / "content").unlink(), (entry / "manifest.json").unlink(), entry.rmdir()
    entry.write_text("a file")
    assert (cached(tmp_path, "sft", {}, build) / "content").read_text() == "expensive"


def test_builds_of_dead_processes_are_removed_and_others_stay(tmp_path: Path) -> None:
    dead, alive = (tmp_path / "sft" / f"{digit * 32}.abcd_123" for digit in "ab")
    entry = cached(tmp_path, "sft", {}, build)
    for folder in (dead, alive):
        folder.mkdir()
        build(folder)
    with FileLock(f"{alive.with_suffix('')}.lock", is_singleton=False):
        remove_abandoned_builds(tmp_path)
    assert not dead.exists() and alive.exists() and entry.exists()


KEYS, VALUES = [b"a", b"b"], torch.tensor([-1.5, -2.5])


def test_stores_that_cannot_be_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logps, verdicts = LogpsStore(tmp_path / "logps.sqlite", torch.float32), VerdictStore(tmp_path / "verdicts.sqlite")
    logps.put(KEYS, VALUES)
    verdicts.put({"a": 0.5})
    monkeypatch.setattr(store, "FileLock", fails(errno.EROFS))
    assert torch.equal(logps.get(KEYS), VALUES) and verdicts.get(["a", "b"]) == {"a": 0.5}
    with pytest.raises(DataError, match=r"read-only\): set reference\.cache_dir"):
        logps.put(KEYS, VALUES)
    with pytest.raises(JudgeError, match=r"read-only\): set judge\.cache"):
        verdicts.put({"b": 1.0})


def foreign(file: Path, statement: str) -> Path:
    with sqlite3.connect(file) as database:
        database.execute(statement)
    database.close()
    return file


@pytest.mark.parametrize("statement", ["CREATE TABLE logps (a, b, c, d)", "CREATE VIEW logps AS SELECT 1 AS key"])
def test_store_with_a_foreign_schema_is_moved_away_if_it_can_be_computed_again(statement: str, tmp_path: Path) -> None:
    logps = LogpsStore(foreign(tmp_path / "logps.sqlite", statement), torch.float32)
    assert logps.get(KEYS).isnan().all() and (tmp_path / "logps.damaged").exists()
    logps.put(KEYS, VALUES)
    assert torch.equal(logps.get(KEYS), VALUES)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE verdicts (a, b)",
        "CREATE TABLE verdicts AS SELECT 'a' AS key, 'yes' AS verdict",
        "CREATE TABLE verdicts AS SELECT 'a' AS key, 7.0 AS verdict",
    ],
)
def test_foreign_verdicts_are_an_error_and_stay(statement: str, tmp_path: Path) -> None:
    file = foreign(tmp_path / "verdicts.sqlite", statement)
    before = file.read_bytes()
    with pytest.raises(JudgeError, match=r"verdicts\.sqlite cannot be read or written \(.+\): move the file away"):
        VerdictStore(file).get(["a"])
    assert file.read_bytes() == before


# --- run directories -----------------------------------------------------------------------------------------------


def claimed(run_dir: Path, *overrides: str) -> Status:
    with claim(run_dir, compose(overrides, run_dir=run_dir)) as status:
        return status


def test_failed_configuration_that_is_mended_may_use_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="typo"), claim(tmp_path, compose(["seed=1"], run_dir=tmp_path)):
        (tmp_path / "history.jsonl").write_text('{"step": 0, "val/loss": 1.0}\n')
        raise UserError("typo")
    assert claimed(tmp_path, "seed=2") is Status.NEW
    assert "takes its place" in capsys.readouterr().err
    assert read_json(tmp_path / "identity.json")["config"]["seed"] == 2 and load_config(tmp_path).seed == 2
    [failed] = read_json(tmp_path / "provenance.json")["failed_before"]
    assert "seed: 1 there, 2 now" in failed["changed"] and failed["error"] == "typo"
    assert not (tmp_path / "failure.json").exists() and not (tmp_path / "history.jsonl").exists()


@pytest.mark.parametrize("trained", ["checkpoints/last.ckpt", "history.jsonl", "metrics.json", "policy/config.json"])
def test_directory_with_trained_data_is_never_taken_over(trained: str, tmp_path: Path) -> None:
    claimed(tmp_path, "seed=1")
    write_failure(tmp_path, "no memory")
    (tmp_path / trained).parent.mkdir(exist_ok=True)
    (tmp_path / trained).write_text('{"step": 20}\n')
    with pytest.raises(UserError, match="holds another run"):
        claimed(tmp_path, "seed=2")
    assert claimed(tmp_path, "seed=1") is not Status.NEW


def test_run_that_was_not_recorded_as_failed_is_not_taken_over(tmp_path: Path) -> None:
    claimed(tmp_path, "seed=1")
    with pytest.raises(UserError, match="holds another run"):
        claimed(tmp_path, "seed=2")


SHAPES = ("", "{", "[1, 2]", '"words"', "null", "\udcff\udcfe", None)
"""Contents of a damaged file; ``None`` is a folder in its place."""


def damage(file: Path, shape: str | None) -> None:
    file.unlink(missing_ok=True)
    if shape is None:
        file.mkdir()
    else:
        file.write_bytes(shape.encode(errors="surrogateescape"))


@pytest.mark.parametrize("name", ["identity.json", "provenance.json", "config.yaml", "composed.yaml"])
def test_damaged_files_that_follow_from_the_configuration_are_written_again(name: str, tmp_path: Path) -> None:
    claimed(tmp_path, "seed=1")
    before = {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
    cfg = compose(["seed=1"], run_dir=tmp_path)
    for number, shape in enumerate(SHAPES):
        damage(tmp_path / name, shape)
        with claim(tmp_path, cfg) as status:
            assert status is Status.UNFINISHED
        assert number == len(list(tmp_path.glob(f"{name}.damaged*"))) - 1
        if name == "provenance.json":
            again = read_json(tmp_path / name)
            assert again.pop("written_again") and again == json.loads(before[name])
        else:
            assert (tmp_path / name).read_text() == before[name]


def test_damaged_identity_of_another_run_is_an_error(tmp_path: Path) -> None:
    claimed(tmp_path, "seed=1")
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(UserError, match=r"identity\.json is missing or damaged, so the run .* rerun=true"):
        claimed(tmp_path, "seed=2")
    assert (tmp_path / "identity.json").read_text() == "{"


@pytest.mark.parametrize("shape", [*SHAPES, "{}"])
def test_damaged_metrics_and_failures_leave_a_run_unfinished(shape: str | None, tmp_path: Path) -> None:
    claimed(tmp_path)
    damage(tmp_path / "metrics.json", shape)
    assert claimed(tmp_path) is Status.UNFINISHED
    damage(tmp_path / "failure.json", shape)
    if shape is not None:
        write_failure(tmp_path, "again")
        assert read_json(tmp_path / "failure.json")["attempts"] == 1
    if (tmp_path / "metrics.json").is_file():
        finish(tmp_path, {"a": 1.0})
        assert claimed(tmp_path) is Status.FINISHED


def test_folder_in_place_of_the_lock_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock: there is a folder in place of a file; move it away"):
        claimed(tmp_path)


@pytest.mark.parametrize("shape", [*SHAPES, "a: 1", "paths: 3", "- a"])
def test_damaged_composed_yaml_is_an_error_in_words(shape: str | None, tmp_path: Path) -> None:
    claimed(tmp_path)
    damage(tmp_path / "composed.yaml", shape)
    with pytest.raises(UserError, match=r"composed\.yaml is damaged \(.+\): start the run again with its own command"):
        load_config(tmp_path)


LEDGERS = (*SHAPES[:-1], '{"jobs": 3}', '{"jobs": [1]}', '{"jobs": [{"overrides": 1}]}')


@pytest.mark.parametrize("shape", LEDGERS)
def test_damaged_ledger_is_written_anew_and_a_comparison_says_so(shape: str, tmp_path: Path) -> None:
    damage(tmp_path / "sweep.json", shape)
    assert any("sweep.json is damaged" in problem for problem in find_runs([tmp_path]).problems)
    entries = Ledger(tmp_path).begin("spo train -m", [(["seed=1"], "seed-1")])
    assert [entry.directory for entry in Ledger(tmp_path).entries()] == ["seed-1"] == [entries[0].directory]
    assert (tmp_path / "sweep.json.damaged").exists()


def test_ledger_with_further_keys_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "sweep.json", {"jobs": [{"overrides": ["a=1"], "directory": "a-1", "color": "red"}]})
    assert Ledger(tmp_path).entries()[0].directory == "a-1"


def test_temporary_files_of_a_killed_run_are_removed_at_the_next_start(tmp_path: Path) -> None:
    claimed(tmp_path)
    for name in (".metrics.json.123", ".report.html.4", ".policy.77/model.safetensors", ".home/wandb.1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    assert claimed(tmp_path) is Status.UNFINISHED
    # A report may be written by another process at this moment, unless it is old.
    left = {path.name for path in tmp_path.glob(".*")}
    assert left == {".lock", ".report.html.4", ".home"} and (tmp_path / ".home/wandb.1").exists()
    os.utime(tmp_path / ".report.html.4", (time.time() - 2 * MAX_WRITING_S,) * 2)
    claimed(tmp_path)
    assert not (tmp_path / ".report.html.4").exists()


# --- empty groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["file", "command line", "removed"])
def test_logger_and_callbacks_that_are_null_work_like_none(written: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nlogger: null\ncallbacks: null\n"
    (tmp_path / "experiment" / "nothing.yaml").write_text(text)
    overrides = {
        "file": ["experiment=nothing"],
        "command line": ["logger=null", "callbacks=null", "experiment=null"],
        "removed": ["~logger", "~callbacks"],
    }[written]
    cfg = compose(overrides, config_dir=tmp_path, run_dir=tmp_path)
    none = compose(["logger=record", "callbacks=none"], run_dir=tmp_path)
    assert cfg.logger == {} == cfg.callbacks and quick_problems(cfg) == []
    assert identity(cfg)["digest"] == identity(none)["digest"]


@pytest.mark.parametrize("group", ["judge", "regularizer", "reference"])
def test_other_groups_that_may_be_empty_accept_null(group: str) -> None:
    assert compose(["method=sft", f"{group}=null"])[group] == compose(["method=sft", f"{group}=none"])[group]


@pytest.mark.parametrize("group", ["regularizer", "sft", "optimizer", "speed"])
def test_groups_that_a_run_needs_are_not_null(group: str, tmp_path: Path) -> None:
    cfg = compose([f"~{group}"])
    assert any(problem.startswith(f"{group}=null: a run needs this group") for problem in quick_problems(cfg))


# --- trackers and homes --------------------------------------------------------------------------------------------


class Failing(CSVLogger):
    """A tracker that fails where its name says."""

    def __init__(self, save_dir: str, where: str) -> None:
        super().__init__(save_dir)
        self.where, self.calls = where, list[str]()
        self._reach("init")

    def _reach(self, place: str) -> None:
        self.calls.append(place)
        if place == self.where:
            raise PermissionError(errno.EACCES, "Permission denied", "/home/nobody")

    def describe(self, description: Any) -> None:
        self.directory = description.directory
        self._reach("describe")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._reach("log_metrics")

    def conclude(self, metrics: dict[str, float], samples: list[Any]) -> None:
        assert read_mapping(self.directory / "metrics.json") and (self.directory / "report.html").is_file()
        self._reach("conclude")

    def close(self) -> None:
        self._reach("close")


@pytest.mark.parametrize("where", ["init", "describe", "log_metrics", "conclude", "close"])
def test_failure_of_a_tracker_is_noted_and_ends_its_work_alone(where: str, tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"a": 1})
    (tmp_path / "report.html").touch()
    with collect_notes() as notes:
        logger: Any = make_guarded("bad", lambda: Failing(str(tmp_path), where))
        if where == "init":
            assert logger is None
        else:
            logger.describe(type("Description", (), {"directory": tmp_path}))
            logger.log_metrics({"a": 1.0}, 1)
            logger.conclude({}, [])
            logger.close()
            assert isinstance(logger, Logger) and logger.calls[-1] == "close"
            order = ["init", "describe", "log_metrics", "conclude", "close"]
            assert logger.calls == list(dict.fromkeys([*order[: order.index(where) + 1], "close"]))
    assert notes == {"notes/logger_failed_bad": 1.0}


def test_home_that_cannot_be_written_is_replaced_during_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HOME_PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", "/mine")
    monkeypatch.setenv("HF_HOME", "/mine too")
    monkeypatch.setenv("HOME", str(tmp_path))
    with writable_home(tmp_path / "run"):
        assert "WANDB_DATA_DIR" not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    with writable_home(tmp_path / "run"):
        assert (
            Path(os.environ["WANDB_DATA_DIR"]).is_dir()
            and tmp_path / "run" in Path(os.environ["WANDB_DATA_DIR"]).parents
        )
        assert os.environ["WANDB_CACHE_DIR"] == "/mine" and "HF_DATASETS_CACHE" not in os.environ
    assert "WANDB_DATA_DIR" not in os.environ and not (tmp_path / "nowhere").exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["init", "conclude"])
def test_run_with_a_failing_tracker_is_finished(where: str, tmp_path: Path, cache_dir: Path) -> None:
    bad = f"+logger.bad={{_target_: {__name__}.Failing, save_dir: {tmp_path}, where: {where}}}"
    overrides = [*EXACT, bad, f"hydra.run.dir={tmp_path / 'run'}", f"paths.cache='{cache_dir}'"]
    assert cli.main(["train", *overrides]) == 0
    assert read_json(tmp_path / "run/metrics.json")["notes/logger_failed_bad"] == 1
    assert (tmp_path / "run/report.html").is_file() and not (tmp_path / "run/failure.json").exists()


# --- a small disk --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_that_filled_the_disk_continues_with_the_same_command(tmp_path: Path, cache_dir: Path) -> None:
    def train(cache: Path, most_bytes: int) -> subprocess.CompletedProcess[str]:
        """Train where no file may have more bytes, which the system reports much as it reports a full disk."""
        words = ("method=dpo", "judge=none", "logger=record", "+debug=tiny", f"hydra.run.dir={tmp_path / 'run'}")
        return subprocess.run(
            [sys.executable, "-m", "spo", "train", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "SPO_CACHE_DIR": str(cache)},
            cwd=tmp_path,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY)),
        )

    def last_line(done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 1 and "Traceback" not in done.stderr
        line = done.stderr.splitlines()[-1].removeprefix("spo: ")
        assert read_json(tmp_path / "run/failure.json")["error"] == line
        return line

    line = last_line(train(tmp_path / "cache", 200_000))
    assert line.startswith(f"{tmp_path / 'cache'}: the system does not allow") and "or set paths.cache" in line
    assert not [path for path in (tmp_path / "cache/sft").iterdir() if path.is_dir()]
    line = last_line(train(cache_dir, 1_000_000))  # The reference model fits, a checkpoint does not.
    assert line.startswith(f"{tmp_path / 'run'}: the system does not allow") and "or set hydra.run.dir" in line
    assert train(cache_dir, -1).returncode == 0
    assert read_mapping(tmp_path / "run/metrics.json") and not (tmp_path / "run/failure.json").exists()


# --- spo clean -----------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Return outputs with a cache, a finished run, and leftovers in both."""
    outputs = tmp_path / "outputs"
    old = cached(outputs / "cache", "sft", {"a": 1}, build)
    os.utime(old / "manifest.json", (time.time() - 10 * 86400,) * 2)
    cached(outputs / "cache", "pairs", {"a": 1}, build)
    LogpsStore(outputs / "cache/reference_logps/x.sqlite", torch.float32).put(KEYS, VALUES)
    VerdictStore(outputs / "cache/verdicts.sqlite").put({"a": 0.5})
    (outputs / "cache/sft" / f"{'c' * 32}.12345678").mkdir()
    claimed(outputs / "runs/one")
    (outputs / "runs/one/.metrics.json.12").touch()
    return outputs


def listed(outputs: Path, **options: Any) -> list[str]:
    items = clean_command([f"paths.outputs={outputs}"], **{"delete": False, "older_than": 0.0, **options})
    return sorted(item.kind for item in items)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_clean_lists_and_removes_only_when_asked(
    filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SPO_CACHE_DIR", raising=False)
    before = files(filled)
    assert listed(filled) == ["leftovers", "leftovers", "pairs", "reference_logps", "sft"]
    assert files(filled) == before and "nothing was removed" in capsys.readouterr().out
    assert listed(filled, older_than=5.0, delete=True) == ["sft"]
    assert listed(filled, delete=True) == ["leftovers", "leftovers", "pairs", "reference_logps"]
    assert listed(filled) == []
    kept = {path for path in before if path.parent.name == "one" or path.name == "verdicts.sqlite"}
    assert {*files(filled)} == kept - {filled / "runs/one/.metrics.json.12"}


def test_clean_removes_nothing_while_a_run_is_at_work(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPO_CACHE_DIR", raising=False)
    before = files(filled)
    at_work = claim(filled / "runs/two", compose([], run_dir=filled / "runs/two"))
    with at_work, pytest.raises(UserError, match=r"a process is at work in .*two"):
        listed(filled, delete=True)
    assert set(before) <= set(files(filled))


def test_clean_takes_places_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clean", "seed=1"]) == 1
    assert "seed=1: spo clean takes paths.outputs=DIR and paths.cache=DIR" in capsys.readouterr().err
