"""Conversations of rows as text: where the prompt ends, where each completion ends, and that no content is lost."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from spo.data.chat import REASONING_TAG, ChatTemplate, Request, TemplateError, find_end, marker
from spo.data.messages import message_text
from spo.data.remarks import Remarks
from spo.data.rows import Message, Row, RowError

_FILE_HINT = "data.chat_template=FILE overrides the template"


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        prompt: Text of the prompt, with hidden control tokens.
        wholes: Texts of prompt and completion together, the best one first, up to the end of the turn.
        texts: Completions as a person reads them, without the tokens that end them.
        end_tokens: Number of tokens at the end of each completion that end its turn; 0 if one must be added.
        conversation: Whether a chat template wrote the texts.
    """

    prompt: str
    wholes: tuple[str, ...]
    texts: tuple[str, ...]
    end_tokens: tuple[int, ...]
    conversation: bool


@dataclass(frozen=True)
class _Facts:
    """Facts about all conversations with the same roles and fields.

    Attributes:
        lost: For each message, the pieces of its content that the template does not show; ``None`` if the template
            rejects such messages with other content. Tags and control tokens separate pieces.
        unread: Fields that do not change what the template writes.
    """

    lost: tuple[frozenset[int], ...] | None
    unread: tuple[str, ...]


