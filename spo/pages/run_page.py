"""The page ``report.html`` of a run, made from the files of its directory alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from spo.metrics.catalogue import INTERVAL_ENDS, REFERENCES, comparisons, find, label, rank, shown_in, unit
from spo.metrics.trained import describe_budget
from spo.pages.charts import LineChart, Series, histogram, interval_bar, line_chart
from spo.pages.dashboard import SCHEDULES, SPLITS, Curves, Dashboard, load_spec, unit_of
from spo.pages.selfcontained import write_selfcontained
from spo.records import filenames
from spo.records.run import RunRecord, read_run
from spo.wording import clean, describe_verdict, describe_win_rate, duration, finite, number, shorten, verdict_word

TEMPLATES = Path(__file__).parent / "templates"
# Limits that keep the page of any run below a megabyte.
_SAMPLES_PER_ORDER, _SAMPLE_BYTES, _TEXT_CHARACTERS, _FILE_CHARACTERS, _PANELS = 20, 350_000, 3000, 60_000, 40


def render_report(run_dir: Path, dashboard: Dashboard | None = None) -> Path:
    """Write ``report.html`` into the directory of a run, finished or not, over an earlier page.

    The page depends on the files alone: rendered twice, it has the same bytes.

    Args:
        run_dir: Run directory. ``config.yaml``, ``metrics.json``, ``history.jsonl``, ``samples.jsonl`` and
            ``provenance.json`` are read; each may be missing, cut off or incomplete.
        dashboard: Dashboard whose curves are drawn; ``None`` for the shipped one.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If the directory is missing or holds no file of a run.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    groups, chart_data = _curves(run, dashboard or load_spec())
    return write_selfcontained(
        run_dir / filenames.REPORT,
        TEMPLATES / "report.html.j2",
        styles=[TEMPLATES / "report.css"],
        scripts=[TEMPLATES / "report.js"],
        chart_data=chart_data,
        run=run,
        title=_title(run),
        facts=_facts(run),
        status=_status(run),
        stopped=run.provenance.get("stopped"),
        win_rate=_win_rate(run),
        cards=_cards(run),
        table=_table(run),
        groups=groups,
        samples=_samples(run),
        rewards=_rewards(run),
        pairs=_under(run, "data/", lambda name, value: (name, number(value))),
        times=_under(run, "time/", duration),
        others=_other_numbers(run),
        provenance=[(key, _plain(value)) for key, value in run.provenance.items()],
        config_text=shorten(run.config_text, _FILE_CHARACTERS),
        notes=run.notes,
        alarms=run.alarms,
    )


def _method(run: RunRecord) -> str | None:
    node = run.get("method")
    if isinstance(node, str):
        return node
    if isinstance(run.get("method.name"), str):
        return str(run.get("method.name"))
    target = run.get("method.loss._target_") or run.get("method._target_")
    return str(target).rpartition(".")[2].removesuffix("Loss") if target else None


def _schedule(run: RunRecord, name: str) -> str | None:
    """Write alpha or beta; ``None`` if the method does not read it: neither the identity nor the history has it."""
    if run.identifying and not any(key.partition(".")[0] == name for key in run.identifying):
        return None
    if run.curve("train/loss")[0] and not any(run.curve(f"{split}/{name}")[0] for split in SPLITS):
        return None
    node = run.get(name)
    if not isinstance(node, Mapping):
        return None if node is None else _plain(node)
    if finite(node.get("value")) is not None:
        return f"{node['value']:g}"
    ends = [finite(node.get(key)) for key in ("start", "end")]
    kind = str(node.get("_target_", "scheduled")).rpartition(".")[2].lower()
    if None in ends:
        _, seen = run.curve(f"train/{name}")
        ends = [seen[0], seen[-1]] if seen else []
    return f"{ends[0]:g} → {ends[1]:g} ({kind})" if ends else kind


def _title(run: RunRecord) -> list[tuple[str, str]]:
    """Return those of method, alpha, beta and seed that the run has."""
    seed = run.get("seed")
    parts = [("method", _method(run)), *((name, _schedule(run, name)) for name in SCHEDULES)]
    parts.append(("seed", None if seed is None else _plain(seed)))
    return [(name, text) for name, text in parts if text]


