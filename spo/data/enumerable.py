"""A language small enough to enumerate: every response to every prompt, its reward, and preferences over responses.

A response is a sequence of symbols that ends with end-of-text within ``max_new_tokens`` tokens, or is cut after that
many symbols. No response is the beginning of another, and nothing else can be sampled. Under any autoregressive model
over this vocabulary the probabilities of responses therefore add up to one, and expectations are sums, not estimates.
"""

from __future__ import annotations

import itertools
import math
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray

from spo.bounds import NonNegativeFloat, NonNegativeInt, PositiveInt
from spo.data.gold_columns import FLIP_PROBABILITY, GOLD_COLUMNS, gold_columns
from spo.data.rows import Completer, DataError, Row, Split
from spo.data.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYMBOLS = string.ascii_lowercase
END = "<end>"
MAX_RESPONSES = 20_000
"""Largest number of responses to a prompt."""
MAX_LISTS = 20_000
"""Largest number of lists of a prompt that are all used once, enough for the pairs of 200 responses.

If there are more lists, this many are drawn.
"""
MAX_ORDERED_LIST = 4
"""Largest number of completions in a list whose every order becomes a row."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Language:
    """``P`` prompts, each with the same ``R`` responses.

    Attributes:
        prompts: Prompts, all with the same number of symbols.
        responses: Responses by length and then by alphabet; the empty one is first.
        rewards: ``(P, R)`` float64 rewards in nats of the Bradley-Terry model.
        support: ``(P, R)`` mask of the responses that can appear in the data.
    """

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    rewards: NDArray[np.float64]
    support: NDArray[np.bool_]

    def preference(self, prompt: int, first: int | Indices, second: int | Indices) -> NDArray[np.float64]:
        """Return the probability that ``first`` is better than ``second``, sigmoid(r_i - r_j) (Bradley and Terry 1952).

        Args:
            prompt: Position in ``prompts``.
            first: Positions in ``responses``.
            second: Positions in ``responses``, in the shape of ``first``.

        Returns:
            Probabilities in the shape of ``first``.
        """
        reward = self.rewards[prompt]
        # sigmoid(x) as exp(-log(1 + exp(-x))), which does not overflow.
        return np.exp(-np.logaddexp(0.0, reward[second] - reward[first]))

    def order_probability(self, prompt: int, orders: Indices) -> NDArray[np.float64]:
        r"""Return the probability of rankings in the model of Luce (1959) and Plackett (1975).

        The probability is :math:`\prod_k e^{r_k} / \sum_{j \ge k} e^{r_j}` with rewards :math:`r_k`, best first.

        Args:
            prompt: Position in ``prompts``.
            orders: ``(..., n)`` positions in ``responses``, best first.

        Returns:
            ``(...)`` probabilities.
        """
        reward = self.rewards[prompt][orders]
        rest = np.logaddexp.accumulate(reward[..., ::-1], axis=-1)[..., ::-1]
        return np.exp((reward - rest).sum(-1))

    def sample_orders(self, prompt: int, lists: Indices, rng: np.random.Generator) -> Indices:
        """Sample an order of each list from the Plackett-Luce model.

        Args:
            prompt: Position in ``prompts``.
            lists: ``(K, n)`` positions in ``responses``.
            rng: Random generator.

        Returns:
            ``(K, n)`` positions, best first.
        """
        # Sorting rewards with Gumbel noise samples this model (Yellott 1977).
        noisy = self.rewards[prompt][lists] + rng.gumbel(size=lists.shape)
        return np.take_along_axis(lists, np.argsort(-noisy, axis=-1), axis=-1)


class EnumerableSource(Source):
    """Preferences over an enumerable language, with a seeded table of rewards.

    Args:
        seed: Random seed of rewards, support, lists and sampled labels.
        num_prompts: Number of prompts.
        num_symbols: Number of symbols in the vocabulary, not counting end-of-text.
        prompt_symbols: Number of symbols in a prompt.
        max_new_tokens: Largest number of tokens in a response.
        reward_scale: Standard deviation of the normal rewards, in nats of the Bradley-Terry model.
        sampler: Choice of the responses that are compared: ``full`` draws from all, ``restricted`` from a seeded part
            of them, and ``reference`` samples pairs from the reference model.
        labels: Kind of labels: ``soft`` gives the exact probability of an outcome, ``hard`` samples one, and
            ``weighted`` makes each outcome a row, weighted by its probability.
        num_pairs: Number of pairs (or lists) of each prompt, drawn uniformly. ``None`` uses each possible one once, or
            draws 20,000 if there are more.
        support_share: Share of a prompt's responses that appear in the data if ``sampler`` is ``restricted``.
        list_size: Number of completions in a list: 2 for pairs of the Bradley-Terry model, more for rankings of the
            Plackett-Luce model. Soft labels of a ranking are ``weighted``: each of its orders is a row.

    Attributes:
        language: The enumerated language.

    Raises:
        ValueError: If an argument is out of range, or if the language is too large to enumerate.
    """

    provided_columns = GOLD_COLUMNS
    language: Language

    def __init__(
        self,
        seed: NonNegativeInt,
        num_prompts: PositiveInt,
        num_symbols: Annotated[int, Ge(2)],
        prompt_symbols: NonNegativeInt,
        max_new_tokens: PositiveInt,
        reward_scale: NonNegativeFloat,
        sampler: Literal["full", "reference", "restricted"],
        labels: Literal["soft", "hard", "weighted"],
        num_pairs: PositiveInt | None,
        support_share: Annotated[float, Gt(0), Le(1)],
        list_size: Annotated[int, Ge(2)],
    ) -> None:
        if sampler not in ("full", "reference", "restricted"):
            raise ValueError(f"data.source.sampler={sampler}: choose full, reference or restricted")
        if labels not in ("soft", "hard", "weighted"):
            raise ValueError(f"data.source.labels={labels}: choose soft, hard or weighted")
        if not 0 < support_share <= 1:
            raise ValueError(f"data.source.support_share={support_share}: must be above 0 and at most 1")
        if not 0 <= reward_scale < math.inf:
            raise ValueError(f"data.source.reward_scale={reward_scale}: must be at least 0 and finite")
        if list_size < 2 or (num_pairs is not None and num_pairs < 1):
            raise ValueError(
                f"data.source.list_size={list_size}, num_pairs={num_pairs}: at least 2 completions, and 1 pair"
            )
        super().__init__()
        self.seed, self.sampler, self.labels = seed, sampler, labels
        self.prompt_symbols, self.max_new_tokens = prompt_symbols, max_new_tokens
        self.num_pairs, self.list_size, self.yields_lists = num_pairs, list_size, list_size > 2
        prompts, responses = _prompts(num_prompts, num_symbols, prompt_symbols), _responses(num_symbols, max_new_tokens)
        size = len(prompts), len(responses)
        support = np.ones(size, dtype=bool)
        if sampler == "restricted":
            kept = max(round(support_share * len(responses)), list_size)
            ranks = self._rng("support").random(size).argsort(axis=1).argsort(axis=1)
            support = ranks < kept
        rewards = self._rng("rewards").normal(0.0, reward_scale, size)
        self.language = Language(prompts, responses, rewards, support)
        self.samples_rows = sampler == "reference"
        self._check_lists()

    def check_limits(self, max_length: int, truncation: str) -> None:
        """Check that rows are limited as samples are, so that they have the same tokens.

        Args:
            max_length: Largest number of tokens of prompt and completion together (``data.max_length``).
            truncation: Policy for longer pairs (``data.truncation``).

        Raises:
            DataError: If an argument differs from the value that follows from the language.
        """
        if (max_length, truncation) != (1 + self.prompt_symbols + self.max_new_tokens, "trim_completion"):
            raise DataError(
                "data=enumerable: data.max_length and data.truncation follow from the language, so that rows have the "
                "tokens of samples; set data.max_new_tokens and data.source.prompt_symbols instead"
            )

    def _check_lists(self) -> None:
        n, supported = self.list_size, int(self.language.support[0].sum())
        if n > supported:
            raise ValueError(f"data.source.list_size={n}: a prompt has only {supported} responses to compare")
        if self.sampler == "reference" and n > 2:
            raise ValueError(f"data.source.list_size={n}: data.source.sampler=reference samples pairs; set list_size=2")
        if n > MAX_ORDERED_LIST and self.labels != "hard":
            raise ValueError(
                f"data.source.list_size={n}: data.source.labels={self.labels} makes each order a row, for lists of up "
                f"to {MAX_ORDERED_LIST} completions; set data.source.labels=hard"
            )
        if self.num_pairs is None and self.sampler == "reference":
            raise ValueError("data.source.num_pairs=null: data.source.sampler=reference needs a number of pairs")

    def prompts(self, split: Split) -> list[str]:
        """Return the prompts of the language, which are the same in each split."""
        return list(self.language.prompts)

    def rows(self, complete: Completer) -> list[Row]:
        """Return the pairs or rankings of each prompt.

        Args:
            complete: Function that samples completions from the reference model, used if ``sampler`` is ``reference``.
        """
        self.dropped_pairs.clear()
        lists = self._sample_reference_pairs(complete) if self.samples_rows else self._choose_lists()
        return [row for prompt, chosen in enumerate(lists) for row in self._label(prompt, chosen)]

    def _choose_lists(self) -> Iterator[Indices]:
        """Yield the ``(K, n)`` responses of each prompt that are compared, as positions."""
        for prompt, support in enumerate(self.language.support):
            responses = np.flatnonzero(support)
            number = self.num_pairs
            if number is None and math.comb(len(responses), self.list_size) <= MAX_LISTS:
                yield np.array(list(itertools.combinations(responses.tolist(), self.list_size)))
            else:
                rng = self._rng("lists", prompt)
                drawn = [rng.choice(len(responses), self.list_size, replace=False) for _ in range(number or MAX_LISTS)]
                yield responses[np.array(drawn)]

    def _sample_reference_pairs(self, complete: Completer) -> Iterator[Indices]:
        """Yield ``(K, 2)`` positions of each prompt's sampled responses, and count pairs of equal ones."""
        assert self.num_pairs is not None
        place = {text: i for i, text in enumerate(self.language.responses)}
        self.dropped_pairs = Counter(identical=0)
        for group in complete(self.language.prompts, 2 * self.num_pairs):
            pairs = np.array([place[completion.text] for completion in group]).reshape(-1, 2)
            different = pairs[:, 0] != pairs[:, 1]
            self.dropped_pairs["identical"] += int((~different).sum())
            yield pairs[different]

    def _label(self, prompt: int, lists: Indices) -> Iterator[Row]:
        """Yield the rows of ``(K, n)`` compared responses of a prompt, with labels from the rewards."""
        if self.labels == "hard":
            orders = self.language.sample_orders(prompt, lists, self._rng("labels", prompt))
            yield from (self._row(prompt, order) for order in orders.tolist())
        elif self.list_size == 2 and self.labels == "soft":
            # The better one comes first, so that accuracies mean the same as with other data. The loss does not depend
            # on the order, since the preference is exact.
            reward = self.language.rewards[prompt][lists]
            orders = np.where(reward[:, :1] >= reward[:, 1:], lists, lists[:, ::-1])
            preferences = self.language.preference(prompt, orders[:, 0], orders[:, 1])
            for order, preference in zip(orders.tolist(), preferences.tolist(), strict=True):
                yield self._row(prompt, order, preference=preference)
        else:
            # The weights of a list's orders have mean 1.
            permutations = np.array(list(itertools.permutations(range(self.list_size))))
            orders = lists[:, permutations].reshape(-1, self.list_size)
            weights = len(permutations) * self.language.order_probability(prompt, orders)
            for order, weight in zip(orders.tolist(), weights.tolist(), strict=True):
                yield self._row(prompt, order, weight=weight)

    def _row(
        self, prompt: int, order: Sequence[int], preference: float | None = None, weight: float | None = None
    ) -> Row:
        chosen, rejected, *worse = (self.language.responses[i] for i in order)
        rewards = self.language.rewards[prompt][list(order)].tolist()
        columns = {"rewards": rewards} if worse else gold_columns(rewards[0], rewards[1], 0.0, GOLD_COLUMNS)
        if preference is not None:
            columns[FLIP_PROBABILITY] = 0.0  # The soft label holds the uncertainty already.
        return Row(
            prompt=self.language.prompts[prompt],
            chosen=chosen,
            rejected=rejected,
            worse=tuple(worse),
            preference=preference,
            weight=weight,
            where=f"enumerable:{prompt}:{'-'.join(map(str, order))}",
            columns=columns,
        )

    def _rng(self, purpose: str, *parts: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *parts, *purpose.encode()])


