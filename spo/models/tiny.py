"""The built-in model: a small Llama and a small byte-level tokenizer, built from explicit sizes."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spo.bounds import NonNegativeFloat, NonNegativeInt, PositiveInt
from spo.data.stories.grammar import StoryWorld

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def build_tokenizer(vocab_size: int, num_stories: int, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the story corpus; the same arguments give the same tokenizer.

    The vocabulary has all bytes, so it can encode every text. The tokenizer does not add BOS and EOS: the code that
    renders a sequence puts them in place by position.

    Args:
        vocab_size: Upper limit of tokens, with the 256 bytes and three special tokens.
        num_stories: Number of stories to train on.
        seed: Random seed of the story world.

    Raises:
        ValueError: ``vocab_size`` is too small for the bytes and the special tokens.
    """
    smallest = 256 + len((BOS, EOS, PAD))
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}: the bytes and the special tokens alone need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stories = StoryWorld(seed).stories(num_stories, "tokenizer")
    tokenizer.train_from_iterator((f"{opening} {continuation}" for opening, continuation in stories), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def build_tiny(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    max_position_embeddings: int,
    tie_word_embeddings: bool,
    initializer_range: float,
    seed: int,
) -> LlamaForCausalLM:
    """Build a small Llama with random weights; the global random state does not change.

    Args:
        tokenizer: Tokenizer with the vocabulary and the ids of BOS, EOS and PAD.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layers.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads.
        max_position_embeddings: Longest sequence in tokens.
        tie_word_embeddings: Whether the input and the output share one embedding matrix.
        initializer_range: Standard deviation of the initial weights.
        seed: Random seed of the initial weights.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def build(
    tokenizer: PreTrainedTokenizerFast | None,
    vocab_size: int,
    num_stories: PositiveInt,
    hidden_size: PositiveInt,
    intermediate_size: PositiveInt,
    num_hidden_layers: PositiveInt,
    num_attention_heads: PositiveInt,
    num_key_value_heads: PositiveInt,
    max_position_embeddings: PositiveInt,
    tie_word_embeddings: bool,
    initializer_range: NonNegativeFloat,
    seed: NonNegativeInt,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Build the model and its tokenizer, as ``model.initial`` does.

    The arguments are those of :func:`build_tokenizer` and :func:`build_tiny`. A given ``tokenizer`` is used as it is.
    """
    tokenizer = build_tokenizer(vocab_size, num_stories, seed) if tokenizer is None else tokenizer
    model = build_tiny(
        tokenizer,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        max_position_embeddings,
        tie_word_embeddings,
        initializer_range,
        seed,
    )
    return model, tokenizer
