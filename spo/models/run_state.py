"""Files beside the saved policy: what a loss has learned, and the weights of a reference that moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo.errors import UserError
from spo.records import filenames
from spo.records.files import temporary_path
from spo.records.policy import POLICY_REMEDY


def save_loss(loss: Any, run_dir: Path) -> None:
    """Write the parameters and buffers of a loss, if it has any.

    Args:
        loss: Loss after training.
        run_dir: Run directory.
    """
    _save(_state_of(loss), run_dir / filenames.LOSS)


def save_reference(state: Mapping[str, Tensor], run_dir: Path) -> None:
    """Write the weights of a reference that moved, if it did.

    Args:
        state: State of the reference, empty for one that did not move.
        run_dir: Run directory.
    """
    _save(state, run_dir / filenames.REFERENCE)


def load_loss(loss: Any, run_dir: Path) -> None:
    """Give a new loss what the loss of a run has learned, in the dtype of the run, and set it to evaluation mode.

    Args:
        loss: Loss as the configuration makes it.
        run_dir: Directory of a run that has written its policy.

    Raises:
        UserError: The file is missing or damaged, or belongs to another loss.
    """
    own = _state_of(loss)
    if not isinstance(loss, nn.Module):
        return
    loss.eval()
    if not own:
        return
    file = run_dir / filenames.LOSS
    saved = _load(file)
    if wrong := sorted(name for name in own.keys() | saved.keys() if _shape(own, name) != _shape(saved, name)):
        raise UserError(
            f"{file} has other parameters and buffers than {type(loss).__name__} (see {wrong[0]}): restore the code of "
            f"method.loss, or {POLICY_REMEDY}"
        )
    loss.load_state_dict(saved, assign=True)


def load_reference_state(run_dir: Path) -> dict[str, Tensor]:
    """Return the weights that a moving reference had at the step of the saved policy.

    Args:
        run_dir: Directory of a run that has written its policy.

    Raises:
        UserError: The file is missing or damaged.
    """
    return _load(run_dir / filenames.REFERENCE)


def _state_of(loss: Any) -> dict[str, Tensor]:
    return loss.state_dict() if isinstance(loss, nn.Module) else {}


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    if not state:
        file.unlink(missing_ok=True)
        return
    temporary = temporary_path(file)
    # Tensors that share memory, such as tied weights, are written once each.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, temporary)
    temporary.replace(file)


def _load(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"{file} is missing: {POLICY_REMEDY}")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): {POLICY_REMEDY}") from error
