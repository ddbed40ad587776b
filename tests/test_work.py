"""What a step has to compute, counted: it grows by no accident, and no clock is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spo.data import TokenizedPair
from spo.forward.grouped import MAX_MASKED_TOKENS, kernel_calls
from spo.forward.packing import Group, Groups
from spo.forward.probe import probe_drawing
from spo.forward.speed import Speed
from spo.losses import DPOLoss, PreferenceLoss, SPOLoss
from spo.models import FrozenReference
from spo.regularizers import GlobalKL, NoRegularizer, Regularizer
from spo.watch import ProbeSettings
from tests.helpers import BOS, EOS, FAST, PLAIN, VOCAB, Spied, make_data, make_module, make_trainer, tiny_llama

PROMPT, CHOSEN, REJECTED, PAIRS, STEPS = 20, 6, 3, 4, 3
SAMPLES = 5
ROOMY = replace(FAST, max_logits=100 * VOCAB)
"""All logits of these steps exist at once, as those of most steps do."""
SHAPE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def pair(i: int) -> TokenizedPair:
    prompt = (BOS, *((3 + (i * 7 + j) % 20) for j in range(PROMPT - 1)))
    chosen, rejected = (*[5 + i] * (CHOSEN - 1), EOS), (*[9 + i] * (REJECTED - 1), EOS)
    return TokenizedPair(prompt, chosen, rejected, "", "", "", str(i))


def weights_of(*parts: str) -> int:
    """Weights of a matrix product for each token: of the blocks, of the head."""
    h, f = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    per_token = {"blocks": SHAPE["num_hidden_layers"] * (2 * h * h + 2 * h * h // 2 + 3 * h * f), "head": h * VOCAB}
    return sum(per_token[part] for part in parts)


class Counted(Spied):
    """Counts the products of the linear layers, and the tokens that each model's blocks are given, step by step."""

    def training_step(self, window: Any, batch_idx: int) -> None:
        counter = FlopCounterMode(display=False)
        self.given = {"policy": [], "reference": []}
        reference = self.reference.model  # type: ignore[attr-defined]
        hooks = [
            model.model.layers[0].register_forward_hook(
                lambda module, args, out, name=name: self.given[name].append(args[0].shape[:-1].numel())
            )
            for name, model in (("policy", self.policy), ("reference", reference))
        ]
        logits: list[int] = []
        hooks.append(self.policy.lm_head.register_forward_hook(lambda module, args, out: logits.append(out.numel())))
        with counter:
            super().training_step(window, batch_idx)
        for hook in hooks:
            hook.remove()
        products = counter.get_flop_counts()["Global"]
        self.steps.append(
            {
                "products": sum(n for op, n in products.items() if str(op) in ("aten.mm", "aten.addmm")) // 2,
                "logits": logits,
                **{name: list(tokens) for name, tokens in self.given.items()},
            }
        )


def counted(folder: Path, loss: PreferenceLoss, regularizer: Regularizer, speed: Speed, **data: Any) -> list[Any]:
    module = make_module(
        tiny_llama(0, dtype=torch.float32, attn_implementation="sdpa", **SHAPE).train(),
        loss=loss,
        regularizer=regularizer,
        reference=FrozenReference(),
        reference_model=tiny_llama(1, dtype=torch.float32, attn_implementation="sdpa", **SHAPE),
        prompts=[pair(i).prompt_ids for i in range(SAMPLES)],
        stop_ids=(VOCAB + 1,),  # never drawn, so that every sample has the length of the limit
        speed=speed,
        log_every_n_steps=10,
    )
    module.__class__, module.steps = Counted, []  # type: ignore[assignment]
    probe_drawing(module.policy)  # A model is probed once, when samples are first drawn from it.
    pairs = [pair(i) for i in range(PAIRS)]
    trainer = make_trainer(folder, max_steps=STEPS)
    trainer.fit(module, datamodule=make_data(pairs, max_steps=STEPS, batch_size=PAIRS, **data))
    return module.steps  # type: ignore[return-value]


def test_dpo_step_computes_prompts_once_and_logits_of_completions_only(tmp_path: Path) -> None:
    tokens, completions = PAIRS * (PROMPT + CHOSEN + REJECTED), PAIRS * (CHOSEN + REJECTED)
    once = tokens * weights_of("blocks") + completions * weights_of("head")
    for step in counted(tmp_path, DPOLoss(), NoRegularizer(), ROOMY):
        assert step["policy"] == step["reference"] == [tokens]
        # forward and the two products of backward for the policy, forward alone for the reference
        assert step["products"] == 4 * once


def test_work_of_plain_step(tmp_path: Path) -> None:
    """Padded to the longest, prompts twice, logits everywhere: what the speed-ups save is counted against this."""
    padded = 2 * PAIRS * (PROMPT + CHOSEN)
    for step in counted(tmp_path, DPOLoss(), NoRegularizer(), PLAIN):
        assert step["policy"] == step["reference"] == [padded]
        assert step["products"] == 4 * padded * weights_of("blocks", "head")


