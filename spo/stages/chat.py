"""``spo chat``: a conversation in the terminal with a run or any model folder, token by token."""

from __future__ import annotations

import signal
import sys
from contextlib import redirect_stdout, suppress

from spo.data.rows import Message, Text
from spo.errors import DataError, UserError
from spo.signals import Interrupted
from spo.stages.quiet import quiet_libraries
from spo.stages.sample_request import SampleRequest, TrustedOverrides, encoding_problem, let_input_hold_any_bytes
from spo.stages.sampled_model import SampledModel, load_sampled
from spo.wording import clean

RESET, QUIT = "/reset", "/quit"


def chat_command(request: SampleRequest, trusted: TrustedOverrides) -> None:
    """Answer each line of the input with a completion of each model, until the input ends.

    A chat model sees its own conversation so far. Any other model sees the line alone. Answer ``t`` has the seed
    ``seed + t``.

    Args:
        request: Settings of the command.
        trusted: Overrides, and the names that the person trusts.

    Raises:
        UserError: A model cannot be found or loaded.
    """
    quiet_libraries()
    with redirect_stdout(sys.stderr):
        models = load_sampled(request, trusted)
    let_input_hold_any_bytes()
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # It lets the arrow keys edit a line.
        print(f"{' and '.join(clean(model.name) for model in models)}: {_advice(models)}")
    try:
        _converse(request.seed, models, "> " if is_terminal else "")
    except (KeyboardInterrupt, Interrupted) as interruption:
        if isinstance(interruption, Interrupted) and interruption.signum != signal.SIGINT:
            raise
        print()


def _advice(models: list[SampledModel]) -> str:
    """Return what to type, in one line."""
    if any(model.is_chat for model in models):
        return f"type a message; {RESET} starts a new conversation, {QUIT} ends"
    return f"type the beginning of a text, where each line is a new prompt; {RESET} restarts the seeds, {QUIT} ends"


def _converse(seed: int, models: list[SampledModel], cue: str) -> None:
    """Read lines and answer them until the input ends. The cue is printed before each line."""
    histories: list[list[Message]] = [[] for _ in models]
    turn = 0
    while True:
        try:
            line = input(cue).strip()
        except EOFError:
            if cue:
                print()
            return
        if line == QUIT:
            return
        if line == RESET:
            histories, turn = [[] for _ in models], 0
            print("(a new conversation)")
        elif (problem := _problem(line)) is not None:
            print(f"spo: {problem}", file=sys.stderr)
        elif line:
            for model, history in zip(models, histories, strict=True):
                _answer(model, history, line, seed + turn, named=len(models) > 1)
            turn += 1


def _problem(line: str) -> str | None:
    """Return a message about a line that cannot be answered, ``None`` for a prompt."""
    if line.startswith("/") and len(line.split()) == 1:
        return f"there is no command {clean(line)}: the commands are {RESET} and {QUIT}"
    problem = encoding_problem(line)
    return None if problem is None else f"the line {problem}"


def _answer(model: SampledModel, history: list[Message], line: str, seed: int, *, named: bool) -> None:
    """Print the answer of a model as it is drawn, and add the exchange to its conversation."""
    asked = model.prompt_of(line)
    prompt: Text = asked if isinstance(asked, str) else (*history, *asked)
    if named:
        print(f"[{clean(model.name)}] ", end="", flush=True)
    try:
        drawn = model.stream(prompt, seed, lambda text: print(clean(text), end="", flush=True))
    except (DataError, UserError) as error:
        advice = f"; {RESET} starts a new conversation" if history else ""
        print(f"spo: {clean(str(error))}{advice}", file=sys.stderr)
        return
    print()
    if not isinstance(asked, str):
        history += [*asked, {"role": "assistant", "content": drawn.text}]
