"""Losses: values, slopes, limits, identities, extremes, and what tabular policies converge to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from spo.errors import UserError
from spo.losses import (
    DPOLoss,
    Feature,
    IPOLoss,
    KTOLoss,
    LabelledLoss,
    ListLoss,
    Loss,
    PreferenceLoss,
    SFTLoss,
    SPOLoss,
    SPORankedLoss,
    WeightedSPOLoss,
    policy_margin,
)
from spo.types import CompletionLogps, LabelledLogps, ListLogps, Logps, PairLogps

Array = NDArray[np.float64]
B = 9
METHODS: dict[str, PreferenceLoss] = {
    "spo": SPOLoss(),
    "spo_weighted": WeightedSPOLoss(gamma=0.2),
    "dpo": DPOLoss(),
    "cdpo": DPOLoss(label_smoothing=0.15),
    "ipo_mean": IPOLoss(length_normalize=True),
    "ipo_sum": IPOLoss(length_normalize=False),
    "sft": SFTLoss(),
    "sft_mean": SFTLoss(length_normalize=True),
}
PAIRWISE = ["spo", "spo_weighted", "dpo", "cdpo", "ipo_mean", "ipo_sum"]
ALPHA, BETA = 0.3, 0.7


def columns(seed: int = 0, n: int = B) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, (2, n)).astype(np.float64)
    return {
        "policy_chosen": -rng.gamma(2, 5, n),
        "policy_rejected": -rng.gamma(2, 5, n),
        "reference_chosen": -rng.gamma(2, 5, n),
        "reference_rejected": -rng.gamma(2, 5, n),
        "chosen_length": lengths[0],
        "rejected_length": lengths[1],
    }


def pair_of(values: dict[str, Array], dtype: torch.dtype = torch.float64) -> PairLogps:
    return PairLogps(**{name: torch.tensor(value, dtype=dtype) for name, value in values.items()})


def margins(d: list[float] | Array, dtype: torch.dtype = torch.float64) -> PairLogps:
    """Pairs whose policy margin, DPO margin and (lengths 1) IPO margin are all ``d``."""
    chosen = torch.tensor(np.asarray(d), dtype=dtype, requires_grad=True)
    zero, one = torch.zeros_like(chosen).detach(), torch.ones_like(chosen).detach()
    return PairLogps(chosen, zero, zero, zero, one, one)


def slopes(loss: PreferenceLoss, pair: PairLogps, **coefficients: float) -> Tensor:
    values = loss(pair, **{"alpha": ALPHA, "beta": BETA} | coefficients)
    return torch.autograd.grad(values.sum(), pair.policy_chosen)[0]


# ------------------------------------------------------------------------- independent implementations, in numpy


def log_expit(t: Array) -> Array:
    return -np.logaddexp(0, -t)


def sigmoid(t: Array) -> Array:
    return np.exp(log_expit(t))


def label(v: dict[str, Array]) -> Array:
    return v.get("preference", np.ones_like(v["policy_chosen"]))


def numpy_spo(v: dict[str, Array]) -> tuple[Array, Array]:
    """Value of each pair, and slope in log pi(y_w) (that in log pi(y_l) is its negative)."""
    d, p = v["policy_chosen"] - v["policy_rejected"], label(v)
    value = -(p * log_expit(ALPHA * d) + (1 - p) * log_expit(-ALPHA * d)) / ALPHA
    return value, sigmoid(ALPHA * d) - p


def numpy_weighted_spo(v: dict[str, Array]) -> tuple[Array, Array]:
    log_mass = 0.2 * np.logaddexp(v["policy_chosen"], v["policy_rejected"])
    mu = np.exp(np.clip(log_mass - log_mass.mean(), -3, 3))
    mu /= mu.mean()
    value, slope = numpy_spo(v)
    return mu * value, mu * slope


def numpy_dpo(v: dict[str, Array], smoothing: float = 0.0) -> tuple[Array, Array]:
    h = v["policy_chosen"] - v["reference_chosen"] - v["policy_rejected"] + v["reference_rejected"]
    p = label(v) * (1 - smoothing) + (1 - label(v)) * smoothing
    value = -p * log_expit(BETA * h) - (1 - p) * log_expit(-BETA * h)
    return value, BETA * (sigmoid(BETA * h) - p)


def numpy_ipo(v: dict[str, Array], mean: bool) -> tuple[Array, Array, Array]:
    chosen_length = v["chosen_length"] if mean else 1.0
    rejected_length = v["rejected_length"] if mean else 1.0
    h = (v["policy_chosen"] - v["reference_chosen"]) / chosen_length
    h = h - (v["policy_rejected"] - v["reference_rejected"]) / rejected_length
    target, p = 1 / (2 * BETA), label(v)
    value = p * (h - target) ** 2 + (1 - p) * (h + target) ** 2
    slope = 2 * (h - (2 * p - 1) * target)
    return value, slope / chosen_length, -slope / rejected_length


def expected(name: str, v: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Value, slope in log pi(y_w), slope in log pi(y_l)."""
    if name.startswith("ipo"):
        value, chosen, rejected = numpy_ipo(v, mean=name == "ipo_mean")
    elif name.startswith("sft"):
        length = v["chosen_length"] if name == "sft_mean" else np.ones(B)
        value, chosen, rejected = -v["policy_chosen"] / length, -1 / length, np.zeros(B)
    else:
        antisymmetric: dict[str, Callable[[], tuple[Array, Array]]] = {
            "spo": lambda: numpy_spo(v),
            "spo_weighted": lambda: numpy_weighted_spo(v),
            "dpo": lambda: numpy_dpo(v),
            "cdpo": lambda: numpy_dpo(v, 0.15),
        }
        value, chosen = antisymmetric[name]()
        rejected = -chosen
    weight = v.get("weight", np.ones(B))
    return weight * value, weight * chosen, weight * rejected


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_loss_value_and_gradient_equal_numpy(name: str, soft: bool) -> None:
    values = columns()
    if soft:
        rng = np.random.default_rng(1)
        values |= {"preference": rng.uniform(0, 1, B), "weight": rng.uniform(0, 3, B)}
    pair = pair_of(values)
    pair.policy_chosen.requires_grad_()
    pair.policy_rejected.requires_grad_()  # type: ignore[union-attr]
    losses = METHODS[name](pair, alpha=ALPHA, beta=BETA)
    got = torch.autograd.grad(losses.sum(), (pair.policy_chosen, pair.policy_rejected), allow_unused=True)
    value, chosen, rejected = expected(name, values)
    assert losses.shape == (B,)
    np.testing.assert_allclose(losses.detach(), value, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(got[0], chosen, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(np.zeros(B) if got[1] is None else got[1], rejected, rtol=1e-12, atol=1e-13)


# --------------------------------------------------------------------------------------------- limits, identities


@pytest.mark.parametrize("alpha", [1e-4, 0.03, 1.0, 50.0])
def test_spo_value_and_slope_at_equal_probabilities(alpha: float) -> None:
    pair = margins([0.0])
    assert SPOLoss()(pair, alpha=alpha, beta=BETA).item() == pytest.approx(math.log(2) / alpha, rel=1e-14)
    assert slopes(SPOLoss(), pair, alpha=alpha).item() == pytest.approx(-0.5, rel=1e-14)


def test_spo_limits_at_small_and_large_alpha() -> None:
    d = np.linspace(-3, 3, 13)
    small = SPOLoss()(margins(d), alpha=1e-7, beta=BETA).detach().numpy() - math.log(2) / 1e-7
    np.testing.assert_allclose(small, -d / 2, atol=1e-5)
    large = SPOLoss()(margins(d), alpha=1e5, beta=BETA).detach().numpy()
    np.testing.assert_allclose(large, np.maximum(0, -d), atol=1e-5)


def test_alpha_times_spo_is_dpo_with_a_uniform_reference() -> None:
    values = columns()
    values["reference_chosen"] = values["reference_rejected"] = np.full(B, -7.0)
    pair = pair_of(values)
    spo = SPOLoss()(pair, alpha=0.25, beta=99.0)
    dpo = DPOLoss()(pair, alpha=99.0, beta=0.25)
    torch.testing.assert_close(0.25 * spo, dpo, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.45])
def test_dpo_is_log_2_where_policy_equals_reference(smoothing: float) -> None:
    pair, loss = margins([0.0]), DPOLoss(smoothing)
    assert loss(pair, alpha=ALPHA, beta=0.3).item() == pytest.approx(math.log(2), rel=1e-14)
    assert slopes(loss, pair, beta=0.3).item() == pytest.approx(-0.3 * (1 - 2 * smoothing) / 2, rel=1e-13)


def test_conservative_dpo_minimizer_is_the_logit_of_its_label() -> None:
    best = math.log(0.8 / 0.2) / BETA
    slope = slopes(DPOLoss(0.2), margins([best - 0.1, best, best + 0.1]))
    assert slope[0] < 0 < slope[2]
    assert slope[1].item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("mean", [True, False])
def test_ipo_minimum_and_sign_flip(mean: bool) -> None:
    tau = 0.25
    pair = margins([0.0, 1 / (2 * tau), 1.0, 3.0])
    values = IPOLoss(mean)(pair, alpha=ALPHA, beta=tau)
    torch.testing.assert_close(values[:2].detach(), torch.tensor([1 / (4 * tau**2), 0.0], dtype=torch.float64))
    slope = slopes(IPOLoss(mean), pair, beta=tau)
    assert slope[2] < 0 < slope[3] and slope[1] == 0


def test_ipo_sums_and_averages_differ_by_length() -> None:
    pair = PairLogps(*(torch.tensor([x], dtype=torch.float64) for x in (-8.0, -30.0, -4.0, -20.0, 2.0, 5.0)))
    # sums: (-8 + 4) - (-30 + 20) = 6; averages: -4/2 + 10/5 = 0; target 1 / (2 * 0.5) = 1
    assert IPOLoss(length_normalize=False)(pair, alpha=1.0, beta=0.5).item() == 25
    assert IPOLoss(length_normalize=True)(pair, alpha=1.0, beta=0.5).item() == 1


@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo_sum"])
def test_loss_ignores_a_constant_in_both_reference_logps(name: str) -> None:
    values = columns()
    shifted = values | {key: values[key] + 3.5 for key in ("reference_chosen", "reference_rejected")}
    before, after = (METHODS[name](pair_of(v), alpha=ALPHA, beta=BETA) for v in (values, shifted))
    torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRWISE)
