"""spo: an experiment framework for aligning language models to preferences.

The names below are the stable Python interface. They load on first use, so ``import spo`` imports neither torch nor
Hydra.
"""

from __future__ import annotations

import sys

# `python -m spo` puts the current folder first, where a typing.py would run instead of Python's own. At this moment
# Python still looks for spo/__main__.py, so argv[0] is "-m"; an import by another program is left alone.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and {"spo", "spo.__main__", "-mspo"} & {*sys.orig_argv}:
    del sys.path[0]

from typing import TYPE_CHECKING, Any

from spo import _old_names as _old_names

if TYPE_CHECKING:
    from spo.api import compare, compose, evaluate, iterate, load_run, load_runs, train

__version__ = "0.2.0.dev0"
__all__ = ["__version__", "compare", "compose", "evaluate", "iterate", "load_run", "load_runs", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from spo import api

        return getattr(api, name)
    raise AttributeError(f"module 'spo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
