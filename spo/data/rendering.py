"""Rendering of text as tokens: the one place that decides which tokens are prompt and which are completion.

Training, sampling and scoring all use :class:`Renderer`, so they see the same tokens. The rules:

* Prompt and completion are tokenized together, once, and split where the tokens of the prompt end. If tokens merge
  across that boundary, the merged tail of the prompt belongs to both completions.
* Content is text, never control: the text of a special token inside a message or a text column is encoded as text. The
  exceptions are tokens that the chat template looks for (``</think>``), and text columns with
  ``data.split_special_tokens=false``. See :mod:`spo.data.encoding`.
* A text begins with exactly one BOS if the tokenizer has one, even if the tokenizer does not add it. GPT-2, for
  example, saw it between documents. A tokenizer without BOS (Qwen) gets none. For conversations the chat template
  decides, whatever the tokenizer adds to other input.
* A text completion that was not cut ends in exactly one EOS.
* A conversation is what the chat template writes, given whole messages, tools and arguments. The prompt is the
  template's generation prompt wherever the whole conversation begins with it; elsewhere it ends at the last token that
  both share. A prompt that ends in an assistant's turn is continued by an assistant's message: it does not contain the
  end of that turn. Content that the template leaves out is an error. See :mod:`spo.data.conversations`.
* The turn of an assistant ends in the run of special tokens that the template writes directly after the content; white
  space in front of it stays. The completion ends with the last token of that run, and what the template writes after
  it is removed. If the template does not write such a token, the completion ends in EOS.
* Positions decide, never ids: BOS, EOS and PAD may be the same id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, get_args

from spo.bounds import Truncation
from spo.data.cells import RESERVED_KWARGS
from spo.data.chat import ChatTemplate, find_end
from spo.data.conversations import ConversationWriter, Rendered, shared_length
from spo.data.encoding import Ids, TextEncoder
from spo.data.needs import Numbers, read_text
from spo.data.remarks import Remarks
from spo.data.rows import DataError, Message, Row, RowError, Split, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATIONS: tuple[Truncation, ...] = get_args(Truncation)


@dataclass(frozen=True)
class TokenizedPair:
    """A row as tokens.

    Attributes:
        prompt_ids: Tokens of the prompt, after BOS if the tokenizer has one.
        chosen_ids: Tokens of the better or only completion, with its end token unless it was cut.
        rejected_ids: Tokens of the worse completion; ``None`` for a single completion.
        prompt_text: Prompt as the model sees it; for conversations, the rendered template.
        chosen_text: Better completion without the tokens that end it.
        rejected_text: Worse completion without the tokens that end it; ``None`` for a single completion.
        prompt_id: Digest of the row's prompt, the same for every tokenizer.
        preference: Probability that chosen is better; ``None`` means 1.
        weight: Weight of the pair; ``None`` means 1.
        split: Split that the source assigns, or ``None``.
        where: Place of the row, such as file and line.
        truncated: Whether the prompt or a completion was cut.
        boundary_moved: Whether tokens merged at the end of the prompt.
        worse_ids: Tokens of a list's completions after the rejected one, best first.
        worse_texts: Texts of the completions in ``worse_ids``.
        prompt_messages: Messages of the row's prompt; empty for a text prompt.
        repeated: Number of completions that were dropped because a better one has the same tokens.
        label: Probability that a single completion is desirable; ``None`` for other data.
        features: Numbers of the row that the loss reads, by the name of the feature.
        numbers: Numbers of each completion that the loss reads, best first, by the name of the feature.
        extra: Tokens of further completions of the prompt, by name. :meth:`Renderer.render` names them by the column of
            their text, and :func:`~spo.data.splits.prepare` as the loss does.
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
    prompt_messages: tuple[Message, ...] = ()
    repeated: int = 0
    label: float | None = None
    features: Mapping[str, Numbers] = field(default_factory=dict)
    numbers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    extra: Mapping[str, Ids] = field(default_factory=dict)

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

    @property
    def sequences(self) -> tuple[Ids, ...]:
        """Return the tokens of each distinct completion that a model scores, further ones last."""
        return tuple(dict.fromkeys((*self.completions, *self.extra.values())))

    def identity(self) -> tuple[Any, ...]:
        """Return all values of the row, from which the digest of the data is made.

        Labels, features and further completions are left out of a row that has none of them, so that the digest of such
        data is that of earlier versions.
        """
        later = (self.label, {**self.features, **self.numbers}, dict(self.extra))
        values = astuple(self)[: -len(later) - 1]
        return (*values, *later) if self.label is not None or any(later[1:]) else values


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


