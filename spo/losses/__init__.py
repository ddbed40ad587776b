"""Preference losses, one file per method. This list is a convenience for imports; nothing reads it."""

from spo.losses.base import PreferenceLoss, as_loss
from spo.losses.dpo import DPOLoss
from spo.losses.ipo import IPOLoss
from spo.losses.sft import SFTLoss
from spo.losses.spo import SPOLoss, WeightedSPOLoss

__all__ = ["DPOLoss", "IPOLoss", "PreferenceLoss", "SFTLoss", "SPOLoss", "WeightedSPOLoss", "as_loss"]
