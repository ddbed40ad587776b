"""State that a loss learns: parameters that are trained with the policy, and running statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo.errors import UserError

if TYPE_CHECKING:
    from spo.losses import Loss
    from spo.types import Logps

PREFIX = "loss."
"""Beginning of the names of a loss's tensors in checkpoints and in messages."""


def parameters_of(loss: Loss[Any]) -> list[nn.Parameter]:
    """Return the trainable parameters of a loss that is a module; empty for any other loss."""
    return [p for p in loss.parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []


def buffers_of(loss: Loss[Any]) -> dict[str, Tensor]:
    """Return the buffers of a loss by name; empty for a loss that is not a module."""
    return dict(loss.named_buffers()) if isinstance(loss, nn.Module) else {}


def tensors_of(loss: Loss[Any]) -> dict[str, Tensor]:
    """Return the parameters and buffers of a loss by name; empty for a loss that is not a module."""
    if not isinstance(loss, nn.Module):
        return {}
    return {f"{PREFIX}{name}": tensor for name, tensor in (*loss.named_parameters(), *loss.named_buffers())}


def fit_dtype(loss: Loss[Any], policy: nn.Module) -> None:
    """Make the tensors of a loss at least as precise as the log-probs of a policy, which are never below float32.

    Args:
        loss: Loss of the method.
        policy: Model in training.
    """
    is_double = any(parameter.dtype == torch.float64 for parameter in policy.parameters())
    dtype = torch.float64 if is_double else torch.float32
    for tensor in tensors_of(loss).values():
        if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < torch.finfo(dtype).bits:
            tensor.data = tensor.data.to(dtype)


def share_tensors(loss: Loss[Any]) -> None:
    """Give all processes the parameters and buffers of the first one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors_of(loss).values():
            torch.distributed.broadcast(tensor.detach(), src=0)


def share_gradients(loss: Loss[Any], world_size: int) -> None:
    """Average the gradients of a loss over processes, once per step.

    The strategy leaves the parameters of a loss alone: the last term of a step may be one that does not use them. A
    parameter that no term uses has the gradient zero, on any number of processes.
    """
    for parameter in parameters_of(loss):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if world_size > 1:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size


def update_statistics(loss: Loss[Any], logps: Logps) -> None:
    """Let a loss update its running statistics.

    Args:
        loss: Loss of the method.
        logps: Log-probs of all pairs of a step, over micro-batches and processes.

    Raises:
        UserError: The loss has changed an attribute that checkpoints do not hold.
    """
    modules = dict(loss.named_modules()) if isinstance(loss, nn.Module) else {"": loss}
    before = {name: _attributes(module) for name, module in modules.items()}
    with torch.no_grad():
        loss.update_statistics(logps.with_columns({path: value.detach() for path, value in logps.columns().items()}))
    for name, module in modules.items():
        after = _attributes(module)
        known = before[name]
        changed = [
            key
            for key, (value, mark) in after.items()
            if key not in known or known[key][0] is not value or known[key][1] != mark
        ]
        if changed:
            place = ".".join(filter(None, (type(loss).__name__, name, sorted(changed)[0])))
            raise UserError(
                f"method.loss: update_statistics changes {place}, which is not a buffer, so that a resumed run would "
                "not have it: make it a tensor with register_buffer"
            )


def _attributes(module: object) -> dict[str, tuple[Any, int]]:
    """Return each attribute that is not a buffer, parameter or module, with a number that shows a change in place."""
    return {
        name: (value, value._version if isinstance(value, Tensor) else len(value) if isinstance(value, Sized) else 0)
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
    }


def check_state(loss: Loss[Any], state: Mapping[str, Tensor]) -> None:
    """Refuse the state of another loss.

    Args:
        loss: Loss of the method.
        state: Tensors of a checkpoint by name, those of the loss with :data:`PREFIX`.

    Raises:
        UserError: Parameters or buffers are missing, unknown or of another shape.
    """
    own = loss.state_dict(prefix=PREFIX) if isinstance(loss, nn.Module) else {}
    saved = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    for name in sorted(own.keys() | saved.keys()):
        if _shape(own.get(name)) != _shape(saved.get(name)):
            raise UserError(
                f"method.loss: {name.removeprefix(PREFIX)} of {type(loss).__name__} is {_shape(own.get(name))} now and "
                f"{_shape(saved.get(name))} as saved: restore the code of the loss, or run again with rerun=true"
            )


class Statistics:
    """The buffers of a loss as they were before a step, for a step that is not taken.

    Args:
        loss: Loss of the method.
    """

    def __init__(self, loss: Loss[Any]) -> None:
        self.loss = loss
        self._before: dict[str, Tensor] = {}

    def remember(self) -> None:
        """Copy the buffers at the beginning of a step."""
        self._before = {name: buffer.clone() for name, buffer in buffers_of(self.loss).items()}

    def restore_if(self, is_bad: Tensor) -> None:
        """Restore the buffers on their device, without a wait for it, if a step is bad.

        Args:
            is_bad: 1 for a bad step, else 0.

        Raises:
            UserError: A buffer has another shape or dtype than before the step.
        """
        after, before = buffers_of(self.loss), self._before
        for name in before | after:
            if _form(before.get(name)) != _form(after.get(name)):
                raise UserError(
                    f"method.loss: the buffer {name} of {type(self.loss).__name__} was "
                    f"{_form(before.get(name))} and is {_form(after.get(name))} after a step, so that a checkpoint "
                    "could not restore it: register it with the shape and dtype that it keeps"
                )
            after[name].copy_(torch.where(is_bad.bool(), before[name], after[name]))


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"


def _form(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"
