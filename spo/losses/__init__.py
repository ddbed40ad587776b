"""Preference losses, one file for each method. This list is a convenience for imports; nothing reads it."""

from spo.losses.base import (
    LabelledLoss,
    ListLoss,
    Loss,
    PreferenceLoss,
    log_ratios,
    policy_margin,
    reference_margin,
)
from spo.losses.best_of_n import SPOBestOfNLoss
from spo.losses.declarations import Column, DataNeeds, Drawn, Feature, Mismatched, Role, Term
from spo.losses.dpo import DPOLoss
from spo.losses.ipo import IPOLoss
from spo.losses.kto import KTOLoss
from spo.losses.ranked import SPORankedLoss
from spo.losses.self_supervised_po import SelfSupervisedPOLoss
from spo.losses.sft import SFTLoss
from spo.losses.spo import SPOLoss, WeightedSPOLoss
from spo.losses.upo import UPOLoss

__all__ = [
    "Column",
    "DPOLoss",
    "DataNeeds",
    "Drawn",
    "Feature",
    "IPOLoss",
    "KTOLoss",
    "LabelledLoss",
    "ListLoss",
    "Loss",
    "Mismatched",
    "PreferenceLoss",
    "Role",
    "SFTLoss",
    "SPOBestOfNLoss",
    "SPOLoss",
    "SPORankedLoss",
    "SelfSupervisedPOLoss",
    "Term",
    "UPOLoss",
    "WeightedSPOLoss",
    "log_ratios",
    "policy_margin",
    "reference_margin",
]
