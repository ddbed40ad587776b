"""How a policy is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spo.bounds import NonNegativeInt, OpenFraction, PositiveFloat, PositiveInt

REFERENCE, CHOSEN = "reference", "chosen"


@dataclass(frozen=True)
class EvaluationSettings:
    """How a policy is evaluated.

    Attributes:
        num_prompts: prompts of the test split, at most.
        selection_prompts: prompts of the selection split, at most, for the numbers that settings are chosen by; 0 for
            none.
        samples_per_prompt: completions drawn per prompt from the policy, and as many from the reference.
        max_new_tokens: their length limit.
        temperature: of the sampling, and of both models where they are measured; 1 is their own distribution.
        batch_size: completions sampled at a time, of prompts of like length; changes no number.
        against: what the policy is compared with: ``reference``, ``chosen`` (the data set's chosen responses), or the
            directory of another run.
        confidence: of the intervals.
        bootstrap_samples: resamples of the prompts.
        self_bleu_samples: completions on which self-BLEU is measured, whose cost is quadratic.
        seed: of the sampling.
    """

    num_prompts: PositiveInt
    selection_prompts: NonNegativeInt
    samples_per_prompt: PositiveInt
    max_new_tokens: PositiveInt
    temperature: PositiveFloat
    batch_size: PositiveInt
    against: Sequence[str]
    confidence: OpenFraction
    bootstrap_samples: PositiveInt
    self_bleu_samples: NonNegativeInt
    seed: NonNegativeInt
