"""The time of an optimiser step, against TRL's DPOTrainer in the same process, and what each of our speed-ups is worth.

Usage: ``python -m benchmarks.step [--against trl] --size 1m|10m|1b|8b-lora --data hh|alpaca_eval|synthetic
[--rounds N] [--steps N] [--threads N] [--trl-defaults] [--ablation] [--profile] [--json FILE]``

A round is a fit of ``--steps`` optimiser steps by every contestant, in an order shuffled for each round: the same 8
pairs per step as the same token ids, the same initial weights, AdamW, clipping of the gradient, a live reference. Ours
is the training path of ``spo train``: its configuration, data module, LightningModule and Trainer. TRL's is
``DPOTrainer.train``. Both are timed from before the first batch is loaded to the end of the last step, so loading and
whatever lies between steps counts. Copying the weights and making the trainers does not, nor does what is no part of a
step: validation, checkpoints, loggers, and the probe that samples at every log interval to watch ``kl`` and
``entropy`` (its cost is printed by itself).

SPO draws its samples anew every 10 steps. A fit draws them in its first step; the time of that drawing
(``time/sampling_s`` of the record) is taken out of the fit, and a tenth of it is added to each step. What else a first
step does once counts in full, on either side.

The sizes for a GPU also report the peak of device memory of each contestant, and of both DPO steps real tokens per
second and the model FLOP utilisation: of real tokens, unpadded and prompts once, against the measured rate of bfloat16
matrix products. Aimed at: 45% of that rate, 1.5 times TRL on HH, 0.7 of its memory. ``1b`` has float32 weights and
computes in bfloat16 by autocast, ``8b-lora`` has bfloat16 weights; both sides alike.

A ratio is that of two contestants in the same round; shown are the median over the rounds, and the range.
"""

from __future__ import annotations

import argparse
import gc
import statistics as stats
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from torch.autograd import DeviceType
from transformers import AutoConfig

from benchmarks.common import Contestant, Ratio, alternate, environment, show, write_json
from benchmarks.utilisation import Work, forward_flops, matmul_rate
from benchmarks.workloads import FILES, PAIRS, REFRESH_EVERY, SIZES, Clock, Workload, find_data, statistics
from benchmarks.workloads import SPO as SPO_OVERRIDES
from spo.config.compose import compose
from spo.errors import UserError
from spo.stages.prepare import eval_device
from spo.stages.quiet import quiet_libraries
from spo.types import Group, Sequences, Window

WARM_UP = 2
"""Steps of each contestant before the first round."""
DPO, SPO, TRL, TRL_DEFAULTS = "spo: DPO", "spo: SPO", "TRL: DPO", "TRL: DPO, its own defaults"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark that the command line asks for.

    Returns:
        What ``--json`` writes.
    """
    asked = _parser().parse_args(arguments)
    quiet_libraries()
    cache = Path(compose(["model=tiny"], run_dir=".").paths.cache)
    data = find_data(asked.data, cache)
    workload = Workload(SIZES[asked.size], data, asked.steps, asked.threads, cache)
    result = {"size": asked.size, "data": data.name, "rounds": asked.rounds, "steps": asked.steps}
    measure = ablation if asked.ablation else against_trl
    result |= measure(workload, asked) | {"environment": environment()}
    write_json(asked.json, result)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--against", choices=["trl"], default="trl", help="whose step ours is compared with")
    parser.add_argument("--size", choices=SIZES, default="10m", help="of the model, a Llama with random weights")
    parser.add_argument("--data", choices=[*FILES, "synthetic"], default="hh", help="pairs; files from SPO_DATA_DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of each contestant in a round")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--trl-defaults", action="store_true", help="also TRL as it comes: bf16 and checkpointing")
    parser.add_argument("--ablation", action="store_true", help="instead: our steps with each speed-up switched off")
    parser.add_argument("--profile", action="store_true", help="also the share of matrix products in our steps")
    parser.add_argument("--json", metavar="FILE", help="where the result is written")
    return parser


# --- contestants ---------------------------------------------------------------------------------------------------


def ours(workload: Workload, *overrides: str, clocks: list[Clock] | None = None) -> Contestant:
    """Our step with these overrides: seconds per step of a fit on the windows of a round."""

    def measure(number: int) -> float:
        clock = workload.fit(*overrides, seed=number)
        if clocks is not None:
            clocks.append(clock)
        return clock.per_step(workload.steps, REFRESH_EVERY if "method=spo" in overrides else None)

    workload.fit(*overrides, steps=WARM_UP)
    return measure


def trls(workload: Workload, windows: Mapping[int, Any], **settings: Any) -> Contestant:
    """TRL's step on the same windows."""
    from benchmarks.against_trl import train

    train(workload, workload.pairs(windows[0][:WARM_UP]), **settings)
    return lambda number: train(workload, workload.pairs(windows[number]), **settings) / workload.steps


