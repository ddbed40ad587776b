"""Models beside policy and reference, loaded as the policy's is: further references, and those of a further KL."""

from __future__ import annotations

from functools import partial

from omegaconf import DictConfig
from torch import nn

from spo.config.nodes import FURTHER_KL, INITIAL, extra_reference_keys, extra_references, further_kl_models
from spo.errors import UserError
from spo.models import FrozenReference, ModelSpec
from spo.models.library_errors import Origin
from spo.models.loading import load_config, load_tokenizer
from spo.models.same_tokens import check_same_tokens
from spo.stages.prepare import Prepared


def load_extra_references(cfg: DictConfig, prepared: Prepared) -> dict[str, FrozenReference]:
    """Load the models of ``extra_references``, frozen and on the host, with the settings of the policy's model.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Prepared run with the settings for loading and the policy's tokenizer.

    Returns:
        References by the names that the loss declares.

    Raises:
        UserError: A model cannot be loaded, reads other tokens than the policy, or has a shorter context.
    """
    found, keys = {}, extra_reference_keys(cfg)
    for name, path in reference_paths(cfg, prepared).items():
        origin = Origin(path, keys[name])
        _check_fits(origin, cfg, prepared)
        reference = found[name] = FrozenReference()
        reference.key = str(origin.key)
        reference.attach(partial(_frozen, prepared.spec, origin))
    return found


def reference_paths(cfg: DictConfig, prepared: Prepared) -> dict[str, str]:
    """Return the folder or hub name of each further reference, by name.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Prepared run with the model before supervised fine-tuning.
    """
    paths = extra_references(cfg)
    return {name: str(prepared.initial) if path == INITIAL else str(path) for name, path in paths.items()}


def load_further_kl(cfg: DictConfig, prepared: Prepared) -> list[nn.Module]:
    """Load the models of ``evaluation.further_kl``, frozen and on the host, with the settings of the policy's model.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Prepared run with the settings for loading and the policy's tokenizer.

    Returns:
        Models in the order of their names in the configuration.

    Raises:
        UserError: A model cannot be loaded, reads other tokens than the policy, or has a shorter context.
    """
    origins = [Origin(path, f"{FURTHER_KL}.{name}") for name, path in further_kl_models(cfg).items()]
    for origin in origins:
        _check_fits(origin, cfg, prepared, "a model to measure the KL to")
    return [_frozen(prepared.spec, origin) for origin in origins]


def _check_fits(origin: Origin, cfg: DictConfig, prepared: Prepared, role: str = "a reference") -> None:
    trusted = prepared.spec.trust_remote_code
    check_same_tokens(origin, load_tokenizer(origin, trusted), prepared.tokenizer, role)
    _check_context(origin, load_config(origin, trusted), cfg.data.max_length)


def _frozen(spec: ModelSpec, origin: Origin) -> nn.Module:
    return spec.load(origin).requires_grad_(False).eval()


def _check_context(origin: Origin, config: object, max_length: int) -> None:
    text = config.get_text_config()  # type: ignore[attr-defined]
    context = getattr(text, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise UserError(
            f"{origin}: data.max_length={max_length} is longer than this model's context of {context} tokens: set "
            f"data.max_length={context} or less, or choose another model"
        )
