"""Bias and variance of the estimators of KL(policy || reference), for docs/explanation/kl-estimators.md.

Usage: ``python benchmarks/kl_estimators.py [--samples N] [--model-samples N] [--seed N] [OVERRIDE ...]``

The first table is of an enumerable world, where the KL and its gradient are known. The others are of the model and the
prompts that ``spo train OVERRIDE ...`` would start from. The reference is that model, and the policy is a copy with
Gaussian noise in its weights, in two strengths.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from spo.config.compose import compose
from spo.forward.head import completion_logits
from spo.ops import KL_ESTIMATORS
from spo.sampling import derive_seed, sample
from spo.stages.prepare import prepare_run
from spo.types import Sequences

Estimator = Callable[[Tensor, Tensor, Sequences], Tensor]
Batch = tuple[Tensor, Tensor, Sequences]
EOS = 0
NOISES = (0.1, 0.3)
"""Noise of the policy's weights, relative to the standard deviation of each weight tensor."""


def without_baseline(policy_logits: Tensor, reference_logits: Tensor, sequences: Sequences) -> Tensor:
    """Apply the estimator ``unbiased`` to each sequence by itself, so that others do not give it a baseline."""
    sizes = sequences.completion_length.tolist()
    parts = zip(policy_logits.split(sizes), reference_logits.split(sizes), range(len(sequences)), strict=True)
    return torch.cat([KL_ESTIMATORS["unbiased"](p, q, sequences.rows(slice(i, i + 1))) for p, q, i in parts])


ESTIMATORS: dict[str, Estimator] = {str(name): estimator for name, estimator in KL_ESTIMATORS.items()}
ESTIMATORS["unbiased, no baseline"] = without_baseline


class World:
    """Two prompts, and every response of at most ``length`` tokens under tables of logits in float64.

    A response ends with end-of-text or is cut at ``length``. The prompts have one and two tokens.

    Args:
        vocab: Number of tokens, end-of-text included.
        length: Most tokens of a response.
        seed: Random seed of the tables.
        spread: Standard deviation of the logits.
    """

    prompts = 2

    def __init__(self, vocab: int = 3, length: int = 3, seed: int = 0, spread: float = 1.0) -> None:
        self.responses = self._responses(vocab, length)
        self.prefixes = sorted({response[:t] for response in self.responses for t in range(len(response))})
        generator = torch.Generator().manual_seed(seed)
        shape = (2, self.prompts, len(self.prefixes), vocab)
        policy, reference = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.policy, self.reference = policy.requires_grad_(), reference
        self._cells = [torch.tensor([self.prefixes.index(r[:t]) for t in range(len(r))]) for r in self.responses]

    @staticmethod
    def _responses(vocab: int, length: int) -> list[tuple[int, ...]]:
        ended: list[tuple[int, ...]] = []
        running: list[tuple[int, ...]] = [()]
        for _ in range(length):
            longer = [(*response, token) for response in running for token in range(vocab)]
            ended += [response for response in longer if response[-1] == EOS]
            running = [response for response in longer if response[-1] != EOS]
        return ended + running

    def logps(self, table: Tensor) -> Tensor:
        """Return the ``(prompts, responses)`` log-probabilities under a table, in nats."""
        logps = table.log_softmax(-1)
        sums = [logps[:, cells, list(r)].sum(-1) for r, cells in zip(self.responses, self._cells, strict=True)]
        return torch.stack(sums, dim=-1)

    def kl(self) -> Tensor:
        """Return the exact KL(policy || reference) in nats, the mean over the prompts, with gradient."""
        ours, theirs = self.logps(self.policy), self.logps(self.reference)
        return (ours.exp() * (ours - theirs)).sum(-1).mean()

    def batch(self, chosen: Sequence[tuple[int, int]]) -> Batch:
        """Return the arguments of an estimator for pairs of a prompt's and a response's number."""
        rows = [((1,) * (prompt + 1), self.responses[response]) for prompt, response in chosen]
        ids = torch.zeros(len(rows), max(len(prompt) + len(response) for prompt, response in rows), dtype=torch.long)
        for i, (prompt, response) in enumerate(rows):
            ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        prompt_length = torch.tensor([len(prompt) for prompt, _ in rows])
        sequences = Sequences(ids, prompt_length, prompt_length + torch.tensor([len(r) for _, r in rows]))
        cells = torch.cat([prompt * len(self.prefixes) + self._cells[response] for prompt, response in chosen])
        return self.policy.flatten(0, 1)[cells], self.reference.flatten(0, 1)[cells], sequences

    def draws(self, batches: int, size: int, seed: int) -> Iterator[Batch]:
        """Draw batches of responses from the policy, for the prompts in turn."""
        generator = torch.Generator().manual_seed(seed)
        probability = self.logps(self.policy).exp().detach()
        drawn = [torch.multinomial(row, batches * size, True, generator=generator).tolist() for row in probability]
        for first in range(0, batches * size, size):
            yield self.batch([(i % self.prompts, drawn[i % self.prompts][i]) for i in range(first, first + size)])


