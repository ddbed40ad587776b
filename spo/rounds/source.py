"""The data of a round of self-play: prompts of another source, completed by the policy and paired by their scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from annotated_types import Gt, Le

from spo.bounds import NonNegativeInt, PositiveFloat, PositiveInt
from spo.data.gold_columns import sigmoid
from spo.data.needs import needs_pairs
from spo.data.rendering import prompt_id
from spo.data.rows import Completer, Completion, DataError, PromptRequest, Row, Split, Text, Writer
from spo.data.source import Source
from spo.data.splits import row_id, split_rows
from spo.errors import UserError
from spo.evaluation.judges.together import judging
from spo.processes import share
from spo.rounds.pairing import Pairing
from spo.rounds.scoring import Scores, score_completions

if TYPE_CHECKING:
    from spo.losses import DataNeeds

Labels = Literal["soft", "certain"]
COLUMNS = ("reward", "win_rate")
"""Numbers of a completion that a round provides, in columns such as ``chosen_reward``; lists have ``rewards``."""

OF_DATA = " in the data"
"""End of the reasons for which the source of the prompts dropped pairs of its own."""

_MAX_STAND_IN_PAIRS = 32
"""Number of pairs of the data that stand in for own pairs, where nothing reads them."""


@dataclass(frozen=True)
class _TrainingPrompt:
    """A training prompt.

    Attributes:
        request: Prompt with the values of its chat template.
        answers: Distinct responses of the data.
        where: Place of the prompt that a person can open.
    """

    request: PromptRequest
    answers: tuple[Text, ...]
    where: str


class RoundSource(Source):
    """Pairs that a round of self-play trains on: the policy's own completions of the training prompts.

    The prompts are those of another source, and so are the pairs of the selection and test splits, on which the
    metrics of all rounds are comparable. A completion that does not end within ``data.max_new_tokens`` is dropped.

    The arguments are the keys of ``iteration.source``. Those from ``round`` on are filled in for each round.

    Args:
        source: Source of the prompts and of the pairs of the other splits.
        pairing: Choice of pairs among the completions of a prompt.
        completions: Number of completions of each prompt, or of each distinct response of the data where the pairing
            is against it.
        temperature: Temperature of the completions.
        top_p: Probability of the nucleus that the completions are drawn from; 1 for all tokens.
        prompts: Largest number of training prompts, a random choice in each round; ``None`` for all. With 0, the
            policy completes nothing, and a few pairs of the data stand in for own pairs: for an evaluation on other
            data, which does not read them.
        labels: ``soft`` for the probability that chosen is better by the Bradley-Terry model of the judge's rewards;
            ``certain`` for 1. Labels of a judge that only compares are always certain.
        reward: Component of the judge's reward that scores completions, ``reward`` for the whole.
        reward_scale: Factor of that reward, before it becomes a label or selects.
        history: Number of the newest policies that write completions. Each completion has one of them by chance.
        seed: Random seed of the prompts, writers and pairs.
        splits: Shares of the prompts for ``selection`` and ``test``, for a source without splits of its own.
        split_seed: Random seed of these splits, the same in all rounds and in round 0.
        limit: Largest number of rows of a source that does not sample its pairs; ``None`` for all.
        round: Number of the round, from 1.
        policies: Folders of the policies so far, the newest last; the reference model writes if there is none.
        first: Folder of the model that writes the completions that ``source`` samples itself; ``None`` for its own
            choice.
        earlier_coefficients: Factor of the implicit reward of each finished round, which a loss may read, see
            :func:`spo.stages.earlier_rewards.sequence_rewards`.

    Raises:
        ValueError: An argument is out of range, or the source does not have prompts to complete.
    """

    samples_rows = True
    provided_columns = tuple(f"{rank}_{name}" for name in COLUMNS for rank in ("chosen", "rejected"))

    def __init__(
        self,
        source: Source,
        pairing: Pairing,
        completions: PositiveInt,
        temperature: PositiveFloat,
        top_p: Annotated[float, Gt(0), Le(1)],
        prompts: NonNegativeInt | None,
        labels: Labels,
        reward: str,
        reward_scale: PositiveFloat,
        history: PositiveInt,
        seed: int,
        splits: Mapping[str, float] | None,
        split_seed: int,
        limit: PositiveInt | None,
        round: PositiveInt,
        policies: Sequence[str],
        first: str | None,
        earlier_coefficients: Sequence[float],
    ) -> None:
        super().__init__()
        if source.language is not None:
            raise ValueError("iteration: rounds sample completions, and every response of this data is known already")
        if source.yields_lists or source.yields_labels:
            raise ValueError("iteration: rounds take prompts and pairs; choose data of pairs, such as data=jsonl")
        if labels not in get_args(Labels):
            raise ValueError(f"iteration.source.labels={labels}: choose soft or certain")
        if completions < 2 and not pairing.pairs_with_data:
            raise ValueError(f"iteration.source.completions={completions}: a pair needs at least 2 completions")
        self.source = source
        self.splits, self.split_seed, self.limit = splits or {}, split_seed, limit
        self.round, self.seed, self.max_prompts = round, seed, prompts
        self.pairing, self.yields_lists = pairing, pairing.yields_lists
        self.completions, self.labels, self.reward, self.reward_scale = completions, labels, reward, reward_scale
        self.policies, self.earlier_coefficients = tuple(policies), tuple(earlier_coefficients)
        newest = policies[-history:] if policies else [None]
        self.writers = tuple(Writer(model, temperature, top_p, round) for model in newest)
        # In each round, the pairs that the source samples for the other splits are those of the first model.
        self.writer, self.temperature = source.writer, source.temperature
        self.source_writer = Writer(first if source.writer is None else source.writer, source.temperature)
        self.further_writers = (*self.writers, self.source_writer) if source.samples_rows else self.writers

    @property
    def needs_judge(self) -> bool:  # type: ignore[override]
        """Return whether the rows depend on a judge, because of the pairing or of a column that the loss reads."""
        return (self.pairing.needs_scores and self.max_prompts != 0) or bool(self._columns)

    @property
    def _columns(self) -> set[str]:
        """Return the names of :data:`COLUMNS` that the loss reads."""
        read = {*self.needs.number_columns, *self.needs.list_number_columns}
        return {name for name in COLUMNS if read & {f"chosen_{name}", f"{name}s"}}

    def column_name(self, name: str) -> str:
        """Return the data's own name of a column, for messages."""
        return self.source.column_name(name)

    def check_columns(self) -> None:
        """Check the names that the configuration gives to columns of the prompts' source."""
        self.source.needs = self._needs_of_source
        self.source.check_columns()

    def check_limits(self, max_length: int, truncation: str) -> None:
        """Check that the length limit suits the data."""
        self.source.check_limits(max_length, truncation)

    def prompts(self, split: Split) -> list[str] | None:
        """Return the prompts of a split if the source of the prompts knows them without its rows."""
        return self.source.prompts(split)

    def unlabeled_prompts(self) -> list[str]:
        """Return further prompts to train on, which do not have a pair."""
        return self.source.unlabeled_prompts()

    def sft_rows(self) -> list[Row] | None:
        """Return the supervised rows of the source of the prompts."""
        return self.source.sft_rows()

    def rows(self, complete: Completer) -> list[Row]:
        """Return own pairs for training, and the source's pairs of the other splits.

        Args:
            complete: Function that samples completions.

        Raises:
            DataError: The source does not have training prompts.
            UserError: The judge does not give what the pairing needs.
        """
        inner = self.source
        inner.needs = self._needs_of_source
        given = inner.rows(lambda prompts, n, writer=None: complete(prompts, n, writer or self.source_writer))
        if not inner.samples_rows:  # A source that samples limits its prompts itself.
            given = given[: self.limit]
        self.bad_rows, self.findings = inner.bad_rows, inner.findings
        self.dropped_responses = Counter(inner.dropped_responses)
        self.dropped_pairs = Counter({f"{reason}{OF_DATA}": n for reason, n in inner.dropped_pairs.items()})
        placed = split_rows(given, self.split_seed, self.splits["selection"], self.splits["test"])
        others = [row for row in placed if row.split != "train"]
        if self.max_prompts == 0:
            return self._with_columns([*[row for row in placed if row.split == "train"][:_MAX_STAND_IN_PAIRS], *others])
        asked = self._training_prompts(placed)
        if not asked:
            raise DataError("iteration: the data does not have a training prompt")
        return [*self._own_rows(asked, complete), *self._with_columns(others)]

    @property
    def _needs_of_source(self) -> DataNeeds:
        """Return what the source of the prompts has to provide: pairs if the loss reads pairs, and no numbers."""
        return replace(self.needs, features={}, rejected=needs_pairs(self.needs) and not self.pairing.pairs_with_data)

    # --- prompts and completions ---

    def _training_prompts(self, rows: Sequence[Row]) -> list[_TrainingPrompt]:
        """Return the training prompts of this round, each with the data's responses, in an order of their own."""
        supervised = self.source.sft_rows() if self.pairing.pairs_with_data else None
        named = None if self.pairing.pairs_with_data else self.source.prompts("train")
        if named is not None:
            found = {text: _TrainingPrompt(PromptRequest(text), (), "") for text in named}
        else:
            of_prompt: dict[str, dict[str, Row]] = {}
            for row in rows if supervised is None else supervised:
                if row.split == "train":
                    of_prompt.setdefault(row_id(row), {}).setdefault(prompt_id(row.chosen), row)
            found = {key: _training_prompt(list(distinct.values())) for key, distinct in of_prompt.items()}
        asked = [found[key] for key in sorted(found)]
        if self.max_prompts is not None and len(asked) > self.max_prompts:
            asked = self._random("prompts").sample(asked, self.max_prompts)
        return asked

    def _random(self, use: str) -> Random:
        return Random(f"{self.seed}:{use}:{self.round}")

    def _own_rows(self, asked: Sequence[_TrainingPrompt], complete: Completer) -> list[Row]:
        """Return the pairs of the policy's own completions."""
        groups = self._drawn(asked, complete)
        if self.pairing.pairs_with_data:
            return [row for one, group in zip(asked, groups, strict=True) for row in self._against_data(one, group)]
        finished = [_finished(group) for group in groups]
        self.dropped_pairs["unfinished"] += sum(not texts for texts in finished)
        scored = self._scores([one.request.prompt for one in asked], finished, self.pairing.needs_rewards)
        chance = self._random("pairs")
        rows: list[Row] = []
        for one, texts, scores in zip(asked, finished, scored, strict=True):
            lists = self.pairing.choose(scores.scores, chance) if len(texts) > 1 else []
            self.dropped_pairs["tied"] += len(texts) > 1 and not lists
            self.dropped_pairs["unfinished"] += len(texts) == 1
            for places in lists:
                if len({texts[place] for place in places}) < len(places):
                    self.dropped_pairs["identical"] += 1
                    continue
                rows.append(self._row(one, [texts[place] for place in places], scores.of(places)))
        return rows

    def _drawn(self, asked: Sequence[_TrainingPrompt], complete: Completer) -> list[list[Completion]]:
        """Return the completions of each prompt, each of a writer by chance."""
        numbers = [self.completions * (len(one.answers) if self.pairing.pairs_with_data else 1) for one in asked]
        written: dict[int, list[list[Completion]]] = {}
        for number in sorted(set(numbers)):
            places = [place for place, of_prompt in enumerate(numbers) if of_prompt == number]
            requests = [asked[place].request for place in places]
            by_writer = [complete(requests, number, writer) for writer in self.writers]
            written |= zip(places, map(list, zip(*by_writer, strict=True)), strict=True)
        chance = self._random("writers")
        return [
            [written[place][chance.randrange(len(self.writers))][i] for i in range(number)]
            for place, number in enumerate(numbers)
        ]

    def _against_data(self, one: _TrainingPrompt, group: Sequence[Completion]) -> Iterator[Row]:
        """Yield a pair of a response of the data and an own completion, for each completion that differs from it.

        Each response has completions of its own, as SPIN pairs every supervised response (arXiv:2401.01335).
        """
        for place, chosen in enumerate(one.answers):
            texts = _finished(group[place * self.completions : (place + 1) * self.completions])
            self.dropped_pairs["unfinished"] += not texts
            for text in texts:
                rejected = _in_form(text, one.request.prompt)
                if chosen == rejected:
                    self.dropped_pairs["identical"] += 1
                    continue
                yield Row(chosen=chosen, rejected=rejected, split="train", where=one.where, **vars(one.request))

    def _row(self, one: _TrainingPrompt, texts: Sequence[str], scores: Scores) -> Row:
        """Return a row of completions, the best one first, with their scores in this order."""
        chosen, rejected, *worse = (_in_form(text, one.request.prompt) for text in texts)
        preference = None
        if self.labels == "soft" and scores.are_rewards and not self.yields_lists:
            preference = sigmoid(scores.scores[0] - scores.scores[1])
        return Row(
            chosen=chosen,
            rejected=rejected,
            worse=tuple(worse),
            preference=preference,
            split="train",
            where=one.where,
            columns=self._column_values(scores),
            **vars(one.request),
        )

    # --- scores ---

    def _scores(
        self, prompts: Sequence[Text], groups: Sequence[Sequence[str]], needs_rewards: bool = False
    ) -> list[Scores]:
        """Return the scores of completions. The first process of the run asks the judge."""
        if self.judge is None:
            raise UserError(
                "iteration: the completions of a round are scored by a judge, and there is none: choose judge=MEMBER, "
                "or iteration=spin, which does not need one"
            )
        with judging(self.judge) as is_judging:
            found = score_completions(self.judge, prompts, groups, self.reward, self.reward_scale) if is_judging else []
        scored = share(found)
        if needs_rewards and not all(scores.are_rewards for scores in scored):
            raise UserError(
                f"iteration.source.pairing={type(self.pairing).__name__} needs a judge that gives rewards, and this "
                "one only compares: choose judge=reward_model, judge=function or judge=gold"
            )
        return scored

    def _with_columns(self, rows: Sequence[Row]) -> list[Row]:
        """Return pairs of the data with the numbers that the loss reads."""
        if not self._columns or self.yields_lists:
            return list(rows)
        scored = self._scores([row.prompt for row in rows], [[_text(one) for one in row.completions] for row in rows])
        return [replace(row, columns=self._column_values(scores)) for row, scores in zip(rows, scored, strict=True)]

    def _column_values(self, scores: Scores) -> dict[str, Any]:
        """Return the columns that the loss reads, from scores of each completion, best first."""
        numbers = {"reward": scores.scores, "win_rate": scores.win_rates}
        if self.yields_lists:
            return {f"{name}s": numbers[name] for name in sorted(self._columns)}
        return {
            f"{rank}_{name}": value
            for name in sorted(self._columns)
            for rank, value in zip(("chosen", "rejected"), numbers[name], strict=True)
        }


def _training_prompt(rows: Sequence[Row]) -> _TrainingPrompt:
    """Return the prompt of rows that have it in common, with their chosen responses."""
    first = rows[0]
    request = PromptRequest(first.prompt, first.tools, first.template_kwargs)
    return _TrainingPrompt(request, tuple(row.chosen for row in rows), first.where)


def _finished(group: Sequence[Completion]) -> list[str]:
    """Return the texts of completions that ended."""
    return [one.text for one in group if one.finished]


def _in_form(text: str, prompt: Text) -> Text:
    """Return a completion in the form of its prompt."""
    return text if isinstance(prompt, str) else ({"role": "assistant", "content": text},)


def _text(completion: Text) -> str:
    """Return the text of a completion of the data."""
    return completion if isinstance(completion, str) else "".join(str(turn.get("content") or "") for turn in completion)
