"""Optima of the objectives on enumerated responses: closed forms against a numerical solution that knows none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from spo.errors import UserError
from spo.exact import Objective, World, find_optimum
from spo.exact.optimum import total_variation
from spo.losses import (
    APODownLoss,
    APOZeroLoss,
    DiscoPOPLoss,
    DPOLoss,
    EXORewardLoss,
    FDPOLoss,
    IPOLoss,
    LengthNormalizedDPOLoss,
    PreferenceLoss,
    SimPOLoss,
    SPLLoss,
    SPOLoss,
    WeightedSPOLoss,
)
from spo.ops import entropy, kl
from spo.types import ListLogps, Sequences

P, R = 2, 6


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def world(responses: int = R, seed: int = 0, pairs: list[tuple[int, int]] | None = None) -> World:
    """Two prompts, random rewards and lengths, every pair of responses once."""
    rewards = numbers(seed, P, responses)
    pairs = list(combinations(range(responses), 2)) if pairs is None else pairs
    rows = torch.tensor([(p * responses + i, p * responses + j) for p in range(P) for i, j in pairs]).T
    chosen, rejected = rewards.flatten()[rows]
    lengths = torch.randint(1, 4, (P, responses), generator=torch.Generator().manual_seed(seed))
    count = P * responses
    ids = torch.zeros(count, 4, dtype=torch.long)
    sequences = Sequences(ids, torch.ones(count, dtype=torch.long), 1 + lengths.flatten())
    return World(
        sequences=sequences,
        rewards=rewards,
        lengths=lengths.double(),
        support=torch.ones(P, responses, dtype=torch.bool),
        completions=rows,
        preference=(chosen - rejected).sigmoid(),
        weight=torch.ones(rows.shape[1], dtype=torch.float64),
    )


def reference(responses: int = R) -> Tensor:
    return numbers(7, P, responses).log_softmax(-1)


def objective(loss: PreferenceLoss, uniform: bool = False, kl_weight: float = 0.0, **changes: object) -> Objective:
    settings = {"world": world(), "reference": reference(), "alpha": 0.7, "beta": 0.4, **changes}
    return Objective(loss, **settings, kl_weight=kl_weight, uniform=uniform)  # type: ignore[arg-type]


LOSSES = [
    SPOLoss(),
    WeightedSPOLoss(gamma=0.5),
    DPOLoss(),
    IPOLoss(),
    IPOLoss(length_normalize=False),
    LengthNormalizedDPOLoss(),
    SimPOLoss(gamma_beta_ratio=0.0),
    SPLLoss(),
    FDPOLoss("reverse_kl"),
    FDPOLoss("js"),
    FDPOLoss("forward_kl"),
    FDPOLoss("alpha", 0.5),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__}-{vars(loss)}")
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.2), (1.0, 1.0), (4.0, 3.0)])
def test_stated_optimum_minimizes_objective(loss: PreferenceLoss, alpha: float, beta: float) -> None:
    stated = find_optimum(objective(loss, uniform=True, alpha=alpha, beta=beta))
    solved = find_optimum(objective(loss, uniform=False, alpha=alpha, beta=beta))
    assert stated is not None and solved is not None
    assert (stated.found, solved.found) == ("closed form", "numerical")
    torch.testing.assert_close(stated.logps.exp().sum(-1), torch.ones(P, dtype=torch.float64))
    torch.testing.assert_close(solved.logps, stated.logps, atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_spo_and_dpo_optima_match_papers(alpha: float) -> None:
    rewards, ref = world().rewards, reference()
    spo, dpo = SPOLoss().optimum(rewards, ref, alpha, 99.0), DPOLoss().optimum(rewards, ref, 99.0, alpha)
    torch.testing.assert_close(spo.exp(), torch.softmax(rewards / alpha, -1))
    weights = ref.exp() * (rewards / alpha).exp()
    assert dpo is not None
    torch.testing.assert_close(dpo.exp(), weights / weights.sum(-1, keepdim=True))


def test_ipo_optimum_matches_paper() -> None:
    rewards, ref = world().rewards, reference()
    optimum = IPOLoss(length_normalize=False).optimum(rewards, ref, 99.0, 0.3)
    for p in range(P):
        wins = [sum(1 / (1 + float((r2 - r1).exp())) for r2 in rewards[p]) / R for r1 in rewards[p]]
        weights = [float(ref[p, i].exp()) * 2.718281828459045 ** (wins[i] / 0.3) for i in range(R)]
        torch.testing.assert_close(optimum[p].exp(), torch.tensor(weights, dtype=torch.float64) / sum(weights))
    with pytest.raises(ValueError, match="needs the lengths"):
        IPOLoss().optimum(rewards, ref, 1.0, 0.3)


def test_ipo_conventions_agree_on_one_token_responses() -> None:
    rewards, ref = world().rewards, reference()
    sums = IPOLoss(length_normalize=False).optimum(rewards, ref, 1.0, 0.3)
    torch.testing.assert_close(IPOLoss().optimum(rewards, ref, 1.0, 0.3, lengths=torch.ones(P, R)), sums)


def test_conservative_dpo_margin_for_two_responses() -> None:
    smoothing, beta, two = 0.2, 0.5, world(2)
    loss = DPOLoss(label_smoothing=smoothing)
    assert loss.optimum(two.rewards, reference(2), 1.0, beta) is None
    optimum = find_optimum(objective(loss, uniform=True, world=two, reference=reference(2), beta=beta))
    assert optimum is not None and optimum.found == "numerical"
    p = (two.rewards[:, 0] - two.rewards[:, 1]).sigmoid()
    margin = optimum.logps - reference(2)
    expected = torch.logit(p * (1 - smoothing) + (1 - p) * smoothing) / beta
    torch.testing.assert_close(margin[:, 0] - margin[:, 1], expected, atol=1e-6, rtol=0)


def test_kl_weight_moves_optimum_to_reference() -> None:
    distances = []
    for weight in (1e-6, 0.03, 0.3, 3.0, 1e4):
        optimum = find_optimum(objective(SPOLoss(), uniform=True, kl_weight=weight))
        assert optimum is not None and optimum.found == "numerical"
        distances.append(float(kl(optimum.logps, reference()).mean()))
        # where the objective is least no direction leads down
        point = objective(SPOLoss(), kl_weight=weight)
        for seed in range(5):
            assert point(optimum.logps + 1e-3 * numbers(seed, P, R)) >= point(optimum.logps) - 1e-12
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-6
    free = find_optimum(objective(SPOLoss(), uniform=True))
    assert free is not None
    assert distances[0] == pytest.approx(float(kl(free.logps, reference()).mean()), abs=1e-3)


def test_unconnected_responses_have_no_single_optimum() -> None:
    loose = world(pairs=[(0, 1), (1, 2), (3, 4)])
    assert find_optimum(objective(SPOLoss(), world=loose)) is None
    assert find_optimum(objective(SPOLoss(), world=loose, kl_weight=0.1)) is not None
    chain = world(pairs=[(i, i + 1) for i in range(R - 1)])
    optimum = find_optimum(objective(SPOLoss(), world=chain))
    assert optimum is not None
    torch.testing.assert_close(optimum.logps.exp(), torch.softmax(chain.rewards / 0.7, -1), atol=1e-6, rtol=0)


def test_kl_pushes_probability_out_of_restricted_support() -> None:
    """The odds of being outside grow by exp(KL inside) for any weight of the KL, as docs/explanation/theory.md says."""
    inside = [(i, j) for i, j in combinations(range(R), 2) if j < 3]
    for weight in (0.05, 0.5):
        optimum = find_optimum(objective(SPOLoss(), world=world(pairs=inside), kl_weight=weight))
        assert optimum is not None
        policy, ref = optimum.logps, reference()
        within, ref_within = policy[:, :3].log_softmax(-1), ref[:, :3].log_softmax(-1)
        odds = policy[:, 3:].logsumexp(-1) - policy[:, :3].logsumexp(-1)
        ref_odds = ref[:, 3:].logsumexp(-1) - ref[:, :3].logsumexp(-1)
        torch.testing.assert_close(odds - ref_odds, kl(within, ref_within), atol=1e-6, rtol=0)


def test_ipo_optimum_depends_on_compared_pairs() -> None:
    chain = world(pairs=[(i, i + 1) for i in range(R - 1)])
    loss = IPOLoss(length_normalize=False)
    stated, solved = (find_optimum(objective(loss, uniform=u, world=chain)) for u in (True, False))
    assert stated is not None and solved is not None
    assert float(total_variation(stated.logps, solved.logps).max()) > 0.01


class Upside(SPOLoss):
    """SPO that climbs, and says nothing about where it leads."""

    def __call__(self, pair, *, alpha, beta):  # type: ignore[no-untyped-def]
        return -super().__call__(pair, alpha=alpha, beta=beta)

    def optimum(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return None


def test_objective_without_minimum_has_no_optimum() -> None:
    assert find_optimum(objective(Upside(), uniform=True)) is None


@pytest.mark.parametrize("loss", [APOZeroLoss(), APODownLoss(), DiscoPOPLoss()], ids=lambda loss: type(loss).__name__)
def test_search_itself_finds_that_there_is_no_single_minimum(loss: PreferenceLoss) -> None:
    assert loss.no_optimum
    loss.no_optimum = ""  # The search alone has to see it: it ends far away, where the loss is flat, or in two places.
    assert find_optimum(objective(loss, beta=1.0)) is None


def test_alpha_divergence_above_one_states_no_negative_probability() -> None:
    loss, rewards = FDPOLoss("alpha", 2.0), world().rewards
    assert loss.optimum(rewards, reference(), 1.0, 0.05) is None
    stated = loss.optimum(rewards, reference(), 1.0, 20.0)
    assert stated is not None
    # f'(v) = v for order 2, so pi / pi_ref is linear in the reward.
    fraction = (stated - reference()).exp()
    torch.testing.assert_close(fraction - fraction[:, :1], (rewards - rewards[:, :1]) / 20.0)


def test_exo_with_rewards_states_the_policy_whose_loss_is_zero() -> None:
    loss, rewards = EXORewardLoss(reward_temperature=0.7), world().rewards
    policy = loss.optimum(rewards, reference(), 1.0, 0.4)
    mask = torch.ones(P, R, dtype=torch.bool)
    lists = ListLogps(policy, mask, mask.cumsum(-1) - 1, reference(), features={"reward": rewards})
    assert loss.of_ranking(lists, alpha=1.0, beta=0.4).abs().max() < 1e-12


class Stating(DPOLoss):
    """A loss whose optimum does not take lengths."""

    def optimum(self, rewards, reference_logps, alpha, beta):  # type: ignore[no-untyped-def,override]
        return torch.log_softmax(reference_logps + rewards / beta, -1)


def test_optimum_need_not_take_lengths() -> None:
    theirs, ours = (find_optimum(objective(loss, uniform=True)) for loss in (Stating(), DPOLoss()))
    assert theirs is not None and ours is not None
    torch.testing.assert_close(theirs.logps, ours.logps)


@pytest.mark.parametrize("shift", [torch.exp, lambda logps: logps + 1], ids=["probabilities", "unnormalized"])
def test_optimum_must_be_normalized_log_probs(shift: Callable[[Tensor], Tensor]) -> None:
    class Wrong(DPOLoss):
        def optimum(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return shift(super().optimum(*args, **kwargs))

    with pytest.raises(UserError, match=r"Wrong\.optimum must return normalized log-probabilities"):
        find_optimum(objective(Wrong(), uniform=True))


def test_entropy_and_distances() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    assert float(entropy(p)) == pytest.approx(1.5 * 0.6931472, abs=1e-6)
    assert float(total_variation(p, q)) == pytest.approx(0.25)
    assert float(kl(p, q)) == pytest.approx(0.25 * 0.6931472, abs=1e-6)
    assert float(kl(p, p)) == 0
