"""Configuration keys that do not change what a run computes. This is their only list."""

from __future__ import annotations

from collections.abc import Collection

CHOICES = "choices"
"""Key that holds the chosen member of each config group, such as ``regularizer: global_kl``."""
# Keys that change time, cost, place or display, or describe a method, and change no result. They are not part of a
# run's identity, so a run resumes on other devices and with other micro-batches, which change rounding alone.
OPERATIONAL_KEYS = frozenset(
    {
        CHOICES,
        "data.eval_batch_size",
        "data.micro_batch_size",
        "data.micro_batch_tokens",
        "data.num_workers",
        "evaluation.batch_size",
        "hydra",
        # They decide which runs an iteration has. What a round starts from is part of the round.
        "iteration.earlier_weights",
        "iteration.first_references",
        "iteration.first_step",
        "iteration.limits",
        "iteration.momentum",
        "iteration.reference",
        "iteration.rewards",
        "iteration.round",
        "iteration.rounds",
        "judge.attempts",
        "judge.batch_size",
        "judge.cache",
        "judge.concurrency",
        "judge.device",
        "judge.input_price",
        "judge.max_retries",
        "judge.max_unanswered",
        "judge.output_price",
        "judge.requests_per_minute",
        "judge.timeout_s",
        "launcher",
        "logger",
        "method.changes",
        "method.checked",
        "method.group",
        "method.use_when",
        "paths",
        "rerun",
        "speed",
        "strategy",
        "tags",
        "threads",
        "trainer.devices",
        "trainer.enable_progress_bar",
        "trainer.num_nodes",
        "trainer.profiler",
    }
)
# Keys of how a run is executed and summarized. They change rounding at most, so runs that differ in them are different
# runs of one setting.
EXECUTION_KEYS = frozenset(
    {
        "callbacks",
        "evaluation.against",
        "evaluation.bootstrap_samples",
        "evaluation.confidence",
        "evaluation.further_kl",
        "trainer.accelerator",
    }
)


def is_in(key: str, keys: Collection[str]) -> bool:
    """Return whether a dotted key is one of ``keys`` or lies below one of them."""
    parts = key.split(".")
    return any(".".join(parts[: end + 1]) in keys for end in range(len(parts)))


def is_operational(key: str) -> bool:
    """Return whether a dotted key changes no result."""
    return is_in(key, OPERATIONAL_KEYS)


def is_part_of_setting(key: str) -> bool:
    """Return whether runs with different values of a dotted key have different settings."""
    return not is_in(key, OPERATIONAL_KEYS | EXECUTION_KEYS)