def test_loss_ignores_swapping_the_pair_and_its_label(name: str) -> None:
    values = columns() | {"preference": np.random.default_rng(3).uniform(0, 1, B)}
    swapped = {"preference": 1 - values["preference"]}
    for key, value in values.items():
        other = key.replace("chosen", "#").replace("rejected", "chosen").replace("#", "rejected")
        swapped.setdefault(other, value)
    loss = METHODS[name]
    here, there = loss(pair_of(values), alpha=ALPHA, beta=BETA), loss(pair_of(swapped), alpha=ALPHA, beta=BETA)
    torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)
    ours, theirs = (loss.rewards(pair_of(v), alpha=ALPHA, beta=BETA) for v in (values, swapped))
    torch.testing.assert_close(ours[0] - ours[1], theirs[1] - theirs[0], rtol=1e-12, atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("name", METHODS)
def test_weights_scale_the_loss_and_labels_default_to_certain(name: str) -> None:
    values, loss = columns(), METHODS[name]
    plain = loss(pair_of(values), alpha=ALPHA, beta=BETA)
    weight = np.arange(B, dtype=np.float64)
    scaled = loss(pair_of(values | {"weight": weight, "preference": np.ones(B)}), alpha=ALPHA, beta=BETA)
    torch.testing.assert_close(scaled, plain * torch.tensor(weight))


def test_implicit_rewards_of_each_method() -> None:
    values = columns()
    pair = pair_of(values)
    ratio = values["policy_chosen"] - values["reference_chosen"]
    other = values["policy_rejected"] - values["reference_rejected"]
    for name, (chosen, rejected) in {
        "spo": (ALPHA * values["policy_chosen"], ALPHA * values["policy_rejected"]),
        "dpo": (BETA * ratio, BETA * other),
        "ipo_sum": (BETA * ratio, BETA * other),
        "ipo_mean": (BETA * ratio / values["chosen_length"], BETA * other / values["rejected_length"]),
        "sft": (values["policy_chosen"], values["policy_rejected"]),
    }.items():
        got = METHODS[name].rewards(pair, alpha=ALPHA, beta=BETA)
        np.testing.assert_allclose(got[0], chosen, err_msg=name)
        np.testing.assert_allclose(got[1], rejected, err_msg=name)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- weighted SPO


@pytest.mark.parametrize("n", [1, 3, 49, 98])
def test_weighted_spo_with_gamma_zero_is_exactly_spo(n: int) -> None:
    pair = pair_of(columns(n=n))
    weighted = WeightedSPOLoss(gamma=0.0)(pair, alpha=ALPHA, beta=BETA)
    assert torch.equal(weighted, SPOLoss()(pair, alpha=ALPHA, beta=BETA))


def test_spo_weight_is_symmetric_with_mean_one() -> None:
    values = columns(n=50)
    loss = WeightedSPOLoss(gamma=0.3, clip=2.0)
    mu = loss.weights(pair_of(values))
    swapped = values | {
        "policy_chosen": values["policy_rejected"],
        "policy_rejected": values["policy_chosen"],
    }
    torch.testing.assert_close(mu, loss.weights(pair_of(swapped)))
    assert mu.mean().item() == pytest.approx(1, rel=1e-14)
    mass = np.logaddexp(values["policy_chosen"], values["policy_rejected"])
    assert (np.diff(mu.numpy()[np.argsort(mass)]) >= 0).all()
    assert mu.max() / mu.min() <= math.exp(2 * 2.0) * (1 + 1e-12)
    assert not mu.requires_grad


def test_weighted_spo_gradient_holds_the_weight_fixed() -> None:
    values = columns()
    loss = WeightedSPOLoss(gamma=0.4)
    pair = pair_of(values)
    mu = loss.weights(pair)
    for side in ("policy_chosen", "policy_rejected"):
        leaf = getattr(pair, side).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(pair, alpha=ALPHA, beta=BETA).sum(), leaf)
        step = 1e-5
        for i in range(B):

            def shifted(by: float, i: int = i, side: str = side) -> float:
                moved = values | {side: values[side] + by * (np.arange(B) == i)}
                return (mu * SPOLoss()(pair_of(moved), alpha=ALPHA, beta=BETA)).sum().item()

            difference = (shifted(step) - shifted(-step)) / (2 * step)
            assert gradient[i].item() == pytest.approx(difference, abs=1e-8)


