"""The identity of a run: what makes two runs the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo.config.coefficients import unused_coefficients
from spo.config.nodes import (
    DEFAULT_REFERENCES,
    EXTRA_REFERENCES,
    FURTHER_KL,
    INITIAL,
    PROMPT_SETS,
    ROUND_SOURCE,
    extra_references,
    further_kl_models,
    targets,
)
from spo.records.digests import code_version, digest, model_digest, path_digest
from spo.records.files import flatten
from spo.records.operational_keys import is_operational
from spo.records.plugins import PluginSource, plugin_sources
from spo.runs.saved_config import resolved
from spo.secrets import scrubbed

_ABSENT = object()
_POLICIES = (f"{ROUND_SOURCE}.first", f"{ROUND_SOURCE}.policies")
_FILES = {
    "data": "bytes of the data",
    "weights": "weights of the model",
    "start": "weights that training starts from",
    "further_kl": "weights of the models of evaluation.further_kl",
    "adapter": "weights of the adapter",
    "extra_references": "weights of the further references",
    "judge": "weights of the judge",
    "regularizer_prompts": "prompts of the regularizer",
    "responses": "weights of the model that writes the responses",
    "policies": "weights of the policies of earlier rounds",
}


def identity(cfg: DictConfig, unused: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what makes two runs the same: configuration, bytes of data and weights, and code, plugins included.

    Args:
        cfg: Configuration of the run.
        unused: Coefficients to leave out; ``None`` for those that the method and the regularizer do not read.

    Returns:
        A mapping with ``config`` (flat keys, without operational keys and without a coefficient that the method does
        not use), the digests ``data``, ``weights``, ``adapter``, ``judge`` and ``regularizer_prompts`` (``None`` where
        the configuration does not name such a file), those of ``extra_references`` by name if there are some, that
        of the model that writes the ``responses`` of the data, that of the ``start`` of training, those of the
        ``policies`` of earlier rounds and those of ``further_kl`` if there are such, ``code``, ``plugins`` (a digest by
        module), and the ``digest`` of all these.
    """
    unused = unused_coefficients(cfg) if unused is None else unused
    flat = {
        key: value
        for key, value in flatten(resolved(cfg)).items()
        if not is_operational(key) and key.partition(".")[0] not in unused
    }
    references = extra_references(cfg)
    # The settings of the model are part of the configuration, and determine its weights before fine-tuning.
    paths = {INITIAL: OmegaConf.select(cfg, "model.path")}
    further = {name: _model_digest(paths.get(path, path)) for name, path in references.items()}
    writer = _model_digest(response_model(cfg))
    start = _model_digest(OmegaConf.select(cfg, "model.start"))
    policies = [_model_digest(str(path)) for path in earlier_policies(cfg)]
    # The folder of such a model does not matter; a name on the hub is what there is to know of its weights.
    measured = {name: _model_digest(path) or path for name, path in further_kl_models(cfg).items()}
    # A default has the identity of the same model given by hand. Runs of earlier versions do not have the keys.
    flat = {key: value for key, value in flat.items() if not _names_models(key)}
    flat |= {f"{EXTRA_REFERENCES}.{name}": path for name, path in references.items()}
    # Runs in different places are the same, so values that lie in a folder of `paths` start with its name instead.
    # Longest first: a folder may lie in another one.
    folders = sorted(((str(path), f"<{name}>") for name, path in cfg.paths.items()), key=lambda pair: -len(pair[0]))
    return with_digest(
        {
            "config": {key: _without_folder(value, folders) for key, value in flat.items()},
            "data": _data_digest(OmegaConf.select(cfg, "data.path")),
            "weights": _model_digest(OmegaConf.select(cfg, "model.path")),
            "adapter": _model_digest(OmegaConf.select(cfg, "model.adapter_path")),
            **({"extra_references": further} if further else {}),
            "judge": _model_digest(OmegaConf.select(cfg, "judge.path")),
            "regularizer_prompts": _data_digest(prompt_file(cfg)),
            **({"responses": writer} if writer else {}),
            **({"start": start} if start else {}),
            **({"policies": policies} if policies else {}),
            **({"further_kl": measured} if measured else {}),
            "code": code_version(),
            "plugins": {name: source.sha256 for name, source in plugins(cfg, unused).items()},
        }
    )


