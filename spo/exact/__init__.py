"""Exact results for runs on an enumerable language: the optimum of the objective, and the distance to it."""

from spo.exact.metrics import ExactMetrics
from spo.exact.optimum import Objective, Optimum, beyond_enumeration, find_optimum, why_no_optimum
from spo.exact.world import World

__all__ = ["ExactMetrics", "Objective", "Optimum", "World", "beyond_enumeration", "find_optimum", "why_no_optimum"]
