"""The exact distance of a policy to the optimum of its objective, logged during training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from spo.exact.optimum import Objective, Optimum, beyond_enumeration, find_optimum, total_variation
from spo.exact.world import World
from spo.module import AlignmentModule
from spo.ops import entropy, kl


class ExactMetrics(Callback):
    """Log ``exact/...`` at step 0 and at every log step: means over prompts, by enumeration in float64.

    ``exact/entropy`` (nats per response), ``exact/kl_reference`` (KL(policy || reference), nats) and
    ``exact/mass_outside`` (probability of responses that never appear in the data). Where the objective has a single
    minimum also ``exact/tv`` and ``exact/kl_optimum`` (total variation to it, KL(policy || optimum)) and
    ``exact/entropy_optimum``. With a schedule the optimum is that of the coefficients in force at the step. There is
    no optimum if the regularizer is another divergence than KL(policy || reference) over all responses, or if the loss
    reads more than the log-probs of responses under the policy and a reference that stays as it is.

    Args:
        world: Language and rows.
        reference: ``(P, R)`` log pi_ref.
        uniform: Whether the rows stand for uniform draws from all responses.
    """

    def __init__(self, world: World, reference: Tensor, uniform: bool) -> None:
        self.world, self.reference, self.uniform = world, reference, uniform
        self._optima: dict[tuple[float, float, float], Optimum | None] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the row of step 0, which no optimizer step precedes."""
        if trainer.sanity_checking:
            self._log(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log a row whenever the module logs one."""
        assert isinstance(pl_module, AlignmentModule)
        if pl_module.is_log_step:
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, AlignmentModule)
        row = {f"exact/{name}": value for name, value in self.measure(module).items()}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)

    def measure(self, module: AlignmentModule) -> dict[str, float]:
        """Return the metrics of the policy as it is."""
        policy = self.world.logps(module.policy)
        found = {
            "entropy": entropy(policy),
            "kl_reference": kl(policy, self.reference),
            "mass_outside": (policy.exp() * ~self.world.support).sum(-1),
        }
        optimum = self.optimum(module)
        if optimum is not None:
            found |= {
                "tv": total_variation(policy, optimum.logps),
                "kl_optimum": kl(policy, optimum.logps),
                "entropy_optimum": entropy(optimum.logps),
            }
        return {name: float(value.mean()) for name, value in found.items()}

    def optimum(self, module: AlignmentModule) -> Optimum | None:
        """Return where the module's objective is least at its present step, or ``None`` if that is unknown."""
        alpha, beta = module.alpha(module.global_step), module.beta(module.global_step)
        kl_weight = module.regularizer.kl_weight(beta)
        if kl_weight is None or beyond_enumeration(module.loss, module.reference) is not None:
            return None
        key = (alpha, beta, kl_weight)
        if key not in self._optima:
            self._optima[key] = find_optimum(
                Objective(module.loss, self.world, self.reference, *key, uniform=self.uniform)
            )
        return self._optima[key]