def _facts(run: RunRecord) -> list[str]:
    """Return tags, model, data, regularizer and length of the run, as far as the config has them."""
    tags = run.get("tags")  # That of an extrapolated run holds the factor.
    facts = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    for name, paths in (("model", ("model.name", "model.path")), ("data", ("data.name", "data.path"))):
        value = next((run.get(path) for path in paths if isinstance(run.get(path), str)), None)
        if value and (shown := _name_of(value)):
            facts.append(f"{name} {shown}")
    regularizer = run.get("regularizer._target_")
    if regularizer:
        weight = finite(run.get("regularizer.weight"))
        facts.append(f"regularizer {str(regularizer).rpartition('.')[2]}" + (f" × {weight:g}" if weight else ""))
    steps = finite(run.get("trainer.max_steps"))
    if budget := describe_budget(run.metrics or {}):
        facts.append(f"trained {budget}")
    elif steps and steps > 0:
        facts.append(f"{steps:,.0f} steps")
    if (best := run.metric("policy/step")) is not None:
        facts.append(f"weights of step {best:,.0f}, the best by {run.get('callbacks.checkpoint.monitor')}")
    return facts


def _name_of(path: str) -> str | None:
    """Return the name of a file, a model or the run of a policy; ``None`` for a folder of the cache without one."""
    parts = path.rstrip("/").split("/")
    name = parts[-2] if parts[-1] == filenames.POLICY and len(parts) > 1 else parts[-1]
    return None if re.fullmatch("[0-9a-f]{32}", name) else name


def _status(run: RunRecord) -> str | None:
    """State why the win rate is missing; return ``None`` if there is one."""
    if run.metrics is not None:
        evaluated = any(key.startswith("eval/") for key in run.metrics)
        if not evaluated:
            return "No final evaluation was recorded (metrics.json does not have eval/ numbers)."
        if "eval/win_rate" not in run.metrics:
            return "No win rate: this run was evaluated without a reward or a judge."
        return None if run.metric("eval/win_rate") is not None else "The win rate that was recorded is not finite."
    steps = [step for row in run.history if (step := finite(row.get("step"))) is not None]
    if not steps:
        return "This run has not finished, and no step has been logged yet."
    total = finite(run.get("trainer.max_steps"))
    reached = f"step {max(steps):,.0f}" + (f" of {total:,.0f}" if total and total > 0 else "")
    return f"This run has not finished: it was logged up to {reached}. The final numbers appear at its end."


def _win_rate(run: RunRecord) -> dict[str, Any] | None:
    value = run.metric("eval/win_rate")
    if value is None:
        return None
    low, high = (run.metric(f"eval/win_rate{end}") for end in INTERVAL_ENDS)
    compared = (one for row in _evaluated(run) for one in comparisons(row))
    words = [verdict_word(v) for one in compared if (v := finite(one.get("verdict"))) is not None]
    counted = ", ".join(
        f"{words.count(word):,} {plural}" for word, plural in (("win", "wins"), ("tie", "ties"), ("loss", "losses"))
    )
    return {
        "value": f"{value:.3f}",
        "interval": None if low is None or high is None else f"{low:.3f} – {high:.3f}",
        "bar": interval_bar(value, low, high),
        "controlled": run.metric("eval/win_rate_length_controlled"),
        "meaning": describe_win_rate(low, high),
        "counted": counted if words else None,
    }


def _cards(run: RunRecord) -> list[dict[str, Any]]:
    """Return the cards of the main metrics that were recorded."""
    cards = []
    for key in shown_in("card"):
        policy, reference = run.metric(f"eval/{key}"), run.metric(f"eval/reference/{key}")
        if policy is not None:
            cards.append(
                {
                    "label": label(key),
                    "policy": number(policy),
                    "reference": None if reference is None else number(reference),
                    "unit": unit(key),
                }
            )
    return cards


