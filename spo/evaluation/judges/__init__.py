"""Rewards and judges behind one interface: who says which of two completions is the better one."""

from spo.evaluation.judges.base import Comparison, Judge, JudgeError, verdict_of_rewards
from spo.evaluation.judges.reward import RewardJudge, reward_judge

__all__ = ["Comparison", "Judge", "JudgeError", "RewardJudge", "reward_judge", "verdict_of_rewards"]
