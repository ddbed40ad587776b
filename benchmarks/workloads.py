"""Data, models of a stated size, and fits on the training path of ``spo train``, for the step benchmarks."""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spo.config.checks import check_config
from spo.config.compose import compose
from spo.data import FileSource, HHSource, Row, TokenizedPair, eval_prompts
from spo.errors import UserError
from spo.forward.head import base_model
from spo.models.tiny import BOS, EOS, PAD
from spo.records.cache import build_alone, cached
from spo.records.digests import path_digest
from spo.stages.assemble import Parts, assemble
from spo.stages.pairs import no_completer
from spo.stages.prepare import Prepared, prepare_run
from spo.types import Sequences, Window

PAIRS_PER_STEP = 8
MAX_LENGTH = 512
"""Most tokens of a prompt with its completion; longer pairs are dropped."""
VOCABULARY = 8192
"""Tokens of the tokenizer, which is trained on the text of the data."""
FILES = {"hh": "hh_rlhf_harmless_base.part1.jsonl.gz", "alpaca_eval": "alpaca_eval_pairs.train.jsonl.gz"}


# --- the data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Preference pairs in a file that both sides read.

    Attributes:
        name: Name of the data set, or ``synthetic`` if its file is absent.
        path: File of the pairs.
    """

    name: str
    path: Path

    @property
    def overrides(self) -> list[str]:
        """Return the overrides with which ``spo train`` reads the file."""
        group = "hh" if self.name == "hh" else "jsonl"
        return [f"data={group}", f"data.path='{self.path}'", "data.on_bad_row=skip"]

    def rows(self) -> list[Row]:
        """Read the pairs as text."""
        path = str(self.path)
        source = HHSource(path, "skip") if self.name == "hh" else FileSource(path, None, "skip")
        return source.rows(no_completer)

    def texts(self) -> Iterable[str]:
        """Yield the text that the tokenizer is trained on."""
        for row in self.rows():
            yield f"{row.prompt}{row.chosen}"
            yield str(row.rejected)


def data_dir() -> Path:
    """Return the folder of the published pairs: ``SPO_DATA_DIR``, by default ``../shared/data`` next to the project."""
    return Path(os.environ.get("SPO_DATA_DIR", Path(__file__).parents[1] / "../shared/data")).resolve()


def find_data(name: str, cache: Path) -> Data:
    """Return the named data set, or made-up pairs with the lengths of HH and a message if its file is absent."""
    if name in FILES:
        path = data_dir() / FILES[name]
        if path.is_file():
            return Data(name, path)
        print(f"{FILES[name]} is not in SPO_DATA_DIR: using made-up pairs with the lengths of HH")
    return Data(
        "synthetic",
        cached(cache, "benchmark_pairs", {"lengths": asdict(HH), "seed": 0}, build_alone(HH.write)) / "x.jsonl",
    )


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens, each given by the mean and the standard deviation of its logarithm.

    Attributes:
        prompt: Lengths of prompts.
        completion: Lengths of completions. Prompt, chosen and rejected are independent of each other.
        pairs: Number of pairs to make.
    """

    prompt: tuple[float, float]
    completion: tuple[float, float]
    pairs: int = 1000

    def write(self, folder: Path) -> None:
        """Write made-up pairs as ``x.jsonl``, in words of a small language that become one token each."""
        generator = random.Random(0)
        words = [" " + "".join(generator.choices("aeioubdfgklmnprstvz", k=5)) for _ in range(2000)]

        def text(lengths: tuple[float, float]) -> str:
            return "".join(generator.choices(words, k=max(round(generator.lognormvariate(*lengths)), 1)))

        with (folder / "x.jsonl").open("w") as file:
            for _ in range(self.pairs):
                row = {"prompt": text(self.prompt), "chosen": text(self.completion), "rejected": text(self.completion)}
                file.write(json.dumps(row) + "\n")


HH = Lengths(prompt=(4.5, 0.9), completion=(3.4, 0.9))
"""A fit to the HH pairs that are used here: 8192 tokens of vocabulary, at most 512 tokens."""


