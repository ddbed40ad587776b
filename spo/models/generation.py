"""The generation config of a model folder: the tokens that end a generation, and defaults for sampling."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from spo.errors import UserError
from spo.notes import note

TEXT_CONFIGS = ("text_config", "decoder", "generator")
"""Parts of a composite model's config in which transformers looks for its text model."""


def read_stop_ids(path: str | Path, vocab_size: int) -> tuple[int, ...]:
    """Return the tokens by which a model ends a generation, in ascending order.

    They are ``eos_token_id`` of ``generation_config.json``, one id or several. Without that file they are those of
    ``config.json``, as for transformers.

    Args:
        path: Hugging Face folder or hub name.
        vocab_size: Number of tokens of the model. An id beyond it is ignored, with a note.

    Raises:
        UserError: One of the files is not a JSON object.
    """
    settings = _read(path, GENERATION_CONFIG_NAME)
    if settings is None:
        settings = _read(path, "config.json") or {}
        parts = [settings, *(settings.get(name) or {} for name in TEXT_CONFIGS)]
        settings = next((part for part in parts if part.get("eos_token_id") is not None), {})
    given = settings.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    known = {token for token in ids if type(token) is int and 0 <= token < vocab_size}
    if unknown := [token for token in ids if token is not None and token not in known]:
        note(
            "unknown_stop_ids",
            f"model.path={path}: eos_token_id of its generation config has {', '.join(map(repr, unknown))}, which is "
            f"not one of its {vocab_size} tokens and does not end a completion",
            len(unknown),
        )
    return tuple(sorted(known))


def note_stops_in_text(path: str | Path, stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a note if a token that ends a generation is a piece of ordinary text.

    A config that was made for another vocabulary has such ids, and every completion would stop at a common word.

    Args:
        path: Hugging Face folder or hub name.
        stop_ids: Tokens by which the model ends a generation.
        tokenizer: Tokenizer of the model.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if pieces := [token for token in stop_ids if token not in special]:
        names = ", ".join(f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in pieces)
        note(
            "stop_ids_in_text",
            f"model.path={path}: completions end at {names}, which its tokenizer does not list as special; if that is "
            f"not intended, mend eos_token_id in {GENERATION_CONFIG_NAME}",
            len(pieces),
        )


def _read(path: str | Path, name: str) -> dict[str, Any] | None:
    """Return the content of a JSON file of a model, or ``None`` if the model does not have that file."""
    try:
        file = cached_file(str(path), name)
    except OSError:  # A missing model is reported when its weights are loaded.
        return None
    try:
        content = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except ValueError as error:
        # transformers would silently take the ids of config.json instead.
        raise UserError(f"model.path={path}: {name} is damaged ({error}): download or write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"model.path={path}: {name} is not a JSON object: download or write it again")
    return content


def write_generation_config(
    model: Any, folder: Path, *, stop_ids: Sequence[int] | None, pad_token_id: int | None
) -> None:
    """Write ``generation_config.json``: that of the model, with the tokens that ended completions in training.

    Defaults for sampling stay as they are. They are not validated, so even a config that transformers would not save
    survives a run.

    Args:
        model: Hugging Face model.
        folder: Folder of the model.
        stop_ids: Tokens that end a generation; ``None`` for those of the model's own config.
        pad_token_id: Token of padding where the model's own config does not have one.
    """
    config = copy.deepcopy(model.generation_config)
    config._from_model_config = None  # Else it would count as a copy of config.json, which may have another EOS.
    if stop_ids is not None:
        config.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id
    config.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
