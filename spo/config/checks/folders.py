"""Checks of the files of a model folder: what can be seen from names, sizes and JSON, before a library reads them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spo.records.parameters import LENGTH_BYTES, read_header

MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin")
FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
"""Types of weights that are numbers by themselves, by the names in the header of a safetensors file."""
COPY = "copy or download it again"


def folder_problems(key: str, path: str, config: str = MODEL_CONFIG) -> Iterator[str]:
    """Yield why a model or adapter cannot be loaded from a path; a hub name is fine.

    Args:
        key: Key that holds the path.
        path: Folder or hub name.
        config: File that every such folder holds.
    """
    folder = Path(path)
    if path.startswith("~"):
        yield f"{key}={path}: write the folder out in full, ~ is not expanded"
    elif folder.is_dir():
        yield from (f"{key}={path}: {problem}" for problem in _content(key, folder, config))
    elif folder.is_file():
        yield f"{key}={path}: this is a file; give the folder that holds it"
    elif looks_like_path(path):
        beside = [one.name for one in folder.parent.iterdir() if one.is_dir()] if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, beside, n=1)
        hint = f"; did you mean {folder.parent / close[0]}?" if close else ""
        yield f"{key}={path}: there is no such folder (seen from {Path.cwd()}){hint}"


def looks_like_path(name: str) -> bool:
    """Return whether a name can only mean a path on this machine, rather than a name on the hub."""
    parts = name.split("/")
    return name.startswith(("/", ".", "~")) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())


def _content(key: str, folder: Path, config: str) -> Iterator[str]:
    """Yield problems of the files in a folder."""
    if config == MODEL_CONFIG and (folder / ADAPTER_CONFIG).is_file():
        base = _json(folder / ADAPTER_CONFIG)
        base_path = (base.get("base_model_name_or_path") if isinstance(base, dict) else None) or "BASE_MODEL"
        instead = "merge it into its base model first"
        if key == "model.path":
            instead = f"write model=hf_lora model.path={base_path} model.adapter_path={folder}"
        yield f"this folder holds an adapter, not a model; {instead}"
        return
    if not (folder / config).is_file():
        inside = sorted(file.parent for file in folder.glob(f"*/{config}"))
        hint = f"did you mean {inside[-1]}?" if inside else f"is it a Hugging Face {_kind(config)} folder?"
        yield f"there is no {config} in this folder; {hint}"
        return
    settings = _json(folder / config)
    if not isinstance(settings, dict):
        yield f"{config} {settings or 'does not hold a JSON object'}; {COPY}"
        return
    if config == MODEL_CONFIG and "model_type" not in settings and "auto_map" not in settings:
        yield f"{config} does not name a model_type; give the {config} that belongs to these weights"
    if key == "model.path" and settings.get("is_encoder_decoder"):
        model_type = settings.get("model_type")
        yield f"{model_type} is an encoder-decoder model; choose a decoder-only language model"
    yield from _weights(folder, _kind(config), is_quantized="quantization_config" in json.dumps(settings))


def _kind(config: str) -> str:
    return "model" if config == MODEL_CONFIG else "adapter"


def _json(file: Path) -> Any:
    """Return what a JSON file holds; words that follow its name if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return f"is not valid JSON (line {error.lineno}: {error.msg})"
    except (OSError, UnicodeDecodeError):
        return "cannot be read as text"


def _weights(folder: Path, kind: str, is_quantized: bool) -> Iterator[str]:
    """Yield problems of the files with weights, as far as their names and headers tell."""
    files = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    indices = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.bin.index.json"))
    if not files and not indices:
        yield f"there are no weights in this folder (*.safetensors); is it a Hugging Face {kind} folder?"
    if indices and not (folder / "model.safetensors").is_file():
        index = _json(indices[0])
        shards = sorted(set(index["weight_map"].values())) if isinstance(index, dict) and "weight_map" in index else []
        if not shards:
            yield f"{indices[0].name} does not list the shards of the weights; {COPY}"
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            yield f"{len(missing)} of {len(shards)} shards of the weights are missing ({names}); {COPY}"
        files = [folder / shard for shard in shards if (folder / shard).is_file()]
    for file in files:
        if file.suffix == ".safetensors" and (problem := _safetensors_problem(file, is_quantized)):
            yield f"{file.name} {problem}"


def _safetensors_problem(file: Path, is_quantized: bool) -> str | None:
    """Return what is wrong with the size or the header of a safetensors file, as words that follow its name."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(LENGTH_BYTES)
        if start == b"version ":
            return f"is a pointer of Git LFS and not the weights: fetch them with `git lfs pull`, or {COPY}"
    length = int.from_bytes(start, "little")
    if size < LENGTH_BYTES + length or size <= LENGTH_BYTES:
        return f"is cut off or is not a safetensors file ({size} bytes); {COPY}"
    try:
        header = read_header(file)
        whole = LENGTH_BYTES + length + max((one["data_offsets"][1] for one in header.values()), default=0)
        types = {name: one["dtype"] for name, one in header.items() if name.endswith(".weight")}
    except (ValueError, TypeError, AttributeError, KeyError, IndexError):
        return f"does not have the header of a safetensors file; {COPY}"
    if size < whole:
        return f"is cut off: it has {size} of {whole} bytes; {COPY}"
    packed = sorted(name for name, dtype in types.items() if dtype not in FLOAT_TYPES)
    if packed and not is_quantized:
        return (
            f"stores {packed[0]} as {types[packed[0]]}, and config.json does not say how it is quantized "
            "(quantization_config): give the checkpoint in bfloat16 or float32 that it was made from"
        )
    return None
