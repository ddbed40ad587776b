"""Extrapolation from one model through another of the same architecture (ExPO, arXiv:2404.16792), on safetensors."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spo.errors import UserError
from spo.models.library_errors import some
from spo.processes import rank
from spo.records.cache import MANIFEST
from spo.records.digests import MODEL_SUFFIXES
from spo.records.files import read_mapping, replacing
from spo.records.parameters import EMBEDDING_KEYS, HARMLESS_KEYS, INDEX, WEIGHTS, read_header

HEAD_KEYS = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
"""Names of the weight of the head, which the file of a model with a tied head may lack."""
BUFFER_KEYS = re.compile(rf"{HARMLESS_KEYS.pattern}|(^|\.)(e_score_correction_bias|running_mean|running_var)$")
"""Names of tensors of floating-point numbers that are not parameters: they are copied from the second model."""
_SHAPE_KEYS = ("num_attention_heads", "n_head", "num_key_value_heads", "head_dim")
"""Keys of ``config.json`` that decide how a model reads weights of equal shapes."""
_WEIGHT_SUFFIXES = {".safetensors", ".bin"}


def extrapolate_weights(first: Path, second: Path, factor: float, out: Path) -> None:
    """Write the model folder ``second + factor * (second - first)``.

    The sum of each tensor is computed in float32, in float64 where one of the two is stored in float64, and rounded
    once to the dtype that it has in ``second``. Values that are equal in both models stay as they are, for every
    factor. Factor 0 gives the bytes of ``second``, and factor -1 the values of ``first`` in these dtypes. Buffers and
    integers, the configuration, the tokenizer, and the settings of generation are those of ``second``.

    The files are those of ``second``, written one after the other, so that a single one is in memory at a time.

    Args:
        first: Model folder at factor -1, such as the supervised model.
        second: Model folder at factor 0, such as the aligned model.
        factor: Distance beyond ``second``, in distances between the two; a negative one interpolates.
        out: Model folder to write, under a temporary name until it is complete. An older one is replaced.

    Raises:
        UserError: The models do not belong together, or a weight becomes infinite.
    """
    if not math.isfinite(factor):
        raise UserError(f"factor {factor}: the factor of an extrapolation must be a finite number")
    if out.resolve() in (first.resolve(), second.resolve()):
        raise UserError(f"{out}: this is one of the two models that are extrapolated; choose another folder")
    start, end = Stored.read(first), Stored.read(second)
    partners = check_extrapolation(start, end)
    with replacing(out) as folder:
        for file in sorted(second.iterdir()):
            if _is_setting(file) and not (file.name == INDEX and end.index is None):
                shutil.copyfile(file, folder / file.name)
        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        with Progress(*columns, transient=True, disable=rank() > 0) as progress:
            advance = partial(progress.advance, progress.add_task("extrapolating", total=len(end.tensors)))
            for name in end.files():
                if factor == 0:
                    shutil.copyfile(second / name, folder / name)
                else:
                    _write_file(start, end, partners, factor, second / name, folder / name, advance)


@dataclass(frozen=True)
class StoredTensor:
    """Place and form of a tensor of a model folder.

    Attributes:
        file: Safetensors file that holds it.
        dtype: Dtype as safetensors names it, such as ``BF16``.
        shape: Sizes of its dimensions.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating_point(self) -> bool:
        """Return whether its values are floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class Stored:
    """A model folder, of which headers alone are in memory.

    Attributes:
        folder: Model folder.
        config: Content of ``config.json``.
        index: Content of the index of the files; ``None`` where one file holds all weights.
        tensors: Tensors by name.
    """

    folder: Path
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def read(cls, folder: Path) -> Stored:
        """Read the headers of a model folder.

        Args:
            folder: Model folder with safetensors files.

        Raises:
            UserError: There is no such model, or a file is missing or damaged.
        """
        config = read_mapping(folder / "config.json")
        if config is None:
            raise UserError(f"{folder} is not a model folder: it does not have a config.json that can be read")
        if _setting(config, "quantization_config"):
            raise UserError(
                f"{folder} cannot be extrapolated: its weights are quantized (quantization_config in config.json); "
                "give the checkpoint in bfloat16 or float32 that they were made from"
            )
        index = None
        if (folder / WEIGHTS).is_file():
            names: Sequence[str] = [WEIGHTS]
        else:
            index = read_mapping(folder / INDEX)
            if index is None or not isinstance(index.get("weight_map"), dict):
                raise UserError(
                    f"{folder} does not have weights as safetensors ({WEIGHTS}, or its parts with {INDEX}): copy them "
                    "there, or convert other formats with save_pretrained"
                )
            names = sorted(set(index["weight_map"].values()))
        tensors = {}
        for name in names:
            try:
                header = read_header(folder / name)
            except (OSError, ValueError) as error:
                raise UserError(f"{folder / name} cannot be read ({error}): copy or download it again") from error
            for key, one in header.items():
                if index is None or index["weight_map"].get(key) == name:
                    tensors[key] = StoredTensor(folder / name, one["dtype"], tuple(one["shape"]))
        return cls(folder, config, index, tensors)

    def files(self) -> list[str]:
        """Return the names of the safetensors files in order."""
        return sorted({one.file.name for one in self.tensors.values()})

    def tied_head(self) -> str | None:
        """Return the name of the embedding if it may be the head too, ``None`` if ``config.json`` denies that."""
        # Without the key the default of the architecture decides, and a file without a head shows what it is.
        if _setting(self.config, "tie_word_embeddings") is False:
            return None
        return next(filter(EMBEDDING_KEYS.search, self.tensors), None)

    def own_head(self) -> str | None:
        """Return the name of a head with other values than the embedding, ``None`` if the embedding is the head.

        A head whose values differ counts even if ``config.json`` ties it, as in transformers.
        """
        head, embedding = next(filter(HEAD_KEYS.search, self.tensors), None), self.tied_head()
        if head is None or embedding is None:
            return head
        one, other = (Reader().read(self.tensors[name].file, name) for name in (head, embedding))
        return None if one.dtype == other.dtype and one.equal(other) else head


def check_extrapolation(first: Stored, second: Stored) -> dict[str, str]:
    """Check that two models belong together, and return the tensor of the first for each of the second to extrapolate.

    One of the files may name the tensors without the prefix of the base model, such as ``transformer.``. One may hold
    a tied head explicitly, where the other has the embedding alone. The embedding of a tied first model stands in for
    its head where the second one is untied. A tied second model cannot take up an untied first one, because the result
    has the tensors and the configuration of the second.

    Args:
        first: Model at factor -1.
        second: Model at factor 0.

    Returns:
        The name in ``first`` by the name in ``second``. Buffers and integers are left out.

    Raises:
        UserError: Architectures, vocabularies, or names, shapes or kinds of tensors differ.
    """
    where = f"{second.folder} and {first.folder} cannot be extrapolated"
    for key in ("model_type", "vocab_size", *_SHAPE_KEYS):
        one, other = _setting(second.config, key), _setting(first.config, key)
        if one is not None and other is not None and one != other:
            raise UserError(f"{where}: {key} is {one} and {other} in their config.json; choose models of one origin")
    _check_vocabulary(first.folder, second.folder, where)
    if second.tied_head() is not None and second.own_head() is None and (head := first.own_head()) is not None:
        raise UserError(
            f"{where}: the former ties its head to the embedding, and the latter has a head of its own ({head}), which "
            "has no place in a result with the form of the former; save the former with tie_word_embeddings=false and "
            "a copy of the embedding as its head"
        )
    without_prefix = {name.partition(".")[2]: name for name in first.tensors}
    partners, extra = {}, []
    for name, one in second.tensors.items():
        if not one.is_floating_point or BUFFER_KEYS.search(name):
            continue
        short = name.partition(".")[2]
        found = name if name in first.tensors else short if short in first.tensors else without_prefix.get(name)
        if found is None and HEAD_KEYS.search(name):
            found = first.tied_head()
        if found is None:
            extra.append(name)
        else:
            partners[name] = found
    missing = [name for name in first.tensors.keys() - partners.values() if _is_lost(first, second, name)]
    mismatched = [
        f"{name} {list(second.tensors[name].shape)} and {list(first.tensors[other].shape)}"
        for name, other in partners.items()
        if second.tensors[name].shape != first.tensors[other].shape or not first.tensors[other].is_floating_point
    ]
    found_problems = [
        some(sorted(extra), "is in the former alone", "are in the former alone"),
        some(sorted(missing), "is in the latter alone", "are in the latter alone"),
        some(mismatched, "has another shape or type", "have another shape or type"),
    ]
    if problems := ", and ".join(filter(None, found_problems)):
        raise UserError(f"{where}: {problems}; give two checkpoints of one model, with adapters merged")
    return partners


def _is_lost(first: Stored, second: Stored, name: str) -> bool:
    """Return whether the second model lacks a tensor of the first that counts."""
    one = first.tensors[name]
    if not one.is_floating_point or BUFFER_KEYS.search(name):
        return False
    # A file may repeat the embedding as the head.
    return not (HEAD_KEYS.search(name) and second.tied_head() is not None)


def _check_vocabulary(first: Path, second: Path, where: str) -> None:
    """Refuse tokenizers that give the same text other token ids, as far as their files say."""
    ours, theirs = (_vocabulary(folder) for folder in (second, first))
    if not ours or not theirs:
        return
    if differing := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        raise UserError(
            f"{where}: their vocabularies differ in {len(differing):,} tokens, such as {differing[0]!r}; choose models "
            "with the same tokenizer"
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    """Return the id of each token of ``tokenizer.json`` without added tokens; empty if the file does not have them."""
    model = (read_mapping(folder / "tokenizer.json") or {}).get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list):  # Pairs of a token and its score.
        return {entry[0]: place for place, entry in enumerate(found)}
    return found if isinstance(found, dict) else {}


def _write_file(
    first: Stored,
    second: Stored,
    partners: Mapping[str, str],
    factor: float,
    source: Path,
    target: Path,
    advance: Any,
) -> None:
    """Write one file of the extrapolated model.

    Args:
        first: Model at factor -1.
        second: Model at factor 0.
        partners: Name in ``first`` of each tensor to extrapolate.
        factor: Factor of the extrapolation.
        source: File of ``second``.
        target: File to write.
        advance: Function to call after each tensor.
    """
    reader, found = Reader(), {}
    with safe_open(source, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            if name not in second.tensors:
                continue
            value = opened.get_tensor(name)
            if name in partners:
                value = extrapolated(reader.read(first.tensors[partners[name]].file, partners[name]), value, factor)
                if not value.isfinite().all() and opened.get_tensor(name).isfinite().all():
                    raise UserError(
                        f"factor {factor:g}: the weight {name} does not stay finite in {value.dtype}; choose a factor "
                        "nearer to 0"
                    )
            found[name] = value
            advance()
        save_file(found, target, opened.metadata() or {"format": "pt"})


def extrapolated(first: Tensor, second: Tensor, factor: float) -> Tensor:
    """Return ``second + factor * (second - first)`` in the dtype of ``second``.

    Args:
        first: Values at factor -1, of any shape.
        second: Values at factor 0, of the same shape.
        factor: Factor of the extrapolation.
    """
    exact = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    start, end = first.to(exact), second.to(exact)
    if factor == -1:  # The difference of the sum below would be rounded.
        return start.to(second.dtype, copy=True)  # A tied embedding is read twice, and a file may not share memory.
    return torch.where(start == end, end, end + factor * (end - start)).to(second.dtype)


class Reader:
    """A reader of tensors of several safetensors files, which keeps the last file open."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._opened: Any = None

    def read(self, file: Path, name: str) -> Tensor:
        """Return a tensor.

        Args:
            file: Safetensors file.
            name: Name of the tensor.
        """
        if file != self._file:
            self._file, self._opened = file, safe_open(file, framework="pt")
        tensor: Tensor = self._opened.get_tensor(name)
        return tensor


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """Return a key of ``config.json``, or else of the text model in it."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, dict) else None)


def _is_setting(file: Path) -> bool:
    """Return whether a file of a model folder belongs to the model and is not one of its weights."""
    return (
        file.is_file()
        and file.suffix in MODEL_SUFFIXES - _WEIGHT_SUFFIXES
        and not file.name.startswith(".")
        and file.name not in (MANIFEST, "pytorch_model.bin.index.json")
    )
