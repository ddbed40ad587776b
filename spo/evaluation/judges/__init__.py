"""Rewards and judges behind one interface that decides which of two completions is better."""

from spo.errors import JudgeError
from spo.evaluation.judges.base import Judge, JudgedPair
from spo.evaluation.judges.http import HTTPJudge
from spo.evaluation.judges.local import LanguageModelJudge, RewardModelJudge
from spo.evaluation.judges.pairwise import PairwiseJudge
from spo.evaluation.judges.reward import RewardJudge, reward_judge

__all__ = [
    "HTTPJudge",
    "Judge",
    "JudgeError",
    "JudgedPair",
    "LanguageModelJudge",
    "PairwiseJudge",
    "RewardJudge",
    "RewardModelJudge",
    "reward_judge",
]
