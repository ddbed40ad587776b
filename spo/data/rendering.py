"""From text to tokens: the one place that decides what a prompt and a completion are, token by token.

Training, sampling and scoring all use what `Renderer` makes, so they see the same tokens. The rules:

* Prompt and completion are tokenised together, once, and cut where the tokens of the prompt end. Where tokens merge
  across that border, the merged tail of the prompt belongs to both completions.
* A text begins with exactly one BOS if the tokenizer has one, also where the tokenizer does not add it by itself
  (GPT-2: documents were separated by it); a tokenizer without BOS (Qwen) gets none. For conversations the chat
  template is the authority, and a BOS is added only where the tokenizer adds one and the template has not.
* A completion that was not cut ends in exactly one EOS; what a chat template writes after it is removed.
* All of this goes by position: BOS, EOS and PAD may be the same id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from spo.bounds import Truncation
from spo.data.rows import DataError, Message, Row, RowError, Split, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATIONS: tuple[Truncation, ...] = get_args(Truncation)
_MARK = "\u27e6the answer\u27e7"


@dataclass(frozen=True)
class TokenizedPair:
    """A row as tokens.

    Attributes:
        prompt_ids: BOS (where there is one) and the prompt.
        chosen_ids: the better completion, ending in EOS unless it was cut.
        rejected_ids: the worse completion, or ``None`` (supervised data).
        prompt_text: the prompt as the model sees it (for conversations, the rendered template).
        chosen_text: the better completion without its EOS.
        rejected_text: the worse completion, or ``None``.
        prompt_id: digest of the row's prompt, the same for every tokenizer.
        preference: probability that chosen is better, or ``None`` for 1.
        weight: weight of the pair, or ``None`` for 1.
        split: the split that the source assigned, or ``None``.
        where: file and line.
        truncated: whether a prompt or completion was cut.
        boundary_moved: whether tokens merged at the end of the prompt.
        worse_ids: of a list, the completions after the rejected one, best first.
        worse_texts: their texts.
        repeated: completions of the list that were left out because a better one has the same tokens.
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...] | None
    prompt_text: str
    chosen_text: str
    rejected_text: str | None
    prompt_id: str
    preference: float | None = None
    weight: float | None = None
    split: Split | None = None
    where: str = ""
    truncated: bool = False
    boundary_moved: bool = False
    worse_ids: tuple[tuple[int, ...], ...] = ()
    worse_texts: tuple[str, ...] = ()
    repeated: int = 0

    @property
    def completions(self) -> tuple[tuple[int, ...], ...]:
        """All completions, the best one first."""
        first = (self.chosen_ids,) if self.rejected_ids is None else (self.chosen_ids, self.rejected_ids)
        return first + self.worse_ids

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the completions."""
        first = (self.chosen_text,) if self.rejected_text is None else (self.chosen_text, self.rejected_text)
        return first + self.worse_texts


@dataclass(frozen=True)
class Dropped:
    """A row that was left out, and why: ``too_long``, ``prompt_too_long``, ``completion_too_long``, ``identical``,
    ``empty`` (no token is left of a completion) or ``no_prompt_token`` (the whole prompt merges into the completion).
    """

    reason: str
    where: str


@dataclass(frozen=True)
class _Rendered:
    prompt: str
    completions: tuple[str, ...]
    conversation: bool


class Renderer:
    """Turns rows into tokens.

    Args:
        tokenizer: of the policy.
        max_length: most tokens of prompt and completion together, BOS and EOS included.
        truncation: what happens to longer ones. ``drop_pair``: the pair is left out. ``trim_completion``: both
            completions are cut to what the prompt leaves, and a cut one has no EOS. ``trim_prompt``: the prompt loses
            its beginning (never its BOS), by the same amount for both. A list is treated as a pair is: as a whole.
        allow_empty: whether a completion may be its EOS alone; otherwise such a pair is left out.

    Raises:
        DataError: when the tokenizer has no EOS, or an argument makes no sense.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: Truncation, allow_empty: bool = False
    ) -> None:
        if truncation not in TRUNCATIONS:
            raise DataError(f"data.truncation={truncation}: choose {', '.join(TRUNCATIONS)}")
        if max_length < 2:
            raise DataError(f"data.max_length={max_length}: must be at least 2")
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token, so no completion could ever end; give it an eos_token")
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.allow_empty = allow_empty
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        plain, special = self._encode(["a"])[0], tokenizer("a")["input_ids"]
        self._adds_bos = self.bos_id is not None and special[:1] == [self.bos_id] and plain[:1] != (self.bos_id,)
        self._anchor = list(plain)
        self._anchor_text = self._decode(self._anchor)

    def render(self, row: Row) -> TokenizedPair | Dropped:
        """The row as tokens, or why it was left out.

        Raises:
            RowError: when the row has no prompt and the tokenizer has no BOS to stand for it, or when the chat
                template refuses its messages.
            DataError: when the row is a conversation and the tokenizer has no chat template.
        """
        text = self._as_text(row)
        plain, *whole = self._encode([text.prompt, *(text.prompt + completion for completion in text.completions)])
        bos = self._bos(text, plain or whole[0])
        cut = _shared_length([plain, *whole])
        prompt = bos + plain[:cut]
        if not prompt:
            if plain:
                return Dropped("no_prompt_token", row.where)
            raise RowError(row.where, "the prompt is empty, and the tokenizer has no BOS to begin with", "prompt")
        if any(len(ids) == cut for ids in whole) and not self.allow_empty:
            return Dropped("empty", row.where)
        completions = tuple((*ids[cut:], self.eos_id) for ids in whole)
        alone = TokenizedPair(
            prompt_ids=prompt,
            chosen_ids=completions[0],
            rejected_ids=None,
            prompt_text=text.prompt,
            chosen_text=text.completions[0],
            rejected_text=None,
            prompt_id=prompt_id(row.prompt),
            preference=row.preference,
            weight=row.weight,
            split=row.split,
            where=row.where,
            boundary_moved=cut < len(plain),
        )
        pair = _ranked(alone, completions, text.completions)
        if isinstance(pair, Dropped) or len(prompt) + max(map(len, completions)) <= self.max_length:
            return pair
        if self.truncation == "drop_pair":
            return Dropped("too_long", row.where)
        if self.truncation == "trim_completion":
            return self._trim_completion(pair)
        return self._trim_prompt(pair)

    def prompt_ids(self, prompt: Text) -> tuple[int, ...]:
        """The tokens of a prompt that no completion follows yet.

        Raises:
            DataError: when the prompt is empty and the tokenizer has no BOS.
        """
        text = self._as_text(Row(prompt=prompt, chosen="" if isinstance(prompt, str) else ()))
        plain = self._encode([text.prompt])[0]
        ids = self._bos(text, plain) + plain
        if not ids:
            raise DataError("the prompt is empty, and the tokenizer has no BOS to begin with")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of completion tokens, a leading space included, special tokens such as EOS left out."""
        # Decoders strip the space at the start of a text, and a completion never stands at the start of one.
        return self._decode([*self._anchor, *ids])[len(self._anchor_text) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        # verbose=False: too long is ours to judge, and the tokenizer's warning would come once per process.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(ids) for ids in encoded["input_ids"]]

    def _bos(self, text: _Rendered, ids: tuple[int, ...]) -> tuple[int, ...]:
        wanted = self._adds_bos if text.conversation else self.bos_id is not None
        return (self.bos_id,) if wanted and ids[:1] != (self.bos_id,) else ()  # type: ignore[return-value]

    def _as_text(self, row: Row) -> _Rendered:
        if isinstance(row.prompt, str):
            texts = [self._without_eos(str(text)) for text in _completions(row)]
            return _Rendered(row.prompt, tuple(texts), False)
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{row.where}: the row is a list of messages, but the tokenizer has no chat template. Use the model's "
                "chat version, set tokenizer.chat_template, or write the data as text"
            )
        # After an assistant's turn the template must not open another one.
        opens = not row.prompt or row.prompt[-1]["role"] != "assistant"
        prompt = self._template(row.prompt, opens, row.where)
        completions = [
            self._conversation(row.prompt, messages, row.where)  # type: ignore[arg-type]
            for messages in _completions(row)
            if messages
        ]
        if not all(text.startswith(prompt) for text in completions):
            # Some templates open the assistant's turn with words that they leave out of a finished one.
            prompt = prompt[: _shared_length([prompt, *completions])]
        return _Rendered(prompt, tuple(text[len(prompt) :] for text in completions), True)

    def _conversation(self, prompt: tuple[Message, ...], completion: tuple[Message, ...], where: str) -> str:
        text = self._template((*prompt, *completion), False, where)
        # What the template writes after the last message, seen by putting a mark in its place.
        marked = self._template((*prompt, *completion[:-1], {**completion[-1], "content": _MARK}), False, where)
        after = marked.rpartition(_MARK)[2]
        eos = after.find(self.tokenizer.eos_token) if text.endswith(after) else -1
        return text if eos < 0 else text[: len(text) - len(after) + eos]

    def _template(self, messages: tuple[Message, ...], opens: bool, where: str) -> str:
        if not messages:
            return ""
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opens)
        except Exception as error:  # templates raise whatever their author chose
            raise RowError(where, f"the chat template refuses the messages: {error}") from error
        assert isinstance(text, str)
        return text

    def _without_eos(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        if not text.rstrip().endswith(eos):
            return text
        while text.rstrip().endswith(eos):
            text = text.rstrip().removesuffix(eos)
        return text

    def _trim_completion(self, pair: TokenizedPair) -> TokenizedPair | Dropped:
        room = self.max_length - len(pair.prompt_ids)
        if room < 1:
            return Dropped("prompt_too_long", pair.where)
        kept = [ids[:room] for ids in pair.completions]
        whole = zip(kept, pair.completions, pair.texts, strict=True)
        texts = [text if ids == full else self.decode(ids) for ids, full, text in whole]
        return _ranked(replace(pair, truncated=True), kept, texts)

    def _trim_prompt(self, pair: TokenizedPair) -> TokenizedPair | Dropped:
        bos = int(pair.prompt_ids[0] == self.bos_id)
        room = self.max_length - bos - max(map(len, pair.completions))
        if room < 1:
            return Dropped("completion_too_long", pair.where)
        kept = pair.prompt_ids[bos:][-room:]
        return replace(pair, prompt_ids=pair.prompt_ids[:bos] + kept, prompt_text=self.decode(kept), truncated=True)


def _ranked(
    pair: TokenizedPair, completions: Sequence[tuple[int, ...]], texts: Sequence[str]
) -> TokenizedPair | Dropped:
    """The pair with these completions, best first. Of those with the same tokens only the best one stays."""
    distinct: dict[tuple[int, ...], str] = {}
    for ids, text in zip(completions, texts, strict=True):
        distinct.setdefault(ids, text)
    if len(distinct) < min(len(completions), 2):
        return Dropped("identical", pair.where)
    [chosen, *others], [chosen_text, *other_texts] = distinct.keys(), distinct.values()
    return replace(
        pair,
        chosen_ids=chosen,
        rejected_ids=others[0] if others else None,
        chosen_text=chosen_text,
        rejected_text=other_texts[0] if others else None,
        worse_ids=tuple(others[1:]),
        worse_texts=tuple(other_texts[1:]),
        repeated=pair.repeated + len(completions) - len(distinct),
    )


def prompt_id(prompt: Text) -> str:
    """16 hex digits that stand for a prompt, whatever the tokenizer."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _completions(row: Row) -> tuple[Text, ...]:
    return (row.chosen, *(() if row.rejected is None else (row.rejected,)), *row.worse)


def _shared_length(sequences: Sequence[Sequence[object]]) -> int:
    length = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        length += 1
    return length
