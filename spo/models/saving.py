"""Saving of policies as Hugging Face folders, with adapters merged into the weights."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from spo.errors import UserError
from spo.forward.modes import default_generation_config
from spo.forward.sharding import HALF_PRECISION, reshard
from spo.models.generation import write_generation_config
from spo.processes import rank
from spo.records import filenames
from spo.records.files import temporary_path

MAX_GATHERED_BYTES = 2**30
"""Bytes of gathered weights in memory above which they are written to a file."""


def save_policy(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Any] | None = None,
    stop_ids: Sequence[int] | None = None,
) -> None:
    """Save a Hugging Face folder (safetensors, tokenizer) that ``AutoModelForCausalLM`` loads.

    An adapter is saved in ``adapter/`` next to the folder, and merged into the weights inside it. A policy with an
    adapter cannot be trained further afterwards. Weights that are no longer equal, such as a head with an adapter
    that was tied to the embeddings, are saved as two tensors.

    Args:
        policy: Policy to save.
        tokenizer: Tokenizer of the policy.
        folder: Folder to write.
        weights: State that :func:`whole_state_dict` gathered, or ``None`` for that of ``policy``.
        stop_ids: Tokens that end a generation; ``None`` for those of the model's generation config.

    Raises:
        UserError: The adapter cannot be merged. It is saved in ``adapter/`` nevertheless.
    """
    model: Any = policy  # Any, because nn.Module types undeclared attributes as tensors or modules.
    if hasattr(model, "peft_config"):
        adapter = folder.parent / filenames.ADAPTER
        try:
            with warnings.catch_warnings():
                # peft warns of the embeddings that it saves, of tied weights, which are separated, and of layers that
                # are merged already when it unloads them.
                warnings.simplefilter("ignore")
                model.save_pretrained(adapter, selected_adapters=["default"])
                model = _merge(model)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise UserError(f"the trained adapter in {adapter} cannot be merged into the weights: {error}") from error
    with default_generation_config(model):
        model.save_pretrained(folder, state_dict=weights)
    write_generation_config(model, folder, stop_ids=stop_ids, pad_token_id=tokenizer.pad_token_id)
    tokenizer.save_pretrained(folder)


def whole_state_dict(policy: nn.Module, folder: Path) -> dict[str, Any] | None:
    """Gather the weights of a sharded policy on the first rank, one after the other. All ranks must call it.

    The weights are mapped into memory from files, which have no name any more and vanish with the last tensor. So the
    host has little more than :data:`MAX_GATHERED_BYTES` of them in memory, whatever the size of the policy.

    A weight that several layers share, such as a tied head, is gathered once, under its first name. Of a policy with an
    adapter the trained weights are gathered alone.

    Args:
        policy: Policy, in training.
        folder: Folder in which the files are written, on a disk with room for the weights.

    Returns:
        The weights by name on the first rank, an empty mapping on the others; ``None`` for a policy that is whole.
    """
    if not isinstance(policy, FSDPModule):
        return None
    reshard(policy)
    named = dict(policy.named_parameters())
    again = {name for name, _ in policy.named_parameters(remove_duplicate=False)} - named.keys()
    frozen = {name for name, p in named.items() if not p.requires_grad} if hasattr(policy, "peft_config") else set()
    weights: dict[str, Any] = {}
    gathered: dict[str, Tensor] = {}
    for name, weight in policy.state_dict().items():
        if name in again | frozen:
            continue
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()
        if rank() == 0:
            gathered[name] = whole.cpu().contiguous()
            if sum(one.nbytes for one in gathered.values()) >= MAX_GATHERED_BYTES:
                weights |= _mapped(gathered, folder)
                gathered = {}
    return weights | (_mapped(gathered, folder) if gathered else {})


def _mapped(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return tensors that are not in memory but in a file."""
    file = temporary_path(folder / "weights.safetensors")
    save_file(tensors, file)
    found = load_file(file)
    file.unlink()
    return found


def whole_policy(
    policy: nn.Module, weights: dict[str, Any] | None, load: Callable[[], nn.Module]
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Return a policy that can be saved, and its weights if the policy is sharded and does not hold them itself.

    An adapter cannot be merged into shards, so a sharded policy with an adapter becomes an unsharded copy.

    Args:
        policy: Policy after training.
        weights: State that :func:`whole_state_dict` gathered, ``None`` for a policy that is whole.
        load: Function that loads the policy as it was before training.
    """
    if weights is None or not hasattr(policy, "peft_config"):
        return policy, weights
    copy = load()
    missing = copy.load_state_dict(weights, strict=False).missing_keys
    trained = {name for name, parameter in copy.named_parameters() if parameter.requires_grad}
    if lost := sorted(trained.intersection(missing)):
        raise RuntimeError(f"the gathered adapter lacks {len(lost)} weights, such as {lost[0]}")
    return copy, None


# --- merging an adapter ----------------------------------------------------------------------------------------------


def check_mergeable(policy: nn.Module) -> None:
    """Refuse an adapter that cannot be merged into a model folder, before time is spent on training it.

    Raises:
        UserError: The adapter is not one that changes weights, or it changes one that other layers share.
    """
    model: Any = policy
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTuner

    kind = model.peft_config["default"].peft_type.value.lower()
    if not isinstance(model.base_model, BaseTuner) or not hasattr(model.base_model, "merge_and_unload"):
        raise UserError(
            f"model.adapter_path: an adapter of the kind {kind} does not change weights, so it cannot be merged into "
            "policy/; give a LoRA adapter"
        )
    owners, causal = _owners(model), model.get_base_model()
    untied = {_base_layer(causal.get_input_embeddings()), _base_layer(causal.get_output_embeddings())}
    for name, layer in _adapted_layers(model):
        base = layer.get_base_layer()
        if any(len(owners[id(p)]) > 1 and not owners[id(p)] <= untied for p in base.parameters(recurse=False)):
            raise UserError(
                f"model.lora.target_modules: {name} shares its weights with another layer, so its adapter cannot be "
                "merged into policy/; leave it out"
            )
        if getattr(layer, "lora_bias", {}).get("default") and getattr(base, "bias", None) is None:
            raise UserError(
                f"model.adapter_path: the adapter of {name} has a bias and the layer does not, so it cannot be merged "
                "into policy/; train an adapter with lora_bias=False"
            )


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


@torch.no_grad()
def _merge(model: Any) -> Any:
    """Merge the adapter ``default`` into the weights below it, in at least float32, and return the plain model."""
    model.set_adapter("default")
    _separate_shared_weights(model)
    for _, layer in _adapted_layers(model):
        parameters = [p for p in layer.get_base_layer().parameters() if p.dtype in HALF_PRECISION]
        dtypes = [parameter.dtype for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        layer.merge(adapter_names=["default"])
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
    merged = model.merge_and_unload(adapter_names=["default"])
    if _weight(merged.get_input_embeddings()) is not _weight(merged.get_output_embeddings()):
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged


def _separate_shared_weights(model: nn.Module) -> None:
    """Give each adapted layer a weight of its own, because merging in place would change the others that share it."""
    owners = _owners(model)
    for _, layer in _adapted_layers(model):
        base = layer.get_base_layer()
        for name, parameter in list(base.named_parameters(recurse=False)):
            if len(owners[id(parameter)]) > 1:
                setattr(base, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _owners(model: nn.Module) -> dict[int, set[nn.Module]]:
    """Return the modules that have each parameter, by its id."""
    owners: dict[int, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(module)
    return owners


def _base_layer(module: Any) -> Any:
    module = getattr(module, "token_adapter", module)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _weight(module: Any) -> Any:
    return getattr(module, "weight", None)
