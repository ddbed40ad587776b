"""The command line: help, flags, errors, several jobs, and the arguments that commands receive."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import spo.stages.train
from spo import cli
from spo.config.groups import group_members
from spo.data.rows import RowError
from spo.errors import UserError
from spo.resources import conf_dir
from spo.runs import launch

ROOT = Path(spo.__file__).parent.parent


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("SPO_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


class Trained(list[tuple[DictConfig, list[str], Path]]):
    """A stand-in for training that records its calls."""

    def __call__(self, cfg: DictConfig, *, checked: bool = False) -> dict[str, float]:
        assert cfg.paths.run == HydraConfig.get().runtime.output_dir
        self.append((cfg, list(sys.argv), Path(cfg.paths.run)))
        if cfg.seed == 13:
            raise UserError("unlucky")
        return {}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trained]:
    calls = Trained()
    monkeypatch.setattr(spo.stages.train, "train", calls)
    yield calls


def run(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "spo", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


# --- help ----------------------------------------------------------------------------------------------------------


def test_help_lists_commands_groups_and_examples(tmp_path: Path) -> None:
    done = run("--help", folder=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for word in ("train", "evaluate", "report", "inspect", "method", "with a reference: ", "examples:"):
        assert word in done.stdout
    assert run(folder=tmp_path).stdout == done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: spo {command}") and f"  spo {command}" in text.partition("examples:")[2]


def test_help_lists_groups_of_config_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "method").mkdir()
    for name, text in {"mine": "{}", "yours": "group: self-play", "dated": "group: 2026", "broken": "a: ["}.items():
        (tmp_path / f"method/{name}.yaml").write_text(text)
    assert cli.main(["train", "--config-dir", str(tmp_path), "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {"other: broken, mine", "2026: dated"} < {*lines}
    assert re.search(r"^self-play: (.*, )?yours$", "\n".join(lines), re.MULTILINE)


def test_help_lists_every_member_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out.partition("any key as GROUP.KEY=VALUE:\n")[2].partition("\n\n")[0]
    groups, group = dict[str, list[str]](), ""
    for line in listed.splitlines():
        group = line[2:18].strip() or group
        words = re.sub(r"^ *[^,:]*: ", "", line[18:]) if group == "method" else line[18:]
        groups.setdefault(group, []).extend(word for word in re.split(r"[, ]+", words) if word)
    assert {group: sorted(members) for group, members in groups.items()} == group_members([conf_dir()])


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == spo.__version__


# --- a wrong command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        (["trian"], 2, "did you mean train?"),
        (["evaluate"], 2, "usage: spo evaluate RUN_DIR"),
        (["report"], 2, "usage: spo report RUN_DIR"),
        (["report", "a", "b"], 2, "usage: spo report RUN_DIR"),
        (["report", "nowhere"], 1, "nowhere"),
        (["inspect", "--limit", "x"], 2, "usage: spo inspect"),
        (["train", "--resume"], 2, "usage: spo train --resume RUN_DIR"),
        (["train", "--resume", "nowhere"], 1, "nowhere is not a run directory of spo"),
        (["train", "--config-dir", "nowhere"], 1, "--config-dir nowhere: there is no such folder"),
        (["train", "method=dop", "seed=x"], 1, "did you mean dpo?"),
        (["train", "alpha=0"], 1, "alpha=0: 0 is not a positive, finite number"),
        (["train", "--cfg", "job", "method=dop"], 1, "did you mean dpo?"),
        (["train", "method=spo,dpo"], 1, "add -m"),
    ],
)
def test_wrong_command_line_ends_in_a_message(
    words: list[str], status: int, part: str, capsys: pytest.CaptureFixture[str], trained: Trained, tmp_path: Path
) -> None:
    assert cli.main(words) == status
    captured = capsys.readouterr()
    assert part in captured.err and captured.err.startswith("spo: ") and "Traceback" not in captured.err
    assert captured.out == "" and not trained and list(tmp_path.iterdir()) == []


def test_wrong_command_line_in_a_process_ends_in_a_message(tmp_path: Path) -> None:
    done = run("train", "method=dop", "trainer.max_step=3", folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("spo: the configuration has 2 problems:") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("too bad"), "spo: too bad"),
        (RowError("p.jsonl, line 3", "no string", "chosen"), "spo: p.jsonl, line 3: column 'chosen': no string"),
        (ModuleNotFoundError("No 'peft'", name="peft"), "spo: peft is not installed: pip install 'spo[peft]'"),
    ],
)
def test_error_of_a_run_ends_in_a_message(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cfg: DictConfig, *, checked: bool) -> None:
        raise error

    monkeypatch.setattr(spo.stages.train, "train", fail)
    assert cli.main(["train"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1] == words and not any("Traceback" in line for line in lines)
    monkeypatch.setenv("SPO_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["train"])


def test_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cfg: DictConfig, *, checked: bool) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(spo.stages.train, "train", fail)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["train"])


# --- what reaches the run ------------------------------------------------------------------------------------------


def test_train_expands_numbers_and_keeps_the_command_line(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["spo", "train", "alpha=0.5", "method=dpo", "hydra.run.dir=here"]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.main() == 0
    [(cfg, argv, folder)] = trained
    assert cfg.alpha.value == 0.5 and cfg.method.name == "dpo"
    assert argv == words == sys.argv
    assert folder == tmp_path / "here"
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_overrides_that_lightning_adds_for_ranks_work(trained: Trained) -> None:
    added = ['hydra.run.dir="there"', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert cli.main(["train", "alpha=0.5", "hydra.run.dir=here", *added]) == 0
    assert trained[0][2].name == "there"


def test_cfg_prints_the_configuration(capsys: pytest.CaptureFixture[str], trained: Trained) -> None:
    assert cli.main(["train", "--cfg", "job", "alpha=0.5", "model=hf", "--resolve", "--package", "alpha"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed == {"_target_": "spo.schedules.Constant", "value": 0.5} and not trained


def test_flags_of_hydra_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--info", "defaults", "method=dpo"]) == 0
    assert "method/dpo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "--hydra-help"])
    assert done.value.code == 0 and "--multirun" in capsys.readouterr().out


def test_loss_in_the_current_folder_is_found(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "my_losses.py").write_text("from spo.losses import DPOLoss\n\n\nclass Mine(DPOLoss): ...\n")
    (tmp_path / "own/method").mkdir(parents=True)
    (tmp_path / "own/method/mine.yaml").write_text("name: mine\nloss:\n  _target_: my_losses.Mine\n")
    sys.path = [path for path in sys.path if path not in ("", str(tmp_path))]
    assert cli.main(["train", "--config-dir", "own", "method=mine"]) == 0
    assert trained[0][0].method.name == "mine"


def test_notes_are_printed_once_to_stderr(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "-m", "method=dpo", "alpha=0.3", "seed=1,2", "trainer=cpu"]) == 0
    assert capsys.readouterr().err.count("note: dpo does not read alpha") == 1


def test_resume_evaluate_and_inspect_receive_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    one_device = OmegaConf.create({"trainer": {"devices": 1, "num_nodes": 1}})
    monkeypatch.setattr("spo.runs.resume.changed_config", lambda *given: one_device)
    monkeypatch.setattr("spo.stages.train.resume", lambda *given: calls.append(given))
    monkeypatch.setattr("spo.stages.inspect.inspect", lambda cfg, *given: calls.append((cfg.data.seed, *given)))
    monkeypatch.setattr("spo.stages.evaluate.evaluate_command", lambda *given: calls.append(given))
    assert cli.main(["train", "trainer.max_steps=9", "--resume", "a/b", "logger=csv"]) == 0
    assert cli.main(["evaluate", "a/b", "--allow", "mypkg", "seed=1", "--allow", "x.Y", "-cd", "c"]) == 0
    assert cli.main(["inspect", "data.seed=4", "--limit", "2", "model=tiny", "--json", "c.json"]) == 0
    read = (4, 2, Path("c.json"))
    resumed = (Path("a/b"), ["trainer.max_steps=9", "logger=csv"], [], None)
    assert calls == [resumed, (Path("a/b"), ["seed=1"], ["mypkg", "x.Y"], "c"), read]


# --- several jobs --------------------------------------------------------------------------------------------------


def test_multirun_directories_are_named_after_jobs(trained: Trained, tmp_path: Path) -> None:
    words = ["train", "method=spo,dpo", "-m", "alpha=0.1,0.2", "hydra.sweep.dir=sweep", "trainer=cpu"]
    assert cli.main(words) == 0
    read = [f"method-spo_alpha-{alpha}_trainer-cpu" for alpha in (0.1, 0.2)]  # dpo does not read alpha
    assert sorted(folder.name for _, _, folder in trained) == ["method-dpo_trainer-cpu", *read]
    assert {folder.parent for _, _, folder in trained} == {tmp_path / "sweep"}


def test_bad_job_stops_multirun_before_its_first_job(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "-m", "method=spo,dpo", "reference=frozen,none"]) == 1
    text = capsys.readouterr().err
    assert "[job method=spo reference=none]" in text and "[job method=dpo reference=none]" in text and not trained


def test_failing_job_is_named_and_the_others_run(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "-m", "seed=1,13,2", "trainer=cpu"]) == 1
    assert [cfg.seed for cfg, _, _ in trained] == [1, 13, 2]
    assert "the job seed=13 trainer=cpu failed: unlucky" in capsys.readouterr().err


def test_job_on_several_devices_gets_its_own_process(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    class Started(subprocess.Popen[bytes]):
        """A process that does nothing, in place of the job."""

        def __init__(self, command: list[str]) -> None:
            commands.append(command)
            super().__init__(["true"])

    monkeypatch.setattr(launch.subprocess, "Popen", Started)
    (tmp_path / "own").mkdir()
    words = ["train", "-m", "--config-dir", "own", "alpha=0.1,0.2", "trainer=cpu", "trainer.devices=2"]
    assert cli.main([*words, "hydra.sweep.dir=sweep"]) == 0
    assert not trained
    for alpha, command in zip((0.1, 0.2), commands, strict=True):
        assert command[:6] == [sys.executable, "-m", "spo", "train", "--config-dir", "own"]
        assert command[6:10] == ["alpha=constant", f"alpha.value={alpha}", "trainer=cpu", "trainer.devices=2"]
        folder = tmp_path / f"sweep/alpha-{alpha}_trainer-cpu_trainer.devices-2"
        assert command[10:] == ["hydra.mode=RUN", f"hydra.run.dir='{folder}'"]


@pytest.mark.parametrize(
    ("devices", "nodes", "expected"),
    [(1, 1, 1), ("auto", 1, 1), (2, 1, 2), ("2", 1, 2), ("0,1", 1, 2), ([0, 1, 3], 1, 3), (1, 2, 2), (-1, 1, 1)],
)
def test_count_devices(devices: Any, nodes: int, expected: int) -> None:
    cfg = OmegaConf.create({"trainer": {"devices": devices, "num_nodes": nodes, "accelerator": "cpu"}})
    assert launch.count_devices(cfg) == expected
