"""Checkpoints of a sharded policy: folders that any number of processes resumes from, whenever a writer was killed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from spo.callbacks import Checkpoint, Stop
from spo.errors import UserError
from spo.models.saving import whole_state_dict
from spo.models.sharded_state import META, read_whole
from spo.models.sharded_strategy import ShardedStrategy
from spo.module import AlignmentModule
from spo.notes import collect_notes
from spo.processes import first_decides, join, rank, world_size
from spo.records.checkpoint_folders import (
    is_intact,
    read_manifest,
    remove_checkpoint,
    take_place,
    unfinished_path,
    write_manifest,
)
from spo.runs.checkpoints import last_checkpoint
from spo.stages.assemble import Parts
from spo.stages.checkpointing import choose_weights, fit
from tests.helpers import BOS, EOS, PLAIN, VOCAB, make_data, make_module, make_trainer, random_pairs, run_on_two_ranks

STEPS, CUT = 8, 5
PAIRS = random_pairs(24, seed=4)


class PowerCut(Callback):
    """Ends a run before a step."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == CUT:
            raise RuntimeError("the power is gone")


def tied_model() -> nn.Module:
    """Return a model in float64 whose head is its embedding, with sizes that two processes cannot share evenly."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=12,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).double().eval()


def fitted(
    folder: Path, *callbacks: Callback, resume: bool = False, fsdp: bool = False, mode: str = "min", top_k: int = 1
) -> AlignmentModule:
    """Train with a validation every three steps, on one device or sharded over all processes."""
    point = first_decides(lambda: last_checkpoint(folder)) if resume else None
    # Adam would turn the rounding of a gradient that is zero, such as that of a key bias, into steps.
    optimizer = partial(torch.optim.AdamW, eps=1e-3)
    module = make_module(tied_model(), optimizer=optimizer, lr=1e-2, speed=PLAIN)
    checkpoint = Checkpoint(str(folder / "checkpoints"), "val/loss", mode, top_k=top_k)  # type: ignore[arg-type]
    checkpoint.run = "this run"
    strategy: dict[str, Any] = {"devices": world_size(), "strategy": ShardedStrategy()} if fsdp else {}
    trainer = make_trainer(
        folder,
        max_steps=STEPS,
        enable_checkpointing=True,
        callbacks=[checkpoint, *callbacks],
        val_check_interval=3,
        **strategy,
    )
    data = make_data(PAIRS, PAIRS[:6], max_steps=STEPS, batch_size=8)
    try:
        fit(Parts(module, data, trainer, None, Stop()), point.path if point else None)
    except RuntimeError as error:
        assert "the power is gone" in str(error)
    return module


def state_of(module: AlignmentModule) -> dict[str, Tensor]:
    """Return all weights and all tensors of the optimizer, whole."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.policy.named_parameters()}
    optimizer = module.trainer.optimizers[0]
    found = dict(module.policy.state_dict())
    found |= {f"{names[p]}/{key}": value for p, entries in optimizer.state.items() for key, value in entries.items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in found.items()
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and any(name.endswith("/exp_avg_sq") for name in ours)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-12, msg=name)


# --- several processes ----------------------------------------------------------------------------------------------


def run_as_one_of_several(folder: Path) -> None:
    join("cpu")

    def save(name: str, module: AlignmentModule) -> None:
        state = state_of(module)
        if rank() == 0:
            torch.save(state, folder / f"{name}.pt")

    if world_size() != 2:
        save(f"{world_size()} processes", fitted(folder / f"for {world_size()}", resume=True, fsdp=True))
        return
    module = fitted(folder / "best", fsdp=True, mode="max")
    save("straight", module)
    choose(folder, module, save)
    fitted(folder / "cut", PowerCut(), fsdp=True, top_k=2)
    if rank() == 0:
        for copied in ("for 1", "for 2", "for 3", "for one device", "truncated", "another run"):
            shutil.copytree(folder / "cut", folder / copied)
    save("2 processes", fitted(folder / "for 2", resume=True, fsdp=True))
    save("from a file", fitted(folder / "single", resume=True, fsdp=True))
    with pytest.raises(OSError, match="disk"):
        fitted(folder / "full", FullDisk(), fsdp=True)


