"""The processes of a run: their place in the environment, how they share decisions and work, and how one is missed."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spo import processes, slurm
from spo.config.checks import quick_problems
from spo.config.compose import compose, run_name
from spo.data import PreparedPairs
from spo.errors import UserError
from spo.processes import PeerLostError, Place, place
from spo.runs import claim as claiming
from spo.runs.claim import claim, read_failure, write_failure
from spo.runs.launch import fit_to_processes
from spo.stages import devices
from spo.stages.devices import join_processes, refuse_few_pairs
from tests.helpers import run_on_two_ranks

ITEMS = list("abcdefg")
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODELIST": "gpu[1-9]",
    "SLURM_STEP_NODELIST": "gpu[4-5]",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what a launcher of these tests has set."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in (*TORCHRUN, processes.LAUNCHED_BY, "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# --- place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place()),
        (TORCHRUN, Place(3, 4, 1, 2, "torchrun")),
        (TORCHRUN | {processes.LAUNCHED_BY: "1"}, Place(3, 4, 1, 2, "spo")),
        ({name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}, Place(3, 4, 1, 4, "torchrun")),
        ({"LOCAL_RANK": "1"}, Place()),
        (SRUN, Place(3, 4, 1, 2, "slurm")),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, Place()),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Place()),
        (SRUN | TORCHRUN, Place(3, 4, 1, 2, "torchrun")),
    ],
    ids=["alone", "torchrun", "spo", "no local size", "one variable", "srun", "one task", "batch script", "both"],
)
def test_place_follows_the_program_that_started_the_process(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Place
) -> None:
    set_all(monkeypatch, variables)
    assert place() == expected
    assert (
        place().is_first == (expected.rank == 0) and place().nodes == expected.world_size // expected.local_world_size
    )


def test_processes_of_srun_meet_on_the_first_node_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SRUN)
    address, port = slurm.meeting_point()
    assert address == "gpu4" and (address, port) == slurm.meeting_point()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert slurm.meeting_point() == (address, port)
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert slurm.meeting_point()[1] != port


def test_the_name_of_a_run_is_the_time_or_the_job_and_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_name("now", ["seed=1"]) == "now"
    set_all(monkeypatch, SRUN)
    name = run_name("now", ["seed=1"])
    assert name.startswith("slurm-77-") and name == run_name("later", ["seed=1"]) != run_name("now", ["seed=2"])
    set_all(monkeypatch, {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"})
    assert run_name("now", ["seed=1"]) == name.replace("77", "70_2")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # Each command that a person types is a run of its own.
    assert run_name("now", ["seed=1"]) == "now"


# --- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "expected"), [("auto", 2), (-1, 2), (8, 8), ([0, 1], [0, 1])])
def test_a_run_takes_the_processes_that_a_launcher_started(
    monkeypatch: pytest.MonkeyPatch, given: object, expected: object
) -> None:
    cfg = OmegaConf.create({"trainer": {"devices": given, "num_nodes": 1}})
    fit_to_processes(cfg)
    assert cfg == {"trainer": {"devices": given, "num_nodes": 1}}
    set_all(monkeypatch, TORCHRUN)
    fit_to_processes(cfg)
    assert cfg == {"trainer": {"devices": expected, "num_nodes": 2}}


def test_a_run_and_its_launcher_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(["trainer.accelerator=cpu", "trainer.devices=3", "strategy=ddp"])
    with pytest.raises(UserError, match=r"wants 3 processes, and this process is by itself: use the command spo train"):
        join_processes(cfg)
    set_all(monkeypatch, TORCHRUN)
    remedy = r"wants 6 .* torchrun has started 4: set trainer.devices=2 and trainer.num_nodes=2"
    with pytest.raises(UserError, match=remedy):
        join_processes(cfg)


@pytest.mark.parametrize(
    ("gpus", "words", "match"),
    [
        (0, ["trainer.accelerator=gpu"], "trainer.accelerator=gpu: this machine does not have a GPU"),
        (1, ["trainer.accelerator=gpu"], "2 processes run on this machine, and each sees 1 GPU: start one"),
        (0, ["strategy=deepspeed"], "strategy=deepspeed runs on GPUs alone: choose"),
    ],
)
def test_devices_that_a_machine_does_not_have_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, words: list[str], match: str
) -> None:
    set_all(monkeypatch, TORCHRUN)
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=match):
        join_processes(compose(words))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["trainer.devices=4", "data.batch_size=3"], r"data.batch_size=3: .* devices of the run \(4\): set 4 or more"),
        (["trainer.devices=[0,1]", "trainer.num_nodes=2", "data.batch_size=3"], r"data.batch_size=3: .*\(4\)"),
        (["trainer.devices=4", "data.num_pairs=2"], r"data.num_pairs=2: .*\(4\)"),
        (["strategy=deepspeed", "trainer.accelerator=cpu"], r"strategy=deepspeed .* trainer.accelerator=cpu: choose"),
        (["strategy=deepspeed", "strategy.plugin.stage=3"], r"strategy.plugin.stage=3: ZeRO-3 is not supported: set "),
    ],
)
def test_a_run_that_its_devices_cannot_carry_out_is_refused_in_one_sentence(words: list[str], match: str) -> None:
    [problem] = quick_problems(compose([*words]))
    assert re.match(match, problem)


def test_a_batch_is_compared_with_the_processes_that_a_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(["data.batch_size=3", "trainer.devices=auto"])
    assert quick_problems(cfg) == []
    set_all(monkeypatch, TORCHRUN)
    assert len(quick_problems(cfg)) == 1


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((1, 0), r"the train split has 1 pair for 2 devices.*data.num_pairs, or use at most 1 device$"),
        ((9, 1), r"the selection split has 1 pair for 2 devices.*data.splits.selection, or use at most 1 device$"),
        ((2, 2), None),
        ((2, 0), None),
    ],
)
def test_a_split_with_fewer_pairs_than_devices_is_refused(sizes: tuple[int, int], match: str | None) -> None:
    pairs = PreparedPairs(*([None] * size for size in (*sizes, 0)), {}, [], (0,))  # type: ignore[arg-type, call-arg]
    refuse_few_pairs(pairs, 1)
    if match is None:
        refuse_few_pairs(pairs, 2)
    else:
        with pytest.raises(UserError, match=match):
            refuse_few_pairs(pairs, 2)


# --- failures ------------------------------------------------------------------------------------------------------


def test_a_further_process_reports_its_own_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = compose(run_dir=tmp_path)
    set_all(monkeypatch, TORCHRUN)
    monkeypatch.setattr(claiming, "_WAIT_FOR_FIRST_SECONDS", 0.2)
    write_failure(tmp_path, "bad row")  # That of an earlier start says nothing about this one.
    with pytest.raises(UserError, match="bad row"), claim(tmp_path, cfg):
        raise UserError("bad row")
    failure = read_failure(tmp_path)
    assert failure is not None and failure["error"] == "process 3 of 4: bad row" and failure["kind"] == "failed"


def test_a_failure_of_all_processes_is_reported_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = compose(run_dir=tmp_path)
    set_all(monkeypatch, TORCHRUN)
    with pytest.raises(PeerLostError), claim(tmp_path, cfg):
        time.sleep(0.01)  # The time in the file has milliseconds.
        write_failure(tmp_path, "bad row")  # by the first process, meanwhile
        raise UserError("bad row")
    failure = read_failure(tmp_path)
    assert failure is not None and failure["error"] == "bad row" and failure["attempts"] == 1


# --- sharing -------------------------------------------------------------------------------------------------------


def test_one_process_shares_with_nobody() -> None:
    assert processes.share("a") == processes.first_decides(lambda: "a") == "a"
    assert processes.deal(ITEMS) == processes.gather(ITEMS) == ITEMS
    assert processes.gather_objects("a") == ["a"] and (processes.rank(), processes.world_size()) == (0, 1)
    with pytest.raises(RuntimeError, match="gloo"), processes.peer_loss_in_words():
        raise RuntimeError("gloo: a fault of this process alone")


@pytest.mark.slow
def test_two_processes_share_decisions_and_work(tmp_path: Path) -> None:
    run_on_two_ranks(__name__, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["place"], second["place"]) == ([0, 2], [1, 2])
    assert first["shared"] == second["shared"] == "of 0" and first["decided"] == second["decided"] == "by 0"
    assert first["dealt"] == ITEMS[::2] and second["dealt"] == ITEMS[1::2]
    assert first["gathered"] == second["gathered"] == [item.upper() for item in ITEMS]
    assert first["few"] == second["few"] == ["A"] and first["none"] == second["none"] == []
    assert first["objects"] == second["objects"] == [0, 1]
    assert "lost" not in second and first["lost"] == "another process of the run has ended"


def test_a_process_with_others_ends_after_the_functions_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(processes.atexit, "_run_exitfuncs", lambda: done.append("functions"))
    monkeypatch.setattr(processes.os, "_exit", done.append)
    processes.end_process(3)
    assert done == []
    monkeypatch.setattr(processes, "_joined", lambda: True)
    processes.end_process(3)
    assert done == ["functions", 3]


if __name__ == "__main__":
    [folder] = map(Path, sys.argv[1:])
    processes.join("cpu")
    rank = processes.rank()
    found: dict[str, object] = {
        "place": [rank, processes.world_size()],
        "shared": processes.share(f"of {rank}"),
        "decided": processes.first_decides(lambda: f"by {processes.rank()}"),
        "dealt": processes.deal(ITEMS),
        "gathered": processes.gather([item.upper() for item in processes.deal(ITEMS)]),
        "few": processes.gather([item.upper() for item in processes.deal(ITEMS[:1])]),
        "none": processes.gather(processes.deal([])),
        "objects": processes.gather_objects(rank),
    }
    if rank == 0:
        try:
            processes.share("nobody is there")
            processes.gather_objects("nobody answers")
        except PeerLostError as error:
            found["lost"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if rank == 0:
        os._exit(0)  # The group of two cannot be closed by one.
