"""Facts in the panel at the start of a run."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from spo.batching import steps_per_epoch
from spo.data import PreparedPairs
from spo.exact import ExactMetrics, why_no_optimum
from spo.metrics.catalogue import unit
from spo.module import AlignmentModule
from spo.ops import entropy
from spo.schedules import Controller, Schedule
from spo.schedules.optimization import LORA_FACTOR, learning_rate, warmup_steps


def start_facts(
    cfg: DictConfig,
    module: AlignmentModule,
    pairs: PreparedPairs,
    trainer: Trainer,
    exact: ExactMetrics | None,
    references: Mapping[str, str],
) -> dict[str, str]:
    """Return what follows from the configuration and is worth knowing before waiting for the result.

    Args:
        cfg: Configuration of the run, resolved.
        module: Alignment module of the run.
        pairs: Preference pairs of the run.
        trainer: Trainer of the run.
        exact: Metrics by enumeration, ``None`` for data that cannot be enumerated.
        references: What the configuration gives as further references, by name.

    Returns:
        Names and values in their order on the panel.
    """
    described = ", ".join(f"{name} ({path})" for name, path in references.items())
    parameters = list(module.policy.parameters())
    total, trainable = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    counts, train = pairs.counts, pairs.train
    tokens = sum(len(pair.prompt_ids) * len(pair.completions) + sum(map(len, pair.completions)) for pair in train)
    size, steps = min(cfg.data.batch_size, len(train)), cfg.trainer.max_steps
    per_epoch = steps_per_epoch(len(train), cfg.data.batch_size)
    # Pairs are read as two rows each by a loss of labelled completions.
    rows, unit = ("pairs", "pairs") if train[0].label is None else ("rows", "completions")
    return {
        "policy": f"{total:,} parameters" + ("" if trainable == total else f", {trainable:,} of them trained"),
        "reference": module.reference.describe(),
        **({"more references": described} if described else {}),
        rows: ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in pairs.reported_counts.items()),
        "splits": f"{counts['train']} train, {counts['selection']} selection, {counts['test']} test {unit}",
        "a step": f"{size} {unit}, about {tokens * size // len(train):,} tokens",
        "steps": f"{steps:,}, {steps / per_epoch:.3g} epochs, about {tokens * steps // per_epoch:,} tokens",
        **_describe_rate(cfg),
        "alpha": _describe_schedule(module.alpha) if module.loss.uses_alpha else "not read",
        "beta": _describe_beta(module),
        **_describe_samples(module),
        "devices": f"{trainer.num_devices * trainer.num_nodes} x {trainer.strategy.root_device.type}",
        "run directory": str(cfg.paths.run),
    } | ({} if exact is None else {"optimum": _describe_optimum(module, exact)})


def _describe_rate(cfg: DictConfig) -> dict[str, str]:
    """Return the learning rate with its reason, and the warm-up, of an optimizer and a schedule that have them."""
    rate, default = (OmegaConf.select(cfg, key) for key in ("optimizer.lr", "model.default_lr"))
    size, warmup = (OmegaConf.select(cfg, key) for key in ("model.num_parameters", "scheduler.num_warmup_steps"))
    facts = {}
    if rate is not None:
        reason = "model.default_lr" if rate == default else "given"
        lora = OmegaConf.select(cfg, "model.lora") is not None
        if size is not None:
            by_size = f"by {_short(size)} parameters" + (f", times {LORA_FACTOR} for an adapter" if lora else "")
            reason = by_size if rate == learning_rate(size, lora) else "given"
        facts["learning rate"] = f"{rate:g}, {reason}"
    if warmup is not None:
        steps = cfg.trainer.max_steps
        facts["warm-up"] = f"{warmup_steps(warmup, steps):,} of {steps:,} steps"
    return facts


def _short(number: int) -> str:
    """Return a number as it stands in the names of models, such as 135M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _describe_optimum(module: AlignmentModule, exact: ExactMetrics) -> str:
    optimum = exact.optimum(module)
    if optimum is None:
        reason = why_no_optimum(module.loss, module.reference)
        return f"none: {reason or 'the data and the objective do not determine a single policy'}"
    stated = "as the loss states it" if optimum.found == "closed form" else "found numerically"
    return f"{stated}, entropy {float(entropy(optimum.logps).mean()):.4g} nats per response"


def _describe_beta(module: AlignmentModule) -> str:
    regularizer, value = module.regularizer, _describe_schedule(module.beta)
    if module.loss.uses_beta:
        extra = f"; regularizer.weight {regularizer.weight:g}" if regularizer.adds_term else ""
        return f"{value}, of the loss{extra}"
    return f"{value}, weight of the regularizer" if regularizer.follows_beta else "not read"


def _describe_samples(module: AlignmentModule) -> dict[str, str]:
    """Return the prompts that the regularizer samples for, where they are not those of the training split."""
    chosen, count = module.regularizer.prompts, len(module.prompts.regularizer)
    return {} if chosen == "train" else {"KL on": f"samples for {count} prompts of {chosen}"}


def _describe_schedule(schedule: Schedule) -> str:
    if not isinstance(schedule, Controller):
        return f"{schedule(0):g}"
    return f"{schedule(0):g}, adjusted to {schedule.watches} {schedule.target:g} {unit(schedule.watches)}"
