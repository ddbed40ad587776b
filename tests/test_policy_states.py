"""Hidden states of the policy that terms read: those of one forward pass, in every layout, and losses of that width."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from spo.data.collate import collate
from spo.errors import UserError
from spo.forward.head import hidden_width
from spo.losses import PreferenceLoss, Term
from spo.losses.heads import StateHead
from spo.models import FrozenReference, NoReference
from spo.objective import score
from spo.ops import completion_targets, token_logps
from spo.ops.logps import DeferredLogits
from spo.stages.from_config import build_loss
from spo.types import PairLogps
from tests.helpers import FAST, PAD, PLAIN, random_pairs, tiny_llama

WIDTH = 16
DEFERRED = replace(FAST, max_logits=50)
LAYOUTS = {
    "padded": PLAIN,
    "padded completions": replace(PLAIN, completion_only=True),
    "packed": replace(FAST, max_logits=None),
    "deferred": DEFERRED,
}
ROWS = random_pairs(5, seed=3)
ROWS[1] = replace(ROWS[1], prompt_ids=ROWS[0].prompt_ids)  # a prompt that two rows of a packed batch share


class StatesLoss(PreferenceLoss, nn.Module):
    """A loss that multiplies hidden states by a vector of the width of the policy."""

    uses_reference = False
    terms: Mapping[str, Term]

    def __init__(self, declares: bool = True) -> None:
        super().__init__()
        self.terms = {
            "first": Term(lambda scored: scored.batch.per_completion(self.of(scored.prompt_states)), False, declares),
            "sum": Term(lambda scored: scored.per_completion(self.of(scored.policy_states)), False, declares),
        }
        self.widths: list[int] = []

    def fit_width(self, width: int) -> None:
        self.widths.append(width)
        self.vector = nn.Parameter(torch.randn(width))

    def of(self, states: Tensor) -> Tensor:
        return states @ self.vector.to(states)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return pair.terms["first"][0] - pair.terms["sum"][1]


def fitted(declares: bool = True) -> StatesLoss:
    torch.manual_seed(0)
    loss = StatesLoss(declares).double()
    loss.fit_width(WIDTH)
    return loss


def adapted() -> Any:
    settings = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(tiny_llama(0), settings).double().eval()


def plain_states(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """Return the ``(length, H)`` states that predict a completion, from a plain forward pass over it alone."""
    ids = torch.tensor([[*prompt, *completion]])
    return model(ids, output_hidden_states=True).hidden_states[-1][0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("model", ["plain", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_are_those_of_a_plain_forward_pass(layout: str, model: str) -> None:
    policy = tiny_llama(0) if model == "plain" else adapted()
    speed, loss = LAYOUTS[layout].resolve_for(policy), fitted()
    assert speed.packs == (("pa" in layout and "padded" not in layout) or layout == "deferred")
    batch = collate(ROWS, range(5), PAD, arrange=speed.arrange)
    passes: list[int] = []
    layers = [module for name, module in policy.named_modules() if name.endswith("layers.0")]
    layers[0].register_forward_hook(lambda *_: passes.append(1))
    scored = score(batch, loss, policy, NoReference(), speed, {})
    seen = scored.inputs_of(loss)
    assert len(passes) == 1
    assert isinstance(scored.policy, DeferredLogits) == (layout == "deferred" and model == "plain")
    for i, row in enumerate(ROWS):
        for side, ids in enumerate(row.completions):
            states = plain_states(policy, row.prompt_ids, ids)
            torch.testing.assert_close(seen.terms["first"][side, i], loss.of(states[0]))
            torch.testing.assert_close(seen.terms["sum"][side, i], loss.of(states).sum())
    without = speed.logits(policy, batch.sequences)
    targets = completion_targets(batch.sequences)
    assert torch.equal(token_logps(scored.policy, targets), token_logps(without, targets))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_through_states_are_those_of_a_plain_forward_pass(layout: str) -> None:
    policy, loss = tiny_llama(0), fitted()
    speed = LAYOUTS[layout].resolve_for(policy)
    batch = collate(ROWS, range(5), PAD, arrange=speed.arrange)
    score(batch, loss, policy, NoReference(), speed, {}).inputs_of(loss).terms["sum"].sum().backward()
    other, own = copy.deepcopy(policy), fitted()
    other.zero_grad()
    total = [own.of(plain_states(other, row.prompt_ids, ids)).sum() for row in ROWS for ids in row.completions]
    torch.stack(total).sum().backward()
    wanted = dict(other.named_parameters())
    compared = [name for name, p in policy.named_parameters() if p.grad is not None and "lm_head" not in name]
    assert len(compared) > 10
    for name in compared:  # Llama computes norms and positions in float32.
        found, expected = policy.get_parameter(name).grad, wanted[name].grad
        assert found is not None and expected is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=name)
    torch.testing.assert_close(loss.vector.grad, own.vector.grad)


def test_states_that_are_not_declared_are_explained() -> None:
    loss, batch = fitted(declares=False), collate(ROWS, range(5), PAD)
    scored = score(batch, loss, tiny_llama(0), FrozenReference(), PLAIN, {})
    with pytest.raises(UserError, match=r"method.loss: a term reads hidden states .*needs_policy_states=True"):
        scored.inputs_of(loss)


def test_width_is_that_of_the_states_that_reach_the_head() -> None:
    policy = tiny_llama(0)
    assert hidden_width(policy) == hidden_width(adapted()) == WIDTH
    policy.train()
    assert hidden_width(policy) == WIDTH and policy.training


def test_width_is_given_once_and_parameters_follow_the_seed_alone() -> None:
    def built(seed: int) -> StatesLoss:
        cfg = OmegaConf.create({"seed": seed, "method": {"loss": {"_target_": f"{__name__}.StatesLoss"}}})
        loss = build_loss(cfg, tiny_llama(0))
        assert isinstance(loss, StatesLoss)
        return loss

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = built(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = built(1), built(2)
    assert first.widths == [WIDTH]
    assert torch.equal(first.vector, again.vector) and not torch.equal(first.vector, other.vector)


def test_a_head_computes_in_its_own_precision() -> None:
    head, states = StateHead(WIDTH, 2), torch.randn(3, WIDTH).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = head(states)
    assert found.dtype == torch.float32 and torch.equal(
        found, nn.functional.linear(states.float(), head.weight, head.bias)
    )
