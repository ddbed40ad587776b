"""Tokens that a local judge reads: texts inside a question are text, never control tokens of the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from spo.data.chat import ChatTemplate, Request, TemplateError
from spo.data.encoding import Ids, TextEncoder
from spo.data.rows import Message
from spo.errors import JudgeError
from spo.notes import note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class JudgeEncoder:
    """An encoder of what a judge reads.

    Args:
        tokenizer: Tokenizer of the judge.
        path: Folder or hub name of the judge, for messages.
        template_kwargs: Arguments of the chat template.

    Attributes:
        chat: Chat template of the tokenizer, or ``None``.
        leaks: Number of encoded inputs in which text became a control token, because the tokenizer cannot read it as
            text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, path: str, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.path = tokenizer, path
        # Not every token that structures a conversation is flagged as special: Qwen's <think> is not.
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self.chat = ChatTemplate(tokenizer, template_kwargs, added) if tokenizer.chat_template else None
        self.text = TextEncoder(tokenizer, added) if self.chat is None else self.chat.encoder
        self.leaks = 0

    @cached_property
    def frame(self) -> Frame:
        """Return what the tokenizer adds around a text."""
        return Frame.of(self.tokenizer, 1)

    @cached_property
    def pair_frame(self) -> Frame:
        """Return what the tokenizer adds around and between two texts."""
        return Frame.of(self.tokenizer, 2)

    def rendered(self, messages: Sequence[Message], *, opens: bool) -> str:
        """Return a conversation as the chat template writes it, with hidden control tokens of the content.

        Args:
            messages: Turns of the conversation.
            opens: Whether the template opens the turn of the assistant.

        Raises:
            JudgeError: The template rejects the messages.
        """
        assert self.chat is not None
        try:
            [text] = self.chat.render([Request(tuple(messages), opens)])
        except TemplateError as error:
            raise JudgeError(f"judge.path={self.path}: {error}") from error
        return text

    def encode(self, *texts: str) -> list[Ids]:
        """Return the tokens of the texts of one input, without tokens that the tokenizer adds.

        Control tokens are read as tokens where a template wrote them, and as text where they are hidden.
        """
        before = self.text.leaks
        encoded = self.text.encode(texts)
        self.leaks += self.text.leaks > before
        return encoded

    def note_leaks(self) -> None:
        """Note how many inputs had text that became a control token."""
        if self.leaks:
            note(
                "judge_control_text",
                f"judge.path={self.path}: {self.leaks} inputs contain text that this tokenizer reads as a control "
                "token, which may change a verdict; choose a judge with a fast tokenizer",
                self.leaks,
            )


@dataclass(frozen=True)
class Frame:
    """The tokens around the texts of an input, and their types as BERT knows them.

    Attributes:
        added: Tokens before the first text, between texts, and after the last one.
        added_types: Token types of ``added``.
        types: Token type of each text.
    """

    added: tuple[Ids, ...]
    added_types: tuple[Ids, ...]
    types: Ids

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: int) -> Frame:
        """Return the tokens that a tokenizer adds.

        Args:
            tokenizer: Tokenizer.
            texts: Number of texts in an input, 1 or 2.
        """
        # Tokenizers do not declare what they add, so one word is encoded with and without it.
        words = chain(["a"], tokenizer.get_vocab())
        word, plain = next((w, ids) for w in words if (ids := tokenizer(w, add_special_tokens=False)["input_ids"]))
        whole = tokenizer(*[word] * texts, return_token_type_ids=True)
        ids, types = list(whole["input_ids"]), list(whole.get("token_type_ids") or [0] * len(whole["input_ids"]))
        added, added_types, text_types, place = [], [], [], 0
        for _ in range(texts):
            start = next(i for i in range(place, len(ids)) if ids[i : i + len(plain)] == plain)
            added.append(tuple(ids[place:start]))
            added_types.append(tuple(types[place:start]))
            text_types.append(types[start])
            place = start + len(plain)
        return cls((*added, tuple(ids[place:])), (*added_types, tuple(types[place:])), tuple(text_types))

    @classmethod
    def around(cls, first: Ids, last: Ids) -> Frame:
        """Return the frame of one text between given tokens."""
        return cls((first, last), ((0,) * len(first), (0,) * len(last)), (0,))

    def __len__(self) -> int:
        """Return the number of added tokens."""
        return sum(map(len, self.added))

    def join(self, parts: Sequence[Ids]) -> tuple[list[int], list[int]]:
        """Return the tokens of an input and their types.

        Args:
            parts: Tokens of each text.
        """
        ids, types = list(self.added[0]), list(self.added_types[0])
        following = zip(parts, self.types, self.added[1:], self.added_types[1:], strict=True)
        for part, kind, added, added_types in following:
            ids += [*part, *added]
            types += [*[kind] * len(part), *added_types]
        return ids, types


def without_beginning(parts: Sequence[Ids], room: int) -> list[Ids]:
    """Return the tokens of texts without as many of the first ones as exceed the room.

    Args:
        parts: Tokens of each text.
        room: Number of tokens that may remain.
    """
    excess = max(sum(map(len, parts)) - room, 0)
    rest = []
    for part in parts:
        cut = min(excess, len(part))
        rest.append(part[cut:])
        excess -= cut
    return rest
