"""Peculiarities of the rows that do not stop a run: what they are, how often they occur, and where first."""

from __future__ import annotations

from collections import Counter

from spo.notes import note

SENTENCES = {
    "repeated_prompts": "Rows whose completions begin with the prompt again: {count} (first: {first}). The repetition "
    "was removed.",
    "short_repeats": "Rows whose completions all begin with the text of their short prompt: {count} (first: {first}). "
    "The completions were not changed.",
    "implied_prompts": "Rows without a prompt in data with a prompt column: {count} (first: {first}). The shared "
    "beginning of their completions is the prompt.",
    "empty_prompts": "Rows whose prompt is empty or does not have a message of the user: {count} (first: {first}).",
    "other_turns": "Rows whose completions contain turns of the user or of tools: {count} (first: {first}). The whole "
    "completion is a target, these turns included.",
    "prompt_not_in_conversation": "Rows whose prompt text is not a message of their conversations: {count} (first: "
    "{first}). The shared beginning of the conversations is the prompt.",
    "duplicate_keys": "Records in which a key or column occurs twice: {count} (first: {first}). The last value is "
    "used.",
    "ignored_columns": "Columns that are not read: {first}. Write what the model should see into the prompt.",
    "repeated_rows": "Rows that repeat an earlier row: {count} (first: {first}).",
    "contradicting_pairs": "Pairs of completions that rows of the same prompt rank both ways: {count} (first: "
    "{first}).",
    "contradicting_labels": "Rows that label a completion of an earlier row the other way: {count} (first: {first}).",
    "missing_rejected": "Rows without a rejected completion: {count} (first: {first}). The method does not read it, so "
    "the rejected completions of the other rows are not used either.",
    "similar_prompts": "Prompts that differ from another prompt only in white space, or in fields beside the text: "
    "{count} (first: {first}). They are in the same split.",
}
"""Sentence for each kind of finding, with its count and the place of the first one."""


class Findings:
    """Counts of peculiarities by kind, with the first place of each.

    Attributes:
        counts: Number of rows or other things, by kind.
        first: Place of the first one, by kind.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, kind: str, where: str, count: int = 1) -> None:
        """Count a finding.

        Args:
            kind: Key of :data:`SENTENCES`.
            where: Place for a person, such as file and line.
            count: Number to add.
        """
        self.counts[kind] += count
        self.first.setdefault(kind, where)

    def remove(self, kind: str) -> None:
        """Forget the findings of a kind."""
        self.counts.pop(kind, None)
        self.first.pop(kind, None)

    def clear(self) -> None:
        """Forget all findings."""
        self.counts.clear()
        self.first.clear()

    def write_notes(self) -> None:
        """Write a note for each kind of finding."""
        for kind, count in self.counts.items():
            note(kind, SENTENCES[kind].format(count=count, first=self.first[kind]), count)
