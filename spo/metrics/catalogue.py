"""The catalogue of metrics: what each one is called and what it is measured in."""

from __future__ import annotations

LABELS = {
    "alpha": "alpha",
    "beta": "beta",
    "calibration/brier": "Brier score",
    "calibration/ece": "calibration error",
    "calibration/log_loss": "calibration log loss",
    "distinct_2": "distinct-2",
    "distinct_samples": "distinct samples per prompt",
    "entropy": "entropy",
    "entropy_sequence": "sequence entropy",
    "finished": "samples that end",
    "grad_norm": "gradient norm",
    "kl": "KL to the reference",
    "length": "length",
    "health/alarms": "health alarms",
    "health/logp_drift_chosen": "drift of log-probs, chosen",
    "health/logp_drift_rejected": "drift of log-probs, rejected",
    "judge/cached": "questions the judge had answered before",
    "judge/calls": "questions to the judge",
    "judge/cost": "cost of the judge",
    "judge/tokens": "tokens of the judge",
    "judge/unanswered": "questions the judge left unanswered",
    "logps/chosen": "log-prob, chosen",
    "logps/rejected": "log-prob, rejected",
    "logps_per_token/chosen": "log-prob per token, chosen",
    "logps_per_token/rejected": "log-prob per token, rejected",
    "loss": "loss",
    "loss/preference": "preference loss",
    "loss/regularizer": "regularizer",
    "lr": "learning rate",
    "p_eos": "P(EOS) where chosen completions end",
    "repetition": "repeated 4-grams",
    "reward": "reward",
    "rewards/accuracies": "implicit reward accuracy",
    "rewards/chosen": "implicit reward, chosen",
    "rewards/margins": "implicit reward margin",
    "rewards/rejected": "implicit reward, rejected",
    "samples/reward": "reward, of few validation prompts",
    "samples/win_rate": "win rate, of few validation prompts",
    "self_bleu": "self-BLEU",
    "win_rate": "win rate",
    "win_rate_length_controlled": "win rate at equal length",
}
UNITS = {
    "calibration/log_loss": "nats per pair",
    "distinct_samples": "share of samples",
    "entropy": "nats per token",
    "entropy_sequence": "nats per sequence",
    "exact/entropy": "nats per response",
    "exact/kl_optimum": "nats per response",
    "exact/kl_reference": "nats per response",
    "exact/mass_outside": "probability",
    "finished": "share of samples",
    "health/alarms": "limits crossed",
    "health/logp_drift_chosen": "nats per token",
    "health/logp_drift_rejected": "nats per token",
    "kl": "nats per sequence",
    "length": "tokens",
    "logps/chosen": "nats per sequence",
    "logps/rejected": "nats per sequence",
    "logps_per_token/chosen": "nats per token",
    "logps_per_token/rejected": "nats per token",
    "p_eos": "probability",
    "repetition": "share of 4-grams",
    "rewards/accuracies": "share of pairs",
    "samples/win_rate": "share of prompts",
    "win_rate": "share of prompts",
    "win_rate_length_controlled": "share of prompts",
}
INTERVAL = ("_ci_low", "_ci_high")


def label(key: str) -> str:
    """Returns the name of a metric for people; ``key`` is without its ``eval/``, ``train/`` or ``val/``."""
    if key.startswith("reward/"):
        return "reward: " + key.removeprefix("reward/").replace("_", " ")
    if key.startswith("win_rate/"):
        opponent, controlled, _ = key.removeprefix("win_rate/").partition("_length_controlled")
        return f"win rate against {opponent}" + (", at equal length" if controlled else "")
    if key.startswith("prompts/"):
        return f"prompts compared with {key.removeprefix('prompts/')}"
    return LABELS.get(key, key)


def unit(key: str) -> str:
    """Returns the unit of a metric, empty where it has none; ``key`` as in :func:`label`."""
    return UNITS["win_rate"] if key.startswith("win_rate/") else UNITS.get(key, "")
