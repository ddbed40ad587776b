"""Preference losses, one file for each method. This list is a convenience for imports; nothing reads it."""

from spo.losses.alpha_dpo import AlphaDPOLoss
from spo.losses.alpha_spin import AlphaSPINLoss
from spo.losses.aot import AOTLoss
from spo.losses.apo_down import APODownLoss
from spo.losses.apo_zero import APOZeroLoss
from spo.losses.aps import APSLoss
from spo.losses.bapo import BAPOLoss
from spo.losses.base import LabelledLoss, ListLoss, Loss, PreferenceLoss
from spo.losses.bco import BCOLoss
from spo.losses.best_of_n import SPOBestOfNLoss
from spo.losses.cpo import CPOLoss
from spo.losses.declarations import Column, DataNeeds, Drawn, Feature, Mismatched, Role, Term
from spo.losses.discopop import DiscoPOPLoss
from spo.losses.dpo import DPOLoss
from spo.losses.dpo_length_normalized import LengthNormalizedDPOLoss
from spo.losses.dpo_nll import DPONLLLoss
from spo.losses.embedders import HashedWords
from spo.losses.exo import EXOLoss
from spo.losses.exo_rw import EXORewardLoss
from spo.losses.f_dpo import FDPOLoss
from spo.losses.heads import StateHead
from spo.losses.hinge import HingeLoss
from spo.losses.ipo import IPOLoss
from spo.losses.kto import KTOLoss
from spo.losses.ld_dpo import LDDPOLoss
from spo.losses.margins import (
    both_log_ratios,
    both_policy_logps,
    chosen_nll,
    log_ratio_margin,
    log_ratios,
    per_token,
    policy_margin,
    reference_margin,
)
from spo.losses.minor_dpo import MinorDPOLoss
from spo.losses.mix import MixLoss
from spo.losses.mrpo import MRPOLoss
from spo.losses.nca import NCALoss
from spo.losses.orpo import ORPOLoss
from spo.losses.ranked import SPORankedLoss
from spo.losses.rdpo import RDPOLoss
from spo.losses.rosepo import RosePOLoss
from spo.losses.rpo import RPOLoss
from spo.losses.rpo_unpaired import RPOUnpairedLoss
from spo.losses.rso_hinge import RSOHingeLoss
from spo.losses.self_supervised_po import SelfSupervisedPOLoss
from spo.losses.sequential_po import SequentialPOLoss
from spo.losses.sft import SFTLoss
from spo.losses.simpo import SimPOLoss
from spo.losses.slic import SLiCLoss
from spo.losses.spl import SPLLoss
from spo.losses.spo import SPOLoss, WeightedSPOLoss
from spo.losses.sppo import SPPOLoss
from spo.losses.tdpo import TDPOLoss
from spo.losses.upo import UPOLoss
from spo.losses.wpo import WPOLoss

__all__ = [
    "AOTLoss",
    "APODownLoss",
    "APOZeroLoss",
    "APSLoss",
    "AlphaDPOLoss",
    "AlphaSPINLoss",
    "BAPOLoss",
    "BCOLoss",
    "CPOLoss",
    "Column",
    "DPOLoss",
    "DPONLLLoss",
    "DataNeeds",
    "DiscoPOPLoss",
    "Drawn",
    "EXOLoss",
    "EXORewardLoss",
    "FDPOLoss",
    "Feature",
    "HashedWords",
    "HingeLoss",
    "IPOLoss",
    "KTOLoss",
    "LDDPOLoss",
    "LabelledLoss",
    "LengthNormalizedDPOLoss",
    "ListLoss",
    "Loss",
    "MRPOLoss",
    "MinorDPOLoss",
    "Mismatched",
    "MixLoss",
    "NCALoss",
    "ORPOLoss",
    "PreferenceLoss",
    "RDPOLoss",
    "RPOLoss",
    "RPOUnpairedLoss",
    "RSOHingeLoss",
    "Role",
    "RosePOLoss",
    "SFTLoss",
    "SLiCLoss",
    "SPLLoss",
    "SPOBestOfNLoss",
    "SPOLoss",
    "SPORankedLoss",
    "SPPOLoss",
    "SelfSupervisedPOLoss",
    "SequentialPOLoss",
    "SimPOLoss",
    "StateHead",
    "TDPOLoss",
    "Term",
    "UPOLoss",
    "WPOLoss",
    "WeightedSPOLoss",
    "both_log_ratios",
    "both_policy_logps",
    "chosen_nll",
    "log_ratio_margin",
    "log_ratios",
    "per_token",
    "policy_margin",
    "reference_margin",
]