# --- what is measured ----------------------------------------------------------------------------------------------


def against_trl(workload: Workload, asked: argparse.Namespace) -> dict[str, Any]:
    """Agreement first, then the step times of TRL's DPO, our DPO and our SPO."""
    from benchmarks.against_trl import DEFAULTS, agreement

    parts = workload.started("method=dpo")
    windows = {number: workload.windows(parts, seed=number) for number in range(asked.rounds)}
    difference = agreement(workload, parts, windows[0])
    print(f"agreement: log-probs of completion tokens differ by at most {difference:.1e} nats from TRL's")
    facts = statistics([pair for window in windows.values() for pair in workload.pairs(window)])
    parameters = sum(parameter.numel() for parameter in parts.module.policy.parameters())
    del parts
    print(
        f"{parameters:,} parameters; {workload.data.name}: prompts of {facts['prompt_tokens']:.0f} tokens, completions "
        f"of {facts['completion_tokens']:.0f}; {facts['padding_share']:.0%} of a padded batch is padding, "
        f"{facts['prompt_share']:.0%} of the real tokens are the prompt"
    )
    sampled: list[Clock] = []
    contestants = {
        TRL: trls(workload, windows),
        DPO: ours(workload, "method=dpo"),
        SPO: ours(workload, *SPO_OVERRIDES, clocks=sampled),
    }
    if asked.trl_defaults:
        contestants[TRL_DEFAULTS] = trls(workload, windows, **DEFAULTS)
    peaks: dict[str, list[int]] = {name: [] for name in contestants}
    if workload.size.needs_gpu:
        contestants = {name: with_peak(contestant, peaks[name]) for name, contestant in contestants.items()}
    seconds = alternate(contestants, asked.rounds)
    ratios = {
        "ratio_dpo": Ratio.of(seconds[TRL], seconds[DPO]),
        "ratio_spo": Ratio.of(seconds[TRL], seconds[SPO]),
        "spo_over_dpo": Ratio.of(seconds[SPO], seconds[DPO]),
    }
    if asked.trl_defaults:
        ratios["ratio_trl_defaults"] = Ratio.of(seconds[TRL_DEFAULTS], seconds[TRL])
    _show_times(f"seconds per step of {PAIRS} pairs", seconds, TRL)
    for key, ratio in ratios.items():
        print(f"{key}: {ratio}")
    found: dict[str, Any] = {"agreement": difference, "parameters": parameters, **facts}
    for key, ratio in ratios.items():
        found |= ratio.entries(key)
    found |= {
        "trl_step_s": stats.median(seconds[TRL]),
        "dpo_step_s": stats.median(seconds[DPO]),
        "spo_step_s": stats.median(seconds[SPO]),
        "spo_sample_tokens": stats.mean(clock.sample_tokens or 0.0 for clock in sampled),
        "probe_s": probe_seconds(workload),
        "seconds": seconds,
    }
    print(f"not in a step: {found['probe_s']:.2g} s for the probe, once per log interval (probe.num_prompts=0: never)")
    if workload.size.needs_gpu:
        step = real_work(windows)
        found |= on_device(workload, step, {name: stats.median(seconds[name]) for name in (TRL, DPO)})
        found["peak_memory_bytes"] = {name: max(measured) for name, measured in peaks.items()}
        found |= Ratio.of(peaks[DPO], peaks[TRL]).entries("memory_ratio_dpo")
    if asked.profile:
        found |= profile(workload, {"dpo": ("method=dpo",), "spo": SPO_OVERRIDES})
    return found


def with_peak(contestant: Contestant, peaks: list[int]) -> Contestant:
    """The same, which adds the most bytes of device memory that it held to ``peaks``."""

    def measure(number: int) -> float:
        gc.collect()  # what the contestant before it leaves behind
        torch.cuda.reset_peak_memory_stats()
        seconds = contestant(number)
        peaks.append(torch.cuda.max_memory_allocated())
        return seconds

    return measure


def real_work(windows: Mapping[int, Sequence[Window]]) -> list[Work]:
    """What each step has to do, without padding and with each prompt once, whoever does it."""
    return [
        Work.of(group for batch in window for group in _groups(batch.sequences))
        for round_ in windows.values()
        for window in round_
    ]


