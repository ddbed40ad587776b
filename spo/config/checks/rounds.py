"""Rules about the rounds of an iteration, checked before the first of them begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from spo.config.checks.targets import CheckedParts
from spo.config.nodes import ROUND_SOURCE, listed, select
from spo.records import filenames


def round_problems(cfg: DictConfig, parts: CheckedParts) -> Iterator[str]:
    """Yield why the rounds of an iteration could not be trained; nothing for a run without rounds.

    Args:
        cfg: Composed configuration.
        parts: Parts of the run that ``cfg`` describes.
    """
    if select(cfg, ROUND_SOURCE) is None:
        return
    rounds, rewards = select(cfg, "iteration.rounds"), select(cfg, "iteration.rewards")
    yield from _judge(parts, "" if rounds is None else ", or iteration=spin, which does not need one")
    if rounds is None:  # A single round of an iteration, whose configuration is filled in.
        return
    if select(cfg, f"{ROUND_SOURCE}.prompts") == 0:
        yield f"{ROUND_SOURCE}.prompts=0: a round needs a prompt to train on; set 1 or more, or null for all"
    if rewards is not None and len(rewards) < rounds:
        yield f"iteration.rewards is too short for iteration.rounds={rounds}: give one component for each round"
    yield from _opponents(cfg, rounds)
    yield from _earlier_rewards(cfg, parts, rounds)
    if select(cfg, "iteration.reference") == "first" and getattr(parts.reference, "needs_adapter", False):
        yield (
            "iteration.reference=first: the policy without its adapter is the model before each round, and not the "
            "first one: choose iteration.reference=previous, or reference=frozen"
        )
    declared = getattr(parts.loss, "extra_references", ())
    names = [name for name in select(cfg, "iteration.first_references") or [] if name not in declared]
    if parts.loss is not None and names:
        reads = f"it reads {listed(declared)}" if declared else "it reads none beside the main one"
        yield (
            f"iteration.first_references: method={select(cfg, 'method.name')} does not read the reference {names[0]!r} "
            f"({reads}): choose iteration.first_references=[{','.join(declared)}]"
        )


def _opponents(cfg: DictConfig, rounds: int) -> Iterator[str]:
    """Yield opponents whose names are those of the rounds that later rounds are compared with."""
    earlier = [filenames.round_directory(number) for number in range(rounds)]
    compared = earlier[1:] if select(cfg, "iteration.reference") == "first" else earlier[:1]
    if select(cfg, "iteration.reference") == "first" and select(cfg, "iteration.momentum"):
        compared = [filenames.EXTRAPOLATED]
    for run in (select(cfg, "evaluation.against") or []) if rounds > 1 else []:
        if (name := Path(str(run)).expanduser().resolve().name) in compared:
            yield (
                f"evaluation.against: {run} has the name of a run that the iteration itself compares its rounds with "
                f"({name}): leave it out, or compare a finished round with it by spo evaluate ROUND "
                f"evaluation.against=[{run}]"
            )


def _judge(parts: CheckedParts, otherwise: str) -> Iterator[str]:
    """Yield why the judge cannot score the completions of a round; ``otherwise`` is a remedy beside another judge."""
    from spo.evaluation.judges.pairwise import PairwiseJudge  # Imports what a wrong command must not wait for.

    source = parts.source
    if source is None or not source.needs_judge or parts.has_problem("judge"):
        return
    if parts.judge is None:
        yield (
            "iteration: a judge scores the completions of a round, and there is none (judge=none, or judge=gold of "
            f"data without a reward): choose judge=MEMBER{otherwise}"
        )
    elif source.pairing.needs_rewards and isinstance(parts.judge, PairwiseJudge):
        yield (
            f"{ROUND_SOURCE}.pairing: {type(source.pairing).__name__} needs rewards, and this judge only compares: "
            "choose judge=reward_model, judge=function, or judge=gold of data with a reward"
        )


def _earlier_rewards(cfg: DictConfig, parts: CheckedParts, rounds: int) -> Iterator[str]:
    """Yield why the loss cannot keep what earlier rounds have aligned."""
    from spo.losses import Loss
    from spo.losses.sequential_po import EARLIER_REWARD

    weights = select(cfg, "iteration.earlier_weights") or ()
    if wrong := [weight for weight in weights if not (isinstance(weight, int | float) and weight >= 0)]:
        yield f"iteration.earlier_weights={wrong[0]}: must be a number of 0 or more"
    if not (isinstance(parts.loss, Loss) and EARLIER_REWARD in parts.loss.features):
        return
    if select(cfg, "iteration.rewards") is None:
        yield (
            "iteration.rewards is not set, and method.loss keeps what earlier rounds have aligned: name a component of "
            "the judge's reward for each round, such as iteration.rewards=[plot,brevity]"
        )
    if len(weights) < rounds - 1:
        yield (
            f"iteration.earlier_weights is too short for iteration.rounds={rounds}: give each round but the last a "
            "weight, by which method.loss keeps its implicit reward"
        )
