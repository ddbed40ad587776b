"""A table of logits with the interface of a language model: one row for every prefix, and no shared parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

from spo.bounds import NonNegativeFloat, NonNegativeInt, PositiveInt, validated_by

MAX_TABLE_ENTRIES = 50_000_000


class TabularConfig(PreTrainedConfig):
    """Sizes of the table.

    Args:
        vocab_size: Number of tokens, with special ones.
        context: Largest number of tokens of a prefix.
        initializer_range: Standard deviation of the initial logits.
        kwargs: Settings of every config of transformers, such as the ids of special tokens.
    """

    model_type = "spo_tabular"
    attribute_map = {"max_position_embeddings": "context"}  # noqa: RUF012
    num_hidden_layers = 0  # `generate` reads it to allocate a cache. This model does not need one.

    def __init__(self, vocab_size: int = 2, context: int = 1, initializer_range: float = 1.0, **kwargs: Any) -> None:
        self.vocab_size, self.context, self.initializer_range = vocab_size, context, initializer_range
        super().__init__(**kwargs)


class TabularForCausalLM(PreTrainedModel, GenerationMixin):
    """A model that looks next-token logits up by their whole prefix, so it can represent any distribution.

    Masked tokens are not part of a prefix, so padding on either side changes nothing. There is no cache: each step of
    ``generate`` looks the whole prefix up.
    """

    config_class = TabularConfig
    _supports_sdpa = True  # The model does not use attention, so every attention implementation is right.

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(num_prefixes(config.vocab_size, config.context), config.vocab_size)
        self.head = nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table."""
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        """Return an identity, whose input is cut to the positions of completion tokens."""
        return self.head

    def prepare_inputs_for_generation(  # type: ignore[override]  # `generate` passes all arguments by keyword.
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return the whole prefix for every step of ``generate``."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput:
        """Compute the logits of every position.

        Args:
            input_ids: ``(N, T)`` token ids.
            attention_mask: ``(N, T)`` 0 on padding; ``None`` without padding.
            use_cache: Ignored, since there is no cache.
            return_dict: Ignored, since the result always is a dictionary.

        Raises:
            ValueError: A prefix is longer than those of the table.
        """
        attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        context = self.config.context
        if input_ids.shape[1] > context and (longest := int(attended.sum(1).max())) > context:
            raise ValueError(f"a prefix of {longest} tokens: this table holds prefixes of up to {context}")
        return CausalLMOutput(logits=self.head(self.table(self._prefixes(input_ids, attended.bool()))))

    def _prefixes(self, input_ids: Tensor, attended: Tensor) -> Tensor:
        """Return the ``(N, T)`` rows of the table: a prefix is a number with the digits 1 to V, which is unique."""
        row, rows = torch.zeros_like(input_ids[:, 0]), []
        for token, counts in zip(input_ids.unbind(1), attended.unbind(1), strict=True):
            row = torch.where(counts, row * self.config.vocab_size + token + 1, row)
            rows.append(row)
        return torch.stack(rows, dim=1)


def num_prefixes(vocab_size: int, context: int) -> int:
    """Return the number of sequences of up to ``context`` tokens, with the empty one."""
    return sum(vocab_size**length for length in range(context + 1))


def check_size(vocab_size: int, context: int) -> None:
    """Check that a table is small enough to fit into memory.

    Args:
        vocab_size: Number of tokens, with special ones.
        context: Largest number of tokens of a prefix.

    Raises:
        ValueError: The table has too many entries.
    """
    if num_prefixes(vocab_size, context) * vocab_size > MAX_TABLE_ENTRIES:
        raise ValueError(
            f"model=tabular: {vocab_size} tokens and prefixes of up to {context} make a table of more than "
            f"{MAX_TABLE_ENTRIES:,} entries; choose a smaller language, or model=tiny"
        )


def validate(tokenizer: PreTrainedTokenizerFast, context: int, **_: Any) -> None:
    """Check the arguments of :func:`build` without building: see :func:`check_size`."""
    check_size(len(tokenizer), context)


@validated_by(validate)
def build(
    tokenizer: PreTrainedTokenizerFast, context: PositiveInt, scale: NonNegativeFloat, seed: NonNegativeInt
) -> tuple[TabularForCausalLM, PreTrainedTokenizerFast]:
    """Build a table, as ``model.initial`` does; the global random state does not change.

    Args:
        tokenizer: Tokenizer with the vocabulary and the special tokens.
        context: Largest number of tokens of a prefix.
        scale: Standard deviation of the logits, which are normally distributed.
        seed: Random seed of the logits.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: The table would be too large.
    """
    check_size(len(tokenizer), context)
    config = TabularConfig(
        vocab_size=len(tokenizer),
        context=context,
        initializer_range=scale,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TabularForCausalLM(config), tokenizer


AutoConfig.register(TabularConfig.model_type, TabularConfig, exist_ok=True)
AutoModelForCausalLM.register(TabularConfig, TabularForCausalLM, exist_ok=True)