def _groups(sequences: Sequences) -> tuple[Group, ...]:
    packed = sequences.pack(share_prompts=True).packed
    assert packed is not None
    return packed.groups.members


def on_device(workload: Workload, steps: Sequence[Work], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Real tokens per second, and the share of the measured matrix-product rate that real tokens make use of.

    A DPO step is a forward and a backward pass of the policy and a forward pass of the reference; of frozen weights
    under LoRA no gradient is computed.
    """
    cfg = workload.config("method=dpo")
    rate, config = matmul_rate(eval_device(cfg)), AutoConfig.from_pretrained(workload.folder)
    passes = 3 if workload.prepared.spec.lora is not None else 4
    flops = stats.mean(passes * forward_flops(config, work) for work in steps)
    tokens = stats.mean(work.tokens for work in steps)
    found = {
        "matmul_flops_per_s": rate,
        "tokens_per_s": {name: tokens / time for name, time in seconds.items()},
        "utilisation": {name: flops / time / rate for name, time in seconds.items()},
    }
    rows = [(name, found["tokens_per_s"][name], found["utilisation"][name]) for name in seconds]
    show(f"real tokens, of {rate / 1e12:.3g} TFLOP/s measured", ["", "tokens per s", "utilisation"], rows)
    return found


def probe_seconds(workload: Workload) -> float:
    """What watching kl and entropy costs each time, with the usual 16 samples of 128 tokens."""
    clock = workload.fit("method=dpo", "probe.num_prompts=16", "probe.max_new_tokens=128", steps=1)
    return clock.metrics["time/probe_s"]


def ablation(workload: Workload, asked: argparse.Namespace) -> dict[str, Any]:
    """Our DPO and SPO steps as they come, with each key of the group ``speed`` as in ``speed=plain``, and with all."""
    variants = {"as it comes": [], **speed_ups(), "all switched off": ["speed=plain"]}
    methods = {"DPO": ("method=dpo",), "SPO": SPO_OVERRIDES}
    contestants: dict[str, Contestant] = {}
    for method, overrides in methods.items():
        for name, extra in variants.items():
            contestants[f"{method}, {name}"] = ours(workload, *overrides, *extra)
    seconds = alternate(contestants, asked.rounds)
    found: dict[str, Any] = {}
    for method in methods:
        usual = seconds[f"{method}, as it comes"]
        times = {name: seconds[f"{method}, {name}"] for name in variants}
        slower = {name: Ratio.of(measured, usual) for name, measured in times.items()}
        found[method] = {
            name: {"step_s": stats.median(times[name]), **ratio.entries("slower")} for name, ratio in slower.items()
        }
        rows = [(name, stats.median(times[name]), ratio) for name, ratio in slower.items()]
        show(method, ["", "s per step", "times the default"], rows)
    return {"ablation": found, "seconds": seconds}


def speed_ups() -> dict[str, list[str]]:
    """An override for each key of the group ``speed``: the value that it has in ``speed=plain``."""
    default, plain = (
        OmegaConf.to_container(compose([f"speed={name}"], run_dir=".").speed) for name in ("default", "plain")
    )
    off = {key: value for key, value in plain.items() if default.get(key) != value}
    return {f"{key} off": [f"speed.{key}={yaml.safe_dump(value).split()[0]}"] for key, value in off.items()}


MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def profile(workload: Workload, methods: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The share of matrix products in the time that torch's operators take, over one fit of each method."""
    shares = {}
    for name, overrides in methods.items():
        with torch.profiler.profile() as profiler:
            workload.fit(*overrides)
        events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]  # no kernels
        time = "self_device_time_total" if workload.size.needs_gpu else "self_cpu_time_total"
        spent = {event.key: getattr(event, time) for event in events}
        every = sum(spent.values())
        products = sum(spent.get(key, 0.0) for key in MATRIX_PRODUCTS)
        shares[f"matrix_product_share_{name}"] = products / every
        longest = sorted(spent, key=lambda key: -spent[key])[:8]
        rows = [(key, spent[key] / every) for key in longest]
        show(f"{name}: {products / every:.0%} of the operators' time are matrix products", ["operator", "share"], rows)
    return shares


def _show_times(title: str, seconds: Mapping[str, list[float]], base: str) -> None:
    rows = [
        (name, stats.median(times), min(times), max(times), Ratio.of(seconds[base], times).median)
        for name, times in seconds.items()
    ]
    show(title, ["", "median", "least", "most", f"{base} over it"], rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
