"""Signals, checkpoints between validations, the identity of a checkpoint, and the weights that are evaluated."""

from __future__ import annotations

import json
import os
import pickle
import signal
from pathlib import Path

import pytest

from spo import cli, signals
from spo.config.compose import compose
from spo.runs.claim import claim
from spo.runs.ledger import Ledger
from spo.signals import Interrupted

STATUSES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138, "SIGHUP": 129}


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), STATUSES.items())
def test_a_signal_outside_of_training_interrupts_at_once(name: str, status: int) -> None:
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Interrupted, match=f"interrupted by {name}") as caught, signals.handled():
        signal.raise_signal(getattr(signal, name))
    assert caught.value.status == status and pickle.loads(pickle.dumps(caught.value)).status == status
    assert not isinstance(caught.value, Exception) and signal.getsignal(getattr(signal, name)) is before


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
