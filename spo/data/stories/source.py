"""The built-in data source: prompts from the story world, pairs from the reference model, labels from Bradley-Terry."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Literal

from spo.bounds import NonNegativeInt, PositiveInt
from spo.data.rows import SPLITS, Completer, Completion, Row, Split
from spo.data.source import Source
from spo.data.stories.grammar import StoryWorld
from spo.data.stories.reward import GoldReward


class StoriesSource(Source):
    """Preference pairs that the reference model writes and the gold reward labels.

    The two completions of a pair are drawn from the reference; ``chosen`` is the first one with probability
    ``sigmoid(r_a - r_b)`` (Bradley and Terry 1952), so some pairs are labelled against the reward, as people do.

    Args:
        seed: fixes the world, the corpus, the prompts and the labels.
        num_sft: corpus stories for supervised fine-tuning.
        num_prompts: training prompts.
        selection_prompts: prompts for choosing a checkpoint or a setting.
        test_prompts: prompts for the final evaluation.
        pairs_per_prompt: pairs drawn for each prompt.
        limit: prompts of each split at most; ``None`` for all.
        labels: ``soft`` keeps the probability that chosen is the better one, ``hard`` only the outcome.

    Attributes:
        reward: the gold reward.
    """

    samples_rows = True

    def __init__(
        self,
        seed: NonNegativeInt,
        num_sft: PositiveInt,
        num_prompts: PositiveInt,
        selection_prompts: NonNegativeInt,
        test_prompts: PositiveInt,
        pairs_per_prompt: PositiveInt,
        limit: PositiveInt | None,
        labels: Literal["soft", "hard"],
    ) -> None:
        if labels not in ("soft", "hard"):
            raise ValueError(f"data.labels is {labels!r}: choose soft or hard")
        super().__init__()
        self.seed = seed
        self.num_sft = num_sft
        self.prompts_per_split: dict[Split, int] = {
            "train": num_prompts,
            "selection": selection_prompts,
            "test": test_prompts,
        }
        if limit is not None:
            self.prompts_per_split = {split: min(n, limit) for split, n in self.prompts_per_split.items()}
        self.pairs_per_prompt = pairs_per_prompt
        self.labels = labels
        self.world = StoryWorld(seed)
        self.reward = GoldReward()

    def prompts(self, split: Split) -> list[str]:
        """The story openings of a split."""
        return self.world.openings(self.prompts_per_split[split], split)

    def sft_rows(self) -> list[Row]:
        """The corpus as supervised rows."""
        stories = self.world.stories(self.num_sft, "sft")
        return [
            Row(prompt=opening, chosen=f" {continuation}", split="train", where=f"stories:sft:{i}")
            for i, (opening, continuation) in enumerate(stories)
        ]

    def rows(self, complete: Completer) -> list[Row]:
        """Pairs for every prompt of every split.

        Args:
            complete: draws completions from the reference model.

        Returns:
            The pairs in which both completions are finished and differ from each other.
        """
        self.dropped_pairs = Counter(unfinished=0, identical=0)
        return [row for split in SPLITS for row in self._split_rows(split, complete)]

    def _split_rows(self, split: Split, complete: Completer) -> list[Row]:
        prompts = self.prompts(split)
        drawn = complete(prompts, 2 * self.pairs_per_prompt) if prompts else []
        scores = [self._scores(prompt, group) for prompt, group in zip(prompts, drawn, strict=True)]
        rng = Random(f"{self.seed}:labels:{split}")
        rows = []
        for i, (prompt, group, score) in enumerate(zip(prompts, drawn, scores, strict=True)):
            for a in range(0, 2 * self.pairs_per_prompt, 2):
                b = a + 1
                luck = rng.random()  # drawn for dropped pairs too: one pair's fate never moves another's label
                if not (group[a].finished and group[b].finished):
                    self.dropped_pairs["unfinished"] += 1
                    continue
                if group[a].text == group[b].text:
                    self.dropped_pairs["identical"] += 1
                    continue
                chosen, rejected = (a, b) if luck < sigmoid(score[a] - score[b]) else (b, a)
                rows.append(
                    Row(
                        prompt=prompt,
                        chosen=group[chosen].text,
                        rejected=group[rejected].text,
                        preference=sigmoid(score[chosen] - score[rejected]) if self.labels == "soft" else None,
                        split=split,
                        where=f"stories:{split}:{i * self.pairs_per_prompt + a // 2}",
                    )
                )
        return rows

    def _scores(self, prompt: str, group: Sequence[Completion]) -> list[float]:
        return self.reward([prompt] * len(group), [completion.text for completion in group])["reward"]


def sigmoid(x: float) -> float:
    """The logistic function, for any finite x."""
    return 0.5 * (1 + math.tanh(x / 2))