def test_stored_log_probs_avoid_reference_forward(tmp_path: Path) -> None:
    logps = {"train": torch.zeros(PAIRS, 2)}
    for step in counted(tmp_path, DPOLoss(), NoRegularizer(), FAST, reference_logps=logps):
        assert step["reference"] == []


def test_spo_runs_reference_once_per_used_sample_and_on_no_pair(tmp_path: Path) -> None:
    drawn, used, length = SAMPLES, 2, 4  # Two steps use four of the five samples.
    regularizer = GlobalKL(0.1, 2, drawn, used, length, "tokenwise")
    pairs = PAIRS * (PROMPT + CHOSEN + REJECTED)
    steps = counted(tmp_path, SPOLoss(), regularizer, ROOMY)
    assert [step["reference"] for step in steps] == [[2 * used * (PROMPT + length)], [], [2 * used * (PROMPT + length)]]
    for refreshes, step in zip([True, False, True], steps, strict=True):
        # a drawing: the prompts, then token after token but for the last, which is read by no one
        sampling = [drawn * PROMPT, *[drawn] * (length - 1)] if refreshes else []
        assert step["policy"] == [*sampling, pairs, used * (PROMPT + length)]
    once = pairs * weights_of("blocks") + PAIRS * (CHOSEN + REJECTED) * weights_of("head")
    samples = used * (PROMPT + length) * weights_of("blocks") + used * length * weights_of("head")
    assert steps[1]["products"] == 3 * (once + samples)


def test_reference_runs_every_step_without_a_cache(tmp_path: Path) -> None:
    regularizer = GlobalKL(0.1, 2, SAMPLES, 2, 4, "tokenwise")
    for step in counted(tmp_path, SPOLoss(), regularizer, PLAIN):
        assert step["reference"] == [2 * (PROMPT + 4)]


def test_probe_runs_only_at_log_steps(tmp_path: Path) -> None:
    calls: list[int] = []
    module = make_module(
        tiny_llama(0, dtype=torch.float32).train(),
        loss=SPOLoss(),
        reference=FrozenReference(),
        reference_model=tiny_llama(1, dtype=torch.float32),
        probe=ProbeSettings(2, 3),
        log_every_n_steps=4,
    )
    reference: nn.Module = module.reference.model  # type: ignore[attr-defined]
    reference.register_forward_hook(lambda *_: calls.append(module.global_step))
    trainer = make_trainer(tmp_path, max_steps=9)
    trainer.fit(module, datamodule=make_data([pair(i) for i in range(4)], max_steps=9, batch_size=2))
    assert [step for step in calls if step > 0] == [4, 8, 9]  # before the first step it is tried out


@pytest.mark.parametrize("max_logits", [VOCAB * 8, None])
def test_logits_in_memory_are_bounded(max_logits: int | None, tmp_path: Path) -> None:
    """The limit costs one more product of the head, in the backward pass."""
    bounded = counted(tmp_path, DPOLoss(), NoRegularizer(), replace(FAST, max_logits=max_logits))
    whole = counted(tmp_path, DPOLoss(), NoRegularizer(), ROOMY)
    again = 0 if max_logits is None else PAIRS * (CHOSEN + REJECTED) * weights_of("head")
    assert [step["products"] - other["products"] for step, other in zip(bounded, whole, strict=True)] == [again] * STEPS
    assert {max(step["logits"]) for step in bounded} == {max_logits or PAIRS * (CHOSEN + REJECTED) * VOCAB}


def attended(*groups: Group) -> int:
    """Pairs of a query and a key that the attention kernels are given for a row of these groups."""
    calls = list(kernel_calls(Groups(groups), torch.device("cpu")))
    assert sum(call.length for call in calls) == sum(group.length for group in groups)
    return sum(call.length * sum(calls[i].length for i in call.attends_to) for call in calls)


@pytest.mark.parametrize("completions", [(300, 200), (40, 30), (300,) * 9, (20,) * 9])
def test_attention_on_long_group_is_near_minimum(
    completions: tuple[int, ...],
) -> None:
    prompt = 500
    # completions that share a call see each other's places too, at most MAX_MASKED_TOKENS of them
    bound = prompt**2 + sum(n * (prompt + max(n, MAX_MASKED_TOKENS)) for n in completions)
    exact = prompt**2 + sum(n * (prompt + n) for n in completions)
    found = attended(Group(prompt, completions))
    assert exact <= found <= bound
    if min(completions) > MAX_MASKED_TOKENS // 2:
        assert found == exact


def test_attention_grows_linearly_with_groups() -> None:
    alone, tiny, n = Group(500, (100,)), Group(9, (3, 4)), 200
    assert attended(*[alone] * 5) == 5 * 600**2  # one causal call each, which skips half of it
    most = n * tiny.length * MAX_MASKED_TOKENS
    assert attended(*[tiny] * n) <= most < (n * tiny.length) ** 2 / 10
    assert attended(tiny) == tiny.length**2
