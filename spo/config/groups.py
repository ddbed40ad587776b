"""Config groups and their members, read without Hydra so that ``spo --help`` starts at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

# Folders of conf/ that are not part of a run's configuration.
_OTHER_FOLDERS = ("dashboard",)


def group_members(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Return the config groups in the folders, with their members.

    A member in a subfolder is written like ``exact/alpha``. ``common.yaml`` is not a member: other members build on it.

    Args:
        folders: Folders of groups.
    """
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            group, *member = file.relative_to(folder).with_suffix("").parts
            if file.stem != "common" and group not in _OTHER_FOLDERS:
                groups.setdefault(group, set()).add("/".join(member))
    return {group: sorted(members) for group, members in sorted(groups.items())}
