"""The files beside a saved policy: written, verified, read, and from the checkpoint that the policy is from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from spo.errors import UserError
from spo.losses import DPOLoss
from spo.models.run_state import load_loss, load_reference_state, save_loss, save_reference
from spo.objective.learned import tensors_of
from spo.records import filenames
from spo.records.policy import verify_policy, write_policy_digests
from spo.stages import checkpointing
from tests.helpers import tiny_llama
from tests.test_learned_losses import Headed, HeadedRunning, Recorder, pairs_with, train


def learned_loss() -> HeadedRunning:
    loss = HeadedRunning().double()
    for number, tensor in enumerate(tensors_of(loss).values()):
        tensor.data.fill_(number + 1 / 3)
    loss.head.bias.requires_grad_(False)
    return loss


def test_loss_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    trained, fresh = learned_loss(), HeadedRunning()
    save_loss(trained, tmp_path)
    load_loss(fresh, tmp_path)
    assert not fresh.training
    for name, tensor in tensors_of(trained).items():
        assert torch.equal(tensors_of(fresh)[name], tensor) and tensors_of(fresh)[name].dtype == tensor.dtype
    assert [file.name for file in tmp_path.iterdir()] == ["loss.safetensors"]
    load_loss(DPOLoss(), tmp_path / "missing")


def test_nothing_is_written_for_a_loss_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "loss.safetensors").write_bytes(b"of an earlier run")
    save_loss(DPOLoss(), tmp_path)
    save_reference({}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss.safetensors is missing: restore the files, or remove metrics.json"):
        load_loss(Headed(), tmp_path)
    with pytest.raises(UserError, match=r"reference.safetensors is missing: restore"):
        load_reference_state(tmp_path)
    save_loss(learned_loss(), tmp_path)
    with pytest.raises(UserError, match=r"other parameters and buffers than Headed \(see count\): restore the code"):
        load_loss(Headed(), tmp_path)
    file = tmp_path / "loss.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"loss.safetensors is damaged \(.*\): restore the files"):
        load_loss(HeadedRunning(), tmp_path)


@pytest.mark.parametrize("name", [filenames.LOSS, filenames.REFERENCE])
def test_changes_are_noticed(name: str, tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    save_loss(learned_loss(), tmp_path)
    save_reference({"weight": torch.ones(2)}, tmp_path)
    write_policy_digests(tmp_path)
    verify_policy(tmp_path)
    assert load_reference_state(tmp_path)["weight"].tolist() == [1, 1]
    file = tmp_path / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match=rf"\.\./{name} was changed"):
        verify_policy(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=rf"\.\./{name} is missing"):
        verify_policy(tmp_path)
    write_policy_digests(tmp_path)
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"\.\./{name} was added"):
        verify_policy(tmp_path)


def test_best_checkpoint_has_loss_and_reference_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(steps: int, reference: Recorder) -> Any:
        models: dict[str, Any] = {"reference": reference, "reference_model": tiny_llama(1, dtype=torch.float32)}
        return train(tmp_path, pairs_with(), steps, **models)

    early, late = Recorder(), Recorder()
    module = run(1, early)
    module.trainer.save_checkpoint(tmp_path / "best.ckpt")
    best = {name: tensor.clone() for name, tensor in tensors_of(module.loss).items()}
    module = run(3, late)
    callback: Any = SimpleNamespace(best={1: 0.5}, best_path=tmp_path / "best.ckpt", monitor="val/loss")
    monkeypatch.setattr(checkpointing, "checkpoint_callback", lambda trainer: callback)
    monkeypatch.setattr(checkpointing, "is_of_run", lambda run_dir, checkpoint: True)
    cfg = OmegaConf.create({"paths": {"run": str(tmp_path)}, "evaluation": {"policy": "best"}})
    assert not all(torch.equal(tensors_of(module.loss)[name], tensor) for name, tensor in best.items())
    assert not torch.equal(late.seen, early.seen)
    assert checkpointing.choose_weights(cfg, module, module.trainer, None).step == 1
    assert all(torch.equal(tensors_of(module.loss)[name], tensor) for name, tensor in best.items())
    assert torch.equal(late.seen, early.seen)
