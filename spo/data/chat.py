"""Chat templates: conversations as the model's own template writes them, and the tokens that end a turn.

A rendering is a text in which control tokens of the content are hidden, see :mod:`spo.data.encoding`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from spo.data.clock import CLOCK, Clock
from spo.data.encoding import Ids, TextEncoder
from spo.data.message_forms import called_names, message_forms, with_object_arguments
from spo.data.rows import DataError, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", CLOCK}
"""Variables of templates that are not arguments of the user."""
REASONING_TAG = re.compile(r"</?(?:think|thinking|reasoning)>")
"""Tag around the reasoning in an assistant's message."""
_TAIL = "730594846197"
"""Text after the content of a message that is continued. Templates that change letters do not change digits."""


class TemplateError(DataError):
    """A conversation that cannot be written with the chat template."""


@dataclass(frozen=True)
class Request:
    """A conversation to render.

    Attributes:
        messages: Turns of the conversation.
        opens: Whether the template opens the assistant's turn after the messages.
        continues: Whether the last turn stays open, without the token that ends it.
        tools: Tools that the template lists, or ``None``.
        kwargs: Further arguments of the template.
    """

    messages: tuple[Message, ...]
    opens: bool = False
    continues: bool = False
    tools: tuple[dict[str, Any], ...] | None = None
    kwargs: Mapping[str, Any] | None = None


