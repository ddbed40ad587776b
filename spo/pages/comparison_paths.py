"""Paths of a comparison: win rate and KL of validation samples over the training steps, with ``callbacks=samples``."""

from __future__ import annotations

import math
from statistics import fmean

from markupsafe import Markup

from spo.comparison.compare import Comparison, Method
from spo.pages.charts import Cloud, LineChart, Point, scatter
from spo.pages.comparison_curves import Drawn, draw_groups, series_of
from spo.pages.comparison_figures import axis_name, even_share, hues
from spo.pages.dashboard import unit_of
from spo.wording import number

WIN_RATE, KL = "val/samples/win_rate", "val/samples/kl"
_TITLES = {WIN_RATE: "Win rate on validation prompts", KL: "KL on validation prompts"}


def paths_chart(comparison: Comparison) -> Markup | None:
    """Draw the path of each method's best setting through the plane of KL and win rate, from its start to its end.

    A point is the mean over seeds at one step. Steps without both numbers of all seeds are left out: with fewer seeds
    at some step, a path would bend where it does not.

    Args:
        comparison: Comparison to show.

    Returns:
        The chart; ``None`` if no method has two such steps.
    """
    clouds = []
    for method in comparison.methods:
        path = _path(method)
        if len(path) < 2:
            continue
        seeds = f"mean of {len(method.best.runs)} seeds" if len(method.best.runs) > 1 else "one seed"
        points = [
            Point(
                kl,
                win_rate,
                f"{method.name}\nstep {step:,.0f}, {seeds}\nwin rate {number(win_rate)}\nKL {number(kl)}",
                large=step in (path[0][0], path[-1][0]),
                start=step == path[0][0],
            )
            for step, kl, win_rate in path
        ]
        clouds.append(Cloud(method.name, hues(comparison)[method.name], points, [(p.x, p.y) for p in points]))
    if not clouds:
        return None
    return scatter(clouds, axis_name("kl"), axis_name("win_rate"), None, even_share("win_rate"), stretched=True)


def _path(method: Method) -> list[tuple[float, float, float]]:
    """Return step, mean KL and mean win rate where all seeds have both."""
    curves = [[dict(zip(*run.record.curve(key), strict=True)) for run in method.best.runs] for key in (KL, WIN_RATE)]
    steps = sorted(set.intersection(*(set(one) for some in curves for one in some)))
    means = [(step, *(fmean(one[step] for one in some) for some in curves)) for step in steps]
    return [(step, kl, win_rate) for step, kl, win_rate in means if math.isfinite(kl + win_rate)]


def path_curves(comparison: Comparison) -> Drawn:
    """Draw win rate and KL of validation samples over steps: means over seeds, in bands over seeds.

    Args:
        comparison: Comparison to show.

    Returns:
        One group of charts, or none, and the points in them for the hover read-out.
    """
    charts = []
    for key, heading in _TITLES.items():
        series = [one for method in comparison.methods if (one := series_of(comparison, method, key)) is not None]
        if any(len(one.steps) > 1 for one in series):
            charts.append(
                LineChart(key, heading, unit_of(key), series, None, even_share(key.removeprefix("val/samples/")))
            )
    return draw_groups({"": charts}, comparison)
