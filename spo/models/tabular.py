"""A table of logits behind the interface of a language model: one row for every prefix, nothing shared between them."""

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

MOST_ENTRIES = 50_000_000


class TabularConfig(PreTrainedConfig):
    """Sizes of the table.

    Args:
        vocab_size: tokens, special ones included.
        context: most tokens of a prefix.
        initializer_range: standard deviation of fresh logits.
        kwargs: ids of the special tokens, and the like.
    """

    model_type = "spo_tabular"
    attribute_map = {"max_position_embeddings": "context"}  # noqa: RUF012
    num_hidden_layers = 0  # what `generate` sizes its cache by

    def __init__(self, vocab_size: int = 2, context: int = 1, initializer_range: float = 1.0, **kwargs: Any) -> None:
        self.vocab_size, self.context, self.initializer_range = vocab_size, context, initializer_range
        super().__init__(**kwargs)


class TabularForCausalLM(PreTrainedModel, GenerationMixin):
    """Next-token logits looked up by the tokens that precede, so that any distribution can be represented.

    What the attention mask leaves out is not part of a prefix, so padding on either side changes nothing. There is
    nothing to cache: each step of ``generate`` looks the whole prefix up.
    """

    config_class = TabularConfig
    _supports_sdpa = True  # there is no attention, so any implementation of it will do

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(num_prefixes(config.vocab_size, config.context), config.vocab_size)
        self.head = nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table."""
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        """Where logits can be cut to the positions that are wanted: it passes rows of the table on."""
        return self.head

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """The whole prefix, for every step of ``generate``."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput:
        """Logits of every position.

        Args:
            input_ids: ``(N, T)``.
            attention_mask: ``(N, T)``, 0 where a position is padding; ``None`` where none is.
            use_cache: nothing is cached either way.
            return_dict: the result is one either way.

        Raises:
            ValueError: a prefix is longer than the table's.
        """
        attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        context = self.config.context
        if input_ids.shape[1] > context and (longest := int(attended.sum(1).max())) > context:
            raise ValueError(f"a prefix of {longest} tokens: this table holds prefixes of up to {context}")
        return CausalLMOutput(logits=self.head(self.table(self._prefixes(input_ids, attended.bool()))))

    def _prefixes(self, input_ids: Tensor, attended: Tensor) -> Tensor:
        """``(N, T)`` rows of the table: prefixes as numbers with digits 1 to V, which gives each its own."""
        row, rows = torch.zeros_like(input_ids[:, 0]), []
        for token, counts in zip(input_ids.unbind(1), attended.unbind(1), strict=True):
            row = torch.where(counts, row * self.config.vocab_size + token + 1, row)
            rows.append(row)
        return torch.stack(rows, dim=1)


def num_prefixes(vocab_size: int, context: int) -> int:
    """Sequences of up to ``context`` tokens, the empty one included."""
    return sum(vocab_size**length for length in range(context + 1))


def check_size(vocab_size: int, context: int) -> None:
    """Refuses a table that is no longer a small thing.

    Raises:
        ValueError: in words.
    """
    if num_prefixes(vocab_size, context) * vocab_size > MOST_ENTRIES:
        raise ValueError(
            f"model=tabular: {vocab_size} tokens and prefixes of up to {context} make a table of more than "
            f"{MOST_ENTRIES:,} entries; choose a smaller language, or model=tiny"
        )


def validate(tokenizer: PreTrainedTokenizerFast, context: int, **_: Any) -> None:
    """Check the arguments of :func:`build` without building: see :func:`check_size`."""
    check_size(len(tokenizer), context)


@validated_by(validate)
def build(
    tokenizer: PreTrainedTokenizerFast, context: PositiveInt, scale: NonNegativeFloat, seed: NonNegativeInt
) -> tuple[TabularForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer together, as ``model.initial``; the global random state is left as it was.

    Args:
        tokenizer: gives the vocabulary and the special tokens.
        context: most tokens of a prefix.
        scale: standard deviation of the logits, which are normal.
        seed: of the logits.

    Raises:
        ValueError: the table would be too large.
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
