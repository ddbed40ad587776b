"""Every response to every prompt as tensors, for exact expectations over an enumerable language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spo.data import DataError, Renderer, Row, TokenizedPair
from spo.data.collate import collate
from spo.data.enumerable import Language
from spo.forward.head import completion_logits
from spo.forward.modes import eval_mode
from spo.losses import Loss
from spo.objective import loss_inputs
from spo.ops import completion_targets, sum_per_sequence, token_logps
from spo.types import Logps, PreferenceBatch, Sequences

MAX_SEQUENCES_PER_FORWARD = 4096


@dataclass(frozen=True)
class World:
    """An enumerable language of ``P`` prompts with ``R`` responses each, and the ``K`` rows of a data set over it.

    Attributes:
        sequences: ``P * R`` sequences, all responses of the first prompt first.
        rewards: ``(P, R)`` float64 rewards.
        lengths: ``(P, R)`` float64 numbers of tokens of the responses.
        support: ``(P, R)`` mask of responses that can appear in the data.
        completions: ``(n, K)`` positions in ``sequences`` of each row's completions, best first.
        preference: ``(K,)`` Bradley-Terry probability, by the rewards and whatever label the row has, that the first
            of two completions is the better one; ``None`` for rows of more than two, and for rows whose weights are
            the probabilities of their orders.
        weight: ``(K,)`` weights of the rows.
        features: ``(K, ...)`` numbers of the rows that the loss reads, by name.
    """

    sequences: Sequences
    rewards: Tensor
    lengths: Tensor
    support: Tensor
    completions: Tensor
    preference: Tensor | None
    weight: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, language: Language, renderer: Renderer, rows: Sequence[TokenizedPair]) -> World:
        """Tokenize the language, and find each row's completions in it.

        Raises:
            DataError: If several tokens end a completion, since the responses are enumerated with one of them.
        """
        if len(renderer.stop_ids) > 1:
            ends = ", ".join(map(str, renderer.stop_ids))
            raise DataError(
                f"model.path: an enumerable language needs one token that ends a response, and this model has {ends}: "
                "set eos_token_id in its generation_config.json to the tokenizer's EOS"
            )
        texts = [Row(prompt, response) for prompt in language.prompts for response in language.responses]
        leaves = [leaf for leaf in map(renderer.render, texts) if isinstance(leaf, TokenizedPair)]
        assert len(leaves) == len(texts), "a response of the language cannot be written in tokens"
        place = {(leaf.prompt_ids, leaf.chosen_ids): i for i, leaf in enumerate(leaves)}
        completions = torch.tensor([[place[row.prompt_ids, ids] for ids in row.completions] for row in rows]).T
        rewards = torch.from_numpy(language.rewards)
        preference = None
        if len(completions) == 2 and all(row.weight is None for row in rows):
            chosen, rejected = rewards.flatten()[completions]
            preference = (chosen - rejected).sigmoid()
        weight = torch.tensor([1.0 if row.weight is None else row.weight for row in rows], dtype=torch.float64)
        return cls(
            sequences=collate(leaves, range(len(leaves)), renderer.eos_id).sequences,
            rewards=rewards,
            lengths=torch.tensor([len(leaf.chosen_ids) for leaf in leaves]).double().view_as(rewards),
            support=torch.from_numpy(language.support),
            completions=completions,
            preference=preference,
            weight=weight,
            features=collate(rows, range(len(rows)), renderer.eos_id).features,
        )

    @torch.no_grad()
    def logps(self, model: nn.Module) -> Tensor:
        """Return ``(P, R)`` log pi(y|x) in nats; logits are widened to float64 before anything is summed."""
        device = next(model.parameters()).device
        parts = []
        with eval_mode(model):
            for first in range(0, len(self.sequences), MAX_SEQUENCES_PER_FORWARD):
                part = self.sequences.rows(slice(first, first + MAX_SEQUENCES_PER_FORWARD)).to(device)
                logits = completion_logits(model, part).double()
                parts.append(sum_per_sequence(token_logps(logits, completion_targets(part)), part))
        return torch.cat(parts).cpu().view_as(self.rewards)

    def rows(self, loss: Loss[Any], policy: Tensor, reference: Tensor) -> Logps:
        """Return the rows in the shape that ``loss`` reads, from ``(P, R)`` log-probs of policy and reference."""
        count = self.completions.shape[1]
        batch = PreferenceBatch(
            self.sequences,
            torch.arange(count),
            self.preference,
            self.weight,
            completions=self.completions,
            features=dict(self.features),
        )
        return loss_inputs(loss, batch, policy.flatten(), reference.flatten())
