"""Where rounds of self-play lead: minima of the losses over all policies of a small language, against closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo.losses import AlphaSPINLoss, DPOLoss, PreferenceLoss, SPOLoss, SPPOLoss
from spo.models.extrapolation import extrapolate_weights
from spo.rounds.scoring import win_rates_of_rewards
from spo.types import PairLogps

SIZE = 5
# All ordered pairs of responses, equal ones included: a pair of independent samples.
FIRST, SECOND = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)).T


def distribution(seed: int, spread: float = 1.0) -> Tensor:
    """Return ``(SIZE,)`` float64 log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(SIZE, generator=generator, dtype=torch.float64)).log_softmax(-1)


DATA, BASE, LAST = distribution(1), distribution(2), distribution(3)
REWARDS = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0], dtype=torch.float64)


def normalized(log_weights: Tensor) -> Tensor:
    return log_weights.log_softmax(-1)


def variation(one: Tensor, other: Tensor) -> float:
    return float((one.exp() - other.exp()).abs().sum() / 2)


def expected_loss(
    loss: PreferenceLoss, policy: Tensor, reference: Tensor, weights: Tensor, *, beta: float = 1.0, **columns: Any
) -> Tensor:
    """Return the expectation of a loss over all ordered pairs.

    Args:
        loss: Loss of the package.
        policy: ``(SIZE,)`` log pi.
        reference: ``(SIZE,)`` log pi_ref.
        weights: ``(SIZE ** 2,)`` probability of each pair.
        beta: Temperature of the loss.
        columns: Further fields of the pairs.
    """
    logps = [values[side] for values in (policy, reference) for side in (FIRST, SECOND)]
    return weights @ loss(PairLogps(*logps, **columns), alpha=1.0, beta=beta)


def independent(first: Tensor, second: Tensor) -> Tensor:
    """Return the probability of each pair of independent samples of two distributions."""
    return (first[FIRST] + second[SECOND]).exp()


