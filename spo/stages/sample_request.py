"""Settings of ``spo sample`` and ``spo chat``, and the folders of the models that they name.

It does not import torch, so that a wrong command is answered at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spo.errors import UserError
from spo.metrics.catalogue import REFERENCE
from spo.records import filenames
from spo.records.policy import looks_like_run, saved_policy

STANDARD_INPUT = "-"
"""Prompt that stands for the text of the standard input."""
DEFAULT_RATIO = 2.0
"""Strength of a principle: the ratio of the official demo of Linear Alignment."""


@dataclass(frozen=True)
class TrustedOverrides:
    """Overrides of a model's configuration, and the names that a person trusts in it.

    Attributes:
        overrides: Overrides of the groups ``data``, ``evaluation`` and ``judge``, and of the device.
        allow: Targets, modules and paths of a run's configuration that may be used although it came with the directory.
        config_dir: Folder with further members of the groups.
    """

    overrides: Sequence[str] = ()
    allow: Sequence[str] = ()
    config_dir: str | None = None


@dataclass(frozen=True)
class SampleRequest:
    """Settings of ``spo sample`` and ``spo chat``.

    Attributes:
        model: Run directory, or folder of a Hugging Face model.
        prompt: Text of the prompt, a user's message for a chat model; empty in a chat.
        count: Number of completions.
        seed: Seed of the first completion.
        temperature: Temperature of the softmax; ``None`` for that of the run's evaluation.
        top_p: Probability that the nucleus of each token has to reach.
        max_new_tokens: Length limit of a completion in tokens; ``None`` for that of the run's evaluation.
        against: Other model to sample from: ``reference`` for that of the run, a run directory or a model folder;
            ``None`` for none.
        principle: Principle of Linear Alignment; ``None`` to sample without one.
        ratio: Strength of the principle; ``None`` for :data:`DEFAULT_RATIO`.
        nucleus: Name of the logits that choose the nucleus of Linear Alignment; ``None`` for ``principled``.
        best_of: Number of completions from which the judge chooses each one; ``None`` for no choice.
        plain: True for a prompt that is plain text, even for a chat model.
    """

    model: Path
    prompt: str = ""
    count: int = 1
    seed: int = 0
    temperature: float | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None
    against: str | None = None
    principle: str | None = None
    ratio: float | None = None
    nucleus: str | None = None
    best_of: int | None = None
    plain: bool = False

    def problem(self, *, needs_prompt: bool = True) -> str | None:
        """Return a message about the first wrong setting, ``None`` if there is none.

        Args:
            needs_prompt: True for a command with a prompt.
        """
        for name, text in (("the prompt", self.prompt), ("--principle", self.principle or "")):
            if (problem := encoding_problem(text)) is not None:
                return f"{name} {problem}"
        if needs_prompt and not self.prompt.strip():
            return 'the prompt is empty: give its text, such as spo sample RUN "Mia the fox lived by the sea."'
        if self.count < 1:
            return f"-n {self.count}: must be at least 1"
        if self.seed < 0:
            return f"--seed {self.seed}: must be 0 or more"
        if self.temperature is not None and not (self.temperature >= 0 and math.isfinite(self.temperature)):
            return f"--temperature {self.temperature:g}: must be finite and 0 or more; 0 takes the likeliest token"
        if not 0 < self.top_p <= 1:
            return f"--top-p {self.top_p:g}: must be above 0 and at most 1, which keeps all tokens"
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            return f"--max-new-tokens {self.max_new_tokens}: must be at least 1"
        if self.best_of is not None and self.best_of < 1:
            return f"--best-of {self.best_of}: must be at least 1"
        if self.principle is None:
            for flag, value in (("--ratio", self.ratio), ("--nucleus", self.nucleus)):
                if value is not None:
                    return f"{flag} {value} is a setting of Linear Alignment: add --principle TEXT"
        elif not self.principle.strip():
            return "--principle is empty: give its text, or leave it out"
        if self.ratio is not None and not math.isfinite(self.ratio):
            return f"--ratio {self.ratio:g}: must be a finite number, such as {DEFAULT_RATIO:g}"
        return None

    def check_models(self) -> None:
        """Check that the model and the other model are there.

        Raises:
            UserError: A folder does not hold a model, or a model folder is compared with its reference.
        """
        is_run = is_run_directory(self.model)
        if self.against == REFERENCE and not is_run:
            raise UserError(
                f"{self.model} is a model folder, and only a run has a reference: name the other model as "
                "--against FOLDER"
            )
        if self.against not in (None, REFERENCE):
            is_run_directory(Path(str(self.against)))


def encoding_problem(text: str) -> str | None:
    """Return the end of a sentence about a text that was not typed in UTF-8, ``None`` for one that a model can read.

    Args:
        text: Text of the command line or the standard input, with lone surrogates for what is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"is not valid UTF-8 after {text[: error.start]!r}: write it in this encoding"
    return None


def let_input_hold_any_bytes() -> None:
    """Make the standard input read bytes that are not UTF-8 as surrogates, which :func:`encoding_problem` reports."""
    if (reconfigure := getattr(sys.stdin, "reconfigure", None)) is not None:
        reconfigure(errors="surrogateescape")


def is_run_directory(path: Path) -> bool:
    """Return whether a path is a run directory with a policy, and not the folder of a model.

    Args:
        path: Path that a person named.

    Raises:
        UserError: The path is neither of the two, or the run does not have a policy.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder: name a run directory, or a folder with a Hugging Face model")
    if (path / "config.json").is_file():
        return False
    if looks_like_run(path):
        saved_policy(path)
        return True
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter and not a whole model: merge it into its base model, or name the run that "
            "trained it"
        )
    if runs := sorted(path.glob(f"*/{filenames.POLICY}/config.json")):
        raise UserError(f"{path} holds several runs: name one of them, such as {runs[-1].parents[1]}")
    raise UserError(
        f"{path} is neither a run directory, which has {filenames.POLICY}/, nor the folder of a model, which has "
        "config.json"
    )
