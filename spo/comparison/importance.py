"""Importance of the keys of some settings for a metric, by an evaluator of Optuna."""

from __future__ import annotations

import importlib.util
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spo.errors import missing_package
from spo.wording import finite, value_text

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

# Half of these settings is as many as the evaluator needs among the better ones.
MIN_SETTINGS, MIN_SETTINGS_PER_KEY = 12, 4
# The better settings are those of this share. Half is the largest and most stable group that differs from all.
_BETTER_SHARE = 0.5
_SHUFFLES, _CHANCE_SHARE = 100, 0.95
_NOT_SET = "not set"


@dataclass(frozen=True)
class Importance:
    """The importance of a key.

    Attributes:
        key: Key of the configuration.
        share: Importance as a share of that of all keys, from 0 to 1.
        chance: Share that shuffled results reach in 95 of 100 cases, in the same unit.
    """

    key: str
    share: float
    chance: float

    @property
    def beyond_chance(self) -> bool:
        """Return whether the importance is larger than chance explains."""
        return self.share > self.chance


def importance_of_keys(
    settings: Sequence[Mapping[str, Any]], values: Sequence[float], logarithmic: Mapping[str, bool], *, higher: bool
) -> list[Importance] | str:
    """Estimate how important each key is for a metric, with PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255).

    The importance of a key is the divergence of its values among the better half of the settings from its values among
    all of them. The same computation with shuffled values of the metric shows how large it becomes by chance. The
    result depends on nothing but the arguments.

    Args:
        settings: Values of the varied keys of each setting; a setting may lack a key.
        values: Metric of each setting.
        logarithmic: Whether the numbers of a key differ by ratios, by key.
        higher: Whether more of the metric is better.

    Returns:
        The importances, the largest first; or a sentence that states why there are none.
    """
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    needed = max(MIN_SETTINGS, MIN_SETTINGS_PER_KEY * len(keys))
    if len(settings) < needed:
        return f"The importance of {len(keys)} keys needs at least {needed} settings; there are {len(settings)}."
    if importlib.util.find_spec("optuna") is None:
        return f"The importance of the keys is absent: {missing_package('optuna')}."
    if len(set(values)) == 1:
        return "The importance of the keys is absent: all settings have the same value."
    study = _study(settings, {key: _distribution(settings, key, logarithmic[key]) for key in keys})
    # The evaluator looks for small targets.
    targets = [-value if higher else value for value in values]
    found = _evaluate(study, keys, targets)
    total = sum(found.values())
    if not total > 0:
        return "The importance of the keys is absent: the better half of the settings is like all of them."
    orders = (random.Random(seed).sample(targets, len(targets)) for seed in range(_SHUFFLES))
    shuffled = [_evaluate(study, keys, order) for order in orders]
    return sorted(
        (Importance(key, found[key] / total, _quantile([one[key] for one in shuffled]) / total) for key in keys),
        key=lambda one: -one.share,
    )


def _quantile(values: Sequence[float]) -> float:
    return sorted(values)[round(_CHANCE_SHARE * len(values)) - 1]


def _distribution(settings: Sequence[Mapping[str, Any]], key: str, logarithmic: bool) -> BaseDistribution:
    """Return the range of a key's numbers, or the choice of its names."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    values = [setting[key] for setting in settings if key in setting]
    numbers = [number for value in values if (number := finite(value)) is not None]
    if len(numbers) < len(values) or len(set(numbers)) == 1:
        # A key that only some settings have, with one value, is a choice between that value and none.
        absent = [_NOT_SET] if len(values) < len(settings) else []
        return CategoricalDistribution([*dict.fromkeys(sorted(map(value_text, values))), *absent])
    return FloatDistribution(min(numbers), max(numbers), log=logarithmic)


def _study(settings: Sequence[Mapping[str, Any]], distributions: Mapping[str, BaseDistribution]) -> Study:
    """Make a study in memory with a trial for each setting."""
    import optuna
    from optuna.distributions import CategoricalDistribution

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(before)
    for setting in settings:
        params: dict[str, Any] = {}
        for key, distribution in distributions.items():
            if not isinstance(distribution, CategoricalDistribution):
                params |= {key: float(setting[key])} if key in setting else {}
            elif key in setting or _NOT_SET in distribution.choices:
                params[key] = value_text(setting[key]) if key in setting else _NOT_SET
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions={key: distributions[key] for key in params}, value=0.0
            )
        )
    return study


def _evaluate(study: Study, keys: Sequence[str], targets: Sequence[float]) -> dict[str, float]:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        # Optuna warns that `normalize` is experimental, that small targets count as good, and of keys that are rare.
        warnings.simplefilter("ignore")
        return get_param_importances(
            study,
            evaluator=PedAnovaImportanceEvaluator(target_quantile=_BETTER_SHARE),
            params=list(keys),
            target=lambda trial: targets[trial.number],
            normalize=False,
        )
