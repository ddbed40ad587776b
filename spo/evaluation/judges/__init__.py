"""Rewards and judges behind one interface: who says which of two completions is the better one."""

from spo.errors import JudgeError
from spo.evaluation.judges.base import Comparison, Judge
from spo.evaluation.judges.http import HTTPJudge
from spo.evaluation.judges.local import LanguageModelJudge, RewardModelJudge
from spo.evaluation.judges.pairwise import PairwiseJudge
from spo.evaluation.judges.reward import RewardJudge, reward_judge

__all__ = [
    "Comparison",
    "HTTPJudge",
    "Judge",
    "JudgeError",
    "LanguageModelJudge",
    "PairwiseJudge",
    "RewardJudge",
    "RewardModelJudge",
    "reward_judge",
]