def test_spo_weight_is_finite_for_improbable_sequences() -> None:
    pair = PairLogps(torch.tensor([-2000.0, -1.0, -900.0]), torch.tensor([-1e4, -2.0, -3.0]))
    mu = WeightedSPOLoss(gamma=1.0, clip=200.0).weights(pair)
    assert mu.isfinite().all() and mu.mean().item() == pytest.approx(1, rel=1e-6)


# ------------------------------------------------------------------------------------------------ extremes, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_loss_is_finite_at_huge_margins_and_keeps_its_dtype(name: str, dtype: torch.dtype) -> None:
    pair = margins([-1e4, -80.0, 0.0, 80.0, 1e4], dtype)
    losses = METHODS[name](pair, alpha=1.0, beta=1.0)
    assert losses.dtype == dtype
    assert losses.isfinite().all()
    (gradient,) = torch.autograd.grad(losses.sum(), pair.policy_chosen)
    assert gradient.dtype == dtype and gradient.isfinite().all()
    if name in ("spo", "dpo"):
        torch.testing.assert_close(losses[[0, 4]].detach(), torch.tensor([1e4, 0.0], dtype=dtype))
        torch.testing.assert_close(gradient[[0, 4]], torch.tensor([-1.0, 0.0], dtype=dtype))


