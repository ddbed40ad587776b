"""Small objects that several stages make from the configuration of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import PreTrainedTokenizerBase

from spo.config.nodes import detached, source_key, targets
from spo.data import Renderer, Source
from spo.errors import UserError
from spo.forward.head import hidden_width
from spo.forward.sharding import Sharding, round_parameters
from spo.losses import DataNeeds, Loss
from spo.models import ModelSpec
from spo.processes import uses_gpu, world_size
from spo.records.digests import path_digest
from spo.records.plugins import plugin_digests
from spo.seeds import derive_seed


def resolve_values(cfg: DictConfig) -> DictConfig:
    """Return a copy of the configuration without interpolations."""
    values = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(values, DictConfig)
    return values


def eval_device(cfg: DictConfig) -> torch.device:
    """Return the device of models that run outside the Trainer: among several processes, that of this process."""
    if not uses_gpu(cfg.trainer.accelerator):
        return torch.device("cpu")
    # The processes have chosen their devices when they met.
    return torch.device("cuda", torch.cuda.current_device()) if world_size() > 1 else torch.device("cuda")


def model_spec(cfg: DictConfig) -> ModelSpec:
    """Return the ``model`` group as an object, without the defaults that it lends to other groups."""
    names = [field.name for field in dataclasses.fields(ModelSpec)]
    return ModelSpec(**instantiate({name: cfg.model[name] for name in names}, _convert_="all"))


def build_source(cfg: DictConfig) -> Source:
    """Return the source of the rows: that of the data, or that of a round of an iteration."""
    source: Source = instantiate(detached(OmegaConf.select(cfg, source_key(cfg))), _convert_="all")
    return source


def data_needs(cfg: DictConfig) -> DataNeeds:
    """Return what the loss asks of the data. Parameters that a loss draws leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        return DataNeeds.of(instantiate(cfg.method.loss, _convert_="all"))


def build_sharding(cfg: DictConfig) -> Sharding | None:
    """Return the settings of sharded models, ``None`` if the strategy does not shard them."""
    plugin = OmegaConf.select(cfg, "strategy.plugin")
    target = plugin.get("_target_") if isinstance(plugin, DictConfig) else None  # The plugin auto is a word.
    if target is None or not issubclass(get_class(target), ModelParallelStrategy):
        return None
    compute_dtype = torch.bfloat16 if cfg.trainer.precision == "bf16-mixed" else None
    return Sharding(compute_dtype, cfg.strategy.get("unshard_sampling", Sharding.unshard_sampling))


def sharded_dtype(cfg: DictConfig) -> torch.dtype | None:
    """Return the dtype in which a sharded policy computes, if it is not that of its weights."""
    sharding = build_sharding(cfg)
    return None if sharding is None else sharding.compute_dtype


@contextmanager
def training_numerics(cfg: DictConfig, device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Compute outside of the Trainer with the roundings of the policy in it.

    Args:
        cfg: Configuration of the run.
        device: Device of the models.
        models: Models of which each process has all. Their weights are rounded for good as those of a sharded policy,
            so nothing may read them in full precision afterwards.
    """
    dtype = sharded_dtype(cfg)
    if dtype is not None:
        for model in models:
            round_parameters(model, dtype)
    mixed = cfg.trainer.precision == "bf16-mixed" and dtype is None
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        yield


def build_loss(cfg: DictConfig, policy: nn.Module) -> Loss[Any]:
    """Return the loss of the run for a policy, whose new parameters follow from the seed of the run alone.

    Args:
        cfg: Configuration of the run, resolved.
        policy: Model to train, or a trained one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("loss", cfg.seed))
        loss: Loss[Any] = instantiate(cfg.method.loss, _convert_="all")
        if loss.has_width:  # The width takes a forward pass.
            loss.fit_width(hidden_width(policy))
    return loss


def make_renderer(
    cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, source: Source, stop_ids: Sequence[int]
) -> Renderer:
    """Return the conversion between the texts of a source and tokens.

    Args:
        cfg: Configuration of the run, resolved.
        tokenizer: Tokenizer of the model. It gets the template of ``data.chat_template``, and a padding token if it
            does not have one.
        source: Source of the rows.
        stop_ids: Tokens by which the model ends a generation.
    """
    rendering = _rendering(cfg)
    if (template := rendering.pop("chat_template", None)) is not None:
        tokenizer.chat_template = template
    # An enumerable language contains the empty response. In other data an empty response is a mistake.
    allow_empty = source.language is not None
    renderer = Renderer(tokenizer, allow_empty=allow_empty, stop_ids=stop_ids, **rendering)
    if tokenizer.pad_token_id is None:
        # Masks depend on positions, so padding may be the token that ends a text.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(renderer.eos_id)
    return renderer


def rendering_key(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of a cache key that identifies how texts become tokens."""
    return {**_rendering(cfg), "seed": cfg.data.seed}


def _rendering(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings of the renderer, and the text of the template that replaces the tokenizer's."""
    # The configuration of an older run does not have all of these keys.
    names = ("max_length", "truncation", "chat_template", "chat_template_kwargs", "split_special_tokens")
    values = {name: OmegaConf.select(cfg.data, name) for name in names if name in cfg.data}
    if (file := values.get("chat_template")) is not None:
        try:
            values["chat_template"] = Path(file).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            # The configuration check covers a new run, but the file of an earlier run may have been moved since.
            raise UserError(
                f"data.chat_template={file}: cannot read the file ({error}); the run's policy folder has a copy of it"
            ) from error
    if isinstance(kwargs := values.get("chat_template_kwargs"), DictConfig):
        values["chat_template_kwargs"] = OmegaConf.to_container(kwargs)
    return values


def model_plugins(cfg: DictConfig) -> dict[str, str]:
    """Return the part of a cache key that identifies code outside the package by which the model runs."""
    return plugin_digests(targets(cfg.model).values())


def data_key(cfg: DictConfig, arguments: Collection[str] | None = None) -> dict[str, Any]:
    """Return the part of a cache key that identifies the data: settings of the source and content of its files.

    Args:
        cfg: Configuration of the run, resolved.
        arguments: Arguments of the source on which the result depends; ``None`` for all.
    """
    node = OmegaConf.select(cfg, source_key(cfg))
    source = OmegaConf.to_container(node, resolve=True)
    assert isinstance(source, dict)
    key: dict[str, Any] = {
        "source": {
            name: value for name, value in source.items() if arguments is None or name in (*arguments, "_target_")
        },
        "plugins": plugin_digests([*targets(cfg.data).values(), *targets(node).values()]),
    }
    if cfg.data.path is not None:
        key["content"] = path_digest(cfg.data.path)
    return key
