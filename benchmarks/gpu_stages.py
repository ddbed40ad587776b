"""The stages of ``benchmarks.gpu`` that run in its second process."""

from __future__ import annotations

import gc
import statistics as stats
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig

from benchmarks.common import Ratio, shuffled_rounds
from benchmarks.gpu import Report, Settings
from benchmarks.hh_lengths import random_pairs
from benchmarks.sampling import compare, draws, end_after
from benchmarks.utilization import forward_flops, groups_of, matmul_rate, real_work, step_flops
from benchmarks.workloads import REFRESH_EVERY, SIZES, SPO, Workload, environment, find_data, now, statistics
from spo.config.compose import compose
from spo.errors import UserError
from spo.forward.attention import BACK_ENDS, back_ends
from spo.forward.packing import Groups
from spo.stages.from_config import eval_device
from spo.stages.quiet import quiet_libraries
from spo.types import Sequences, pad_sequences

WARM_UP_STEPS = 2
"""First steps of each fit, which do not count: they allocate the optimizer's state and compile kernels."""
TRAIN_PAIRS = 512
SAMPLED_PROMPTS, SAMPLED_TOKENS, MEAN_SAMPLED_TOKENS = 64, 128, 64
ATTENTION_REPEATS = 10


@dataclass(frozen=True)
class Fit:
    """The steps of one fit that count.

    Attributes:
        seconds: Seconds of each step, a share of SPO's drawings included.
        tokens: Real tokens of the pairs of each step, with each prompt once.
        flops: Model FLOPs of each step; those of drawing samples do not count.
        warm_up_s: Seconds of the steps before them.
        peak_bytes: Most device memory that the fit held, or ``None`` on a CPU.
        facts: How the fit computed.
    """

    seconds: list[float]
    tokens: list[int]
    flops: list[int]
    warm_up_s: float
    peak_bytes: int | None
    facts: dict[str, Any]


class Bench:
    """The workload that the stages share, made when it is first needed.

    Args:
        settings: Settings of the stages.

    Raises:
        UserError: The size does not exist or needs another device, or a fit has too few steps.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.size not in SIZES:
            raise UserError(f"--size {settings.size}: choose one of {', '.join(SIZES)}")
        size = SIZES[settings.size]
        if settings.device == "cpu" and size.needs_gpu:
            raise UserError(f"--size {settings.size} needs a GPU: choose --size toy, 1m or 10m")
        if settings.steps <= WARM_UP_STEPS:
            raise UserError(f"--steps {settings.steps}: the first {WARM_UP_STEPS} steps do not count, so it needs more")
        self.settings = settings
        on_gpu: Any = settings.device
        self.size = replace(size, device=on_gpu, pairs=settings.pairs)
        self.windows: dict[int, list[Any]] = {}

    @cached_property
    def workload(self) -> Workload:
        """Make the model folder and the pairs."""
        cache = Path(compose(["model=tiny"], run_dir=".").paths.cache)
        number = max(TRAIN_PAIRS, self.settings.pairs * self.settings.steps)
        pairs = random_pairs(number, self.size.vocabulary, seed=0)
        return Workload(self.size, find_data("synthetic", cache), self.settings.steps, None, cache, pairs)

    @cached_property
    def device(self) -> torch.device:
        """Return the device that trains."""
        return eval_device(self.workload.config("method=dpo"))

    @cached_property
    def model_config(self) -> Any:
        """Return the shape of the model."""
        return AutoConfig.from_pretrained(self.workload.folder)

    @cached_property
    def matmul_flops_per_s(self) -> float:
        """Measure the rate of matrix products."""
        return matmul_rate(self.device)

    def windows_of(self, number: int) -> list[Any]:
        """Return the windows of a round, as a fit is served them but for their layout."""
        if number not in self.windows:
            self.windows[number] = self.workload.windows(self.workload.connected("method=dpo"), seed=number)
        return self.windows[number]

    def facts(self) -> dict[str, Any]:
        """Return what is measured: model, dtypes, lengths."""
        cfg = self.workload.config("method=dpo")
        return {
            "weights": self.size.dtype,
            "precision": cfg.trainer.precision,
            "pairs_per_step": self.size.pairs,
            "matmul_flops_per_s": self.matmul_flops_per_s,
            **statistics(self.workload.pairs(self.windows_of(0)), self.size.pairs),
        }


# --- steps ---------------------------------------------------------------------------------------------------------


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the most bytes of device memory held since, or ``None`` on a CPU."""
    gc.collect()  # frees the memory of the fit before it, which reference cycles hold
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def fit_ours(bench: Bench, number: int, *overrides: str) -> Fit:
    """Fit our method for a round.

    Args:
        bench: Workload of the stages.
        number: Number of the round, which decides the pairs.
        overrides: Overrides of ``spo train``.
    """
    with _peak_memory(bench.device) as peak:
        clock = bench.workload.fit(*overrides, seed=number)
        seconds, held = clock.steps.seconds(), peak()
    fit = _counted(bench, number, seconds, held, clock.facts, reference=clock.facts["uses_reference"])
    if clock.sampled is None:
        return fit
    # Each step forwards the samples and differentiates them; the reference scores them once per drawing.
    forward = forward_flops(bench.model_config, real_work([clock.sampled]))
    more = round(forward * (3 + 1 / REFRESH_EVERY))
    drawing = clock.metrics["time/sampling_s"] / REFRESH_EVERY
    return replace(fit, seconds=[one + drawing for one in fit.seconds], flops=[one + more for one in fit.flops])


