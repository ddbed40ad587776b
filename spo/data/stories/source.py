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
    """Preference pairs that are sampled from the reference model and labeled with the gold reward.

    The first completion of a pair is ``chosen`` with probability ``sigmoid(r_a - r_b)`` (Bradley and Terry 1952). Some
    labels therefore contradict the reward, as those of people do.

    Args:
        seed: Random seed of the corpus, the prompts and the labels.
        num_sft: Number of corpus stories for supervised fine-tuning.
        num_prompts: Number of training prompts.
        selection_prompts: Number of prompts to choose checkpoints and settings by.
        test_prompts: Number of prompts of the final evaluation.
        pairs_per_prompt: Number of pairs sampled for each prompt.
        limit: Largest number of prompts in a split; ``None`` for no limit.
        labels: Kind of labels: ``soft`` keeps the probability that chosen is better, ``hard`` keeps only the outcome.

    Attributes:
        world: Grammar that writes the stories.
        reward: Gold reward.

    Raises:
        ValueError: If ``labels`` is neither ``soft`` nor ``hard``.
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
            raise ValueError(f"data.source.labels={labels}: choose soft or hard")
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
        """Return the story openings of a split."""
        return self.world.openings(self.prompts_per_split[split], split)

    def sft_rows(self) -> list[Row]:
        """Return the corpus as supervised rows."""
        stories = self.world.stories(self.num_sft, "sft")
        return [
            Row(prompt=opening, chosen=f" {continuation}", split="train", where=f"stories:sft:{i}")
            for i, (opening, continuation) in enumerate(stories)
        ]

    def rows(self, complete: Completer) -> list[Row]:
        """Return pairs for each prompt of each split, in which both completions are finished and differ.

        Args:
            complete: Function that samples completions from the reference model.
        """
        self.dropped_pairs = Counter(unfinished=0, identical=0)
        return [row for split in SPLITS for row in self._split_rows(split, complete)]

    def _split_rows(self, split: Split, complete: Completer) -> list[Row]:
        prompts = self.prompts(split)
        drawn = complete(prompts, 2 * self.pairs_per_prompt) if prompts else []
        scores = [self._scores(prompt, group) for prompt, group in zip(prompts, drawn, strict=True)]
        # Each split has its own stream, so that the size of one does not change the labels of another.
        rng = Random(f"{self.seed}:labels:{split}")
        rows = []
        for i, (prompt, group, score) in enumerate(zip(prompts, drawn, scores, strict=True)):
            for a in range(0, 2 * self.pairs_per_prompt, 2):
                b = a + 1
                draw = rng.random()  # Drawn for dropped pairs too, so that they do not change the labels of others.
                if not (group[a].finished and group[b].finished):
                    self.dropped_pairs["unfinished"] += 1
                    continue
                if group[a].text == group[b].text:
                    self.dropped_pairs["identical"] += 1
                    continue
                chosen, rejected = (a, b) if draw < sigmoid(score[a] - score[b]) else (b, a)
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
    """Return the logistic function of any finite number, without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))
