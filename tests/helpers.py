"""Models small enough to reason about, built without a network, and a trainer around the alignment module."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spo import processes
from spo.data import TokenizedPair
from spo.data.datamodule import PreferenceDataModule
from spo.forward.head import completion_logits
from spo.forward.speed import Speed
from spo.losses import Loss, SPOLoss
from spo.models import ModelSpec, NoReference, Reference
from spo.module import AlignmentModule
from spo.objective import Prompts, SampleDivergence
from spo.objective.learned import tensors_of
from spo.ops import completion_targets, sum_per_sequence, token_logps
from spo.regularizers import NoRegularizer, Regularizer
from spo.sampling import SampleBuffer
from spo.schedules import Constant, Schedule
from spo.types import Sequences
from spo.watch import ProbeSettings

T = TypeVar("T")
VOCAB, BOS, EOS, PAD = 23, 1, 2, 0
PLAIN = Speed(
    packing=False,
    share_prompts=False,
    completion_only=False,
    max_logits=None,
    sampler="generate",
    keep_reference=False,
    compile=False,
)
FAST = replace(
    PLAIN, packing=True, share_prompts=True, completion_only=True, max_logits=500, sampler="static", keep_reference=True
)


def tiny_llama(seed: int = 0, *, dtype: torch.dtype = torch.float64, scale: float = 0.5, **config: Any) -> nn.Module:
    """Return a Llama of a few thousand weights, scaled so that its distributions are far from uniform."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": scale,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings | config)).to(dtype).eval()


