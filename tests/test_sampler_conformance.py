"""Contract of every sampler, as the docstring of :func:`spo.sampling.sample` states it.

A sampler that is registered in :data:`spo.sampling.generate.SAMPLERS` is tested here by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from transformers import TopPLogitsWarper

from spo.config.schema import Speed as SpeedKeys
from spo.forward.head import completion_logits
from spo.sampling import generate, sample, uncached
from spo.sampling.draw import uniform_numbers
from spo.sampling.generate import SAMPLERS, Sampler
from spo.types import Sequences
from tests.helpers import BOS, EOS, PAD, VOCAB, tiny_llama

STOPS = (EOS, 7)
ROWS, LIMIT = 12, 12
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")],
    ),
]
TOLERANCE = 1e-5
"""Share of probability by which a number may miss the interval of its token: a Llama computes norms in float32."""


def one_by_one(model: nn.Module, ids: Tensor, mask: Tensor, numbers: Tensor, **settings: Any) -> Tensor:
    """Decode each row by itself, as an engine outside of the package might."""
    found = torch.full(numbers.shape, settings["pad_token_id"], device=ids.device)
    for row in range(len(ids)):
        prompt = ids[row, mask[row] == 1][None]
        found[row] = uncached.decode(model, prompt, torch.ones_like(prompt), numbers[row : row + 1], **settings)[0]
    return found


@pytest.fixture(autouse=True)
def external(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(SAMPLERS, "external", Sampler(one_by_one, lambda model: None))
    yield


def model_on(device: str) -> Any:
    return tiny_llama(4, scale=0.3).to(device)


def ragged(n: int) -> list[list[int]]:
    """Prompts of 1 to 7 tokens, with stop tokens and padding inside."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (1 + i % 7,), generator=generator).tolist() for i in range(n)]


def draw(model: nn.Module, prompts: list[list[int]], sampler: str, **changes: Any) -> Sequences:
    settings: dict[str, Any] = {
        "max_new_tokens": LIMIT,
        "temperature": 1.0,
        "stop_ids": STOPS,
        "pad_token_id": PAD,
        "seeds": range(len(prompts)),
    }
    return sample(model, prompts, sampler=sampler, **settings | changes)


# --- the checks ---------------------------------------------------------------------------------------------------


def draws_what_generate_draws(sampler: str, device: str) -> None:
    model, prompts = model_on(device), ragged(ROWS)
    for temperature, top_p in ((0.0, 1.0), (0.7, 1.0), (1.0, 1.0), (0.0, 0.5), (1.0, 0.5)):
        settings = {"temperature": temperature, "top_p": top_p}
        drawn, expected = (draw(model, prompts, name, **settings) for name in (sampler, "generate"))
        assert drawn.completions() == expected.completions()
        assert len({tuple(row) for row in drawn.completions()}) > 5
        if top_p == 1:
            assert draw(model, prompts, sampler, temperature=temperature).completions() == drawn.completions()


def draws_from_the_probabilities_of_a_scoring_pass(sampler: str, device: str) -> None:
    """Compare the number of each token with the token's share of probability in a pass over the finished sequence."""
    model, prompts = model_on(device), ragged(ROWS)
    for temperature in (0.5, 1.0, 2.0):
        drawn = draw(model, prompts, sampler, temperature=temperature)
        with torch.no_grad():
            logits = completion_logits(model, drawn)
        ends = (logits.double() / temperature).softmax(-1).cumsum(-1)
        tokens = drawn.input_ids.flatten()[drawn.completion_index][:, None]
        upper = ends.gather(1, tokens).squeeze(1)
        lower = upper - (logits.double() / temperature).softmax(-1).gather(1, tokens).squeeze(1)
        numbers = uniform_numbers(range(ROWS), LIMIT, torch.device("cpu"))
        used = [row[:length] for row, length in zip(numbers, drawn.completion_length.tolist(), strict=True)]
        used = torch.cat(used).to(device)
        assert (lower - TOLERANCE <= used).all() and (used <= upper + TOLERANCE).all()


def smallest_nucleus(probability: list[float], top_p: float) -> list[int]:
    """Collect tokens from the likeliest on until their probability reaches ``top_p``."""
    kept: list[int] = []
    for token in sorted(range(len(probability)), key=lambda i: -probability[i]):
        kept.append(token)
        if sum(probability[i] for i in kept) >= top_p:
            break
    return kept