def fit_trl(bench: Bench, number: int) -> Fit:
    """Fit TRL's DPO for a round, on the same pairs in the same order."""
    from benchmarks.against_trl import train  # TRL is optional

    pairs = bench.workload.pairs(bench.windows_of(number))
    with _peak_memory(bench.device) as peak:
        seconds, held = train(bench.workload, pairs), peak()
    return _counted(bench, number, seconds, held, {}, reference=True)


def _counted(
    bench: Bench, number: int, seconds: list[float], peak: int | None, facts: dict[str, Any], reference: bool
) -> Fit:
    works = [real_work([batch.sequences for batch in window]) for window in bench.windows_of(number)][WARM_UP_STEPS:]
    frozen = bench.workload.prepared.spec.lora is not None
    flops = [step_flops(bench.model_config, work, reference=reference, frozen=frozen) for work in works]
    tokens = [work.tokens for work in works]
    return Fit(seconds[WARM_UP_STEPS:], tokens, flops, sum(seconds[:WARM_UP_STEPS]), peak, facts)


def summary(fits: Sequence[Fit], matmul_flops_per_s: float) -> dict[str, Any]:
    """Return medians and ranges over the steps of all fits, tokens per second, utilization and peak memory."""
    seconds = [one for fit in fits for one in fit.seconds]
    tokens, flops = (sum(one for fit in fits for one in getattr(fit, name)) for name in ("tokens", "flops"))
    peaks = [fit.peak_bytes for fit in fits if fit.peak_bytes is not None]
    return {
        "rounds": len(fits),
        "step_s": stats.median(seconds),
        "step_s_range": [min(seconds), max(seconds)],
        "warm_up_s": [fit.warm_up_s for fit in fits],
        "tokens_per_s": tokens / sum(seconds),
        "utilization": flops / sum(seconds) / matmul_flops_per_s,
        "peak_bytes": max(peaks, default=None),
        **fits[-1].facts,
        "seconds": [fit.seconds for fit in fits],
    }


