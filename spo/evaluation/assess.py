"""Metrics and comparisons of completions of policy and reference on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from torch import nn

from spo.data import EvalPrompt
from spo.data.rows import Text
from spo.evaluation.completions import Draws, draw_together
from spo.evaluation.diversity import distinct_n, distinct_samples, self_bleu
from spo.evaluation.judges import Judge, JudgedPair
from spo.evaluation.judges.base import as_read
from spo.evaluation.settings import EvaluationSettings
from spo.evaluation.winrate import verdict_of_rewards, win_rates
from spo.forward.modes import eval_mode
from spo.forward.speed import Speed
from spo.metrics.catalogue import REFERENCE, REFERENCES
from spo.seeds import derive_seed
from spo.stats import Bootstrap, Resamples

CompletionsCache = Callable[[str, EvaluationSettings, Callable[[], Draws]], Draws]
"""``cache(stage, settings, draw)`` returns completions of stage ``policy`` or ``reference``, and draws missing ones."""
Opponent = Mapping[tuple[str, int], tuple[str, int]]
"""Completion and its number of tokens, by prompt id and sample index. Samples without one are not compared."""


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        metrics: Metrics under ``eval/``.
        samples: One row per sample, as in ``samples.jsonl``.
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def draw_both(
    policy: nn.Module,
    reference: nn.Module,
    stop_ids: Sequence[int],
    pad_token_id: int,
    prompts: Sequence[EvalPrompt],
    settings: EvaluationSettings,
    speed: Speed,
    decode: Callable[[Sequence[int]], str],
    on_progress: Callable[[int], None] = lambda _: None,
    cache: CompletionsCache = lambda _stage, _settings, draw: draw(),
    further: Sequence[nn.Module] = (),
) -> tuple[Draws, Draws]:
    """Return completions of the policy, scored by both models, and completions of the reference.

    The processes of a run share the prompts, and each returns all completions.

    Args:
        policy: Trained model.
        reference: Model that training started from.
        stop_ids: Tokens that end a completion.
        pad_token_id: Token that fills rows up.
        prompts: Prompts of one split.
        settings: Settings of the evaluation.
        speed: Speed settings, resolved for both models.
        decode: Function from the token ids of a completion to its text.
        on_progress: Function to call with the number of sequences that this process has just drawn.
        cache: Cache of completions, so that none is drawn twice.
        further: Models to which the KL of the policy is measured besides, in the order of ``settings.further_kl``.
    """

    def drawn(model: nn.Module, stage: str, own: EvaluationSettings, *others: Any) -> Draws:
        draws = partial(draw_together, model, stage, prompts, own, speed, stop_ids, pad_token_id, decode)
        return cache(stage, own, lambda: draws(on_progress, *others))

    with ExitStack() as modes:
        for model in (policy, reference, *further):
            modes.enter_context(eval_mode(model))
        ours = drawn(policy, "policy", settings, lambda: nullcontext(reference), further)
        return ours, drawn(reference, "reference", settings.of_reference())


def assess(
    prompts: Sequence[EvalPrompt],
    ours: Draws,
    theirs: Draws | None,
    settings: EvaluationSettings,
    judge: Judge | None,
    all_prompts: bool = False,
    opponents: Mapping[str, Opponent] | None = None,
) -> Evaluation:
    """Compare and measure completions.

    Each sample of the policy is compared with every completion of the reference for its prompt. The verdict of a
    sample is the mean of these comparisons. Intervals come from a paired bootstrap over prompts, because comparisons
    of one prompt are not independent. If the prompts are all prompts that exist, only the samples are random, and the
    bootstrap resamples them. Samples that share a completion of the reference would not be independent, so there
    sample ``i`` meets completion ``i`` alone.

    Args:
        prompts: Prompts of the completions.
        ours: Completions of the policy.
        theirs: Completions of the reference, ``None`` to leave the comparison out.
        settings: Settings of the evaluation.
        judge: Judge of the completions; ``None`` leaves reward and win rate out.
        all_prompts: Whether these prompts are all that exist, and not a sample.
        opponents: Completions of further opponents, by name.

    Returns:
        Metrics and samples. ``kl`` is in nats per sequence, estimated by the token-wise KL along samples of the
        policy, and so is ``kl/NAME`` for each model of ``further_kl`` that scored the completions. ``entropy`` is in
        nats per token, ``entropy_sequence`` in nats per sequence. ``eval/reference/...`` are the same quantities of
        the reference, which are the values before training.
    """
    each, drawn_each = settings.samples_per_prompt, settings.of_reference().samples_per_prompt
    wanted = [(prompt, i) for prompt in prompts for i in range(each)]
    columns: dict[str, Sequence[Any]] = {
        "prompt_id": [prompt.prompt_id for prompt, _ in wanted],
        "split": [prompt.split for prompt, _ in wanted],
        "sample_index": [i for _, i in wanted],
        "prompt": [prompt.text for prompt, _ in wanted],
        "completion": ours.texts,
        "tokens": ours.tokens,
        "logp_policy": ours.logps,
    }
    if ours.other_logps:
        columns["logp_reference"] = ours.other_logps
    # Completions of the reference that a sample meets; the first one is shown beside it.
    met: list[list[int]] = []
    if theirs is not None:
        for place in range(len(prompts)):
            own = range(place * drawn_each, (place + 1) * drawn_each)
            met += [[own[i]] if all_prompts else [*own[i % drawn_each :], *own[: i % drawn_each]] for i in range(each)]
        columns["reference_completion"] = [theirs.texts[first] for first, *_ in met]
        columns["reference_tokens"] = [theirs.tokens[first] for first, *_ in met]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    units = range(len(rows)) if all_prompts else [row["prompt_id"] for row in rows]
    bootstrap = Bootstrap(
        confidence=settings.confidence,
        draws=settings.bootstrap_samples,
        seed=derive_seed("bootstrap", settings.seed),
    )
    resamples = bootstrap.resample(units)
    metrics = _summarize(ours, each, each, settings.self_bleu_samples, resamples)
    for name, values in zip(settings.further_kl, zip(*ours.further_kl, strict=True), strict=False):
        metrics |= resamples.mean(values).as_metrics(f"kl/{name}")
    if theirs is not None:
        of_reference = _summarize(theirs, drawn_each, each, settings.self_bleu_samples)
        metrics |= {f"reference/{key}": value for key, value in of_reference.items()}
    if judge is not None:
        asked = [prompt.messages or prompt.text for prompt, _ in wanted]
        against = {}
        if theirs is not None:
            against[REFERENCE] = [
                _Reply(row, prompt, unit, place, theirs.texts[place], theirs.tokens[place])
                for row, prompt, unit, places in zip(rows, asked, units, met, strict=True)
                for place in places
            ]
        for name, opponent in (opponents or {}).items():
            found = (
                (row, prompt, unit, place, opponent.get((row["prompt_id"], row["sample_index"])))
                for place, (row, prompt, unit) in enumerate(zip(rows, asked, units, strict=True))
            )
            against[name] = [
                _Reply(row, prompt, unit, place, *reply)
                for row, prompt, unit, place, reply in found
                if reply is not None
            ]
        metrics |= _judge_rows(judge, rows, asked, against, REFERENCE in settings.against, bootstrap, resamples)
    return Evaluation({f"eval/{key}": value for key, value in metrics.items()}, rows)


def _summarize(
    drawn: Draws, each: int, compared: int, self_bleu_samples: int, resamples: Resamples | None = None
) -> dict[str, float]:
    """Return the metrics that do not need a judge, with intervals if resamples are given.

    Args:
        drawn: Completions of a model.
        each: Number of its completions per prompt.
        compared: Completions per prompt that measure diversity, which depends on their number. With fewer, the metrics
            of diversity are left out.
        self_bleu_samples: Number of completions for self-BLEU.
        resamples: Resamples of the prompts; ``None`` for no intervals.
    """
    means: dict[str, tuple[Sequence[float], Sequence[float] | None]] = {
        "kl": (drawn.kl, None),
        "entropy": (drawn.entropy, drawn.tokens),
        "entropy_sequence": (drawn.entropy, None),
        "length": (drawn.tokens, None),
    }
    summary: dict[str, float] = {}
    for name, (values, per) in means.items():
        if values and resamples is not None:
            summary |= resamples.mean(values, per).as_metrics(name)
        elif values:
            summary[name] = sum(values) / (len(values) if per is None else sum(per))
    if each < compared:
        return summary
    groups = [drawn.texts[first : first + compared] for first in range(0, len(drawn.texts), each)]
    texts = [text for group in groups for text in group]
    summary["distinct_2"] = distinct_n(texts, 2)
    summary["self_bleu"] = self_bleu(texts[:self_bleu_samples])
    if compared > 1:
        summary["distinct_samples"] = distinct_samples(groups)
    return summary


@dataclass
class _Reply:
    """Completion of an opponent for a row of the policy, with its reward and verdict.

    Attributes:
        row: Row of the policy's sample.
        prompt: Prompt of the row as the judge is given it: text, or messages.
        unit: Unit of the bootstrap that the row belongs to.
        place: Place of the completion among all of the opponent; several rows may meet the same one.
        completion: Completion of the opponent.
        tokens: Length of the completion in tokens.
        reward: Reward of the completion, ``None`` if the judge only compares.
        verdict: 1 if the policy is better, 0 if the opponent is, 0.5 for a tie, ``None`` if there is no answer.
    """

    row: dict[str, Any]
    prompt: Text
    unit: Hashable
    place: int
    completion: str
    tokens: int
    reward: float | None = None
    verdict: float | None = None


def _judge_rows(
    judge: Judge,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[Text],
    against: Mapping[str, Sequence[_Reply]],
    with_reference: bool,
    bootstrap: Bootstrap,
    resamples: Resamples,
) -> dict[str, float]:
    """Ask the judge, write rewards and verdicts into the rows, and return their metrics."""
    scores = judge.scores(prompts, [row["completion"] for row in rows]) or {}
    metrics = {_reward_key(name): fmean(values) for name, values in scores.items()}
    if scores:
        metrics |= resamples.mean(scores["reward"]).as_metrics("reward")
    for row, reward in zip(rows, scores.get("reward", ()), strict=False):
        row["reward"] = reward
    for opponent, replies in against.items():
        if not replies:
            continue
        is_reference = opponent == REFERENCE
        theirs = _score(judge, replies)
        if is_reference:
            metrics |= {f"reference/{_reward_key(name)}": fmean(values) for name, values in theirs.items()}
        if not is_reference or with_reference:
            _set_verdicts(judge, replies)
            longer = [one.row["tokens"] - one.tokens for one in replies]
            rates = win_rates([one.verdict for one in replies], longer, [one.unit for one in replies], bootstrap)
            under = "win_rate" if is_reference else f"win_rate/{opponent}"
            metrics |= {key.replace("win_rate", under, 1): value for key, value in rates.items()}
        _write_answers(replies, opponent, is_reference, with_verdicts=not is_reference or with_reference)
        if not is_reference:
            metrics[f"prompts/{opponent}"] = float(len({one.row["prompt_id"] for one in replies}))
    return metrics


def _score(judge: Judge, replies: Sequence[_Reply]) -> Mapping[str, Sequence[float]]:
    """Set the rewards of an opponent's completions, each of which is scored once, and return all scores."""
    distinct = {one.place: one for one in replies}
    scored = list(distinct.values())
    scores = judge.scores([one.prompt for one in scored], [one.completion for one in scored]) or {}
    rewards = dict(zip(distinct, scores.get("reward", ()), strict=False))
    for one in replies:
        one.reward = rewards.get(one.place)
    return scores


