"""Plain scoring of every response, and what follows from it: predicted steps and tests of sampled quantities.

Nothing here shares code with training: token ids follow from the language, the model is called on rows without padding,
and log-probabilities are summed in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spo.data.enumerable import Language
from spo.exact.papers import kl
from spo.types import Sequences

MIN_EXPECTED_COUNT = 5.0
"""Expected count below which the cells of a chi-square test are merged into one."""
Objective = Callable[[Tensor], Tensor]
"""Map ``(P, R)`` log-probabilities of the policy to a scalar."""


@dataclass(frozen=True)
class Responses:
    """The ``R`` responses to each of ``P`` prompts as token ids, all of the first prompt first.

    Attributes:
        prompts: Token ids of the prompts, all of the same length.
        completions: Token ids of the ``R`` responses, which are those of every prompt.
    """

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, language: Language, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Responses:
        """Write a language in tokens: BOS, the symbols, and EOS after a response that is shorter than the limit."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(vocabulary[symbol] for symbol in text)

        vocabulary, end = tokenizer.get_vocab(), (int(tokenizer.eos_token_id),)
        return cls(
            tuple((int(tokenizer.bos_token_id), *ids(prompt)) for prompt in language.prompts),
            tuple(ids(text) + (end if len(text) < max_new_tokens else ()) for text in language.responses),
        )

    @property
    def lengths(self) -> Tensor:
        """Return the ``(P, R)`` float64 numbers of tokens."""
        return torch.tensor([[len(ids) for ids in self.completions]] * len(self.prompts), dtype=torch.float64)

    def distributions(self, model: nn.Module) -> Tensor:
        """Return ``(P, R, L, V)`` next-token log-probs at each token of the responses, 0 after their end."""
        start, longest = len(self.prompts[0]), max(map(len, self.completions))
        rows: dict[tuple[int, int], Tensor] = {}
        for length in {len(ids) for ids in self.completions}:
            places = [(p, r) for p in range(len(self.prompts)) for r in self._of_length(length)]
            ids = torch.tensor([[*self.prompts[p], *self.completions[r]] for p, r in places])
            logps = model(input_ids=ids).logits[:, start - 1 : -1].double().log_softmax(-1)
            padded = nn.functional.pad(logps, (0, 0, 0, longest - length))
            rows |= dict(zip(places, padded, strict=True))
        return torch.stack([rows[p, r] for p in range(len(self.prompts)) for r in range(len(self.completions))]).view(
            len(self.prompts), len(self.completions), longest, -1
        )

    def _of_length(self, length: int) -> list[int]:
        return [r for r, ids in enumerate(self.completions) if len(ids) == length]

    def logps(self, model: nn.Module) -> Tensor:
        """Return ``(P, R)`` float64 log pi(y|x) in nats."""
        return self.of_tokens(self.distributions(model))

    def of_tokens(self, distributions: Tensor) -> Tensor:
        """Return the ``(P, R)`` sums over the tokens of the responses, from :meth:`distributions`."""
        sums = [distributions[:, r, range(len(ids)), list(ids)].sum(1) for r, ids in enumerate(self.completions)]
        return torch.stack(sums, dim=1)

    def counts(self, samples: Sequences) -> Tensor:
        """Return how often each response occurs among samples, ``(P, R)``.

        Raises:
            ValueError: A prompt or completion is not in the language.
        """
        counts = torch.zeros(len(self.prompts), len(self.completions), dtype=torch.float64)
        lengths = zip(samples.prompt_length.tolist(), samples.length.tolist(), strict=True)
        for ids, (start, end) in zip(samples.input_ids.tolist(), lengths, strict=True):
            counts[self.prompts.index(tuple(ids[:start])), self.completions.index(tuple(ids[start:end]))] += 1
        return counts


def descend(
    model: nn.Module, responses: Responses, objective: Objective, learning_rate: float, steps: int
) -> nn.Module:
    """Return a float64 copy of a model after steps of gradient descent on an objective, without momentum.

    Args:
        model: Model to start from.
        responses: Language of the objective.
        objective: Function of the log-probabilities of all responses.
        learning_rate: Factor of the gradient.
        steps: Number of steps.
    """
    model = copy.deepcopy(model).double().requires_grad_()
    for _ in range(steps):
        gradients = gradient_of(model, responses, objective)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(learning_rate * gradient)
    return model