def compare_fits(
    bench: Bench,
    contestants: Mapping[str, Callable[[Bench, int], Fit]],
    ratios: Mapping[str, tuple[str, str]],
    fallbacks: Mapping[str, tuple[str, Callable[[Bench, int], Fit]]],
    report: Report,
    until: float,
) -> dict[str, Any]:
    """Let contestants fit in alternating rounds.

    A contestant that fails is skipped from then on with its error, and the others continue.

    Args:
        bench: Workload of the stages.
        contestants: Functions from the bench and the number of a round to a fit.
        ratios: Names of the ratios, with the contestants whose seconds are divided.
        fallbacks: For a contestant, the name and the function of one that takes its place if it fails.
        report: Function that is given the result after each fit.
        until: Time of ``time.monotonic`` after which no further fit begins.

    Raises:
        RuntimeError: No contestant has a fit.
    """
    running = dict(contestants)
    fits: dict[str, dict[int, Fit]] = {name: {} for name in contestants}
    arms: dict[str, Any] = {}
    result: dict[str, Any] = {**bench.facts(), "arms": arms}
    report(result)

    def attempt(name: str, number: int) -> None:
        try:
            fits.setdefault(name, {})[number] = running[name](bench, number)
        except ModuleNotFoundError as error:
            arms[name] = {"status": "skipped", "error": f"{error.name} is not installed"}
        except Exception as error:
            arms[name] = {**arms.get(name, {}), "status": "failed", "error": words_of(error)}
        else:
            arms[name] = {"status": "done", **summary(list(fits[name].values()), bench.matmul_flops_per_s)}
        if arms[name]["status"] != "done":
            del running[name]
            if name in fallbacks and not fits[name]:
                other, function = fallbacks[name]
                running[other] = function
                attempt(other, number)

    # The contestants stand in order of value, and the first round keeps that order in case that time ends early.
    order = [(0, name) for name in contestants]
    order += [(i, name) for i, name in shuffled_rounds(contestants, bench.settings.rounds) if i > 0]
    longest = 0.0  # seconds of the longest fit so far
    for number, name in order:
        name = name if name in running else fallbacks.get(name, ("",))[0]
        if name not in running:
            continue
        if any(fits.values()) and monotonic() + (longest if number > 0 else 0) > until:
            break
        started = monotonic()
        attempt(name, number)
        longest = max(longest, monotonic() - started)
        for key, pair in ratios.items():
            result |= _ratio(key, *(fits.get(one, {}) for one in pair))
        report(result)
    if not any(fits.values()):
        raise RuntimeError("; ".join(f"{name}: {arm['error']}" for name, arm in arms.items()))
    return result


def _ratio(key: str, numerators: Mapping[int, Fit], denominators: Mapping[int, Fit]) -> dict[str, Any]:
    rounds = sorted(numerators.keys() & denominators.keys())
    if not rounds:
        return {}
    means = ([stats.mean(fits[number].seconds) for number in rounds] for fits in (numerators, denominators))
    return Ratio.of(*means).entries(key)


def words_of(error: BaseException) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]


def steps(bench: Bench, report: Report, until: float) -> dict[str, Any]:
    """Measure steps of DPO and SPO here and of TRL's DPO."""
    contestants: dict[str, Callable[[Bench, int], Fit]] = {
        "spo: DPO": partial(_method, ("method=dpo",)),
        "TRL: DPO": fit_trl,
        "spo: SPO": partial(_method, SPO),
    }
    # Packed rows run attention of our own, which may fail on a device where it never ran.
    fallbacks = {
        f"spo: {name}": (f"spo: {name}, padded", partial(_method, (*overrides, "speed.packing=false")))
        for name, overrides in {"DPO": ("method=dpo",), "SPO": SPO}.items()
    }
    ratios = {
        "ratio_dpo": ("TRL: DPO", "spo: DPO"),
        "ratio_spo": ("TRL: DPO", "spo: SPO"),
        "spo_over_dpo": ("spo: SPO", "spo: DPO"),
    }
    return compare_fits(bench, contestants, ratios, fallbacks, report, until)


def _method(overrides: Sequence[str], bench: Bench, number: int) -> Fit:
    return fit_ours(bench, number, *overrides)


def compiled(bench: Bench, report: Report, until: float) -> dict[str, Any]:
    """Measure DPO steps with compiled blocks and without; the steps that warm up include the compilation."""
    contestants: dict[str, Callable[[Bench, int], Fit]] = {
        f"compile={value}": partial(_method, ("method=dpo", f"speed.compile={value}")) for value in ("false", "true")
    }
    return compare_fits(bench, contestants, {"ratio": ("compile=false", "compile=true")}, {}, report, until)


