"""Dashboards: one yaml file of sections and panels, which report.html and W&B both draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Discriminator, Field, FiniteFloat, Tag, TypeAdapter, ValidationError

from spo.errors import UserError
from spo.metrics.catalogue import SHARE, Place, comparable, find, find_logged, label, shown_in, title
from spo.records.run import RunRecord
from spo.resources import conf_dir

DEFAULT = "alignment"
SPLITS = ("train", "val")
SCHEDULES = ("alpha", "beta")


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("there must be at least one")
    return values


def _increasing(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] < bounds[1]:
        raise ValueError("the first must be below the second")
    return bounds


Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], AfterValidator(_not_empty)]
Bounds = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_increasing)]


@dataclass(frozen=True)
class _Node:
    """Part of the file, in which an unknown key is an error."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Curves(_Node):
    """Lines over the training step.

    Attributes:
        title: Heading of the panel.
        metrics: Keys of the metrics that share the axes, without their split.
        splits: First parts of the keys: ``train``, ``val``, ``exact`` or ``time``.
        bounds: Fixed range of the vertical axis; ``None`` for one that fits.
        baseline: Height of a line to compare with; ``None`` for no line.
        varying: Whether to leave out a curve that never changes.
    """

    title: Text
    metrics: Names
    splits: Names = ("train", "val")
    bounds: Bounds | None = None
    baseline: FiniteFloat | None = None
    varying: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of ``history.jsonl`` and of W&B, such as ``train/loss``."""
        return tuple(f"{split}/{metric}" for metric in self.metrics for split in self.splits)


@dataclass(frozen=True)
class Bars(_Node):
    """Final numbers, one bar per run.

    Attributes:
        title: Heading of the panel.
        final: Keys of ``metrics.json``.
        bounds: Fixed range of the axis; ``None`` for one that fits.
        baseline: Value to compare with; ``None`` for no value.
    """

    title: Text
    final: Names
    bounds: Bounds | None = None
    baseline: FiniteFloat | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of ``metrics.json`` and of W&B's summary."""
        return self.final


@dataclass(frozen=True)
class Scatter(_Node):
    """Two final numbers against each other, one point per run.

    Attributes:
        title: Heading of the panel.
        x: Key of ``metrics.json`` on the horizontal axis.
        y: Key of ``metrics.json`` on the vertical axis.
    """

    title: Text
    x: Text
    y: Text

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of ``metrics.json`` and of W&B's summary."""
        return self.x, self.y


@dataclass(frozen=True)
class EachMetric(_Node):
    """One panel of final numbers for each metric that a place shows, by the catalogue of metrics.

    Attributes:
        each: Place of the catalogue, such as ``comparison``.
    """

    each: Place

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of ``metrics.json`` and of W&B's summary."""
        return tuple(f"eval/{key}" for key in shown_in(self.each))

    def bars(self) -> Iterator[Bars]:
        """Make the panels, with names and ranges from the catalogue."""
        for key in shown_in(self.each):
            metric = find(key)
            bounds = metric.bounds if metric is not None and metric.bounds == SHARE else None
            # A neutral value of zero is where bars start anyway.
            baseline = (metric.neutral if metric is not None else None) or None
            yield Bars(title(key), (f"eval/{key}",), bounds, baseline)


@dataclass(frozen=True)
class Coordinates(_Node):
    """Settings as lines through parallel axes: one for each configuration key, and one for a final number.

    Attributes:
        title: Heading of the panel.
        parallel: Configuration keys in the order of their axes, such as ``alpha.value``.
        metric: Key of ``metrics.json`` on the last axis.
        logarithmic: Those of the keys whose axes are logarithmic.
    """

    title: Text
    parallel: Names
    metric: Text
    logarithmic: tuple[Text, ...] = ()

    def __post_init__(self) -> None:
        """Check that each logarithmic axis is one of the axes."""
        unknown = [key for key in self.logarithmic if key not in self.parallel]
        if unknown:
            raise ValueError(f"logarithmic: {', '.join(unknown)} is not one of the keys in parallel")

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the key of ``metrics.json`` and of W&B's summary."""
        return (self.metric,)


@dataclass(frozen=True)
class KeyImportance(_Node):
    """Importance of the configuration keys for a final number, as W&B estimates it.

    Attributes:
        importance: Key of ``metrics.json``.
    """

    importance: Text

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the key of ``metrics.json`` and of W&B's summary."""
        return (self.importance,)


@dataclass(frozen=True)
class RunTable(_Node):
    """Configurations and final numbers of runs beside each other.

    Attributes:
        runs: ``different`` for the rows in which runs differ, ``all`` for every row.
    """

    runs: Literal["different", "all"]
    keys: ClassVar[tuple[str, ...]] = ()