class ConversationWriter:
    """A converter of rows of messages to text.

    Args:
        chat: Chat template.
        ends: Tokens that are known to end a turn.
        added_end: Token that ends a completion for which the template does not write one.
        remarks: Counts of remarkable rows.
    """

    def __init__(self, chat: ChatTemplate, ends: frozenset[str], added_end: str, remarks: Remarks) -> None:
        self.chat, self.ends, self.added_end, self.remarks = chat, ends, added_end, remarks
        self._facts: dict[str, _Facts] = {}
        added = [token.content for token in chat.tokenizer.added_tokens_decoder.values() if token.content.strip()]
        tags = sorted({*added, *chat.encoder.control}, key=len, reverse=True)
        self._tags = re.compile("|".join([REASONING_TAG.pattern, *map(re.escape, tags)]))

    def write(self, row: Row, completions: Sequence[tuple[Message, ...]]) -> Rendered:
        """Return a row as text.

        Args:
            row: Row of messages.
            completions: Messages of each completion, the best one first.

        Raises:
            RowError: If the template rejects the messages, or does not show their content.
        """
        assert isinstance(row.prompt, tuple)
        try:
            prompt, wholes, cut = self._render(row, row.prompt, completions)
            for messages, whole in zip(completions, wholes, strict=True):
                self._check(row, row.prompt, messages, whole[:cut], whole[cut:])
        except TemplateError as error:
            reason = str(error)
            if "data.chat_template" not in reason:
                reason = f"{reason.rstrip('.!')}. Change the row, or the template: {_FILE_HINT}"
            raise RowError(row.where, reason) from error
        if self.chat.writes_date and not self.chat.clock.is_set:
            self.remarks.add("current_date")
        if cut < len(prompt):
            self._remark_cut(row, completions, prompt[cut:])
        if found := self.chat.encoder.occurring((row.prompt, list(completions), row.tools)):
            # Tokens that the template reads, such as </think>, stay tokens.
            hidden = [
                token for token in sorted(found) if any(self.chat.encoder.hides(t, token) for t in [prompt, *wholes])
            ]
            if hidden:
                self.remarks.add("control_text", hidden)
        endings = [self._split_end(whole[cut:]) for whole in wholes]
        return Rendered(
            prompt[:cut],
            tuple(prompt[:cut] + text for text, _, _ in endings),
            tuple(self.chat.encoder.reveal(shown) for _, shown, _ in endings),
            tuple(n for _, _, n in endings),
            True,
        )

    def _split_end(self, text: str) -> tuple[str, str, int]:
        """Return a completion up to its end token, without its end tokens, and their number."""
        tail, tail_end = self.chat.tail, self.chat.tail_end
        if tail_end and text.endswith(tail):
            # The template may write more than control tokens after the turn, such as the beginning of another one.
            text = text[: len(text) - len(tail) + tail_end]
        end = find_end(text, self.chat.encoder.control, self.ends)
        if end is None:
            self.remarks.add("end_token_added", [self.added_end])
            return text, text, 0
        start, stop, tokens = end
        return text[:stop], text[:start], len(tokens)

    def _render(
        self, row: Row, prompt: tuple[Message, ...], completions: Sequence[tuple[Message, ...]]
    ) -> tuple[str, list[str], int]:
        """Return the prompt, the whole conversations, and the length of the prompt that they begin with."""
        requests = _requests(row, prompt, completions)
        text, *wholes = self.chat.render(requests)
        if prompt and all(whole.startswith(text) for whole in wholes):
            return text, wholes, len(text)
        roles = {messages[0]["role"] for messages in completions}
        if not prompt or (prompt[-1]["role"] == "assistant" and "assistant" not in roles):
            # The next turn is begun: nothing stands before it, or the template writes the last turn of a prompt unlike
            # one that others follow.
            begun = tuple({"role": role, "content": ""} for role in roles)
            if len(begun) == 1:
                text, *wholes = self.chat.render(
                    [replace(requests[0], messages=prompt + begun, continues=True), *requests[1:]]
                )
        # Some templates open the assistant's turn with words that a finished turn does not contain.
        return text, wholes, self.chat.encoder.before_token(text, shared_length([text, *wholes]))

    def _remark_cut(self, row: Row, completions: Sequence[tuple[Message, ...]], missing: str) -> None:
        key = "generation_prompt_cut"
        if key not in self.remarks:

            def agrees(kwargs: Mapping[str, Any]) -> bool:
                changed = replace(row, template_kwargs={**(row.template_kwargs or {}), **kwargs})
                prompt, *wholes = self.chat.render(_requests(changed, row.prompt, completions))  # type: ignore[arg-type]
                return all(whole.startswith(prompt) for whole in wholes)

            kwargs = self.chat.agreeing_kwargs(agrees)
            if kwargs is None:
                remedy = "data.chat_template_kwargs cannot make them agree"
            else:
                [(name, value)] = kwargs.items()
                argument = f"chat_template_kwargs.{name}={str(value).lower()}"
                if name in (row.template_kwargs or {}):
                    remedy = f"{argument} in the rows makes them agree"
                else:
                    remedy = f"{'' if name in self.chat.kwargs else '+'}data.{argument} makes them agree"
            self.remarks.set_remedy(key, remedy)
        self.remarks.add(key, [json.dumps(self.chat.encoder.reveal(missing), ensure_ascii=False)])

    def _check(
        self, row: Row, prompt: tuple[Message, ...], completion: tuple[Message, ...], before: str, after: str
    ) -> None:
        """Raise a :class:`TemplateError` if the content of a message is not in the text."""
        facts = self._facts_of(row, prompt, completion)
        if facts.unread:
            self.remarks.add("unread_fields", facts.unread)
        if self.chat.unread_kwargs:
            self.remarks.add("unread_arguments", self.chat.unread_kwargs)
        if all(_fields(m) and set(_fields(m)) <= set(facts.unread) and not message_text(m).strip() for m in completion):
            fields = ", ".join(dict.fromkeys(name for message in completion for name in _fields(message)))
            raise TemplateError(f"the chat template does not write a completion, which consists of {fields} only")
        areas = [_squash(self.chat.encoder.reveal(text)) for text in (before, after)]
        last = len(prompt) + len(completion) - 1
        for place, message in enumerate((*prompt, *completion)):
            content = message_text(message)
            pieces = self._pieces(content)
            lost = facts.lost[place] if facts.lost is not None else frozenset()
            area = areas[place >= len(prompt)]
            if not pieces or (not lost and self._appears(content, pieces, area, facts.lost is not None)):
                continue
            if message["role"] == "assistant" and place < last:
                # Templates leave out the reasoning of earlier turns, which may stand in front of a tool call.
                answer = len(pieces) - 1
                if message.get("tool_calls") or (answer not in lost and answer > 0 and _squash(pieces[answer]) in area):
                    self.remarks.add("reasoning_stripped")
                    continue
            part = "prompt" if place < len(prompt) else "completion"
            raise TemplateError(
                f"the chat template leaves out content of message {place + 1}, in the {part} ({message['role']}: "
                f"{_shorten(content)})"
            )

    def _pieces(self, content: str) -> list[str]:
        """Return the pieces of a text between tags and control tokens, without blank ones."""
        return [piece for piece in self._tags.split(content) if piece.strip()]

    def _appears(self, content: str, pieces: Sequence[str], area: str, shown: bool) -> bool:
        """Return whether a text contains content, apart from white space, tags and escapes."""
        quoted = (json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1], html.escape(content))
        if _squash(content) in area or any(_squash(text) in area for text in quoted):
            return True
        if not self._tags.search(content):
            return shown
        start = 0
        for piece in map(_squash, pieces):
            start = area.find(piece, start)
            if start < 0:
                return False
            start += len(piece)
        return True

    def _facts_of(self, row: Row, prompt: tuple[Message, ...], completion: tuple[Message, ...]) -> _Facts:
        messages = (*prompt, *completion)
        kwargs = dict(row.template_kwargs or {})
        shape = [(m["role"], sorted(_fields(m)), self._marked(message_text(m), [])) for m in messages]
        key = repr((len(prompt), shape, bool(row.tools), kwargs))
        if key not in self._facts:
            self._facts[key] = _Facts(self._lost(row, prompt, completion), self._unread(row, messages))
        return self._facts[key]

    def _lost(
        self, row: Row, prompt: tuple[Message, ...], completion: tuple[Message, ...]
    ) -> tuple[frozenset[int], ...] | None:
        """Return for each message the pieces of content that the template does not show, whatever they are."""
        names: list[str] = []
        marked, first_name = [], [0]
        for message in (*prompt, *completion):
            content = self._marked(message_text(message), names)
            marked.append({**message, "content": content} if content else message)
            first_name.append(len(names))
        try:
            _, [whole], cut = self._render(row, tuple(marked[: len(prompt)]), [tuple(marked[len(prompt) :])])
        except TemplateError:
            return None
        lost = []
        for place, (first, end) in enumerate(pairwise(first_name)):
            area = whole[cut:] if place >= len(prompt) else whole[:cut]
            lost.append(frozenset(i for i, name in enumerate(names[first:end]) if name not in area))
        return tuple(lost)

    def _marked(self, content: str, names: list[str]) -> str:
        """Return content with a marker in place of each piece, and add the markers to ``names``."""
        parts = []
        for part in re.split(f"({self._tags.pattern})", content):
            if self._tags.fullmatch(part):
                parts.append(part)
            elif part.strip():
                names.append(marker(len(names)))
                parts.append(names[-1])
        return "".join(parts)

    def _unread(self, row: Row, messages: tuple[Message, ...]) -> tuple[str, ...]:
        """Return the fields beside role and content without which the template writes the same."""
        request = Request(messages, tools=row.tools, kwargs=row.template_kwargs)
        [whole] = self.chat.render([request])
        fields = dict.fromkeys(name for message in messages for name in _fields(message))
        without = {
            name: replace(request, messages=tuple({k: v for k, v in m.items() if k != name} for m in messages))
            for name in fields
        }
        if row.tools:
            without["tools"] = replace(request, tools=None)
        unread = [name for name in row.template_kwargs or () if name not in self.chat.variables]
        for name, other in without.items():
            try:
                unread += [name] if self.chat.render([other]) == [whole] else []
            except TemplateError:  # The template needs the field.
                continue
        return tuple(unread)


