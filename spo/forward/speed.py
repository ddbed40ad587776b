"""How log-probabilities are computed: switches that change the time and the memory, and no number."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from torch import Tensor, nn

from spo.forward.head import can_defer, completion_logits
from spo.forward.packing import enable_packing
from spo.ops import completion_targets, sum_per_sequence, token_logps
from spo.ops.logps import Logits
from spo.types import Sequences

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """The ``speed`` config group.

    Attributes:
        packing: lay the sequences of a forward pass end to end, without padding, where the model takes them so.
        share_prompts: compute a prompt once for all of its completions; needs ``packing``.
        completion_only: run the language-model head for completion tokens alone.
        max_logits: most logits that exist at one time; ``None`` for no limit.
        sampler: ``"static"``, with a preallocated cache, or transformers' own ``"generate"``.
        keep_reference: keep what the reference computed on the buffered samples until they are drawn anew.
        compile: ``torch.compile`` each block of the policy.
        probed: whether the models at hand were found to take packed rows: before that, nothing is packed.
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
        """The same, ready to pack, or without packing, and a line that says so, where a model takes no packed rows."""
        limited = self.max_logits is not None and self.completion_only
        for model in models:
            if limited and hasattr(model, "peft_config") and not can_defer(model):
                _say(f"{type(model).__name__}: speed.max_logits does not act, as an adapter changes the head")
        if not self.packing:
            return self
        for model in models:
            if reason := enable_packing(model):
                _say(f"{type(model).__name__}: batches are padded, not packed: {reason}")
                return replace(self, packing=False)
        return replace(self, probed=True)

    @property
    def packs(self) -> bool:
        """Whether sequences are packed from here on."""
        return self.packing and self.probed

    def arrange(self, sequences: Sequences) -> Sequences:
        """Sequences on the host, as they are best forwarded."""
        return sequences.pack(self.share_prompts) if self.packs else sequences

    def logits(self, model: nn.Module, sequences: Sequences) -> Logits:
        """``(M, V)`` see :func:`spo.forward.head.completion_logits`."""
        return completion_logits(model, sequences, completion_only=self.completion_only, max_logits=self.max_logits)

    def logps(self, model: nn.Module, sequences: Sequences) -> Tensor:
        """``(N,)`` summed log-probs of the completions, in nats."""
        tokens = token_logps(self.logits(model, sequences), completion_targets(sequences))
        return sum_per_sequence(tokens, sequences)


@cache
def _say(line: str) -> None:
    """Once, however many stages of a run find it out."""
    log.warning(line)


def compile_blocks(policy: nn.Module) -> None:
    """Compiles each block of a policy by itself: one compilation serves all blocks, and hooks around them still run."""
    for blocks in [module for module in policy.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            block.compile(dynamic=True)