def statistics(pairs: Sequence[TokenizedPair], batch_size: int = PAIRS_PER_STEP) -> dict[str, float]:
    """Return mean lengths in tokens, the share of padding in padded batches, and the prompts' share of real tokens.

    Args:
        pairs: Pairs in the order of the batches.
        batch_size: Number of pairs in a batch.
    """
    lengths = [(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids or ())) for p in pairs]
    real = padded = 0
    for first in range(0, len(lengths), batch_size):
        batch = lengths[first : first + batch_size]
        real += sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in batch)
        padded += 2 * len(batch) * max(prompt + max(chosen, rejected) for prompt, chosen, rejected in batch)
    prompts, chosen, rejected = (sum(column) for column in zip(*lengths, strict=True))
    return {
        "prompt_tokens": prompts / len(pairs),
        "completion_tokens": (chosen + rejected) / (2 * len(pairs)),
        "padding_share": 1 - real / padded,
        "prompt_share": 2 * prompts / real,
    }


# --- the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The shape of a Llama, and how it is trained.

    Attributes:
        hidden: Width of the hidden states.
        intermediate: Width of the feed-forward layers.
        layers: Number of blocks.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        tied: Whether input and output share one embedding matrix.
        vocabulary: Rows of the embedding matrix.
        dtype: Name of the torch dtype of the weights.
        config_group: Member of the config group ``model``.
        device: Device that trains it. A GPU trains with bfloat16 autocast, a CPU in float32.
        pairs: Preference pairs of an optimizer step.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    vocabulary: int = VOCABULARY
    dtype: str = "float32"
    config_group: str = "hf"
    device: Literal["cpu", "gpu"] = "cpu"
    pairs: int = PAIRS_PER_STEP

    @property
    def needs_gpu(self) -> bool:
        """Return whether it is trained on a GPU."""
        return self.device == "gpu"

    @property
    def overrides(self) -> list[str]:
        """Return the overrides of ``spo train`` for this size."""
        return [
            f"model={self.config_group}",
            f"model.dtype={self.dtype}",
            f"trainer={self.device}",
            "trainer.devices=1",
            f"data.batch_size={self.pairs}",
        ]

    def model(self) -> LlamaForCausalLM:
        """Build the model with random weights, always the same ones on one kind of device."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            dtype=self.dtype,
        )
        with torch.random.fork_rng(), torch.device("cuda" if self.needs_gpu else "cpu"):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).to(getattr(torch, self.dtype))


SIZES = {
    "toy": Size(32, 64, 2, 2, 2, tied=True, vocabulary=512),
    "1m": Size(64, 192, 8, 4, 4, tied=True),
    "10m": Size(256, 688, 8, 4, 4, tied=False),
    "1b": Size(2048, 8192, 16, 32, 8, tied=True, vocabulary=128256, device="gpu"),
    "1b-bf16": Size(2048, 8192, 16, 32, 8, tied=True, vocabulary=128256, dtype="bfloat16", device="gpu"),
    "8b-lora": Size(4096, 14336, 32, 32, 8, False, 128256, "bfloat16", "hf_lora", device="gpu"),
}
"""``1b`` and ``1b-bf16`` have the shape of Llama-3.2-1B, ``8b-lora`` that of Llama-3.1-8B."""


def model_folder(size: Size, data: Data, cache: Path) -> Path:
    """Return a Hugging Face folder with random weights of a size and a tokenizer trained on the text of the data."""

    def build(folder: Path) -> None:
        train_tokenizer(data.texts(), min(size.vocabulary, VOCABULARY)).save_pretrained(folder)
        size.model().save_pretrained(folder)

    shape = asdict(replace(size, pairs=PAIRS_PER_STEP))  # the weights do not depend on the pairs of a step
    return cached(cache, "benchmark_models", {"size": shape, "data": path_digest(data.path)}, build_alone(build))


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most ``vocabulary`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [BOS, EOS, PAD]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


# --- the training path ---------------------------------------------------------------------------------------------


def now() -> float:
    """Return the clock in seconds, after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def environment() -> dict[str, Any]:
    """Return the versions and the hardware that a measurement depends on; call it after threads are set."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        **{name: installed(name) for name in ("torch", "transformers", "lightning", "trl")},
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


class StepTimes:
    """The times of consecutive steps, measured without waiting for the device between them."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Mark the start of the first step or the end of a step."""
        if torch.cuda.is_available():
            # An event takes its time when the device reaches it, so the host can run ahead of the device as usual.
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(perf_counter())

    def seconds(self) -> list[float]:
        """Wait for the device and return the seconds of each step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1000 for start, end in pairwise(self._marks)]
        return [end - start for start, end in pairwise(self._marks)]


class Clock(Callback):
    """A callback that times a fit from before its first batch is loaded to its end.

    Attributes:
        seconds: Seconds of the whole fit.
        steps: Times of its steps.
        sampled: Samples of the regularizer at the end of the fit, or ``None``.
        metrics: Last row of the record.
        facts: How the fit computed: the attention that the policy ran, whether rows were packed, whether the loss uses
            a reference.
    """

    seconds: float = 0.0
    metrics: dict[str, float]
    sampled: Sequences | None = None
    facts: dict[str, Any]

    def __init__(self) -> None:
        self.steps = StepTimes()

    def per_step(self, steps: int, refresh_every: int | None = None) -> float:
        """Return the seconds of one step.

        Args:
            steps: Number of steps of the fit.
            refresh_every: Steps between two drawings of the regularizer's samples, or ``None`` if it draws none. A fit
                draws in its first step; a step's share of a drawing is ``1 / refresh_every``, however short the fit.
        """
        if refresh_every is None:
            return self.seconds / steps
        drawing, drawn = self.metrics["time/sampling_s"], -(-steps // refresh_every)
        return (self.seconds - drawn * drawing) / steps + drawing / refresh_every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = now()
        self.steps.mark()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Mark the end of a step."""
        self.steps.mark()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and note how the fit computed."""
        self.seconds = now() - self.started
        self.metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        buffer = getattr(pl_module.regularization, "buffer", None)
        if buffer is not None:
            self.sampled = buffer.held
        module: Any = pl_module
        self.facts = {
            "attention": base_model(module.policy).config._attn_implementation,
            "packed": module.speed.packs,
            "uses_reference": module.loss.uses_reference,
        }


class Workload:
    """Steps of a method on one data set with one model, on the training path of ``spo train``.

    The configuration switches everything but the step off: validation, checkpoints, loggers, the progress bar, and the
    probe that samples for ``kl`` and ``entropy`` at every log interval.

    Args:
        size: Size of the model.
        data: Pairs as text, from which the tokenizer is made too.
        steps: Optimizer steps of one fit.
        threads: Threads of torch; ``None`` for its own choice.
        cache: Folder where models and tokenizers are cached.
        train: Tokenized pairs to train on instead of those of ``data``.
        overrides: Overrides with which the pairs are prepared.

    Attributes:
        overrides: Overrides with which the pairs were prepared.
        prepared: Model folder and tokenized pairs.

    Raises:
        UserError: The size needs a GPU, or there are too few pairs.
    """

    def __init__(
        self,
        size: Size,
        data: Data,
        steps: int,
        threads: int | None,
        cache: Path,
        train: list[TokenizedPair] | None = None,
        overrides: Sequence[str] = ("method=dpo",),
    ) -> None:
        if size.needs_gpu and not torch.cuda.is_available():
            raise UserError("this size needs a CUDA device, and there is none here: choose --size 1m or 10m")
        self.size, self.data, self.steps, self.threads = size, data, steps, threads
        self.folder = model_folder(size, data, cache)
        self.run_dir = Path(tempfile.gettempdir()) / f"spo-benchmark-{os.getpid()}"  # nothing is written to it
        self.overrides = overrides
        self.prepared: Prepared = prepare_run(self.config(*overrides))
        if train is not None:
            pairs = replace(self.prepared.pairs, train=train)
            prompts = {**self.prepared.prompts, "train": eval_prompts(train, "train")}
            self.prepared = replace(self.prepared, pairs=pairs, prompts=prompts)
        needed, found = size.pairs * steps, len(self.prepared.pairs.train)
        if found < needed:
            raise UserError(f"{data.path}: {found} pairs are left, and {steps} steps of {size.pairs} need {needed}")

    def config(self, *overrides: str, seed: int = 0, steps: int | None = None) -> DictConfig:
        """Return the configuration of a fit, checked and resolved."""
        steps = self.steps if steps is None else steps
        common = [
            *self.size.overrides,
            f"model.path='{self.folder}'",
            *self.data.overrides,
            f"data.max_length={MAX_LENGTH}",
            "data.min_pairs=1",
            "data.splits.selection=0.01",
            "data.splits.test=0.01",
            "optimizer=adamw",
            "optimizer.lr=1e-5",
            "scheduler=constant",
            "scheduler.num_warmup_steps=0",
            "callbacks=none",
            "logger=record",
            "judge=none",
            "probe.num_prompts=0",
            "evaluation.selection_prompts=0",
            f"trainer.max_steps={steps}",
            "trainer.num_sanity_val_steps=0",
            "trainer.enable_progress_bar=false",
            f"threads={'null' if self.threads is None else self.threads}",
            f"seed={seed}",
        ]
        cfg = compose([*common, *overrides], run_dir=self.run_dir)
        check_config(cfg)
        values = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        assert isinstance(values, DictConfig)
        values.trainer.limit_val_batches = 0  # A run refuses this key, but the clock here measures training alone.
        return values

    def parts(self, *overrides: str, seed: int = 0, steps: int | None = None) -> Parts:
        """Return module, data and trainer of a fit, with fresh copies of the weights."""
        gc.collect()  # frees the device memory of the fit before it, which reference cycles hold
        return assemble(self.config(*overrides, seed=seed, steps=steps), self.prepared, [])

    def fit(self, *overrides: str, seed: int = 0, steps: int | None = None) -> Clock:
        """Train for some steps.

        Args:
            overrides: Overrides of the common configuration.
            seed: Random seed of the order of the pairs.
            steps: Optimizer steps, by default those of the workload.
        """
        parts = self.parts(*overrides, seed=seed, steps=steps)
        clock = Clock()
        parts.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        parts.trainer.fit(parts.module, datamodule=parts.data)
        return clock

    def connected(self, *overrides: str) -> Parts:
        """Return the parts of a fit before it begins: the data module serves windows, nothing is on the device."""
        parts = self.parts(*overrides)
        parts.trainer.strategy.connect(parts.module)
        parts.data.trainer = parts.trainer
        return parts

    def started(self, *overrides: str) -> Parts:
        """Return the parts of a fit that has just begun, on the device, to be tried by hand."""
        parts = self.connected(*overrides)
        module, device = parts.module, parts.trainer.strategy.root_device
        module.to(device)
        module.reference.to(device)
        module.on_fit_start()
        return parts

    def windows(self, parts: Parts, seed: int) -> list[Window]:
        """Return the windows of a fit with that seed, step by step; they are packed once the parts have started."""
        parts.data.seed = seed
        return list(parts.data.train_dataloader())

    def pairs(self, windows: Sequence[Window]) -> list[TokenizedPair]:
        """Return the pairs of some windows, in their order."""
        return [self.prepared.pairs.train[i] for window in windows for batch in window for i in batch.index.tolist()]


REFRESH_EVERY = 10
"""Optimizer steps between two drawings of SPO's samples."""
SPO = (
    "method=spo",
    "regularizer.num_samples=8",
    "regularizer.batch_size=8",
    "regularizer.max_new_tokens=128",
    f"regularizer.refresh_every={REFRESH_EVERY}",
)
"""Overrides of SPO with the regularizer that is measured: 8 samples of 128 tokens, drawn anew every 10 steps."""
