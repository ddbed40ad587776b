"""Linear Alignment: its formula, its nucleus, and its two contexts against forward passes without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from spo.sampling import sample
from spo.sampling.draw import next_tokens, uniform_numbers
from spo.sampling.linear_alignment import LinearAlignment, align_logits, sample_aligned
from tests.helpers import BOS, EOS, PAD, VOCAB, tiny_llama

PRINCIPLED = [[BOS, 9, 9, 4], [BOS, 5, 6], [BOS, 8, 3, 4, 7, 6]]
PLAIN = [[BOS, 4], [BOS, 6, 6, 6, 5], [BOS, 7, 6]]
STOPS = (EOS, 7)
NEVER = (VOCAB + 1,)


def draw(model: Any, principled: Any = PRINCIPLED, plain: Any = PLAIN, **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {
        "ratio": 2.0,
        "max_new_tokens": 10,
        "temperature": 1.0,
        "stop_ids": STOPS,
        "pad_token_id": PAD,
        "seeds": range(len(principled)),
    }
    drawn = sample_aligned(model, principled, plain, **settings | changes)
    assert drawn.prompt_length.tolist() == [*map(len, principled)]
    return drawn.completions()


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    principled, plain = (2 * torch.randn(count, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    return principled, plain


def nucleus_of(logits: Tensor, top_p: float, temperature: float) -> list[int]:
    """Collect the likeliest tokens of a row until their probability reaches ``top_p``."""
    probability, kept = (logits / temperature).softmax(-1), list[int]()
    for token in probability.argsort(descending=True).tolist():
        kept.append(token)
        if probability[kept].sum() >= top_p:
            break
    return kept


def without_cache(
    model: Any, prompt: Sequence[int], plain: Sequence[int], seed: int, nucleus: str, temperature: float, top_p: float
) -> list[int]:
    """Decode one row with two whole forward passes for each token."""
    numbers = uniform_numbers([seed], 10, torch.device("cpu"))[0]
    found: list[int] = []
    for number in numbers:
        with torch.no_grad():
            a, b = (model(torch.tensor([[*ids, *found]])).logits[0, -1].float() for ids in (prompt, plain))
        aligned = 3 * a - 2 * b
        kept = nucleus_of(a if nucleus == "principled" else aligned, top_p, temperature or 1.0)
        masked = torch.full_like(aligned, -torch.inf)
        masked[kept] = aligned[kept]
        found.append(int(next_tokens(masked[None], number[None], temperature)))
        if found[-1] in STOPS:
            break
    return found


@pytest.mark.parametrize("nucleus", ["principled", "contrast"])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_decoding_equals_two_forward_passes_without_a_cache(nucleus: str, temperature: float) -> None:
    model = tiny_llama(4, scale=0.3)
    for top_p in (1.0, 0.7):
        drawn = draw(model, nucleus=nucleus, temperature=temperature, top_p=top_p)
        expected = [
            without_cache(model, *contexts, row, nucleus, temperature, top_p)
            for row, contexts in enumerate(zip(PRINCIPLED, PLAIN, strict=True))
        ]
        assert drawn == expected


@pytest.mark.parametrize("kind", ["learned positions", "state"])
def test_models_with_learned_positions_or_a_state(kind: str) -> None:
    settings: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "state":
            model: Any = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, **settings))
        else:
            model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **settings))
    model.eval()
    expected = [
        without_cache(model, *contexts, row, "principled", 1.0, 0.7)
        for row, contexts in enumerate(zip(PRINCIPLED, PLAIN, strict=True))
    ]
    assert draw(model, top_p=0.7) == expected


def test_ratio_zero_is_the_plain_principled_model() -> None:
    model = tiny_llama(4, scale=0.3)
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.8), (0.0, 1.0)):
        shared: dict[str, Any] = {"max_new_tokens": 10, "stop_ids": STOPS, "pad_token_id": PAD, "seeds": range(3)}
        plain = sample(model, PRINCIPLED, sampler="generate", temperature=temperature, top_p=top_p, **shared)
        for nucleus in ("principled", "contrast"):
            drawn = draw(model, ratio=0.0, temperature=temperature, top_p=top_p, nucleus=nucleus)
            assert drawn == plain.completions()
    assert draw(model, ratio=2.0) != draw(model, ratio=0.0)
    principled, plain_logits = rows(20)
    settings: dict[str, Any] = {"nucleus": "principled", "temperature": 1.0}
    assert torch.equal(align_logits(principled, plain_logits, ratio=0.0, top_p=1.0, **settings), principled)


def test_equal_contexts_have_no_effect_whatever_the_ratio() -> None:
    principled, _ = rows(20)
    principled[0, 3], principled[1, 5] = -torch.inf, torch.inf
    for ratio in (0.0, 1.0, 50.0):
        aligned = align_logits(principled, principled, ratio=ratio, nucleus="contrast", temperature=1.0, top_p=1.0)
        assert torch.equal(aligned, principled)
    model = tiny_llama(4, scale=0.3)
    drawn = [draw(model, PRINCIPLED, PRINCIPLED, ratio=ratio, top_p=0.9) for ratio in (0.0, 2.0, 5.0)]
    assert drawn[0] == drawn[1] == drawn[2]


def test_logits_are_the_official_formula_inside_of_the_nucleus() -> None:
    principled, plain = rows(200)
    for temperature, top_p, ratio in ((1.0, 0.8, 2.0), (0.5, 0.9, 0.5), (1.0, 0.3, -0.5)):
        for nucleus in ("principled", "contrast"):
            found = align_logits(
                principled,
                plain,
                ratio=ratio,
                nucleus=nucleus,
                temperature=temperature,
                top_p=top_p,  # type: ignore[arg-type]
            )
            aligned = (1 + ratio) * principled - ratio * plain
            for row in range(200):
                kept = nucleus_of((principled if nucleus == "principled" else aligned)[row], top_p, temperature)
                inside = torch.zeros(30, dtype=torch.bool)
                inside[kept] = True
                assert torch.equal(found[row].isfinite(), inside)
                torch.testing.assert_close(found[row, kept], aligned[row, kept])


def test_the_mask_never_adds_a_token() -> None:
    principled, plain = rows(100)
    principled[:, ::3] = -torch.inf
    for top_p in (0.2, 0.9, 1.0):
        found = align_logits(principled, plain, ratio=9.0, nucleus="principled", temperature=1.0, top_p=top_p)
        assert not found.isnan().any() and (found[:, ::3] == -torch.inf).all()
        alone = align_logits(principled, plain, ratio=0.0, nucleus="principled", temperature=1.0, top_p=top_p)
        assert torch.equal(found.isfinite(), alone.isfinite())
    plain[:, 1] = -torch.inf  # masked there alone: its principled logit stays
    found = align_logits(principled, plain, ratio=9.0, nucleus="principled", temperature=1.0, top_p=1.0)
    assert torch.equal(found[:, 1], principled[:, 1])


def test_a_row_without_probability_in_the_nucleus_falls_back() -> None:
    principled = torch.tensor([[5.0, 4.0, 0.0, 0.0], [5.0, 4.0, 0.0, 0.0]])
    plain = torch.tensor([[9.0, 9.0, -200.0, 0.0], [9.0, 9.0, 0.0, 0.0]])
    found = align_logits(principled, plain, ratio=2.0, nucleus="principled", temperature=1.0, top_p=0.9)
    assert found[0].tolist() == [5.0, 4.0, -torch.inf, -torch.inf]  # token 2 has all probability of the contrast
    assert found[1].tolist() == [-3.0, -6.0, -torch.inf, -torch.inf]


def test_rows_do_not_depend_on_each_other_and_stop() -> None:
    model = tiny_llama(4, scale=0.3)
    whole = draw(model)
    assert draw(model, PRINCIPLED[::-1], PLAIN[::-1], seeds=range(3)[::-1])[::-1] == whole
    assert [draw(model, [PRINCIPLED[i]], [PLAIN[i]], seeds=[i])[0] for i in range(3)] == whole
    free = draw(model, stop_ids=NEVER)
    for row, ended in zip(free, whole, strict=True):
        assert len(row) == 10 and row[: len(ended)] == ended and not set(ended[:-1]) & set(STOPS)


def test_processor_works_in_a_plain_call_of_generate() -> None:
    model: Any = tiny_llama(4, scale=0.3)
    processor = LinearAlignment(
        model, [PLAIN[0]], ratio=2.0, nucleus="principled", temperature=0.0, top_p=1.0, pad_token_id=PAD
    )
    ids = torch.tensor([PRINCIPLED[0]])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=[processor],
        do_sample=False,
        max_new_tokens=10,
        eos_token_id=list(STOPS),
        pad_token_id=PAD,
    )
    assert found[0, len(PRINCIPLED[0]) :].tolist() == draw(model, temperature=0.0)[0]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="nucleus=plain: choose principled or contrast"):
        draw(tiny_llama(), nucleus="plain")
    with pytest.raises(ValueError, match="top_p has to be above 0"):
        draw(tiny_llama(), top_p=0.0)
