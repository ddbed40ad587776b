"""Rewards and judges behind one interface: who says which of two completions is the better one."""

from spo.evaluation.judges.base import Comparison, Judge, JudgeError, verdict_of_rewards

__all__ = ["Comparison", "Judge", "JudgeError", "verdict_of_rewards"]
