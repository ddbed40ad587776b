"""Rules about references: what they provide to the other parts, whether they can move, and further ones of a method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig

from spo.config.checks.targets import CheckedParts
from spo.config.nodes import (
    DEFAULT_REFERENCES,
    EXTRA_REFERENCES,
    extra_reference_keys,
    listed,
    member_name,
    select,
)
from spo.wording import suggestion


def reference_problems(cfg: DictConfig, loss: Any, regularizer: Any, reference: Any) -> Iterator[str]:
    """Yield why the reference does not provide what loss and regularizer read, or provides what nothing reads.

    Args:
        cfg: Composed configuration.
        loss: Loss of the method.
        regularizer: Regularizer of the run.
        reference: Class of the reference.
    """
    method, member = select(cfg, "method.name"), member_name("reference", reference)
    regularizer_name = member_name("regularizer", type(regularizer))
    scores_pairs, scores_samples = (getattr(reference, name, True) for name in ("scores_pairs", "scores_samples"))
    reads_stored = loss.uses_reference and not (regularizer.needs_reference_logits or loss.needs_reference_logits)
    if loss.uses_reference and not scores_pairs:
        yield (
            f"method={method} needs a reference model, but reference={member} provides none: choose reference=frozen"
        )
    if loss.needs_reference_logits and not scores_samples:
        yield (
            f"method={method} has a term that reads logits of a reference model, but reference={member} provides "
            "none: choose reference=frozen (or adapter_off with model=hf_lora)"
        )
    if regularizer.needs_reference and not scores_samples:
        yield (
            f"regularizer={regularizer_name} scores sequences with a reference model, but reference={member} "
            "provides none for them: choose reference=frozen (or adapter_off with model=hf_lora)"
        )
    needs_model = regularizer.needs_reference or loss.needs_reference_logits
    if scores_pairs and not scores_samples and not needs_model and not reads_stored:
        yield f"reference={member}: nothing reads the log-probabilities it would compute; choose reference=none"
    if getattr(reference, "stores_logps", False) and scores_samples and not reads_stored:
        yield (
            f"reference={member}: method={method} with regularizer={regularizer_name} does not "
            "read the log-probabilities it would store; choose reference=frozen"
        )
    if getattr(reference, "needs_adapter", False) and select(cfg, "model.lora") is None:
        yield f"reference={member} needs an adapter to switch off, but model.lora is null: choose model=hf_lora"
    if getattr(reference, "needs_adapter", False) and (start := select(cfg, "model.start")) is not None:
        yield (
            f"model.start={start}: without its adapter the policy would be these weights, which are not those of the "
            "reference: choose reference=frozen"
        )


def moving_reference_problems(cfg: DictConfig, parts: CheckedParts) -> Iterator[str]:
    """Yield why the weights of the reference cannot move.

    Args:
        cfg: Composed configuration.
        parts: Parts of the run that ``cfg`` describes.
    """
    from spo.models import Reference

    reference = parts.reference
    if not (isinstance(reference, type) and issubclass(reference, Reference)):
        return
    chosen = f"reference={member_name('reference', reference)}"
    if not reference.moves:
        if select(cfg, "method.follow_every") is not None:
            # With a reference that stays, the loss is that of another method under a wrong name.
            yield (
                f"method={select(cfg, 'method.name')} is defined by a reference that moves, and {chosen} stays as it "
                "is: choose reference=following"
            )
        if reference.after_step is not Reference.after_step:
            yield (
                f"{chosen} has after_step, which changes its weights, and does not declare it: write moves = True in "
                f"{reference.__name__}"
            )
        return
    if reference.stores_logps:
        yield (
            f"{chosen} moves, so log-probabilities that it stored would be those of weights it no longer has: derive "
            f"{reference.__name__} from spo.models.FrozenReference"
        )
    if reference.needs_adapter:
        yield (
            f"{chosen} moves, but its weights are those of the policy, which would move too: derive "
            f"{reference.__name__} from spo.models.FrozenReference"
        )
    if reference.state_dict is Reference.state_dict or reference.load_state_dict is Reference.load_state_dict:
        yield (
            f"{chosen} moves, but a resumed run would not have its weights: write state_dict and load_state_dict, or "
            f"derive {reference.__name__} from spo.models.FrozenReference"
        )
    strategies = {
        "ShardedStrategy": "fsdp",
        "ModelParallelStrategy": "fsdp",
        "FSDPStrategy": "fsdp",
        "DeepSpeedStrategy": "deepspeed",
    }
    if (strategy := strategies.get(_strategy(parts))) is not None:
        yield (
            f"{chosen} moves by the weights of the policy, and strategy={strategy} distributes those over devices: "
            "choose strategy=ddp"
        )


def extra_reference_problems(cfg: DictConfig, parts: CheckedParts) -> Iterator[str]:
    """Yield names of further references that do not have a model, or that nothing reads.

    Args:
        cfg: Composed configuration.
        parts: Parts of the run that ``cfg`` describes.
    """
    if parts.loss is None:
        return
    given, declared = extra_reference_keys(cfg), getattr(parts.loss, "extra_references", ())
    method = select(cfg, "method.name")
    if isinstance(declared, str):
        yield f"method.loss: extra_references={declared!r} is a text: write the tuple ({declared!r},)"
        return
    yield from (
        f"method={method} needs a model for its reference {name!r}: set {EXTRA_REFERENCES}.{name}=PATH"
        for name in declared
        if name not in given
    )
    reads = f"it reads {listed(declared)}" if declared else "it reads none beside the main one"
    yield from (
        f"{key}: method={method} does not read this reference ({reads}){suggestion(name, declared)}"
        f"{f': remove it with ~{key}' if key.startswith(DEFAULT_REFERENCES) else ''}"
        for name, key in given.items()
        if name not in declared
    )


def _strategy(parts: CheckedParts) -> str:
    """Return the class of the strategy, an empty text for a name that Lightning resolves."""
    return str(getattr(parts.target("strategy.plugin"), "__name__", ""))
