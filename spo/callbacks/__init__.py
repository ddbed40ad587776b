"""Lightning callbacks of the alignment run."""

from spo.callbacks.checkpoint import Checkpoint
from spo.callbacks.progress import Progress

__all__ = ["Checkpoint", "Progress"]
