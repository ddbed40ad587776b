"""What a loss sees: log-probs in its shape, terms of tokens, further completions, and how batches are joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.data.collate import collate
from spo.errors import UserError
from spo.losses import DPOLoss, Drawn, LabelledLoss, Mismatched, PreferenceLoss, Role, SPORankedLoss, Term
from spo.models import FrozenReference
from spo.objective import ScoredBatch, concat_logps, score
from spo.objective.joint import leaves_of
from spo.types import LabelledLogps, ListLogps, Logps, PairLogps, PreferenceBatch
from tests.helpers import FAST, PAD, PLAIN, random_pairs, tiny_llama


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_sums(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """Return the log-prob of each token of a completion, from a plain forward pass."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(ids).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return torch.stack([logps[place, token] for place, token in zip(places, completion, strict=True)])


class PrefixLoss(PreferenceLoss):
    terms: Mapping[str, Term] = {
        "prefix": Term(lambda scored: scored.common_prefix(scored.policy_tokens)),
        "reference_prefix": Term(lambda s: s.common_prefix(s.reference_tokens), needs_reference_logits=True),
        "mean": Term(lambda scored: scored.mean_per_completion(scored.policy_tokens)),
    }

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return pair.terms["prefix"][0] - pair.terms["prefix"][1]


@pytest.mark.parametrize("speed", [PLAIN, FAST], ids=["padded", "packed"])
def test_terms_are_sums_over_tokens(speed: Any) -> None:
    policy, reference = tiny_llama(0), FrozenReference()
    reference.model = tiny_llama(1)
    pairs = random_pairs(6, seed=3)
    speed = speed.resolve_for(policy, reference.model)
    batch = collate([*pairs, pairs[0]], range(7), PAD, arrange=speed.arrange)
    loss = PrefixLoss()
    seen = score(batch, loss, policy, reference, speed, {}).inputs_of(loss)
    assert isinstance(seen, PairLogps)
    for i, pair in enumerate([*pairs, pairs[0]]):
        both = [token_sums(policy, pair.prompt_ids, ids) for ids in pair.completions]
        theirs = [token_sums(reference.model, pair.prompt_ids, ids) for ids in pair.completions]
        shortest = min(map(len, both))
        for side in (0, 1):
            torch.testing.assert_close(seen.terms["prefix"][side, i], both[side][:shortest].sum())
            torch.testing.assert_close(seen.terms["reference_prefix"][side, i], theirs[side][:shortest].sum())
            torch.testing.assert_close(seen.terms["mean"][side, i], both[side].mean())
    assert seen.terms["prefix"].requires_grad and not seen.terms["reference_prefix"].requires_grad


@pytest.mark.parametrize("impossible", [-torch.inf, -3e38])
def test_impossible_token_stays_in_its_own_prefix(impossible: float) -> None:
    batch = collate(random_pairs(5, seed=3), range(5), PAD)
    tokens = -numbers(len(batch.sequences.completion_index)).abs()
    scored = ScoredBatch(batch, torch.empty(0))
    plain = scored.common_prefix(tokens)
    tokens[0] = impossible
    prefix = scored.common_prefix(tokens)
    assert prefix.flatten()[0] == impossible or prefix.flatten()[0] < -1e38
    assert torch.equal(prefix.flatten()[1:], plain.flatten()[1:])


def test_wrong_terms_are_explained() -> None:
    policy, reference = tiny_llama(0), FrozenReference()
    reference.model = tiny_llama(1)
    batch = collate(random_pairs(3, seed=1), range(3), PAD)

    def seen(term: Term) -> Logps:
        loss = PrefixLoss()
        loss.terms = {"wrong": term}
        return score(batch, loss, policy, reference, PLAIN, {}).inputs_of(loss)

    with pytest.raises(UserError, match=r"'wrong' must return .* \(2, 3\).*scored.per_completion"):
        seen(Term(lambda scored: scored.policy_tokens))
    with pytest.raises(UserError, match="needs_reference_logits=True"):
        seen(Term(lambda scored: scored.per_completion(scored.reference_tokens)))


