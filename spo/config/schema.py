"""Types and bounds of the keys that no ``_target_`` of this package takes; their defaults are in ``conf/``.

A parameter of a class states its bounds in its own signature. What is left are keys of groups without a class, and of
classes of other packages. These types import nothing heavy, so such values are judged before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Lt

from spo.bounds import (
    DropoutRate,
    FloatType,
    NonNegativeFloat,
    NonNegativeInt,
    OnBadRow,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Truncation,
)
from spo.config.values import Advice

Precision = Annotated[
    Literal["32-true", "32", "bf16-mixed"],
    Advice(
        "half precision is not supported, since its range is too small for summed log-probabilities; "
        "weights in bfloat16 are model.dtype=bfloat16, for policy and reference alike, and those in float64 "
        "model.dtype=float64"
    ),
]

WarmUp = Annotated[int, Ge(0)] | Annotated[float, Ge(0), Lt(1), Advice("a number below 1 is a share of the steps")]


Seed = Annotated[int, Ge(0), Lt(2**32)]  # NumPy's range


@dataclass(frozen=True)
class Probe:
    """Keys ``probe.*``."""

    num_prompts: NonNegativeInt
    max_new_tokens: PositiveInt


@dataclass(frozen=True)
class Splits:
    """Keys ``data.splits.*``."""

    selection: OpenFraction
    test: OpenFraction


@dataclass(frozen=True)
class Data:
    """Keys ``data.*`` that every data set has."""

    seed: Seed
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    micro_batch_tokens: PositiveInt | None
    eval_batch_size: PositiveInt
    group_by_length: Annotated[int, Ge(2)] | None
    num_workers: NonNegativeInt
    limit: PositiveInt | None
    num_pairs: PositiveInt | None
    subset_seed: Seed
    max_length: Annotated[int, Ge(2)]
    max_new_tokens: PositiveInt
    truncation: Truncation
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    split_special_tokens: bool
    on_bad_row: OnBadRow
    min_pairs: PositiveInt
    splits: Splits | None
    default_alpha: PositiveFloat
    default_sft_steps: NonNegativeInt
    regime: str | None
    default_round_prompts: PositiveInt | None
    default_refresh_every: PositiveInt
    default_samples_per_prompt: PositiveInt
    default_reference_samples: PositiveInt


@dataclass(frozen=True)
class BestSetting:
    """Keys ``method.best_on.REGIME.*``: the best setting of a method on one kind of data."""

    beta: PositiveFloat
    lr: PositiveFloat
    weight: NonNegativeFloat
    follow_every: PositiveInt


@dataclass(frozen=True)
class BestOn:
    """Keys ``method.best_on.*``: the built-in stories, and the regimes of the study on them."""

    stories: BestSetting | None
    few_pairs: BestSetting | None
    narrow: BestSetting | None


@dataclass(frozen=True)
class Method:
    """Keys ``method.*`` other than its loss; the texts are for lists of methods, see :mod:`spo.stages.methods`."""

    group: str | None
    changes: str | None
    use_when: str | None
    checked: str | None
    default_beta: PositiveFloat
    default_lr: PositiveFloat
    best_on: BestOn | None
    default_references: dict[str, str] | None
    regularizer_weight: NonNegativeFloat | Literal["beta"]
    follow_every: PositiveInt


@dataclass(frozen=True)
class Model:
    """Keys ``model.*`` that every model has."""

    start: str | None
    dtype: FloatType
    trust_remote_code: bool
    dropout: DropoutRate
    gradient_checkpointing: bool
    num_parameters: PositiveInt | None
    default_lr: PositiveFloat | None
    default_sft_steps: NonNegativeInt
    default_threads: PositiveInt | None
    default_packing: bool
    default_sft_lr: PositiveFloat


@dataclass(frozen=True)
class SupervisedFineTuning:
    """Keys ``sft.*``."""

    max_steps: NonNegativeInt
    batch_size: PositiveInt
    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    fused: bool
    num_warmup_steps: WarmUp
    clip_norm: PositiveFloat | None


@dataclass(frozen=True)
class Speed:
    """Keys ``speed.*``, of :class:`spo.forward.speed.Speed`."""

    packing: bool
    share_prompts: bool
    completion_only: bool
    max_logits: PositiveInt | None
    sampler: Literal["static", "generate"]
    keep_reference: bool
    compile: bool


@dataclass(frozen=True)
class Optimizer:
    """Keys ``optimizer.*``, of torch's optimizers."""

    lr: PositiveFloat
    eps: NonNegativeFloat
    weight_decay: NonNegativeFloat
    momentum: NonNegativeFloat
    fused: bool | None


@dataclass(frozen=True)
class Scheduler:
    """Keys ``scheduler.*``, of transformers' learning rate schedules."""

    num_warmup_steps: WarmUp
    num_training_steps: NonNegativeInt


@dataclass(frozen=True)
class Trainer:
    """Keys ``trainer.*``, of Lightning's Trainer."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
    devices: int | str | Sequence[int]
    num_nodes: PositiveInt
    precision: Precision
    max_steps: Annotated[int, Ge(0), Advice("null leaves the length of the run to trainer.max_epochs")] | None
    max_epochs: PositiveFloat | None
    val_check_interval: PositiveInt
    log_every_n_steps: PositiveInt
    gradient_clip_val: PositiveFloat | None
    num_sanity_val_steps: Annotated[
        Literal[-1, 0], Advice("-1 validates once before the first step, on the whole selection split, and 0 does not")
    ]
    enable_progress_bar: bool
    deterministic: bool | Literal["warn"]


@dataclass(frozen=True)
class Strategy:
    """Keys ``strategy.*``, of :class:`spo.forward.sharding.Sharding`."""

    unshard_sampling: bool | Literal["auto"]


@dataclass(frozen=True)
class IterationLimits:
    """Keys ``iteration.limits.*``."""

    max_length_ratio: PositiveFloat
    min_length_ratio: PositiveFloat
    min_diversity_ratio: PositiveFloat


@dataclass(frozen=True)
class IterationSettings:
    """Keys ``iteration.*`` other than its source."""

    rounds: PositiveInt
    reference: Literal["previous", "first"]
    first_references: Sequence[str]
    rewards: Sequence[str] | None
    momentum: Annotated[float, Ge(0), Lt(1)]
    earlier_weights: Sequence[NonNegativeFloat]
    limits: IterationLimits
    round: PositiveInt | None
    first_step: NonNegativeInt


@dataclass(frozen=True)
class Configuration:
    """Keys of the whole configuration."""

    seed: Seed
    threads: PositiveInt | None
    rerun: bool
    strength: PositiveFloat
    extra_references: dict[str, str]
    tags: Sequence[str]
    probe: Probe
    data: Data
    method: Method
    model: Model
    sft: SupervisedFineTuning
    optimizer: Optimizer
    scheduler: Scheduler
    speed: Speed
    strategy: Strategy
    trainer: Trainer
    iteration: IterationSettings | None


@cache
def typed_keys() -> Mapping[str, Any]:
    """Return the type of every key of the schema, bounds included."""
    return dict(_leaves(Configuration, ""))


def _leaves(node: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(node, include_extras=True)
    for field in fields(node):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        # A group that may be null, such as data.splits, is a union with None.
        group = next((one for one in (hint, *getattr(hint, "__args__", ())) if is_dataclass(one)), None)
        if isinstance(group, type):
            yield from _leaves(group, f"{key}.")
        else:
            yield key, hint
