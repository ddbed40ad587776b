r"""The objectives of the shipped methods as their papers write them, on the probabilities of all responses.

These functions do not call the losses, the regularizers, :mod:`spo.ops` or the data pipeline. ``spo verify`` compares
training with them, so a wrong factor, sign or weight in the package does not cancel against itself. Each of them is the
expectation over every pair (or list) of different responses and over its label, in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """The facts that an objective depends on, beside the policy.

    Attributes:
        rewards: ``(P, R)`` float64 rewards of ``R`` responses to each of ``P`` prompts.
        reference: ``(P, R)`` float64 log pi_ref.
        lengths: ``(P, R)`` float64 numbers of tokens.
        list_size: Number of responses that are compared, 2 for pairs.
        alpha: Softness, or NaN if the method does not read it.
        beta: Temperature of the method, or NaN if the method does not read it.
    """

    rewards: Tensor
    reference: Tensor
    lengths: Tensor
    list_size: int
    alpha: float
    beta: float

    def lists(self) -> Tensor:
        """Return the ``(K, n)`` positions of all sets of ``n`` different responses."""
        return torch.tensor(list(itertools.combinations(range(self.rewards.shape[1]), self.list_size)))


PaperObjective = Callable[..., Tensor]
"""Map ``(P, R)`` float64 log pi, a :class:`Setting` and the settings of the loss to the mean loss."""


def kl(policy: Tensor, reference: Tensor) -> Tensor:
    """Return the mean over prompts of sum_y pi(y|x) (log pi(y|x) - log pi_ref(y|x)), from ``(P, R)`` log-probs."""
    return (policy.exp() * (policy - reference)).sum(1).mean()


def spo(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return the preference term of SPO, arXiv:2405.00747.

    .. math:: -\frac{1}{\alpha} E \log \frac{\pi(y_w|x)^\alpha}{\pi(y_w|x)^\alpha + \pi(y_l|x)^\alpha}

    With beta times the KL, its derivative by log pi(y|x) has to equal, up to a constant, the derivative of the KL at
    the optimum. Both shift with beta and with 1 / alpha, so neither factor can be wrong unseen.
    """
    return _over_pairs(setting, policy, lambda won, lost: _spo_loss(won, lost, setting.alpha))


def spo_weighted(policy: Tensor, setting: Setting, *, gamma: float = 0.1, clip: float = 3.0) -> Tensor:
    r"""Return SPO's term with each pair weighted by mu, proportional to the pair's mass to the power gamma.

    mu is constant in the gradient and has the mean 1. log mu stays within ``clip`` nats of its mean.
    """
    i, j = setting.lists().T
    log_mass = gamma * torch.log(policy.detach()[:, i].exp() + policy.detach()[:, j].exp())
    log_mass = log_mass - log_mass.mean()
    mu = log_mass.clamp(-clip, clip).exp()
    return _over_pairs(setting, policy, lambda won, lost: _spo_loss(won, lost, setting.alpha), mu / mu.mean())


def spo_best_of_n(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return SPO's term for the best of n, arXiv:2405.00747, where y is the best with probability softmax(r)_y.

    .. math:: -\frac{1}{\alpha} E \log \frac{\pi(y^*|x)^\alpha}{\sum_i \pi(y_i|x)^\alpha}
    """
    return _over_rankings(setting, policy, choices=1)


def spo_ranked(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return SPO's term for rankings of the Plackett-Luce model, arXiv:2405.00747.

    .. math:: -\frac{1}{\alpha} E \sum_{k=1}^{n-1} \log \frac{\pi(y_k|x)^\alpha}{\sum_{j \ge k} \pi(y_j|x)^\alpha}
    """
    return _over_rankings(setting, policy, choices=setting.list_size - 1)


def dpo(policy: Tensor, setting: Setting, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Return DPO's loss, arXiv:2305.18290, eq. 7, with a share of the labels flipped.

    .. math:: -E \left[(1-\epsilon) \log\frac{1}{1+e^{-\beta h}} + \epsilon \log\frac{1}{1+e^{\beta h}}\right], \quad
              h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}
    """
    ratio = policy - setting.reference

    def loss(won: Tensor, lost: Tensor) -> Tensor:
        margin = setting.beta * (won - lost)
        zero = torch.zeros_like(margin)
        right, wrong = torch.logaddexp(zero, -margin), torch.logaddexp(zero, margin)
        return (1 - label_smoothing) * right + label_smoothing * wrong

    return _over_pairs(setting, ratio, loss)


def ipo(policy: Tensor, setting: Setting, *, length_normalize: bool = True) -> Tensor:
    r"""Return IPO's loss, arXiv:2310.12036, eq. 17, on log-ratios per token or on their sums; tau is beta.

    .. math:: E \left(h - \frac{1}{2\tau}\right)^2, \quad
              h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}
    """
    ratio = policy - setting.reference
    if length_normalize:
        ratio = ratio / setting.lengths
    return _over_pairs(setting, ratio, lambda won, lost: (won - lost - 1 / (2 * setting.beta)) ** 2)


def rdpo(policy: Tensor, setting: Setting, *, label_smoothing: float) -> Tensor:
    r"""Return Robust DPO's loss, arXiv:2403.00409: ((1 - e) L(h) - e L(-h)) / (1 - 2 e), L that of DPO."""
    right, wrong = 1 - label_smoothing, label_smoothing
    return _over_ratios(policy, setting, lambda z: (right * _dpo_loss(z) - wrong * _dpo_loss(-z)) / (right - wrong))


