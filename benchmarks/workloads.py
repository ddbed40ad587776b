"""What the step benchmarks train: data, a model of a stated size, and a fit on the training path of ``spo train``."""

from __future__ import annotations

import gc
import json
import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spo.config.checks import check_config
from spo.config.compose import compose
from spo.data import FileSource, HHSource, Row, TokenizedPair
from spo.errors import UserError
from spo.models.tiny import BOS, EOS, PAD
from spo.records.cache import cached
from spo.records.digests import path_digest
from spo.stages.prepare import Prepared, prepare_run
from spo.stages.train import Parts, assemble
from spo.types import Window

PAIRS = 8
"""Pairs of an optimiser step."""
MAX_LENGTH = 512
"""Tokens of prompt and completion; longer pairs are dropped."""
VOCABULARY = 8192
"""Of the tokenizer, which is trained on the data's own text."""
FILES = {"hh": "hh_rlhf_harmless_base.part1.jsonl.gz", "alpaca_eval": "alpaca_eval_pairs.train.jsonl.gz"}


# --- the data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Preference pairs in a file that both sides read.

    Attributes:
        name: as asked for, or ``synthetic`` where its file is absent.
        path: the file.
    """

    name: str
    path: Path

    @property
    def overrides(self) -> list[str]:
        """How ``spo train`` reads it."""
        group = "hh" if self.name == "hh" else "jsonl"
        return [f"data={group}", f"data.path='{self.path}'", "data.on_bad_row=skip"]

    def rows(self) -> list[Row]:
        """The pairs as text."""
        path = str(self.path)
        source = HHSource(path, "skip") if self.name == "hh" else FileSource(path, None, "skip")
        return source.rows(lambda prompts, n: [])

    def texts(self) -> Iterable[str]:
        """What the tokenizer is trained on."""
        for row in self.rows():
            yield f"{row.prompt}{row.chosen}"
            yield str(row.rejected)


def data_dir() -> Path:
    """Where the published pairs are: ``SPO_DATA_DIR``, by default ``../shared/data`` beside the project."""
    return Path(os.environ.get("SPO_DATA_DIR", Path(__file__).parents[1] / "../shared/data")).resolve()


def find_data(name: str, cache: Path) -> Data:
    """The data set of that name, or made-up pairs of HH's lengths where its file is absent (which is printed)."""
    if name in FILES:
        path = data_dir() / FILES[name]
        if path.is_file():
            return Data(name, path)
        print(f"{FILES[name]} is not in SPO_DATA_DIR: using made-up pairs with the lengths of HH")
    return Data("synthetic", cached(cache, "benchmark_pairs", {"lengths": asdict(HH), "seed": 0}, HH.write) / "x.jsonl")


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens: the mean and the standard deviation of their logarithm, for prompt and completion.

    Attributes:
        prompt: of prompts.
        completion: of completions, chosen and rejected independent of each other and of the prompt.
        pairs: how many to make.
    """

    prompt: tuple[float, float]
    completion: tuple[float, float]
    pairs: int = 1000

    def write(self, folder: Path) -> None:
        """Writes made-up pairs as ``x.jsonl``: words of a small language, each of which becomes one token."""
        generator = random.Random(0)
        words = [" " + "".join(generator.choices("aeioubdfgklmnprstvz", k=5)) for _ in range(2000)]

        def text(lengths: tuple[float, float]) -> str:
            return "".join(generator.choices(words, k=max(round(generator.lognormvariate(*lengths)), 1)))

        with (folder / "x.jsonl").open("w") as file:
            for _ in range(self.pairs):
                row = {"prompt": text(self.prompt), "chosen": text(self.completion), "rejected": text(self.completion)}
                file.write(json.dumps(row) + "\n")


HH = Lengths(prompt=(4.5, 0.9), completion=(3.4, 0.9))
"""Fitted to the HH pairs that are used here: 8192 tokens of vocabulary, at most 512 tokens."""


def statistics(pairs: Sequence[TokenizedPair]) -> dict[str, float]:
    """Mean lengths in tokens, the padding of padded batches, and the prompt's share of the real tokens.

    Args:
        pairs: in the order in which they are batched.
    """
    lengths = [(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids or ())) for p in pairs]
    real = padded = 0
    for first in range(0, len(lengths), PAIRS):
        batch = lengths[first : first + PAIRS]
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
        hidden: width.
        intermediate: width of the feed-forward layers.
        layers: blocks.
        heads: of the queries.
        kv_heads: of keys and values.
        tied: whether input and output share one embedding matrix.
        vocabulary: rows of the embedding.
        dtype: of the weights.
        overrides: of ``spo train``.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    vocabulary: int = VOCABULARY
    dtype: str = "float32"
    overrides: tuple[str, ...] = ("model=hf", "trainer=cpu")

    @property
    def needs_gpu(self) -> bool:
        """Whether it is out of reach of a CPU."""
        return "trainer=gpu" in self.overrides

    def model(self) -> LlamaForCausalLM:
        """With random weights, always the same."""
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


_ON_GPU = ("trainer=gpu", "trainer.devices=1")
SIZES = {
    "toy": Size(32, 64, 2, 2, 2, tied=True, vocabulary=512),
    "1m": Size(64, 192, 8, 4, 4, tied=True),
    "10m": Size(256, 688, 8, 4, 4, tied=False),
    "1b": Size(2048, 8192, 16, 32, 8, tied=True, vocabulary=128256, overrides=("model=hf", *_ON_GPU)),
    "8b-lora": Size(
        4096, 14336, 32, 32, 8, False, 128256, "bfloat16", ("model=hf_lora", "model.dtype=bfloat16", *_ON_GPU)
    ),
}
"""``1b`` and ``8b-lora`` have the shapes of Llama-3.2-1B and Llama-3.1-8B."""


def model_folder(size: Size, data: Data, cache: Path) -> Path:
    """A Hugging Face folder: random weights of that size, and a tokenizer trained on the text of the data."""

    def build(folder: Path) -> None:
        train_tokenizer(data.texts(), min(size.vocabulary, VOCABULARY)).save_pretrained(folder)
        size.model().save_pretrained(folder)

    return cached(cache, "benchmark_models", {"size": asdict(size), "data": path_digest(data.path)}, build)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
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
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


class Clock(Callback):
    """Times a fit from before its first batch is loaded to its end.

    Attributes:
        seconds: of the whole fit.
        sample_tokens: mean length of the regularizer's samples, where it has any.
        metrics: the last row of the record.
    """

    seconds: float = 0.0
    metrics: dict[str, float]
    sample_tokens: float | None = None

    def per_step(self, steps: int, refresh_every: int | None = None) -> float:
        """Seconds of one step of a fit of ``steps``.

        Args:
            steps: of the fit.
            refresh_every: of the regularizer that draws samples, where there is one. A fit draws in its first step;
                a step's share of a drawing is ``1 / refresh_every``, however short the fit is.
        """
        if refresh_every is None:
            return self.seconds / steps
        drawing, drawn = self.metrics["time/sampling_s"], -(-steps // refresh_every)
        return (self.seconds - drawn * drawing) / steps + drawing / refresh_every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts."""
        self.started = now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops."""
        self.seconds = now() - self.started
        self.metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        buffer: Any = pl_module.buffer
        if buffer is not None:
            self.sample_tokens = float(buffer.samples.completion_length.float().mean())


class Workload:
    """Steps of a method on one data set with one model, as ``spo train`` does them.

    Everything but the step is switched off by configuration: validation, checkpoints, loggers, the progress bar, and
    the probe that samples for ``kl`` and ``entropy`` at every log interval.

    Args:
        size: of the model.
        data: the pairs.
        steps: of one fit.
        threads: of torch; ``None`` for its own choice.
        cache: where models and tokenizers are kept.

    Attributes:
        prepared: model folder and tokenised pairs.
    """

    def __init__(self, size: Size, data: Data, steps: int, threads: int | None, cache: Path) -> None:
        if size.needs_gpu and not torch.cuda.is_available():
            raise UserError("this size needs a CUDA device, and there is none here: choose --size 1m or 10m")
        self.size, self.data, self.steps, self.threads = size, data, steps, threads
        self.folder = model_folder(size, data, cache)
        self.run_dir = Path(tempfile.gettempdir()) / f"spo-benchmark-{os.getpid()}"  # nothing is written to it
        self.prepared: Prepared = prepare_run(self.config("method=dpo"))
        needed, found = PAIRS * steps, len(self.prepared.pairs.train)
        if found < needed:
            raise UserError(f"{data.path}: {found} pairs are left, and {steps} steps of {PAIRS} need {needed}")

    def config(self, *overrides: str, seed: int = 0, steps: int | None = None) -> DictConfig:
        """The configuration of a fit, checked and resolved."""
        steps = self.steps if steps is None else steps
        common = [
            *self.size.overrides,
            f"model.path='{self.folder}'",
            *self.data.overrides,
            f"data.max_length={MAX_LENGTH}",
            f"data.batch_size={PAIRS}",
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
            "+trainer.limit_val_batches=0",
            "trainer.enable_progress_bar=false",
            f"threads={'null' if self.threads is None else self.threads}",
            f"seed={seed}",
        ]
        cfg = compose([*common, *overrides], run_dir=self.run_dir)
        check_config(cfg)
        values = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        assert isinstance(values, DictConfig)
        return values

    def parts(self, *overrides: str, seed: int = 0, steps: int | None = None) -> Parts:
        """Module, data and trainer of a fit, with fresh copies of the weights."""
        gc.collect()
        return assemble(self.config(*overrides, seed=seed, steps=steps), self.prepared, [])

    def fit(self, *overrides: str, seed: int = 0, steps: int | None = None) -> Clock:
        """Trains for some steps.

        Args:
            overrides: what differs from the common configuration.
            seed: of the order of the pairs.
            steps: of the optimiser, by default the workload's.
        """
        parts = self.parts(*overrides, seed=seed, steps=steps)
        clock = Clock()
        parts.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        parts.trainer.fit(parts.module, datamodule=parts.data)
        return clock

    def started(self, *overrides: str) -> Parts:
        """The parts of a fit as they are when it has just begun, on the device, so that they can be tried by hand."""
        parts = self.parts(*overrides)
        module, trainer = parts.module, parts.trainer
        trainer.strategy.connect(module)
        parts.data.trainer = trainer
        device = trainer.strategy.root_device
        module.to(device)
        module.reference.to(device)
        module.on_fit_start()
        return parts

    def windows(self, parts: Parts, seed: int) -> list[Window]:
        """What a fit with that seed is served, step by step, laid out for the parts that have started."""
        parts.data.seed = seed
        return list(parts.data.train_dataloader())

    def pairs(self, windows: Sequence[Window]) -> list[TokenizedPair]:
        """The pairs of some windows, in their order."""
        return [self.prepared.pairs.train[i] for window in windows for batch in window for i in batch.index.tolist()]


REFRESH_EVERY = 10
SPO = (
    "method=spo",
    "regularizer.num_samples=8",
    "regularizer.batch_size=8",
    "regularizer.max_new_tokens=128",
    f"regularizer.refresh_every={REFRESH_EVERY}",
)
"""SPO with the regularizer that is measured: 8 samples of 128 tokens, drawn anew every 10 steps."""
