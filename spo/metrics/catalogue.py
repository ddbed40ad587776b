"""The catalogue of metrics: the one place that states what a metric is called, measured in and compared by.

The run page, the terminal, comparisons, dashboards and the documentation read it. A new metric costs one entry here and
the line that computes it; a metric without an entry is shown under its key, after the others. Nothing but the standard
library and :mod:`spo.wording` is imported, so that every reader can afford the catalogue.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from spo.wording import finite

Row = Mapping[str, Any]
PerSample = Callable[[Row], float | None]
REFERENCES = "references"
"""Column of ``samples.jsonl`` with the completions of the reference, where a sample was compared with several."""
REFERENCE, CHOSEN = "reference", "chosen"
"""Opponents of a policy that are not runs: the reference model, and the chosen responses of the data."""
Place = Literal["card", "terminal", "comparison"]

INTERVAL_ENDS = ("_ci_low", "_ci_high")
"""Endings of the two keys of a confidence interval, after the key of its metric."""
SHARE = (0.0, 1.0)
NOT_NEGATIVE = (0.0, math.inf)
_PARAMETER = re.compile("[A-Z]{2,}")


@dataclass(frozen=True)
class Metric:
    """An entry of the catalogue.

    Attributes:
        key: Key of the metric without ``eval/``, ``train/`` or ``val/``. A word in capitals makes the entry a family:
            ``reward/NAME`` stands for each component of a reward, ``win_rate/OPPONENT`` for each opponent.
        label: Name for people; it may contain the word in capitals.
        unit: Unit, empty for a pure number.
        better: Direction that is better; ``None`` where neither is by itself.
        bounds: Range of possible values, to which intervals are cut.
        neutral: Value of a policy that equals what it is compared with: a win rate of 0.5, a KL of 0.
        places: Places that show the metric, in addition to the table of a run, which shows every metric: ``card`` for
            the cards of the run page, ``terminal`` for the panel at the end of a run, ``comparison`` for tables of
            several methods and for dashboards.
        comparable: Whether numbers of different methods are on one scale. Losses are not, since each method has its own
            objective, and neither are implicit rewards, whose unit is that of the method. Their accuracy is a share of
            pairs, and therefore comparable. What is not comparable never shares an axis.
        of_policy: Whether the number describes the policy, as the number of questions to a judge does not.
        per_sample: Value of a single completion, from its row of ``samples.jsonl``; the mean over completions estimates
            the metric. In a family of opponents the row has the opponent in the place of the reference. ``None`` where
            single completions do not have a value.
        per: Divisor of each completion; with it the metric is a ratio of sums, such as nats per token.
        covariate: Quantity of a completion that a regression holds at zero, such as a difference in length.
    """

    key: str
    label: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    bounds: tuple[float, float] | None = None
    neutral: float | None = None
    places: tuple[Place, ...] = ()
    comparable: bool = True
    of_policy: bool = True
    per_sample: PerSample | None = None
    per: PerSample | None = None
    covariate: PerSample | None = None

    @cached_property
    def parameter(self) -> str:
        """Return the word in capitals of a family, such as ``OPPONENT``; empty for a single metric."""
        found = _PARAMETER.search(self.key)
        return found[0] if found else ""

    @property
    def family(self) -> str:
        """Return what the keys of a family start with, or the key of a single metric."""
        return self.key.partition(self.parameter)[0] if self.parameter else self.key

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        before, _, after = self.key.partition(self.parameter) if self.parameter else (self.key, "", "")
        return re.compile(f"{re.escape(before)}(.+){re.escape(after)}" if self.parameter else re.escape(self.key))

    def argument(self, key: str) -> str | None:
        """Return what a key has for the word in capitals (empty for a single metric); ``None`` if it does not match."""
        found = self._pattern.fullmatch(key)
        return None if found is None else found[1] if self.parameter else ""


# --- values of a single completion ---------------------------------------------------------------------------------


def column(name: str) -> PerSample:
    """Return a function that reads a column of ``samples.jsonl``; lists of tokens count as their length."""

    def read(row: Row) -> float | None:
        value = row.get(name)
        return float(len(value)) if isinstance(value, list) else finite(value)

    return read


_tokens, _reference_tokens = column("tokens"), column("reference_tokens")
_logp_policy, _logp_reference = column("logp_policy"), column("logp_reference")


def _log_ratio(row: Row) -> float | None:
    policy, reference = _logp_policy(row), _logp_reference(row)
    return None if policy is None or reference is None else policy - reference


def _surprise(row: Row) -> float | None:
    policy = _logp_policy(row)
    return None if policy is None else -policy


def _length_difference(row: Row) -> float | None:
    ours, theirs = _tokens(row), _reference_tokens(row)
    return None if ours is None or theirs is None else ours - theirs


def with_opponent(row: Row, opponent: str) -> Row:
    """Return a row in which a named opponent takes the place of the reference."""
    answer = (row.get("opponents") or {}).get(opponent) or {}
    return {**without_comparisons(row), "verdict": answer.get("verdict"), "reference_tokens": answer.get("tokens")}


def without_comparisons(row: Row) -> dict[str, Any]:
    """Return a row without its list of completions of the reference."""
    return {key: value for key, value in row.items() if key != REFERENCES}


def comparisons(row: Row) -> list[Row]:
    """Return one row for each completion of the reference that a sample was compared with.

    Args:
        row: Row of ``samples.jsonl``. Without the column ``references`` it holds a single comparison.
    """
    met = row.get(REFERENCES) or []
    return [{**row, "verdict": one.get("verdict"), "reference_tokens": one.get("tokens")} for one in met] or [row]


# --- the entries ---------------------------------------------------------------------------------------------------

# Tables show metrics in this order; those of a family stand together, sorted by key.
CATALOGUE: list[Metric] = [
    Metric(
        "win_rate",
        "win rate",
        "share of prompts",
        better="higher",
        bounds=SHARE,
        neutral=0.5,
        places=("comparison",),
        per_sample=column("verdict"),
    ),
    Metric(
        "win_rate_length_controlled",
        "win rate at equal length",
        "share of prompts",
        better="higher",
        bounds=SHARE,
        neutral=0.5,
        places=("comparison",),
        per_sample=column("verdict"),
        covariate=_length_difference,
    ),
    Metric(
        "win_rate/OPPONENT",
        "win rate against OPPONENT",
        "share of prompts",
        better="higher",
        bounds=SHARE,
        neutral=0.5,
        per_sample=column("verdict"),
    ),
    Metric(
        "win_rate/OPPONENT_length_controlled",
        "win rate against OPPONENT, at equal length",
        "share of prompts",
        better="higher",
        bounds=SHARE,
        neutral=0.5,
        per_sample=column("verdict"),
        covariate=_length_difference,
    ),
    Metric(
        "reward",
        "reward",
        better="higher",
        places=("card", "terminal", "comparison"),
        per_sample=column("reward"),
    ),
    Metric("reward/NAME", "reward: NAME", better="higher", places=("terminal",)),
    Metric(
        "kl",
        "KL to the reference",
        "nats per sequence",
        better="lower",
        bounds=NOT_NEGATIVE,
        neutral=0.0,
        places=("card", "terminal", "comparison"),
        per_sample=_log_ratio,
    ),
    Metric("kl/NAME", "KL to NAME", "nats per sequence", better="lower", bounds=NOT_NEGATIVE, neutral=0.0),
    Metric(
        "entropy",
        "entropy",
        "nats per token",
        bounds=NOT_NEGATIVE,
        places=("card", "terminal", "comparison"),
        per_sample=_surprise,
        per=_tokens,
    ),
    Metric("entropy_sequence", "sequence entropy", "nats per sequence", bounds=NOT_NEGATIVE, per_sample=_surprise),
    Metric("distinct_2", "distinct-2", bounds=SHARE, places=("card", "terminal", "comparison")),
    Metric("distinct_samples", "distinct samples per prompt", "share of samples", bounds=SHARE, places=("terminal",)),
    Metric("self_bleu", "self-BLEU", better="lower", bounds=SHARE, places=("terminal", "comparison")),
    Metric(
        "length",
        "length",
        "tokens",
        bounds=NOT_NEGATIVE,
        places=("card", "terminal", "comparison"),
        per_sample=_tokens,
    ),
    Metric("finished", "samples that end", "share of samples", bounds=SHARE),
    Metric("repetition", "repeated 4-grams", "share of 4-grams", better="lower", bounds=SHARE),
    Metric("p_eos", "P(EOS) where chosen completions end", "probability", bounds=SHARE),
    Metric(
        "rewards/accuracies",
        "implicit reward accuracy",
        "share of pairs",
        better="higher",
        bounds=SHARE,
        places=("terminal",),
    ),
    Metric("rewards/margins", "implicit reward margin", better="higher", comparable=False),
    Metric("rewards/chosen", "implicit reward, chosen", better="higher", comparable=False),
    Metric("rewards/rejected", "implicit reward, rejected", comparable=False),
    Metric("calibration/ece", "calibration error", better="lower", bounds=SHARE, places=("terminal",)),
    Metric("calibration/brier", "Brier score", better="lower", bounds=SHARE),
    Metric("calibration/log_loss", "calibration log loss", "nats per pair", better="lower", bounds=NOT_NEGATIVE),
    Metric("loss", "loss", better="lower", comparable=False),
    Metric("loss/preference", "preference loss", better="lower", comparable=False),
    Metric("loss/regularizer", "regularizer", better="lower", comparable=False),
    Metric("logps/chosen", "log-prob, chosen", "nats per sequence"),
    Metric("logps/rejected", "log-prob, rejected", "nats per sequence", better="lower"),
    Metric("logps_per_token/chosen", "log-prob per token, chosen", "nats per token"),
    Metric("logps_per_token/rejected", "log-prob per token, rejected", "nats per token"),
    Metric("alpha", "alpha"),
    Metric("beta", "beta"),
    Metric("lr", "learning rate"),
    Metric("grad_norm", "gradient norm"),
    Metric("health/alarms", "health alarms", "limits crossed", better="lower"),
    Metric("health/logp_drift_chosen", "drift of log-probs, chosen", "nats per token"),
    Metric("health/logp_drift_rejected", "drift of log-probs, rejected", "nats per token"),
    Metric("health/accuracy_gap", "implicit reward accuracy, training minus validation", "share of pairs"),
    Metric(
        "samples/win_rate", "win rate on a few validation prompts", "share of prompts", better="higher", bounds=SHARE
    ),
    Metric("samples/reward", "reward on a few validation prompts", better="higher"),
    Metric(
        "samples/kl",
        "KL to the reference on a few validation prompts",
        "nats per sequence",
        better="lower",
        bounds=NOT_NEGATIVE,
    ),
    Metric("samples/entropy", "entropy on a few validation prompts", "nats per token", bounds=NOT_NEGATIVE),
    Metric("samples/length", "length on a few validation prompts", "tokens", bounds=NOT_NEGATIVE),
    Metric("exact/tv", "total variation to the optimum", better="lower", bounds=SHARE),
    Metric("exact/kl_optimum", "KL to the optimum", "nats per response", better="lower", bounds=NOT_NEGATIVE),
    Metric("exact/kl_reference", "exact KL to the reference", "nats per response", better="lower", bounds=NOT_NEGATIVE),
    Metric("exact/entropy", "exact entropy", "nats per response", bounds=NOT_NEGATIVE),
    Metric("exact/entropy_optimum", "entropy of the optimum", "nats per response", bounds=NOT_NEGATIVE),
    Metric("exact/mass_outside", "probability outside the data", "probability", bounds=SHARE),
    Metric("prompts/OPPONENT", "prompts compared with OPPONENT", of_policy=False),
    Metric(
        "policy/saved_gap",
        "difference of the saved policy",
        "nats per token",
        better="lower",
        bounds=NOT_NEGATIVE,
        of_policy=False,
    ),
    Metric("policy/step", "step of the evaluated weights", "optimizer steps", of_policy=False),
    Metric("trained/steps", "steps trained", "optimizer steps", bounds=NOT_NEGATIVE, of_policy=False),
    Metric("trained/pairs", "pairs trained", "pairs", bounds=NOT_NEGATIVE, of_policy=False),
    Metric("trained/sampled_tokens", "tokens sampled in training", "tokens", bounds=NOT_NEGATIVE, of_policy=False),
    Metric("trained/changed_share", "weights that training changed", "share of weights", bounds=SHARE, of_policy=False),
    Metric("judge/calls", "judge calls", of_policy=False),
    Metric("judge/cached", "judge answers from cache", of_policy=False),
    Metric("judge/unanswered", "judge calls without an answer", of_policy=False),
    Metric("judge/tokens", "judge tokens", of_policy=False),
    Metric("judge/cost", "judge cost", of_policy=False),
    Metric("judge/NAME", "judge: NAME", of_policy=False),
]


# --- reading it ----------------------------------------------------------------------------------------------------


def find(key: str) -> Metric | None:
    """Return the entry of a metric, or ``None``.

    Args:
        key: Key without ``eval/``, ``train/`` or ``val/``.
    """
    matches = [(len(found), entry) for entry in CATALOGUE if (found := entry.argument(key)) is not None]
    # A single metric comes before a family; of two families, the one that fixes more of the key.
    return min(matches, key=lambda match: match[0])[1] if matches else None


def find_logged(key: str) -> Metric | None:
    """Return the entry of a metric, or ``None``.

    Args:
        key: Key as it is logged, such as ``eval/kl`` or ``exact/entropy``.
    """
    return find(key) or find(key.partition("/")[2])


def comparable(key: str) -> bool:
    """Return whether a metric of different methods is on one scale; a metric without an entry counts as comparable.

    Args:
        key: Key as it is logged, such as ``train/loss``, or without its first part.
    """
    entry = find_logged(key)
    return entry is None or entry.comparable


def label(key: str) -> str:
    """Return the name of a metric for people.

    Args:
        key: Key without ``eval/``, ``train/`` or ``val/``.
    """
    entry = find(key)
    if entry is None:
        return key
    argument = entry.argument(key) or ""
    words = argument.replace("_", " ") if entry.parameter == "NAME" else argument
    return entry.label.replace(entry.parameter, words) if entry.parameter else entry.label


def unit(key: str) -> str:
    """Return the unit of a metric, empty for a pure number.

    Args:
        key: Key without ``eval/``, ``train/`` or ``val/``.
    """
    entry = find(key)
    return "" if entry is None else entry.unit


def title(key: str) -> str:
    """Return the name of a metric as a heading, with a capital first letter.

    Args:
        key: Key without ``eval/``, ``train/`` or ``val/``.
    """
    words = label(key)
    return words[:1].upper() + words[1:]


def rank(key: str) -> tuple[int, str]:
    """Return a sort key that brings metrics into the order of tables; those without an entry come last.

    Args:
        key: Key without ``eval/``, ``train/`` or ``val/``.
    """
    entry = find(key)
    families = [one.family for one in CATALOGUE]
    return (len(families) if entry is None else families.index(entry.family)), key


def shown_in(place: Place) -> list[str]:
    """Return the keys of the single metrics that a place shows, in the order of tables."""
    return [entry.key for entry in CATALOGUE if place in entry.places and not entry.parameter]


def markdown_table() -> str:
    """Render the catalogue as a Markdown table, for the documentation."""
    lines = ["| key | name | unit | better | range |", "|---|---|---|---|---|"]
    for entry in CATALOGUE:
        cells = (f"`{entry.key}`", entry.label, entry.unit, entry.better or "", _range(entry.bounds))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return ""
    return f"{bounds[0]:g} to {bounds[1]:g}" if math.isfinite(bounds[1]) else f"at least {bounds[0]:g}"
