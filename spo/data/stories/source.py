"""The built-in data source: prompts from the story world, sampled pairs, labels from Bradley-Terry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice
from random import Random
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Le

from spo.bounds import NonNegativeInt, PositiveFloat, PositiveInt
from spo.data.gold_columns import FLIP_PROBABILITY, GOLD_COLUMNS, gold_columns, sigmoid
from spo.data.rows import SPLITS, Completer, Completion, Row, Split
from spo.data.source import Source
from spo.data.stories.grammar import NAMES, THREADS, StoryWorld, most_openings
from spo.data.stories.reward import GoldReward, problem_of, subject

Labels = Literal["soft", "hard", "deterministic"]


class StoriesSource(Source):
    """Preference pairs that a writer samples and the gold reward labels.

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
        labels: Kind of labels: ``soft`` keeps the probability that chosen is better, ``hard`` keeps only the outcome,
            and ``deterministic`` chooses the completion with the higher reward. A tie has no such completion and is
            dropped.
        label_noise: Probability that an outcome is flipped, in every split. Soft labels keep the probability after it.
        responses: Writer of the completions: ``reference`` (the reference model), ``grammar`` (the world itself, with
            the flaws of the corpus), or a Hugging Face folder.
        temperature: Temperature at which a model writes the completions.
        heroes: Names of the heroes of training prompts; ``None`` for all.
        problems: Kinds of problems, keys of ``THREADS``. Training pairs consist of completions with one of them.
            ``None`` for all completions.
        num_unlabeled: Number of further prompts for training that do not have pairs and are about all heroes.

    Attributes:
        world: Grammar that writes the stories.
        reward: Gold reward.

    Raises:
        ValueError: If ``labels`` is unknown, if ``heroes`` or ``problems`` has an unknown name, or if the grammar is to
            write at another temperature than 1.
    """

    samples_rows = True
    provided_columns = GOLD_COLUMNS
    sft_reads = ("seed", "num_sft")

    def __init__(
        self,
        seed: NonNegativeInt,
        num_sft: PositiveInt,
        num_prompts: PositiveInt,
        selection_prompts: NonNegativeInt,
        test_prompts: PositiveInt,
        pairs_per_prompt: PositiveInt,
        limit: PositiveInt | None,
        labels: Labels,
        # Runs of earlier versions do not have the keys below.
        label_noise: Annotated[float, Ge(0), Le(0.5)] = 0.0,
        responses: str = "reference",
        temperature: PositiveFloat = 1.0,
        heroes: Sequence[str] | None = None,
        problems: Sequence[str] | None = None,
        num_unlabeled: NonNegativeInt = 0,
    ) -> None:
        if labels not in get_args(Labels):
            raise ValueError(f"data.source.labels={labels}: choose soft, hard or deterministic")
        if responses == "grammar" and temperature != 1.0:
            raise ValueError(
                f"data.source.temperature={temperature}: data.source.responses=grammar writes without a model; set "
                "data.source.temperature=1.0"
            )
        super().__init__()
        self.seed = seed
        self.num_sft = num_sft
        self.prompts_per_split: dict[Split, int] = {
            "train": num_prompts,
            "selection": selection_prompts,
            "test": test_prompts,
        }
        self.num_unlabeled = num_unlabeled
        if limit is not None:
            self.prompts_per_split = {split: min(n, limit) for split, n in self.prompts_per_split.items()}
            self.num_unlabeled = min(num_unlabeled, limit)
        self.pairs_per_prompt = pairs_per_prompt
        self.labels, self.label_noise = labels, label_noise
        self.responses, self.temperature = responses, temperature
        self.writer = None if responses in ("reference", "grammar") else responses
        self.heroes = tuple(NAMES) if heroes is None else _known("heroes", heroes, NAMES)
        self.problems = None if problems is None else _known("problems", problems, THREADS)
        self.world = StoryWorld(seed)
        self.reward = GoldReward()
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Check that the world has as many openings as there are prompts."""
        keys: dict[Split, str] = {"train": "num_prompts", "selection": "selection_prompts", "test": "test_prompts"}
        for split, key in keys.items():
            number, heroes = self.prompts_per_split[split], self._heroes(split)
            if number > (most := most_openings(split, heroes)):
                about = "" if len(heroes) == len(NAMES) else f" about {', '.join(heroes)}; name more data.source.heroes"
                raise ValueError(
                    f"data.source.{key}={number}: the story world draws at most {most} {split} prompts{about}"
                )
        most = most_openings("train", NAMES) - self.prompts_per_split["train"]
        if self.num_unlabeled > most:
            raise ValueError(
                f"data.source.num_unlabeled={self.num_unlabeled}: beside the training prompts, the story world draws "
                f"at most {most} openings"
            )

    def _heroes(self, split: Split) -> tuple[str, ...]:
        """Return the heroes of a split."""
        return self.heroes if split == "train" else tuple(NAMES)

    def prompts(self, split: Split) -> list[str]:
        """Return the story openings of a split."""
        return self.world.openings(self.prompts_per_split[split], split, self._heroes(split))

    def unlabeled_prompts(self) -> list[str]:
        """Return further story openings of the training split, about all heroes."""
        if self.num_unlabeled == 0:
            return []
        return self.world.openings(self.num_unlabeled, "train", without=set(self.prompts("train")))

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
            complete: Function that samples completions from the model that writes them.
        """
        self.dropped_pairs = Counter(unfinished=0, identical=0)
        return [row for split in SPLITS for row in self._split_rows(split, complete)]

    def _split_rows(self, split: Split, complete: Completer) -> list[Row]:
        prompts = self.prompts(split)
        problems = self.problems if split == "train" else None
        drawn = self._completions(prompts, problems, complete)
        scores = [self._scores(prompt, group) for prompt, group in zip(prompts, drawn, strict=True)]
        # Each split has its own streams, so that the size of one does not change the labels of another.
        outcomes, flips = Random(f"{self.seed}:labels:{split}"), Random(f"{self.seed}:label_noise:{split}")
        rows = []
        for i, (prompt, group, score) in enumerate(zip(prompts, drawn, scores, strict=True)):
            wanted = [j for j, one in enumerate(group) if _is_wanted(one.text, problems)]
            for k in range(self.pairs_per_prompt):
                # Drawn for dropped pairs too, so that they do not change the labels of others.
                draw, is_flipped = outcomes.random(), flips.random() < self.label_noise
                pair = wanted[2 * k : 2 * k + 2]
                if reason := self._why_dropped([group[j] for j in pair], [score[j] for j in pair]):
                    self.dropped_pairs[reason] += 1
                    continue
                a, b = pair
                margin = score[a] - score[b]
                is_first = margin > 0 if self.labels == "deterministic" else draw < sigmoid(margin)
                chosen, rejected = (a, b) if is_first != is_flipped else (b, a)
                rows.append(
                    Row(
                        prompt=prompt,
                        chosen=group[chosen].text,
                        rejected=group[rejected].text,
                        preference=self._preference(score[chosen] - score[rejected]),
                        split=split,
                        where=f"stories:{split}:{i * self.pairs_per_prompt + k}",
                        columns=self._columns(score[chosen], score[rejected]),
                    )
                )
        return rows

    def _columns(self, chosen: float, rejected: float) -> dict[str, float]:
        """Return the columns that the loss declares, from the rewards of a pair."""
        found = gold_columns(chosen, rejected, self.label_noise, self.needs.number_columns)
        if self.labels == "soft" and FLIP_PROBABILITY in found:
            found[FLIP_PROBABILITY] = 0.0  # The soft label states the uncertainty, which must not count twice.
        return found

    def _completions(
        self, prompts: Sequence[str], problems: Collection[str] | None, complete: Completer
    ) -> list[list[Completion]]:
        """Return the completions of each prompt, two for each of its pairs."""
        number = 2 * self.pairs_per_prompt
        if self.responses != "grammar":
            return complete(prompts, number) if prompts else []
        written = (
            self.world.continuations(prompt, subject(prompt), lambda text: _is_wanted(text, problems))
            for prompt in prompts
        )
        return [[Completion(f" {text}", True) for text in islice(texts, number)] for texts in written]

    def _why_dropped(self, pair: Sequence[Completion], scores: Sequence[float]) -> str | None:
        """Return the reason why two completions are not a pair, ``None`` if they are one."""
        if len(pair) < 2:
            return "other_problem"
        a, b = pair
        if not (a.finished and b.finished):
            return "unfinished"
        if a.text == b.text:
            return "identical"
        return "tied" if self.labels == "deterministic" and scores[0] == scores[1] else None

    def _preference(self, margin: float) -> float | None:
        """Return the probability that a label prefers a completion with such a margin in reward; ``None`` for 1."""
        if self.labels != "soft":
            return None
        probability = sigmoid(margin)
        # The exact expectation over flips. Without noise, the probability keeps its last bit.
        return probability + self.label_noise * (1 - 2 * probability)

    def _scores(self, prompt: str, group: Sequence[Completion]) -> list[float]:
        return self.reward([prompt] * len(group), [completion.text for completion in group])["reward"]


def _is_wanted(completion: str, problems: Collection[str] | None) -> bool:
    return problems is None or problem_of(completion) in problems


def _known(key: str, names: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """Return the chosen names, each once.

    Raises:
        ValueError: If there is no name, or an unknown one.
    """
    unknown = [str(name) for name in names if name not in known]
    if unknown or not names:
        what = f"there is no {', '.join(unknown)}" if unknown else "name at least one"
        raise ValueError(f"data.source.{key}: {what}; the {key} of the story world are {', '.join(known)}")
    return tuple(dict.fromkeys(names))
