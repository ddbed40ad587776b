"""Self-contained pages: style, script and chart data are inside the file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spo.records.files import write_text
from spo.wording import clean


def write_selfcontained(
    path: Path, template: Path, *, styles: Sequence[Path], scripts: Sequence[Path], chart_data: Any, **values: Any
) -> Path:
    """Render a template into a page, atomically.

    Args:
        path: Path of the page; its folder is created.
        template: Template, which also receives ``style``, ``script``, ``script_digest`` and ``chart_data``.
        styles: Style sheets, joined in this order.
        scripts: Scripts, joined in this order.
        chart_data: JSON-like data that the scripts read.
        **values: Further variables of the template.

    Returns:
        The path of the page.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _joined(scripts)
    page = environment.get_template(template.name).render(
        style=Markup(_joined(styles)),
        script=Markup(script),
        # Only this script may run, so a sampled text that escaped the escaping would still do nothing.
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        chart_data=Markup(json.dumps(chart_data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")),
        **values,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def _joined(files: Sequence[Path]) -> str:
    return "\n".join(file.read_text(encoding="utf-8").strip() for file in files)
