"""The check that two models read the same tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from spo.errors import UserError
from spo.models.library_errors import Origin


def check_same_tokens(
    origin: Origin,
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase,
    role: str = "a reference",
) -> None:
    """Refuse a model whose token ids do not stand for the same texts as those of the policy.

    Args:
        origin: Place of the model.
        tokenizer: Tokenizer of the model.
        policy_tokenizer: Tokenizer of the policy.
        role: Role of the model, for the message.

    Raises:
        UserError: The vocabularies differ.
    """
    theirs, ours = tokenizer.get_vocab(), policy_tokenizer.get_vocab()
    if differing := sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token)):
        raise UserError(
            f"{origin} cannot be {role}: its vocabulary differs from the policy's in {len(differing):,} tokens, "
            f"such as {differing[0]!r}; choose a model with the same tokenizer"
        )
