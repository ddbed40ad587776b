r"""The objectives of the shipped methods as their papers write them, on the probabilities of all responses.

These functions do not call the losses, the regularizers, :mod:`spo.ops` or the data pipeline. ``spo verify`` compares
training with them, so a wrong factor, sign or weight in the package does not cancel against itself. Each of them is the
expectation over every pair (or list) of different responses and over its label, in float64.
"""

from __future__ import annotations

import itertools
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
