"""Files that come with the package."""

from __future__ import annotations

from pathlib import Path

from spo.errors import UserError

MAIN_CONFIG = "train"


def conf_dir() -> Path:
    """Return the folder of the shipped yaml files: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{MAIN_CONFIG}.yaml").is_file():
            return folder
    raise UserError(f"the configuration files of spo are missing from {package}: install the package again")
