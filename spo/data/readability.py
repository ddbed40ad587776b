"""Real pairs with a reward that is known without error: short openings of responses, labelled by how easy they read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from spo.bounds import OnBadRow, PositiveInt
from spo.data.files import FileSource
from spo.data.readers import Record
from spo.data.rows import Reward, Row, RowError, Split
from spo.data.tables import NoPreference

EASIEST, HARDEST = 0.0, 20.0
"""Range of school grades: no text is easier than the first grade, and a text without words is the hardest."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"\u201d'\u2019)*\]]|$)")
_BREAK = re.compile(r"(?<=[.!?])[\"\u201d'\u2019)*\]]*\s+|\s*\n|\s*$")


def readability(prompts: Sequence[str], completions: Sequence[str], /) -> dict[str, list[float]]:
    """Score how easy completions read: minus the automated readability index of Smith and Senter (1967).

    The index is ``4.71 letters per word + 0.5 words per sentence - 21.43``, the school grade in the United States in
    which a text is read. It is cut to the range from 0 to 20.

    Args:
        prompts: Prompts, which do not matter.
        completions: One completion for each prompt.
    """
    return {"reward": [-_grade(text) for text in completions]}


def _grade(text: str) -> float:
    words = _WORD.findall(text)
    if not words:
        return HARDEST
    sentences = max(1, len(_SENTENCE_END.findall(text)))
    letters = sum(map(len, words))
    return min(HARDEST, max(EASIEST, 4.71 * letters / len(words) + 0.5 * len(words) / sentences - 21.43))


def opening(text: str, max_characters: int) -> str:
    """Return the sentences and lines at the beginning of a text that fit into a number of characters.

    Args:
        text: Text to shorten.
        max_characters: Most characters of the result, which is empty if the first sentence is longer.
    """
    text = text.strip()
    ends = [found.end() for found in _BREAK.finditer(text) if len(text[: found.end()].rstrip()) <= max_characters]
    return text[: ends[-1]].rstrip() if ends else ""


class LabelledOpenings(FileSource):
    """Pairs of a file of which only the openings of the responses are used, labelled by a reward function.

    The labels of the file are ignored: the opening with the higher reward is the chosen one, with certainty. A pair
    without a preference is skipped: an opening is empty, or the rewards are equal. Prompt and response stand on lines
    of their own. Use it to study methods on real text with a reward that is known without error.

    Args:
        path: Path of the file or folder, with text in ``prompt``, ``chosen`` and ``rejected``.
        columns: Mapping from our column names to the file's, as for :class:`FileSource`.
        on_bad_row: Policy for a malformed row, ``stop`` or ``skip``.
        reward: Reward function, which should also judge the evaluation.
        max_characters: Most characters of an opening.
    """

    def __init__(
        self,
        path: str,
        columns: Mapping[str, str] | None,
        on_bad_row: OnBadRow,
        reward: Reward,
        max_characters: PositiveInt,
    ) -> None:
        super().__init__(path, columns, on_bad_row)
        self.reward, self.max_characters = reward, max_characters

    def parse(self, record: Record, where: str, split: Split | None) -> Row:
        """Convert a record to a row of two openings, see :meth:`spo.data.tables.TableSource.parse`."""
        row = super().parse(record, where, split)
        texts = [row.prompt, *row.completions]
        if len(texts) != 3 or not all(isinstance(text, str) for text in texts):
            raise RowError(where, "openings need text in prompt, chosen and rejected, not messages")
        prompt, *openings = (str(text) for text in texts)
        openings = [opening(text, self.max_characters) for text in openings]
        if not all(openings):
            raise NoPreference(
                where, f"a response does not begin with a sentence of at most {self.max_characters} characters"
            )
        rewards = self.reward([prompt] * 2, openings)["reward"]
        if rewards[0] == rewards[1]:
            raise NoPreference(where, "the rewards of both openings are equal")
        better, worse = openings if rewards[0] > rewards[1] else openings[::-1]
        return replace(row, prompt=f"{prompt.rstrip()}\n", chosen=better, rejected=worse, preference=None, weight=None)
