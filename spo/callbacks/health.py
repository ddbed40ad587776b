"""Alarms for a collapsing policy, which losses show only when it is too late."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from spo.bounds import PositiveFloat
from spo.callbacks.trackers import live_trackers
from spo.module import AlignmentModule
from spo.records.files import write_json

log = logging.getLogger(__name__)
Numbers = Mapping[str, float]
TRAINED_ACCURACY = "train/rewards/accuracies"
"""Metric of the training rows that is compared with ``rewards/accuracies`` of a validation."""


@dataclass(frozen=True)
class Check:
    """A quantity that a limit is compared with.

    Attributes:
        value: Function of this validation's metrics and the first one's.
        crossed: Predicate of a value and a limit, true if the value is beyond the limit.
        words: Sentence that names the trouble, with a place for ``{value}``.
    """

    value: Callable[[Numbers, Numbers], float]
    crossed: Callable[[float, float], bool]
    words: str


def _fall(key: str) -> Callable[[Numbers, Numbers], float]:
    return lambda now, start: start[key] - now[key]


def _share(key: str) -> Callable[[Numbers, Numbers], float]:
    return lambda now, start: now[key] / max(start[key], 1e-12)


def _above(value: float, limit: float) -> bool:
    return not value <= limit  # NaN is beyond every limit.


def _below(value: float, limit: float) -> bool:
    return not value >= limit  # NaN is beyond every limit.


CHECKS: Mapping[str, Check] = {
    "chosen_fall": Check(
        _fall("logps_per_token/chosen"), _above, "chosen completions have lost {value:.3g} nats per token"
    ),
    "rejected_fall": Check(
        _fall("logps_per_token/rejected"), _above, "rejected completions have lost {value:.3g} nats per token"
    ),
    "p_eos": Check(
        _share("p_eos"),
        _below,
        "the probability of ending where a chosen completion ends is {value:.3g} times its start",
    ),
    "repetition": Check(
        lambda now, _: now["repetition"], _above, "a share of {value:.3g} of the samples' 4-grams are repetitions"
    ),
    "longer": Check(_share("length"), _above, "samples are {value:.3g} times as long as at the start"),
    "shorter": Check(_share("length"), _below, "samples are {value:.3g} times as long as at the start"),
    "entropy": Check(_share("entropy"), _below, "the entropy per token is {value:.3g} times its start"),
    "kl": Check(lambda now, _: now["kl"], _above, "the KL to the reference is {value:.3g} nats per sequence"),
    "kl_per_token": Check(
        lambda now, _: now["kl"] / max(now["length"], 1.0),
        _above,
        "the KL to the reference is {value:.3g} nats per token of a sample",
    ),
    "overfitting": Check(
        lambda now, _: now[TRAINED_ACCURACY] - now["rewards/accuracies"],
        _above,
        "the implicit reward orders a share of pairs in training that is {value:.3g} above that in validation",
    ),
}


@dataclass(frozen=True)
class Alarm:
    """A limit that was crossed.

    Attributes:
        step: Optimizer step of the validation that first saw it.
        check: Name of the limit.
        value: Value at that step.
        limit: Limit that it crossed.
        words: Message for people.
    """

    step: int
    check: str
    value: float
    limit: float
    words: str


class Health(Callback):
    """Compare each validation with the first one, and warn once for each limit that is crossed.

    Logs ``val/health/logp_drift_chosen`` and ``val/health/logp_drift_rejected`` (nats per token since the start),
    ``val/health/accuracy_gap`` and ``val/health/alarms``, the number of limits that the policy is beyond at that step.
    Alarms are written to ``health.json``, which the report shows. A limit that is ``None`` is not checked.

    The KL has two limits. Nats per sequence grow with the length, so that only a user knows a limit for a data set.
    Nats per token are comparable between data sets, and this limit is on by default.

    Overfitting is measured by accuracies and not by margins. The margin of DPO is in units of 1 / beta, that of IPO is
    pulled to a constant, and that of SPO does not start at zero. An accuracy has the same scale for every method. In
    the first pass over the data, the pairs of a step are unseen, so the gap of a policy that generalizes is near zero.

    Args:
        path: File of the alarms, ``health.json``.
        chosen_fall: Nats per token that the log-prob of chosen completions may lose.
        rejected_fall: Nats per token that the log-prob of rejected completions may lose. Every method lowers it some.
        p_eos: Least P(EOS) where a chosen completion ends, as a share of that at the start.
        repetition: Largest share of 4-grams that are repetitions within their sample.
        longer: Largest mean length of samples, as a multiple of that at the start.
        shorter: Least mean length of samples, as a multiple of that at the start.
        entropy: Least entropy per token, as a share of that at the start.
        kl: Largest KL to the reference, in nats per sequence. The defaults of this limit and the following ones are
            for runs of earlier versions, whose configurations do not have these keys.
        kl_per_token: Largest KL to the reference, in nats per token of a sample.
        overfitting: Largest difference of ``rewards/accuracies``, mean of the training rows since the last validation
            minus that of the selection split.

    Attributes:
        limits: Limits that are checked, by name.
        start: Metrics of the first validation.
        alarms: First alarm of each limit that was crossed.
        trained: Accuracies of the training rows since the last validation.
    """

    def __init__(
        self,
        path: str,
        chosen_fall: PositiveFloat | None,
        rejected_fall: PositiveFloat | None,
        p_eos: PositiveFloat | None,
        repetition: PositiveFloat | None,
        longer: PositiveFloat | None,
        shorter: PositiveFloat | None,
        entropy: PositiveFloat | None,
        kl: PositiveFloat | None = None,
        kl_per_token: PositiveFloat | None = 0.75,
        overfitting: PositiveFloat | None = 0.3,
    ) -> None:
        self.path = Path(path)
        limits = {
            "chosen_fall": chosen_fall,
            "rejected_fall": rejected_fall,
            "p_eos": p_eos,
            "repetition": repetition,
            "longer": longer,
            "shorter": shorter,
            "entropy": entropy,
            "kl": kl,
            "kl_per_token": kl_per_token,
            "overfitting": overfitting,
        }
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        self.start: dict[str, float] = {}
        self.alarms: list[Alarm] = []
        self.trained: list[float] = []
        self._num_shown = 0  # alarms that the trackers of this process have

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the module to be called when a step is complete: a hook for callbacks runs before the module's own."""
        if isinstance(pl_module, AlignmentModule):
            pl_module.step_listeners.append(self._on_step_complete)

    def _on_step_complete(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, AlignmentModule)
        if module.is_log_step and TRAINED_ACCURACY in (logged := trainer.callback_metrics):
            self.trained.append(float(logged[TRAINED_ACCURACY]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the file to the state of the checkpoint: steps after it are repeated, and their alarms with them."""
        if trainer.is_global_zero:
            self._write()
            self._show(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the metrics of the validation that just ended."""
        assert isinstance(pl_module, AlignmentModule)
        now = dict(pl_module.validated)
        if self.trained:
            now[TRAINED_ACCURACY] = fmean(self.trained)
            self.trained = []
        self.start = self.start or dict(now)
        row = {
            f"val/health/logp_drift_{side}": now[key] - self.start[key]
            for side in ("chosen", "rejected")
            if (key := f"logps_per_token/{side}") in now
        }
        if TRAINED_ACCURACY in now and "rewards/accuracies" in now:
            row["val/health/accuracy_gap"] = now[TRAINED_ACCURACY] - now["rewards/accuracies"]
        beyond = self.beyond(now, trainer.global_step)
        row["val/health/alarms"] = float(len(beyond))
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        known = {alarm.check for alarm in self.alarms}
        fresh = [alarm for alarm in beyond if alarm.check not in known]
        self.alarms += fresh
        if fresh and trainer.is_global_zero:
            for alarm in fresh:
                log.warning("step %d: %s", alarm.step, alarm.words)
            self._write()
            self._show(trainer)

    def beyond(self, now: Numbers, step: int) -> list[Alarm]:
        """Return an alarm for each limit that a validation is beyond. Metrics that are absent are not checked."""
        found = []
        for name, limit in self.limits.items():
            check = CHECKS[name]
            try:
                value = check.value(now, self.start)
            except KeyError:
                continue
            if check.crossed(value, limit):
                words = f"{check.words.format(value=value)} (callbacks.health.{name}={limit:g})"
                found.append(Alarm(step, name, value, limit, words))
        return found

    def _show(self, trainer: Trainer) -> None:
        for tracker in live_trackers(trainer):
            for alarm in self.alarms[self._num_shown :]:
                tracker.alert(f"health: {alarm.check}", f"step {alarm.step}: {alarm.words}", alarm.step)
        self._num_shown = len(self.alarms)

    def _write(self) -> None:
        if self.alarms:
            write_json(self.path, [asdict(alarm) for alarm in self.alarms])
        else:
            self.path.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to compare with the same numbers and to repeat no warning."""
        return {
            "start": self.start,
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "trained": list(self.trained),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.start = state_dict["start"]
        self.alarms = [Alarm(**alarm) for alarm in state_dict["alarms"]]
        self.trained = list(state_dict.get("trained", ()))  # checkpoints of version 0.1.0 lack it
