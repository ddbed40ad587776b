"""The output of ``spo inspect``: pairs as text, tokens and masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spo.data.rendering import TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT, _COMPLETION, _SPECIAL = "dim", "bold green", "reverse yellow"


def show_rows(
    pairs: Sequence[TokenizedPair],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    counts: Mapping[str, int],
    stop_ids: Collection[int] = (),
    console: Console | None = None,
) -> None:
    """Print the first ``limit`` pairs as the model sees them, and the counts of the whole data.

    Prompt tokens (not in the loss) are dim, completion tokens (in the loss) bright, BOS and end reversed. A mask line
    of ``.`` (prompt) and ``#`` (completion) shows the same without colors.

    Args:
        pairs: Pairs of the data.
        tokenizer: Tokenizer that names the tokens.
        limit: Number of pairs to print.
        counts: Counts of pairs, see ``spo.data.PreparedPairs``.
        stop_ids: Tokens that end a completion, besides EOS.
        console: Console to print to; ``None`` for the terminal.
    """
    console = console or Console()
    for number, pair in enumerate(pairs[:limit], 1):
        console.print(_panel(number, pair, tokenizer, stop_ids))
    labelled = bool(pairs) and pairs[0].label is not None
    table = Table(title="rows" if labelled else "pairs", show_header=False)
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    console.print(table)


def _panel(number: int, pair: TokenizedPair, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> Panel:
    body = Text()
    names = ["chosen", "rejected", *(f"rejected, place {place}" for place in range(3, len(pair.completions) + 1))]
    if pair.label is not None:
        names = ["completion"]
    for name, text in zip(["prompt", *names], [pair.prompt_text, *pair.texts], strict=False):
        body.append(f"{name}\n", "bold").append(f"{text}\n\n", _PROMPT if name == "prompt" else _COMPLETION)
    named = [*zip(names, pair.completions, strict=False), *pair.extra.items()]
    for name, completion in named:
        body.append(f"tokens of prompt + {name}: {len(pair.prompt_ids)} + {len(completion)}\n", "bold")
        body.append_text(_tokens(pair.prompt_ids, completion, tokenizer, stop_ids))
        body.append("\nmask ").append("." * len(pair.prompt_ids), _PROMPT)
        body.append("#" * len(completion), _COMPLETION).append("\n\n")
    facts = {
        "prompt id": pair.prompt_id,
        **({"preference": 1.0 if pair.preference is None else pair.preference} if pair.label is None else {}),
        **({} if pair.label is None else {"label": pair.label}),
        **pair.features,
        **pair.numbers,
        "weight": 1.0 if pair.weight is None else pair.weight,
        "truncated": pair.truncated,
        "tokens merge after the prompt": pair.boundary_moved,
    }
    body.append("   ".join(f"{name}: {value}" for name, value in facts.items()))
    return Panel(body, title=Text(f"{number}. {pair.where}"), title_align="left")


def _tokens(
    prompt: tuple[int, ...], completion: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
) -> Text:
    line = Text()
    ids = prompt + completion
    for position, (token_id, token) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)):
        style = _PROMPT if position < len(prompt) else _COMPLETION
        mark = ""
        if position == 0 and token_id == tokenizer.bos_token_id:
            style, mark = _SPECIAL, "BOS "
        if position == len(ids) - 1 and token_id in (tokenizer.eos_token_id, *stop_ids):
            style, mark = _SPECIAL, "EOS " if token_id == tokenizer.eos_token_id else "END "
        line.append(f"{mark}{token}", style).append(f":{token_id} ", "dim cyan")
    return line
