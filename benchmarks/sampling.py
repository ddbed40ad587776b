"""Tokens per second of the static sampler against Hugging Face's generate, which draw the same completions.

Usage: ``python -m benchmarks.sampling [--size 1m|10m] [--json FILE]`` (``--help`` lists the rest)

Both draw from one Llama with random weights, for the same prompts, seeds and limit, in turns of shuffled order. Its
end-of-text has a bias in the head, so that completions have lengths as those of a trained model do: geometric, with
mean ``--length``, and cut at ``--new``. A token counts where it belongs to a completion.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from spo.sampling import derive_seed, sample
from spo.types import Sequences

Sampler = Literal["static", "generate"]
SAMPLERS: tuple[Sampler, ...] = ("static", "generate")
VOCAB, BOS, EOS, PAD = 8192, 1, 2, 0
SIZES = {"1m": (96, 2), "10m": (256, 8)}
"""Hidden size and layers."""
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "drawing a token": ("aten::exp", "aten::cumsum", "aten::searchsorted", "aten::amax", "aten::sub"),
}
"""What a profile is summed up by: the beginnings of operators' names."""


def build(size: str, length: int, seed: int = 0) -> nn.Module:
    """A Llama of about ``size`` weights, whose completions have ``length`` tokens on average."""
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
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCAB))
    model.lm_head.bias.data[EOS] = math.log(VOCAB / length)  # the weights leave the other tokens about equally likely
    return model.requires_grad_(False)


def prompts_of(number: int, most: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, a quarter of ``most`` to ``most`` of them."""
    rng = random.Random(seed)
    sizes = [rng.randint(max(most // 4, 1), most) for _ in range(number)]
    return [[BOS, *(rng.randrange(3, VOCAB) for _ in range(size - 1))] for size in sizes]


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Draws with both; the numbers of the JSON file."""
    model = build(options.size, options.length).to(options.device)
    prompts = prompts_of(options.prompts, options.prompt)
    seeds = [derive_seed("benchmark", row) for row in range(len(prompts))]

    def draw(sampler: Sampler) -> tuple[float, Sequences]:
        started = time.perf_counter()
        drawn = sample(
            model,
            prompts,
            max_new_tokens=options.new,
            temperature=1.0,
            eos_token_id=EOS,
            pad_token_id=PAD,
            seeds=seeds,
            sampler=sampler,
        )
        tokens = int(drawn.completion_length.sum())  # waits for the device
        return tokens / (time.perf_counter() - started), drawn

    warm = {sampler: draw(sampler)[1] for sampler in SAMPLERS}
    same = [a == b for a, b in zip(*(drawn.completions() for drawn in warm.values()), strict=True)]
    speeds: dict[str, list[float]] = {sampler: [] for sampler in SAMPLERS}
    rng = random.Random(0)
    for _ in range(options.rounds):
        for sampler in rng.sample(SAMPLERS, k=len(SAMPLERS)):
            speeds[sampler].append(draw(sampler)[0])
    ratios = [ours / theirs for ours, theirs in zip(speeds["static"], speeds["generate"], strict=True)]
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
        "mean_length": float(warm["static"].completion_length.float().mean()),
        "rounds": options.rounds,
        "agreement": sum(same) / len(same),
        "static_tokens_per_s": statistics.median(speeds["static"]),
        "generate_tokens_per_s": statistics.median(speeds["generate"]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "shares_of_static": shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1m")
    parser.add_argument("--prompts", type=int, default=64, help="rows drawn at once")
    parser.add_argument("--prompt", type=int, default=128, help="most tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="limit of a completion")
    parser.add_argument("--length", type=int, default=64, help="mean tokens of a completion without the limit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="writes the numbers there")
    options = parser.parse_args()
    found = measure(options)
    low, high = found["ratio_range"]  # type: ignore[misc]
    shares = ", ".join(f"{part} {share:.0%}" for part, share in found["shares_of_static"].items())  # type: ignore[attr-defined]
    print(
        f"{found['parameters']:,} weights, {options.prompts} prompts of up to {options.prompt} tokens, completions of "
        f"{found['mean_length']:.0f} on average and up to {options.new}; {options.device}, {found['threads']} threads",
        f"the same completion in {found['agreement']:.1%} of the rows (others differ by rounding)",
        f"static {found['static_tokens_per_s']:,.0f} tokens/s, generate {found['generate_tokens_per_s']:,.0f}: "
        f"{found['ratio']:.2f}x ({low:.2f} to {high:.2f} in {options.rounds} rounds)",
        f"time of static in: {shares}, other operators the rest",
        sep="\n",
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
