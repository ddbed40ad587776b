"""How a policy is watched while it trains: the probe, health numbers, and the controllers of alpha and beta."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from spo.errors import memory_for
from spo.metrics.repetition import repetition
from spo.metrics.sums import SumsAndCounts
from spo.objective import Run, ScoredBatch
from spo.ops import rows_of, sum_per_sequence, token_entropy, token_kl, token_logps
from spo.sampling import eval_mode, is_finished, sample
from spo.schedules import Controller, Schedule
from spo.seeds import derive_seed

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)
PROBE_METRICS = ("kl", "entropy", "length", "repetition", "finished")
HEALTH_METRICS = ("p_eos", "logps_per_token/chosen", "logps_per_token/rejected")
LOSS_SCALE = "alpha * |margin|"
LOSS_SCALE_RANGE = (0.05, 20.0)
"""Range of ``LOSS_SCALE`` in which alpha acts: far below it a loss is linear in the margin, far above it is a hinge."""


@dataclass(frozen=True)
class ProbeSettings:
    """The ``probe`` configuration group, the same for every method.

    Attributes:
        num_prompts: Samples per measurement, one per prompt.
        max_new_tokens: Length limit of a sample, in tokens.
    """

    num_prompts: int
    max_new_tokens: int


class Probe:
    """Measures fresh samples of the policy.

    Args:
        run: Run whose policy is measured.
        settings: Number and length of the samples, or ``None`` to measure nothing.
    """

    def __init__(self, run: Run, settings: ProbeSettings | None) -> None:
        self.run, self.settings = run, settings

    @torch.no_grad()
    def measure(self, prompts: Sequence[Sequence[int]], *seed: object) -> dict[str, float]:
        """Sample completions and return their metrics, which do not depend on the number of processes.

        Args:
            prompts: Token ids of the prompts to choose from.
            seed: Values that name the measurement and, with the run's seed, determine prompts and samples.

        Returns:
            ``kl`` (nats per sequence, if the reference scores samples), ``entropy`` (nats per token), ``length``
            (tokens), ``repetition`` (share of 4-grams that occurred before in their sample) and ``finished`` (share of
            samples that end within the limit). Empty if the probe is off.
        """
        if self.settings is None:
            return {}
        with memory_for("a probe of the policy", "probe.num_prompts", "probe.max_new_tokens"):
            return self._measure(prompts, self.settings, *seed)

    def _measure(self, prompts: Sequence[Sequence[int]], settings: ProbeSettings, *seed: object) -> dict[str, float]:
        run = self.run
        sample_seed = derive_seed("probe", run.seed, *seed)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(sample_seed)).tolist()
        share = range(settings.num_prompts)[run.global_rank :: run.world_size]
        rows = share or range(1)  # Idle ranks sample too: FSDP gathers need every rank.
        samples = sample(
            run.policy,
            [prompts[order[i % len(order)]] for i in rows],
            max_new_tokens=settings.max_new_tokens,
            temperature=1.0,
            stop_ids=run.prompts.stop_ids,
            pad_token_id=run.prompts.pad_token_id,
            seeds=[derive_seed(sample_seed, i) for i in rows],
            sampler=run.speed.sampler,
        )
        samples = run.speed.arrange(samples.to("cpu")).to(run.device)
        with eval_mode(run.policy):
            logits = run.speed.logits(run.policy, samples)
            found: dict[str, Tensor] = {"entropy": token_entropy(logits)}
            if run.reference.scores_samples:
                with run.reference.active(run.policy) as reference:
                    reference_logits = run.speed.logits(reference, samples)
                found["kl"] = sum_per_sequence(token_kl(logits, reference_logits), samples)
        found["length"] = samples.completion_length
        found["finished"] = is_finished(samples, run.prompts.stop_ids).float()
        found["repetition"] = torch.tensor([repetition(ids) for ids in samples.completions()])
        means = SumsAndCounts(PROBE_METRICS).to(run.device)
        if share:
            means.update(found)
        return means.compute()


class Controllers:
    """The schedules that adjust themselves to what the probe measures.

    Args:
        schedules: Schedules that the composition reads, by coefficient; those that are not controllers are skipped.
    """

    def __init__(self, schedules: Mapping[str, Schedule]) -> None:
        self.by_name = {name: item for name, item in schedules.items() if isinstance(item, Controller)}

    @property
    def metrics(self) -> list[str]:
        """Return the names of the metrics that :meth:`adjust` returns."""
        return [f"{name}/{key}" for name, item in self.by_name.items() for key in (item.watches, "at_bound")]

    def are_due(self, step: int) -> bool:
        """Return whether a controller needs a measurement at an optimizer step."""
        return any(step % controller.every == 0 for controller in self.by_name.values())

    def adjust(self, measured: Mapping[str, float], step: int) -> dict[str, float]:
        """Adjust the coefficients that are due at an optimizer step.

        Args:
            measured: Metrics of the probe.
            step: Optimizer steps taken so far.

        Returns:
            What each of them watched, and 1 if it is at a bound, else 0.
        """
        metrics: dict[str, float] = {}
        for name, controller in self.by_name.items():
            if step % controller.every != 0:
                continue
            was_saturated, value = controller.saturated, measured[controller.watches]
            controller.observe(value)
            metrics |= {f"{name}/{controller.watches}": value, f"{name}/at_bound": float(controller.saturated)}
            if controller.saturated and not was_saturated:
                _warn_of_bound(name, controller, value, step)
        return metrics

    def state_dict(self) -> dict[str, dict[str, float | bool]]:
        """Return what an exact resume needs."""
        return {name: controller.state_dict() for name, controller in self.by_name.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, float | bool]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, controller in self.by_name.items():
            controller.load_state_dict(state[name])


@rank_zero_only
def _warn_of_bound(name: str, controller: Controller, measured: float, step: int) -> None:
    bound = "min" if controller.value == controller.min else "max"
    log.warning(
        f"{name} stands at its bound {name}.{bound}={controller.value:g} from step {step} on: "
        f"{controller.watches} is {measured:.4g} there, and its target is {controller.target:g}"
    )


def completion_health(scored: ScoredBatch, stop_ids: Sequence[int]) -> dict[str, Tensor]:
    """Measure what a collapse shows in first.

    Args:
        scored: Batch as the policy sees it.
        stop_ids: Tokens that end a completion.

    Returns:
        ``p_eos`` (probability of all stop tokens together where a chosen completion ends) and
        ``logps_per_token/{chosen,rejected}`` (nats), one value per completion and NaN for one that does not count.
        Labelled completions are chosen if they are desirable, and else rejected.
    """
    batch = scored.batch
    sequences, mask = batch.sequences, batch.mask()
    per_token = batch.per_completion(scored.policy_logps / sequences.completion_length)
    # A truncated completion does not end in a stop token.
    ends = batch.per_completion(is_finished(sequences, stop_ids))[0]
    desirable = torch.ones_like(ends) if batch.label is None else batch.label > 0.5
    last = batch.per_completion(sequences.completion_length.cumsum(0) - 1)[0]
    logits = rows_of(scored.policy, last)
    stop_logps = [token_logps(logits, torch.full_like(last, stop)) for stop in stop_ids]
    rejected = torch.cat([~desirable[None], mask[1:]])
    # Masked and not indexed: the number of completions that count is not known before the device has computed it.
    return {
        "p_eos": torch.stack(stop_logps).logsumexp(0).exp().masked_fill(~(ends & desirable), torch.nan),
        "logps_per_token/chosen": per_token[0].masked_fill(~desirable, torch.nan),
        "logps_per_token/rejected": per_token.masked_fill(~rejected, torch.nan),
    }


@rank_zero_only
def warn_of_loss_scale(scale: float, alpha: float) -> None:
    """Warn if alpha times a pair's margin is far from order one, where the value of alpha hardly matters."""
    low, high = LOSS_SCALE_RANGE
    if not low <= scale <= high:
        log.warning(
            "alpha=%g times the margin of a pair starts at %.3g on average, far from order one: %s",
            alpha,
            scale,
            "it is small, and the loss hardly bends" if scale < low else "it is large, and most pairs are decided",
        )