def gradient_of(model: nn.Module, responses: Responses, objective: Objective) -> tuple[Tensor, ...]:
    """Return the gradient of an objective by each parameter of a model."""
    return torch.autograd.grad(objective(responses.logps(model)), list(model.parameters()))


def pull_deviation(
    before: nn.Module,
    after: nn.Module,
    sampled: nn.Module,
    reference: nn.Module,
    responses: Responses,
    objective: Objective,
    learning_rate: float,
    kl_weight: float,
    num_samples: int,
) -> float:
    r"""Return how far one step's pull toward the reference is from its expectation, in standard deviations.

    A step of gradient descent with ``num_samples`` samples y, equally many for each prompt, moves the parameters by
    minus the learning rate times grad L + weight g, where g is the mean of :math:`g_y = \nabla \sum_t KL_t` along the
    samples, with their prefixes fixed. Its expectation e is a sum over all responses. The projection of g on e has
    the mean e.e, and the variance of g_y.e over the samples of a prompt, averaged over prompts, divided by the number
    of samples. So a wrong factor or sign of the KL, and samples of another distribution, are many standard deviations
    off.

    Args:
        before: Model before the step.
        after: Model after the step.
        sampled: Model that the samples of the step were drawn from.
        reference: Reference model.
        responses: Language.
        objective: Preference loss, without the KL.
        learning_rate: Learning rate of the step.
        kl_weight: Coefficient of the KL.
        num_samples: Number of samples of the step.
    """
    [policy] = list(before.parameters())
    [moved] = list(after.parameters())
    [slope] = gradient_of(before, responses, objective)
    found = (((policy - moved).detach() / learning_rate - slope) / kl_weight).double().flatten()
    logps = responses.distributions(before)
    with torch.no_grad():
        other = responses.distributions(reference)
        probability = responses.logps(sampled).exp()
    # A position after the end of a response has the log-probs 0 twice, so it adds nothing.
    along = (logps.exp() * (logps - other)).sum((-1, -2))
    each = [torch.autograd.grad(value, policy, retain_graph=True)[0].flatten() for value in along.flatten()]
    gradients = torch.stack(each).double().view(*probability.shape, -1)
    expected = (probability[..., None] * gradients).sum(1).mean(0)
    projected = gradients @ expected
    means = (probability * projected).sum(1, keepdim=True)
    variance = (probability * (projected - means) ** 2).sum(1).mean() / num_samples
    scale = variance.sqrt() + 1e-9 * (expected @ expected)
    return float(abs(found @ expected - expected @ expected) / scale)


def frequency_deviation(counts: Tensor, logps: Tensor) -> float:
    """Return how far counts of samples are from a distribution, by the chi-square statistic of Pearson (1900).

    Args:
        counts: ``(P, R)`` counts of each response to each prompt.
        logps: ``(P, R)`` log-probabilities of the responses.

    Returns:
        The statistic minus its degrees of freedom, in standard deviations: (chi2 - k) / sqrt(2 k).
    """
    statistic, freedom = 0.0, 0
    for seen, probability in zip(counts, logps.exp(), strict=True):
        expected = seen.sum() * probability
        rare = expected < MIN_EXPECTED_COUNT
        cells = torch.cat([expected[~rare], expected[rare].sum()[None]])
        found = torch.cat([seen[~rare], seen[rare].sum()[None]])
        # Without rare responses, the merged cell is empty on both sides.
        statistic += float(((found - cells) ** 2 / cells.clamp(min=1e-9)).sum())
        freedom += int((~rare).sum()) - 1 + int(bool(rare.any()))
    return abs(statistic - freedom) / (2 * freedom) ** 0.5


def with_kl(objective: Objective, reference: Tensor, weight: float) -> Objective:
    """Return an objective plus ``weight`` times KL(policy || reference), from ``(P, R)`` log-probs of the reference."""
    return lambda logps: objective(logps) + weight * kl(logps, reference)
