"""Tokenizers that encode as their files say."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from spo.notes import note

_FILE = "tokenizer.json"
_PROBE = "It's 2023; they'RE at 650841823+7.\n\n\tNa\u00efve  \u65e5\u672c\u8a9e don\u2019t.\r\n   x = f(a[0], 'b')\n"
_MAX_PROBED_TOKENS = 20_000


def as_in_file(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> PreTrainedTokenizerBase:
    """Return a tokenizer that encodes by the rules of ``tokenizer.json``.

    Transformers 5 builds a tokenizer from the class that ``tokenizer_config.json`` names. Some classes replace rules of
    ``tokenizer.json``, so the token ids differ from those of pretraining, without an error: ``GPT2Tokenizer`` does for
    OLMo and Granite (huggingface/transformers#45920, allenai/open-instruct#1896). In that case, the file is loaded as
    it is, with a note.

    Args:
        tokenizer: Tokenizer that ``AutoTokenizer`` loaded.
        path: Hugging Face folder or hub name that it was loaded from.
    """
    kind = type(tokenizer)
    # The general class loads the file as it is, and code of the folder may differ from the file on purpose.
    if kind is PreTrainedTokenizerFast or not kind.__module__.startswith("transformers.") or not tokenizer.is_fast:
        return tokenizer
    file = cached_file(
        str(path), _FILE, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if file is None or _agree(tokenizer, Tokenizer.from_file(file)):
        return tokenizer
    note(
        "tokenizer_class",
        f"{path}: {kind.__name__} of transformers encodes text in another way than {_FILE}, whose rules are used; "
        "tokenizer_class=PreTrainedTokenizerFast in tokenizer_config.json silences this note",
    )
    loaded = PreTrainedTokenizerFast.from_pretrained(path)
    assert isinstance(loaded, PreTrainedTokenizerBase)
    return loaded


def _agree(tokenizer: PreTrainedTokenizerBase, stored: Tokenizer) -> bool:
    """Return whether both encode and decode a text with all pieces of the vocabulary in the same way."""
    stored.no_truncation()
    stored.no_padding()
    special = stored.get_added_tokens_decoder()
    pieces = [token for token in range(stored.get_vocab_size()) if token not in special]
    pieces = pieces[:: max(len(pieces) // _MAX_PROBED_TOKENS, 1)]
    text = _PROBE + "".join(stored.decode([token]) for token in pieces)
    ids = stored.encode(text, add_special_tokens=False).ids
    loaded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return loaded == ids and tokenizer.decode(ids) == stored.decode(ids, skip_special_tokens=False)
