"""Dashboards as W&B workspaces and reports. This module needs the extra ``dashboards``."""

from __future__ import annotations

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from spo.errors import UserError
from spo.pages.dashboard import Bars, Curves, Dashboard, Panel, Scatter, unit_of
from spo.tracking.login import has_api_key

# The step of W&B, which the tracker sets to the optimizer step.
STEP = "Step"
# Columns and size of panels in a report, whose grid is 24 wide.
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 7


def workspace(dashboard: Dashboard, entity: str, project: str, group_by: str | None = None) -> ws.Workspace:
    """Make the workspace of a dashboard, without saving it.

    Args:
        dashboard: Dashboard to show.
        entity: W&B entity.
        project: W&B project of the runs.
        group_by: Config key, such as ``method.name``; runs with the same value become one line, the mean with a band.
    """
    return ws.Workspace(
        entity=entity,
        project=project,
        name=dashboard.title,
        sections=[
            ws.Section(name=section.title, panels=[_panel(one) for one in section.panels], is_open=True)
            for section in dashboard.sections
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(groupby=[expr.Config(group_by)] if group_by else []),
    )


def report(dashboard: Dashboard, entity: str, project: str, group_by: str | None = None) -> wr.Report:
    """Make the report of a dashboard, without saving it: the panels of :func:`workspace`, with room for text.

    Args:
        dashboard: Dashboard to show.
        entity: W&B entity.
        project: W&B project of the runs.
        group_by: Config key by which runs are grouped, as in :func:`workspace`.
    """
    groups = [f"config.{group_by}"] if group_by else []
    blocks: list[wr.interface.BlockTypes] = [wr.TableOfContents()]
    for section in dashboard.sections:
        runs = wr.Runset(entity=entity, project=project, groupby=groups)
        panels = [_panel(one, place) for place, one in enumerate(section.panels)]
        blocks += [wr.H2(section.title), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(entity=entity, project=project, title=dashboard.title, blocks=blocks, width="fluid")


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
    assert isinstance(panel, Scatter), "a panel for each metric is written out when the file is read"
    return wr.ScatterPlot(title=panel.title, x=wr.SummaryMetric(panel.x), y=wr.SummaryMetric(panel.y), layout=layout)


def _axis(panel: Curves | Bars) -> str | None:
    """Return the unit and the value to compare with, for which W&B does not have a line."""
    words = [unit_of(panel.keys[0]), "" if panel.baseline is None else f"compare with {panel.baseline:g}"]
    return ", ".join(filter(None, words)) or None