class ChatTemplate:
    """The chat template of a tokenizer.

    The template is asked once about a conversation of two questions and two answers. The run of special tokens that it
    writes directly after the last answer ends a turn: its last token is the end token. The token at the same place
    after the first answer is the end token of turns inside a conversation.

    Args:
        tokenizer: Tokenizer of the model, with a chat template.
        kwargs: Arguments of the template for all conversations, such as ``enable_thinking``.
        control: Control tokens besides those of the tokenizer and the template.

    Attributes:
        clock: Time that the template may write.
        encoder: Encoder of renderings.
        tail: Text that the template writes after the content of the last turn.
        tail_end: Length of the part of ``tail`` that ends the turn; 0 if the template does not write an end token.
        end: Token after the last turn, or ``None`` if the template does not write one.
        inner_end: Token after a turn inside a conversation, or ``None``.
        variables: Names of the arguments that the template reads.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kwargs: Mapping[str, Any] | None = None,
        control: Iterable[str] = (),
    ) -> None:
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs or {})
        self.clock, self._probed = Clock(self.kwargs.pop(CLOCK, None)), Request(())
        self.tail, self.tail_end = "", 0
        self.end: str | None = None
        self.inner_end: str | None = None
        self.reads_strings = self.reads_parts = self._shows_content = True
        turn_tokens = self._probe()
        self.encoder = TextEncoder(tokenizer, [*control, *turn_tokens, *self.ends])
        source = str(tokenizer.chat_template)
        self._reasoning = {t for t in self.encoder.control if REASONING_TAG.fullmatch(t) and t in source}

    @property
    def ends(self) -> list[str]:
        """Return the tokens that end a turn, that of the last turn first."""
        return [end for end in (self.end, self.inner_end) if end is not None]

    @cached_property
    def variables(self) -> frozenset[str]:
        """Return the names of the arguments that the template reads, besides messages, tools and special tokens."""
        import jinja2.ext
        import jinja2.meta
        import jinja2.sandbox

        names: set[str] = set()
        template = self.tokenizer.chat_template
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=[jinja2.ext.loopcontrols])
        for text in template.values() if isinstance(template, dict) else [template]:
            # The tag marks the assistant's words. It is an extension of transformers that jinja2 does not know.
            plain = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", text)
            names |= jinja2.meta.find_undeclared_variables(environment.parse(plain))
        return frozenset(names - _GIVEN - self.tokenizer.special_tokens_map.keys())

    @cached_property
    def unread_kwargs(self) -> tuple[str, ...]:
        """Return the names of the arguments for all conversations that the template does not read."""
        return tuple(sorted(self.kwargs.keys() - self.variables - self.tokenizer.special_tokens_map.keys()))

    @cached_property
    def writes_date(self) -> bool:
        """Return whether the template writes the current date."""
        now, text = self.clock, self._write(self._probed)
        self.clock = Clock("1999-12-31")
        other = self._write(self._probed)
        self.clock = now
        return other != text

    def render(self, requests: Sequence[Request]) -> list[str]:
        """Return the text of each conversation.

        The same control tokens are hidden in all texts: those that occur in the messages, except for tokens that the
        template looks for. A token can be hidden if that does not change what the template writes. Tags of reasoning
        that the template mentions stay tokens in an assistant's messages.

        Raises:
            TemplateError: If the template rejects the messages, or if it never shows the content of messages.
        """
        if not self._shows_content:
            raise TemplateError(
                "the chat template of the tokenizer does not show the content of messages, neither as text nor as a "
                "list of parts: give another one as data.chat_template=FILE"
            )
        found: frozenset[str] = frozenset().union(
            *(self.encoder.occurring((r.messages, r.tools, dict(r.kwargs or {}))) for r in requests)
        )
        visible = [self._write(request) for request in requests]
        if not found:
            return visible
        hidden: set[str] = set()
        texts = visible
        for token in sorted(found):
            with_token = [self._hide(request, {*hidden, token}) for request in requests]
            try:
                trial = [self._write(request) for request in with_token]
            except TemplateError:
                continue
            if [self.encoder.reveal(text) for text in trial] == visible:
                hidden.add(token)
                texts = trial
        return texts

    def encode(self, messages: Sequence[Message], *, opens: bool = True) -> Ids:
        """Return the tokens of a conversation. The template alone decides whether they begin with a BOS.

        Args:
            messages: Turns of the conversation.
            opens: Whether the template opens the assistant's turn after the messages.

        Raises:
            TemplateError: If the template rejects the messages.
        """
        [text] = self.render([Request(tuple(messages), opens)])
        return self.encoder.encode([text])[0]

    def agreeing_kwargs(self, agrees: Callable[[Mapping[str, Any]], bool]) -> dict[str, bool] | None:
        """Return an argument of the template with which a condition holds, or ``None``.

        Args:
            agrees: Condition on additional arguments of the template.
        """
        for name, value in product(sorted(self.variables), (False, True)):
            try:
                if agrees({name: value}):
                    return {name: value}
            except TemplateError:
                continue
        return None

    def _hide(self, request: Request, tokens: set[str]) -> Request:
        hide = self.encoder.hide
        messages = tuple(
            hide(m, tokens - self._reasoning if m["role"] == "assistant" else tokens) for m in request.messages
        )
        tools = request.tools and tuple(hide(request.tools, tokens))
        return replace(request, messages=messages, tools=tools, kwargs=hide(dict(request.kwargs or {}), tokens))

    def _write(self, request: Request) -> str:
        """Return the text that the template writes."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [self._shaped(message) for message in request.messages]
        if not messages:
            return ""
        if request.continues:
            messages[-1] = _extended(messages[-1], _TAIL)
        kwargs = {**self.kwargs, **(request.kwargs or {})}
        tools = list(request.tools) if request.tools else None

        def apply(turns: list[Message]) -> str:
            # `apply_chat_template` drops null content, which some templates look for; this is what it calls.
            rendered: Any = render_jinja_template(
                [turns],
                tools=tools,  # type: ignore[arg-type]
                chat_template=self.clock.stop_in(self.tokenizer.get_chat_template(None, tools)),
                add_generation_prompt=request.opens,
                **{**self.tokenizer.special_tokens_map, **kwargs},
            )
            return str(rendered[0][0])

        text = _written(apply, messages)
        return text.rpartition(_TAIL)[0] if request.continues else text

    def _shaped(self, message: Message) -> Message:
        """Return a message with its content in the form that the template reads: text, or a list of parts."""
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            if others := {str(part.get("type")) for part in content if not isinstance(part.get("text"), str)}:
                raise TemplateError(
                    f"content of type {', '.join(sorted(others))} is not text, which is all models read"
                )
            if not self.reads_parts:
                return {**message, "content": "".join(part["text"] for part in content)}
        elif not self.reads_strings:
            return {**message, "content": [{"type": "text", "text": content or ""}]}
        return message

    def _probe(self) -> set[str]:
        """Find how the template writes content and ends turns; return the tokens that it writes between turns."""
        added = sorted(
            (t.content for t in self.tokenizer.added_tokens_decoder.values() if t.content.strip()),
            key=len,
            reverse=True,
        )
        token = "|".join(map(re.escape, added)) or "(?!)"
        rejected = False
        # Templates may want a system turn, or only one question.
        for n, system in product((2, 1), (False, True)):
            names = [marker(i) for i in range(2 * n)]
            turns = [{"role": ("user", "assistant")[i % 2], "content": name} for i, name in enumerate(names)]
            if system:
                turns.insert(0, {"role": "system", "content": marker(2 * n)})
            texts = {}
            for parts in (False, True):
                shaped = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns] if parts else turns
                self.reads_strings, self.reads_parts = True, True
                try:
                    texts[parts] = self._write(Request(tuple(shaped)))
                except TemplateError:
                    rejected = True
            shown = {parts: text for parts, text in texts.items() if all(name in text for name in names[-2:])}
            if shown:
                text = shown.get(False, shown.get(True, ""))
                self.reads_strings = False in shown
                # A template that reads text only may write a list as Python does.
                self.reads_parts = shown.get(True) == text
                self._probed = Request(tuple(turns))
                return self._read_ends(text, names, token)
            rejected = rejected or not texts
        self.reads_strings, self.reads_parts = True, False
        self._shows_content = rejected
        return set()

    def _read_ends(self, text: str, names: Sequence[str], token: str) -> set[str]:
        run = re.compile(rf"\s*((?:{token})+)")
        self.tail = text.rpartition(names[-1])[2]
        last = run.match(self.tail)
        self.tail_end = last.end() if last else 0
        tokens = re.findall(token, last[1]) if last else []
        self.end = tokens[-1] if tokens else None
        if len(names) < 4:
            return set(re.findall(token, text[: text.index(names[0])])) if names[0] in text else set()
        first = text.find(names[1])
        if first < 0:
            return set()
        first += len(names[1])
        inner = run.match(text, first)
        inside = re.findall(token, inner[1]) if inner else []
        if tokens and len(inside) >= len(tokens):
            self.inner_end = inside[len(tokens) - 1]
        return set(re.findall(token, text[first : text.rindex(names[2])])) if names[2] in text else set()


