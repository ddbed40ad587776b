"""Tokenizers of every kind that the renderer supports, built without a network.

All share one byte-level vocabulary: ``SPECIALS``, the 256 bytes, and a few merges. Only ``prepend`` works as Llama's
tokenizer does.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
ENDS_IN_EOS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BEGINS_WITH_BOS = (
    "<s>{% for m in messages %}({{ m.role }}) {{ m.content | trim }} {% endfor %}"
    "{% if add_generation_prompt %}(assistant) {% endif %}"
)


def _byte_level() -> Tokenizer:
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "n"), ("?", "Ġ"), ("Ċ", "Ċ"), ("a", "t"), ("c", "at")]
    tokens = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    # Without the regex, merges may cross words, as they do at punctuation in many real tokenizers.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _llama() -> Tokenizer:
    tokens = (
        SPECIALS + [f"<0x{i:02X}>" for i in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyz?.", "th", "the", "▁the"]
    )
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    tokenizer = Tokenizer(
        BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def build(kind: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Build a tokenizer of one of the :data:`KINDS`."""
    base, special, adds_bos = KINDS[kind]
    tokenizer = _llama() if base == "llama" else _byte_level()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


KINDS: dict[str, tuple[str, dict[str, str], bool]] = {
    "adds_bos": ("bytes", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, True),
    "no_bos": ("bytes", {"eos_token": "</s>", "pad_token": "<pad>"}, False),
    "eos_is_pad": ("bytes", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}, True),
    "bos_is_eos_not_added": ("bytes", {"bos_token": "<s>", "eos_token": "<s>"}, False),
    "bos_is_eos_is_pad": ("bytes", {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>"}, True),
    "prepend": ("llama", {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "</s>"}, True),
}