def _names_models(key: str) -> bool:
    named = (EXTRA_REFERENCES, DEFAULT_REFERENCES, FURTHER_KL, *_POLICIES)
    return any(key == one or key.startswith(f"{one}.") for one in named)


def plugins(cfg: DictConfig, unused: Sequence[str] = ()) -> dict[str, PluginSource]:
    """Return the sources of the plugins that a run's configuration names, by top-level module.

    Args:
        cfg: Configuration of the run.
        unused: Coefficients to leave out.
    """
    counting = ((key, target) for key, target in targets(cfg).items() if not is_operational(key))
    return plugin_sources(target for key, target in counting if key.partition(".")[0] not in unused)


def with_digest(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of an identity as JSON values without secrets, with their digest."""
    text = json.dumps(scrubbed(parts), sort_keys=True, default=str)
    # JSON does not have infinities, which a parameter of a plugin may be.
    return {**json.loads(text, parse_constant=str), "digest": digest(scrubbed(parts))}


def known_digests(parts: Mapping[str, Any] | None) -> list[str]:
    """Return the digest of a stored identity, and those from before a resumed run changed a key."""
    if not isinstance(parts, Mapping):
        return []
    return [one for one in (parts.get("digest"), *parts.get("earlier_digests", [])) if isinstance(one, str)]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line for each difference between two identities.

    Earlier versions counted keys as part of a run that are operational now, which do not differ.
    """
    before, after = (
        {key: value for key, value in one.get("config", {}).items() if not is_operational(key)} for one in (old, new)
    )
    lines = [
        f"{key}: {_show(before, key)} there, {_show(after, key)} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]
    lines += [f"the {words} have changed" for name, words in _FILES.items() if old.get(name) != new.get(name)]
    lines += [f"the code of {name}, which the configuration names, has changed" for name in changed_plugins(old, new)]
    if old.get("code") != new.get("code"):
        lines.append(f"the code of spo: {old.get('code')} there, {new.get('code')} now")
    return lines


def changed_plugins(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the plugins whose code differs between two identities; none where one of them does not record plugins."""
    before, after = old.get("plugins"), new.get("plugins")
    if before is None or after is None:
        return []
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _show(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key]) if key in config else "absent"


def _without_folder(value: Any, folders: Sequence[tuple[str, str]]) -> Any:
    if isinstance(value, list):  # Rounds alone have lists of folders, those of the opponents.
        rounds = [pair for pair in folders if pair[1] == "<iteration>"]
        return [_without_folder(one, rounds) for one in value]
    if isinstance(value, str):
        for folder, name in folders:
            if value.startswith(f"{folder}/"):
                return name + value[len(folder) :]
    return value


def _data_digest(path: str | None) -> str | None:
    return None if path is None or not Path(path).expanduser().exists() else path_digest(path)


def response_model(cfg: DictConfig) -> str | None:
    """Return the folder of the model that writes the responses of the data, ``None`` if that is not a further model."""
    chosen = OmegaConf.select(cfg, "data.source.responses")
    return chosen if isinstance(chosen, str) and Path(chosen).is_dir() else None


def earlier_policies(cfg: DictConfig) -> list[str]:
    """Return the folders of the policies that a round of an iteration reads; none outside an iteration."""
    first, policies = (OmegaConf.select(cfg, key) for key in _POLICIES)
    return [*([] if first is None else [first]), *(policies or [])]


def prompt_file(cfg: DictConfig) -> str | None:
    """Return the file of prompts that the regularizer samples for, ``None`` for those of the data."""
    chosen = OmegaConf.select(cfg, "regularizer.prompts")
    return None if chosen in (None, *PROMPT_SETS) else str(chosen)


def _model_digest(path: str | None) -> str | None:
    # The name of a model on the hub is part of the configuration already.
    return None if path is None or not Path(path).is_dir() else model_digest(path)