# --- sampler -------------------------------------------------------------------------------------------------------


def sampler(bench: Bench, report: Report, until: float) -> dict[str, Any]:
    """Compare the samplers on prompts of HH lengths, with the model of the steps."""
    prepared = bench.workload.prepared
    model = prepared.spec.start(prepared.base).to(bench.device)
    eos, pad = prepared.tokenizer.eos_token_id, prepared.tokenizer.pad_token_id
    end_after(model, MEAN_SAMPLED_TOKENS, eos)
    prompts = [pair.prompt_ids for pair in prepared.pairs.train[:SAMPLED_PROMPTS]]
    facts = {"prompts": len(prompts), "max_new_tokens": SAMPLED_TOKENS}
    draw = draws(model, prompts, SAMPLED_TOKENS, eos, pad)
    return facts | compare(draw, bench.settings.rounds, lambda result: report(facts | result), until)


# --- attention -----------------------------------------------------------------------------------------------------


def attention(bench: Bench, report: Report, until: float) -> dict[str, Any]:
    """Compare packed attention with padded SDPA, forward and backward, on the shapes of one layer and one step.

    Differences are relative to the largest entry of SDPA in float32. Those of SDPA itself in the dtype of the model
    show how much of them is rounding. On a CPU FlexAttention has no backward pass, so the forward pass is all.
    """
    config, device = bench.model_config, bench.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pairs = bench.workload.pairs(bench.windows_of(0)[:1])
    rows = [(pair.prompt_ids, ids) for pair in pairs for ids in pair.completions]
    layout = Layout.of(pad_sequences(rows, pad_token_id=0), device)
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, layout.tokens, width, generator=generator).to(device) for _ in range(4)]
    exact = _outputs(layout.padded_attention, [one.to(dtype).float() for one in tensors], backward=True)
    result: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "heads": heads,
        "head_width": width,
        "packed_tokens": layout.tokens,
        "padded_tokens": layout.rows.numel(),
        "variants": {},
    }
    in_dtype = [one.to(dtype) for one in tensors]
    own = layout.padded_rows(in_dtype)
    variants: dict[str, tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]] = {
        "sdpa, padded": (layout.padded_attention, in_dtype, own),
        **{
            f"{name}, packed": (partial(BACK_ENDS[name], groups=layout.groups, scale=None), in_dtype, in_dtype)
            for name in dict.fromkeys([*back_ends(device), "flex"])
        },
    }
    # Autocast leaves queries and keys in float32, where rotary embeddings put them, and values in bfloat16.
    mixed = [tensors[0].float(), tensors[1].float(), tensors[2].bfloat16(), tensors[3]]

    def autocast_flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return BACK_ENDS["flex"](query, key, value, groups=layout.groups, scale=None)

    variants["flex, packed, dtypes of autocast"] = (autocast_flex, mixed, mixed)
    for name, (function, compared, timed) in variants.items():
        if monotonic() > until:
            result["variants"][name] = {"status": "skipped", "error": "out of time"}
            continue
        backward = device.type == "cuda" or not name.startswith("flex")
        try:
            differences = _differences(_outputs(function, compared, backward), exact)
            result["variants"][name] = {"status": "done", **differences}
            attend = _causal if name == "sdpa, padded" else function
            result["variants"][name] |= _times(attend, timed, backward)
        except Exception as error:
            entries = result["variants"].get(name, {})
            result["variants"][name] = {**entries, "status": "failed", "error": words_of(error)}
        report(result)
    if result["variants"]["sdpa, padded"]["status"] == "failed":
        raise RuntimeError(result["variants"]["sdpa, padded"]["error"])
    return result


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a packed row are in the padded rows of the same sequences.

    Attributes:
        groups: Groups of the packed row, each a prompt with its completions.
        rows: ``(N, T)`` places in the packed row of the tokens of the padded rows; 0 at padding.
        places: ``(L,)`` places in the flattened padded rows of the tokens of the packed row.
    """

    groups: Groups
    rows: Tensor
    places: Tensor

    @classmethod
    def of(cls, sequences: Sequences, device: torch.device) -> Layout:
        """Return the layout of sequences in which those with the same prompt stand one after the other."""
        members = groups_of(sequences)
        width = sequences.input_ids.shape[1]
        rows: list[list[int]] = []
        places: list[int] = []
        start = 0
        for group in members:
            prompt = list(range(start, start + group.prompt))
            places += [len(rows) * width + i for i in range(group.prompt)]
            end = start + group.prompt
            for length in group.completions:
                places += [len(rows) * width + group.prompt + i for i in range(length)]
                row = [*prompt, *range(end, end + length)]
                rows.append(row + [0] * (width - len(row)))
                end += length
            start = end
        return cls(Groups(members), torch.tensor(rows, device=device), torch.tensor(places, device=device))

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the packed row."""
        return len(self.places)

    def padded_rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return ``(1, H, L, d)`` tensors of the packed row as ``(N, H, T, d)`` of the padded rows."""
        return [tensor[0][:, self.rows].transpose(0, 1) for tensor in tensors]

    def padded_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in padded rows to ``(1, H, L, d)`` tensors of the packed row, and return the output packed."""
        out = _causal(*self.padded_rows([query, key, value]))
        return out.transpose(0, 1).flatten(1, 2)[None, :, self.places]


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def _outputs(function: Callable[..., Tensor], tensors: Sequence[Tensor], backward: bool) -> dict[str, Tensor]:
    """Return the output of attention, and the gradients of its product with the last tensor, in float32."""
    *inputs, weights = (tensor.detach() for tensor in tensors)
    inputs = [tensor.requires_grad_(backward) for tensor in inputs]
    out = function(*inputs)
    found = {"output": out}
    if backward:
        gradients = torch.autograd.grad(out, inputs, weights.to(out.dtype))
        found |= zip(("query_gradient", "key_gradient", "value_gradient"), gradients, strict=True)
    return {name: tensor.detach().float() for name, tensor in found.items()}


