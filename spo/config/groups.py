"""Config groups and their members, read without Hydra so that ``spo --help`` starts at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from spo.records.files import load_yaml
from spo.resources import conf_dir

METHOD_GROUPS = (
    "soft preference",
    "with a reference",
    "noisy labels",
    "reference-free",
    "token-level",
    "whole batch",
    "unpaired",
    "lists and scores",
    "self-play",
    "several references",
    "further terms",
    "supervised",
)
"""Headings of the shipped methods (``method.group``), in the order of lists. A plugin may use any other one."""
OTHER_METHODS = "other"
"""Heading of methods that do not state one."""

# Folders of conf/ that are not part of a run's configuration.
_OTHER_FOLDERS = ("dashboard",)


def config_folders(config_dir: str | Path | None) -> list[Path]:
    """Return the folders of the config groups in the order of Hydra's search: the shipped one, then a user's."""
    return [conf_dir(), *([Path(config_dir)] if config_dir is not None else [])]


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


def shipped_names(folder: Path) -> list[str]:
    """Return the members of a folder, such as ``method/dpo``, that Hydra ignores: shipped ones have their names."""
    shipped = group_members([conf_dir()])
    own = group_members([folder]).items() if folder.resolve() != conf_dir().resolve() else ()
    return [f"{group}/{name}" for group, members in own for name in members if name in shipped.get(group, [])]


def method_file(name: str, folders: Iterable[Path]) -> Path:
    """Return the yaml file of a method, in the first of the folders that has it, as Hydra searches."""
    return next(file for folder in folders if (file := folder / "method" / f"{name}.yaml").is_file())


def methods_by_group(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Return the members of the group ``method`` under their headings, in the order of :data:`METHOD_GROUPS`.

    Args:
        folders: Folders of groups.
    """
    folders = list(folders)
    found: dict[str, list[str]] = {}
    for name in group_members(folders).get("method", []):
        try:
            node = load_yaml(method_file(name, folders).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):  # Composing the method reports what is wrong.
            node = None
        group = node.get("group") if isinstance(node, dict) else None
        found.setdefault(str(group) if group else OTHER_METHODS, []).append(name)
    own = sorted(found.keys() - {*METHOD_GROUPS, OTHER_METHODS})
    return {group: found[group] for group in (*METHOD_GROUPS, *own, OTHER_METHODS) if group in found}
