"""Time of an optimizer step against TRL's DPOTrainer in the same process, and the worth of each of our speed-ups.

Usage: ``python -m benchmarks.step [--against trl] --size 1m|10m|1b|1b-bf16|8b-lora --data hh|alpaca_eval|synthetic
[--rounds N] [--steps N] [--threads N] [--trl-defaults] [--ablation | --methods all|NAME,...] [--profile]
[--json FILE]``

In a round every contestant makes a fit of ``--steps`` optimizer steps, in an order that differs between rounds. All of
them have the same 8 pairs per step as the same token ids, the same initial weights, AdamW, clipping of the gradient and
a live reference. Our side is the training path of ``spo train``: its configuration, data module, LightningModule and
Trainer. TRL's side is ``DPOTrainer.train``. The clock runs from before the first batch is loaded to the end of the last
step. Copying the weights and making the trainers does not count. Nor do validation, checkpoints, loggers, and the probe
that samples at every log interval to watch ``kl`` and ``entropy``, whose cost is printed by itself.

SPO draws its samples anew every 10 steps, and a fit draws in its first step. The time of that drawing
(``time/sampling_s`` of the record) is taken out of the fit, and a tenth of it is added to each step. Other costs of a
first step count in full, on either side.

The sizes for a GPU also report the peak of device memory of each contestant. For both DPO steps they report real tokens
per second and the model FLOP utilization of real tokens (without padding, each prompt once) against the measured rate
of bfloat16 matrix products. The targets are 45% of that rate, 1.5 times TRL on HH, and 0.7 of its memory. ``1b`` has
float32 weights, ``1b-bf16`` and ``8b-lora`` have bfloat16 weights. All three compute under bfloat16 autocast, on both
sides.

A ratio compares two contestants in the same round. The benchmark shows the median over the rounds and the range.
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
from torch.autograd import DeviceType
from transformers import AutoConfig

from benchmarks.common import Contestant, Ratio, alternate, show, write_json
from benchmarks.methods import compare_methods
from benchmarks.utilization import Work, matmul_rate, real_work, step_flops
from benchmarks.workloads import FILES, REFRESH_EVERY, SIZES, Clock, Workload, environment, find_data, statistics
from benchmarks.workloads import SPO as SPO_OVERRIDES
from spo.config.compose import compose
from spo.errors import UserError
from spo.stages.from_config import eval_device
from spo.stages.quiet import quiet_libraries

WARM_UP_STEPS = 2
"""Steps of each contestant before the first round."""
DPO, SPO, TRL, TRL_DEFAULTS = "spo: DPO", "spo: SPO", "TRL: DPO", "TRL: DPO, its own defaults"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark that the command line asks for.

    Returns:
        The result that ``--json`` writes.
    """
    asked = _parser().parse_args(arguments)
    quiet_libraries()
    cache = Path(compose(["model=tiny"], run_dir=".").paths.cache)
    if asked.methods:
        facts = {"size": asked.size, "data": asked.data, "rounds": asked.rounds, "steps": asked.steps}
        result = facts | compare_methods(SIZES[asked.size], asked, cache) | {"environment": environment()}
        write_json(asked.json, result)
        return result
    data = find_data(asked.data, cache)
    workload = Workload(SIZES[asked.size], data, asked.steps, asked.threads, cache)
    result = {"size": asked.size, "data": data.name, "rounds": asked.rounds, "steps": asked.steps}
    measure = ablation if asked.ablation else against_trl
    result |= measure(workload, asked) | {"environment": environment()}
    write_json(asked.json, result)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--against", choices=["trl"], default="trl", help="trainer that ours is compared with")
    parser.add_argument("--size", choices=SIZES, default="10m", help="size of the model, a Llama with random weights")
    parser.add_argument(
        "--data", choices=[*FILES, "synthetic"], default="hh", help="data set; files are in SPO_DATA_DIR"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of each contestant in a round")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--trl-defaults", action="store_true", help="also TRL as it comes: bf16 and checkpointing")
    parser.add_argument("--ablation", action="store_true", help="instead: our steps with each speed-up switched off")
    parser.add_argument("--methods", metavar="all|NAME,...", help="instead: the steps of methods, over DPO's")
    parser.add_argument("--profile", action="store_true", help="also the share of matrix products in our steps")
    parser.add_argument("--json", metavar="FILE", help="file for the result")
    return parser


# --- contestants ---------------------------------------------------------------------------------------------------


def ours(workload: Workload, *overrides: str, clocks: list[Clock] | None = None) -> Contestant:
    """Return the contestant of our step with these overrides: seconds per step, on the windows of a round."""

    def measure(number: int) -> float:
        clock = workload.fit(*overrides, seed=number)
        if clocks is not None:
            clocks.append(clock)
        return clock.per_step(workload.steps, REFRESH_EVERY if "method=spo" in overrides else None)

    workload.fit(*overrides, steps=WARM_UP_STEPS)
    return measure


def trls(workload: Workload, windows: Mapping[int, Any], **settings: Any) -> Contestant:
    """Return the contestant of TRL's step on the same windows."""
    from benchmarks.against_trl import train

    train(workload, workload.pairs(windows[0][:WARM_UP_STEPS]), **settings)
    return lambda number: sum(train(workload, workload.pairs(windows[number]), **settings)) / workload.steps