def choose(folder: Path, module: AlignmentModule, save: Any) -> None:
    """Let a run evaluate its best checkpoint, on processes that share the policy."""
    cfg = OmegaConf.create({"evaluation": {"policy": "best"}, "paths": {"run": str(folder / "best")}})
    path = folder / "best/checkpoints/best.ckpt"
    assert choose_weights(cfg, module, module.trainer, whole_state_dict(module.policy, folder)).step == 3
    save("best", module)
    if rank() == 0:
        truncate(next(path.glob("__1_*.distcp")))
    with pytest.raises(UserError, match=r"best.ckpt is not the intact checkpoint of step 3 .*evaluation.policy=last"):
        choose_weights(cfg, module, module.trainer, None)


class FullDisk(Callback):
    """Lets the second process fail at its shards."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "no space left on the disk")

        if rank() == 1:
            dcp.FileSystemWriter.write_data = fail  # type: ignore[method-assign, assignment]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs on two processes, and of one that was cut on one device."""
    folder = tmp_path_factory.mktemp("sharded")
    fitted(folder / "single", PowerCut())
    run_on_two_ranks(__name__, folder)
    return folder


def load(folder: Path, name: str) -> dict[str, Tensor]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one_on_any_number_of_devices(runs: Path) -> None:
    straight = load(runs, "straight")
    alone = fitted(runs / "alone")
    assert_same(state_of(alone), straight)
    for name in ("2 processes", "from a file"):
        assert_same(load(runs, name), straight)
    assert_same(state_of(fitted(runs / "for one device", resume=True)), straight)
    for count in (1, 3):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--standalone"]
        subprocess.run(
            [*command, "-m", "tests.on_rank", __name__, str(runs)], check=True, cwd=Path(__file__).parents[1]
        )
        assert_same(load(runs, f"{count} processes"), straight)


