"""Lightning callbacks of the alignment run."""

from spo.callbacks.checkpoint import Checkpoint
from spo.callbacks.data_time import DataTime
from spo.callbacks.health import Health
from spo.callbacks.interruption import Interruption
from spo.callbacks.nonfinite import NonFinite
from spo.callbacks.progress import Progress
from spo.callbacks.samples import ValidationSamples
from spo.callbacks.stop import Stop

__all__ = [
    "Checkpoint",
    "DataTime",
    "Health",
    "Interruption",
    "NonFinite",
    "Progress",
    "Stop",
    "ValidationSamples",
]
