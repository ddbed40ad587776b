"""Objective and space of a search by Optuna, and the problems of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig

from spo.config.coefficients import unused_coefficients
from spo.config.compose import parse, parser
from spo.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SWEEPER_TARGET = "hydra_plugins.spo.OptunaSweeper"
_GOALS = ("maximize", "minimize")
# Keys that decide which coefficients are read. If a search varies one of them, every coefficient may be read.
_DECIDING_KEYS = ("method", "regularizer", "regularizer.weight")


@dataclass(frozen=True)
class Objective:
    """Objective of a search.

    Attributes:
        metric: Key of ``metrics.json``, measured on the selection split.
        direction: ``"maximize"`` or ``"minimize"``.
        constraints: Upper limits of other metrics.
    """

    metric: str
    direction: str
    constraints: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Objective:
        """Read the objective from a node of the configuration."""
        return cls(str(node["metric"]), str(node["direction"]), dict(node.get("constraints") or {}))

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each problem."""
        for key, metric in (("metric", self.metric), *(("constraints", name) for name in self.constraints)):
            if not metric.startswith("val/"):
                yield (
                    f"hydra.sweeper.objective.{key}: {metric} cannot be searched for: settings are chosen on the "
                    "selection split (val/...), so that the test split (eval/...) stays unseen until the result"
                )
        if self.direction not in _GOALS:
            yield f"hydra.sweeper.objective.direction={self.direction}: choose {' or '.join(_GOALS)}"
        for name, most in self.constraints.items():
            if isinstance(most, bool) or not isinstance(most, int | float):
                yield f"hydra.sweeper.objective.constraints: {name}={most}: must be an upper limit of {name}"


@dataclass(frozen=True)
class Space:
    """Overrides of a search.

    Attributes:
        fixed: Overrides of every job.
        varied: Overrides with several values, by key, in Hydra's grammar.
    """

    fixed: list[str]
    varied: dict[str, Override]

    @classmethod
    def of(cls, params: Mapping[str, Any], overrides: Sequence[str], unused: Sequence[str]) -> Space:
        """Read the space from the sweeper's ``params`` and the command line, whose keys replace those of the same name.

        Args:
            params: Ranges and choices by key.
            overrides: Overrides of the command line.
            unused: Coefficients that the method does not read, so that they are not searched.

        Raises:
            UserError: An override cannot be read.
        """
        texts = [*(f"{key}={value}" for key, value in params.items()), *overrides]
        parsed = {one.get_key_element(): one for one in map(parse, texts) if not one.is_hydra_override()}
        varied = {key: one for key, one in parsed.items() if one.is_sweep_override()}
        if not any(key in _DECIDING_KEYS for key in varied):
            parsed = {key: one for key, one in parsed.items() if key.partition(".")[0] not in unused}
            varied = {key: one for key, one in varied.items() if key in parsed}
        fixed = [f"{key}={one.get_value_element_as_str()}" for key, one in parsed.items() if key not in varied]
        return cls(fixed, varied)

    def ends(self, key: str) -> list[str]:
        """Return both ends of a key's range, or every choice."""
        override = self.varied[key]
        value = override.value()
        if isinstance(value, IntervalSweep):
            return [str(value.start), str(value.end)]
        values = _choices(override)
        return [values[0], values[-1]] if isinstance(value, RangeSweep) else values

    def corners(self) -> list[list[str]]:
        """Return overrides of jobs in which each key takes each of its :meth:`ends` at least once."""
        ends = {key: self.ends(key) for key in self.varied}
        longest = max(map(len, ends.values()), default=1)
        varied = ([f"{key}={values[i % len(values)]}" for key, values in ends.items()] for i in range(longest))
        return [[*one, *self.fixed] for one in varied]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the distributions that Optuna draws from, by key.

        Raises:
            UserError: A key has an impossible range.
        """
        return {key: _distribution(override) for key, override in self.varied.items()}

    def job(self, values: Mapping[str, Any]) -> list[str]:
        """Return the overrides of the job with these values."""
        return [*(f"{key}={values[key]}" for key in self.varied), *self.fixed]


def _choices(override: Override) -> list[str]:
    override.config_loader = parser().config_loader
    return list(override.sweep_string_iterator())


def _distribution(override: Override) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            start, end, log = value.start, value.end, "log" in value.tags
            assert start is not None and end is not None  # the grammar asks for both
            if isinstance(start, int) and isinstance(end, int):
                return IntDistribution(start, end, log=log)
            return FloatDistribution(start, end, log=log)
        values = _choices(override)
        if isinstance(value, RangeSweep) and not value.shuffle:
            if override.value_type is ValueType.RANGE_SWEEP and isinstance(value.range(), range):
                first, last = sorted((int(values[0]), int(values[-1])))
                return IntDistribution(first, last, step=abs(int(value.step)))
            low, high = sorted((float(values[0]), float(values[-1])))
            return FloatDistribution(low, high, step=abs(float(value.step)))
        return CategoricalDistribution(values)
    except (ValueError, IndexError, HydraException) as error:
        raise UserError(f"{override.input_line}: {error}") from error


def problems(cfg: DictConfig, overrides: Sequence[str]) -> tuple[list[str], Space | None]:
    """Return a sentence for each problem of a search, and its space, ``None`` if that cannot be read.

    Args:
        cfg: Configuration with Hydra's node.
        overrides: Overrides of the command line.
    """
    sweeper = cfg.hydra.sweeper
    found = list(Objective.of(sweeper.objective).problems())
    for key in ("n_trials", "n_jobs"):
        if isinstance(sweeper[key], bool) or not isinstance(sweeper[key], int) or sweeper[key] < 1:
            found.append(f"hydra.sweeper.{key}={sweeper[key]}: must be a whole number of at least 1")
    try:
        space = Space.of(sweeper.params or {}, overrides, unused_coefficients(cfg))
        space.distributions()
    except UserError as error:
        return [*found, str(error)], None
    if not space.varied:
        found.append("hydra.sweeper.params: nothing to search; give a range, such as beta=interval(0.01,1)")
    return found, space
