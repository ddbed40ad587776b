"""Remarks on rows that were rendered: what a person would not expect, counted over all rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date

from spo.data.clock import CLOCK

SENTENCES = {
    "control_text": (
        "{count} rows contain the text of control tokens ({names}) in a message: it is encoded as text, never as the "
        "token"
    ),
    "control_text_in_columns": (
        "{count} rows contain the text of control tokens ({names}) in a text column: it is encoded as text. If another "
        "tool has already applied a chat template to this data, set data.split_special_tokens=false"
    ),
    "control_text_leaks": (
        "{count} rows contain text that this tokenizer cannot encode as text: it became a control token. Clean the "
        "rows, or use the fast version of the tokenizer"
    ),
    "current_date": (
        "the chat template writes the current date into {count} rows, so their tokens are others on another day: "
        f"data.chat_template_kwargs={{{{{CLOCK}:{date.today()}}}}} fixes it"
    ),
    "eos_in_completion": "{count} rows contain the text of the EOS token inside a completion ({names})",
    "end_token_added": (
        "the chat template writes nothing after the last turn, so the targets of {count} rows end in {names}"
    ),
    "generation_prompt_cut": (
        "the chat template writes {names} at the end of a prompt, but not in the whole conversation: it is missing "
        "from the prompts of {count} rows"
    ),
    "reasoning_stripped": (
        "the chat template leaves the reasoning of earlier assistant turns out; {count} rows contain such turns"
    ),
    "unread_arguments": (
        "the chat template does not read {names}, an argument in data.chat_template_kwargs, for {count} rows"
    ),
    "unread_fields": "the chat template does not read {names}, which {count} rows contain",
}
"""Sentences by key; ``{names}`` lists up to five different names in the order of their first rows."""
_MAX_NAMES = 5


@dataclass
class _Remark:
    count: int = 0
    names: Counter[str] = field(default_factory=Counter)
    remedy: str = ""


class Remarks:
    """Counts of remarkable rows.

    A row is counted once for each key, however often its renderings give reason to.
    """

    def __init__(self) -> None:
        self._remarks: dict[str, _Remark] = {}
        self._row: dict[str, list[str]] = {}

    def add(self, key: str, names: Iterable[str] = ()) -> None:
        """Note a fact about the row at hand.

        Args:
            key: Key of :data:`SENTENCES`.
            names: Tokens, fields or other things that the sentence lists.
        """
        self._row.setdefault(key, []).extend(names)

    def begin_row(self) -> None:
        """Forget the facts about a row that could not be rendered."""
        self._row = {}

    def end_row(self) -> None:
        """Count the facts about the row at hand."""
        for key, names in self._row.items():
            remark = self._remarks.setdefault(key, _Remark())
            remark.count += 1
            remark.names.update(dict.fromkeys(names, 1))
        self._row = {}

    def __contains__(self, key: str) -> bool:
        """Return whether an earlier row was counted for a key."""
        return key in self._remarks

    def set_remedy(self, key: str, remedy: str) -> None:
        """Set what the sentence of a key recommends, as a clause."""
        self._remarks.setdefault(key, _Remark()).remedy = remedy

    def notes(self) -> Iterator[tuple[str, str, int]]:
        """Yield key, sentence and number of rows of each remark."""
        for key, remark in self._remarks.items():
            names = [*remark.names][:_MAX_NAMES]
            if len(remark.names) > _MAX_NAMES:
                names.append("...")
            sentence = SENTENCES[key].format(count=remark.count, names=", ".join(names))
            if remark.count == 1:
                sentence = sentence.replace("1 rows contain", "1 row contains").replace("1 rows", "1 row")
            yield key, sentence + (f"; {remark.remedy}" if remark.remedy else ""), remark.count