def _differences(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        f"{name}_difference": float((tensor - exact[name]).abs().max() / exact[name].abs().max())
        for name, tensor in found.items()
    }


def _times(function: Callable[..., Tensor], tensors: Sequence[Tensor], backward: bool) -> dict[str, float]:
    """Return the median seconds of a forward pass and of a backward pass, warmed up."""
    *inputs, weights = (tensor.detach().contiguous() for tensor in tensors)
    inputs = [tensor.requires_grad_(backward) for tensor in inputs]
    seconds: dict[str, list[float]] = {"forward_s": [], "backward_s": []}
    for _ in range(ATTENTION_REPEATS + 1):
        started = now()
        out = function(*inputs)
        middle = now()
        seconds["forward_s"].append(middle - started)
        if backward:
            torch.autograd.grad(out, inputs, weights.to(out.dtype))
            seconds["backward_s"].append(now() - middle)
    return {name: stats.median(times[1:]) for name, times in seconds.items() if times}


# --- the process ---------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Bench, Report, float], dict[str, Any]]] = {
    "steps": steps,
    "sampler": sampler,
    "attention": attention,
    "compile": compiled,
}


def serve(connection: Connection, settings: Settings) -> None:
    """Run the stages that the connection names until it closes; see ``benchmarks.gpu.Worker``."""
    quiet_libraries()
    connection.send(("environment", environment()))
    bench: Bench | None = None
    refusal: Exception | None = None
    try:
        bench = Bench(settings)
        # Make model and pairs while the tests run. The rate of the device is measured later, when they have ended.
        bench.windows_of(0)
    except Exception as error:
        refusal = error
    while True:
        try:
            stage, seconds = connection.recv()
        except EOFError:
            return
        until = monotonic() + seconds
        try:
            if refusal is not None:
                raise refusal
            assert bench is not None
            result = STAGES[stage](bench, lambda partial: connection.send(("partial", partial)), until)
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else words_of(error)
            connection.send(("failed", message))
        else:
            connection.send(("done", result))
