"""One case of ``spo verify``: a training on an enumerable language, and the check of where it leads."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_method
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from torch import Tensor, nn

from spo.config.checks import check_config
from spo.config.compose import compose
from spo.exact import Objective
from spo.exact.optimum import minimize, total_variation
from spo.exact.papers import Setting
from spo.exact.plain import Responses, descend, frequency_deviation, pull_deviation, with_kl
from spo.guard import NonFiniteError
from spo.module import AlignmentModule
from spo.objective import SampleDivergence
from spo.ops import entropy
from spo.stages.assemble import Parts, assemble
from spo.stages.description import method_name
from spo.stages.from_config import resolve_values
from spo.stages.prepare import Prepared, prepare_run
from spo.types import Sequences

SAMPLED_CHECKS = ("sampled", "sampler")
"""Checks of a quantity that is sampled, by its deviation from the expectation."""


@dataclass(frozen=True)
class Case:
    """One training: a method with one pair of coefficients on one model.

    Attributes:
        member: Member of the config group ``method``.
        model: Member of the config group ``model``.
        check: ``optimum``, ``steps``, ``sampled`` or ``sampler``.
        alpha: Softness, ``None`` if the method does not read it.
        beta: Temperature of the method or weight of the KL, ``None`` if nothing reads it.
        kl_weight: Weight of the KL, 0 without it.
        overrides: All overrides that compose the configuration.
    """

    member: str
    model: str
    check: str
    alpha: float | None
    beta: float | None
    kl_weight: float
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Result of a case.

    Attributes:
        method: Name of the method.
        model: ``tabular`` or ``tiny``.
        check: ``optimum``, ``steps``, ``sampled`` or ``sampler``.
        alpha: Softness, or ``None``.
        beta: Temperature of the method or weight of the KL, or ``None``.
        optimum: ``closed form``, ``numerical`` or ``none``.
        passed: Whether ``tv`` or ``deviation`` is within its limit; ``None`` if the objective does not have a single
            optimum.
        tv: Total variation to the prediction, mean over prompts; ``None`` if it is not finite, if there is no
            prediction, or if the check is of a sampled quantity.
        entropy: Entropy of the trained policy, nats per response.
        entropy_predicted: Entropy of the prediction, nats per response.
        deviation: Largest deviation of a sampled quantity from its expectation, in standard deviations, or ``None``.
    """

    method: str
    model: str
    check: str
    alpha: float | None
    beta: float | None
    optimum: str
    passed: bool | None
    tv: float | None = None
    entropy: float | None = None
    entropy_predicted: float | None = None
    deviation: float | None = None


class Recorder(Callback):
    """A copy of the policy before the first step and after each step, and the samples of each drawing."""

    def __init__(self) -> None:
        self.policies: list[nn.Module] = []
        self.samples: dict[int, Sequences] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Copy the policy before the step."""
        assert isinstance(pl_module, AlignmentModule)
        self.policies.append(copy.deepcopy(pl_module.policy))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keep the samples that were drawn at this step."""
        assert isinstance(pl_module, AlignmentModule)
        if isinstance(pl_module.regularization, SampleDivergence):
            buffer = pl_module.regularization.buffer
            assert buffer.drawn_at is not None
            self.samples.setdefault(buffer.drawn_at, buffer.held)


@dataclass(frozen=True)
class Trial:
    """A case that is composed and ready to train.

    Attributes:
        case: Case.
        cfg: Configuration, resolved.
        plan: Settings of the command.
        prepared: Model and pairs.
        parts: Module, data and trainer.
        responses: Every response as token ids.
        start: Model that training starts from, which is the reference.
    """

    case: Case
    cfg: DictConfig
    plan: DictConfig
    prepared: Prepared
    parts: Parts
    responses: Responses
    start: nn.Module

    @cached_property
    def paper(self) -> Callable[[Tensor], Tensor] | None:
        """Return the loss as its paper writes it, from ``(P, R)`` log-probs, or ``None`` if it is not listed."""
        settings = dict(self.cfg.method.loss)
        name = self.plan.papers.get(settings.pop("_target_"))
        if name is None:
            return None
        language, missing = self.prepared.language, math.nan
        assert language is not None
        setting = Setting(
            torch.from_numpy(language.rewards),
            self.reference,
            self.responses.lengths,
            self.cfg.data.source.list_size,
            missing if self.case.alpha is None else self.case.alpha,
            missing if self.case.beta is None else self.case.beta,
        )
        return partial(get_method(name), setting=setting, **settings)

    @cached_property
    def reference(self) -> Tensor:
        """Return ``(P, R)`` log pi_ref."""
        with torch.no_grad():
            return self.responses.logps(self.start)

    @cached_property
    def loss(self) -> Callable[[Tensor], Tensor]:
        """Return the preference loss of ``(P, R)`` log-probs: the paper's, or the loss itself on every row."""
        exact, module = self.parts.exact, self.parts.module
        assert exact is not None
        alpha, beta = self.case.alpha or 1.0, self.case.beta or 1.0
        # The rows of an unlisted loss are known to be all pairs with exact labels; its own code is the objective.
        own = Objective(module.loss, exact.world, self.reference, alpha, beta, kl_weight=0.0, uniform=True)
        return self.paper or own

    def fit(self, recorder: Recorder | None = None) -> bool:
        """Train, and return whether loss and gradients stayed finite. Divergence is a result and not an error."""
        trainer, module = self.parts.trainer, self.parts.module
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.parts.exact is not None:
            callbacks.remove(self.parts.exact)  # The last step would find the optimum a second time.
        if recorder is not None:
            callbacks.append(recorder)
        try:
            trainer.fit(module, datamodule=self.parts.data)
        except NonFiniteError:
            return False
        return True


