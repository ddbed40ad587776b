"""Adapters that a run continues from: which of them can be trained and merged, and their frozen copy."""

from __future__ import annotations

import copy
from typing import Any

from spo.errors import UserError

REFERENCE_ADAPTER = "reference"
"""Name of the frozen copy of a given adapter, which is the reference."""


def check_given_adapter(config: Any) -> None:
    """Refuse a given adapter that cannot have a frozen copy beside it, or cannot be merged into the weights.

    Args:
        config: Configuration of the adapter, of peft.

    Raises:
        UserError: The adapter is of such a kind.
    """
    problems = [
        (config.is_prompt_learning, "is a prompt, which cannot be merged into weights"),
        (getattr(config, "bias", "none") != "none", "trains biases of the model, which its frozen copy would share"),
        (
            getattr(config, "ensure_weight_tying", False),
            "ties parts of itself (ensure_weight_tying), which its frozen copy would share",
        ),
        (
            getattr(config, "alora_invocation_tokens", None) is not None,
            "acts after certain tokens only (alora_invocation_tokens), so it cannot be merged into weights",
        ),
    ]
    for applies, words in problems:
        if applies:
            raise UserError(f"model.adapter_path: this adapter {words}; give another adapter")


def add_reference_adapter(adapted: Any) -> None:
    """Add a frozen copy of the adapter ``default`` under the name :data:`REFERENCE_ADAPTER`.

    Loading the adapter a second time would not do. An initialization from the weights, such as PiSSA
    (arXiv:2404.02948), subtracts its start from the weights below the adapter, and would subtract it twice.

    Args:
        adapted: Model with the adapter, of peft.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(adapted.peft_config["default"])
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True
    config.inference_mode = True
    adapted.add_adapter(REFERENCE_ADAPTER, config)
    state = get_peft_model_state_dict(adapted, adapter_name="default", save_embedding_layers=False)
    set_peft_model_state_dict(adapted, state, adapter_name=REFERENCE_ADAPTER)
    adapted.set_adapter("default")