def _write_answers(replies: Sequence[_Reply], opponent: str, is_reference: bool, with_verdicts: bool) -> None:
    """Write the completions of an opponent, their rewards and their verdicts into the rows that met them."""
    of_row: dict[int, list[_Reply]] = {}
    for one in replies:
        of_row.setdefault(id(one.row), []).append(one)
    for met in of_row.values():
        row = met[0].row
        answers = [
            {"completion": one.completion, "tokens": one.tokens}
            | ({"verdict": one.verdict} if with_verdicts else {})
            | ({} if one.reward is None else {"reward": one.reward})
            for one in met
        ]
        if not is_reference:
            row.setdefault("opponents", {})[opponent] = answers[0]
            continue
        if with_verdicts:
            answered = [one.verdict for one in met if one.verdict is not None]
            row["verdict"] = fmean(answered) if answered else None
        if met[0].reward is not None:
            row["reference_reward"] = met[0].reward
        if len(met) > 1:
            row[REFERENCES] = answers


def _set_verdicts(judge: Judge, replies: Sequence[_Reply]) -> None:
    """Set the verdicts: from the rewards if all are known, else from the comparisons of the judge."""
    if all(one.reward is not None for one in replies):
        for one in replies:
            one.verdict = verdict_of_rewards(one.row["reward"], one.reward)  # type: ignore[arg-type]
        return
    asked = [JudgedPair(as_read(one.prompt), one.row["completion"], one.completion) for one in replies]
    for one, verdict in zip(replies, judge.verdicts(asked), strict=True):
        one.verdict = verdict


def _reward_key(name: str) -> str:
    return name if name == "reward" else f"reward/{name}"