@dataclass
class Moments:
    """Sums over independent batches of an estimator's mean value, the first entry, and its flat gradient, the others.

    Attributes:
        size: Sequences of a batch.
        batches: Batches counted so far.
        total: Sum of the entries.
        squares: Sum of the squared entries.
    """

    size: int
    batches: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, value: Tensor, gradient: Tensor) -> None:
        """Count a batch."""
        entries = torch.cat([value.detach().reshape(1), gradient]).double()
        self.batches += 1
        self.total = self.total + entries
        self.squares = self.squares + entries.square()

    @property
    def mean(self) -> Tensor:
        """Return the mean over the batches."""
        return torch.as_tensor(self.total) / self.batches

    @property
    def variance(self) -> Tensor:
        """Return the variance over the batches times their size: the contribution of one sequence."""
        spread = torch.as_tensor(self.squares) - self.batches * self.mean.square()
        return spread.clamp(min=0) / (self.batches - 1) * self.size

    @property
    def standard_error(self) -> Tensor:
        """Return the standard error of the mean."""
        return (self.variance / (self.batches * self.size)).sqrt()


def flat_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient as one vector, 0 where ``value`` does not depend on a parameter. The graph stays."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat([gradient.flatten() for gradient in filled])


def measure(
    batches: Iterable[Batch], parameters: Sequence[Tensor], estimators: Mapping[str, Estimator]
) -> dict[str, Moments]:
    """Apply every estimator to the same batches, which have one size."""
    found: dict[str, Moments] = {}
    for batch in batches:
        for name, estimator in estimators.items():
            value = estimator(*batch).mean()
            found.setdefault(name, Moments(len(batch[2]))).add(value, flat_gradient(value, parameters))
    return found


def against_the_truth(samples: int, seed: int, size: int = 16) -> Iterator[str]:
    """Yield the lines of the table of the enumerable world."""
    world = World(seed=seed)
    kl = world.kl()
    gradient = flat_gradient(kl, [world.policy])
    truth = torch.cat([kl.detach().reshape(1), gradient])
    yield (
        f"Enumerable world: vocabulary 3, at most 3 tokens, {world.prompts} prompts, seed {seed}; KL {kl:.4f} nats, "
        f"its gradient of norm {gradient.norm():.4f}; {samples // size} batches of {size} samples.\n"
    )
    yield "| estimator | value: mean | z | variance | gradient: bias | largest z | variance |"
    yield "|---|---|---|---|---|---|---|"
    for name, got in measure(world.draws(samples // size, size, seed), [world.policy], ESTIMATORS).items():
        z = ((got.mean - truth) / got.standard_error.clamp(min=1e-9)).abs()
        largest = f"{z[1:].max():.1f}" if z[1:].max() < 100 else "> 100"
        bias = (got.mean - truth)[1:].norm() / gradient.norm()
        yield (
            f"| {name} | {got.mean[0]:.4f} | {z[0]:.1f} | {got.variance[0]:.3f} "
            f"| {bias:.1%} | {largest} | {got.variance[1:].sum():.3f} |"
        )


def of_a_model(samples: int, seed: int, overrides: Sequence[str], size: int = 16) -> Iterator[str]:
    """Yield the lines of the tables of a language model."""
    cfg = compose(overrides)
    OmegaConf.resolve(cfg)
    prepared = prepare_run(cfg)
    prompts = [prompt.ids for prompt in prepared.sampling_prompts("train", cfg.data.max_new_tokens)]
    reference = prepared.spec.base(prepared.base).requires_grad_(False)

    def draws(policy: nn.Module) -> Iterator[Batch]:
        for i in range(samples // size):
            sequences = sample(
                policy,
                [prompts[(i * size + j) % len(prompts)] for j in range(size)],
                max_new_tokens=cfg.data.max_new_tokens,
                temperature=1.0,
                stop_ids=prepared.stop_ids,
                pad_token_id=prepared.tokenizer.pad_token_id,
                seeds=[derive_seed(seed, i, j) for j in range(size)],
                sampler="static",
            )
            logits = [completion_logits(model, sequences) for model in (policy, reference)]
            assert isinstance(logits[0], Tensor) and isinstance(logits[1], Tensor)  # no max_logits
            yield logits[0], logits[1], sequences

    for noise in NOISES:
        policy = perturbed(reference, noise, seed)
        found = measure(draws(policy), list(policy.parameters()), ESTIMATORS)
        yield (
            f"\nLanguage model of {sum(p.numel() for p in policy.parameters())} weights, noise {noise}, seed {seed}; "
            f"{samples // size} batches of {size} samples.\n"
        )
        yield "| estimator | value: mean | standard error | variance | gradient: norm of the mean | variance |"
        yield "|---|---|---|---|---|---|"
        for name, got in found.items():
            yield (
                f"| {name} | {got.mean[0]:.3g} | {got.standard_error[0]:.2g} | {got.variance[0]:.3g} "
                f"| {got.mean[1:].norm():.3g} | {got.variance[1:].sum():.3g} |"
            )


def perturbed(model: nn.Module, noise: float, seed: int) -> nn.Module:
    """Return a trainable copy with Gaussian noise of ``noise`` times the standard deviation of each weight tensor."""
    other = copy.deepcopy(model).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


def main() -> None:
    """Print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32000, help="draws from the enumerable world")
    parser.add_argument("--model-samples", type=int, default=2048, help="draws from each language model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="as of spo train")
    options = parser.parse_args()
    print(*against_the_truth(options.samples, options.seed), sep="\n")
    print(*of_a_model(options.model_samples, options.seed, options.overrides), sep="\n")


if __name__ == "__main__":
    main()
