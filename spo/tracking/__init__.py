"""Where metrics go: the local record, which is the truth, and trackers, which are views of it.

What needs lightning is imported from its own module (`spo.callbacks.history`, `spo.tracking.wandb`).
"""

from spo.tracking.describe import RunDescription, Tracker

__all__ = ["RunDescription", "Tracker"]