def run_case(case: Case, plan: DictConfig, run_dir: Path, cache: Path, config_dir: str | None) -> Verdict:
    """Train one case as ``spo train`` does, and compare it with the prediction.

    Args:
        case: Case.
        plan: Settings of the command.
        run_dir: Folder of the run.
        cache: Folder of the cache.
        config_dir: Folder with further members of the groups.
    """
    composed = compose([*case.overrides, f"paths.cache={cache}"], config_dir=config_dir, run_dir=run_dir)
    check_config(composed)
    cfg = resolve_values(composed)
    seed_everything(cfg.seed, workers=True, verbose=False)
    prepared = prepare_run(cfg)
    assert prepared.language is not None
    trial = Trial(
        case,
        cfg,
        plan,
        prepared,
        assemble(cfg, prepared, []),
        Responses.of(prepared.language, prepared.tokenizer, cfg.data.max_new_tokens),
        prepared.spec.start(prepared.base),
    )
    return CHECKS[case.check](trial)


def check_optimum(trial: Trial) -> Verdict:
    """Train until the optimum is reached, and compare with the optimum."""
    finite = trial.fit()
    exact, module = trial.parts.exact, trial.parts.module
    assert exact is not None
    if trial.paper is None:
        optimum = exact.optimum(module)
        predicted = [] if optimum is None else [optimum.logps]
        found = "none" if optimum is None else optimum.found
    else:
        beta = trial.case.beta or 1.0
        objective = with_kl(trial.paper, trial.reference, trial.case.kl_weight)
        solved = minimize(lambda logits: objective(logits.log_softmax(-1)), trial.reference, beta)
        predicted, found = [] if solved is None else [solved], "none" if solved is None else "numerical"
        alpha = trial.case.alpha or 1.0
        stated = Objective(
            module.loss, exact.world, trial.reference, alpha, beta, trial.case.kl_weight, uniform=True
        ).closed_form()
        if solved is not None and stated is not None:
            # The closed form that the loss states has to agree with the paper's objective too.
            predicted, found = [solved, stated], "closed form"
    return _verdict(trial, finite, predicted, found)


def check_steps(trial: Trial) -> Verdict:
    """Take a few plain steps, and compare with gradient descent on the objective.

    The optimum does not depend on the scale of a gradient, on the cut into micro-batches, or in many cases on
    weights. The path to it does.
    """
    finite = trial.fit()
    objective = with_kl(trial.loss, trial.reference, trial.case.kl_weight)
    steps = trial.cfg.trainer.max_steps
    descended = descend(trial.start, trial.responses, objective, trial.cfg.optimizer.lr, steps)
    with torch.no_grad():
        return _verdict(trial, finite, [trial.responses.logps(descended)], "none")


def check_sampled(trial: Trial) -> Verdict:
    """Take a few plain steps with ``global_kl``, and compare steps and samples with their expectation."""
    recorder, cfg = Recorder(), trial.cfg
    if not trial.fit(recorder):
        return _sampled_verdict(trial, math.inf)
    policies = [*recorder.policies, trial.parts.module.policy]
    pulls = [
        pull_deviation(
            policies[step],
            policies[step + 1],
            policies[step - step % cfg.regularizer.refresh_every],
            trial.start,
            trial.responses,
            trial.loss,
            learning_rate=cfg.optimizer.lr,
            kl_weight=trial.case.kl_weight,
            num_samples=cfg.regularizer.num_samples,
        )
        for step in range(1, cfg.trainer.max_steps)  # At step 0 the policy is the reference: the KL has no gradient.
    ]
    return _sampled_verdict(trial, max(pulls + _frequency_deviations(trial, recorder)))


def check_sampler(trial: Trial) -> Verdict:
    """Take one step, and compare the frequencies of its samples with the probabilities of all responses."""
    recorder = Recorder()
    trial.fit(recorder)
    return _sampled_verdict(trial, max(_frequency_deviations(trial, recorder)))


@torch.no_grad()
def _frequency_deviations(trial: Trial, recorder: Recorder) -> list[float]:
    """Return the deviation of each drawing of samples."""
    return [
        frequency_deviation(trial.responses.counts(samples), trial.responses.logps(recorder.policies[step]))
        for step, samples in recorder.samples.items()
    ]


CHECKS: dict[str, Callable[[Trial], Verdict]] = {
    "optimum": check_optimum,
    "steps": check_steps,
    "sampled": check_sampled,
    "sampler": check_sampler,
}
"""Checks by their names in the plan."""


def _verdict(trial: Trial, finite: bool, predicted: list[Tensor], found: str) -> Verdict:
    """Return the verdict on a policy, with its largest distance to one of the predictions."""
    if not (finite and predicted):
        return Verdict(*_names(trial.case, trial.cfg), optimum=found, passed=None if finite else False)
    with torch.no_grad():
        policy = trial.responses.logps(trial.parts.module.policy)
    tv = max(float(total_variation(policy, logps).mean()) for logps in predicted)
    return Verdict(
        *_names(trial.case, trial.cfg),
        optimum=found,
        passed=tv <= trial.plan.tolerance[trial.case.check][trial.case.model],
        tv=_finite(tv),
        entropy=_finite(float(entropy(policy).mean())),
        entropy_predicted=float(entropy(predicted[0]).mean()),
    )


def _sampled_verdict(trial: Trial, deviation: float) -> Verdict:
    passed = deviation <= trial.plan.max_deviation
    return Verdict(*_names(trial.case, trial.cfg), optimum="none", passed=passed, deviation=_finite(deviation))


def _names(case: Case, cfg: DictConfig) -> tuple[str, str, str, float | None, float | None]:
    return method_name(cfg), case.model, case.check, case.alpha, case.beta


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
