"""The speed settings: how log-probabilities are computed, which changes time and memory but not the numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from spo.forward.head import base_model, can_defer, completion_logits, completion_logits_and_states
from spo.forward.neighbors import Company, refuse_if_sharded
from spo.forward.packing import pack
from spo.forward.probe import enable_packing, probe_company
from spo.forward.sharding import reshard
from spo.logs import log_once
from spo.ops import completion_targets, sum_per_sequence, token_logps
from spo.ops.logps import Logits
from spo.types import Sequences

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """The ``speed`` config group.

    Attributes:
        packing: Lay the sequences of a forward pass end to end, without padding, if the model supports it.
        share_prompts: Compute a prompt once for all of its completions; needs ``packing``.
        completion_only: Run the language-model head for completion tokens alone.
        max_logits: Largest number of logits that exist at a time; ``None`` for no limit.
        sampler: ``"static"`` for the loop with a preallocated cache, ``"generate"`` for that of transformers.
        keep_reference: Keep what the reference computed on the buffered samples until new samples are drawn.
        compile: Compile each block of the policy with ``torch.compile``.
        probed: Whether the models were probed for packed rows. Nothing is packed before that.
    """

    packing: bool
    share_prompts: bool
    completion_only: bool
    max_logits: int | None
    sampler: Literal["static", "generate"]
    keep_reference: bool
    compile: bool
    probed: bool = False

    def resolve_for(self, *models: nn.Module) -> Speed:
        """Return the settings for these models: ready to pack, or without packing if a model does not support it.

        Each model is probed for what its sequences may share. A setting that cannot act is reported by a warning, once
        for each kind of model.

        Raises:
            UserError: A sharded model needs more forward passes for some batches than for others.
        """
        try:
            return self._resolved(models)
        finally:
            for model in models:
                reshard(model)

    def _resolved(self, models: Sequence[nn.Module]) -> Speed:
        for model in models:
            if probe_company(model) is not Company.ANY:
                refuse_if_sharded(model, base_model(model))
        limited = self.max_logits is not None and self.completion_only
        for model in models:
            if limited and hasattr(model, "peft_config") and not can_defer(model):
                _warn_once(model, "speed.max_logits does not act, because an adapter changes the head")
        if not self.packing:
            return self
        for model in models:
            if reason := enable_packing(model):
                _warn_once(model, f"batches are padded, not packed: {reason}")
                return replace(self, packing=False)
        return replace(self, probed=True)

    @property
    def packs(self) -> bool:
        """Return whether sequences are packed from now on."""
        return self.packing and self.probed

    def arrange(self, sequences: Sequences) -> Sequences:
        """Return sequences that are on the host in the layout in which they are forwarded."""
        return pack(sequences, share_prompts=self.share_prompts) if self.packs else sequences

    def logits(self, model: nn.Module, sequences: Sequences) -> Logits:
        """Return the ``(M, V)`` logits of :func:`spo.forward.head.completion_logits` under these settings."""
        return completion_logits(model, sequences, completion_only=self.completion_only, max_logits=self.max_logits)

    def logits_and_states(self, model: nn.Module, sequences: Sequences) -> tuple[Logits, Tensor]:
        """Return the logits, and the ``(M, H)`` hidden states that the model's head computes them from."""
        return completion_logits_and_states(
            model, sequences, completion_only=self.completion_only, max_logits=self.max_logits
        )

    def logps(self, model: nn.Module, sequences: Sequences) -> Tensor:
        """Return the ``(N,)`` summed log-probs of the completions in nats."""
        tokens = token_logps(self.logits(model, sequences), completion_targets(sequences))
        return sum_per_sequence(tokens, sequences)


def _warn_once(model: nn.Module, message: str) -> None:
    log_once(log, logging.WARNING, f"{type(model).__name__}: {message}")


def compile_blocks(policy: nn.Module) -> None:
    """Compile each block of a policy by itself, so that one compilation serves all blocks and hooks still run."""
    for blocks in [module for module in policy.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            block.compile(dynamic=True)
