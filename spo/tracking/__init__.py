"""Where metrics go: the local record, which is the truth, and trackers, which are views of it."""

from spo.tracking.describe import RunDescription, Tracker
from spo.tracking.record import Record
from spo.tracking.wandb import WandbTracker

__all__ = ["Record", "RunDescription", "Tracker", "WandbTracker"]