def exo(policy: Tensor, setting: Setting, *, label_smoothing: float, targets: str) -> Tensor:
    r"""Return EXO-pref's loss, arXiv:2402.00856: sum_i q_i (log q_i - log p_i), q = softmax(beta u)."""
    won, lost = (0.0, -10.0) if targets == "official" else (math.log(1 - label_smoothing), math.log(label_smoothing))

    def loss(z: Tensor) -> Tensor:
        q = 1 / (1 + (-z).exp())
        return q * (-_dpo_loss(z) - won) + (1 - q) * (-_dpo_loss(-z) - lost)

    return _over_ratios(policy, setting, loss)


def exo_rw(policy: Tensor, setting: Setting, *, reward_temperature: float) -> Tensor:
    r"""Return EXO-rw's loss, arXiv:2402.00856: KL(softmax(beta u) || softmax(r / beta_r)) on each list."""
    lists = setting.lists()
    q = (setting.beta * (policy - setting.reference))[:, lists]
    p = (setting.rewards / reward_temperature)[:, lists]
    log_q, log_p = q - q.exp().sum(-1, keepdim=True).log(), p - p.exp().sum(-1, keepdim=True).log()
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def sppo(policy: Tensor, setting: Setting, *, win_rates: bool, reduction: str) -> Tensor:
    r"""Return SPPO's loss, arXiv:2405.00675: (u - eta (P - 1/2))^2 for both, eta = 1 / beta; half of it for the mean.

    P is 1 and 0, or how often a response beats the two of the pair, itself counted 1/2.
    """
    i, j = setting.lists().T
    wins = 1 / (1 + (setting.rewards[:, j] - setting.rewards[:, i]).exp())
    eta, factor = 1 / setting.beta, 0.5 if reduction == "mean" else 1.0
    ratio = policy - setting.reference
    if not win_rates:
        half = eta / 2
        return _over_pairs(setting, ratio, lambda won, lost: factor * ((won - half) ** 2 + (lost + half) ** 2))
    first = (ratio[:, i] - eta * ((0.5 + wins) / 2 - 0.5)) ** 2
    second = (ratio[:, j] - eta * ((0.5 + 1 - wins) / 2 - 0.5)) ** 2
    return factor * (first + second).mean()


