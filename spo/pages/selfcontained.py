"""Writes a page that needs nothing beside it: style, script and data of the charts are inside."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spo.wording import clean


def write_selfcontained(
    path: Path, template: Path, *, styles: Sequence[Path], scripts: Sequence[Path], chart_data: Any, **values: Any
) -> Path:
    """Renders a template and replaces the page that is there, all at once.

    Args:
        path: Of the page; its folder is made.
        template: Of the page, which also takes ``style``, ``script``, ``script_digest`` and ``chart_data``.
        styles: Style sheets, joined in this order.
        scripts: Scripts, likewise.
        chart_data: What the scripts read, JSON-like.
        **values: What else the template takes.

    Returns:
        The path.
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
        # Only this script may run: a sampled text that got past the escaping would still be inert.
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        chart_data=Markup(json.dumps(chart_data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")),
        **values,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _joined(files: Sequence[Path]) -> str:
    return "\n".join(file.read_text(encoding="utf-8").strip() for file in files)
