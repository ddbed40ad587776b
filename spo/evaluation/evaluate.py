"""Samples of policy and reference on the same prompts, and everything that is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from spo.data import EvalPrompt
from spo.evaluation.diversity import distinct_n, self_bleu
from spo.evaluation.intervals import bootstrap_interval
from spo.evaluation.judges import Judge, verdict_of_rewards
from spo.ops import completion_logits, completion_targets, sum_per_sequence, token_entropy, token_kl, token_logps
from spo.sampling import derive_seed, eval_mode, sample
from spo.types import Sequences


@dataclass(frozen=True)
class EvaluationSettings:
    """How a policy is evaluated.

    Attributes:
        num_prompts: prompts of the test split, at most.
        samples_per_prompt: completions drawn per prompt from the policy, and as many from the reference.
        max_new_tokens: their length limit.
        temperature: of the sampling; 1 is the model's own distribution.
        batch_size: prompts sampled at a time.
        confidence: of the interval around the win rate.
        bootstrap_samples: resamples of the prompts.
        self_bleu_samples: completions on which self-BLEU is measured, whose cost is quadratic.
        seed: of the sampling.
    """

    num_prompts: int
    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    batch_size: int
    confidence: float
    bootstrap_samples: int
    self_bleu_samples: int
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """Flat metrics under ``eval/``, and one row per sample."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class _Drawn:
    """Completions of one model on all prompts, with their scores under both models."""

    texts: list[str]
    tokens: list[int]
    logp_policy: list[float]
    logp_reference: list[float]
    kl: list[float]
    entropy: list[float]
    rewards: dict[str, list[float]]


def evaluate_policy(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EvalPrompt],
    settings: EvaluationSettings,
    judge: Judge | None,
    decode: Callable[[Sequence[int]], str],
    on_progress: Callable[[int], None] = lambda _: None,
    all_prompts: bool = False,
) -> Evaluation:
    """Draws completions from both models and compares them.

    A sample of the policy wins with 1 against a sample of the reference for the same prompt where its reward is
    higher, ties count half. The interval is a bootstrap over prompts, since samples of one prompt are not independent
    where the prompts are a sample themselves; over samples where there are no other prompts.

    Args:
        policy: the trained model.
        reference: the model that training started from.
        tokenizer: theirs.
        prompts: of the test split.
        settings: how to evaluate.
        judge: compares the completions; ``None`` leaves reward and win rate out.
        decode: from the token ids of a completion to its text.
        on_progress: called with the number of sequences just done.
        all_prompts: whether there are no others that these prompts stand for.

    Returns:
        Metrics and samples. ``kl`` is in nats per sequence, estimated by the token-wise KL along samples of the
        policy; ``entropy`` in nats per token, ``entropy_sequence`` in nats per sequence; ``eval/reference/...`` are
        the same quantities of the reference, that is the values before training.
    """
    repeated = [prompt for prompt in prompts[: settings.num_prompts] for _ in range(settings.samples_per_prompt)]

    def drawn(model: nn.Module, other: nn.Module, stage: str) -> _Drawn:
        return _draw(model, other, stage, tokenizer, repeated, settings, judge, decode, on_progress)

    with eval_mode(policy), eval_mode(reference):
        ours, theirs = drawn(policy, reference, "policy"), drawn(reference, policy, "reference")
    metrics = _summary(ours, settings)
    metrics |= {f"reference/{key}": value for key, value in _summary(theirs, settings).items() if key != "kl"}
    rows = [
        {
            "prompt_id": prompt.prompt_id,
            "split": prompt.split,
            "sample_index": i % settings.samples_per_prompt,
            "prompt": prompt.text,
            "completion": ours.texts[i],
            "tokens": ours.tokens[i],
            "logp_policy": ours.logp_policy[i],
            "logp_reference": ours.logp_reference[i],
            "reference_completion": theirs.texts[i],
        }
        for i, prompt in enumerate(repeated)
    ]
    if ours.rewards:
        verdicts = [
            verdict_of_rewards(mine, other)
            for mine, other in zip(ours.rewards["reward"], theirs.rewards["reward"], strict=True)
        ]
        for i, row in enumerate(rows):
            row["reward"], row["reference_reward"] = ours.rewards["reward"][i], theirs.rewards["reward"][i]
            row["verdict"] = verdicts[i]
        per_prompt = [fmean(chunk) for chunk in _chunks(verdicts, settings.samples_per_prompt)]
        low, high = bootstrap_interval(
            verdicts if all_prompts else per_prompt,
            confidence=settings.confidence,
            samples=settings.bootstrap_samples,
            seed=derive_seed("bootstrap", settings.seed),
        )
        metrics |= {"win_rate": fmean(per_prompt), "win_rate_ci_low": low, "win_rate_ci_high": high}
    return Evaluation({f"eval/{key}": value for key, value in metrics.items()}, rows)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))


@torch.no_grad()
def _draw(
    model: nn.Module,
    other: nn.Module,
    stage: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EvalPrompt],
    settings: EvaluationSettings,
    judge: Judge | None,
    decode: Callable[[Sequence[int]], str],
    on_progress: Callable[[int], None],
) -> _Drawn:
    result = _Drawn([], [], [], [], [], [], {})
    for number, chunk in enumerate(_chunks(prompts, settings.batch_size)):
        sequences = sample(
            model,
            [prompt.ids for prompt in chunk],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seed=derive_seed("evaluation", stage, settings.seed, number),
        )
        texts = _completion_texts(sequences, decode)
        logits, other_logits = completion_logits(model, sequences), completion_logits(other, sequences)
        targets = completion_targets(sequences)
        own = sum_per_sequence(token_logps(logits, targets), sequences).tolist()
        cross = sum_per_sequence(token_logps(other_logits, targets), sequences).tolist()
        result.texts.extend(texts)
        result.tokens.extend(sequences.completion_length.tolist())
        result.logp_policy.extend(own if stage == "policy" else cross)
        result.logp_reference.extend(cross if stage == "policy" else own)
        result.kl.extend(sum_per_sequence(token_kl(logits, other_logits), sequences).tolist())
        result.entropy.extend(sum_per_sequence(token_entropy(logits), sequences).tolist())
        scores = None if judge is None else judge.scores([prompt.text for prompt in chunk], texts)
        for name, values in (scores or {}).items():
            result.rewards.setdefault(name, []).extend(values)
        on_progress(len(chunk))
    return result


def _completion_texts(sequences: Sequences, decode: Callable[[Sequence[int]], str]) -> list[str]:
    rows = zip(sequences.input_ids.tolist(), sequences.prompt_length.tolist(), sequences.length.tolist(), strict=True)
    return [decode(ids[start:end]) for ids, start, end in rows]


def _summary(drawn: _Drawn, settings: EvaluationSettings) -> dict[str, float]:
    summary = {
        "kl": fmean(drawn.kl),
        "entropy": sum(drawn.entropy) / sum(drawn.tokens),
        "entropy_sequence": fmean(drawn.entropy),
        "distinct_2": distinct_n(drawn.texts, 2),
        "self_bleu": self_bleu(drawn.texts[: settings.self_bleu_samples]),
        "length": fmean(drawn.tokens),
    }
    for name, values in drawn.rewards.items():
        summary["reward" if name == "reward" else f"reward/{name}"] = fmean(values)
    return summary
