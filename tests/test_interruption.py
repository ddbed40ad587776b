"""Signals, checkpoints between validations, the identity of a checkpoint, and the weights that are evaluated."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io import torch_io
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from spo import cli, signals
from spo.callbacks import Checkpoint, Interruption
from spo.callbacks.history import HistoryLogger
from spo.config.checks import quick_problems
from spo.config.compose import compose
from spo.errors import UserError
from spo.module import AlignmentModule
from spo.notes import collect_notes, note
from spo.records import filenames
from spo.records.policy import verify_policy, write_policy_digests
from spo.runs import launch
from spo.runs.checkpoints import last_checkpoint
from spo.runs.claim import Status, claim, finish
from spo.runs.identity import identity, known_digests
from spo.runs.job_processes import is_stopping, job_processes, registered
from spo.runs.ledger import Ledger
from spo.runs.resume import resumed_config
from spo.signals import Interrupted
from spo.stages.checkpointing import choose_weights
from tests.commands import enter, environment, history, job, numbers, shared_cache, spo
from tests.helpers import make_data, make_module, make_trainer, random_pairs, tiny_llama
from tests.test_sweeps import FAST

STATUSES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138, "SIGHUP": 129}


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), STATUSES.items())
def test_a_signal_outside_of_training_interrupts_at_once(name: str, status: int) -> None:
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Interrupted, match=f"interrupted by {name}") as caught, signals.handled():
        signal.raise_signal(getattr(signal, name))
    assert caught.value.status == status and pickle.loads(pickle.dumps(caught.value)).status == status
    assert not isinstance(caught.value, Exception) and signal.getsignal(getattr(signal, name)) is before


class Dying:
    """Object that a signal reaches in its finalizer, where Python discards the exception of the handler."""

    def __init__(self, signum: int) -> None:
        self.signum = signum

    def __del__(self) -> None:
        os.kill(os.getpid(), self.signum)
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_within_a_finalizer_is_not_lost(name: str) -> None:
    hook, discarded = sys.unraisablehook, []
    signum = getattr(signal, name)
    with signals.handled():
        Dying(signum)
        with pytest.raises(Interrupted, match=f"interrupted by {name}"):
            time.sleep(10)
    assert sys.unraisablehook is hook

    class Failing:
        def __del__(self) -> None:
            raise ValueError("another exception")

    sys.unraisablehook = discarded.append
    try:
        with signals.handled():
            Failing()
    finally:
        sys.unraisablehook = hook
    assert len(discarded) == 1


def test_a_second_int_within_a_finalizer_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
    with signals.handled():
        signals.defer(True)
        os.kill(os.getpid(), signal.SIGINT)
        Dying(signal.SIGINT)
        with pytest.raises(Interrupted, match="ended at once"):
            time.sleep(10)


def test_training_defers_a_signal_and_a_second_int_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with signals.handled():
        signals.defer(True)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # as when a terminal and a parent both send it
        signal.raise_signal(signal.SIGTERM)
        assert signals.received() == signal.SIGINT
        monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
        with pytest.raises(Interrupted, match="ended at once"):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored_as_after_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            signal.raise_signal(signal.SIGHUP)
            signals.reinstall()
            signal.raise_signal(signal.SIGHUP)
            assert signals.received() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_of_a_launcher_decides() -> None:
    calls: list[int] = []
    names = [signal.SIGTERM, signal.SIGUSR2]
    before = [signal.signal(signum, lambda number, frame: calls.append(number)) for signum in names]
    try:
        with signals.handled():
            signal.raise_signal(signal.SIGTERM)  # outside of training: at once
            assert calls == [signal.SIGTERM] and signals.received() is None
            signals.defer(True)
            signal.raise_signal(signal.SIGUSR2)
            assert len(calls) == 1 and signals.received() == signal.SIGUSR2
            assert signals.hand_back(signal.SIGUSR2) and calls[1:] == [signal.SIGUSR2]
            assert signals.received() is None and not signals.hand_back(signal.SIGINT)
    finally:
        for signum, handler in zip(names, before, strict=True):
            signal.signal(signum, handler)


def test_a_forked_worker_leaves_a_signal_to_its_parent() -> None:
    with signals.handled():
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGINT)
                os._exit(0 if signals.received() is None else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_command_line_ends_in_one_line_and_the_status_of_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cfg = tmp_path / "run", compose(run_dir=tmp_path / "run")

    def interrupted(arguments: list[str]) -> int:
        with claim(run, cfg):
            signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setitem(cli.RUN, "train", interrupted)
    assert cli.main(["train"]) == 143
    remedy = f"the same command or spo train --resume {run} resumes it"
    assert capsys.readouterr().err == f"spo: interrupted by SIGTERM: {remedy}\n"
    failure = json.loads((run / "failure.json").read_text())
    assert failure["kind"] == "interrupted" and failure["traceback"] == ""
    [entry] = Ledger(tmp_path).begin("command", [([], "run")])
    assert entry.status == "unfinished"  # and not failed


def test_the_next_start_of_a_run_interrupted_after_its_result_removes_the_failure(tmp_path: Path) -> None:
    cfg = compose(run_dir=tmp_path)
    with pytest.raises(Interrupted), claim(tmp_path, cfg):
        finish(tmp_path, {"eval/kl": 1.0})
        raise Interrupted(signal.SIGTERM)
    assert (tmp_path / "failure.json").exists()
    with claim(tmp_path, cfg) as status:
        assert status is Status.FINISHED and not (tmp_path / "failure.json").exists()


# --- training ------------------------------------------------------------------------------------------------------


class Raise(Callback):
    """Sends this process a signal within the step after ``step``."""

    def __init__(self, step: int, name: str = "SIGTERM") -> None:
        self.step, self.name = step, name

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(getattr(signal, self.name))


def trained(
    folder: Path, *callbacks: Callback, resume: bool = False, steps: int = 8, selection: int = 5, **changes: Any
) -> tuple[AlignmentModule, Any]:
    """Train a tiny model with validations every three steps and rows every two."""
    folder.mkdir(exist_ok=True)
    point = last_checkpoint(folder) if resume else None
    module = make_module(
        tiny_llama(0, scale=0.1, dtype=torch.float32),
        regularizer=None,
        optimizer=torch.optim.AdamW,
        lr=1e-2,
        log_every_n_steps=2,
    )
    record = HistoryLogger(folder / "history.jsonl", *((None, None) if point is None else (point.step, point.history)))
    checkpoint = Checkpoint(str(folder / "checkpoints"), **{"monitor": "val/loss", "mode": "min", **changes})
    trainer = make_trainer(
        folder,
        max_steps=steps,
        enable_checkpointing=True,
        callbacks=[checkpoint, Interruption(), *callbacks],
        logger=[record],
        val_check_interval=3,
    )
    pairs = random_pairs(20, seed=4)
    data = make_data(pairs, pairs[:selection], max_steps=steps, batch_size=8)
    with signals.handled():
        trainer.fit(module, datamodule=data, ckpt_path=point.path if point else None, weights_only=True)
    return module, trainer


def steps_of(folder: Path) -> dict[str, int]:
    """Return the optimizer step of each checkpoint."""
    files = (folder / "checkpoints").iterdir()
    return {file.stem: torch.load(file, weights_only=True)["global_step"] for file in files}


def rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return the folder and the final weights of an unbroken run of eight steps."""
    folder = tmp_path_factory.mktemp("straight")
    module, _ = trained(folder)
    return folder, module.policy.state_dict()


