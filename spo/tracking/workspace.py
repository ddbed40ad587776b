"""Dashboards as W&B workspaces and reports. This module needs the extra ``dashboards``."""

from __future__ import annotations

from collections.abc import Sequence

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from spo.errors import UserError
from spo.pages.dashboard import (
    Bars,
    Coordinates,
    Curves,
    Dashboard,
    KeyImportance,
    Panel,
    RunTable,
    Scatter,
    is_comparable,
    unit_of,
)
from spo.tracking.login import has_api_key

# The step of W&B, which the tracker sets to the optimizer step.
STEP = "Step"
# Columns and size of panels in a report, whose grid is 24 wide.
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 7


def workspace(
    dashboard: Dashboard, entity: str, project: str, group_by: str | None = None, methods: Sequence[str] = ()
) -> ws.Workspace:
    """Make the workspace of a dashboard, without saving it.

    All panels of a workspace show the same runs. Panels of metrics that are not comparable between methods are
    therefore left out, unless the workspace is that of one method.

    Args:
        dashboard: Dashboard to show.
        entity: W&B entity.
        project: W&B project of the runs.
        group_by: Config key, such as ``method.name``; runs with the same value become one line, the mean with a band.
        methods: Methods whose runs are shown; empty for all runs.
    """
    shared = {
        section.title: [_panel(one) for one in section.panels if len(methods) == 1 or is_comparable(one)]
        for section in dashboard.sections
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=": ".join(filter(None, [dashboard.title, ", ".join(methods)])),
        sections=[ws.Section(name=title, panels=panels, is_open=True) for title, panels in shared.items() if panels],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Config(group_by)] if group_by else [], filters=_runs_of(methods) if methods else []
        ),
    )


def report(
    dashboard: Dashboard, entity: str, project: str, group_by: str | None = None, methods: Sequence[str] = ()
) -> wr.Report:
    """Make the report of a dashboard, without saving it: the panels of :func:`workspace`, with room for text.

    Metrics that are not comparable between methods have a grid of panels for each of the given methods.

    Args:
        dashboard: Dashboard to show.
        entity: W&B entity.
        project: W&B project of the runs.
        group_by: Config key by which runs are grouped, as in :func:`workspace`.
        methods: Methods whose runs are shown; empty for all runs.
    """

    def grid(panels: Sequence[Panel], methods: Sequence[str]) -> wr.PanelGrid:
        runs = wr.Runset(
            name=", ".join(methods) or "Run set",
            entity=entity,
            project=project,
            groupby=[f"config.{group_by}"] if group_by else [],
            filters=_runs_of(methods) if methods else [],
        )
        return wr.PanelGrid(runsets=[runs], panels=[_panel(one, place) for place, one in enumerate(panels)])

    blocks: list[wr.interface.BlockTypes] = [wr.TableOfContents()]
    for section in dashboard.sections:
        shared = [one for one in section.panels if is_comparable(one)]
        apart = [one for one in section.panels if not is_comparable(one)]
        blocks += [wr.H2(section.title)] if shared or (apart and methods) else []
        blocks += [grid(shared, methods)] if shared else []
        for method in methods if apart else []:
            blocks += [wr.H3(f"{section.title}, {method}"), grid(apart, [method])]
    return wr.Report(entity=entity, project=project, title=dashboard.title, blocks=blocks, width="fluid")


def _runs_of(methods: Sequence[str]) -> list[expr.FilterExpr]:
    """Select runs by their method, which is the job type of a run."""
    return [expr.Metric("JobType").isin(list(methods))]


def left_out(dashboard: Dashboard, methods: Sequence[str], *, report: bool) -> list[str]:
    """Return the titles of panels that are not drawn, since they would show several methods on one axis.

    Args:
        dashboard: Dashboard to show.
        methods: Methods whose runs are shown; empty for all runs.
        report: Whether it is a report, which has room for a panel per method.
    """
    if len(methods) == 1 or (report and methods):
        return []
    panels = [panel for section in dashboard.sections for panel in section.panels]
    return [one.title for one in panels if isinstance(one, Curves | Bars | Scatter) and not is_comparable(one)]


def save(view: ws.Workspace | wr.Report) -> str:
    """Save a workspace as a new view of its project, or a report, and return its address.

    Args:
        view: Workspace or report.

    Raises:
        UserError: If there is no API key, or W&B rejects the dashboard.
    """
    if not has_api_key():
        raise UserError("saving a dashboard needs an account: run `wandb login`, or set WANDB_API_KEY")
    try:
        view.save()
    except Exception as error:  # From wandb, from its transport, or a message of the server.
        raise UserError(f"W&B rejected the dashboard for {view.entity}/{view.project}: {error}") from error
    return str(view.url)


def _panel(panel: Panel, place: int = 0) -> wr.interface.PanelTypes:
    row, column = divmod(place, _COLUMNS)
    layout = wr.Layout(x=column * _WIDTH, y=row * _HEIGHT, w=_WIDTH, h=_HEIGHT)
    if isinstance(panel, Curves):
        return wr.LinePlot(
            title=panel.title,
            x=STEP,
            y=list(panel.keys),
            range_y=panel.bounds or (None, None),
            title_y=_axis(panel),
            max_runs_to_show=100,
            layout=layout,
        )
    if isinstance(panel, Bars):
        return wr.BarPlot(
            title=panel.title,
            metrics=list(panel.final),
            range_x=panel.bounds or (None, None),
            title_x=_axis(panel),
            layout=layout,
        )
    if isinstance(panel, Scatter):
        x, y = wr.SummaryMetric(panel.x), wr.SummaryMetric(panel.y)
        return wr.ScatterPlot(title=panel.title, x=x, y=y, layout=layout)
    if isinstance(panel, Coordinates):
        columns = [
            wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key), display_name=key, log=key in panel.logarithmic)
            for key in panel.parallel
        ]
        columns.append(
            wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(panel.metric), display_name=panel.metric)
        )
        return wr.ParallelCoordinatesPlot(title=panel.title, columns=columns, layout=layout)
    if isinstance(panel, KeyImportance):
        return wr.ParameterImportancePlot(with_respect_to=panel.importance, layout=layout)
    assert isinstance(panel, RunTable), "a panel for each metric is written out when the file is read"
    return wr.RunComparer(diff_only="split" if panel.runs == "different" else None, layout=layout)


def _axis(panel: Curves | Bars) -> str | None:
    """Return the unit and the value to compare with, for which W&B does not have a line."""
    words = [unit_of(panel.keys[0]), "" if panel.baseline is None else f"compare with {panel.baseline:g}"]
    return ", ".join(filter(None, words)) or None
