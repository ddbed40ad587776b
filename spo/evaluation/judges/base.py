"""Interface of all judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol, runtime_checkable

from rich import get_console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from spo.data.rows import Message, Text


@dataclass(frozen=True)
class JudgedPair:
    """Two completions of one prompt, to be compared.

    Attributes:
        prompt: Prompt as a person reads it, see :func:`as_read`.
        first: Completion without the tokens that end it.
        second: Completion that it is compared with.
    """

    prompt: str
    first: str
    second: str

    @property
    def swapped(self) -> JudgedPair:
        """Return the pair in the other order."""
        return JudgedPair(self.prompt, self.second, self.first)


@runtime_checkable
class Judge(Protocol):
    """Judge of completions. Some judges only compare, others score each completion too."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return all that the verdicts depend on, as JSON values. Cached verdicts belong to an identity."""

    def scores(self, prompts: Sequence[Text], completions: Sequence[str]) -> dict[str, list[float]] | None:
        """Return one number per completion for ``reward`` and each component; ``None`` if the judge only compares.

        Args:
            prompts: Prompts: text, or the messages of a conversation.
            completions: Completions without the tokens that end them.
        """

    def verdicts(self, comparisons: Sequence[JudgedPair]) -> list[float | None]:
        """Return 1 if the first completion is better, 0 if the second is, 0.5 for a tie, ``None`` for no answer.

        Swapping the two completions of a comparison turns a verdict ``v`` into ``1 - v``.
        """

    def usage(self) -> dict[str, float]:
        """Return what the judge has spent, such as ``calls``, ``cached``, ``tokens``; empty if it does not count."""


def compare_all(
    judge: Judge, prompts: Sequence[Text], groups: Sequence[Sequence[str]]
) -> dict[JudgedPair, float | None]:
    """Ask a judge about every two different completions of each prompt.

    Equal completions are one completion here. The order of the completions does not matter to a judge, so each question
    is asked once.

    Args:
        judge: Judge of the completions.
        prompts: Prompts: text, or the messages of a conversation.
        groups: Completions of each prompt, without the tokens that end them.

    Returns:
        Verdict of each comparison in both orders, see :meth:`Judge.verdicts`.

    Raises:
        JudgeError: The judge cannot do its work.
    """
    questions = list(
        dict.fromkeys(
            JudgedPair(prompt, first, second)
            for prompt, group in zip(map(as_read, prompts), groups, strict=True)
            for first, second in combinations(dict.fromkeys(group), 2)
        )
    )
    verdicts: dict[JudgedPair, float | None] = {}
    for question, answer in zip(questions, judge.verdicts(questions) if questions else (), strict=True):
        verdicts |= {question: answer, question.swapped: None if answer is None else 1 - answer}
    return verdicts


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar if there is a terminal, and yield a function that advances it by a number of items."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not get_console().is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def as_read(prompt: Text) -> str:
    """Return a prompt as a person reads it, without the control tokens of any chat template.

    Text stays as it is, and a conversation that is one question becomes that question. Another conversation becomes a
    transcript with the role of each turn.

    Args:
        prompt: Text, or the messages of a conversation.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return _content(prompt[0])
    return "\n\n".join(f"{message['role']}: {_content(message)}" for message in prompt)


def with_answer(prompt: Text, completion: str) -> tuple[Message, ...]:
    """Return a prompt and its completion as messages; a prompt that ends in the assistant's turn is continued.

    Args:
        prompt: Text, which is the user's turn, or the messages of a conversation.
        completion: Text of the assistant.
    """
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if messages and messages[-1]["role"] == "assistant":
        return (*messages[:-1], {**messages[-1], "content": f"{messages[-1].get('content') or ''}{completion}"})
    return (*messages, {"role": "assistant", "content": completion})


def _content(message: Message) -> str:
    """Return the content of a message, and its other fields as JSON."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(str(part.get("text") or "") for part in content)
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    texts = [content or "", *([json.dumps(others, ensure_ascii=False)] if others else [])]
    return "\n".join(filter(None, texts))