class Renderer:
    """A converter of rows to tokens.

    Args:
        tokenizer: Tokenizer of the policy.
        max_length: Largest number of tokens of prompt and completion together, BOS and end token included.
        truncation: Policy for longer pairs and lists. ``drop_pair`` drops the pair. ``trim_completion`` cuts all
            completions to the room that the prompt leaves, and a cut one does not have an end token. ``trim_prompt``
            cuts the beginning of the prompt, but not its BOS, by the same amount for all completions.
        allow_empty: Whether a completion may consist of its end token only; otherwise such a pair is dropped.
        stop_ids: Tokens that end a generation of the model, as its generation config lists them.
        chat_template_kwargs: Arguments of the chat template for all rows; those of a row come before them.
        split_special_tokens: Whether the text of a special token in a text column is encoded as text. Messages are
            always encoded so.

    Attributes:
        encoder: Encoder of all texts.
        eos_id: Token that ends a text: EOS, or the end of a turn if the tokenizer does not have an EOS.

    Raises:
        DataError: If neither the tokenizer nor its chat template has a token that ends a completion, or if an argument
            is out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        truncation: Truncation,
        allow_empty: bool = False,
        *,
        stop_ids: Sequence[int] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        split_special_tokens: bool = True,
    ) -> None:
        if truncation not in TRUNCATIONS:
            raise DataError(f"data.truncation={truncation}: choose {', '.join(TRUNCATIONS)}")
        if max_length < 2:
            raise DataError(f"data.max_length={max_length}: must be at least 2")
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.allow_empty, self.split_special_tokens = allow_empty, split_special_tokens
        self.bos_id: int | None = tokenizer.bos_token_id
        if reserved := sorted(RESERVED_KWARGS.intersection(chat_template_kwargs or ())):
            raise DataError(f"data.chat_template_kwargs.{reserved[0]}: the rows decide it; remove it")
        self._remarks = Remarks()
        stops = [token for token in tokenizer.convert_ids_to_tokens(sorted(stop_ids)) if token]
        self._chat = ChatTemplate(tokenizer, chat_template_kwargs, stops) if tokenizer.chat_template else None
        self.encoder = TextEncoder(tokenizer, stops) if self._chat is None else self._chat.encoder
        turn_ends = [] if self._chat is None else self._chat.ends
        if tokenizer.eos_token_id is None and not turn_ends:
            raise DataError("the tokenizer does not have an EOS token, so no completion can end; set its eos_token")
        end_token = turn_ends[0] if tokenizer.eos_token_id is None else str(tokenizer.eos_token)
        self.eos_id = _token_id(tokenizer, end_token)
        self._ends = frozenset([*turn_ends, *stops])
        self._writer: ConversationWriter | None = None
        if self._chat is not None:
            self._writer = ConversationWriter(self._chat, self._ends, end_token, self._remarks)
        turn_ids = {_token_id(tokenizer, end) for end in turn_ends}
        # EOS ends texts, and conversations whose template does not end a turn.
        self._stop_ids = {*turn_ids, *stop_ids, *([] if self._chat and self._chat.end else [self.eos_id])}
        self._vocabulary_size = max(len(tokenizer), *(i + 1 for i in tokenizer.get_vocab().values()))
        self._anchor = list(self.encoder.encode(["a"])[0])
        self._anchor_text = self._decode(self._anchor)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a completion, in ascending order; EOS is one once a text was rendered."""
        return tuple(sorted(self._stop_ids))

    def render(
        self,
        row: Row,
        columns: Sequence[str] = (),
        name_of: Callable[[str], str] = str,
        numbers: Mapping[str, tuple[float, ...]] | None = None,
    ) -> TokenizedPair | Dropped:
        """Return the row as tokens, or the reason why it was dropped.

        Args:
            row: Row to convert.
            columns: Columns of the row with texts of further completions, which become ``extra`` by their names.
            name_of: Function from the name of a column to its name in the data, for messages.
            numbers: Numbers of each completion of the row, by the name of the feature.

        Raises:
            RowError: If a column is missing, if neither a prompt nor a BOS can begin the text, if the chat template
                rejects the messages, or if it leaves out their content.
            DataError: If the row is a conversation and the tokenizer does not have a chat template.
        """
        leaks = self.encoder.leaks
        self._remarks.begin_row()
        text = self._as_text(row, [read_text(row, name, name_of(name)) for name in columns])
        plain, *whole = self.encoder.encode([text.prompt, *text.wholes])
        if self.encoder.leaks > leaks:
            self._remarks.add("control_text_leaks")
        self._remarks.end_row()
        bos = self._bos(text, plain or whole[0])
        cut = shared_length([plain, *whole])
        prompt = bos + plain[:cut]
        if not prompt:
            if plain:
                return Dropped("no_prompt_token", row.where)
            raise RowError(row.where, "the prompt is empty, and the tokenizer does not have a BOS", "prompt")
        if any(len(ids) - n == cut for ids, n in zip(whole, text.end_tokens, strict=True)) and not self.allow_empty:
            return Dropped("empty", row.where)
        completions = tuple(
            ids[cut:] if n else (*ids[cut:], self.eos_id) for ids, n in zip(whole, text.end_tokens, strict=True)
        )
        own = len(completions) - len(columns)
        best_alone = TokenizedPair(
            prompt_ids=prompt,
            chosen_ids=completions[0],
            rejected_ids=None,
            prompt_text=self.encoder.reveal(text.prompt),
            chosen_text=text.texts[0],
            rejected_text=None,
            prompt_id=prompt_id(row.prompt, row.tools, row.template_kwargs),
            preference=row.preference,
            weight=row.weight,
            split=row.split,
            where=row.where,
            boundary_moved=cut < len(plain),
            prompt_messages=() if isinstance(row.prompt, str) else row.prompt,
            label=row.label,
            numbers=numbers or {},
            extra=dict(zip(columns, completions[own:], strict=True)),
        )
        pair = _with_completions(best_alone, completions[:own], text.texts[:own])
        return pair if isinstance(pair, Dropped) else self.fit(pair)

    def fit(self, pair: TokenizedPair) -> TokenizedPair | Dropped:
        """Return a pair within the length limit, or the reason why it was dropped."""
        if len(pair.prompt_ids) + max(map(len, pair.sequences)) <= self.max_length:
            return pair
        if self.truncation == "drop_pair":
            return Dropped("too_long", pair.where)
        if self.truncation == "trim_completion":
            return self._trim_completion(pair)
        return self._trim_prompt(pair)

    def prompt_ids(self, prompt: Text, **template_values: Any) -> tuple[int, ...]:
        """Return the tokens of a prompt without a completion.

        Args:
            prompt: Text or messages.
            template_values: Fields of a row that the chat template reads, such as ``tools``.

        Raises:
            DataError: If the prompt is empty and the tokenizer does not have a BOS.
        """
        text = self._as_text(Row(prompt=prompt, chosen="" if isinstance(prompt, str) else (), **template_values))
        self._remarks.end_row()
        plain = self.encoder.encode([text.prompt])[0]
        ids = self._bos(text, plain) + plain
        if not ids:
            raise DataError("the prompt is empty, and the tokenizer does not have a BOS")
        return ids

    def encode_like(self, pair: TokenizedPair, rank: int, text: str) -> Ids:
        """Return the tokens of a text in place of a completion, with the end tokens of that completion.

        Args:
            pair: Row with the completion.
            rank: Rank of the completion in its row, 0 for the best one.
            text: Text to encode.
        """
        if pair.prompt_messages or self.split_special_tokens:
            text = self.encoder.hide(text)
        prompt = pair.prompt_ids[self.bos_id is not None and pair.prompt_ids[:1] == (self.bos_id,) :]
        context = pair.prompt_text
        if pair.boundary_moved and pair.texts[rank] == self.decode(pair.completions[rank]):
            context = self._decode(prompt)  # The text of a completion that was cut begins with the prompt's last token.
        whole, alone = self.encoder.encode([context + text, text])
        whole = whole[self.bos_id is not None and whole[:1] == (self.bos_id,) :]
        # Tokens that merge with the prompt, or a prompt that was cut, leave the text to be encoded alone.
        ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone
        ends = takewhile(lambda i: i in self._stop_ids or self.encoder.is_control(i), pair.completions[rank][::-1])
        return ids + tuple(ends)[::-1]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of completion tokens with its leading space and without special tokens such as EOS."""
        # Some decoders strip the space at the start of a text, so the completion is decoded after an anchor.
        return self._decode([*self._anchor, *ids])[len(self._anchor_text) :]

    def notes(self) -> Iterator[tuple[str, str, int]]:
        """Yield key, sentence and number of rows of each remark on the rows that were rendered."""
        return self._remarks.notes()

    def _decode(self, ids: Sequence[int]) -> str:
        # The embedding of a model may have more rows than its tokenizer has tokens, and any row may be sampled.
        known = [i for i in ids if i < self._vocabulary_size]
        text = self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _bos(self, text: Rendered, ids: tuple[int, ...]) -> tuple[int, ...]:
        if text.conversation:
            return ()  # The template decides, in training as in every program that samples from the policy.
        return () if self.bos_id is None or ids[:1] == (self.bos_id,) else (self.bos_id,)

    def _as_text(self, row: Row, further: Sequence[Text] = ()) -> Rendered:
        completions = [*row.completions, *further]
        if isinstance(row.prompt, str):
            return self._columns(row.prompt, [str(text) for text in completions])
        if self._writer is None:
            raise DataError(
                f"{row.where}: the row is a list of messages, but the tokenizer does not have a chat template. Use the "
                "model's chat version, give a template as data.chat_template=FILE, or write the data as text"
            )
        return self._writer.write(row, [messages for messages in completions if messages])  # type: ignore[misc]

    def _columns(self, prompt: str, completions: Sequence[str]) -> Rendered:
        """Return text columns as they are, apart from BOS and EOS that other tools write into them."""
        self._stop_ids.add(self.eos_id)
        bos = self.tokenizer.bos_token
        while bos and prompt.startswith(bos):
            prompt = prompt.removeprefix(bos)
        bare = [self._without_eos(text) for text in completions]
        if (eos := self.tokenizer.eos_token) and any(eos in text for text in bare):
            self._remarks.add("eos_in_completion", [eos])
        if not self.split_special_tokens:
            return self._rendered_before(prompt, bare)
        # A token may consist of the end of the prompt and the beginning of a completion, so both are hidden together.
        wholes = [prompt + text for text in bare]
        if found := self.encoder.occurring([prompt, *wholes]):
            self._remarks.add("control_text_in_columns", sorted(found))
        hide = self.encoder.hide
        return Rendered(hide(prompt), tuple(map(hide, wholes)), tuple(bare), (0,) * len(bare), False)

    def _rendered_before(self, prompt: str, completions: Sequence[str]) -> Rendered:
        """Return text columns to which another tool has applied a chat template: control tokens are tokens."""
        ends = [find_end(text, self.encoder.control, self._ends) for text in completions]
        return Rendered(
            prompt,
            tuple(prompt + (text[: end[1]] if end else text) for text, end in zip(completions, ends, strict=True)),
            tuple(text[: end[0]] if end else text for text, end in zip(completions, ends, strict=True)),
            tuple(len(end[2]) if end else 0 for end in ends),
            False,
        )

    def _without_eos(self, text: str) -> str:
        # Data written by other tools may end in EOS already; `render` appends exactly one.
        eos = self.tokenizer.eos_token
        while eos and text.rstrip().endswith(eos):
            text = text.rstrip().removesuffix(eos)
        return text

    def _trim_completion(self, pair: TokenizedPair) -> TokenizedPair | Dropped:
        room = self.max_length - len(pair.prompt_ids)
        if room < 1:
            return Dropped("prompt_too_long", pair.where)
        kept = [ids[:room] for ids in pair.completions]
        whole = zip(kept, pair.completions, pair.texts, strict=True)
        texts = [text if ids == full else self.decode(ids) for ids, full, text in whole]
        extra = {name: ids[:room] for name, ids in pair.extra.items()}
        # Completions that differ only after the cut are the same now.
        return _with_completions(replace(pair, truncated=True, extra=extra), kept, texts)

    def _trim_prompt(self, pair: TokenizedPair) -> TokenizedPair | Dropped:
        # A chat template may have written the BOS as text, so the first token is checked, not the tokenizer's habit.
        bos = int(pair.prompt_ids[0] == self.bos_id)
        room = self.max_length - bos - max(map(len, pair.sequences))
        if room < 1:
            return Dropped("completion_too_long", pair.where)
        kept = pair.prompt_ids[bos:][-room:]
        return replace(pair, prompt_ids=pair.prompt_ids[:bos] + kept, prompt_text=self.decode(kept), truncated=True)


def _with_completions(
    pair: TokenizedPair, completions: Sequence[tuple[int, ...]], texts: Sequence[str]
) -> TokenizedPair | Dropped:
    """Return the pair with these completions, best first; only the best of those with the same tokens stays."""
    places: dict[tuple[int, ...], int] = {}
    for place, ids in enumerate(completions):
        places.setdefault(ids, place)
    if len(places) < min(len(completions), 2):
        return Dropped("identical", pair.where)
    [chosen, *others], [chosen_text, *other_texts] = places, [texts[place] for place in places.values()]
    return replace(
        pair,
        chosen_ids=chosen,
        rejected_ids=others[0] if others else None,
        chosen_text=chosen_text,
        rejected_text=other_texts[0] if others else None,
        worse_ids=tuple(others[1:]),
        worse_texts=tuple(other_texts[1:]),
        repeated=pair.repeated + len(completions) - len(places),
        numbers={name: tuple(values[place] for place in places.values()) for name, values in pair.numbers.items()},
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


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id
