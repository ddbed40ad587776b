"""Rendering of text as tokens: the one place that decides which tokens are prompt and which are completion.

Training, sampling and scoring all use :class:`Renderer`, so they see the same tokens. The rules:

* Prompt and completion are tokenized together, once, and split where the tokens of the prompt end. If tokens merge
  across that boundary, the merged tail of the prompt belongs to both completions.
* A text begins with exactly one BOS if the tokenizer has one, even if the tokenizer does not add it. GPT-2, for
  example, saw it between documents. A tokenizer without BOS (Qwen) gets none. For conversations the chat template
  decides: a BOS is added only if the tokenizer adds one and the template does not.
* A completion that was not cut ends in exactly one EOS. Text that a chat template writes after it is removed.
* Positions decide, never ids: BOS, EOS and PAD may be the same id.
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
_MARKER = "\u27e6the answer\u27e7"
"""Text that does not occur in data or templates."""


@dataclass(frozen=True)
class TokenizedPair:
    """A row as tokens.

    Attributes:
        prompt_ids: Tokens of the prompt, after BOS if the tokenizer has one.
        chosen_ids: Tokens of the better completion, with EOS at the end unless it was cut.
        rejected_ids: Tokens of the worse completion; ``None`` for supervised data.
        prompt_text: Prompt as the model sees it; for conversations, the rendered template.
        chosen_text: Better completion without EOS.
        rejected_text: Worse completion without EOS; ``None`` for supervised data.
        prompt_id: Digest of the row's prompt, the same for every tokenizer.
        preference: Probability that chosen is better; ``None`` means 1.
        weight: Weight of the pair; ``None`` means 1.
        split: Split that the source assigns, or ``None``.
        where: Place of the row, such as file and line.
        truncated: Whether the prompt or a completion was cut.
        boundary_moved: Whether tokens merged at the end of the prompt.
        worse_ids: Tokens of a list's completions after the rejected one, best first.
        worse_texts: Texts of the completions in ``worse_ids``.
        repeated: Number of completions that were dropped because a better one has the same tokens.
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
        """Return the tokens of all completions, the best one first."""
        first = (self.chosen_ids,) if self.rejected_ids is None else (self.chosen_ids, self.rejected_ids)
        return first + self.worse_ids

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the texts of all completions, the best one first."""
        first = (self.chosen_text,) if self.rejected_text is None else (self.chosen_text, self.rejected_text)
        return first + self.worse_texts


@dataclass(frozen=True)
class Dropped:
    """A row that was dropped.

    Attributes:
        reason: ``too_long``, ``prompt_too_long``, ``completion_too_long``, ``identical``, ``empty`` (a completion does
            not have a token) or ``no_prompt_token`` (the whole prompt merges into the completion).
        where: Place of the row, such as file and line.
    """

    reason: str
    where: str


@dataclass(frozen=True)
class _Rendered:
    prompt: str
    completions: tuple[str, ...]
    conversation: bool


class Renderer:
    """A converter of rows to tokens.

    Args:
        tokenizer: Tokenizer of the policy.
        max_length: Largest number of tokens of prompt and completion together, BOS and EOS included.
        truncation: Policy for longer pairs and lists. ``drop_pair`` drops the pair. ``trim_completion`` cuts all
            completions to the room that the prompt leaves, and a cut one does not have an EOS. ``trim_prompt`` cuts the
            beginning of the prompt, but not its BOS, by the same amount for all completions.
        allow_empty: Whether a completion may consist of its EOS only; otherwise such a pair is dropped.
        stop_ids: Tokens that end a generation of the model, as its generation config lists them.

    Raises:
        DataError: If the tokenizer does not have an EOS, or if an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        truncation: Truncation,
        allow_empty: bool = False,
        *,
        stop_ids: Sequence[int] = (),
    ) -> None:
        if truncation not in TRUNCATIONS:
            raise DataError(f"data.truncation={truncation}: choose {', '.join(TRUNCATIONS)}")
        if max_length < 2:
            raise DataError(f"data.max_length={max_length}: must be at least 2")
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer does not have an EOS token, so no completion can end; set its eos_token")
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.allow_empty = allow_empty
        self._model_stop_ids = tuple(stop_ids)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        # Tokenizers do not declare whether they add a BOS, so one letter is encoded with and without special tokens.
        plain, special = self._encode(["a"])[0], tokenizer("a")["input_ids"]
        self._adds_bos = self.bos_id is not None and special[:1] == [self.bos_id] and plain[:1] != (self.bos_id,)
        self._anchor = list(plain)
        self._anchor_text = self._decode(self._anchor)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a completion, in ascending order."""
        return tuple(sorted({self.eos_id, *self._model_stop_ids}))

    def render(self, row: Row) -> TokenizedPair | Dropped:
        """Return the row as tokens, or the reason why it was dropped.

        Raises:
            RowError: If neither a prompt nor a BOS can begin the text, or if the chat template rejects the messages.
            DataError: If the row is a conversation and the tokenizer does not have a chat template.
        """
        text = self._as_text(row)
        plain, *whole = self._encode([text.prompt, *(text.prompt + completion for completion in text.completions)])
        bos = self._bos(text, plain or whole[0])
        cut = _shared_length([plain, *whole])
        prompt = bos + plain[:cut]
        if not prompt:
            if plain:
                return Dropped("no_prompt_token", row.where)
            raise RowError(row.where, "the prompt is empty, and the tokenizer does not have a BOS", "prompt")
        if any(len(ids) == cut for ids in whole) and not self.allow_empty:
            return Dropped("empty", row.where)
        completions = tuple((*ids[cut:], self.eos_id) for ids in whole)
        best_alone = TokenizedPair(
            prompt_ids=prompt,
            chosen_ids=completions[0],
            rejected_ids=None,
            prompt_text=text.prompt,
            chosen_text=text.completions[0],
            rejected_text=None,
            prompt_id=prompt_id(row.prompt, row.tools, row.template_kwargs),
            preference=row.preference,
            weight=row.weight,
            split=row.split,
            where=row.where,
            boundary_moved=cut < len(plain),
        )
        pair = _with_completions(best_alone, completions, text.completions)
        if isinstance(pair, Dropped) or len(prompt) + max(map(len, completions)) <= self.max_length:
            return pair
        if self.truncation == "drop_pair":
            return Dropped("too_long", row.where)
        if self.truncation == "trim_completion":
            return self._trim_completion(pair)
        return self._trim_prompt(pair)

    def prompt_ids(self, prompt: Text) -> tuple[int, ...]:
        """Return the tokens of a prompt without a completion.

        Raises:
            DataError: If the prompt is empty and the tokenizer does not have a BOS.
        """
        text = self._as_text(Row(prompt=prompt, chosen="" if isinstance(prompt, str) else ()))
        plain = self._encode([text.prompt])[0]
        ids = self._bos(text, plain) + plain
        if not ids:
            raise DataError("the prompt is empty, and the tokenizer does not have a BOS")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of completion tokens with its leading space and without special tokens such as EOS."""
        # Some decoders strip the space at the start of a text, so the completion is decoded after an anchor.
        return self._decode([*self._anchor, *ids])[len(self._anchor_text) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        # verbose=False silences the tokenizer's warning about long texts, since `render` checks their lengths itself.
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
                f"{row.where}: the row is a list of messages, but the tokenizer does not have a chat template. Use the "
                "model's chat version, set tokenizer.chat_template, or write the data as text"
            )
        # A prompt that ends in an assistant's turn is continued; the template must not open another turn.
        opens = not row.prompt or row.prompt[-1]["role"] != "assistant"
        prompt = self._template(row.prompt, opens, row.where)
        completions = [
            self._conversation(row.prompt, messages, row.where)  # type: ignore[arg-type]
            for messages in _completions(row)
            if messages
        ]
        if not all(text.startswith(prompt) for text in completions):
            # Some templates open the assistant's turn with words that a finished turn does not contain.
            prompt = prompt[: _shared_length([prompt, *completions])]
        return _Rendered(prompt, tuple(text[len(prompt) :] for text in completions), True)

    def _conversation(self, prompt: tuple[Message, ...], completion: tuple[Message, ...], where: str) -> str:
        text = self._template((*prompt, *completion), False, where)
        # A marker in place of the last message shows which text the template writes after it.
        marked = self._template((*prompt, *completion[:-1], {**completion[-1], "content": _MARKER}), False, where)
        after = marked.rpartition(_MARKER)[2]
        eos = after.find(self.tokenizer.eos_token) if text.endswith(after) else -1
        return text if eos < 0 else text[: len(text) - len(after) + eos]

    def _template(self, messages: tuple[Message, ...], opens: bool, where: str) -> str:
        if not messages:
            return ""
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opens)
        except Exception as error:  # Templates may raise any error that their author chose.
            raise RowError(where, f"the chat template rejects the messages: {error}") from error
        assert isinstance(text, str)
        return text

    def _without_eos(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        if not text.rstrip().endswith(eos):
            return text
        # Data written by other tools may end in EOS already; `render` appends exactly one.
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
        # Completions that differ only after the cut are the same now.
        return _with_completions(replace(pair, truncated=True), kept, texts)

    def _trim_prompt(self, pair: TokenizedPair) -> TokenizedPair | Dropped:
        # A chat template may have written the BOS as text, so the first token is checked, not the tokenizer's habit.
        bos = int(pair.prompt_ids[0] == self.bos_id)
        room = self.max_length - bos - max(map(len, pair.completions))
        if room < 1:
            return Dropped("completion_too_long", pair.where)
        kept = pair.prompt_ids[bos:][-room:]
        return replace(pair, prompt_ids=pair.prompt_ids[:bos] + kept, prompt_text=self.decode(kept), truncated=True)


def _with_completions(
    pair: TokenizedPair, completions: Sequence[tuple[int, ...]], texts: Sequence[str]
) -> TokenizedPair | Dropped:
    """Return the pair with these completions, best first; only the best of those with the same tokens stays."""
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


def prompt_id(prompt: Text, *template_values: object) -> str:
    """Return 16 hex digits that identify a prompt, the same for every tokenizer.

    Args:
        prompt: Text or messages.
        template_values: Tools and other values that a row gives to the chat template; ``None`` and empty ones for none.
    """
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    if any(template_values):
        text += json.dumps(template_values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _completions(row: Row) -> tuple[Text, ...]:
    """Return the completions of a row, the best one first."""
    return (row.chosen, *(() if row.rejected is None else (row.rejected,)), *row.worse)


def _shared_length(sequences: Sequence[Sequence[object]]) -> int:
    """Return the number of leading items that all sequences share."""
    length = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        length += 1
    return length
