"""Earlier rewards of Sequential Preference Optimization: what finished rounds have aligned, from their policies."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import nn

from spo.batching import by_length
from spo.data import SPLITS, DataError, PreparedPairs, TokenizedPair
from spo.data.encoding import Ids
from spo.errors import UserError, memory_for
from spo.forward.speed import Speed
from spo.losses.sequential_po import EARLIER_REWARD
from spo.models import ModelSpec
from spo.processes import deal, gather, rank
from spo.records import filenames
from spo.records.cache import cached
from spo.records.digests import FORWARD_CODE, code_version, digest, model_digest
from spo.records.files import read_json, read_mapping, write_json
from spo.stages.from_config import eval_device, model_plugins
from spo.types import pad_sequences
from spo.wording import finite

log = logging.getLogger(__name__)
CODE_DEPENDENCIES = (*FORWARD_CODE, "stages/from_config.py", "stages/earlier_rewards.py")
"""Files that cached log-probs depend on, in addition to the models and the tokens."""
LOGPS_FILE = "logps.json"
Scored = tuple[Ids, Ids]
"""Token ids of a prompt and of a completion."""


def earlier_coefficients(weights: Sequence[float], finished: Sequence[Path]) -> list[float]:
    """Return the factor of the implicit reward of each finished round: its weight times the beta that it ended with.

    Args:
        weights: Weight of each round, the first one first; empty where no loss reads earlier rewards.
        finished: Run directories of the finished rounds, the first round of training first.

    Raises:
        UserError: A round does not say which beta it ended with.
    """
    return [weight * _final_beta(run_dir) for weight, run_dir in zip(weights, finished, strict=False)]


def _final_beta(run_dir: Path) -> float:
    """Return the temperature of the implicit reward of a round."""
    file = run_dir / filenames.COEFFICIENTS
    beta = finite((read_mapping(file) or {}).get("beta"))
    if beta is None:
        raise UserError(
            f"{file} is missing or damaged, so the implicit reward of this round is unknown: move the directory of the "
            "round away and run the command again"
        )
    return beta


def with_earlier_rewards(
    cfg: DictConfig,
    spec: ModelSpec,
    pad_token_id: int,
    policies: Sequence[str],
    pairs: PreparedPairs,
    coefficients: Sequence[float],
) -> PreparedPairs:
    """Return the pairs of all splits with the earlier reward of each completion as a number that the loss reads.

    The tokens are those of the pairs, so a completion is scored as training sees it.

    Args:
        cfg: Configuration of the run, resolved.
        spec: Settings for loading models.
        pad_token_id: Token for padding.
        policies: Folders of the first model and of the policy of each finished round, in this order.
        pairs: Data set as tokens, in splits.
        coefficients: Factor of each finished round, see :func:`sequence_rewards`.
    """
    scored = [(pair.prompt_ids, ids) for split in SPLITS for pair in getattr(pairs, split) for ids in pair.completions]
    rewards = sequence_rewards(cfg, spec, pad_token_id, policies, list(dict.fromkeys(scored)), coefficients)

    def with_own(pair: TokenizedPair) -> TokenizedPair:
        own = tuple(rewards[pair.prompt_ids, ids] for ids in pair.completions)
        return replace(pair, numbers={**pair.numbers, EARLIER_REWARD: own})

    train, selection, test = ([with_own(pair) for pair in getattr(pairs, split)] for split in SPLITS)
    return replace(pairs, train=train, selection=selection, test=test)


def sequence_rewards(
    cfg: DictConfig,
    spec: ModelSpec,
    pad_token_id: int,
    policies: Sequence[str],
    sequences: Sequence[Scored],
    coefficients: Sequence[float],
) -> dict[Scored, float]:
    """Return E(y), the weighted sum of the implicit rewards of the finished rounds, of each sequence.

    E(y) = sum_i coefficients[i - 1] * log(pi_i(y|x) / pi_{i-1}(y|x)), where pi_0 is the first model and pi_i the policy
    of round i. Log-probs are sums over all tokens of the completion, with its end token, at temperature 1 and in the
    precision of ``model.dtype``, at least that of float32 after the logits. A policy that does not count is not loaded.

    All processes of a run call this together: they share the batches.

    Args:
        cfg: Configuration of the run, resolved.
        spec: Settings for loading models.
        pad_token_id: Token for padding.
        policies: Folders of the first model and of the policy of each finished round, in this order.
        sequences: Distinct sequences.
        coefficients: Factor of each finished round: its beta, times its weight in the sum.

    Raises:
        ValueError: There is not one coefficient for each finished round.
        DataError: A policy gives no finite log-probability.
    """
    if len(coefficients) != len(policies) - 1:
        raise ValueError(f"{len(policies) - 1} rounds are finished, but there are {len(coefficients)} coefficients")
    rewards = [0.0] * len(sequences)
    logps: dict[int, list[float]] = {}
    for i, coefficient in enumerate(coefficients):
        if coefficient == 0 or not sequences:
            continue
        for policy in (i, i + 1):
            if policy not in logps:
                logps[policy] = _cached_logps(cfg, spec, pad_token_id, policies[policy], sequences)
        before, after = logps.pop(i), logps[i + 1]
        ratios = (b - a for a, b in zip(before, after, strict=True))
        rewards = [reward + coefficient * ratio for reward, ratio in zip(rewards, ratios, strict=True)]
    return dict(zip(sequences, rewards, strict=True))


def _cached_logps(
    cfg: DictConfig, spec: ModelSpec, pad_token_id: int, policy: str, sequences: Sequence[Scored]
) -> list[float]:
    """Return the summed log-prob of each completion under a policy in nats, computed once and cached."""
    key = {
        "code": code_version(*CODE_DEPENDENCIES),
        "policy": model_digest(policy),
        "plugins": model_plugins(cfg),
        "dtype": spec.dtype,
        "attn_implementation": spec.attn_implementation,
        "sequences": digest([[list(prompt), list(completion)] for prompt, completion in sequences]),
    }

    def build(folder: Path | None) -> None:
        if folder is not None:
            log.info("scoring %d completions with the policy of an earlier round", len(sequences))
        with memory_for("scoring completions with an earlier policy", "data.eval_batch_size", "speed.max_logits"):
            model: nn.Module = spec.base(policy).requires_grad_(False)
            found = _logps(cfg, model.to(eval_device(cfg)), pad_token_id, sequences)
        if lost := sum(not math.isfinite(value) for value in found):
            raise DataError(
                f"the policy of an earlier round ({policy}) gives no finite log-probability to {lost} of {len(found)} "
                "completions: look at model.dtype, and at its training"
            )
        if folder is not None:
            write_json(folder / LOGPS_FILE, found, indent=None)

    folder = cached(cfg.paths.cache, "earlier_logps", key, build)
    return [float(value) for value in read_json(folder / LOGPS_FILE)]


@torch.no_grad()
def _logps(cfg: DictConfig, model: nn.Module, pad_token_id: int, sequences: Sequence[Scored]) -> list[float]:
    """Compute the summed log-prob of each completion in batches of similar lengths, which the processes share."""
    device = next(model.parameters()).device
    speed = Speed(**cfg.speed).resolve_for(model)
    parts = by_length([len(prompt) + len(completion) for prompt, completion in sequences], cfg.data.eval_batch_size)

    def score(part: Sequence[int]) -> list[float]:
        batch = speed.arrange(pad_sequences([sequences[i] for i in part], pad_token_id)).to(device)
        found: list[float] = speed.logps(model, batch).tolist()
        return found

    own = [score(part) for part in track(deal(parts), "earlier rewards", transient=True, disable=rank() > 0)]
    logps: dict[int, float] = {}
    for part, values in zip(parts, gather(own), strict=True):
        logps |= zip(part, values, strict=True)
    return [logps[i] for i in range(len(sequences))]
