"""Preference losses, one file for each method. This list is a convenience for imports; nothing reads it."""

from spo.losses.base import ListLoss, Loss, PreferenceLoss
from spo.losses.best_of_n import SPOBestOfNLoss
from spo.losses.dpo import DPOLoss
from spo.losses.ipo import IPOLoss
from spo.losses.ranked import SPORankedLoss
from spo.losses.sft import SFTLoss
from spo.losses.spo import SPOLoss, WeightedSPOLoss

__all__ = [
    "DPOLoss",
    "IPOLoss",
    "ListLoss",
    "Loss",
    "PreferenceLoss",
    "SFTLoss",
    "SPOBestOfNLoss",
    "SPOLoss",
    "SPORankedLoss",
    "WeightedSPOLoss",
]