def draws_from_the_nucleus(sampler: str, device: str) -> None:
    """Compare each number with the token's share of the nucleus in a pass over the finished sequence."""
    model, prompts = model_on(device), ragged(ROWS)
    for temperature, top_p in ((0.5, 0.7), (1.0, 0.3), (1.0, 0.9), (2.0, 0.6)):
        drawn = draw(model, prompts, sampler, temperature=temperature, top_p=top_p)
        with torch.no_grad():
            logits = completion_logits(model, drawn).double().cpu() / temperature
        warped = TopPLogitsWarper(top_p)(torch.empty(0), logits).softmax(-1)
        numbers = uniform_numbers(range(ROWS), LIMIT, torch.device("cpu"))
        used = [row[:length] for row, length in zip(numbers, drawn.completion_length.tolist(), strict=True)]
        tokens = drawn.input_ids.flatten()[drawn.completion_index].tolist()
        sizes = set()
        for row, token, number, other in zip(logits, tokens, torch.cat(used).tolist(), warped, strict=True):
            probability = row.softmax(-1).tolist()
            kept = smallest_nucleus(probability, top_p)
            assert token in kept
            total = sum(probability[i] for i in kept)
            lower = sum(probability[i] for i in kept if i < token) / total
            assert lower - TOLERANCE <= number <= lower + probability[token] / total + TOLERANCE
            assert set(kept) == set(other.nonzero().flatten().tolist())
            assert abs(other[token] - probability[token] / total) < TOLERANCE
            sizes.add(len(kept))
        assert len(sizes) > 2


def decodes_greedily_at_temperature_zero(sampler: str, device: str) -> None:
    model = model_on(device)
    drawn = draw(model, ragged(ROWS), sampler, temperature=0.0)
    with torch.no_grad():
        likeliest = completion_logits(model, drawn).argmax(-1)
    assert torch.equal(likeliest, drawn.input_ids.flatten()[drawn.completion_index])


def stops_after_the_first_stop_token_or_at_the_limit(sampler: str, device: str) -> None:
    model, prompts = model_on(device), ragged(2 * ROWS)
    for limit in (1, 6, LIMIT):
        completions = draw(model, prompts, sampler, max_new_tokens=limit).completions()
        assert all(1 <= len(row) <= limit and not set(row[:-1]) & set(STOPS) for row in completions)
        assert all(row[-1] in STOPS or len(row) == limit for row in completions)
        if limit > 1:
            assert {row[-1] for row in completions} >= set(STOPS) and any(len(row) == limit for row in completions)
    never = draw(model, prompts, sampler, max_new_tokens=5, stop_ids=(VOCAB + 1,)).completions()
    assert {len(row) for row in never} == {5} and any(set(row[:-1]) & set(STOPS) for row in never)


def draws_a_row_without_regard_to_the_others(sampler: str, device: str) -> None:
    model, prompts = model_on(device), ragged(ROWS)
    whole = draw(model, prompts, sampler).completions()
    backwards = draw(model, prompts[::-1], sampler, seeds=range(ROWS)[::-1]).completions()
    assert backwards[::-1] == whole
    for first in range(0, ROWS, 5):
        rows = range(first, min(first + 5, ROWS))
        assert draw(model, [prompts[i] for i in rows], sampler, seeds=rows).completions() == whole[first : first + 5]
    alone = [draw(model, [prompts[i]], sampler, seeds=[i]).completions()[0] for i in range(0, ROWS, 6)]
    assert alone == whole[::6]


def draws_by_the_seed_of_the_row(sampler: str, device: str) -> None:
    model = model_on(device)
    same = draw(model, [[BOS]] * 6, sampler, seeds=[3] * 6).completions()
    assert all(row == same[0] for row in same)
    assert len({tuple(row) for row in draw(model, [[BOS]] * ROWS, sampler).completions()}) > 5


def returns_prompts_and_pads_right(sampler: str, device: str) -> None:
    model, prompts = model_on(device), ragged(9)
    for pad in (PAD, EOS):  # Padding may have the id of a stop token.
        drawn = draw(model, prompts, sampler, pad_token_id=pad)
        assert drawn.input_ids.device.type == device and drawn.prompt_length.tolist() == [*map(len, prompts)]
        assert drawn.input_ids.shape == (9, int(drawn.length.max()))
        rows = zip(drawn.input_ids.tolist(), drawn.length.tolist(), prompts, strict=True)
        assert all(ids[: len(prompt)] == prompt and set(ids[length:]) <= {pad} for ids, length, prompt in rows)
        assert drawn.completions() == draw(model, prompts, sampler).completions()


