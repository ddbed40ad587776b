"""Encoding of text as tokens: the one function by which text becomes ids, in training, sampling and judging.

Content is text, never control. A control token is a special token of the tokenizer, a token that ends a generation, or
a token that begins or ends a turn. Where its string occurs in content, that occurrence is *hidden*: a private string of
Unicode noncharacters stands for it while a chat template works on the text. :meth:`TextEncoder.encode` then reads the
control tokens that the template wrote as tokens, and the hidden ones as ordinary text.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


class TextEncoder:
    """An encoder of texts in which hidden control tokens are ordinary text.

    Args:
        tokenizer: Tokenizer of the model.
        control: Control tokens besides those that the tokenizer flags as special, such as the end of a turn.

    Attributes:
        control: Control tokens, the longest first.
        leaks: Number of encoded texts in which hidden text became a control token, because the tokenizer cannot read it
            as text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Iterable[str] = ()) -> None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Some subclasses list special tokens that are not among the added ones.
        names = {token for token in special | {*tokenizer.all_special_tokens, *control} if token.strip()}
        self.tokenizer = tokenizer
        self.control: tuple[str, ...] = tuple(sorted(names, key=lambda token: (-len(token), token)))
        self.leaks = 0
        ids = [tokenizer.convert_tokens_to_ids(token) for token in self.control]
        self._place = {token: i for i, token in enumerate(self.control)}
        # Ordinary text may become the unknown token, so that one is never counted.
        self._ids = frozenset(ids) - {tokenizer.unk_token_id}
        self._counted = _any_of(token for token, i in zip(self.control, ids, strict=True) if i in self._ids)
        self._any = _any_of(self.control)
        # The number is random, so that data cannot contain these strings.
        nonce = f"{secrets.randbelow(10**12):012d}"
        self._hidden, self._private = f"\ufdd0{nonce}{{}}\ufdd1", f"\ufdd2{nonce}{{}}\ufdd3"
        # A template may have written a hidden token within JSON that escapes everything outside of ASCII.
        self._marks = re.compile(rf"(?:\ufdd0|\\ufdd0){nonce}(\d+)(?:\ufdd1|\\ufdd1)")

    def occurring(self, value: Any) -> frozenset[str]:
        """Return the control tokens that occur in a text, or in the texts of a nested value."""
        return frozenset(token for text in _texts(value) for token in self._any.findall(text))

    def hide(self, value: Any, tokens: Collection[str] | None = None) -> Any:
        """Return a text, or a nested value with all its texts, with hidden control tokens.

        Args:
            value: Text, or mappings and lists that contain texts.
            tokens: Control tokens to hide; ``None`` for all.
        """
        pattern = self._any if tokens is None else _any_of(sorted(tokens, key=self._place.__getitem__))
        return _map_texts(value, lambda text: pattern.sub(lambda match: self._mark(match[0]), text))

    def reveal(self, text: str) -> str:
        """Return a text with its hidden control tokens as they were."""
        return self._marks.sub(lambda match: self.control[int(match[1])], text)

    def is_control(self, token_id: int) -> bool:
        """Return whether a token is a control token."""
        return token_id in self._ids

    def hides(self, text: str, token: str) -> bool:
        """Return whether a control token is hidden in a text."""
        return self._mark(token) in text

    def before_token(self, text: str, length: int) -> int:
        """Return the largest length up to ``length`` at which a text can be cut without splitting a control token."""
        for pattern in (self._any, self._marks):
            for match in pattern.finditer(text):
                if match.start() < length < match.end():
                    return match.start()
        return length

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the tokens of each text, without a BOS that the tokenizer would add.

        Control tokens are read as tokens, hidden ones as text. Texts without hidden tokens are encoded by the tokenizer
        in the ordinary way.
        """
        encoded = self._plain(list(texts))
        for i, text in enumerate(texts):
            # A tokenizer that changes letters may find a control token where the text does not have its string.
            if self._marks.search(text) or self._exceeds(encoded[i], text):
                encoded[i] = self._encode_hidden(text)
        return encoded

    def _mark(self, token: str) -> str:
        return self._hidden.format(self._place[token])

    def _plain(self, texts: list[str]) -> list[Ids]:
        # verbose=False silences the tokenizer's warning about long texts, whose lengths the renderer checks itself.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(ids) for ids in encoded["input_ids"]]

    def _exceeds(self, ids: Ids, text: str) -> bool:
        return sum(i in self._ids for i in ids) > len(self._counted.findall(text))

    def _encode_hidden(self, text: str) -> Ids:
        """Return the tokens of a text by a tokenizer in which control tokens have private names."""
        ids: Ids | None = None
        if self._private_encode is not None:
            written = self._any.sub(lambda match: self._private.format(self._place[match[0]]), text)
            ids = tuple(self._private_encode(self.reveal(written)))
        if ids is None:
            ids = self._plain([self.reveal(text)])[0]
        self.leaks += self._exceeds(ids, text)
        return ids

    @cached_property
    def _private_encode(self) -> Callable[[str], list[int]] | None:
        names = {token: self._private.format(i) for token, i in self._place.items()}
        try:
            return _rename_fast(self.tokenizer, names) if self.tokenizer.is_fast else _rename(self.tokenizer, names)
        except Exception:  # Tokenizers with parts of their own cannot be copied; their rows are counted as leaks.
            return None


def _rename_fast(tokenizer: Any, names: dict[str, str]) -> Callable[[str], list[int]]:
    """Return the encoding function of a copy of a fast tokenizer whose control tokens have other names."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(truncation=None, padding=None, post_processor=None)
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    else:  # Unigram: pairs of token and score
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    renamed = Tokenizer.from_str(json.dumps(state))
    return lambda text: renamed.encode(text, add_special_tokens=False).ids


def _rename(tokenizer: Any, names: dict[str, str]) -> Callable[[str], list[int]]:
    """Return the encoding function of a copy of a tokenizer in Python whose control tokens have other names."""
    renamed = copy.deepcopy(tokenizer)
    for token in renamed._added_tokens_decoder.values():
        token.content = names.get(token.content, token.content)
    renamed._added_tokens_encoder = {token.content: i for i, token in renamed._added_tokens_decoder.items()}
    renamed.tokens_trie = type(renamed.tokens_trie)()
    renamed._update_trie()
    return lambda text: renamed(text, add_special_tokens=False, verbose=False)["input_ids"]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, given the longest first, or nothing if there are none."""
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {_map_texts(key, function): _map_texts(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_texts(item, function) for item in value]
    return value
