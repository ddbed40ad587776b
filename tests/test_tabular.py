"""The table of logits: whole distributions, what it shares with a language model, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from spo.config.plan import plan
from spo.data.enumerable import language_tokenizer
from spo.errors import ConfigProblems
from spo.forward.head import completion_logits
from spo.models import TabularForCausalLM
from spo.models.tabular import build, num_prefixes
from spo.models.tiny import build as build_small_llama
from spo.sampling import sample
from spo.types import Sequences
from tests.helpers import completion_logps, sequences

SYMBOLS, NEW = 3, 3
PROMPT = (0, 2)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return language_tokenizer(SYMBOLS)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> TabularForCausalLM:
    return build(tokenizer, len(PROMPT) + NEW, 1.0, 0)[0].double().eval()


def leaves() -> list[tuple[int, ...]]:
    """Every completion of up to ``NEW`` tokens that ends with token 0 or is cut."""
    shorter = (itertools.product(range(1, SYMBOLS + 1), repeat=n) for n in range(NEW))
    ended = [(*symbols, 0) for group in shorter for symbols in group]
    return ended + list(itertools.product(range(1, SYMBOLS + 1), repeat=NEW))


def every_response() -> Sequences:
    return sequences([(PROMPT, leaf) for leaf in leaves()], pad=0)


def small_llama(tokenizer: PreTrainedTokenizerFast | None, **changes: int) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, vocab_size=300, num_stories=20) | changes
    return build_small_llama(tokenizer, **sizes, tie_word_embeddings=True, initializer_range=0.3, seed=0)


def test_response_probabilities_sum_to_one(model: TabularForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    llama, _ = small_llama(tokenizer)
    with torch.no_grad():
        exact, rounded = (completion_logps(policy, every_response()) for policy in (model, llama.eval()))
    assert exact.dtype == torch.float64 and abs(float(exact.exp().sum()) - 1) < 1e-12
    assert rounded.dtype == torch.float32 and abs(float(rounded.double().exp().sum()) - 1) < 1e-6


def test_log_probs_follow_from_the_table_rows(model: TabularForCausalLM) -> None:
    """Rows are counted here by walking through all prefixes, shortest first."""
    tokens = SYMBOLS + 1
    prefixes = [p for n in range(len(PROMPT) + NEW + 1) for p in itertools.product(range(tokens), repeat=n)]
    assert len(prefixes) == num_prefixes(tokens, len(PROMPT) + NEW) == len(model.table.weight)
    row = {prefix: i for i, prefix in enumerate(prefixes)}
    for leaf, found in zip(leaves(), completion_logps(model, every_response()).tolist(), strict=True):
        conditionals = (
            model.table.weight.detach()[row[PROMPT + leaf[:t]]].log_softmax(0)[leaf[t]] for t in range(len(leaf))
        )
        assert found == pytest.approx(float(sum(conditionals)), abs=1e-12)


def test_sample_frequencies_match_enumeration(model: TabularForCausalLM) -> None:
    number = 20_000
    settings = dict(max_new_tokens=NEW, temperature=1.0, stop_ids=(0,), pad_token_id=0, sampler="static")
    drawn = sample(model, [PROMPT] * number, **settings, seeds=range(number))  # type: ignore[arg-type]
    ids = [row[2:length] for row, length in zip(drawn.input_ids.tolist(), drawn.length.tolist(), strict=True)]
    counts, probabilities = Counter(map(tuple, ids)), completion_logps(model, every_response()).exp().tolist()
    assert counts.keys() <= set(leaves())
    chi_square = sum(
        (counts[leaf] - number * p) ** 2 / (number * p) for leaf, p in zip(leaves(), probabilities, strict=True)
    )
    freedom = len(leaves()) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_table_ignores_padding_on_either_side(model: TabularForCausalLM) -> None:
    ids = torch.tensor([[0, 2, 1], [0, 3, 3]])
    plain = model(ids).logits
    wrong, none = torch.full((2, 2), 3), torch.zeros(2, 2, dtype=torch.long)
    left = model(torch.cat([wrong, ids], 1), attention_mask=torch.cat([none, torch.ones_like(ids)], 1))
    right = model(torch.cat([ids, wrong], 1), attention_mask=torch.cat([torch.ones_like(ids), none], 1))
    assert torch.equal(left.logits[:, 2:], plain) and torch.equal(right.logits[:, :3], plain)
    long = model(torch.cat([wrong, wrong, ids], 1), attention_mask=torch.cat([none, none, torch.ones_like(ids)], 1))
    assert torch.equal(long.logits[:, 4:], plain)  # wider than the context, and yet no longer
    settings = dict(max_new_tokens=2, temperature=0.0, stop_ids=(0,), pad_token_id=0, sampler="static")
    alone = sample(model, [(0,)], **settings, seeds=[0])  # type: ignore[arg-type]
    beside = sample(model, [(0,), (0, 2, 1)], **settings, seeds=[0, 1])  # type: ignore[arg-type]
    assert beside.input_ids[0, : alone.length[0]].tolist() == alone.input_ids[0].tolist()


def test_gradient_reaches_visited_prefixes_only(model: TabularForCausalLM) -> None:
    completion_logps(model, sequences([(PROMPT, (1, 0)), (PROMPT, (1, 3, 2))], extra=1, pad=3)).sum().backward()
    tokens = SYMBOLS + 1

    def row(*prefix: int) -> int:
        return sum((token + 1) * tokens**place for place, token in enumerate(reversed(prefix)))

    assert model.table.weight.grad is not None
    reached = model.table.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert reached == sorted([row(*PROMPT), row(*PROMPT, 1), row(*PROMPT, 1, 3)])


def test_table_returns_completion_logits_only(model: TabularForCausalLM) -> None:
    logits = completion_logits(model, sequences([(PROMPT, (1, 0)), (PROMPT, (3, 3, 2))], pad=0))
    assert logits.shape == (5, SYMBOLS + 1)
    whole = model(torch.tensor([[*PROMPT, 3, 3]])).logits[0, 1:]
    assert torch.equal(logits[2:], whole)


def test_table_save_and_load(model: TabularForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, TabularForCausalLM) and loaded.dtype == torch.float64
    assert torch.equal(loaded.table.weight, model.table.weight)
    assert loaded.config.max_position_embeddings == loaded.config.context == 5
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("abc")["input_ids"] == [1, 2, 3] and again.eos_token_id == again.bos_token_id == 0


def test_table_follows_seed_and_scale(tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    one, same, other, wide = (
        build(tokenizer, 5, s, seed)[0].table.weight for s, seed in [(1, 0), (1, 0), (1, 1), (3, 0)]
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert float(one.std()) == pytest.approx(1, rel=0.05) and float(wide.std()) == pytest.approx(3, rel=0.05)


def test_table_rejects_long_prefixes_and_large_sizes(
    model: TabularForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="a prefix of 6 tokens: this table holds prefixes of up to 5"):
        model(torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="4 tokens and prefixes of up to 12 make a table of more than 50,000,000"):
        build(tokenizer, 12, 1.0, 0)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "model=tabular needs a data set with a vocabulary of its own: data=enumerable"),
        (
            ["data=enumerable", "data.source.num_symbols=20", "data.source.prompt_symbols=3"],
            "model=tabular: 21 tokens and prefixes of up to 7 make a table of more than 50,000,000 entries; choose",
        ),
    ],
)
def test_config_with_an_impossible_table_is_an_error(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigProblems) as caught:
        plan(["model=tabular", "data.source.num_pairs=9" if overrides else "seed=0", *overrides])
    assert str(caught.value).startswith("the configuration has a problem:") and problem in str(caught.value)


def test_tiny_llama_uses_the_tokenizer_of_the_data(tokenizer: PreTrainedTokenizerFast) -> None:
    llama, own = small_llama(tokenizer)
    assert own is tokenizer and llama.config.vocab_size == 4 and llama.config.eos_token_id == 0
    _, trained = small_llama(None)
    assert len(trained) == 300
