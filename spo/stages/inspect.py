"""``spo inspect``: rows of the training split as the model reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spo.data import SPLITS
from spo.errors import UserError
from spo.pages.rows import show_rows
from spo.records.files import write_json
from spo.stages.from_config import resolve_values
from spo.stages.prepare import Prepared, prepare_run
from spo.stages.quiet import quiet_libraries


def inspect(cfg: DictConfig, limit: int, file: Path | None = None) -> None:
    """Print the first rows of the training split as tokens, masks and text.

    Args:
        cfg: Configuration of the run.
        limit: Number of rows to print.
        file: JSON file to write all rows of all splits to, or ``None``.

    Raises:
        UserError: If the file cannot be written.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"--json {file}: there is no folder {file.parent}; make it first")
    quiet_libraries()
    prepared = prepare_run(resolve_values(cfg))
    if file is not None:
        try:
            write_json(file, sorted(_records(prepared), key=_natural_order), indent=None)
        except OSError as error:
            raise UserError(f"--json {file}: cannot write the file ({error.strerror}); give another path") from error
    show_rows(prepared.pairs.train, prepared.tokenizer, limit, prepared.pairs.counts, prepared.stop_ids)


def _records(prepared: Prepared) -> Iterator[dict[str, Any]]:
    """Yield each row of each split."""
    # The pairs of an enumerable language are in every split.
    splits = SPLITS[:1] if prepared.language is not None else SPLITS
    for split in splits:
        for pair in getattr(prepared.pairs, split):
            rejected = {"rejected_ids": pair.rejected_ids, "rejected_text": pair.rejected_text}
            yield {
                "where": pair.where,
                "split": split,
                "prompt_ids": pair.prompt_ids,
                "chosen_ids": pair.chosen_ids,
                **rejected,
                "stop_ids": prepared.stop_ids,
                # The prompt as the model reads it, special tokens included.
                "prompt_text": prepared.tokenizer.decode(list(pair.prompt_ids), clean_up_tokenization_spaces=False),
                "chosen_text": pair.chosen_text,
                **({"worse_ids": pair.worse_ids, "worse_texts": pair.worse_texts} if pair.worse_ids else {}),
                **({} if pair.label is None else {"label": pair.label}),
                **({"features": features} if (features := {**pair.features, **pair.numbers}) else {}),
                **({"extra_ids": pair.extra} if pair.extra else {}),
            }


def _natural_order(record: dict[str, Any]) -> list[str | int]:
    """Return a key that sorts records by file and line."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", record["where"])]
