"""Loading of tokenizers as their files describe them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from spo.notes import note

_FILE = "tokenizer.json"
_PROBE = "It's 2023; they'RE at 650841823+7.\n\n\tNaïve  日本語 don’t.\r\n   x = f(a[0], 'b')\n"
_MAX_PROBED_TOKENS = 20_000


def load_tokenizer(path: str | Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or hub name.

    Transformers 5 builds a tokenizer from the class that ``tokenizer_config.json`` names. Some classes replace the rules
    of ``tokenizer.json``, and the token ids differ from those of pretraining without an error: ``GPT2Tokenizer``
    does for OLMo and Granite (huggingface/transformers#45920, allenai/open-instruct#1896). In that case, the file is
    loaded as it is, with a note.

    Args:
        path: Hugging Face folder or hub name.
        trust_remote_code: Whether code in the folder may run.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    name = type(tokenizer).__name__
    # The general class loads the file as it is, and a class of the folder's own code may differ from it on purpose.
    if type(tokenizer) is PreTrainedTokenizerFast or not type(tokenizer).__module__.startswith("transformers."):
        return tokenizer
    file = cached_file(
        str(path), _FILE, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if file is None or not tokenizer.is_fast or _agree(tokenizer, Tokenizer.from_file(file)):
        return tokenizer
    note(
        "tokenizer_class",
        f"{path}: {name} of transformers encodes text in another way than {_FILE}; the rules of {_FILE} are used. "
        "tokenizer_class=PreTrainedTokenizerFast in tokenizer_config.json silences this note",
    )
    return PreTrainedTokenizerFast.from_pretrained(path)


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
