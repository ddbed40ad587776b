"""What a loss sees: log-probs in its shape, terms of tokens, further completions, and how batches are joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spo.data.collate import collate
from spo.errors import UserError
from spo.losses import (
    DPOLoss,
    Drawn,
    LabelledLoss,
    Mismatched,
    PreferenceLoss,
    Role,
    SPORankedLoss,
    Term,
    policy_margin,
)
from spo.models import FrozenReference
from spo.objective import ScoredBatch, concat_logps, score
from spo.objective.joint import leaves_of
from spo.ops import by_rows
from spo.types import LabelledLogps, ListLogps, Logps, PairLogps, PreferenceBatch
from tests.helpers import FAST, PAD, PLAIN, Bigrams, make_data, make_module, make_trainer, random_pairs, tiny_llama


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


@pytest.mark.parametrize("declared", [False, True])
def test_terms_that_use_absent_logits_are_explained(declared: bool) -> None:
    class TermLoss(PrefixLoss):
        uses_reference = False

    loss, reference, speed = TermLoss(), FrozenReference(), replace(PLAIN, completion_only=True, max_logits=50)
    wrong: Any = (lambda s: s.policy.softmax(-1)) if declared else (lambda s: by_rows(torch.add, s.policy, s.reference))
    loss.terms = {"kl": Term(wrong)}
    reference.model = tiny_llama(1)
    scored = score(collate(random_pairs(3, seed=1), range(3), PAD), loss, tiny_llama(0), reference, speed, {}, declared)
    with pytest.raises(UserError, match=r"method.loss: the term 'kl' fails .*by_rows.*needs_reference_logits=True"):
        scored.inputs_of(loss)
    loss.terms = {"own": Term(lambda scored: numbers(3)[4])}
    with pytest.raises(IndexError):
        scored.inputs_of(loss)


def test_reference_of_a_term_is_attached() -> None:
    class TermLoss(PrefixLoss):
        uses_reference = False

    loss = TermLoss()
    module = make_module(Bigrams(0), loss=loss, reference=FrozenReference(), reference_model=Bigrams(1))
    assert module.needs_reference_model


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
    assert places("aabbca") == [4, 4, 1, 0, 3, 4]
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


class CountingLoss(PreferenceLoss):
    """A loss with terms in dtypes of their own."""

    uses_reference = False
    terms: Mapping[str, Term] = {
        "length": Term(lambda scored: scored.lengths),
        "half": Term(lambda scored: scored.per_completion(scored.policy_tokens.bfloat16())),
    }

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return pair.policy_chosen / pair.terms["length"][0]


def test_terms_are_as_precise_as_log_probs() -> None:
    """Counts have to be differentiable, and labels must not round to the dtype of a term."""
    batch = collate(random_pairs(3, seed=1, preference=lambda i: 0.7), range(3), PAD)
    loss = CountingLoss()
    seen, leaves = leaves_of(score(batch, loss, tiny_llama(0), FrozenReference(), PLAIN, {}).inputs_of(loss))
    assert leaves["terms/length"].dtype == leaves["terms/half"].dtype == torch.float64
    torch.testing.assert_close(concat_logps([seen]).columns()["preference"], torch.full((3,), 0.7).double())


class OddLoss(PreferenceLoss):
    """A loss that breaks the contract in a way that its test sets."""

    uses_reference = False

    def __init__(self, losses: Any = policy_margin, own: Any = None) -> None:
        self.losses, self.own = losses, own

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return self.losses(pair)

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> Any:
        found = super().metrics(pair, alpha=alpha, beta=beta)
        return found if self.own is None else self.own(found)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (OddLoss(lambda pair: None), "returns NoneType: leave out its mean"),
        (OddLoss(lambda pair: 1.0), "returns float: leave out its mean"),
        (OddLoss(lambda pair: policy_margin(pair) > 0), "without a gradient"),
        (OddLoss(lambda pair: policy_margin(pair).detach()), "without a gradient"),
        (
            OddLoss(own=lambda found: [found["logps/chosen"].detach().mul_(2)]),
            "changes its input policy_chosen",
        ),
        (OddLoss(own=lambda found: None), "must return a dictionary, and returns NoneType"),
        (OddLoss(own=lambda found: found | {"rewards/chosen": 1.0}), "'rewards/chosen', .* and returns float"),
    ],
)
@pytest.mark.parametrize("full_batch", [False, True])
def test_broken_losses_end_in_words(loss: OddLoss, words: str, full_batch: bool, tmp_path: Path) -> None:
    loss.full_batch = full_batch
    data = make_data(random_pairs(4, seed=1, weight=lambda i: 0.5), batch_size=4, micro_batch_size=2)
    with pytest.raises(UserError, match=f"method.loss: OddLoss.*{words}"):
        make_trainer(tmp_path).fit(make_module(Bigrams(0), loss=loss, speed=PLAIN), datamodule=data)


class HiddenStatistics(PreferenceLoss, nn.Module):
    """A loss that updates its statistics while it computes."""

    uses_reference = False
    mean: Tensor

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        margins = policy_margin(pair)
        if self.in_place:
            self.mean.mul_(0.9).add_(0.1 * margins.detach().mean())
        else:
            self.mean = 0.9 * self.mean + 0.1 * margins.detach().mean()
        return margins - self.mean


@pytest.mark.parametrize("in_place", [True, False])
def test_statistics_change_in_their_own_method_alone(in_place: bool, tmp_path: Path) -> None:
    pairs, trainer = random_pairs(4, seed=1), make_trainer(tmp_path, num_sanity_val_steps=1)
    module = make_module(Bigrams(0), loss=HiddenStatistics(in_place), speed=PLAIN)
    words = "HiddenStatistics changes its buffer mean while it computes, .* change it in update_statistics"
    for run in (trainer.fit, trainer.validate):
        with pytest.raises(UserError, match=words):
            run(module, datamodule=make_data(pairs, pairs))
