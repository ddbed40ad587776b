"""Number of parameters of a model, from the headers of its safetensors files: no weight is read, no library loaded."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LENGTH_BYTES = 8
"""Bytes at the beginning of a safetensors file that hold the length of its header."""
MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors library reads."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HARMLESS_KEYS = re.compile(
    r"inv_freq$|rotary_emb\.(cos|sin)(_cached)?$|(^|\.)(position_ids|token_type_ids)$|(^|\.)mtp(_\w+)?\."
    r"|\.(attn|attention)\.(bias|masked_bias|causal_mask|scale_attn|embed_positions)$"
)
"""Tensors of a file that a model may ignore: old buffers, and heads that predict further tokens."""
_SCALES = re.compile(
    r"(scales?|scale_inv|zeros?|zero_point|g_idx|absmax|quant_map|weight_format|SCB|weight_shape)$|quant_state\."
)
"""Tensors by which quantized weights become numbers; they are not parameters of the model."""
_TEXT = re.compile(r"(^|\.)(language_model|text_model)\.|(^|\.)lm_head\.")
EMBEDDING_KEYS = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
"""Names of the weight of the embedding, which is that of the head as well where the two are tied."""
_BITS = {"U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64}
"""Size of the integers that quantized weights are packed into."""


def read_header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: dtype, shape and place of each tensor.

    Args:
        file: Path of the file.

    Raises:
        ValueError: The file does not have such a header.
        OSError: The file cannot be read.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("does not have the header of a safetensors file")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("does not have the header of a safetensors file")
    header.pop("__metadata__", None)
    return header


def count_parameters(path: str) -> int | None:
    """Return the number of parameters of a causal language model.

    The files are those that transformers loads, so each shard counts once. Tied weights count once, buffers and scales
    of quantized weights do not count, and of a checkpoint of several modalities the text model counts.

    Args:
        path: Model folder, or a name on the Hugging Face hub. A name stands for the snapshot in the local cache.

    Returns:
        The number, ``None`` if there are no safetensors files on this machine or they cannot be read.
    """
    try:
        folder = find_model_folder(path)
        return None if folder is None else _count(folder) or None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # The checks say what is wrong with the folder.
        return None


def find_model_folder(path: str) -> Path | None:
    """Return the folder of a model on this machine, ``None`` if there is none.

    Args:
        path: Model folder, or a name on the Hugging Face hub, which stands for its snapshot in the local cache.
    """
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return None
    # Imported here because it takes a moment, and folders do not need it.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _count(folder: Path) -> int:
    config = _json(folder / "config.json")
    shapes = _tensors(folder)
    if "text_config" in config and any(map(_TEXT.search, shapes)):
        shapes = {name: one for name, one in shapes.items() if _TEXT.search(name)}
    text = config.get("text_config") or {}
    if config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)):
        head = next((name for name in shapes if name.endswith("lm_head.weight")), None)
        embedding = next(filter(EMBEDDING_KEYS.search, shapes), None)
        if head and embedding and shapes[head] == shapes[embedding]:
            del shapes[head]
    bits = _bits(config.get("quantization_config") or text.get("quantization_config"))
    ignored = [HARMLESS_KEYS] if bits is None else [HARMLESS_KEYS, _SCALES]
    return sum(_numbers(*one, bits) for name, one in shapes.items() if not any(key.search(name) for key in ignored))


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor in the files that transformers loads."""
    names: Mapping[str, Any] = {WEIGHTS: None}
    if not (folder / WEIGHTS).is_file():
        by_shard: dict[str, set[str]] = defaultdict(set)
        for name, shard in _json(folder / INDEX)["weight_map"].items():
            by_shard[shard].add(name)
        names = by_shard
    return {
        name: (one["dtype"], tuple(one["shape"]))
        for shard, wanted in names.items()
        for name, one in read_header(folder / shard).items()
        if wanted is None or name in wanted
    }


def _numbers(dtype: str, shape: tuple[int, ...], bits: int | None) -> int:
    """Return the number of weights in a tensor; integers are packed weights where the model is quantized."""
    if dtype.startswith(("F", "BF")):
        return math.prod(shape)
    return 0 if bits is None or dtype not in _BITS else math.prod(shape) * _BITS[dtype] // bits


def _bits(quantization: Any) -> int | None:
    """Return the bits of a quantized weight, ``None`` for a model that is not quantized."""
    if not quantization:
        return None
    bits = quantization.get("bits") or quantization.get("w_bit")
    if isinstance(bits, int) and bits > 0:
        return bits
    method = str(quantization.get("quant_method", ""))
    eight = quantization.get("load_in_8bit") or "8" in method
    return 8 if eight else 4


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