@pytest.mark.parametrize("step", [4, 5, 8], ids=["between validations", "before a validation", "in the last step"])
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(
    step: int, straight: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    stopped_at = {4: 5, 5: 6, 8: 8}[step]
    words = rf"interrupted by SIGTERM: step {stopped_at} is in .*last\.ckpt"
    with pytest.raises(Interrupted, match=words):
        trained(tmp_path, Raise(min(step, 7)))
    assert steps_of(tmp_path)["last"] == stopped_at
    module, _ = trained(tmp_path, resume=True)
    folder, weights = straight
    assert rows(tmp_path) == rows(folder)
    assert all(torch.equal(weight, module.policy.state_dict()[name]) for name, weight in weights.items())


def test_a_signal_without_checkpoints_says_that_there_is_none(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=4, enable_checkpointing=True, callbacks=[Interruption(), Raise(1, "SIGINT")]
    )
    module, pairs = make_module(tiny_llama(0, dtype=torch.float32), regularizer=None), random_pairs(20, seed=4)
    with signals.handled(), pytest.raises(Interrupted, match="SIGINT: there is no checkpoint"):
        trainer.fit(module, datamodule=make_data(pairs, max_steps=4, batch_size=8))
    assert module.global_step == 2


def test_a_launchers_handler_is_called_after_the_checkpoint_and_training_continues(tmp_path: Path) -> None:
    seen: list[dict[str, int]] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(steps_of(tmp_path)))
    try:
        module, _ = trained(tmp_path, Raise(3))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [found["last"] for found in seen] == [4] and module.global_step == 8


