"""Figures of the settings that were tried: a list, a map, or parallel coordinates, by the number of varied keys."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from spo.comparison.choice import Setting, better, short_key, value_order
from spo.comparison.compare import Comparison, Method
from spo.comparison.importance import Importance, importance_of_keys
from spo.metrics.catalogue import label
from spo.pages.charts import (
    NOT_SET,
    Amount,
    KeyAxis,
    Tile,
    Tried,
    Whisker,
    amounts,
    key_axis,
    over_key,
    parallel,
    tiles,
    whiskers,
)
from spo.pages.comparison_figures import final, hues
from spo.wording import number, value_text

# A list of more settings, or a map of more columns, is not readable.
_MAX_LISTED, _MAX_COLUMNS = 16, 8
# Share of the cells of a map that must have a setting.
_FILLED = 0.5
_WHY_IMPORTANCE = (
    "How much the values of a key among the better half of the settings differ from those among all settings "
    "(PED-ANOVA of Optuna), as a share of the sum over keys. A mark shows the share that shuffled results reach in 95 "
    "of 100 cases: a faint bar ends before it, and its key may not matter."
)


def settings_chart(comparison: Comparison, method: Method) -> Markup | None:
    """Draw the settings of a method by the metric that they were selected by.

    A few values of one key are a list, and a grid of two keys is a map. All others are parallel coordinates, with a
    chart of the metric over each key, and the importance of the keys if there are three or more.

    Args:
        comparison: Comparison to show.
        method: Method of the settings.

    Returns:
        The chart; ``None`` for a single setting.
    """
    keys = list(dict.fromkeys(key for setting in method.settings for key in setting.values))
    known = [setting for setting in method.settings if setting.selection is not None]
    if len(method.settings) < 2 or comparison.select is None or not known or not keys:
        return None
    if len(keys) == 1 and len(method.settings) <= _MAX_LISTED:
        return _settings_list(comparison, method, keys[0])
    if len(keys) == 2 and _is_grid(method, keys):
        return _settings_map(comparison, method, keys)
    return _settings_of_many_keys(comparison, method, keys)


def _values(method: Method, key: str) -> list[Any]:
    return [setting.values.get(key, NOT_SET) for setting in method.settings]


def _is_grid(method: Method, keys: Sequence[str]) -> bool:
    columns, rows = (len(set(map(value_text, _values(method, key)))) for key in keys)
    return columns <= _MAX_COLUMNS and rows <= _MAX_LISTED and _FILLED * columns * rows <= len(method.settings)


# --- many keys -----------------------------------------------------------------------------------------------------


def _settings_of_many_keys(comparison: Comparison, method: Method, keys: Sequence[str]) -> Markup:
    select, hue = comparison.select or "", hues(comparison)[method.name]
    tried = [_tried(comparison, method, setting, keys) for setting in method.settings]
    axes = [key_axis(short_key(key), _values(method, key)) for key in keys]
    metric = KeyAxis(select, tuple(sorted({one.metric for one in tried if one.metric is not None})))
    parts: list[Markup] = []
    if len(keys) > 1:
        drawn = parallel(axes, metric, tried, hue, upward=better(select) is not False)
        parts.append(Markup('<div class="scroll">{}</div>').format(drawn))
    figure = Markup('<figure><p class="of-section">{} over {}</p>{}</figure>')
    figures = Markup("").join(
        figure.format(select, axis.name, over_key(axis, place, select, tried, hue)) for place, axis in enumerate(axes)
    )
    parts.append(Markup('<div class="over-keys">{}</div>').format(figures))
    if len(keys) > 2:
        parts.append(_importance(comparison, method, axes, keys))
    return Markup('<div class="many-keys">{}</div>').format(Markup("").join(parts))


def _tried(comparison: Comparison, method: Method, setting: Setting, keys: Sequence[str]) -> Tried:
    of_seeds = _of_seeds(comparison, setting)
    return Tried(
        values=[setting.values.get(key, NOT_SET) for key in keys],
        metric=setting.selection,
        description=_describe_setting(comparison, method, setting),
        best=setting is method.best,
        ends=(min(of_seeds), max(of_seeds)) if of_seeds else None,
    )


def _importance(comparison: Comparison, method: Method, axes: Sequence[KeyAxis], keys: Sequence[str]) -> Markup:
    known = [(setting.values, setting.selection) for setting in method.settings if setting.selection is not None]
    found = importance_of_keys(
        [values for values, _ in known],
        [value for _, value in known],
        {key: axis.logarithmic for key, axis in zip(keys, axes, strict=True)},
        higher=better(comparison.select or "") is not False,
    )
    if isinstance(found, str):
        return Markup('<p class="absent importance">{}</p>').format(found)
    drawn = amounts([_amount(one) for one in found], hues(comparison)[method.name], "importance, share of the sum")
    return Markup(
        '<div class="importance"><figure><h4>Importance for {}</h4>{}</figure><p class="caption">{}</p></div>'
    ).format(comparison.select, drawn, _WHY_IMPORTANCE)


def _amount(one: Importance) -> Amount:
    words = "more than chance explains" if one.beyond_chance else "not more than chance explains"
    description = f"{one.key}\nimportance {number(one.share)}\nshuffled results reach {number(one.chance)}: {words}"
    return Amount(short_key(one.key), one.share, one.chance, description, faint=not one.beyond_chance)


# --- one key and two keys ------------------------------------------------------------------------------------------


def _settings_map(comparison: Comparison, method: Method, keys: Sequence[str]) -> Markup:
    across, down = keys
    # By their texts, since a value may be a list.
    columns, rows = (
        list(dict.fromkeys(map(value_text, sorted(_values(method, key), key=value_order)))) for key in (across, down)
    )
    at = {tuple(value_text(setting.values.get(key, NOT_SET)) for key in keys): setting for setting in method.settings}
    known = [setting.selection for setting in method.settings if setting.selection is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    up = better(comparison.select or "") is not False
    cells: list[list[Tile | None]] = []
    for row in rows:
        cells.append([])
        for column in columns:
            setting = at.get((column, row))
            if setting is None or setting.selection is None:
                cells[-1].append(None)
                continue
            share = (setting.selection - low) / (high - low) if high > low else 0.5
            cells[-1].append(
                Tile(
                    number(setting.selection),
                    _describe_setting(comparison, method, setting),
                    share if up else 1 - share,
                    hue=None,
                    ring=setting is method.best,
                )
            )
    return tiles(rows, columns, cells, short_key(down), short_key(across))


def _settings_list(comparison: Comparison, method: Method, key: str) -> Markup:
    rows = []
    for setting in sorted(method.settings, key=lambda one: value_order(one.values.get(key, NOT_SET))):
        if setting.selection is None:
            continue
        of_seeds = _of_seeds(comparison, setting)
        value = value_text(setting.values.get(key, NOT_SET))
        name = f"{short_key(key)} {value}" + (" ✓" if setting is method.best else "")
        description, hue = _describe_setting(comparison, method, setting), hues(comparison)[method.name]
        rows.append(Whisker(name, hue, setting.selection, min(of_seeds), max(of_seeds), description))
    return whiskers(rows, f"{comparison.select}, from the lowest seed to the highest", None, None, compact=True)


def _of_seeds(comparison: Comparison, setting: Setting) -> list[float]:
    return [value for run in setting.runs if (value := run.number(comparison.select or "")) is not None]


def _describe_setting(comparison: Comparison, method: Method, setting: Setting) -> str:
    numbers = {}
    for name in dict.fromkeys((comparison.metric_name, "kl", "entropy")):
        seen = [value for run in setting.runs if (value := final(run, name)) is not None]
        if seen:
            numbers[name] = fmean(seen)
    chosen = "selected · " if setting is method.best else ""
    lines = [f"{label(name)} on the test split {number(value)}" for name, value in numbers.items()]
    selection = f"{comparison.select} {number(setting.selection)}"
    return "\n".join([method.name, f"{chosen}{setting.label} · {len(setting.runs)} seeds", selection, *lines])
