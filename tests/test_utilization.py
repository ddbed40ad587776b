"""The arithmetic of model FLOPs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.utilization import Work, forward_flops, matmul_rate
from spo.forward.packing import Group

CONFIG = LlamaConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="eager",
)


def test_flops_by_hand() -> None:
    work = Work.of([Group(3, (2, 1)), Group(1, (1,))])
    assert work == Work(tokens=8, predicted=4, places=6 + 9 + 4 + 1 + 2)
    # a block: queries and output 64 weights each, keys and values 32 each, three of 96; the head 80
    assert forward_flops(CONFIG, work) == 2 * (2 * 480 * 8 + 80 * 4) + 4 * 2 * 8 * 22


def test_flops_are_those_that_torch_counts() -> None:
    ids = torch.arange(7)[None]
    with FlopCounterMode(display=False) as counter:
        loss = LlamaForCausalLM(CONFIG)(input_ids=ids, use_cache=False).logits.sum()
    forward = forward_flops(CONFIG, Work(tokens=7, predicted=7, places=49))
    rotary = 2 * CONFIG.head_dim // 2 * 7  # the angles, which are no weights
    assert counter.get_total_flops() - forward in (0, rotary)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * forward


def test_a_rate_is_measured() -> None:
    assert matmul_rate(torch.device("cpu"), size=32, repeats=2) > 0
