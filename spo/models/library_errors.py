"""Errors of transformers, peft and safetensors while they load something, as one sentence for a person."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers.utils import logging as transformers_logging

from spo.errors import UserError, missing_package

MAX_REASON_CHARACTERS = 200


@dataclass(frozen=True)
class Origin:
    """Place that something is loaded from, as messages name it.

    Attributes:
        path: Folder or hub name.
        key: Configuration key that holds the path, ``None`` for a folder that no key names.
    """

    path: str | Path
    key: str | None = None

    @property
    def group(self) -> str:
        """Return the config group with the settings for loading: that of the key if it has a path, else ``model``."""
        return "model" if self.key is None or not self.key.endswith(".path") else self.key.partition(".")[0]

    def __str__(self) -> str:
        return str(self.path) if self.key is None else f"{self.key}={self.path}"


COPY = "copy or download it again"
Kind = tuple[str, str | None, str]
"""Pattern of the type and text of an error; the reason, with its groups (``None``: the first line); what to try."""
HUB_ERRORS: tuple[Kind, ...] = (
    (
        r"\bgated\b|GatedRepoError",
        "access to this repository is restricted",
        "accept its terms on its page of the hub and log in with `hf auth login`",
    ),
    (
        r"RepositoryNotFound|not a valid model identifier|401 Client|404 Client|HFValidationError|Repo id must",
        "this is not a folder, and the hub does not have a model of this name, or it is private",
        "check the spelling, or give the folder of the model",
    ),
    (
        r"couldn't connect|LocalEntryNotFound|OfflineMode|offline mode|ConnectError|Connection|Max retries",
        "there is no such folder or local copy, and the hub cannot be reached",
        "check the spelling, give the folder of the model, or download it first with `hf download NAME`",
    ),
)
FILE_ERRORS: tuple[Kind, ...] = (
    (
        r"does not recognize this architecture",
        None,
        f"install a newer transformers than {transformers.__version__}, or check model_type in config.json",
    ),
    (
        r"model_type|Unrecognized model",
        "it does not have a config.json that names a model_type",
        "give a Hugging Face model folder (an adapter goes to model.adapter_path, with model=hf_lora)",
    ),
    (
        r"custom code|trust_remote_code",
        "it comes with code of its own",
        "set {group}.trust_remote_code=true if you trust that code",
    ),
    (
        r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'> for this kind of AutoModel: (\w+)",
        "{1} does not have the architecture {0}",
        "choose a decoder-only language model for model.path, and a sequence classifier for a reward model",
    ),
    (r"valid JSON|JSONDecodeError|UnicodeDecodeError", "one of its JSON files cannot be read", COPY),
    (r"SafetensorError|invalid header|header too", "its weights are cut off or are not safetensors", COPY),
    (
        r"UnpicklingError|Weights only|weights_only|struct\.error|PytorchStreamReader|upgrade torch",
        "its pytorch_model.bin cannot be read safely, or is cut off",
        "convert the weights to safetensors",
    ),
    (
        r"no file named|does not appear to have a file named",
        "there are no weights in it",
        "put model.safetensors (or its shards) there",
    ),
    (
        r"sentencepiece|tiktoken|backend tokenizer",
        "it does not have a tokenizer that can be read (no tokenizer.json)",
        "copy the files of the tokenizer there; those without tokenizer.json need `pip install sentencepiece tiktoken`",
    ),
    (
        r"[Ff]lash|`kernels`|attn_implementation|attention implementation",
        None,
        "set model.attn_implementation=auto, or eager",
    ),
    (r"[Tt]arget modules? ", None, "choose the model that the adapter was made for"),
    (r"KeyError: '(base_model\.[\w.]+)'", "it does not have the tensor {0}", COPY),
    (r"CONVERSION", "its tensors cannot be converted to the model's (some are missing or have another shape)", COPY),
)


@contextmanager
def in_words(origin: Origin) -> Iterator[None]:
    """Turn an error of a library into a sentence with the key and what to try; silence its report of loading.

    Args:
        origin: Place that is loaded from.

    Raises:
        UserError: The block failed.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Libraries raise nearly every type of error for a folder that they cannot load.
        raise UserError(f"{origin} cannot be loaded: {_explained(error, origin)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _explained(error: Exception, origin: Origin) -> str:
    if isinstance(error, ModuleNotFoundError) and (words := missing_package(str(error.name))):
        return words
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    is_folder = Path(origin.path).is_dir()
    if is_folder and isinstance(error, FileNotFoundError):
        return f"a file of it is missing ({first_line(error)}); {COPY}"
    for pattern, reason, remedy in FILE_ERRORS if is_folder else (*HUB_ERRORS, *FILE_ERRORS):
        if found := re.search(pattern, text, re.DOTALL):
            words = first_line(error) if reason is None else reason.format(*found.groups())
            return f"{words}; {remedy.format(group=origin.group)}"
    if isinstance(error, ImportError):
        return f"{first_line(error)}; install what it needs, or choose another model"
    return f"{first_line(error)}; check the folder's files, or {COPY}"


def first_line(error: Exception) -> str:
    """Return the first sentence of an error's message, shortened; its type if there is no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(error, KeyError):
        line = f"the value {line} is not known"
    sentence = re.split(r"(?<=[a-z)'`])\. ", line)[0].rstrip(".:; ")
    return sentence if len(sentence) <= MAX_REASON_CHARACTERS else f"{sentence[:MAX_REASON_CHARACTERS]} ..."


def some(names: Sequence[str], singular: str, plural: str) -> str:
    """Return ``3 tensors are missing (a, b, ...)``, or an empty string for no names."""
    if not names:
        return ""
    count = f"1 tensor {singular}" if len(names) == 1 else f"{len(names)} tensors {plural}"
    return f"{count} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