@pytest.mark.slow
def test_checkpoints_of_shards_say_their_step(runs: Path) -> None:
    steps = {path.stem: read_manifest(path) for path in (runs / "cut/checkpoints").iterdir()}
    assert {name: found.step for name, found in steps.items() if found} == {"last": 3, "best": 3, "step-3": 3}
    assert {found.run for found in steps.values() if found} == {"this run"}
    assert {path.name for path in (runs / "best/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert not list((runs / "full/checkpoints").iterdir())


@pytest.mark.slow
def test_the_best_checkpoint_of_shards_is_chosen(runs: Path) -> None:
    straight, best = load(runs, "straight"), load(runs, "best")
    # The run that was cut has the weights of step 3 in its last checkpoint, on other processes.
    cut = {f"policy.{name}": value for name, value in best.items() if "/" not in name}
    for name, value in read_whole(runs / "cut/checkpoints/last.ckpt")["state_dict"].items():
        if name.startswith("policy."):
            torch.testing.assert_close(cut[name], value, rtol=0, atol=1e-12)
    assert any(not torch.equal(value, best[name]) for name, value in straight.items())


@pytest.mark.slow
def test_damaged_shards_lead_to_another_checkpoint(runs: Path) -> None:
    folder = runs / "truncated/checkpoints"
    assert last_checkpoint(folder.parent)[:2] == (str(folder / "last.ckpt"), 3)
    truncate(next((folder / "last.ckpt").glob("__0_*.distcp")))
    with collect_notes() as notes:
        assert last_checkpoint(folder.parent).step == 3
    assert notes == {"notes/damaged_checkpoints": 1.0}
    # A link shares its bytes, so `best.ckpt` and `step-3.ckpt` are damaged together.
    next((folder / "step-3.ckpt").glob("__1_*.distcp")).unlink()
    shard = next((folder / "best.ckpt").glob("__1_*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with collect_notes() as notes:
        assert last_checkpoint(folder.parent) == (None, -1, None)
    assert notes == {"notes/damaged_checkpoints": 3.0}


@pytest.mark.slow
def test_the_shards_of_another_run_are_refused(runs: Path) -> None:
    (runs / "another run/identity.json").write_text(json.dumps({"digest": "another one", "config": {}}))
    with pytest.raises(UserError, match=r"last.ckpt is the checkpoint of another run"):
        last_checkpoint(runs / "another run")


# --- renaming ------------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, step: int) -> None:
    """Write a complete folder of a checkpoint with a shard."""
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"shard" * step)
    torch.save({"global_step": step}, path / META)
    write_manifest(path, step, None)


class KilledError(Exception):
    """The end of a process."""


@pytest.mark.parametrize("earlier", ["folder", "file", "none"])
def test_a_kill_between_two_renames_loses_nothing(
    earlier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is killed before each step of a replacement in turn, until it survives."""
    act = {name: getattr(Path, name) for name in ("rename", "replace")} | {"rmtree": shutil.rmtree}
    survived, calls = False, 0
    while not survived:
        run = tmp_path / str(calls)
        last = run / "checkpoints/last.ckpt"
        if earlier == "folder":
            write_checkpoint(last, 3)
        elif earlier == "file":
            last.parent.mkdir(parents=True)
            torch.save({"global_step": 3}, last)
        write_checkpoint(unfinished_path(last), 6)
        left = calls

        def killed(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise KilledError
                left -= 1
                return act[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(Path, name, killed(name))
            patch.setattr(shutil, "rmtree", killed("rmtree"))
            try:
                take_place(last)
                survived = True
            except KilledError:
                pass
        # Before the first step, the earlier checkpoint stands; a complete one is taken where it does not.
        expected = 3 if calls == 0 and earlier != "none" else 6
        assert last_checkpoint(run)[:2] == (str(last), expected), calls
        assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
        calls += 1
    assert calls == {"folder": 4, "file": 3, "none": 2}[earlier]


def test_a_kill_while_shards_are_written_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints/last.ckpt"
    write_checkpoint(last, 3)
    write_checkpoint(unfinished_path(last), 6)
    (unfinished_path(last) / "checkpoint.json").unlink()  # It is written last.
    last.rename(last.with_name(".last.ckpt.older"))
    assert last_checkpoint(tmp_path)[:2] == (str(last), 3)


def test_a_checkpoint_that_was_being_removed_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = tmp_path / "checkpoints/last.ckpt"
    write_checkpoint(last, 3)
    write_checkpoint(last.with_name("step-9.ckpt"), 9)

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            remove_checkpoint(last.with_name("step-9.ckpt"))
    assert last_checkpoint(tmp_path).step == 3
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_every_change_of_a_file_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"
    write_checkpoint(folder, 3)
    assert is_intact(folder)
    for damage in (truncate, Path.unlink, lambda file: file.write_bytes(file.read_bytes()[::-1])):
        for name in ("__0_0.distcp", META):
            content = (folder / name).read_bytes()
            damage(folder / name)
            assert not is_intact(folder)
            (folder / name).write_bytes(content)
    assert is_intact(folder)
    (folder / "checkpoint.json").write_text("[1]")
    assert not is_intact(folder)


class Call:
    """A pickle that runs a command when it is read."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_reading_shards_runs_no_code(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last.ckpt", 3)
    (tmp_path / "last.ckpt/.metadata").write_bytes(pickle.dumps(Call()))
    with pytest.raises(pickle.UnpicklingError, match="does not belong into a checkpoint"):
        read_whole(tmp_path / "last.ckpt")


if __name__ == "__main__":
    run_as_one_of_several(Path(sys.argv[1]))