def test_loss_names_its_missing_inputs() -> None:
    one = torch.zeros(2)
    alone, unreferenced = PairLogps(one), PairLogps(one, one)
    for loss, pair, words in [
        (SPOLoss(), alone, "policy_rejected"),
        (WeightedSPOLoss(), alone, "policy_rejected"),
        (DPOLoss(), alone, "policy_rejected"),
        (DPOLoss(), unreferenced, "reference_chosen"),
        (DPOLoss(), PairLogps(one, one, one), "reference_rejected"),
        (IPOLoss(), unreferenced, "reference_chosen"),
        (IPOLoss(), PairLogps(one, None, one, one), "policy_rejected"),
        (IPOLoss(), PairLogps(one, one, one, one), "chosen_length"),
        (IPOLoss(), PairLogps(one, one, one, one, one), "rejected_length"),
        (SFTLoss(length_normalize=True), alone, "chosen_length"),
    ]:
        with pytest.raises(ValueError, match=words):
            loss(pair, alpha=1.0, beta=1.0)
    assert SFTLoss()(alone, alpha=1.0, beta=1.0).shape == (2,)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_out_of_range_is_an_error(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        DPOLoss(smoothing)


@pytest.mark.parametrize("arguments", [{"gamma": -0.1}, {"gamma": math.nan}, {"clip": 0.0}, {"clip": math.nan}])
def test_weight_settings_out_of_range_are_an_error(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="gamma must be"):
        WeightedSPOLoss(**arguments)


# --------------------------------------------------------------------------------------------- tabular convergence

REWARD = np.array([1.2, 0.0, -0.7, 0.5])


def converged(loss: PreferenceLoss, alpha: float, beta: float, steps: int, lr: float) -> tuple[Array, Array]:
    """Tabular policy after gradient descent on all pairs with exact Bradley-Terry labels, and the reference."""
    first, second = map(torch.tensor, np.triu_indices(len(REWARD), 1))
    gap = torch.tensor(REWARD)[first] - torch.tensor(REWARD)[second]
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    logits = torch.zeros(len(REWARD), dtype=torch.float64, requires_grad=True)
    one = torch.ones(len(first), dtype=torch.float64)
    optimizer = torch.optim.SGD([logits], lr=lr, momentum=0.9)
    for _ in range(steps):
        logps = logits.log_softmax(0)
        pair = PairLogps(
            logps[first], logps[second], reference[first], reference[second], one, one, preference=gap.sigmoid()
        )
        optimizer.zero_grad()
        loss(pair, alpha=alpha, beta=beta).mean().backward()
        optimizer.step()
    return logits.detach().log_softmax(0).numpy(), reference.numpy()


def normalized(logits: Array) -> Array:
    return logits - np.logaddexp.reduce(logits)


@pytest.mark.parametrize("loss", [SPOLoss(), WeightedSPOLoss(gamma=0.5)], ids=["basic", "weighted"])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_spo_converges_to_softmax_of_reward_over_alpha(alpha: float, loss: PreferenceLoss) -> None:
    logps, _ = converged(loss, alpha, beta=9.0, steps=1500, lr=0.5 / alpha)
    np.testing.assert_allclose(logps, normalized(REWARD / alpha), atol=1e-6)


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_dpo_converges_to_the_tilted_reference(beta: float) -> None:
    logps, reference = converged(DPOLoss(), 9.0, beta, steps=1500, lr=0.5 / beta**2)
    np.testing.assert_allclose(logps, normalized(reference + REWARD / beta), atol=1e-6)


def test_ipo_with_soft_labels_converges_to_its_margin() -> None:
    for tau, preference in [(0.3, 0.8), (1.0, 0.35)]:
        chosen = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        optimizer = torch.optim.SGD([chosen], lr=0.2)
        for _ in range(100):
            pair = PairLogps(chosen, zero, zero, zero, one, one, preference=preference * one)
            optimizer.zero_grad()
            IPOLoss()(pair, alpha=1.0, beta=tau).sum().backward()
            optimizer.step()
        assert chosen.item() == pytest.approx((2 * preference - 1) / (2 * tau), abs=1e-10)


@pytest.mark.parametrize("loss", [DPOLoss(), SPOLoss(), SPORankedLoss()], ids=lambda loss: type(loss).__name__)
def test_equal_implicit_rewards_count_one_half(loss: Loss[Any]) -> None:
    """Policy and reference are equal before training, so that accuracies start at one half."""
    chosen = torch.tensor([-1.0, -2.0, -3.0, math.nan])
    rejected = torch.tensor([-2.0, -2.0, -2.0, -2.0])
    given: Any = PairLogps(chosen, rejected, torch.zeros(4), torch.zeros(4))
    if loss.inputs is ListLogps:
        policy, mask = torch.stack([chosen, rejected], 1), torch.ones(4, 2, dtype=torch.bool)
        given = ListLogps(policy, mask, torch.arange(2).expand(4, 2), torch.zeros(4, 2))
    assert loss.metrics(given, alpha=0.5, beta=0.1)["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0, 0.0]


class OddsLoss(PreferenceLoss):
    """A loss that is infinite for a completion of probability one, as the odds of ORPO are."""

    uses_reference = False

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        chosen, rejected = pair.policy_chosen, pair.policy_rejected
        assert rejected is not None and pair.chosen_length is not None
        return (1 - rejected.exp()).log() - (1 - chosen.exp()).log() + chosen / pair.chosen_length


def test_certain_labels_do_not_depend_on_the_loss_of_the_other_label() -> None:
    chosen = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    rejected, lengths = torch.tensor([-2.0, -0.0, -1.0]), torch.tensor([2.0, 3.0, 4.0])
    pair = PairLogps(chosen, rejected, chosen_length=lengths, rejected_length=torch.zeros(3))
    certain = OddsLoss()(replace(pair, preference=torch.ones(3)), alpha=1.0, beta=1.0)
    expected = OddsLoss().of_pairs(pair, alpha=1.0, beta=1.0)
    torch.testing.assert_close(certain, expected)
    [gradient] = torch.autograd.grad(certain[0] + certain[2], chosen)
    [wanted] = torch.autograd.grad(expected[0] + expected[2], chosen)
    torch.testing.assert_close(gradient, wanted)


def rows(numbers: Tensor, label: Tensor, kind: type[Logps], **others: Any) -> Any:
    """Return rows of any kind from the ``(B, 2)`` log-probs of two completions."""
    if kind is LabelledLogps:
        return LabelledLogps(numbers[:, 0], label, **others)
    if kind is PairLogps:
        return PairLogps(numbers[:, 0], numbers[:, 1], preference=label, **others)
    mask = torch.ones_like(numbers, dtype=torch.bool)
    return ListLogps(numbers, mask, torch.arange(2).expand(len(numbers), -1), preference=label, **others)


def centered(difference: Tensor) -> Tensor:
    """Return a loss of each row that depends on all rows, and is infinite below a difference of -9."""
    return -(9 + difference).log() + (difference - difference.mean()).square()


class CenteredPairs(PreferenceLoss):
    features: Mapping[str, Feature] = {"scores": Feature(("score_of_chosen", "score_of_rejected"))}

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        scores = pair.features["scores"]
        return centered(scores[:, 0] * pair.policy_chosen - scores[:, 1] * pair.policy_rejected)  # type: ignore[operator]


class CenteredLists(ListLoss):
    features = CenteredPairs.features

    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        products = lists.features["scores"] * lists.policy
        return centered(products[:, 0] - products[:, 1])


class CenteredLabels(LabelledLoss):
    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        return centered((2 * logps.label - 1) * logps.policy) / logps.label.mean()


CENTERED: list[type[Loss[Any]]] = [CenteredPairs, CenteredLists, CenteredLabels]


@pytest.mark.parametrize("full_batch", [True, False])
@pytest.mark.parametrize("make", CENTERED)
def test_certain_labels_are_those_of_the_rows(make: type[Loss[Any]], full_batch: bool) -> None:
    """Other rows see them too, and an outcome that is impossible has no gradient, not an undefined one."""
    loss = make()
    loss.full_batch = full_batch
    label = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    numbers = torch.tensor([[-1.0, -10.0], [-6.0, -2.0], [0, -9.0], [9, 1]], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[1.0, 1.0], [1.5, 1.0], [2.0, 1.0], [1.0, -0.5]], dtype=torch.float64)
    values = loss(rows(numbers, label, loss.inputs, features={"scores": scores}), alpha=1.0, beta=1.0)
    if isinstance(loss, LabelledLoss):
        expected = centered((2 * label - 1) * numbers[:, 0]) / label.mean()
    else:
        expected = centered((2 * label - 1) * ((numbers * scores)[:, 0] - (numbers * scores)[:, 1]))
    torch.testing.assert_close(values, expected)
    [gradient] = torch.autograd.grad(values.sum(), numbers)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), numbers)[0])


