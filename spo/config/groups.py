"""Which config groups the yaml files make; without Hydra, so that `spo --help` starts at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_NO_GROUPS = ("dashboard",)


def group_members(folders: Iterable[Path]) -> dict[str, list[str]]:
    """The config groups in the folders, with their members; those of a subfolder are written like ``exact/alpha``.

    ``common.yaml`` is no member, but what members build on; what dashboards show is no part of a run.
    """
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            group, *member = file.relative_to(folder).with_suffix("").parts
            if file.stem != "common" and group not in _NO_GROUPS:
                groups.setdefault(group, set()).add("/".join(member))
    return {group: sorted(members) for group, members in sorted(groups.items())}
