"""Checks of paths: model folders, data, the runs to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from spo.config.checks.folders import ADAPTER_CONFIG, folder_problems, looks_like_path
from spo.config.checks.settings import follows_size, shown
from spo.config.nodes import FURTHER_KL, INITIAL, PROMPT_SETS, extra_reference_keys, further_kl_models, select
from spo.records import filenames
from spo.wording import suggestion


def file_problems(cfg: DictConfig) -> Iterator[str]:
    """Yield paths that do not exist or are not what they should be."""
    yield from _model(cfg)
    path = select(cfg, "data.path")
    if path is not None and looks_like_path(str(path)) and (problem := missing_data(str(path))):
        yield problem
    if (template := select(cfg, "data.chat_template")) is not None:
        yield from _template_problems(str(template))
    if (judge := select(cfg, "judge.path")) is not None:
        yield from folder_problems("judge.path", str(judge))
    yield from _extra_references(cfg)
    yield from _further_kl(cfg)
    yield from _regularizer_prompts(cfg)
    yield from _opponents(cfg)


def missing_data(path: str) -> str | None:
    """Return a sentence if there is no file or folder at ``data.path``."""
    if Path(path).expanduser().exists():
        return None
    return f"data.path={path}: there is no such file or folder (seen from {Path.cwd()})"


def _extra_references(cfg: DictConfig) -> Iterator[str]:
    """Yield why further references cannot be loaded."""
    for key in extra_reference_keys(cfg).values():
        path, (group, _, name) = select(cfg, key), key.rpartition(".")
        if isinstance(path, str) and path:
            yield from folder_problems(key, path) if path != INITIAL else ()
        elif not OmegaConf.is_missing(select(cfg, group), name):
            yield f"{key}={shown(path)}: must be a Hugging Face folder or hub name, or {INITIAL}"


def _further_kl(cfg: DictConfig) -> Iterator[str]:
    """Yield why models that the evaluation measures a KL to cannot be loaded."""
    for name, path in further_kl_models(cfg).items():
        key = f"{FURTHER_KL}.{name}"
        if isinstance(path, str) and path:
            yield from folder_problems(key, path)
        else:
            yield f"{key}={shown(path)}: must be a Hugging Face folder or hub name"


def _regularizer_prompts(cfg: DictConfig) -> Iterator[str]:
    """Yield why ``regularizer.prompts`` names neither prompts of the data nor a file."""
    chosen = select(cfg, "regularizer.prompts")
    if chosen is not None and chosen not in PROMPT_SETS and not Path(str(chosen)).expanduser().exists():
        yield (
            f"regularizer.prompts={chosen}: choose {', '.join(PROMPT_SETS)}, or a file with a column prompt (there is "
            f"no such file, seen from {Path.cwd()}){suggestion(str(chosen), PROMPT_SETS)}"
        )


def _template_problems(path: str) -> Iterator[str]:
    """Yield why ``data.chat_template`` cannot be read."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        yield f"data.chat_template={path}: there is no such file (seen from {Path.cwd()})"
    except (OSError, UnicodeDecodeError) as error:
        yield f"data.chat_template={path}: give a text file with a Jinja template ({error})"
    else:
        if not text.strip():
            yield f"data.chat_template={path}: the file is empty; null keeps the tokenizer's own template"
        elif _is_json(text):
            yield f"data.chat_template={path}: the file is JSON; write the text of its template to a file of its own"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _model(cfg: DictConfig) -> Iterator[str]:
    model = select(cfg, "model")
    if not isinstance(model, DictConfig):
        return
    path, initial = select(cfg, "model.path"), select(cfg, "model.initial")
    if path is not None and initial is not None:
        yield f"model.path={path}: this model makes its own weights; for yours write model=hf model.path={path}"
    elif path is not None:
        yield from folder_problems("model.path", str(path))
    elif initial is None and not OmegaConf.is_missing(model, "path"):
        yield "model.path and model.initial are both null: one of them has to say where the model comes from"
    if (start := select(cfg, "model.start")) is not None:
        yield from folder_problems("model.start", str(start))
        if select(cfg, "model.adapter_path") is not None:
            yield f"model.start={start}: model.adapter_path says already where training starts; give one of them"
    if (adapter := select(cfg, "model.adapter_path")) is not None:
        if select(cfg, "model.lora") is None:
            yield f"model.adapter_path={adapter}: an adapter needs model.lora; write model=hf_lora"
        yield from folder_problems("model.adapter_path", str(adapter), ADAPTER_CONFIG)


def uncounted_parameters(cfg: DictConfig) -> Iterator[str]:
    """Yield why there is no learning rate for a model whose parameters cannot be counted."""
    path = select(cfg, "model.path")
    if path is not None and follows_size(cfg, "optimizer.lr"):
        reason = f"it is not in the local cache; download it with `hf download {path}`"
        if Path(str(path)).is_dir():
            reason = "the folder does not hold model.safetensors or its shards; save the model with save_pretrained"
        yield (
            f"model.path={path}: its parameters, on which the learning rate depends, cannot be counted, because "
            f"{reason}, or set optimizer.lr"
        )


def _opponents(cfg: DictConfig) -> Iterator[str]:
    """Yield opponents of the evaluation that cannot be found or distinguished by their names."""
    against = select(cfg, "evaluation.against")
    if not isinstance(against, ListConfig):
        return
    runs = [str(name) for name in against if name not in ("reference", "chosen")]
    for run in runs:
        if not (Path(run).expanduser() / filenames.SAMPLES).is_file():
            yield (
                f"evaluation.against: {run} is neither reference nor chosen nor the directory of a run with samples "
                f"(no {filenames.SAMPLES}, seen from {Path.cwd()})"
            )
    names = [Path(run).resolve().name for run in runs]
    for name in sorted({name for name in names if names.count(name) > 1 or name in ("reference", "chosen")}):
        yield f"evaluation.against: the name {name} would stand for several opponents: rename a directory"