def rich_pairs(count: int, seed: int, label: bool = True) -> PairLogps:
    columns = {
        "policy_chosen": numbers(count, seed=seed),
        "policy_rejected": numbers(count, seed=seed + 1),
        "chosen_length": torch.arange(1, count + 1),
        "rejected_length": torch.arange(2, count + 2),
        "terms/kl": numbers(count, 2, seed=seed + 2),
        "references/second": numbers(count, 2, seed=seed + 3),
        "features/embedding": numbers(count, 3, seed=seed + 4),
        "extra/anchor/policy": numbers(count, seed=seed + 5),
        "extra/anchor/length": torch.arange(3, count + 3),
    }
    if label:
        columns["preference"] = torch.linspace(0, 1, count, dtype=torch.float64)
    nothing = torch.zeros(0)
    return PairLogps(nothing).with_columns(columns)


def test_columns_and_fields_are_the_same_numbers() -> None:
    pair = rich_pairs(4, seed=5)
    assert len(pair) == 4
    assert pair.terms["kl"].shape == pair.references["second"].shape == (2, 4)
    assert pair.features["embedding"].shape == (4, 3)
    assert pair.reference_chosen is None and pair.extra["anchor"].reference is None
    again = pair.with_columns(pair.columns())
    for path, value in pair.columns().items():
        torch.testing.assert_close(again.columns()[path], value, rtol=0, atol=0)


def test_pairs_of_batches_are_joined_in_order() -> None:
    first, second = rich_pairs(3, seed=0), rich_pairs(2, seed=9, label=False)
    whole = concat_logps([first, second])
    assert isinstance(whole, PairLogps) and len(whole) == 5
    torch.testing.assert_close(whole.terms["kl"], torch.cat([first.terms["kl"], second.terms["kl"]], 1))
    torch.testing.assert_close(whole.extra["anchor"].length, torch.tensor([3, 4, 5, 3, 4]))
    torch.testing.assert_close(whole.preference, torch.tensor([0, 0.5, 1, 1, 1], dtype=torch.float64))
    with pytest.raises(ValueError, match="terms/kl is known for some"):
        concat_logps([first, replace(second, terms={})])


def test_only_numbers_of_the_policy_are_leaves() -> None:
    pair = rich_pairs(3, seed=0)
    cut, leaves = leaves_of(pair)
    assert leaves.keys() == {"policy_chosen", "policy_rejected", "terms/kl", "extra/anchor/policy"}
    assert isinstance(cut, PairLogps)
    (cut.terms["kl"][1] * cut.policy_chosen).sum().backward()
    torch.testing.assert_close(leaves["terms/kl"].grad[:, 1], pair.policy_chosen)  # type: ignore[index]
    assert not pair.policy_chosen.requires_grad


def test_swapping_twice_changes_nothing() -> None:
    pair = rich_pairs(4, seed=2)
    swapped = pair.swapped(["embedding"])
    torch.testing.assert_close(swapped.terms["kl"][0], pair.terms["kl"][1])
    torch.testing.assert_close(swapped.references["second"][0], pair.references["second"][1])
    torch.testing.assert_close(swapped.features["embedding"], pair.features["embedding"].flip(-1))
    torch.testing.assert_close(swapped.chosen_length, pair.rejected_length)
    for path, value in swapped.swapped(["embedding"]).columns().items():
        torch.testing.assert_close(value, pair.columns()[path])


class AnchoredLoss(PreferenceLoss):
    extra_completions: Mapping[str, Role] = {"anchor": Drawn(), "other": Mismatched(gradient=True)}

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return pair.policy_chosen - pair.extra["anchor"].policy