# The key that only a panel of this kind has in the file.
KINDS = {
    "curves": "metrics",
    "bars": "final",
    "scatter": "x",
    "each": "each",
    "coordinates": "parallel",
    "importance_of": "importance",
    "run_table": "runs",
}


def _kind(node: Any) -> str | None:
    found = [kind for kind, key in KINDS.items() if isinstance(node, dict) and key in node]
    return found[0] if len(found) == 1 else None


Panel = Annotated[
    Annotated[Curves, Tag("curves")]
    | Annotated[Bars, Tag("bars")]
    | Annotated[Scatter, Tag("scatter")]
    | Annotated[EachMetric, Tag("each")]
    | Annotated[Coordinates, Tag("coordinates")]
    | Annotated[KeyImportance, Tag("importance_of")]
    | Annotated[RunTable, Tag("run_table")],
    Discriminator(
        _kind,
        custom_error_type="panel",
        custom_error_message="a panel has either `metrics`, or `final`, or `x` and `y`, or `each`, or `parallel` and "
        "`metric`, or `importance`, or `runs`",
    ),
]


def _expanded(panels: tuple[Panel, ...]) -> tuple[Panel, ...]:
    return tuple(one for panel in panels for one in (panel.bars() if isinstance(panel, EachMetric) else [panel]))


@dataclass(frozen=True)
class Section(_Node):
    """Panels under one heading.

    Attributes:
        title: Heading of the section.
        panels: Panels of the section; those for each metric of a place are written out.
    """

    title: Text
    panels: Annotated[tuple[Panel, ...], AfterValidator(_not_empty), AfterValidator(_expanded)]

    @property
    def curves(self) -> tuple[Curves, ...]:
        """Return the panels that a single run fills."""
        return tuple(panel for panel in self.panels if isinstance(panel, Curves))


@dataclass(frozen=True)
class Dashboard(_Node):
    """A dashboard.

    Attributes:
        title: Title of the dashboard.
        sections: Sections from top to bottom.
    """

    title: Text
    sections: Annotated[tuple[Section, ...], AfterValidator(_not_empty)]

    @cached_property
    def keys(self) -> frozenset[str]:
        """Return the keys of every metric that some panel shows."""
        return frozenset(key for section in self.sections for panel in section.panels for key in panel.keys)

    def with_metrics_of(self, run: RunRecord) -> Dashboard:
        """Return the dashboard with panels for what a run logged beyond it, such as metrics that its loss adds.

        Args:
            run: Run. Its metrics of training and validation get curves, and those of the test split get bars too.
        """
        known = {metric for section in self.sections for curves in section.curves for metric in curves.metrics}
        keys = dict.fromkeys(key.partition("/") for row in run.history for key in row)
        logged = dict.fromkeys(name for split, _, name in keys if split in SPLITS and name not in {*known, *SCHEDULES})
        if not logged:
            return self
        final = [name for name in logged if run.metric(f"eval/{name}") is not None and f"eval/{name}" not in self.keys]
        curves = [Curves(label(name), (name,)) for name in logged]
        bars = [Bars(label(name), (f"eval/{name}",)) for name in final]
        return replace(self, sections=(*self.sections, Section("Further curves", (*curves, *bars))))


def is_comparable(panel: Panel) -> bool:
    """Return whether a panel may show runs of several methods on its axes."""
    return all(comparable(key) for key in panel.keys)


def unit_of(key: str) -> str:
    """Return the unit of a metric with its split, such as ``eval/kl``; empty for a pure number."""
    entry = find_logged(key)
    return "" if entry is None else entry.unit


def load_spec(spec: str | Path | None = None) -> Dashboard:
    """Read a dashboard.

    Args:
        spec: Name of a shipped dashboard (``conf/dashboard/NAME.yaml``), or a file; ``None`` for the default.

    Raises:
        UserError: If there is no such file, or it is not a dashboard; every problem is named.
    """
    file = _file(spec or DEFAULT)
    try:
        return TypeAdapter(Dashboard).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [f"  - {_place(one['loc'])}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()]
        raise UserError("\n".join([f"{file} is not a dashboard:", *lines])) from error


def _file(spec: str | Path) -> Path:
    folder = conf_dir() / "dashboard"
    for file in (folder / f"{spec}.yaml", Path(spec)):
        if file.is_file():
            return file
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise UserError(f"there is no dashboard {spec}: give a yaml file, or one of {names}")


def _place(parts: tuple[int | str, ...]) -> str:
    """Write a position in the file, such as ``sections[0].panels[2].title``."""
    # Pydantic adds the kind of a panel, which is not written in the file.
    words = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts if part not in KINDS)
    return words.lstrip(".") or "the file"