# --- what is measured ----------------------------------------------------------------------------------------------


def against_trl(workload: Workload, asked: argparse.Namespace) -> dict[str, Any]:
    """Check that both sides agree, then measure the steps of TRL's DPO, our DPO and our SPO."""
    from benchmarks.against_trl import DEFAULTS, agreement

    parts = workload.started("method=dpo")
    windows = {number: workload.windows(parts, seed=number) for number in range(asked.rounds)}
    difference = agreement(workload, parts, windows[0])
    print(f"agreement: log-probs of completion tokens differ by at most {difference:.1e} nats from TRL's")
    every = [pair for window in windows.values() for pair in workload.pairs(window)]
    facts = statistics(every, workload.size.pairs)
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
    _show_times(f"seconds per step of {workload.size.pairs} pairs", seconds, TRL)
    for key, ratio in ratios.items():
        print(f"{key}: {ratio}")
    found: dict[str, Any] = {"agreement": difference, "parameters": parameters, **facts}
    for key, ratio in ratios.items():
        found |= ratio.entries(key)
    found |= {
        "trl_step_s": stats.median(seconds[TRL]),
        "dpo_step_s": stats.median(seconds[DPO]),
        "spo_step_s": stats.median(seconds[SPO]),
        "spo_sample_tokens": stats.mean(_sample_tokens(clock) for clock in sampled),
        "probe_s": probe_seconds(workload),
        "seconds": seconds,
    }
    print(f"not in a step: {found['probe_s']:.2g} s for the probe, once per log interval (probe.num_prompts=0: never)")
    if workload.size.needs_gpu:
        step = [real_work([batch.sequences for batch in window]) for round_ in windows.values() for window in round_]
        found |= on_device(workload, step, {name: stats.median(seconds[name]) for name in (TRL, DPO)})
        found["peak_memory_bytes"] = {name: max(measured) for name, measured in peaks.items()}
        found |= Ratio.of(peaks[DPO], peaks[TRL]).entries("memory_ratio_dpo")
    if asked.profile:
        found |= profile(workload, {"dpo": ("method=dpo",), "spo": SPO_OVERRIDES})
    return found


def with_peak(contestant: Contestant, peaks: list[int]) -> Contestant:
    """Return a contestant that also appends the most bytes of device memory that it held to ``peaks``."""

    def measure(number: int) -> float:
        gc.collect()  # frees the memory of the contestant before it
        torch.cuda.reset_peak_memory_stats()
        seconds = contestant(number)
        peaks.append(torch.cuda.max_memory_allocated())
        return seconds

    return measure


def _sample_tokens(clock: Clock) -> float:
    return 0.0 if clock.sampled is None else float(clock.sampled.completion_length.float().mean())


def on_device(workload: Workload, steps: Sequence[Work], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return real tokens per second of DPO steps, and the share of the measured rate that these tokens make use of.

    Args:
        workload: Model that takes the steps.
        steps: Work of a forward pass of each step.
        seconds: Seconds per step of each contestant.
    """
    cfg = workload.config("method=dpo")
    rate, config = matmul_rate(eval_device(cfg)), AutoConfig.from_pretrained(workload.folder)
    frozen = workload.prepared.spec.lora is not None
    flops = stats.mean(step_flops(config, work, reference=True, frozen=frozen) for work in steps)
    tokens = stats.mean(work.tokens for work in steps)
    speeds = {name: tokens / time for name, time in seconds.items()}
    shares = {name: flops / time / rate for name, time in seconds.items()}
    rows = [(name, speeds[name], shares[name]) for name in seconds]
    show(f"real tokens, of {rate / 1e12:.3g} TFLOP/s measured", ["", "tokens per s", "utilization"], rows)
    return {"matmul_flops_per_s": rate, "tokens_per_s": speeds, "utilization": shares}


def probe_seconds(workload: Workload) -> float:
    """Measure the seconds that it takes to watch kl and entropy once, with the usual 16 samples of 128 tokens."""
    clock = workload.fit("method=dpo", "probe.num_prompts=16", "probe.max_new_tokens=128", steps=1)
    return clock.metrics["time/probe_s"]


def ablation(workload: Workload, asked: argparse.Namespace) -> dict[str, Any]:
    """Measure our steps as they come, with each key of the group ``speed`` as in ``speed=plain``, and with all so."""
    variants: dict[str, list[str]] = {"as it comes": [], **speed_ups(), "all switched off": ["speed=plain"]}
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
    """Return an override for each key of the group ``speed``, with its value in ``speed=plain``."""
    default, plain = (compose([f"speed={name}"], run_dir=".").speed for name in ("default", "plain"))
    off = {str(key): value for key, value in plain.items() if default.get(key) != value}
    return {f"{key} off": [f"speed.{key}={yaml.safe_dump(value).split()[0]}"] for key, value in off.items()}


MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def profile(workload: Workload, methods: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the share of matrix products in the time of torch's operators, over one fit of each method."""
    shares = {}
    for name, overrides in methods.items():
        with torch.profiler.profile() as profiler:
            workload.fit(*overrides)
        # Kernels have entries of their own in addition to the operators that launch them, and would count twice.
        events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
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