class EnumerableReward:
    """A lookup table of the rewards of an enumerable language.

    Args:
        source: Source of the language.
    """

    def __init__(self, source: EnumerableSource) -> None:
        language = source.language
        self._table = {
            (prompt, response): reward
            for prompt, rewards in zip(language.prompts, language.rewards.tolist(), strict=True)
            for response, reward in zip(language.responses, rewards, strict=True)
        }

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
        """Return the key ``reward`` with one number per completion.

        Args:
            prompts: Prompts of the language.
            completions: One response for each prompt.

        Raises:
            ValueError: If a prompt or completion is not in the language.
        """
        pairs = list(zip(prompts, completions, strict=True))
        if unknown := [pair for pair in pairs if pair not in self._table]:
            raise ValueError(f"prompt {unknown[0][0]!r} with completion {unknown[0][1]!r} is not in the language")
        return {"reward": [self._table[pair] for pair in pairs]}


def language_tokenizer(num_symbols: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each symbol, and one token for BOS, EOS and PAD, which it never adds.

    Args:
        num_symbols: Number of symbols, which are the first letters of the alphabet.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {END: 0} | {symbol: i for i, symbol in enumerate(SYMBOLS[:num_symbols], 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def _prompts(num_prompts: int, num_symbols: int, prompt_symbols: int) -> tuple[str, ...]:
    if not 2 <= num_symbols <= len(SYMBOLS):
        raise ValueError(f"data.source.num_symbols={num_symbols}: must be from 2 to {len(SYMBOLS)}")
    if prompt_symbols < 0 or not 1 <= num_prompts <= num_symbols**prompt_symbols:
        raise ValueError(
            f"data.source.num_prompts={num_prompts}: {prompt_symbols} symbols out of {num_symbols} make "
            f"{num_symbols ** max(prompt_symbols, 0)} prompts; set data.source.prompt_symbols"
        )
    return tuple(itertools.islice(_words(num_symbols, prompt_symbols), num_prompts))


def _responses(num_symbols: int, max_new_tokens: int) -> tuple[str, ...]:
    if max_new_tokens < 1:
        raise ValueError(f"data.max_new_tokens={max_new_tokens}: must be at least 1")
    if sum(num_symbols**length for length in range(max_new_tokens + 1)) > MAX_RESPONSES:
        raise ValueError(
            f"data.source.num_symbols={num_symbols} and data.max_new_tokens={max_new_tokens} make more than "
            f"{MAX_RESPONSES:,} responses, too many to enumerate: set either lower"
        )
    return tuple(word for length in range(max_new_tokens + 1) for word in _words(num_symbols, length))


def _words(num_symbols: int, length: int) -> Iterator[str]:
    """Return all words of a length in the order of the alphabet."""
    return ("".join(symbols) for symbols in itertools.product(SYMBOLS[:num_symbols], repeat=length))
