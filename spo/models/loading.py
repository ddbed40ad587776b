"""Loading of models and tokenizers: every weight comes from the file, and every error is a sentence for a person."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from spo.errors import UserError
from spo.forward.sharding import reshard
from spo.models.causality import check_causal
from spo.models.library_errors import Origin, first_line, in_words, some
from spo.models.sharded_loading import Shard, class_name, sharded_loading
from spo.models.tokenizer import as_in_file
from spo.notes import note
from spo.records.parameters import HARMLESS_KEYS

AUTO_ATTENTION = "auto"
"""Value of ``model.attn_implementation`` for SDPA where it is supported, and the model's own default elsewhere."""

DEQUANTIZABLE = ("fp8", "mxfp4", "mxfp8")
"""Quantization methods whose weights transformers turns into ordinary ones without a package of its own."""

TEXT_KEYS = {
    r"^(model\.)?(language_model|text_model)\.(model\.)?(?!lm_head)": "model.",
    r"^(model\.)?(language_model|text_model)\.lm_head": "lm_head",
}
"""Names of the weights of the text model within an image-text checkpoint, and as a model of its own."""


def load_config(origin: Origin, trust_remote_code: bool) -> Any:
    """Load the config of a model.

    Args:
        origin: Place of the model.
        trust_remote_code: Whether code in the model folder may run.

    Raises:
        UserError: There is no model, or its ``config.json`` cannot be read.
    """
    with in_words(origin):
        return AutoConfig.from_pretrained(origin.path, trust_remote_code=trust_remote_code)