def minimum(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Return the ``(SIZE,)`` log-probabilities that minimize an objective, by descent on the logits of a softmax."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=3000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(logits.log_softmax(-1))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return logits.detach().log_softmax(-1)


def gradient(objective: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the ``(SIZE,)`` gradient with respect to the logits of a softmax."""
    logits = at.clone().requires_grad_()
    return torch.autograd.grad(objective(logits.log_softmax(-1)), logits)[0]


# --- SPPO ---


def wins(seed: int) -> Tensor:
    """Return ``(SIZE, SIZE)`` P(i > j), which no reward explains."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(SIZE, SIZE, generator=generator, dtype=torch.float64).triu(1)
    return upper + torch.tril(1 - upper.T, -1) + torch.eye(SIZE, dtype=torch.float64) / 2


def sppo(win_rates: Tensor, last: Tensor, eta: float, weights: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return the expected loss of SPPO over two samples of the last policy, as a function of the policy."""
    features = {"win_rate": torch.stack([win_rates[FIRST], win_rates[SECOND]], -1)}
    weights = independent(last, last) if weights is None else weights
    return lambda policy: expected_loss(SPPOLoss(True), policy, last, weights, beta=1 / eta, features=features)


@pytest.mark.parametrize("eta", [0.5, 4.0, 20.0])
def test_sppo_with_the_exact_normalizer_is_the_multiplicative_update(eta: float) -> None:
    """With log Z in place of eta / 2, the loss is zero at pi_t exp(eta P) / Z, for any pairs that are drawn."""
    rates = wins(0) @ LAST.exp()  # P(y > pi_t)
    update = normalized(LAST + eta * rates)
    log_z = torch.logsumexp(LAST + eta * rates, -1)
    targets = rates + 0.5 - log_z / eta  # eta (target - 1/2) = eta P - log Z
    best_and_worst = torch.zeros(SIZE**2, dtype=torch.float64)
    for a, b in itertools.pairwise([0, 3, 1, 4, 2]):  # few pairs, which connect all responses
        best_and_worst[SIZE * a + b] = 0.25
    for weights in (independent(LAST, LAST), best_and_worst):
        objective = sppo(targets, LAST, eta, weights)
        assert float(objective(update)) < 1e-24
        assert float(objective(LAST)) > 1e-3
        assert variation(minimum(objective, LAST), update) < 1e-6


def test_constants_in_the_exponent_drop_out() -> None:
    rates = wins(0) @ LAST.exp()
    assert variation(normalized(LAST + 3 * rates), normalized(LAST + 3 * (rates - 0.5))) < 1e-15


def sppo_minimum(rates: Tensor, last: Tensor, eta: float) -> Tensor:
    """Return the minimum with eta / 2 for log Z: u + c pi / pi_t = eta (P - 1/2), c such that pi sums to 1."""

    def of(c: float) -> Tensor:
        u, target = torch.zeros_like(rates), eta * (rates - 0.5)
        for _ in range(25):  # Newton's method; the left side grows with u
            u = u - (u + c * u.exp() - target) / (1 + c * u.exp())
        return last + u

    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if of(middle).exp().sum() > 1 else (low, middle)
    return of(low)


@pytest.mark.parametrize("eta", [0.5, 2.0, 8.0])
def test_sppo_minimum_has_its_closed_form(eta: float) -> None:
    rates = wins(0) @ LAST.exp()
    assert float(LAST.exp() @ rates) == pytest.approx(0.5, abs=1e-15)  # a policy against itself
    expected = sppo_minimum(rates, LAST, eta)
    assert variation(minimum(sppo(rates, LAST, eta), LAST), expected) < 1e-7
    assert float(gradient(sppo(rates, LAST, eta), expected).abs().max()) < 1e-10


def test_error_of_the_approximate_normalizer_is_of_third_order() -> None:
    """Half of eta leaves an eighth of the distance between the minimum and the multiplicative update."""
    rates = wins(0) @ LAST.exp()
    distances, normalizers, steps = [], [], []
    for eta in (0.5, 0.25, 0.125):
        update = normalized(LAST + eta * rates)
        distances.append(variation(sppo_minimum(rates, LAST, eta), update))
        steps.append(variation(update, LAST))
        normalizers.append(float(torch.logsumexp(LAST + eta * rates, -1)) - eta / 2)
    assert 6 < distances[0] / distances[1] < 10 and 7 < distances[1] / distances[2] < 9
    spread = float(LAST.exp() @ (rates - 0.5) ** 2)
    assert normalizers[-1] == pytest.approx(0.125**2 * spread / 2, rel=0.05)  # log Z = eta / 2 + O(eta^2)
    assert distances[0] < 0.01 * steps[0]
    # In one round with a large eta, the approximation is no longer small beside the step. The documentation has these.
    for eta, off, step in ((1, 1.88e-4, 0.0434), (4, 0.0077, 0.161), (16, 0.087, 0.396)):
        update = normalized(LAST + eta * rates)
        assert variation(sppo_minimum(rates, LAST, eta), update) == pytest.approx(off, rel=0.03)
        assert variation(update, LAST) == pytest.approx(step, rel=0.01)


def test_win_rates_among_few_samples_are_those_of_a_smaller_eta() -> None:
    """Counting the completion itself as 1/2 shrinks P - 1/2 by (K - 1) / K in expectation, which is a smaller eta."""
    exact = (REWARDS[:, None] - REWARDS[None]).sigmoid() @ LAST.exp()
    for number in (2, 3):
        for own in range(SIZE):
            mean = 0.0
            for others in itertools.product(range(SIZE), repeat=number - 1):
                rates = win_rates_of_rewards(REWARDS[[own, *others]].tolist())
                mean += math.exp(LAST[list(others)].sum()) * (rates[0] - 0.5)
            assert mean == pytest.approx(float(exact[own] - 0.5) * (number - 1) / number, abs=1e-12)


def test_uniform_policy_is_the_fixed_point_of_a_cycle() -> None:
    """Stay at the uniform policy if each response beats the next two, for which no reward exists."""
    cycle = torch.full((SIZE, SIZE), 0.5, dtype=torch.float64)
    for i in range(SIZE):
        for ahead in (1, 2):
            cycle[i, (i + ahead) % SIZE], cycle[(i + ahead) % SIZE, i] = 1.0, 0.0
    uniform = normalized(torch.zeros(SIZE, dtype=torch.float64))
    assert float(gradient(sppo(cycle @ uniform.exp(), uniform, 5.0), uniform).abs().max()) < 1e-15
    assert float(gradient(sppo(cycle @ LAST.exp(), LAST, 5.0), LAST).abs().max()) > 0.1


# --- SPIN and alpha-SPIN ---


def spin(data: Tensor, last: Tensor, beta: float) -> Callable[[Tensor], Tensor]:
    """Return the expected loss of SPIN, a response of the data against a sample of the last policy."""
    return lambda policy: expected_loss(DPOLoss(), policy, last, independent(data, last), beta=beta)


def alpha_spin(data: Tensor, last: Tensor, beta: float, base_weight: float) -> Callable[[Tensor], Tensor]:
    references = {"base": torch.stack([BASE[FIRST], BASE[SECOND]])}
    loss = AlphaSPINLoss(base_weight)
    return lambda policy: expected_loss(loss, policy, last, independent(data, last), beta=beta, references=references)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_spin_does_not_move_at_the_distribution_of_the_data(beta: float) -> None:
    """The expected gradient at pi = pi_t is beta / 2 times that of maximum likelihood: zero at the data alone."""
    assert float(gradient(spin(DATA, DATA, beta), DATA).abs().max()) < 1e-15
    found = gradient(spin(DATA, LAST, beta), LAST)
    of_likelihood = gradient(lambda policy: -DATA.exp() @ policy, LAST)
    assert torch.allclose(found, beta / 2 * of_likelihood, rtol=0, atol=1e-15)
    assert torch.allclose(found, beta / 2 * (LAST.exp() - DATA.exp()), rtol=0, atol=1e-15)
    assert float(found.abs().max()) > 0.001

    def divergence(policy: Tensor) -> float:
        return float(DATA.exp() @ (DATA - policy))

    assert divergence(normalized(LAST - 0.01 * found)) < divergence(LAST)


@pytest.mark.parametrize("beta", [0.7, 1.0, 3.0])
def test_spin_round_has_its_closed_form(beta: float) -> None:
    """The minimum of a round is pi_t (data / pi_t)^(1 / beta). With beta = 1, it is the data."""
    found = minimum(spin(DATA, LAST, beta), LAST)
    assert variation(found, normalized(LAST + (DATA - LAST) / beta)) < 1e-7
    assert (variation(found, DATA) < 1e-7) == (beta == 1)


def test_exact_spin_rounds_approach_the_data_for_beta_above_one_half() -> None:
    """Each exact round multiplies log(data / pi_t) by 1 - 1 / beta, up to a constant."""
    for beta, comes_closer in ((0.4, False), (0.6, True), (5.0, True)):
        policy = LAST
        for _ in range(3):
            policy = minimum(spin(DATA, policy, beta), policy)
        gaps, before = DATA - policy, DATA - LAST
        expected = (1 - 1 / beta) ** 3 * (before - before.mean())
        assert torch.allclose(gaps - gaps.mean(), expected, rtol=0, atol=1e-4)
        assert (variation(policy, DATA) < variation(LAST, DATA)) == comes_closer


def test_alpha_spin_is_spin_without_the_base_and_refers_to_it_alone_with_all_weight() -> None:
    policy = distribution(7)
    for beta in (0.1, 2.0):
        for base_weight, reference in ((0.0, LAST), (1.0, BASE)):
            plain = partial(expected_loss, DPOLoss(), reference=reference, weights=independent(DATA, LAST), beta=beta)
            mixed = alpha_spin(DATA, LAST, beta, base_weight)
            assert float(mixed(policy)) == pytest.approx(float(plain(policy=policy)), abs=1e-14)
            slope = gradient(lambda logps, plain=plain: plain(policy=logps), policy)  # type: ignore[misc]
            assert torch.allclose(gradient(mixed, policy), slope, rtol=0, atol=1e-15)
        half = alpha_spin(DATA, LAST, beta, 0.5)
        mixture = (LAST + BASE) / 2  # its normalizer cancels
        expected = expected_loss(DPOLoss(), policy, mixture, independent(DATA, LAST), beta=beta)
        assert float(half(policy)) == pytest.approx(float(expected), abs=1e-14)
        assert abs(float(half(policy)) - float(spin(DATA, LAST, beta)(policy))) > 1e-3 * beta


@pytest.mark.parametrize("base_weight", [0.0, 0.3, 1.0])
def test_fixed_point_of_alpha_spin_lies_between_data_and_base(base_weight: float) -> None:
    """A round ends at g (data / pi_t)^(1 / beta). It stays at data^(1 - w) base^w with w = a beta / (1 + a beta)."""
    beta = 2.0
    found = minimum(alpha_spin(DATA, LAST, beta, base_weight), LAST)
    opponent = (1 - base_weight) * LAST + base_weight * BASE
    assert variation(found, normalized(opponent + (DATA - LAST) / beta)) < 1e-7
    share = base_weight * beta / (1 + base_weight * beta)
    fixed = normalized((1 - share) * DATA + share * BASE)
    assert float(gradient(alpha_spin(DATA, fixed, beta, base_weight), fixed).abs().max()) < 1e-15
    assert (variation(fixed, DATA) < 1e-12) == (base_weight == 0)
    assert float(gradient(alpha_spin(DATA, LAST, beta, base_weight), LAST).abs().max()) > 1e-3


# --- Iterative DPO and SPO ---


def labelled(loss: PreferenceLoss, reference: Tensor, samples: Tensor, beta: float) -> Callable[[Tensor], Tensor]:
    """Return the expected loss of own pairs with the probabilities of Bradley and Terry as soft labels."""
    labels = (REWARDS[FIRST] - REWARDS[SECOND]).sigmoid()
    weights = independent(samples, samples)
    return lambda policy: expected_loss(loss, policy, reference, weights, beta=beta, preference=labels)


def test_rounds_of_dpo_add_up_and_rounds_of_spo_do_not() -> None:
    """T rounds of DPO are one at beta / T. SPO ends at softmax(r / alpha) from the samples of any policy."""
    beta, policy = 2.0, LAST
    for _ in range(3):
        policy = minimum(labelled(DPOLoss(), policy, policy, beta), policy)
    assert variation(policy, normalized(LAST + 3 * REWARDS / beta)) < 1e-6
    for samples in (LAST, BASE, normalized(REWARDS)):
        assert variation(minimum(labelled(SPOLoss(), LAST, samples, beta), samples), normalized(REWARDS)) < 1e-6


# --- Accelerated preference optimization ---


def rounds_of_accelerated_dpo(momentum: float, rounds: int, beta: float = 2.0) -> list[Tensor]:
    """Return the policies of rounds whose first step is the closed form of DPO, in probabilities."""
    policy = previous = LAST
    policies = []
    for _ in range(rounds):
        trained = normalized(policy + REWARDS / beta)
        policy = normalized(trained + momentum * (trained - previous))  # trained (trained / previous)^a
        previous = trained
        policies.append(policy)
    return policies


def reached(momentum: float, rounds: int) -> list[float]:
    """Return the multiples of r / beta in the exponents of the policies."""
    start, previous, found = 0.0, 0.0, []
    for _ in range(rounds):
        trained = start + 1
        start, previous = trained + momentum * (trained - previous), trained
        found.append(start)
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_momentum_reaches_further_in_three_rounds(momentum: float) -> None:
    policies, multiples = rounds_of_accelerated_dpo(momentum, 3), reached(momentum, 3)
    for policy, multiple in zip(policies, multiples, strict=True):
        assert variation(policy, normalized(LAST + multiple * REWARDS / 2)) < 1e-14
    a = momentum
    assert multiples == pytest.approx([1 + a, 2 + 2 * a + a**2, 3 + 3 * a + 2 * a**2 + a**3])
    plain = rounds_of_accelerated_dpo(0.0, 3)
    gains = [float((one.exp() - other.exp()) @ REWARDS) for one, other in zip(policies, plain, strict=True)]
    assert all(gain > 0.001 for gain in gains) if momentum else gains == [0.0] * 3
    # After many rounds, each one moves as far as 1 / (1 - a) plain ones.
    longer = reached(momentum, 200)
    assert longer[-1] - longer[-2] == pytest.approx(1 / (1 - momentum))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_extrapolated_logits_are_the_extrapolated_policy(momentum: float, tmp_path: Path) -> None:
    """Both forms agree where the weights are the logits of a softmax, whatever constants the logits have."""
    generator = torch.Generator().manual_seed(5)
    earlier, later = torch.randn(2, 3, SIZE, generator=generator, dtype=torch.float64)
    for name, logits in (("earlier", earlier), ("later", later)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"table": logits}, tmp_path / name / "model.safetensors")
    extrapolate_weights(tmp_path / "earlier", tmp_path / "later", momentum, tmp_path / "out")
    by_weights = load_file(tmp_path / "out" / "model.safetensors")["table"].log_softmax(-1)
    one, other = later.log_softmax(-1), earlier.log_softmax(-1)
    by_policies = normalized(one + momentum * (one - other))
    assert torch.allclose(by_weights, by_policies, rtol=0, atol=1e-14)
    assert momentum == 0 or variation(by_policies[0], one[0]) > 0.01
