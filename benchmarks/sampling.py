"""Tokens per second of the static sampler and of Hugging Face's generate, which draw the same completions.

Usage: ``python -m benchmarks.sampling [--size 1m|10m] [--json FILE]`` (``--help`` lists the rest)

Both draw from one Llama with random weights, for the same prompts, seeds and limit, in turns of shuffled order. The
head has a bias towards end-of-text, so that lengths of completions vary as those of a trained model do. They are
geometric with mean ``--length``, and cut at ``--new``. A token counts if it belongs to a completion.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Ratio, write_json
from spo.sampling import derive_seed, sample
from spo.types import Sequences

Sampler = Literal["static", "generate"]
SAMPLERS: tuple[Sampler, ...] = ("static", "generate")
VOCAB, BOS, EOS, PAD = 8192, 1, 2, 0
SIZES = {"1m": (96, 2), "10m": (256, 8)}
"""Width of the hidden states and number of layers."""
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "drawing a token": ("aten::exp", "aten::cumsum", "aten::searchsorted", "aten::amax", "aten::sub"),
}
"""Parts of a profile, with the first letters of the names of their operators."""


def build(size: str, length: int, seed: int = 0) -> nn.Module:
    """Build a Llama of about ``size`` weights whose completions have ``length`` tokens on average.

    Args:
        size: Key of :data:`SIZES`.
        length: Mean tokens of a completion without a limit.
        seed: Random seed of the weights.
    """
    hidden, layers = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    end_after(model, length, EOS)
    return model.requires_grad_(False)


def end_after(model: nn.Module, length: int, eos_token_id: int) -> None:
    """Bias the head of a model with random weights towards end-of-text, so that completions have a mean length.

    Args:
        model: Hugging Face causal language model, changed in place.
        length: Mean tokens of a completion without a limit.
        eos_token_id: Token that ends a completion.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    bias = torch.zeros(len(head.weight), dtype=head.weight.dtype, device=head.weight.device)
    bias[eos_token_id] = math.log(len(bias) / length)  # the weights leave the other tokens about equally likely
    head.bias = nn.Parameter(bias, requires_grad=False)


def prompts_of(number: int, most: int, seed: int = 0) -> list[list[int]]:
    """Draw prompts of random tokens.

    Args:
        number: Number of prompts.
        most: Most tokens of a prompt; the least is a quarter of it.
        seed: Random seed of lengths and tokens.
    """
    rng = random.Random(seed)
    sizes = [rng.randint(max(most // 4, 1), most) for _ in range(number)]
    return [[BOS, *(rng.randrange(3, VOCAB) for _ in range(size - 1))] for size in sizes]


def draws(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_id: int, pad_token_id: int
) -> Callable[[Sampler], tuple[float, Sequences]]:
    """Return a function that draws with a sampler and returns completion tokens per second and the completions.

    Args:
        model: Hugging Face causal language model.
        prompts: Token ids of each prompt.
        max_new_tokens: Length limit of a completion.
        eos_token_id: Token that ends a completion.
        pad_token_id: Token that fills the padding.
    """
    seeds = [derive_seed("benchmark", row) for row in range(len(prompts))]

    def draw(sampler: Sampler) -> tuple[float, Sequences]:
        started = time.perf_counter()
        drawn = sample(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=1.0,
            stop_ids=(eos_token_id,),
            pad_token_id=pad_token_id,
            seeds=seeds,
            sampler=sampler,
        )
        tokens = int(drawn.completion_length.sum())  # waits for the device
        return tokens / (time.perf_counter() - started), drawn

    return draw


def compare(
    draw: Callable[[Sampler], tuple[float, Sequences]],
    rounds: int,
    report: Callable[[dict[str, Any]], None] = lambda result: None,
    until: float = math.inf,
) -> dict[str, Any]:
    """Draw with both samplers in turns, and return how fast they are and how often they agree.

    Args:
        draw: Function that :func:`draws` returns.
        rounds: Largest number of rounds; the first one is always made.
        report: Function that is given the result after each round.
        until: Time of ``time.monotonic`` after which no round begins.
    """
    warm = {sampler: draw(sampler)[1] for sampler in SAMPLERS}
    same = [a == b for a, b in zip(*(drawn.completions() for drawn in warm.values()), strict=True)]
    speeds: dict[str, list[float]] = {sampler: [] for sampler in SAMPLERS}
    rng = random.Random(0)
    result: dict[str, Any] = {}
    for done in range(1, rounds + 1):
        for sampler in rng.sample(SAMPLERS, k=len(SAMPLERS)):
            speeds[sampler].append(draw(sampler)[0])
        result = {
            "mean_length": float(warm["static"].completion_length.float().mean()),
            "rounds": done,
            "agreement": sum(same) / len(same),
            "static_tokens_per_s": statistics.median(speeds["static"]),
            "generate_tokens_per_s": statistics.median(speeds["generate"]),
            **Ratio.of(speeds["static"], speeds["generate"]).entries("ratio"),
        }
        report(result)
        if time.monotonic() > until:
            break
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Draw with both samplers, and return the numbers of the JSON file."""
    model = build(options.size, options.length).to(options.device)
    draw = draws(model, prompts_of(options.prompts, options.prompt), options.new, EOS, PAD)
    compared = compare(draw, options.rounds)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        draw("static")
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    shares = {
        part: sum(spent for name, spent in times.items() if name.startswith(names)) / sum(times.values())
        for part, names in PARTS.items()
    }
    return {
        "size": options.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "prompts": options.prompts,
        **compared,
        "shares_of_static": shares,
    }


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1m")
    parser.add_argument("--prompts", type=int, default=64, help="rows drawn at once")
    parser.add_argument("--prompt", type=int, default=128, help="most tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="limit of a completion")
    parser.add_argument("--length", type=int, default=64, help="mean tokens of a completion without the limit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    found = measure(options)
    low, high = found["ratio_range"]
    shares = ", ".join(f"{part} {share:.0%}" for part, share in found["shares_of_static"].items())
    print(
        f"{found['parameters']:,} weights, {options.prompts} prompts of up to {options.prompt} tokens, completions of "
        f"{found['mean_length']:.0f} on average and up to {options.new}; {options.device}, {found['threads']} threads",
        f"the same completion in {found['agreement']:.1%} of the rows (others differ by rounding)",
        f"static {found['static_tokens_per_s']:,.0f} tokens/s, generate {found['generate_tokens_per_s']:,.0f}: "
        f"{found['ratio']:.2f}x ({low:.2f} to {high:.2f} in {options.rounds} rounds)",
        f"time of static in: {shares}, other operators the rest",
        sep="\n",
    )
    write_json(options.json, found)


if __name__ == "__main__":
    main()