def small_model(seed: int, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """Return a model whose every number has the dtype; Llama computes norms and positions in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "vocab_size": VOCAB,
            "n_positions": 32,
            "n_embd": 12,
            "n_layer": 1,
            "n_head": 2,
            "initializer_range": 0.5,
            "tie_word_embeddings": False,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "attn_implementation": "sdpa",
        }
        return GPT2LMHeadModel(GPT2Config(**config | settings)).to(dtype).eval()


def completion_logps(model: nn.Module, sequences: Sequences, **options: Any) -> Tensor:
    """Return the ``(N,)`` summed log-probs of the completions, with the options of ``completion_logits``."""
    logits = completion_logits(model, sequences, **options)
    return sum_per_sequence(token_logps(logits, completion_targets(sequences)), sequences)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


def sequences(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, extra: int = 0, pad: int = PAD) -> Sequences:
    """Prompts with completions, right-padded to the longest plus ``extra``."""
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    ids = torch.full((len(rows), max(lengths) + extra), pad)
    for i, (prompt, completion) in enumerate(rows):
        ids[i, : lengths[i]] = torch.tensor([*prompt, *completion])
    return Sequences(ids, torch.tensor([len(prompt) for prompt, _ in rows]), torch.tensor(lengths))


def random_rows(n: int, seed: int, vocab: int = VOCAB) -> list[tuple[list[int], list[int]]]:
    """Prompts of 1 to 5 tokens with completions of 1 to 6."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> list[int]:
        size = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(3, vocab, (size,), generator=generator).tolist()

    return [(tokens(5), tokens(6)) for _ in range(n)]


def every_completion(prompt: Sequence[int], vocab: int, length: int) -> Sequences:
    """All ``vocab ** length`` completions of one prompt."""
    return sequences([(prompt, completion) for completion in itertools.product(range(vocab), repeat=length)])


def random_pairs(n: int, seed: int, vocab: int = VOCAB, **columns: Callable[[int], Any]) -> list[TokenizedPair]:
    """Pairs with one prompt each; ``columns`` give ``preference`` or ``weight`` from the position."""
    chosen, rejected = random_rows(n, 2 * seed, vocab), random_rows(n, 2 * seed + 1, vocab)
    return [
        TokenizedPair(
            prompt_ids=(BOS, *prompt),
            chosen_ids=(*better, EOS),
            rejected_ids=(*worse, 3, EOS),
            prompt_text="",
            chosen_text="",
            rejected_text="",
            prompt_id=str(i),
            **{name: column(i) for name, column in columns.items()},
        )
        for i, ((prompt, better), (_, worse)) in enumerate(zip(chosen, rejected, strict=True))
    ]


def tiny_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """Words ``w3 w4 ...`` separated by spaces, one token each."""
    tokens = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, vocab)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_model(folder: Path, **config: Any) -> Path:
    """Save a tiny model and its tokenizer in a folder."""
    tiny_llama(dtype=torch.float32, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def model_spec(**changes: Any) -> ModelSpec:
    settings: dict[str, Any] = {
        "path": None,
        "initial": None,
        "dtype": "float32",
        "attn_implementation": "eager",
        "trust_remote_code": False,
        "dropout": 0.0,
        "gradient_checkpointing": False,
        "lora": None,
        "adapter_path": None,
    }
    return ModelSpec(**settings | changes)


class Bigrams(nn.Module):
    """A model whose every number is float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.states = nn.Embedding(VOCAB, 4, dtype=torch.float64)
            self.head = nn.Linear(4, VOCAB, dtype=torch.float64)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.head(self.states(input_ids)))


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


class Spied(AlignmentModule):
    """Keeps each step's gradients, as the optimizer sees them, and the sampled rows that the step used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients: list[dict[str, Tensor]] = []
        self.sampled: list[Tensor] = []

    @property
    def buffer(self) -> SampleBuffer | None:
        return self.regularization.buffer if isinstance(self.regularization, SampleDivergence) else None

    def training_step(self, window: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        plain = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            named = [*self.policy.named_parameters(), *tensors_of(self.loss).items()]
            self.gradients.append({name: whole(p.grad) for name, p in named if p.grad is not None})
            if self.buffer is not None:
                self.sampled.append(self.buffer.rows(self.global_step).input_ids.clone())
            return plain(*args, **kwargs)

        optimizer.step = step
        try:
            super().training_step(window, batch_idx)
        finally:
            optimizer.step = plain


def make_module(
    policy: nn.Module,
    *,
    loss: Loss[Any] | None = None,
    regularizer: Regularizer | None = None,
    reference: Reference | None = None,
    reference_model: nn.Module | None = None,
    prompts: Sequence[Sequence[int]] = ((BOS, 5), (BOS, 6, 7), (BOS, 8)),
    alpha: float | Schedule = 0.2,
    beta: float | Schedule = 0.1,
    lr: float = 0.01,
    optimizer: Any = torch.optim.SGD,
    probe: ProbeSettings | None = None,
    clip_norm: float | None = None,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
    log_every_n_steps: int = 1,
    stop_ids: Sequence[int] = (EOS,),
    seed: int = 0,
    speed: Speed | None = None,
) -> Spied:
    reference = reference or NoReference()
    reference.attach(lambda: frozen(reference_model))  # type: ignore[arg-type]
    return Spied(
        policy,
        loss or SPOLoss(),
        regularizer or NoRegularizer(),
        reference,
        alpha=alpha if isinstance(alpha, Schedule) else Constant(alpha),
        beta=beta if isinstance(beta, Schedule) else Constant(beta),
        optimizer=partial(optimizer, lr=lr),
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
        prompts=Prompts(list(prompts), list(prompts), stop_ids, PAD),
        probe=probe,
        clip_norm=clip_norm,
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        log_every_n_steps=log_every_n_steps,
        seed=seed,
        speed=speed or FAST,
    )


def make_data(
    train: Sequence[TokenizedPair], selection: Sequence[TokenizedPair] = (), *, max_steps: int = 1, **changes: Any
) -> PreferenceDataModule:
    settings: dict[str, Any] = {
        "batch_size": 32,
        "micro_batch_size": None,
        "micro_batch_tokens": None,
        "eval_batch_size": 8,
        "group_by_length": None,
        "seed": 0,
        "num_workers": 0,
        "pad_token_id": PAD,
    }
    return PreferenceDataModule(list(train), list(selection), max_steps=max_steps, **settings | changes)


def make_trainer(folder: Path, *, max_steps: int = 1, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "check_val_every_n_epoch": None,
        "default_root_dir": folder,
    }
    return Trainer(max_steps=max_steps, max_epochs=-1, **settings | changes)


def in_processes(count: int, work: Callable[[], T], monkeypatch: pytest.MonkeyPatch) -> list[T]:
    """Run a function in threads that take themselves for the processes of a run, and return the results by rank.

    Only what the function does through ``spo.processes`` knows of the others.

    Args:
        count: Number of processes.
        work: Function of each process. It must not draw from the global random state, which the threads share.
        monkeypatch: Patches ``spo.processes``.
    """
    place, given, barrier = threading.local(), [None] * count, threading.Barrier(count, timeout=60)

    def gather_objects(own: Any) -> list[Any]:
        given[place.rank] = own
        barrier.wait()
        parts = list(given)
        barrier.wait()  # Nobody gives something new before all have read.
        return parts

    def run(rank: int) -> T:
        place.rank = rank
        try:
            return work()
        except BaseException:
            barrier.abort()
            raise

    with monkeypatch.context() as patch, ThreadPoolExecutor(count) as threads:
        patch.setattr(processes, "rank", lambda: place.rank)
        patch.setattr(processes, "world_size", lambda: count)
        patch.setattr(processes, "gather_objects", gather_objects)
        return list(threads.map(run, range(count)))


def sharded() -> ModelParallelStrategy:
    """Return the strategy that distributes weights over two processes."""
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)


def run_on_two_ranks(module: str, folder: Path) -> None:
    """Run a module of the tests as a script in two processes that know each other.

    Args:
        module: Name of the module.
        folder: Argument of the script.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run(
        [*command, "-m", "tests.on_rank", module, str(folder)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
