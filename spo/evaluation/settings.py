"""Settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from spo.bounds import NonNegativeInt, OpenFraction, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        num_prompts: Limit of prompts from the test split.
        selection_prompts: Limit of prompts from the selection split, whose metrics choose between settings; 0 for none.
        samples_per_prompt: Number of completions per prompt from the policy.
        max_new_tokens: Limit of tokens in a completion.
        temperature: Temperature of sampling, and of both models in log-probs, entropy and KL. At 1 the distributions
            are those of the models.
        batch_size: Number of completions sampled at a time, for prompts of similar length. It changes no number.
        against: Opponents of the policy: ``reference``, ``chosen`` (the chosen responses of the data set), or the
            directory of another run.
        confidence: Confidence of the intervals.
        bootstrap_samples: Number of resamples of the prompts.
        self_bleu_samples: Number of completions for self-BLEU, whose cost is quadratic.
        seed: Random seed of the sampling.
        reference_samples: Number of completions per prompt from the reference. Each sample of the policy is compared
            with all of them. ``None``: as many as from the policy.
        reference_seed: Random seed of the completions of the reference; ``None`` for ``seed``. The defaults of both
            keys are those of runs of version 0.1.0.
        further_kl: Folders or hub names of models with the tokens of the policy, by name. The KL to each of them is
            measured along the samples of the policy too.
        policy: Weights that are evaluated and saved: those of the last step, or of the best checkpoint. The default is
            that of runs of version 0.1.0, whose configurations do not have this key.
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
    policy: Literal["last", "best"] = "last"
    reference_samples: PositiveInt | None = None
    reference_seed: NonNegativeInt | None = None
    further_kl: Mapping[str, str] = field(default_factory=dict)

    def of_reference(self) -> EvaluationSettings:
        """Return the settings by which the reference draws its completions."""
        return replace(
            self,
            samples_per_prompt=self.reference_samples or self.samples_per_prompt,
            seed=self.seed if self.reference_seed is None else self.reference_seed,
        )
