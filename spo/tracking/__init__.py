"""Trackers: views of a run outside its directory, which holds the record.

Modules that need lightning are imported by their own path, such as ``spo.tracking.wandb``.
"""

from spo.tracking.describe import RunDescription, Tracker

__all__ = ["RunDescription", "Tracker"]