def test_numbers_of_completions_are_turned_in_lists_as_in_pairs() -> None:
    label = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    numbers = torch.tensor([[-1.0, -2.0], [-3.0, -2.0], [-4.0, -1.0], [-2.0, -2.0]], dtype=torch.float64)
    features = {"scores": torch.tensor([[1.0, 1.2], [0.4, 1.0], [0.7, 0.1], [1.0, 0.5]], dtype=torch.float64)}
    pairs, lists = (
        loss(rows(numbers, label, loss.inputs, features=features), alpha=1.0, beta=1.0)
        for loss in (CenteredPairs(), CenteredLists())
    )
    torch.testing.assert_close(lists, pairs)


class MeanPairs(PreferenceLoss):
    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return policy_margin(pair).mean()


class MeanLists(ListLoss):
    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        return lists.policy.mean()


class MeanLabels(LabelledLoss):
    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        return logps.policy.mean()


@pytest.mark.parametrize("make", [MeanPairs, MeanLists, MeanLabels])
def test_mean_does_not_pass_for_the_losses_of_rows(make: type[Loss[Any]]) -> None:
    """Labels and weights would broadcast it to their shape."""
    ones = torch.ones(3)
    for label in (0.7 * ones, ones):
        with pytest.raises(UserError, match=r"of_\w+ must return one loss of each row, of shape \(3,\), .* \(\)"):
            make()(rows(torch.randn(3, 2), label, make.inputs, weight=ones), alpha=1.0, beta=1.0)


@pytest.mark.parametrize(("ratio", "expected"), [(-3.5, 0.0), (3.5, 3.5)])
def test_reference_point_of_kto_is_not_below_zero(ratio: float, expected: float) -> None:
    other = CompletionLogps(torch.full((2,), ratio - 9), torch.ones(2), torch.full((2,), -9.0))
    given = LabelledLogps(torch.zeros(2), torch.ones(2), torch.zeros(2), extra={"mismatched": other})
    assert KTOLoss().reference_point(given).item() == expected
