"""The page ``report.html`` of an iteration, made from its ledger and the files of its rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from spo.metrics.catalogue import label, title, unit
from spo.metrics.rounds import ROUND_OPPONENTS, Measured, RoundMetrics, RoundOpponent, round_metrics
from spo.pages.charts import RoundSeries, marker, rounds_chart
from spo.pages.run_page import TEMPLATES
from spo.pages.selfcontained import write_selfcontained
from spo.records import filenames
from spo.records.files import flatten, load_yaml, read_mapping
from spo.records.iteration import Iteration, Round, read_iteration
from spo.wording import number, value_text

OPPONENT_NAMES: dict[RoundOpponent, str] = {
    "previous": "the previous round",
    "first": "the first model",
    "data": "the data",
}
FIRST_KL = "kl/the first model"
"""Key of the KL to the first model, by which the catalogue gives it a label."""
_HUES = {"previous": 1, "first": 2, "data": 3}
_HUE = 4
_COEFFICIENTS = ("alpha.", "beta.")
# Settings of an iteration that are filled in for each round, or that the other table shows.
_NOT_SHOWN = frozenset(
    [
        "_target_",
        "earlier_coefficients",
        "first",
        "first_step",
        "name",
        "policies",
        "round",
        "rounds",
        "seed",
        "source",
        "splits",
    ]
)
_TRAINING = {
    "method": ("method.name", "method.loss._target_"),
    "alpha": ("alpha.value", "alpha._target_"),
    "beta": ("beta.value", "beta._target_"),
    "steps per round": ("trainer.max_steps",),
    "learning rate": ("optimizer.lr",),
    "data": ("data.path", "choices.data", "data.name"),
    "model": ("choices.model", "model.name"),
    "judge": ("judge.path", "judge.model", "choices.judge", "judge._target_"),
    "seed": ("seed",),
}
"""Facts about the training of each round, by the keys of the configuration that may hold them, the best key first."""


def render_iteration(directory: Path) -> Path:
    """Write ``report.html`` into the directory of an iteration, finished or not, over an earlier page.

    The page depends on the files alone: rendered twice, it has the same bytes.

    Args:
        directory: Directory of the iteration, with ``iterate.json`` and the run directories of its rounds.

    Returns:
        The path of the page.

    Raises:
        NotAnIterationError: The directory does not hold an iteration, or its ledger is damaged.
    """
    directory = Path(directory)
    iteration = read_iteration(directory)
    measured = [round_metrics(directory, iteration, one.number) for one in iteration.rounds]
    settings, training = _settings(iteration), _training(directory, iteration)
    return write_selfcontained(
        directory / filenames.REPORT,
        TEMPLATES / "iteration.html.j2",
        styles=[TEMPLATES / name for name in ("report.css", "comparison.css", "iteration.css")],
        scripts=[TEMPLATES / "report.js"],
        chart_data=[],
        name=directory.resolve().name,
        iteration=iteration,
        facts=_facts(iteration, training),
        status=_status(iteration),
        verdict=_verdict(measured),
        alarms=[words for one in iteration.rounds for words in one.alarms],
        win_rates=_win_rates(measured, iteration),
        panels=_panels(measured, iteration),
        opponents=[(_key(_HUES[name]), OPPONENT_NAMES[name].removeprefix("the ")) for name in ROUND_OPPONENTS],
        columns=[(name, label(name), unit(name)) for name in _columns(iteration)],
        rows=[_row(directory, one, found, iteration) for one, found in zip(iteration.rounds, measured, strict=True)],
        tables=[table for table in (("Iteration", settings), ("Training of each round", training)) if table[1]],
    )


def time_text(seconds: float) -> str:
    """Return a wall time as text, in seconds or, if it is long, in minutes."""
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.1f} min"


def describe_status(iteration: Iteration) -> str:
    """Return how many of the planned rounds have finished, such as ``2 of 3 rounds finished``."""
    done = sum(one.status == "finished" and one.number > 0 for one in iteration.rounds)
    return f"{done} of {iteration.planned} rounds finished"


def quantities(found: RoundMetrics) -> dict[str, Measured | None]:
    """Return the metrics of a round other than win rates, by their keys in the catalogue."""
    return {
        "kl": found.kl,
        FIRST_KL: found.kl_first,
        "reward": found.reward,
        "entropy": found.entropy,
        "length": found.length,
        "distinct_2": found.distinct_2,
        "self_bleu": found.self_bleu,
    }


def _columns(iteration: Iteration) -> list[str]:
    """Return the quantities of the table; where the reference is the first model, the two KLs are one."""
    return [name for name in quantities(RoundMetrics(0)) if name != "kl" or iteration.reference == "previous"]


def _facts(iteration: Iteration, training: Sequence[tuple[str, str]]) -> list[str]:
    reference = OPPONENT_NAMES[iteration.reference]
    known = dict(training)
    named = [f"{name} {known[name]}" for name in ("method", "data", "model", "judge", "seed") if name in known]
    return [describe_status(iteration), f"the reference is {reference}", *named]


def _status(iteration: Iteration) -> str | None:
    """State what has not finished; ``None`` for a finished iteration."""
    if iteration.is_finished:
        return None
    failed = [one for one in iteration.rounds if one.status == "failed"]
    if failed:
        return (
            f"Round {failed[-1].number} has failed. Run the same command again: it skips finished rounds and resumes "
            "this one."
        )
    running = [f"round {one.number} is running" for one in iteration.rounds if one.status == "running"]
    state = f"This iteration has not finished{': ' + running[-1] if running else ''}."
    return f"{state} If it was interrupted, run the same command again to resume it."


def _verdict(measured: Sequence[RoundMetrics]) -> str | None:
    """State what the last measured round shows against the first model and against the round before."""
    last = next((one for one in reversed(measured) if "first" in one.win_rates), None)
    if last is None:
        return None
    rounds = "one round" if last.number == 1 else f"{last.number} rounds"
    words = f"After {rounds}, the policy {_shown(last.win_rates['first'], 'first')}"
    if last.kl_first is not None:
        words += f", at a KL of {number(last.kl_first.value)} nats per sequence"
    if last.number > 1 and "previous" in last.win_rates:
        words += f"; it {_shown(last.win_rates['previous'], 'previous')}"
    return f"{words}."


def _shown(rate: Measured, opponent: RoundOpponent) -> str:
    name = OPPONENT_NAMES[opponent]
    ends = "" if rate.low is None or rate.high is None else f", 95% interval {number(rate.low)} to {number(rate.high)}"
    figure = f"(win rate {number(rate.value)}{ends})"
    if rate.low is not None and rate.low > 0.5:
        return f"beats {name} {figure}"
    if rate.high is not None and rate.high < 0.5:
        return f"loses to {name} {figure}"
    return f"is not shown to differ from {name} {figure}"


# --- figures -------------------------------------------------------------------------------------------------------


def _win_rates(measured: Sequence[RoundMetrics], iteration: Iteration) -> dict[str, Any] | None:
    found = [
        RoundSeries(f"against {OPPONENT_NAMES[name]}", _HUES[name], rates)
        for name in ROUND_OPPONENTS
        if (rates := {one.number: one.win_rates[name] for one in measured if name in one.win_rates})
    ]
    if not found:
        return None
    # Text in a drawing shrinks with it, so a phone gets a drawing of its own.
    charts = {
        name: rounds_chart(title("win_rate"), found, _last(iteration), baseline=0.5, width=width, height=height)
        for name, width, height in (("wide", 1000, 320), ("narrow", 360, 260))
    }
    return {"title": title("win_rate"), "unit": unit("win_rate"), "keys": _keys(found), "charts": charts}


def _panels(measured: Sequence[RoundMetrics], iteration: Iteration) -> list[dict[str, Any]]:
    """Return a panel for each group of quantities that were measured; its dotted line is the value of round 0."""
    of_kl = {FIRST_KL: _HUES["first"]}
    if iteration.reference == "previous":
        of_kl = {"kl": _HUES["previous"]} | of_kl
    groups: list[tuple[str, dict[str, int]]] = [
        ("KL" if len(of_kl) > 1 else title(FIRST_KL), of_kl),
        *((title(name), {name: _HUE}) for name in ("reward", "entropy", "length", "distinct_2", "self_bleu")),
    ]
    panels = []
    for heading, hues in groups:
        found = [
            RoundSeries(label(name).removeprefix(f"{heading} "), hue, values)
            for name, hue in hues.items()
            if (values := {one.number: v for one in measured if (v := quantities(one)[name]) is not None})
        ]
        if not found:
            continue
        start = found[0].values.get(0)
        baseline = start.value if len(hues) == 1 and start is not None else None
        chart = rounds_chart(heading, found, _last(iteration), baseline=baseline)
        named = unit(next(iter(hues)))
        panels.append({"title": heading, "unit": named, "keys": _keys(found) if len(hues) > 1 else [], "svg": chart})
    return panels


def _last(iteration: Iteration) -> int:
    return max([iteration.planned, *(one.number for one in iteration.rounds)])


def _keys(series: Sequence[RoundSeries]) -> list[tuple[Markup, str]]:
    return [(_key(one.hue), one.name) for one in series]


def _key(hue: int) -> Markup:
    return Markup(f'<svg class="mark-key" viewBox="-1.6 -1.6 3.2 3.2" aria-hidden="true">{marker(hue, 0, 0, 1)}</svg>')


# --- tables --------------------------------------------------------------------------------------------------------


def _row(directory: Path, one: Round, found: RoundMetrics, iteration: Iteration) -> dict[str, Any]:
    return {
        "round": one,
        "note": "first model" if one.number == 0 else "extrapolated" if one.measured != one.directory else "",
        "win_rates": [_cell(found.win_rates.get(name)) for name in ROUND_OPPONENTS],
        "cells": [_cell(quantities(found)[name]) for name in _columns(iteration)],
        "time": time_text(one.seconds),
        "links": _links(directory, one),
    }


def _cell(one: Measured | None) -> tuple[str, str]:
    if one is None:
        return "–", ""
    if one.low is None or one.high is None or one.low == one.high:  # The KL of a model to itself is 0.
        return number(one.value), ""
    return number(one.value), f"{number(one.low)} – {number(one.high)}"


def _links(directory: Path, one: Round) -> list[tuple[str, str]]:
    """Return address and name of the pages of a round's run directories."""
    pages = dict.fromkeys((one.directory, one.measured))
    return [
        (f"{folder}/{filenames.REPORT}", folder.rpartition("/")[2])
        for folder in pages
        if (directory / folder / filenames.REPORT).is_file()
    ]


