"""Rounds of self-play: how samples of a policy become the pairs that the next round trains on."""

from spo.rounds.pairing import (
    AllPairs,
    BestAndWorst,
    OwnAgainstData,
    Pairing,
    Ranking,
    RejectionSampling,
    rejection_sample,
)
from spo.rounds.source import RoundSource

__all__ = [
    "AllPairs",
    "BestAndWorst",
    "OwnAgainstData",
    "Pairing",
    "Ranking",
    "RejectionSampling",
    "RoundSource",
    "rejection_sample",
]