def nca(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return NCA's loss, arXiv:2402.05369: -log s(r_w) - 1/2 log s(-r_w) - 1/2 log s(-r_l), r = beta u."""
    reward = setting.beta * (policy - setting.reference)
    return _over_pairs(setting, reward, lambda won, lost: _dpo_loss(won) + _dpo_loss(-won) / 2 + _dpo_loss(-lost) / 2)


def apo_zero(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return APO-zero's loss, arXiv:2408.06266: 1 - s(r_w) + s(r_l), r = beta u."""
    reward = setting.beta * (policy - setting.reference)
    return _over_pairs(setting, reward, lambda won, lost: 1 - 1 / (1 + (-won).exp()) + 1 / (1 + (-lost).exp()))


def apo_down(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return APO-down's loss, arXiv:2408.06266: s(r_w) + 1 - s(r_w - r_l), r = beta u."""
    reward = setting.beta * (policy - setting.reference)
    return _over_pairs(setting, reward, lambda won, lost: 1 / (1 + (-won).exp()) + 1 - 1 / (1 + (lost - won).exp()))


def discopop(policy: Tensor, setting: Setting, *, temperature: float) -> Tensor:
    r"""Return DiscoPOP's loss, arXiv:2406.08414: (1 - m) L(q) + m exp(-q), m = s(q / tau), q = beta h."""

    def loss(q: Tensor) -> Tensor:
        m = 1 / (1 + (-q / temperature).exp())
        return (1 - m) * _dpo_loss(q) + m * (-q).exp()

    return _over_ratios(policy, setting, loss)


def minor_dpo(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return MinorDPO's loss, arXiv:2408.09834: -log s(beta (u_w - max(0, u_l)))."""
    ratio = setting.beta * (policy - setting.reference)
    return _over_pairs(setting, ratio, lambda won, lost: _dpo_loss(won - lost.clamp(min=0)))


def f_dpo(policy: Tensor, setting: Setting, *, divergence: str, divergence_alpha: float) -> Tensor:
    r"""Return f-DPO's loss, arXiv:2309.16240: DPO's with f'(pi / pi_ref) in place of its logarithm."""
    fraction = (policy - setting.reference).exp()
    slopes = {
        "reverse_kl": fraction.log(),
        "forward_kl": -1 / fraction,
        "js": (fraction / (1 + fraction)).log(),
        "alpha": fraction ** (divergence_alpha - 1) / (divergence_alpha - 1),
    }
    return _over_pairs(setting, setting.beta * slopes[divergence], lambda won, lost: _dpo_loss(won - lost))


def aps(policy: Tensor, setting: Setting, *, form: str, t_min: float, t_max: float, rho: float, rho_0: float) -> Tensor:
    r"""Return the loss of APS, arXiv:2406.02764: the least -t log s(beta h / t) + price(t) over t, by ternary search.

    The price is rho t, or rho_0 t^2 - t log 2 without an upper end of t.
    """
    upper = t_max if form == "linear" else max(t_min, math.log(2) / (2 * rho_0))

    def of(h: Tensor, t: Tensor) -> Tensor:
        return t * _dpo_loss(h / t) + (rho * t if form == "linear" else rho_0 * t**2 - t * math.log(2))

    def loss(h: Tensor) -> Tensor:
        fixed, low, high = h.detach(), torch.full_like(h, t_min), torch.full_like(h, upper)
        for _ in range(80):
            first, second = low + (high - low) / 3, high - (high - low) / 3
            left = of(fixed, first) < of(fixed, second)
            low, high = torch.where(left, low, first), torch.where(left, second, high)
        return of(h, (low + high) / 2)

    return _over_ratios(policy, setting, loss)


def dpo_length_normalized(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return the loss of Tulu 3, arXiv:2411.15124: DPO's on u / |y|."""
    ratio = setting.beta * (policy - setting.reference) / setting.lengths
    return _over_pairs(setting, ratio, lambda won, lost: _dpo_loss(won - lost))


def dpo_nll(policy: Tensor, setting: Setting, *, nll_weight: float, nll_mean: str) -> Tensor:
    r"""Return the loss of Iterative RPO, arXiv:2404.19733, eq. 1: DPO's and eta nll(y_w), per token or summed."""
    return dpo(policy, setting) + nll_weight * _nll(policy, setting, nll_mean)


def spl(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return SPL's loss, arXiv:2511.08594: -log s(alpha d - beta (lr_w - lr_l))."""
    value = setting.alpha * policy - setting.beta * setting.reference
    return _over_pairs(setting, value, lambda won, lost: _dpo_loss(won - lost))


def hinge(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return RSO's hinge-norm loss, arXiv:2309.06657: max(0, 1 - beta h)."""
    return _over_ratios(policy, setting, lambda z: (1 - z).clamp(min=0))


def rso_hinge(policy: Tensor, setting: Setting) -> Tensor:
    r"""Return RSO's hinge loss, arXiv:2309.06657: max(0, 1 - beta d)."""
    return _over_pairs(setting, setting.beta * policy, lambda won, lost: (1 - won + lost).clamp(min=0))


def slic(policy: Tensor, setting: Setting, *, nll_weight: float) -> Tensor:
    r"""Return SLiC's loss, arXiv:2305.10425: max(0, delta - lp_w + lp_l) + lambda nll(y_w); delta is beta."""
    margin = setting.beta
    return _over_pairs(setting, policy, lambda won, lost: (margin - won + lost).clamp(min=0) - nll_weight * won)


def cpo(policy: Tensor, setting: Setting, *, nll_weight: float, nll_mean: str) -> Tensor:
    r"""Return CPO's loss, arXiv:2401.08417: -log s(beta d) + lambda nll(y_w)."""
    preference = _over_pairs(setting, setting.beta * policy, lambda won, lost: _dpo_loss(won - lost))
    return preference + nll_weight * _nll(policy, setting, nll_mean)


def simpo(policy: Tensor, setting: Setting, *, gamma_beta_ratio: float) -> Tensor:
    r"""Return SimPO's loss, arXiv:2405.14734, eq. 6: -log s(beta (lp_w / |y_w| - lp_l / |y_l|) - gamma)."""
    mean = policy / setting.lengths
    return _over_pairs(setting, mean, lambda won, lost: _dpo_loss(setting.beta * (won - lost - gamma_beta_ratio)))


def orpo(policy: Tensor, setting: Setting, *, nll_mean: str) -> Tensor:
    r"""Return ORPO's loss, arXiv:2403.07691, eq. 6: nll(y_w) per token - lambda log s(log of the odds ratio)."""
    likely = (policy / setting.lengths).exp()
    log_odds = (likely / (1 - likely)).log()
    ratio = _over_pairs(setting, log_odds, lambda won, lost: setting.beta * _dpo_loss(won - lost))
    return ratio + _nll(policy, setting, nll_mean)


def _dpo_loss(z: Tensor) -> Tensor:
    """Return -log(1 / (1 + exp(-z)))."""
    return torch.logaddexp(torch.zeros_like(z), -z)


def _over_ratios(policy: Tensor, setting: Setting, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of a loss of beta times DPO's margin h."""
    return _over_pairs(setting, setting.beta * (policy - setting.reference), lambda won, lost: loss(won - lost))


def _nll(policy: Tensor, setting: Setting, mean: str) -> Tensor:
    """Return the mean of -log pi(y_w|x): ``sum``, per token of each ``completion``, or per token of the ``batch``."""
    if mean == "completion":
        return _over_pairs(setting, policy / setting.lengths, lambda won, lost: -won)
    total = _over_pairs(setting, policy, lambda won, lost: -won)
    return total if mean == "sum" else total / _over_pairs(setting, setting.lengths, lambda won, lost: won)


def _spo_loss(winner: Tensor, loser: Tensor, alpha: float) -> Tensor:
    return -(alpha * winner - torch.logaddexp(alpha * winner, alpha * loser)) / alpha


def _over_pairs(
    setting: Setting, values: Tensor, loss: Callable[[Tensor, Tensor], Tensor], weight: Tensor | float = 1.0
) -> Tensor:
    """Return the mean over prompts and pairs of p loss(i, j) + (1 - p) loss(j, i), with p of Bradley and Terry."""
    i, j = setting.lists().T
    p = setting.rewards[:, i].exp() / (setting.rewards[:, i].exp() + setting.rewards[:, j].exp())
    first, second = values[:, i], values[:, j]
    return (weight * (p * loss(first, second) + (1 - p) * loss(second, first))).mean()


def _over_rankings(setting: Setting, policy: Tensor, choices: int) -> Tensor:
    """Return the mean over prompts and lists of SPO's loss of the first choices of a random Plackett-Luce ranking."""
    lists, total = setting.lists(), policy.new_zeros(())
    for order in itertools.permutations(range(setting.list_size)):
        rewards, logps = setting.rewards[:, lists[:, order]], policy[:, lists[:, order]]
        probability, loss = torch.ones_like(rewards[..., 0]), torch.zeros_like(logps[..., 0])
        for k in range(setting.list_size):
            probability = probability * rewards[..., k].exp() / rewards[..., k:].exp().sum(-1)
            if k < choices:
                chosen, among = setting.alpha * logps[..., k], setting.alpha * logps[..., k:]
                loss = loss - (chosen - among.logsumexp(-1)) / setting.alpha
        total = total + (probability * loss).mean()
    return total
