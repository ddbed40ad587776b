"""Facts in the panel at the start of a run."""

from __future__ import annotations

from lightning.pytorch import Trainer
from omegaconf import DictConfig

from spo.data import PreparedPairs
from spo.data.splits import REPORTED_COUNTS
from spo.exact import ExactMetrics
from spo.metrics.catalogue import unit
from spo.module import AlignmentModule
from spo.ops import entropy
from spo.schedules import Controller, Schedule


def start_facts(
    cfg: DictConfig, module: AlignmentModule, pairs: PreparedPairs, trainer: Trainer, exact: ExactMetrics | None
) -> dict[str, str]:
    """Return what follows from the configuration and is worth knowing before waiting for the result.

    Args:
        cfg: Configuration of the run, resolved.
        module: Alignment module of the run.
        pairs: Preference pairs of the run.
        trainer: Trainer of the run.
        exact: Metrics by enumeration, ``None`` for data that cannot be enumerated.

    Returns:
        Names and values in their order on the panel.
    """
    parameters = list(module.policy.parameters())
    total, trainable = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    counts, train = pairs.counts, pairs.train
    tokens = sum(len(pair.prompt_ids) * len(pair.completions) + sum(map(len, pair.completions)) for pair in train)
    size = min(cfg.data.batch_size, len(train))
    return {
        "policy": f"{total:,} parameters" + ("" if trainable == total else f", {trainable:,} of them trained"),
        "reference": module.reference.describe(),
        "pairs": ", ".join(f"{counts[key]} {key}" for key in REPORTED_COUNTS),
        "splits": f"{counts['train']} train, {counts['selection']} selection, {counts['test']} test pairs",
        "a step": f"{size} pairs, about {tokens * size // len(train):,} tokens",
        "steps": f"{cfg.trainer.max_steps}, {cfg.trainer.max_steps * size / len(train):.1f} epochs",
        "alpha": _describe_schedule(module.alpha) if module.loss.uses_alpha else "not read",
        "beta": _describe_beta(module),
        "devices": f"{trainer.num_devices * trainer.num_nodes} x {trainer.strategy.root_device.type}",
        "run directory": str(cfg.paths.run),
    } | ({} if exact is None else {"optimum": _describe_optimum(module, exact)})


def _describe_optimum(module: AlignmentModule, exact: ExactMetrics) -> str:
    optimum = exact.optimum(module)
    if optimum is None:
        return "none: the data and the objective do not determine a single policy"
    stated = "as the loss states it" if optimum.found == "closed form" else "found numerically"
    return f"{stated}, entropy {float(entropy(optimum.logps).mean()):.4g} nats per response"


def _describe_beta(module: AlignmentModule) -> str:
    regularizer, value = module.regularizer, _describe_schedule(module.beta)
    if module.loss.uses_beta:
        extra = f"; regularizer.weight {regularizer.weight:g}" if regularizer.adds_term else ""
        return f"{value}, of the loss{extra}"
    return f"{value}, weight of the regularizer" if regularizer.follows_beta else "not read"


def _describe_schedule(schedule: Schedule) -> str:
    if not isinstance(schedule, Controller):
        return f"{schedule(0):g}"
    return f"{schedule(0):g}, adjusted to {schedule.watches} {schedule.target:g} {unit(schedule.watches)}"
