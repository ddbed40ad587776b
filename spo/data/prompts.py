"""Prompt and completions of a row: where one ends and the others begin.

Data sets write the prompt in a column of its own, at the beginning of each completion, or in both places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from spo.data.findings import Findings
from spo.data.messages import message_text
from spo.data.rows import Message, Row, RowError, Text

MIN_REPEATED_CHARACTERS = 12
"""Length from which a text prompt at the beginning of all completions of a row is a repetition and not chance."""


class Candidate(NamedTuple):
    """A completion, or a whole text or conversation that ends with it.

    Attributes:
        text: Text or messages.
        column: Column that holds it.
        name: Name within a column of lists, such as ``response 2``.
    """

    text: Text
    column: str
    name: str = ""

    def error(self, where: str, reason: str) -> RowError:
        """Return an error about this completion."""
        return RowError(where, f"{self.name} {reason}".strip(), self.column)


def separate_prompt(
    prompt: Text, candidates: Sequence[Candidate], column: str, where: str, findings: Findings
) -> tuple[Text, list[Text]]:
    """Return the prompt and the completions in the same form, conversations without repetitions of the prompt.

    A text prompt of conversations is a turn of the user. If the conversations begin with another turn than the
    assistant's, they contain the prompt (UltraFeedback's form), and their shared beginning replaces it.

    Args:
        prompt: Value of the prompt's column.
        candidates: Completions, all text or all messages.
        column: Name of the prompt's column.
        where: Place of the record for messages.
        findings: Counts, to which repetitions are added.

    Raises:
        RowError: If prompt and completions differ in form, or if a completion does not begin and end with a message of
            the assistant.
    """
    texts = [candidate.text for candidate in candidates]
    if isinstance(texts[0], str):
        if not isinstance(prompt, str):
            raise RowError(where, "a list of messages, but the completions are text; write both in one form", column)
        return prompt, texts
    if isinstance(prompt, str):
        if all(text and text[0]["role"] != "assistant" for text in texts):  # type: ignore[index]
            shared, rests = split_conversations(candidates, where)
            if prompt.strip() and prompt.strip() not in [message_text(message).strip() for message in shared]:
                findings.add("prompt_not_in_conversation", where)
            return shared, rests
        prompt = ({"role": "user", "content": prompt},) if prompt.strip() else ()
    completions = [_without_repeated_turns(prompt, text) for text in texts]  # type: ignore[arg-type]
    if completions != texts:
        findings.add("repeated_prompts", where)
    for candidate, completion in zip(candidates, completions, strict=True):
        if completion:
            _check_start(candidate, prompt, completion, where)
            _check_end(candidate, completion, where)
    return prompt, list(completions)


def follow_prompt(prompt: Text, candidate: Candidate, where: str, whole: bool = False) -> Text:
    """Return a further completion of a prompt that is known, a conversation without a repetition of the prompt.

    Args:
        prompt: Prompt of the row.
        candidate: Further completion.
        where: Place of the record for messages.
        whole: Whether the completions of the row were whole texts, so that this one must begin with the prompt too.

    Raises:
        RowError: If prompt and completion differ in form, or if the completion does not follow the prompt.
    """
    text = candidate.text
    if isinstance(prompt, str) != isinstance(text, str):
        forms = ("is text, but the other completions are messages", "is a list of messages, but the prompt is text")
        raise candidate.error(where, forms[isinstance(prompt, str)])
    if whole and text[: len(prompt)] != prompt:
        raise candidate.error(
            where, "does not begin with the prompt that chosen and rejected share; write it into a column prompt"
        )
    if isinstance(text, str):
        return text[len(prompt) :] if whole else text
    completion = text[len(prompt) :] if whole else _without_repeated_turns(prompt, text)  # type: ignore[arg-type]
    if completion:
        _check_start(candidate, prompt, completion, where)  # type: ignore[arg-type]
        _check_end(candidate, completion, where)
    return completion


def split_conversations(candidates: Sequence[Candidate], where: str) -> tuple[tuple[Message, ...], list[Text]]:
    """Split conversations into the leading messages that all share and the rests.

    Args:
        candidates: Conversations.
        where: Place of the record for messages.

    Raises:
        RowError: If the conversations already differ in a turn of the user, or do not end with the assistant's.
    """
    texts: list[tuple[Message, ...]] = [candidate.text for candidate in candidates]  # type: ignore[misc]
    cut = count_shared_messages(*texts)
    rests = [text[cut:] for text in texts]
    if not all(rests):
        return (), list(texts)
    for candidate, rest in zip(candidates, rests, strict=True):
        _check_end(candidate, rest, where)
    heads = [rest[0] for rest in rests]
    other = next((message["role"] for message in heads if message["role"] != "assistant"), None)
    if other is not None:
        fields = sorted({key for message in heads for key in message if any(message[key] != m.get(key) for m in heads)})
        reason = (
            f"message {cut + 1} is a message of the {other}, but the conversations of the row already differ there "
            f"(in {', '.join(fields)}); all completions must follow the same prompt"
        )
        raise RowError(where, reason, candidates[-1].column)
    return texts[0][:cut], list(rests)


def _check_start(
    candidate: Candidate, prompt: tuple[Message, ...], completion: tuple[Message, ...], where: str
) -> None:
    role = completion[0]["role"]
    if role != "assistant":
        reason = f"begins with a message of the {role} that does not repeat the prompt; a completion begins with"
        raise candidate.error(where, f"{reason} the assistant's")
    if prompt[-1:] == completion[:1]:
        raise candidate.error(where, "begins with the last message of the prompt; remove that message from the prompt")


def _check_end(candidate: Candidate, completion: tuple[Message, ...], where: str) -> None:
    role = completion[-1]["role"]
    if role != "assistant":
        raise candidate.error(where, f"ends with a message of the {role}; the last message must be the assistant's")


def count_shared_messages(*conversations: Sequence[Message]) -> int:
    """Return the number of leading messages that all conversations share, with at least one left to each."""
    cut = 0
    while cut < min(map(len, conversations)) - 1 and all(c[cut] == conversations[0][cut] for c in conversations):
        cut += 1
    return cut


def _without_repeated_turns(prompt: tuple[Message, ...], completion: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the completion without the prompt, or the end of the prompt, at its beginning."""
    for start in range(len(prompt)):
        repeated = prompt[start:]
        # A beginning without a turn of the user may be the assistant's own words.
        if completion[: len(repeated)] == repeated and any(turn["role"] == "user" for turn in repeated):
            return completion[len(repeated) :]
    return completion