def test_last_checkpoint_is_written_at_every_validation_though_the_loss_rises(tmp_path: Path) -> None:
    saved: list[dict[str, int]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            saved.append(steps_of(tmp_path) if (tmp_path / "checkpoints").exists() else {})

    trained(tmp_path, Look(), mode="max")  # the loss falls, so the first validation is the best
    assert saved[:3] == [{}] * 3 and saved[3:6] == [{"last": 3, "best": 3}] * 3
    assert saved[6:] == [{"last": 6, "best": 3}] * 2
    assert steps_of(tmp_path) == {"last": 8, "best": 3}  # the last step does not validate


def test_last_checkpoint_is_written_every_n_steps_and_a_run_resumes_from_it(
    straight: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    class PowerCut(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        trained(tmp_path, PowerCut(), every_n_steps=4)
    assert steps_of(tmp_path) == {"last": 4, "best": 3}
    module, _ = trained(tmp_path, resume=True, every_n_steps=4)
    folder, weights = straight
    assert rows(tmp_path) == rows(folder)
    assert all(torch.equal(weight, module.policy.state_dict()[name]) for name, weight in weights.items())


def test_a_note_of_training_outlives_an_interruption(tmp_path: Path) -> None:
    class Note(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1:
                note("early", "something happened in the second step", 3)

    with collect_notes(), pytest.raises(Interrupted):
        trained(tmp_path, Note(), Raise(4))
    with collect_notes() as notes:
        note("late", "the resumed run makes this note too", 2)
        trained(tmp_path, Note(), resume=True)
    assert notes == {"notes/early": 3, "notes/late": 2}


def test_data_without_selection_pairs_has_checkpoints(tmp_path: Path) -> None:
    saved: list[dict[str, int]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            saved.append(steps_of(tmp_path) if (tmp_path / "checkpoints").exists() else {})

    trained(tmp_path, Look(), selection=0, steps=5)
    assert saved == [{}, {}, {}, {"last": 3}, {"last": 3}] and steps_of(tmp_path) == {"last": 5}


def test_the_best_checkpoints_are_kept_on_request(tmp_path: Path) -> None:
    trained(tmp_path, top_k=2, steps=12)
    assert steps_of(tmp_path) == {"last": 12, "best": 12, "step-12": 12, "step-9": 9}
    trained(tmp_path / "none", top_k=0, steps=4)
    assert steps_of(tmp_path / "none") == {"last": 4}


def test_a_metric_that_is_not_logged_cannot_choose_the_best(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks.checkpoint.monitor=val/wins: .*choose one of .*val/loss"):
        trained(tmp_path, monitor="val/wins")


def test_a_process_killed_while_it_writes_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, steps=3)
    save = torch.save

    def cut_off(value: Any, file: Any, *rest: Any) -> None:
        save(value, file, *rest)
        raise RuntimeError("killed")

    monkeypatch.setattr(
        torch_io, "_atomic_save", lambda value, path: cut_off(value, Path(path)) if "last" in str(path) else None
    )
    with pytest.raises(RuntimeError, match="killed"):
        trained(tmp_path, resume=True, steps=4)
    assert last_checkpoint(tmp_path)[:2] == (str(tmp_path / "checkpoints/last.ckpt"), 3)


# --- which weights -------------------------------------------------------------------------------------------------


def test_the_best_weights_are_chosen_with_their_step(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"evaluation": {"policy": "best"}, "paths": {"run": str(tmp_path)}})
    module, trainer = trained(tmp_path, mode="max")
    last = {name: weight.clone() for name, weight in module.policy.state_dict().items()}
    cfg.evaluation.policy = "last"
    assert choose_weights(cfg, module, trainer, None).step == 8
    assert all(torch.equal(weight, last[name]) for name, weight in module.policy.state_dict().items())
    cfg.evaluation.policy = "best"
    assert choose_weights(cfg, module, trainer, None).step == 3
    best = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    for name, weight in module.policy.state_dict().items():
        assert torch.equal(weight, best[f"policy.{name}"])
    assert any(not torch.equal(weight, last[name]) for name, weight in module.policy.state_dict().items())
    (tmp_path / "checkpoints/last.ckpt").rename(tmp_path / "checkpoints/best.ckpt")
    with pytest.raises(UserError, match=r"best.ckpt is not the intact checkpoint of step 3 .*evaluation.policy=last"):
        choose_weights(cfg, module, trainer, None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(["callbacks=none"], "use callbacks=default"), (["callbacks.checkpoint.top_k=0"], "set it to 1")],
)
def test_the_best_weights_take_best_checkpoints(overrides: list[str], words: str, tmp_path: Path) -> None:
    [problem] = quick_problems(compose([*overrides, "evaluation.policy=best"], run_dir=tmp_path))
    assert problem.startswith("evaluation.policy=best") and problem.endswith(words)


# --- identity, history, policy -------------------------------------------------------------------------------------


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    cfg = compose(run_dir=tmp_path)
    with claim(tmp_path, cfg):
        pass
    [ours] = known_digests(json.loads((tmp_path / "identity.json").read_text()))
    assert ours == identity(cfg)["digest"]
    file = tmp_path / "checkpoints/last.ckpt"
    file.parent.mkdir()
    for carried in ({"run_identity": ours}, {"run_identity": None}, {}):  # version 0.1.0 did not write one
        torch.save({"global_step": 4, **carried}, file)
        assert last_checkpoint(tmp_path).step == 4
    torch.save({"global_step": 4, "run_identity": identity(compose(["seed=5"], run_dir=tmp_path))["digest"]}, file)
    with pytest.raises(UserError, match=r"last.ckpt is the checkpoint of another run: put that of this run back"):
        last_checkpoint(tmp_path)


def test_a_run_that_changed_on_resume_knows_its_earlier_checkpoints(tmp_path: Path) -> None:
    with claim(tmp_path, compose(run_dir=tmp_path)):
        pass
    [before] = known_digests(json.loads((tmp_path / "identity.json").read_text()))
    for steps in (200, 300):
        resumed_config(tmp_path, [f"trainer.max_steps={steps}"])
    after = json.loads((tmp_path / "identity.json").read_text())
    assert before in known_digests(after) and len(set(known_digests(after))) == 3
    with claim(tmp_path, resumed_config(tmp_path, [])):
        pass


def test_a_history_with_a_hole_is_repaired_from_the_checkpoint(
    straight: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.jsonl"
    with pytest.raises(Interrupted):
        trained(tmp_path, Raise(5))
    lines = path.read_text().splitlines(keepends=True)
    for damaged in ("", "".join(lines[:1] + lines[2:]), "".join([lines[0], "{half a ro\n", *lines[2:]]), None):
        path.unlink() if damaged is None else path.write_text(damaged)
        point = last_checkpoint(tmp_path)
        HistoryLogger(path, point.step, point.history)
        assert path.read_text() == "".join(lines)
        assert "history.jsonl lacked" in caplog.records[-1].getMessage()
    trained(tmp_path, resume=True)
    assert rows(tmp_path) == rows(straight[0])


def test_a_hole_is_noted_if_the_checkpoint_does_not_hold_the_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 2, 8)))
    HistoryLogger(path, 8, None, 2)
    words = "history.jsonl lacks the rows of 2 steps between 4 and 6, and the checkpoint does not hold them"
    assert words in caplog.records[-1].getMessage()
    caplog.clear()
    HistoryLogger(path, 2, None, 2)
    assert caplog.text == ""


def test_a_changed_policy_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    verify_policy(tmp_path)  # a run of version 0.1.0 does not have digests
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text(name)
    write_policy_digests(tmp_path)
    (folder / "README.md").write_text("mine")
    verify_policy(tmp_path)

    def changed(words: str) -> None:
        with pytest.raises(UserError, match=rf"{words}.*restore the files, or remove metrics.json"):
            verify_policy(tmp_path)

    (folder / "adapter_config.json").write_text("{}")
    changed("adapter_config.json was added")
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").write_text("other weights")
    changed("model.safetensors was changed")
    (folder / "model.safetensors").unlink()
    changed("model.safetensors is missing")
    (tmp_path / "policy.json").write_text("{")
    changed("policy.json is damaged")


# --- processes of jobs ---------------------------------------------------------------------------------------------


def test_a_signal_is_passed_on_to_the_processes_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr("spo.runs.job_processes.os.kill", lambda process, signum: sent.append((process, signum)))
    jobs = (registered(tmp_path, 4194305), registered(tmp_path, os.getpid()))
    with pytest.raises(Interrupted, match="SIGTERM"), signals.handled(), job_processes(tmp_path), jobs[0], jobs[1]:
        signal.raise_signal(signal.SIGTERM)
        assert is_stopping(tmp_path)
    # A job in a launcher's process ignores SIGTERM, as submitit has set it.
    assert sorted(sent) == sorted([(4194305, signal.SIGTERM), (os.getpid(), signal.SIGINT)])
    with signals.handled(), job_processes(tmp_path):
        assert not is_stopping(tmp_path) and [file.name for file in tmp_path.iterdir()] == []
    with pytest.raises(Interrupted), signals.handled(), job_processes(tmp_path):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("nobody to wait for")


def end_own_process(program: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a Python program in place of a job's command."""
    node = {"sweep": {"dir": str(run.parent)}, "runtime": {"output_dir": str(run)}, "overrides": {"task": []}}
    monkeypatch.setattr(launch.HydraConfig, "get", lambda: OmegaConf.create(node))
    popen = subprocess.Popen
    with monkeypatch.context() as patch, signals.handled():
        patch.setattr(launch.subprocess, "Popen", lambda command: popen([sys.executable, "-c", program]))
        launch._run_in_own_process("train", None)


def test_a_job_that_is_entered_after_the_signal_stops_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / filenames.STOP).touch()
    with pytest.raises(Interrupted, match="SIGTERM"):
        end_own_process("import time; time.sleep(20)", tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run/failure.json").exists()


def test_a_job_that_a_signal_ends_while_it_starts_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    program = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    with pytest.raises(UserError, match="killed by signal 15"):
        end_own_process(program, tmp_path / "run", monkeypatch)
    (tmp_path / "run/failure.json").unlink()
    stop = f"import pathlib; pathlib.Path({str(tmp_path / filenames.STOP)!r}).touch(); "
    with pytest.raises(Interrupted, match="SIGTERM"):
        end_own_process(stop + program, tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run/failure.json").exists()


# --- whole commands ------------------------------------------------------------------------------------------------

LONG = (*FAST, "method=dpo", "trainer.max_steps=200", "trainer.val_check_interval=20", "trainer.log_every_n_steps=3")
LONG += ("evaluation.num_prompts=4",)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


def interrupted(name: str, words: list[str], reached: Callable[[], bool], folder: Path, cache: Path) -> str:
    """Send a signal to a command once a condition holds; check how it ends, and return what it printed."""
    command = [Path(sys.executable).with_name("spo"), "train", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment(cache), **pipes)
    while not reached():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    printed = process.communicate()[1]
    assert process.returncode == STATUSES[name], printed
    assert "Traceback" not in printed
    return printed


@pytest.mark.slow
def test_every_signal_ends_a_run_that_resumes_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "broken"
    whole = job(tmp_path / "whole", cache, *LONG)
    words = [*LONG, "hydra.run.dir=broken"]
    for name in STATUSES:
        before = len(history(run)) if run.exists() else 0
        printed = interrupted(
            name,
            words,
            lambda before=before: (run / "history.jsonl").exists() and len(history(run)) > before + 5,
            tmp_path,
            cache,
        )
        [line] = [line for line in printed.splitlines() if line.startswith("spo: interrupted")]
        step = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert line.startswith(f"spo: interrupted by {name}: step {step} is in ") and f"--resume {run} " in line
        assert json.loads((run / "failure.json").read_text())["kind"] == "interrupted"
        assert not (run / "metrics.json").exists()
    spo("train", *words, folder=tmp_path, cache=cache)
    assert not (run / "failure.json").exists() and numbers(run) == whole
    assert history(run) == history(tmp_path / "whole")
    policies = [(tmp_path / name / "policy/model.safetensors").read_bytes() for name in ("broken", "whole")]
    assert policies[0] == policies[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [[], ["launcher=joblib"], ["strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]],
    ids=["local", "joblib", "two devices"],
)
def test_a_sweep_ends_with_the_status_of_its_signal_and_resumes(
    settings: list[str], cache: Path, tmp_path: Path
) -> None:
    words = ["-m", *LONG, *settings, "seed=1,2,3", "hydra.sweep.dir=sweep"]
    reached = lambda: any(file.read_text().count("\n") > 5 for file in tmp_path.glob("sweep/*/history.jsonl"))  # noqa: E731
    printed = interrupted("SIGTERM", words, reached, tmp_path, cache)
    assert printed.splitlines()[-1] == "spo: interrupted by SIGTERM: the same command resumes the sweep"
    jobs = json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]
    assert {entry["status"] for entry in jobs} <= {"finished", "unfinished"}
    assert any(entry["status"] == "unfinished" for entry in jobs)
    failures = [json.loads(file.read_text())["kind"] for file in tmp_path.glob("sweep/*/failure.json")]
    assert failures and set(failures) == {"interrupted"}
    spo("train", *words, folder=tmp_path, cache=cache)
    runs = [path for path in (tmp_path / "sweep").iterdir() if path.is_dir()]
    assert len(runs) == 3 and not any((run / "failure.json").exists() for run in runs)
    for run in runs:
        steps = [row["step"] for row in history(run)]
        assert steps == sorted(set(steps)) and steps[-1] == 200
        assert set(range(0, 200, 3)) <= set(steps)
    if not settings:
        [first] = [run for run in runs if "seed-1" in run.name]
        assert numbers(first) == job(tmp_path / "unbroken", cache, *LONG, "seed=1")


@pytest.mark.slow
def test_a_signal_before_and_after_training_ends_a_run_that_resumes(tmp_path: Path) -> None:
    """Interrupt the making of the reference model with a cold cache, and then the evaluation."""
    settings = ["+debug=tiny", "logger=record", "method=dpo", "hydra.run.dir=run", "evaluation.num_prompts=8"]
    cache, run = tmp_path / "cache", tmp_path / "run"
    log = run / "spo.log"
    making = lambda: log.exists() and "making the reference model" in log.read_text()  # noqa: E731
    printed = interrupted("SIGTERM", settings, making, tmp_path, cache)
    assert f"spo: interrupted by SIGTERM: the same command or spo train --resume {run} resumes it" in printed
    printed = interrupted("SIGINT", settings, (run / "coefficients.json").exists, tmp_path, cache)
    assert "spo: interrupted by SIGINT: the same command" in printed
    spo("train", *settings, folder=tmp_path, cache=cache)
    assert numbers(run) and not (run / "failure.json").exists()
    assert numbers(run) == job(tmp_path / "whole", tmp_path / "other", *settings[:3], settings[4])


@pytest.mark.slow
def test_the_best_weights_are_evaluated_and_saved(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, settings = tmp_path / "run", (*FAST, "method=dpo", "callbacks.checkpoint.mode=max")
    metrics = job(run, cache, *settings, "evaluation.policy=best")
    assert metrics["policy/step"] == 2  # the loss falls, so the first validation has the largest one
    [of_step] = [row for row in history(run) if row["step"] == 2]
    for key in ("val/loss", "val/rewards/margins"):
        assert metrics[key] == of_step[key] != history(run)[-1][key]
    assert metrics["train/loss"] == history(run)[-1]["train/loss"]
    short = job(tmp_path / "short", cache, *settings, "trainer.max_steps=2", "scheduler.num_training_steps=6")
    assert metrics["eval/kl"] == short["eval/kl"] and metrics["eval/reward"] == short["eval/reward"]
    assert "weights of step 2, the best by val/loss" in (run / "report.html").read_text()
    enter(tmp_path, cache, monkeypatch)
    assert cli.main(["evaluate", "run"]) == 0
    assert cli.main(["evaluate", "run", "evaluation.policy=last"]) == 1
    weights = run / "policy/model.safetensors"
    weights.write_bytes((tmp_path / "short/policy/model.safetensors").read_bytes()[:-1] + b"\0")
    assert cli.main(["evaluate", "run"]) == 1
    shutil.rmtree(run / "policy")
    capsys.readouterr()
    assert cli.main(["evaluate", "run"]) == 1
    assert "policy is missing: restore the files" in capsys.readouterr().err
