"""Schedules of alpha and beta over optimizer steps, and controllers that adjust them by measurements."""

from spo.schedules.base import Schedule
from spo.schedules.controllers import Controller, TargetEntropy, TargetKL
from spo.schedules.fixed import Constant, Cosine, Linear, PerStep

__all__ = ["Constant", "Controller", "Cosine", "Linear", "PerStep", "Schedule", "TargetEntropy", "TargetKL"]