def marker(number: int) -> str:
    """Return a text that stands for content and that neither data nor templates contain."""
    return f"7305{number:04d}9461"


def find_end(text: str, control: Sequence[str], ends: Iterable[str]) -> tuple[int, int, list[str]] | None:
    """Return where the turn ends in a text that ends in a turn, or ``None`` if no control token is written after it.

    The end is looked for after the content: in what consists of control tokens and white space only. It is the first
    run of tokens whose last one is known to end a turn, or else the first run.

    Args:
        text: Text, in which control tokens of the content are hidden.
        control: Control tokens, the longest first.
        ends: Tokens that are known to end a turn.

    Returns:
        Beginning and end of the run, and its tokens.
    """
    runs: list[tuple[int, int, list[str]]] = []
    stop = len(text)
    while True:
        bare = len(text[:stop].rstrip())
        token = next((token for token in control if text.endswith(token, 0, bare)), None)
        if token is None:
            break
        start = bare - len(token)
        if runs and runs[-1][0] == bare:
            runs[-1] = (start, runs[-1][1], [token, *runs[-1][2]])
        else:
            runs.append((start, bare, [token]))
        stop = start
    runs.reverse()
    known = set(ends)
    return next((run for run in runs if run[2][-1] in known), runs[0] if runs else None)


def _written(apply: Callable[[list[Message]], str], messages: list[Message]) -> str:
    """Return what a template writes, given the messages as they are or in the form that it reads.

    Templates quote the JSON of a tool call's arguments once more, or put braces around it. Given the object, they write
    what the model knows. The JSON stays if the template writes the same for both, apart from white space.
    """
    objects = [with_object_arguments(message) for message in messages]
    if objects == messages:
        return _first_that_works(apply, messages)
    texts: list[str] = []
    for form in (messages, objects):
        try:
            texts.append(_first_that_works(apply, form))
        except TemplateError:
            if form is objects and not texts:
                raise
    same = len({"".join(text.split()) for text in texts}) == 1
    return texts[0] if same else texts[-1]


def _first_that_works(apply: Callable[[list[Message]], str], messages: list[Message]) -> str:
    """Return what a template writes for the first form of the messages with which it names all called tools."""
    problem: Exception | None = None
    written: list[str] = []
    for form in message_forms(messages):
        try:
            text = apply(form)
        except Exception as error:  # Templates may raise any error that their author chose.
            problem = problem or error
            continue
        if all(name in text for message in form for name in called_names(message)):
            return text
        written.append(text)
    if written:
        return written[0]
    raise TemplateError(f"the chat template rejects the messages: {problem}") from problem


def _extended(message: Message, tail: str) -> Message:
    """Return a message with more text at the end of its content."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + tail}]}
    return {**message, "content": f"{content or ''}{tail}"}
