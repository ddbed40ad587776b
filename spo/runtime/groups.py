"""Where the yaml files lie, and which config groups they make; without Hydra, so that `spo --help` starts at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spo.runtime.errors import UserError

MAIN = "train"


def conf_dir() -> Path:
    """The folder of the shipped yaml files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{MAIN}.yaml").is_file():
            return folder
    raise UserError(f"the configuration files of spo are missing from {package}: install the package again")


def group_members(folders: Iterable[Path]) -> dict[str, list[str]]:
    """The config groups in the folders, with their members; those of a subfolder are written like ``exact/alpha``.

    ``common.yaml`` is no member, but what members build on.
    """
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            group, *member = file.relative_to(folder).with_suffix("").parts
            if file.stem != "common":
                groups.setdefault(group, set()).add("/".join(member))
    return {group: sorted(members) for group, members in sorted(groups.items())}