def load_tokenizer(origin: Origin, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer whose tokens all fit into the embedding of the model.

    Args:
        origin: Place of the model.
        trust_remote_code: Whether code in the model folder may run.

    Raises:
        UserError: The tokenizer cannot be loaded, or has a token that the model cannot read.
    """
    config = load_config(origin, trust_remote_code)
    with in_words(origin):
        loaded = AutoTokenizer.from_pretrained(origin.path, trust_remote_code=trust_remote_code)
        tokenizer = as_in_file(loaded, origin.path)
    check_vocabulary(origin, tokenizer, getattr(config.get_text_config(), "vocab_size", None))
    return tokenizer


def check_vocabulary(origin: Origin, tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Refuse a tokenizer without a vocabulary, or with a token beyond the embedding that a text may contain.

    Tokens for images and the like may lie beyond the embedding of a text model, because no text contains them.

    Args:
        origin: Place of the model.
        tokenizer: Tokenizer of the model.
        rows: Number of tokens that the model can read, ``None`` if it does not say.

    Raises:
        UserError: The tokenizer does not fit the model.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    if len(vocabulary) <= len(added):
        raise UserError(
            f"{origin} cannot be loaded: its tokenizer does not have a vocabulary; copy the files of the tokenizer "
            "(tokenizer.json, tokenizer_config.json) into the folder"
        )
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    template = str(tokenizer.chat_template or "")
    beyond = [
        token
        for token, i in vocabulary.items()
        if rows is not None
        and i >= rows
        and (i not in added or not added[i].special or token in named or token in template)
    ]
    if beyond:
        raise UserError(
            f"{origin} cannot be used: its tokenizer has {max(vocabulary.values()) + 1} tokens, such as "
            f"{sorted(beyond)[0]!r}, and its embedding has {rows} rows (vocab_size in config.json); take the tokenizer "
            f"that belongs to these weights, or resize the embedding with resize_token_embeddings and save the model"
        )


def load_causal_model(
    origin: Origin,
    *,
    dtype: Any,
    attn_implementation: str,
    trust_remote_code: bool,
    dropout: float,
    shard: Shard | None = None,
) -> PreTrainedModel:
    """Load a causal language model, in eval mode, with all of its weights.

    Of an image-text checkpoint, the text model is loaded. Quantized weights are dequantized, where that is possible
    without further packages.

    Args:
        origin: Place of the model.
        dtype: torch dtype of the weights.
        attn_implementation: Name of an attention implementation of transformers, or :data:`AUTO_ATTENTION`.
        trust_remote_code: Whether code in the model folder may run.
        dropout: Dropout probability wherever the architecture has dropout.
        shard: Function that shards the model before its weights are read; ``None`` for a whole model. A model that is
            converted while it is loaded, such as a quantized one, is whole nevertheless.

    Raises:
        UserError: The model cannot be loaded as it is, or is not a causal language model.
    """
    whole = load_config(origin, trust_remote_code)
    part = causal_part(origin, whole)
    config = part["config"]
    try:
        set_dropout(config, dropout)
    except StrictDataclassError as error:
        raise UserError(
            f"model.dropout={dropout}: the config of a {config.model_type} model does not take this number "
            f"({first_line(error)}); set model.dropout=0"
        ) from error
    turn_router_loss_off(origin, config)
    requested = None if attn_implementation == AUTO_ATTENTION else attn_implementation
    quantization = _dequantization(origin, whole)
    with sharded_loading(None if "key_mapping" in part else shard):
        model: Any = load_weights(
            AutoModelForCausalLM,
            origin,
            dtype=dtype,
            attn_implementation=requested,
            trust_remote_code=trust_remote_code,
            quantization_config=quantization,
            **part,
        ).eval()
    if (mesh := getattr(next(model.parameters(), None), "device_mesh", None)) is not None:
        model.to(mesh.device_type)
    if quantization is not None or "key_mapping" in part:
        # Saving would quantize the weights again, or name them as in the checkpoint of several modalities.
        model._weight_conversions = None
    own = getattr(model.config, "_attn_implementation", None)
    if requested is None and own != "sdpa" and getattr(config, "num_attention_heads", None):
        note(
            "attention_fallback",
            f"{class_name(model)} does not support SDPA attention, so it runs with its own default, {own} "
            "(model.attn_implementation=auto)",
        )
    check_causal(origin, model)
    reshard(model)
    _note_other_architecture(origin, model)
    _declare_untied_head(origin, model)
    return model


def _note_other_architecture(origin: Origin, model: Any) -> None:
    """Write a note if ``config.json`` names an architecture other than the one that its ``model_type`` loads."""
    own = class_name(model)
    named = [name for name in getattr(model.config, "architectures", None) or () if name.endswith("ForCausalLM")]
    if named and own not in named and all(hasattr(transformers, name) for name in named):
        note(
            "other_architecture",
            f"{origin}: config.json names architectures={named}, and its model_type={model.config.model_type} loads "
            f"{own}, which may compute something else with these weights",
        )


def _declare_untied_head(origin: Origin, model: Any) -> None:
    """State in the config that the head is not the embedding, where a file has both although the config ties them."""
    head, embedding = (
        getattr(module, "weight", None) for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    if head is None or embedding is None or head is embedding or head.shape != embedding.shape:
        return
    if getattr(model.config, "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False
        note(
            "untied_head",
            f"{origin}: config.json ties the head to the embedding (tie_word_embeddings), but the weights have two "
            "different ones, and both are used",
        )


def causal_part(origin: Origin, config: Any) -> dict[str, Any]:
    """Return arguments of :func:`load_weights` for a causal language model: for an image-text model, its text model.

    Args:
        origin: Place of the model.
        config: Config of the whole checkpoint.

    Raises:
        UserError: The checkpoint does not hold a causal language model.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{origin} cannot be used: {config.model_type} is an encoder-decoder model; choose a decoder-only "
            "language model"
        )
    text = config.get_text_config()
    if text is config:
        return {"config": config}
    name = type(config).__name__.removesuffix("Config")
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # A class for the whole is no help: policy/ holds the text model.
        raise UserError(
            f"{origin} cannot be used: transformers cannot load the text model of a {name} checkpoint by itself; "
            "choose a text model of the same family"
        )
    note("text_model", f"{origin} is a checkpoint of several modalities ({name}): its text model alone is used")
    # Whether the head shares the embedding is a setting of the whole checkpoint.
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return {"config": text, "part_of_checkpoint": True, "key_mapping": TEXT_KEYS}