def _table(run: RunRecord) -> list[dict[str, str]]:
    """Return a row for every ``eval/`` metric: policy next to reference, with intervals in the row of their metric."""
    metrics = run.metrics or {}
    names = dict.fromkeys(
        key.removeprefix("eval/").removeprefix("reference/") for key in metrics if key.startswith("eval/")
    )
    intervals = [[f"{name}{end}" for end in INTERVAL_ENDS] for name in names]
    folded = {key for ends in intervals if names.keys() >= set(ends) for key in ends}
    rows = []
    for name in sorted(names.keys() - folded, key=rank):
        cells = {}
        for who, prefix in (("policy", "eval/"), ("reference", "eval/reference/")):
            cells[who] = _number(name, metrics.get(prefix + name))
            ends = [metrics.get(f"{prefix}{name}{end}") for end in INTERVAL_ENDS]
            cells[who + "_interval"] = "" if None in ends else f"{number(ends[0])} – {number(ends[1])}"
        policy, reference = run.metric(f"eval/{name}"), run.metric(f"eval/reference/{name}")
        change = "–" if policy is None or reference is None else number(float(policy - reference), signed=True)
        rows.append({"name": label(name), "key": name, "unit": unit(name), "change": change, **cells})
    return rows


def _number(name: str, value: Any) -> str:
    """Write the value of a metric; counts, which are stored as floats, without decimals."""
    entry = find(name)
    is_count = entry is not None and not entry.of_policy and isinstance(value, float) and value.is_integer()
    return number(int(value) if is_count else value)


def _under(run: RunRecord, prefix: str, write: Any) -> list[tuple[str, str]]:
    metrics = run.metrics or {}
    names = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    first = ("pairs_read", "pairs_used", "pairs_left_out", "pairs_dropped", "pairs_truncated")
    order = sorted(names, key=lambda name: (first.index(name) if name in first else len(first), name))
    return [write(name, metrics[prefix + name]) for name in order]


def _other_numbers(run: RunRecord) -> list[tuple[str, str]]:
    shown = ("eval/", "data/", "time/")
    return [(key, number(value)) for key, value in sorted((run.metrics or {}).items()) if not key.startswith(shown)]


