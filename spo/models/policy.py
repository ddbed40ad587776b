"""Loading and saving of policies in Hugging Face folders, with or without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spo.bounds import DropoutRate, PositiveFloat, PositiveInt
from spo.forward.modes import default_generation_config
from spo.models.generation import read_stop_ids, write_generation_config
from spo.records import filenames

Initial = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter (arXiv:2106.09685) of peft.

    Attributes:
        r: Rank of the update.
        alpha: Scale of the update, which is multiplied by alpha / r.
        dropout: Dropout probability of the adapter's input.
        target_modules: Names of the modules to adapt, or ``"all-linear"``.
    """

    r: PositiveInt
    alpha: PositiveFloat
    dropout: DropoutRate
    target_modules: str | Sequence[str]


@dataclass(frozen=True)
class ModelSpec:
    """Settings for loading a model: the ``model`` config group without its defaults for training.

    Attributes:
        path: Hugging Face folder or hub name; ``None`` if ``initial`` makes the model.
        initial: Function that makes fresh weights and their tokenizer; ``None`` if ``path`` is given.
        dtype: Name of a torch dtype.
        attn_implementation: Name of an attention implementation of transformers.
        trust_remote_code: Whether code in the model folder may run.
        dropout: Dropout probability of the policy in training; the reference does not use dropout.
        gradient_checkpointing: Recompute activations in the backward pass.
        lora: Adapter to train instead of the weights, or ``None``.
        adapter_path: Folder of an adapter to continue from, which is the reference too; or ``None``.
    """

    path: str | None
    initial: Initial | None
    dtype: str
    attn_implementation: str
    trust_remote_code: bool
    dropout: float
    gradient_checkpointing: bool
    lora: LoraSettings | None
    adapter_path: str | None

    def tokenizer(self, path: str | Path) -> PreTrainedTokenizerBase:
        """Load the tokenizer from a folder or hub name."""
        return AutoTokenizer.from_pretrained(path, trust_remote_code=self.trust_remote_code)

    def stop_ids(self, path: str | Path) -> tuple[int, ...]:
        """Return the tokens by which the model of a folder or hub name ends a generation."""
        config = AutoConfig.from_pretrained(path, trust_remote_code=self.trust_remote_code)
        return read_stop_ids(path, config.get_text_config().vocab_size)

    def base(self, path: str | Path, *, dropout: float = 0.0) -> PreTrainedModel:
        """Load the model without an adapter, in eval mode.

        Args:
            path: Hugging Face folder or hub name.
            dropout: Dropout probability wherever the architecture has dropout.
        """
        config = AutoConfig.from_pretrained(path, trust_remote_code=self.trust_remote_code)
        set_dropout(config, dropout)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, self.dtype),
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
        return model.eval()

    def policy(self, path: str | Path, *, seed: int) -> nn.Module:
        """Load the model to train, in train mode.

        Args:
            path: Folder of the initial weights.
            seed: Random seed of the adapter's initialization.
        """
        base = self.base(path, dropout=self.dropout)
        if self.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        policy = base if self.lora is None else _with_adapter(base, self.lora, self.adapter_path, seed)
        return policy.train()

    def start(self, path: str | Path) -> nn.Module:
        """Load the initial policy, frozen and in eval mode: the base weights with a given adapter."""
        model: nn.Module = self.base(path)
        if self.adapter_path is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, self.adapter_path)
        return model.requires_grad_(False).eval()


def _with_adapter(model: nn.Module, lora: LoraSettings, adapter_path: str | None, seed: int) -> nn.Module:
    """Add a fresh adapter, or the given one twice: to train, and frozen under the name ``reference``."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter_path is not None:
        adapted = PeftModel.from_pretrained(model, adapter_path, is_trainable=True)
        adapted.load_adapter(adapter_path, adapter_name="reference", is_trainable=False)
        return adapted
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]  # Declared as int, but peft takes any number.
                lora_dropout=lora.dropout,
                target_modules=targets,
            ),
        )


def set_dropout(config: Any, value: float) -> None:
    """Set every dropout probability of a model config, whatever name the architecture gives it."""
    for name, current in vars(config).items():
        is_dropout = "drop" in name and not name.startswith("classifier")
        if is_dropout and isinstance(current, int | float) and not isinstance(current, bool):
            setattr(config, name, value)


def whole_state_dict(policy: nn.Module) -> dict[str, Any] | None:
    """Gather the weights of a sharded policy on the first rank; return ``None`` otherwise. All ranks must call it."""
    if not isinstance(policy, FSDPModule):
        return None
    return get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_policy(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Any] | None = None,
    stop_ids: Sequence[int] | None = None,
) -> None:
    """Save a Hugging Face folder (safetensors, tokenizer) that ``AutoModelForCausalLM`` loads.

    An adapter is saved in ``adapter/`` next to the folder, and merged into the weights inside it. A policy with an
    adapter cannot be trained further afterwards.

    Args:
        policy: Policy to save.
        tokenizer: Tokenizer of the policy.
        folder: Folder to write.
        weights: State that :func:`whole_state_dict` gathered, or ``None`` for that of ``policy``.
        stop_ids: Tokens that end a generation; ``None`` for those of the model's generation config.
    """
    model: Any = policy  # Any, because nn.Module types undeclared attributes as tensors or modules.
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder.parent / filenames.ADAPTER, selected_adapters=["default"])
        model.set_adapter("default")
        model = model.merge_and_unload(adapter_names=["default"])
    with default_generation_config(model):
        model.save_pretrained(folder, state_dict=weights)
    write_generation_config(model, folder, stop_ids=stop_ids, pad_token_id=tokenizer.pad_token_id)
    tokenizer.save_pretrained(folder)
