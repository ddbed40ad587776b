"""The progress bar of training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from spo.callbacks import Progress


def test_a_resumed_run_counts_up_to_all_steps() -> None:
    bar: Any = Progress()
    bar._trainer = SimpleNamespace(max_steps=5, max_epochs=-1, global_step=2, num_training_batches=float("inf"))
    assert bar.total_train_batches == 5
    bar._trainer.max_steps, bar._trainer.num_training_batches = -1, 7
    assert bar.total_train_batches == 7
