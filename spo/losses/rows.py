"""The numbers of rows that the code of a loss returns: their shape, soft labels and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from spo.errors import UserError

if TYPE_CHECKING:
    from spo.losses.base import Loss
    from spo.types import LabelledLogps, ListLogps, Logps, PairLogps


def numbers_of_shape(values: object, shape: tuple[int, ...], what: str, remedy: str) -> Tensor:
    """Return real numbers if they have a shape.

    Args:
        values: What the code of a loss returned.
        shape: Shape that it must have.
        what: Beginning of the message, such as "method.loss: MyLoss must return one loss of each row".
        remedy: End of the message.

    Raises:
        UserError: ``values`` are not a tensor of real numbers with the shape.
    """
    if isinstance(values, Tensor) and values.shape == shape and not values.is_complex():
        return values
    found = type(values).__name__ if not isinstance(values, Tensor) else tuple(values.shape)
    if isinstance(values, Tensor) and values.is_complex():
        found = f"complex numbers of shape {found}"
    raise UserError(f"{what}, of shape {shape}, and returns {found}: {remedy}")


def one_of_each_row(loss: Loss[Any], values: object, logps: Logps, method: str = "") -> Tensor:
    """Return the ``(B,)`` losses of the rows. Labels and weights would broadcast a mean to that shape unseen.

    Args:
        loss: Loss that computed them.
        values: Losses.
        logps: Log-probs of ``B`` pairs, lists or labelled completions.
        method: Method that computed them, such as ``".of_pairs"``; empty for a call.

    Raises:
        UserError: There is another number of losses, such as one mean.
    """
    what = f"method.loss: {type(loss).__name__}{method} must return one loss of each row"
    return numbers_of_shape(values, (len(logps),), what, "leave out its mean or sum")


def expected(label: Tensor, if_true: Tensor, if_false: Tensor) -> Tensor:
    """Return the ``(B,)`` expectation of a loss over a soft label.

    A row whose label is certain has its label in both calls of the loss. So its other outcome, whose loss may be
    infinite, reaches neither its gradient nor the other rows of a full batch.

    Args:
        label: ``(B,)`` probability of the first outcome.
        if_true: ``(B,)`` losses where each row that may have the first outcome has it.
        if_false: ``(B,)`` losses where each row that may have the second outcome has it.
    """
    return label * if_true.masked_fill(label == 0, 0) + (1 - label) * if_false.masked_fill(label == 1, 0)


def weighted(losses: Tensor, logps: PairLogps | ListLogps | LabelledLogps) -> Tensor:
    """Return the ``(B,)`` losses times the weights of the pairs or lists, if there are any."""
    return losses if logps.weight is None else losses * logps.weight