def test_further_completions_are_scored_with_the_batch() -> None:
    policy, reference = tiny_llama(0), FrozenReference()
    reference.model = tiny_llama(1)
    pairs = random_pairs(3, seed=1)
    batch = collate(pairs, range(3), PAD)
    # The anchor of each pair is its own rejected completion, and the other one that of the next pair.
    places = batch.completions
    assert places is not None
    batch = replace(batch, extra={"anchor": places[1], "other": places[1].roll(-1)})
    loss = AnchoredLoss()
    seen = score(batch, loss, policy, reference, PLAIN, {}).inputs_of(loss)
    assert isinstance(seen, PairLogps)
    anchor, other = seen.extra["anchor"], seen.extra["other"]
    torch.testing.assert_close(anchor.policy, seen.policy_rejected)
    torch.testing.assert_close(anchor.reference, seen.reference_rejected)
    torch.testing.assert_close(anchor.length, seen.rejected_length)
    torch.testing.assert_close(other.policy, seen.policy_rejected.roll(-1))  # type: ignore[union-attr]
    assert other.policy.requires_grad and not anchor.policy.requires_grad


def test_mismatched_completion_is_of_another_prompt() -> None:
    class Rows:
        def __init__(self, prompts: str) -> None:
            self.prompt_ids, self.completions = list(prompts), [(i,) for i in range(len(prompts))]

        def column(self, name: str) -> list[tuple[int, ...]]:
            raise AssertionError

        draw = column

    def places(prompts: str) -> list[int]:
        return [ids[0] for ids in Mismatched().tokens(Rows(prompts))]  # type: ignore[arg-type]

    assert places("abcd") == [3, 0, 1, 2]
    assert places("aabbca") == [4, 4, 1, 1, 3, 4]
    for prompts in ("aab", "abbbc", "aabaa"):
        assert all(prompts[i] != prompts[j] for i, j in enumerate(places(prompts)))
    with pytest.raises(ValueError, match="two prompts"):
        places("aaa")


class HalfLoss(LabelledLoss):
    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        sign = 2 * logps.label - 1
        return -(sign * beta * self.rewards(logps, alpha=1, beta=1)).sigmoid()


def test_soft_label_of_a_completion_is_an_expectation() -> None:
    policy = numbers(3)
    hard = [HalfLoss()(LabelledLogps(policy, torch.full((3,), label)), alpha=1, beta=0.5) for label in (1.0, 0.0)]
    weight, label = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 0.25, 1.0])
    soft = HalfLoss()(LabelledLogps(policy, label, weight=weight), alpha=1, beta=0.5)
    torch.testing.assert_close(soft, weight * (label * hard[0] + (1 - label) * hard[1]))


@pytest.mark.parametrize(("inputs", "shape"), [(PairLogps, (2, 3)), (ListLogps, (3, 2)), (LabelledLogps, (3,))])
def test_terms_have_the_layout_of_the_inputs(inputs: type[Logps], shape: tuple[int, ...]) -> None:
    pairs = random_pairs(3, seed=1)
    batch: PreferenceBatch = replace(collate(pairs, range(3), PAD), label=torch.ones(3))

    class TermLoss(DPOLoss):
        terms: Mapping[str, Term] = {"sum": Term(lambda scored: scored.per_completion(scored.policy_tokens))}

    loss = TermLoss()
    loss.inputs = inputs  # type: ignore[misc]
    seen = ScoredBatch(batch, PLAIN.logits(tiny_llama(0), batch.sequences)).inputs_of(loss)
    assert seen.terms["sum"].shape == shape
    policy = seen.columns().get("policy", seen.columns().get("policy_chosen"))
    torch.testing.assert_close(seen.terms["sum"][0] if inputs is PairLogps else seen.terms["sum"], policy)


def test_lists_carry_their_terms_in_order() -> None:
    policy, order = numbers(1, 3), torch.tensor([[2, 0, 1]])
    lists = ListLogps(policy, torch.tensor([[True, True, False]]), order, terms={"twice": 2 * policy})
    arranged = lists.best_first()
    torch.testing.assert_close(arranged.terms["twice"], 2 * arranged.policy)
    assert arranged.mask.tolist() == [[True, True, False]]
    assert SPORankedLoss.inputs is ListLogps
