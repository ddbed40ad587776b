"""TRL's side of the step benchmark: a DPOTrainer as a user makes it, on the token ids that our step is given."""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from benchmarks.workloads import MAX_LENGTH, StepTimes, Workload
from spo.data import TokenizedPair
from spo.errors import UserError
from spo.stages.assemble import Parts
from spo.stages.from_config import eval_device
from spo.types import Window

DEFAULTS = {"bf16": True, "gradient_checkpointing": True}
"""Settings that TRL chooses by default."""


def dpo_trainer(workload: Workload, pairs: Sequence[TokenizedPair], **settings: Any) -> Any:
    """Return a DPOTrainer with fresh copies of the weights that trains on ``pairs`` in their order.

    Optimizer, learning rate, clipping and precision are those of our step unless ``settings`` differ. Dropout, logging
    and saving are off. The reference is a live model, or the policy without its adapter under LoRA.

    Args:
        workload: Model and configuration of both sides.
        pairs: Tokenized pairs of all steps.
        settings: Arguments of ``DPOConfig`` that replace the ones above.

    Raises:
        UserError: TRL is not installed.
    """
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise UserError("trl is not installed: pip install 'spo[trl]'") from error

    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # TRL uses old names
    gc.collect()
    cfg, spec = workload.config("method=dpo"), workload.prepared.spec
    device = eval_device(cfg)
    precision = {"bf16": cfg.trainer.precision == "bf16-mixed", "gradient_checkpointing": False}
    arguments = DPOConfig(
        output_dir=tempfile.gettempdir(),
        beta=cfg.beta.value,
        max_length=MAX_LENGTH,
        per_device_train_batch_size=workload.size.pairs,
        max_steps=len(pairs) // workload.size.pairs,
        learning_rate=cfg.optimizer.lr,
        adam_beta1=cfg.optimizer.betas[0],
        adam_beta2=cfg.optimizer.betas[1],
        weight_decay=cfg.optimizer.weight_decay,
        max_grad_norm=cfg.trainer.gradient_clip_val,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **(precision | settings),
    )
    lora, adapter = spec.lora, None
    if lora is not None:
        from peft import LoraConfig

        targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
        # peft declares an integer and multiplies by any number.
        alpha: Any = lora.alpha
        adapter = LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=alpha, target_modules=targets)
    base = workload.prepared.base
    reference: Any = spec.start(base) if lora is None else None
    trainer = DPOTrainer(
        spec.base(base).train(),
        reference,
        arguments,
        # TRL takes text alone, so a placeholder stands here and the token ids replace it below.
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=workload.prepared.tokenizer,
        peft_config=adapter,
    )
    trainer.remove_callback(PrinterCallback)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    trainer.train_dataset = Dataset.from_list([{name: list(getattr(pair, name)) for name in names} for pair in pairs])
    return trainer


class _Clock(TrainerCallback):
    """A callback that times steps, the first one from before its batch is loaded."""

    def __init__(self) -> None:
        self.steps = StepTimes()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.steps.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.mark()


def train(workload: Workload, pairs: Sequence[TokenizedPair], **settings: Any) -> list[float]:
    """Train on the pairs, and return the seconds of each step, without what comes before and after the steps.

    Args:
        workload: Model and configuration of both sides.
        pairs: Tokenized pairs of all steps.
        settings: Arguments of ``DPOConfig`` that replace those of :func:`dpo_trainer`.
    """
    trainer, clock = dpo_trainer(workload, pairs, **settings), _Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.steps.seconds()


@torch.no_grad()
def agreement(workload: Workload, parts: Parts, windows: Sequence[Window]) -> float:
    """Return the largest difference of a completion token's log-prob between TRL's policy and ours.

    The log-probs are those of the first window; the tokens of all windows are compared with those of TRL's batches.

    Args:
        workload: Model and configuration of both sides.
        parts: Parts of our fit, started, which score the window as a step does.
        windows: Windows of one round.

    Raises:
        RuntimeError: The two sides would train on different tokens.
    """
    trainer = dpo_trainer(workload, workload.pairs(windows))
    batches = list(trainer.get_train_dataloader())
    for window, inputs in zip(windows, batches, strict=True):
        if _tokens(window) != _trl_tokens(inputs):
            raise RuntimeError("TRL's batches do not hold the tokens that ours hold")
    device = batches[0]["input_ids"].device
    trainer.model.to(device)
    [batch] = windows[0]
    sequences = batch.sequences
    tokens = parts.module.pairs.score(batch.to(device)).policy_tokens.split(sequences.completion_length.tolist())
    inputs = batches[0]
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    with trainer.accelerator.autocast():
        theirs: Tensor = trainer.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True
        ).log_probs
    shifted = inputs["completion_mask"][:, 1:].bool()
    return max(
        float((tokens[place] - theirs[row][shifted[row]]).abs().max()) for row, place in enumerate(_places(batch))
    )


def _places(batch: Any) -> list[int]:
    """Return the sequence of the batch that is in each row of TRL's: all chosen ones, then all rejected ones."""
    every = torch.arange(len(batch.sequences), dtype=torch.float64)
    return batch.per_completion(every).flatten().long().tolist()


def _tokens(window: Window) -> list[list[int]]:
    [batch] = window
    sequences = batch.sequences
    rows = zip(sequences.input_ids.tolist(), sequences.length.tolist(), strict=True)
    whole = [ids[:length] for ids, length in rows]
    return [whole[place] for place in _places(batch)]


def _trl_tokens(inputs: Any) -> list[list[int]]:
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(1).tolist(), strict=True)
    return [ids[:length] for ids, length in rows]