def _settings(iteration: Iteration) -> list[tuple[str, str]]:
    """Return the settings of the iteration that hold for all rounds."""
    found = [("rounds", str(iteration.planned))]
    for key, value in flatten(iteration.settings).items():
        name = key.removeprefix("source.").removesuffix("._target_")
        if name.partition(".")[0] not in _NOT_SHOWN and value not in (None, []):
            found.append((name, _text(value)))
    return found


def _training(directory: Path, iteration: Iteration) -> list[tuple[str, str]]:
    """Return facts about the training of each round, as the newest configuration has them."""
    config: Mapping[str, Any] = {}
    counted: Mapping[str, Any] | None = None
    for one in iteration.rounds[1:]:
        try:
            text = (directory / one.directory / filenames.CONFIG).read_text(encoding="utf-8", errors="replace")
            found = load_yaml(text)
        except (OSError, yaml.YAMLError):
            continue
        config = found if isinstance(found, dict) else config
        counted = (read_mapping(directory / one.directory / filenames.IDENTITY) or {}).get("config")
    flat = flatten(config)
    if isinstance(counted, dict):  # A coefficient that the method does not read is not part of the run's identity.
        flat = {key: value for key, value in flat.items() if not key.startswith(_COEFFICIENTS) or key in counted}
    facts = []
    for name, keys in _TRAINING.items():
        value = next((flat[key] for key in keys if flat.get(key) is not None), None)
        if value is not None:
            facts.append((name, _text(value)))
    return facts


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, str) and "/" in value:
        return value.rstrip("/").rpartition("/")[2]
    return value_text(value)