def remove_repeated_texts(rows: Sequence[Row], findings: Findings) -> list[Row]:
    """Return the rows without text prompts that all completions of their row repeat at the beginning.

    A text in a further column is a completion too. It is judged by itself.

    A short prompt may recur by chance. It is removed if most rows of the data repeat their prompt.

    Args:
        rows: Rows of one data set. Conversations do not change.
        findings: Counts, to which repetitions are added.
    """
    rests = [_completions_after_prompt(row) for row in rows]
    usual = sum(rest is not None for rest in rests) > len(rows) / 2
    result: list[Row] = []
    for row, rest in zip(rows, rests, strict=True):
        removed = usual or len(str(row.prompt).strip()) >= MIN_REPEATED_CHARACTERS
        further = _columns_after_prompt(row)
        if removed and (rest is not None or further):
            findings.add("repeated_prompts", row.where)
            chosen, *others = row.completions if rest is None else rest
            columns = {**row.columns, **further}
            result.append(
                replace(row, chosen=chosen, rejected=(*others, None)[0], worse=tuple(others[1:]), columns=columns)
            )
            continue
        if rest is not None or further:
            findings.add("short_repeats", row.where)
        result.append(row)
    return result


def _completions_after_prompt(row: Row) -> list[str] | None:
    """Return the parts of the completions after the prompt's text, ``None`` unless all begin with it."""
    rests = [_after_prompt(row.prompt, text) for text in row.completions]
    return None if None in rests else rests  # type: ignore[return-value]


def _columns_after_prompt(row: Row) -> dict[str, str]:
    """Return the parts of the texts in further columns after the prompt's text, for those that begin with it."""
    rests = {name: _after_prompt(row.prompt, text) for name, text in row.columns.items() if isinstance(text, str)}
    return {name: rest for name, rest in rests.items() if rest is not None}


def _after_prompt(prompt: Text, text: Text) -> str | None:
    """Return the part of a text after the text of a prompt, ``None`` unless it begins with it."""
    if not isinstance(prompt, str) or not isinstance(text, str) or not prompt.strip():
        return None
    # White space around the prompt may be missing or doubled in the repetition.
    begin = prompt if text.startswith(prompt) else text[: len(text) - len(text.lstrip())] + prompt.strip()
    rest = text.removeprefix(begin)
    in_word = begin[-1].isalnum() and rest[:1].isalnum() and len(prompt.strip()) < MIN_REPEATED_CHARACTERS
    return None if len(rest) == len(text) or in_word else rest


def shared_prompt_length(chosen: str, rejected: str) -> int:
    """Return the length of the prompt that two whole texts share, without splitting a word.

    A space after the prompt belongs to the completions: ``"The sky is" + " blue"``. Tokenizers merge a space into the
    word that follows it.
    """
    cut = common_prefix_length(chosen, rejected)
    if chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace():
        return cut
    # At least one character is left to each completion.
    cut = min(cut, len(chosen) - 1, len(rejected) - 1)
    while cut > 0 and not chosen[cut - 1].isspace():
        cut -= 1
    return cut - 1 if cut > 0 and chosen[cut - 1] == " " else max(cut, 0)


def common_prefix_length(first: str, second: str) -> int:
    """Return the number of leading characters that two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