def _curves(run: RunRecord, dashboard: Dashboard) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups of drawn charts, and the points in them for the hover read-out."""
    steps = [step for row in run.history if (step := finite(row.get("step"))) is not None]
    if not steps:
        return [], []
    span = (min(steps), max(steps))
    groups, data = [], []
    drawn = 0
    for group, panels in _panels(run, dashboard):
        charts = []
        for panel in panels[: max(_PANELS - drawn, 0)]:
            svg, points = line_chart(panel, span)
            gaps = sum(math.isnan(v) for one in panel.series for v in one.values)
            charts.append({"panel": panel, "svg": svg, "gaps": gaps})
            data.append(points)
        drawn += len(charts)
        if len(charts) < len(panels):
            run.notes.append(f"{len(panels) - len(charts)} further curves of history.jsonl are not drawn.")
        if charts:
            groups.append({"title": group, "charts": charts})
    return groups, data


def _panels(run: RunRecord, dashboard: Dashboard) -> Iterable[tuple[str, list[LineChart]]]:
    """Yield the sections of the dashboard that the run fills, and the other metrics that it logged."""
    for section in dashboard.with_metrics_of(run).sections:
        panels = [_panel(run, curves) for curves in section.curves]
        yield section.title, [panel for panel in panels if panel.series]


def _panel(run: RunRecord, curves: Curves) -> LineChart:
    series = []
    # The ends of an interval are a band around the line of their metric.
    ends = [f"{metric}{end}" for metric in curves.metrics for end in INTERVAL_ENDS]
    metrics = [metric for metric in curves.metrics if metric not in ends]
    for place, metric in enumerate(metrics):
        for split in curves.splits:
            steps, values = run.curve(f"{split}/{metric}")
            if not steps or (curves.varying and len(set(values)) == 1):
                continue
            validation = split == "val"
            short = metric.rpartition("/")[2]
            name = f"{clean(short)}, {split}" if len(metrics) > 1 else split
            band = [run.curve(f"{split}/{metric}{end}") for end in INTERVAL_ENDS if f"{metric}{end}" in curves.metrics]
            known = len(band) == 2 and all(at == steps for at, _ in band)
            low, high = (numbers for _, numbers in band) if known else ((), ())
            series.append(Series(name, steps, values, hue=place + 1, dashed=validation, low=low, high=high))
    key, title = clean("-".join(curves.metrics)), clean(curves.title)
    return LineChart(key, title, unit_of(curves.keys[0]), series, curves.bounds, curves.baseline)


def _evaluated(run: RunRecord) -> list[dict[str, Any]]:
    """Return the samples behind the final numbers: those of the test split, or all if there is no test split."""
    return [row for row in run.samples if row.get("split") == "test"] or run.samples


def _rewards(run: RunRecord) -> dict[str, Any] | None:
    rows = _evaluated(run)
    policy = [value for row in rows if (value := finite(row.get("reward"))) is not None]
    # Samples of one prompt meet the same completions of the reference, which count once.
    met = {(row.get("prompt_id"), one.get("completion")): one for row in rows for one in row.get(REFERENCES) or ()}
    of_reference = [one.get("reward") for one in met.values()] or [row.get("reference_reward") for row in rows]
    reference = [value for one in of_reference if (value := finite(one)) is not None]
    if not policy:
        return None
    return {
        "svg": histogram(policy, reference, "reward"),
        "policy": (f"{len(policy):,}", number(sum(policy) / len(policy))),
        "reference": (f"{len(reference):,}", number(sum(reference) / len(reference))) if reference else None,
    }


def _samples(run: RunRecord) -> dict[str, Any]:
    """Choose samples for the page: the first of the file and the largest differences, within a budget of bytes."""
    rows = _evaluated(run)
    deltas = [_difference(row) for row in rows]
    ranked = sorted((i for i, d in enumerate(deltas) if d is not None), key=lambda i: -(deltas[i] or 0.0))
    orders = (range(len(rows)), ranked, ranked[::-1])
    wanted = dict.fromkeys(
        order[place] for place in range(_SAMPLES_PER_ORDER) for order in orders if place < len(order)
    )
    splits = {str(row.get("split")) for row in rows}
    room = _SAMPLE_BYTES
    chosen: dict[int, dict[str, Any]] = {}
    for index in wanted:
        sample = _sample(rows[index], deltas[index])
        room -= sum(len(str(Markup.escape(value)).encode()) for value in sample.values())
        if room < 0 and chosen:
            break
        chosen[index] = sample
    return {
        "rows": [{"place": index, **chosen[index]} for index in sorted(chosen)],
        "total": len(rows),
        "split": next(iter(splits)) if len(splits) == 1 and "None" not in splits else None,
        "rewarded": bool(ranked),
        "verdicts": any(sample["verdict"] for sample in chosen.values()),
        "orders": "the first of the file" + (" and the largest reward differences either way" if ranked else ""),
    }


def _difference(row: Mapping[str, Any]) -> float | None:
    policy, reference = finite(row.get("reward")), finite(row.get("reference_reward"))
    return None if policy is None or reference is None else policy - reference


def _sample(row: Mapping[str, Any], delta: float | None) -> dict[str, Any]:
    verdict, logp, logp_ref = (finite(row.get(key)) for key in ("verdict", "logp_policy", "logp_reference"))
    texts = {key: row.get(key) for key in ("prompt", "completion", "reference_completion")}
    return {
        "id": clean(str(row.get("prompt_id", ""))),
        "index": row.get("sample_index") or 0,
        **{k: None if v is None else shorten(clean(str(v)), _TEXT_CHARACTERS) for k, v in texts.items()},
        "verdict": None if verdict is None else describe_verdict(verdict, len(comparisons(row))),
        "reward": None if finite(row.get("reward")) is None else number(row["reward"]),
        "reference_reward": None if finite(row.get("reference_reward")) is None else number(row["reference_reward"]),
        "delta": delta,
        "delta_text": None if delta is None else number(delta, signed=True),
        "tokens": _count(row.get("tokens")),
        "logp": None if logp is None else f"{logp:.1f}",
        "logratio": None if logp is None or logp_ref is None else logp - logp_ref,
        "logratio_text": None if logp is None or logp_ref is None else f"{logp - logp_ref:+.1f}",
    }


def _count(tokens: Any) -> str | None:
    if isinstance(tokens, list):
        return f"{len(tokens):,}"
    return None if finite(tokens) is None else f"{tokens:,.0f}"


def _plain(value: Any) -> str:
    """Write a value of the config or the provenance: text as it is, anything nested as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return shorten(text, _FILE_CHARACTERS // 10)