def takes_any_number_of_prompts(sampler: str, device: str) -> None:
    model = model_on(device)
    nothing = draw(model, [], sampler)
    assert len(nothing) == 0 and nothing.completions() == [] and nothing.input_ids.device.type == device
    assert len(draw(model, [[BOS]], sampler)) == 1 and len(draw(model, [[BOS]] * 3, sampler)) == 3


def leaves_model_and_random_state_alone(sampler: str, device: str) -> None:
    model = tiny_llama(4, scale=0.3, attention_dropout=0.9).to(device)
    expected = draw(model.eval(), ragged(6), sampler).completions()
    model.train()
    model.model.norm.eval()  # type: ignore[operator, union-attr]
    modes, weights = [module.training for module in model.modules()], [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    assert draw(model, ragged(6), sampler).completions() == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before, now) for before, now in zip(weights, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


CHECKS: list[Callable[[str, str], None]] = [
    draws_what_generate_draws,
    draws_from_the_probabilities_of_a_scoring_pass,
    draws_from_the_nucleus,
    decodes_greedily_at_temperature_zero,
    stops_after_the_first_stop_token_or_at_the_limit,
    draws_a_row_without_regard_to_the_others,
    draws_by_the_seed_of_the_row,
    returns_prompts_and_pads_right,
    takes_any_number_of_prompts,
    leaves_model_and_random_state_alone,
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("sampler", [*SAMPLERS, pytest.param("external", marks=pytest.mark.slow)])
def test_sampler(sampler: str, check: Callable[[str, str], None], device: str) -> None:
    check(sampler, device)


def test_config_accepts_every_registered_sampler() -> None:
    assert set(SAMPLERS) - {"external"} == set(get_args(get_type_hints(SpeedKeys)["sampler"]))


# --- the checks fail for samplers with a fault ----------------------------------------------------------------------


def altered(**changes: Callable[[Any], Any]) -> Callable[..., Tensor]:
    """Return a sampler that decodes with other arguments than it is given."""

    def decode(model: nn.Module, ids: Tensor, mask: Tensor, numbers: Tensor, **settings: Any) -> Tensor:
        given = {"ids": ids, "mask": mask, "numbers": numbers, **settings}
        given |= {name: change(given[name]) for name, change in changes.items()}
        return generate.generate_tokens(model, **given)

    return decode


def trained_mode(model: nn.Module, *args: Any, **settings: Any) -> Tensor:
    model.train()
    return generate.generate_tokens(model, *args, **settings)


def cut_short(*args: Any, **settings: Any) -> Tensor:
    return generate.generate_tokens(*args, **settings)[:, :4]


FAULTS: dict[str, tuple[Callable[..., Tensor], Callable[[str, str], None]]] = {
    "shared numbers": (altered(numbers=lambda numbers: numbers[:1].expand_as(numbers)), draws_by_the_seed_of_the_row),
    "numbers of the batch": (
        altered(numbers=lambda numbers: numbers.flip(0)),
        draws_a_row_without_regard_to_the_others,
    ),
    "padding is seen": (altered(mask=torch.ones_like), draws_a_row_without_regard_to_the_others),
    "other numbers": (altered(numbers=lambda numbers: 1 - numbers), draws_from_the_probabilities_of_a_scoring_pass),
    "no temperature": (altered(temperature=lambda _: 1.0), draws_from_the_probabilities_of_a_scoring_pass),
    "whole distribution": (altered(top_p=lambda _: 1.0), draws_from_the_nucleus),
    "smaller nucleus": (altered(top_p=lambda top_p: top_p - 0.1), draws_from_the_nucleus),
    "never greedy": (altered(temperature=lambda t: t or 1.0), decodes_greedily_at_temperature_zero),
    "other draws": (altered(numbers=lambda numbers: numbers.flip(1)), draws_what_generate_draws),
    "another stop token": (altered(stop_ids=lambda stops: (*stops, 9)), draws_from_the_probabilities_of_a_scoring_pass),
    "too short": (cut_short, draws_from_the_probabilities_of_a_scoring_pass),
    "dropout": (trained_mode, leaves_model_and_random_state_alone),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_sampler_fails(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, check = FAULTS[fault]
    monkeypatch.setitem(SAMPLERS, "external", Sampler(decode, lambda model: None))
    with pytest.raises(AssertionError):
        check("external", "cpu")