def _requests(row: Row, prompt: tuple[Message, ...], completions: Sequence[tuple[Message, ...]]) -> list[Request]:
    """Return the prompt and the whole conversations to render."""
    continues = bool(prompt) and prompt[-1]["role"] == "assistant"
    opens = not continues
    # A prompt that ends in an assistant's turn is continued by the assistant's first message.
    continues = continues and all(messages[0]["role"] == "assistant" for messages in completions)
    wholes = [
        (*prompt[:-1], _joined(prompt[-1], messages[0]), *messages[1:]) if continues else (*prompt, *messages)
        for messages in completions
    ]
    requests = [Request(prompt, opens, continues), *map(Request, wholes)]
    return [replace(request, tools=row.tools, kwargs=row.template_kwargs) for request in requests]


def _joined(first: Message, second: Message) -> Message:
    return {**first, **second, "content": message_text(first) + message_text(second)}


def shared_length(sequences: Sequence[Sequence[object]]) -> int:
    """Return the number of leading items that all sequences share."""
    length = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        length += 1
    return length


def _fields(message: Message) -> list[str]:
    return [name for name, value in message.items() if name not in ("role", "content") and value]


def _squash(text: str) -> str:
    return "".join(text.split())


def _shorten(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else text[:40] + "...", ensure_ascii=False)