def load_weights(auto_class: Any, origin: Origin, *, part_of_checkpoint: bool = False, **settings: Any) -> Any:
    """Load a model and refuse one that does not take each of its weights from the file.

    Args:
        auto_class: Class of transformers that loads the model.
        origin: Place of the model.
        part_of_checkpoint: Whether the file may hold other parts of a larger model, such as a vision tower.
        settings: Further arguments of ``from_pretrained``; those that are ``None`` are left out.

    Raises:
        UserError: The model cannot be loaded, or its weights do not fit its config.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    with in_words(origin):
        model, report = auto_class.from_pretrained(
            origin.path, **given, output_loading_info=True, ignore_mismatched_sizes=True
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{origin} cannot be loaded: this is an adapter; write {origin.group}.path=BASE_MODEL, and "
            f"model=hf_lora model.adapter_path={origin.path}"
        )
    _check_report(origin, model, report, part_of_checkpoint)
    return model


def _check_report(origin: Origin, model: PreTrainedModel, report: Mapping[str, Any], part_of_checkpoint: bool) -> None:
    config: Any = model.config
    own = {_beginning(key) for key in model.state_dict()}
    has_head = model.get_output_embeddings() is not None  # Reward models may bring an unused head along.
    missing = sorted(report["missing_keys"])
    unexpected = sorted(
        key
        for key in report["unexpected_keys"]
        if not HARMLESS_KEYS.search(key)
        and (has_head or not key.startswith("lm_head."))
        and not _is_prediction_layer(key, config)
        and not (part_of_checkpoint and _beginning(key) not in own)
    )
    mismatched = [f"{key} {list(found)} instead of {list(wanted)}" for key, found, wanted in report["mismatched_keys"]]
    floats = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    packed = [name for name, p in model.named_parameters() if p.dtype not in floats]
    found = [
        some(missing, "is missing", "are missing"),
        some(unexpected, "is not part of the model", "are not part of the model"),
        some(sorted(mismatched), "has another shape", "have another shape"),
        # A judge may stay quantized, since it is not trained.
        "" if getattr(model, "is_quantized", False) else some(packed, "lacks its scale", "lack their scales"),
    ]
    if problems := ", and ".join(filter(None, found)):
        raise UserError(
            f"{origin} cannot be loaded: its weights are not those of the {class_name(model)} that config.json "
            f"describes: {problems}; {_remedy(missing, unexpected)}"
        )


def _remedy(missing: list[str], unexpected: list[str]) -> str:
    if any(key.startswith(("score.", "classifier.")) for key in unexpected):
        return "this is a classifier or reward model, so choose the language model it was made from"
    if any(key.startswith(("score.", "classifier.")) for key in missing):
        return "this is not a trained classifier or reward model"
    return "copy config.json and the weights again, from one checkpoint"


def _beginning(key: str) -> str:
    return ".".join(key.split(".")[:2])


def _is_prediction_layer(key: str, config: Any) -> bool:
    """Return whether a tensor belongs to the layers after the last one, which predict further tokens."""
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    layers = getattr(config, "num_hidden_layers", None)
    extra = getattr(config, "num_nextn_predict_layers", None) or 0
    return layer is not None and layers is not None and 0 <= int(layer[1]) - layers < extra


def _dequantization(origin: Origin, config: Any) -> Any:
    """Return the setting that dequantizes a checkpoint while it is loaded, ``None`` for one that is not quantized.

    Raises:
        UserError: The checkpoint is quantized by a method that cannot be undone here.
    """
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if settings is None:
        return None
    method = str((settings if isinstance(settings, dict) else settings.to_dict()).get("quant_method"))
    if method not in DEQUANTIZABLE:
        raise UserError(
            f"{origin} cannot be trained: its weights are quantized ({method}, quantization_config in config.json); "
            "give the checkpoint in bfloat16 or float32 that they were made from"
        )
    note("dequantized", f"{origin} is quantized ({method}): its weights are dequantized while they are loaded")
    return AUTO_QUANTIZATION_CONFIG_MAPPING[method](dequantize=True)


def set_dropout(config: Any, value: float) -> None:
    """Set every dropout probability of a model config, whatever name the architecture gives it."""
    for name, current in list(vars(config).items()):
        is_dropout = "drop" in name and not name.startswith("classifier")
        if is_dropout and isinstance(current, int | float) and not isinstance(current, bool):
            if current != value:  # Some configs declare whole numbers and would refuse 0.0 in place of 0.
                setattr(config, name, value)
        elif isinstance(current, PreTrainedConfig):
            set_dropout(current, value)


def turn_router_loss_off(origin: Origin, config: Any) -> None:
    """Turn off what a mixture of experts adds to a training step: the loss of its router, and noise of its input."""
    for name in ("router_jitter_noise", "input_jitter_noise"):
        if getattr(config, name, 0.0):
            setattr(config, name, 0.0)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    if coefficient := getattr(config, "router_aux_loss_coef", None):
        note(
            "router_loss_off",
            f"{origin} is a mixture of experts: the loss of its router (router_aux_loss_coef={coefficient}) is off",
        )
