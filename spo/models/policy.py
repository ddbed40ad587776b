"""Loading a policy: from a Hugging Face folder, in the stated mode, with or without an adapter."""

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
from spo.records import filenames

Initial = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter (arXiv:2106.09685), made by peft.

    Attributes:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: on the adapter's input.
        target_modules: names of the modules to adapt, or ``"all-linear"``.
    """

    r: PositiveInt
    alpha: PositiveFloat
    dropout: DropoutRate
    target_modules: str | Sequence[str]


@dataclass(frozen=True)
class ModelSpec:
    """How to obtain a model: everything of the ``model`` config group but training defaults.

    Attributes:
        path: Hugging Face folder or hub name; ``None`` where ``initial`` makes the model.
        initial: makes fresh weights and their tokenizer; ``None`` where ``path`` is given.
        dtype: name of a torch dtype.
        attn_implementation: transformers' name of an attention implementation.
        trust_remote_code: whether code in the model folder may run.
        dropout: dropout of the policy in training; the reference never has any.
        gradient_checkpointing: recompute activations in backward.
        lora: adapter to train instead of the weights.
        adapter_path: folder of an adapter to continue from; it is then the reference as well.
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
        """The tokenizer that lies in the folder ``path``."""
        return AutoTokenizer.from_pretrained(path, trust_remote_code=self.trust_remote_code)

    def base(self, path: str | Path, *, dropout: float = 0.0) -> PreTrainedModel:
        """The model in the folder ``path`` without any adapter, in eval mode."""
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
        """The model to train, in train mode.

        Args:
            path: folder of the weights it starts from.
            seed: of the adapter's initialisation.
        """
        model: nn.Module = self.base(path, dropout=self.dropout)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if self.lora is not None:
            model = _with_adapter(model, self.lora, self.adapter_path, seed)
        return model.train()

    def start(self, path: str | Path) -> nn.Module:
        """The distribution that training starts from, frozen and in eval mode: base weights plus a given adapter."""
        model: nn.Module = self.base(path)
        if self.adapter_path is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, self.adapter_path)
        return model.requires_grad_(False).eval()


def _with_adapter(model: nn.Module, lora: LoraSettings, adapter_path: str | None, seed: int) -> nn.Module:
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
                lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int, and divides it by r as it is
                lora_dropout=lora.dropout,
                target_modules=targets,
            ),
        )


def set_dropout(config: Any, value: float) -> None:
    """Sets every dropout probability a model config holds, under whatever name the architecture gives it."""
    for name, current in vars(config).items():
        is_dropout = "drop" in name and not name.startswith("classifier")
        if is_dropout and isinstance(current, int | float) and not isinstance(current, bool):
            setattr(config, name, value)


def whole_state_dict(policy: nn.Module) -> dict[str, Any] | None:
    """The weights gathered on the first rank where the policy is sharded, else ``None``; all ranks call it."""
    if not isinstance(policy, FSDPModule):
        return None
    return get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_policy(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Any] | None = None
) -> None:
    """Writes a Hugging Face folder (safetensors, tokenizer) that ``AutoModelForCausalLM`` loads.

    An adapter is saved by itself in ``adapter/`` beside the folder, and merged into the weights inside it.
    The policy is not fit for training afterwards where it had an adapter.
    """
    if hasattr(policy, "peft_config"):
        policy.save_pretrained(folder.parent / filenames.ADAPTER, selected_adapters=["default"])  # type: ignore[operator]
        policy.set_adapter("default")  # type: ignore[operator]
        policy = policy.merge_and_unload(adapter_names=["default"])  # type: ignore[operator]
    policy.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
