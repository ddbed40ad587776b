"""The check that two models read the same tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from spo.errors import UserError
from spo.models.library_errors import Origin


def check_same_tokens(
    origin: Origin, other: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, role: str = "a reference"
) -> None:
    """Refuse a model for which a token id stands for another text than for the policy.

    Args:
        origin: Place of the model.
        other: Tokenizer of the model.
        own: Tokenizer of the policy.
        role: Role of the model, for the message.

    Raises:
        UserError: The vocabularies differ.
    """
    theirs, ours = other.get_vocab(), own.get_vocab()
    if differing := sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token)):
        raise UserError(
            f"{origin} cannot be {role}: its vocabulary differs from the policy's in {len(differing):,} tokens, "
            f"such as {differing[0]!r}; choose a model with the same tokenizer"
        )
