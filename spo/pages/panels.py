"""Panels in the terminal: derived facts at the start of a run, and its result at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spo.metrics.catalogue import INTERVAL_ENDS, comparisons, find, label, rank, unit
from spo.metrics.trained import describe_budget
from spo.records import filenames
from spo.records.run import read_alarms, read_stop
from spo.wording import clean, describe_verdict, describe_win_rate, finite, number, shorten

_CONTROLLED = "_length_controlled"
# In a narrower terminal, reference and policy stand below each other.
_MIN_WIDTH_SIDE_BY_SIDE = 70
_SAMPLE_CHARACTERS = 280


def start_panel(title: str, facts: dict[str, str], warnings: list[str]) -> None:
    """Print the derived facts of a run before it starts.

    Args:
        title: Title of the panel, such as "spo train · SPO".
        facts: Values by name, shown in their order.
        warnings: Sentences for a person, shown below the facts.
    """
    console = Console()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=len(facts) > 0 and max(map(len, facts)) < console.width // 3)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(_text(console, name), _text(console, value))
    parts: list[RenderableType] = [table]
    parts += [_text(console, f"warning: {warning}", "yellow") for warning in warnings]
    console.print(Panel(Group(*parts), title=_text(console, title, "bold"), title_align="left", padding=(0, 1)))


def result_panel(metrics: dict[str, float], samples: list[dict[str, Any]], run_dir: Path) -> None:
    """Print the result of a run: win rate with interval, before and after, a few samples, where the files are.

    Args:
        metrics: Final numbers under their flat keys; absent ones are omitted or named.
        samples: Rows of ``samples.jsonl``; the largest gain, the middle and the largest drop are shown.
        run_dir: Run directory.
    """
    console = Console()
    parts: list[RenderableType] = [*_win_rate(console, metrics), Text(), _before_after(console, metrics)]
    if (step := finite(metrics.get("policy/step"))) is not None:
        parts.insert(0, _text(console, f"weights of step {step:,.0f}, the best on the selection split"))
    if budget := describe_budget(metrics):
        parts += [Text(), _text(console, f"trained: {budget}")]
    if stopped := read_stop(run_dir):
        parts.append(_text(console, stopped, "yellow"))
    parts += [_text(console, f"health: {alarm}", "yellow") for alarm in read_alarms(run_dir)]
    for name, row in _chosen(samples):
        parts += [Text(), _sample(console, name, row)]
    console.print(Panel(Group(*parts), title=Text("result", "bold"), title_align="left", padding=(0, 1)))
    for name, file in (("report", filenames.REPORT), ("policy", filenames.POLICY), ("numbers", filenames.METRICS)):
        if (run_dir / file).exists():  # Outside the panel and not wrapped, so that a path can be copied.
            console.print(_text(console, f"{name:8s} {run_dir / file}"), soft_wrap=True)


def _win_rate(console: Console, metrics: Mapping[str, float]) -> list[RenderableType]:
    value = finite(metrics.get("eval/win_rate"))
    others = sorted(
        key for key in metrics if key.startswith("eval/win_rate/") and not key.endswith((*INTERVAL_ENDS, _CONTROLLED))
    )
    shown: list[RenderableType] = [line for key in others for line in _rate(console, metrics, key)]
    if value is None:
        return shown or [_text(console, "No win rate: the evaluation did not have a reward or a judge.")]
    low, high = (finite(metrics.get(f"eval/win_rate{end}")) for end in INTERVAL_ENDS)
    main = [*_rate(console, metrics, "eval/win_rate"), _scale(console, value, low, high)]
    return [*main, _text(console, describe_win_rate(low, high), "dim"), *shown]


def _rate(console: Console, metrics: Mapping[str, float], key: str) -> list[Text]:
    """Write a win rate with its interval, and the win rate at equal length."""
    name = label(key.removeprefix("eval/"))
    line = _text(console, f"{name}{'' if '/' in key[5:] else ' against the reference'}  ")
    line.append(number(metrics[key]) if finite(metrics[key]) is None else f"{metrics[key]:.3f}", "bold")
    low, high = (finite(metrics.get(f"{key}{end}")) for end in INTERVAL_ENDS)
    if low is not None and high is not None:
        line.append(f"  95% interval [{low:.3f}, {high:.3f}]")
    controlled = finite(metrics.get(key + _CONTROLLED))
    return [line, _text(console, f"at equal length  {controlled:.3f}", "dim")] if controlled is not None else [line]


def _scale(console: Console, value: float, low: float | None, high: float | None) -> Text:
    """Draw [0, 1] with the interval, the value and the line at 0.5 in one row of characters."""
    width = max(11, min(console.width - 10, 61))
    ascii_only = not console.encoding.startswith("utf")
    line, mark, half, point = "-=|o" if ascii_only else "─━┼●"

    def place(share: float) -> int:
        return min(max(round(share * (width - 1)), 0), width - 1)

    cells = [line] * width
    if low is not None and high is not None:
        cells[place(low) : place(high) + 1] = [mark] * (place(high) - place(low) + 1)
    cells[place(0.5)] = half
    cells[place(value)] = point
    return Text(f"0 {''.join(cells)} 1")


def _before_after(console: Console, metrics: Mapping[str, float]) -> Table:
    names = (key.removeprefix("eval/") for key in metrics if key.startswith("eval/"))
    shown = [name for name in names if (entry := find(name)) is not None and "terminal" in entry.places]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("metric", "left"), ("reference", "right"), ("policy", "right"), ("unit", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for key in sorted(shown, key=rank):
        reference = metrics.get(f"eval/reference/{key}")
        before = "-" if reference is None else number(reference)
        cells = (label(key), before, number(metrics[f"eval/{key}"]), unit(key))
        table.add_row(*(_text(console, cell) for cell in cells))
    if not table.row_count:
        table.add_row(_text(console, "no final evaluation was recorded"))
    return table


def _chosen(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Choose the extremes and the middle by reward difference, the same ones on every call."""
    ranked = []
    for row in samples:
        policy, reference = finite(row.get("reward")), finite(row.get("reference_reward"))
        if policy is not None and reference is not None:
            ranked.append((policy - reference, row))
    if not ranked:
        return [(f"sample {place + 1}", row) for place, row in enumerate(samples[:3])]
    ranked.sort(key=lambda pair: -pair[0])
    places = {0: "largest gain", len(ranked) // 2: "middle", len(ranked) - 1: "largest drop"}
    return [(name, ranked[place][1]) for place, name in sorted(places.items())]


def _sample(console: Console, name: str, row: Mapping[str, Any]) -> RenderableType:
    verdict = finite(row.get("verdict"))
    result = "" if verdict is None else f" ({describe_verdict(verdict, len(comparisons(row)))})"
    head = _text(console, name + result, "bold")
    prompt = _text(console, _field(row, "prompt"), "italic")
    sides = []
    for who, completion, reward in (
        ("reference", "reference_completion", "reference_reward"),
        ("policy", "completion", "reward"),
    ):
        title = who + ("" if finite(row.get(reward)) is None else f", reward {number(row[reward])}")
        sides.append((_text(console, title, "dim"), _text(console, _field(row, completion))))
    if console.width < _MIN_WIDTH_SIDE_BY_SIDE:
        return Group(head, prompt, *(part for side in sides for part in side))
    table = Table(box=None, padding=(0, 3, 0, 0), expand=True, pad_edge=False)
    for heading, _ in sides:
        table.add_column(heading, ratio=1, overflow="fold")
    table.add_row(*(text for _, text in sides))
    return Group(head, prompt, table)


def _field(row: Mapping[str, Any], key: str) -> str:
    return "(not recorded)" if row.get(key) is None else shorten(str(row[key]).strip(), _SAMPLE_CHARACTERS) or "(empty)"


def _text(console: Console, text: str, style: str = "") -> Text:
    """Make a text safe for this terminal: without markup, escape sequences and characters that it cannot write."""
    return Text(clean(text).encode(console.encoding, "replace").decode(console.encoding), style)
