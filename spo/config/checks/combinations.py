"""Rules about combinations of parts. They read what the parts declare, and never ask which member of a group it is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo.config.checks.files import missing_data
from spo.config.checks.folders import folder_problems
from spo.config.checks.losses import loss_problems
from spo.config.checks.references import extra_reference_problems, moving_reference_problems, reference_problems
from spo.config.checks.rounds import round_problems
from spo.config.checks.targets import CheckedParts
from spo.config.coefficients import COEFFICIENTS, unused_coefficients
from spo.config.nodes import (
    DATA_SOURCE,
    first_line,
    listed,
    locate,
    member_name,
    select,
    source_key,
)
from spo.errors import JudgeError
from spo.resources import conf_dir
from spo.wording import suggestion


def combination_problems(cfg: DictConfig, parts: CheckedParts) -> Iterator[str]:
    """Yield why parts cannot be built, and why those that can do not fit together.

    Args:
        cfg: Composed configuration.
        parts: Parts of the run that ``cfg`` describes.
    """
    found = [*_objective(cfg, parts), *moving_reference_problems(cfg, parts), *extra_reference_problems(cfg, parts)]
    found += [*_coefficients(cfg, parts), *_data(cfg, parts)]
    found += [
        *_model(parts),
        *_optimizer(parts),
        *_judge(cfg, parts),
        *loss_problems(parts),
        *round_problems(cfg, parts),
    ]
    yield from [*parts.problems, *found]


def _objective(cfg: DictConfig, parts: CheckedParts) -> Iterator[str]:
    """Yield conflicts of loss, regularizer and reference."""
    from spo.losses import Loss

    loss, regularizer, reference = parts.loss, parts.regularizer, parts.reference
    if loss is not None and not isinstance(loss, Loss):
        yield (
            f"method.loss: {type(loss).__name__} is not a loss: derive it from spo.losses.PreferenceLoss, or from "
            "spo.losses.ListLoss for ranked lists"
        )
        return
    if loss is None or regularizer is None or reference is None:
        return
    method, regularizer_name = select(cfg, "method.name"), member_name("regularizer", type(regularizer))
    from spo.regularizers import Regularizer  # Imports torch, which a wrong command must not wait for.

    if not isinstance(regularizer, Regularizer):
        name = type(regularizer).__name__
        yield f"regularizer: {name} is not a regularizer: derive it from spo.regularizers.Regularizer"
        return
    if regularizer.needs_enumeration and getattr(parts.source, "language", None) is None:
        yield (
            f"regularizer={regularizer_name} sums over every response, which takes a data set "
            "that can be enumerated: choose data=enumerable, or regularizer=global_kl"
        )
    if regularizer.prompts != "train" and getattr(parts.source, "language", None) is not None:
        yield (
            f"regularizer.prompts={regularizer.prompts}: every split of an enumerable language has all of its prompts: "
            "choose regularizer.prompts=train"
        )
    elif regularizer.prompts == "unlabeled" and _has_no_unlabeled(cfg, parts):
        yield (
            "regularizer.prompts=unlabeled: every prompt of this data has training pairs; set data.num_pairs to fewer "
            "pairs, or data.source.num_unlabeled with data=stories"
        )
    yield from reference_problems(cfg, loss, regularizer, reference)
    if regularizer.follows_beta and loss.uses_beta:
        yield (
            f"regularizer.weight=beta: {method} reads beta itself, so the regularizer needs a number of its own, "
            "such as regularizer.weight=0.01"
        )


def _has_no_unlabeled(cfg: DictConfig, parts: CheckedParts) -> bool:
    """Return whether it is known that every prompt of the data has a training pair."""
    return parts.source is not None and select(cfg, "data.num_pairs") is None and not parts.source.unlabeled_prompts()


def _coefficients(cfg: DictConfig, parts: CheckedParts) -> Iterator[str]:
    """Yield schedules that measure what the run does not provide."""
    schedules = {"alpha": parts.alpha, "beta": parts.beta}
    for name in COEFFICIENTS:
        watched = getattr(schedules[name], "watches", None)
        if watched is None or name in unused_coefficients(cfg):
            continue
        chosen = f"{name}={member_name(name, type(schedules[name]))}"
        if select(cfg, "probe.num_prompts") == 0:
            yield f"{chosen} measures the policy on the probe's samples, but probe.num_prompts=0: set it, say to 16"
        if watched == "kl" and not getattr(parts.reference, "scores_samples", True):
            member = member_name("reference", parts.reference)
            yield f"{chosen} measures the KL to a reference model, but reference={member} provides none: choose frozen"


def _data(cfg: DictConfig, parts: CheckedParts) -> Iterator[str]:
    """Yield data that the source cannot read or the loss cannot learn from."""
    path = select(cfg, "data.path")
    if path is not None and getattr(parts.target("data.source"), "reads_local_files", False):
        yield from filter(None, [missing_data(str(path))])
    source, loss = parts.source, parts.loss
    if source is None:
        return
    if getattr(source, "language", None) is not None and (number := select(cfg, "data.num_pairs")) is not None:
        yield (
            f"data.num_pairs={number}: every split of an enumerable language has all of its pairs; set "
            "data.source.num_pairs, the number of pairs of each prompt"
        )
    from spo.data.source import Source
    from spo.losses import DataNeeds, Loss

    if not isinstance(source, Source):
        yield f"data.source: {type(source).__name__} is not a source: derive it from spo.data.source.Source"
        return
    yield from _writer(source)
    try:
        source.check_limits(select(cfg, "data.max_length"), select(cfg, "data.truncation"))
    except ValueError as error:
        yield first_line(error)
    if isinstance(loss, Loss):
        yield from _mismatches(cfg, source, loss)
    counts = [select(cfg, f"evaluation.{key}") for key in ("reference_samples", "samples_per_prompt")]
    if getattr(source, "language", None) is not None and counts[0] not in (None, counts[1]):
        yield (
            f"evaluation.reference_samples={counts[0]}: in an enumerable language each sample of the policy meets one "
            "of the reference, so that comparisons are independent: leave it out, or set it to "
            f"evaluation.samples_per_prompt ({counts[1]})"
        )
    source.needs = DataNeeds() if not isinstance(loss, Loss) else DataNeeds.of(loss)
    try:
        source.check_columns()
    except ValueError as error:
        yield first_line(error)


def _writer(source: Any) -> Iterator[str]:
    """Yield why the model that writes the completions of the data cannot be loaded."""
    key, folder = "data.source.responses", source.writer
    if folder is None:
        return
    if Path(folder).is_dir():
        yield from folder_problems(key, folder)
    else:
        yield (
            f"{key}={folder}: choose reference, grammar, or the Hugging Face folder of a model (there is no such "
            f"folder, seen from {Path.cwd()}){suggestion(folder, ('reference', 'grammar'))}"
        )


def _mismatches(cfg: DictConfig, source: Any, loss: Any) -> Iterator[str]:
    """Yield what the loss asks of the data and the source does not have."""
    from spo.losses import DataNeeds
    from spo.types import PairLogps

    needs = DataNeeds.of(loss)
    method, data = f"method={select(cfg, 'method.name')}", f"data={member_name('data', type(source), 'source')}"
    if source_key(cfg) != DATA_SOURCE:
        data = "a round of an iteration"
    # Supervised methods lose nothing of a list: they learn from its best completion alone.
    if source.yields_lists and needs.inputs is PairLogps and needs.rejected:
        yield (
            f"{method} compares two completions, but the data has lists of more: choose "
            f"{listed(f'method={name}' for name in _list_methods())}, or lists of two "
            "(data.source.max_responses=2 in data=ranked_jsonl, data.source.list_size=2 in data=enumerable)"
        )
    if source.yields_lists and needs.labelled:
        yield (
            f"{method} reads single completions with labels, but {data} has lists of more than two: choose "
            "data=labelled_jsonl, or data of pairs, whose two completions become labelled ones"
        )
    if source.yields_labels and not needs.labelled:
        what = "lists of completions" if needs.lists else "pairs of completions" if needs.rejected else "completions"
        yield (
            f"{method} reads {what} without labels, but each row of {data} is a single completion with a label: choose "
            "a method of labelled completions (inputs = LabelledLogps), or data of pairs such as data=jsonl"
        )
    if (source.yields_lists or source.yields_labels) and (
        both := [name for name, feature in needs.features.items() if feature.per_completion and not feature.each]
    ):
        yield (
            f"{method}: the feature {both[0]!r} is a number of each completion of a pair, and {data} has "
            f"{'single completions' if source.yields_labels else 'lists of more than two'}: declare "
            f"Feature(NAME, each=True)"
        )
    columns = [name for name in needs.required_columns if name not in source.provided_columns]
    if columns and not source.has_columns:
        yield (
            f"{method} reads the column{'s' if len(columns) > 1 else ''} {', '.join(columns)}, but {data} does not "
            "have such columns: choose "
            f"{'another method' if source_key(cfg) != DATA_SOURCE else 'data from a file, such as data=jsonl'}"
        )


def _model(parts: CheckedParts) -> Iterator[str]:
    """Yield why a model that makes its own weights cannot be built."""
    if getattr(parts.target("model.initial"), "validate", None) is None:
        return
    initial = parts.build("model.initial")
    if isinstance(initial, partial):
        try:
            vars(initial.func)["validate"](**initial.keywords)
        except ValueError as error:
            yield first_line(error)


def _optimizer(parts: CheckedParts) -> Iterator[str]:
    if parts.optimizer is None:
        return
    import torch

    try:
        parts.optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        yield f"optimizer: {first_line(error)}"


def _judge(cfg: DictConfig, parts: CheckedParts) -> Iterator[str]:
    against = select(cfg, "evaluation.against") or []
    others = [str(name) for name in against if name != "reference"] if not isinstance(against, str) else []
    if parts.judge is None and not parts.has_problem("judge") and others:
        yield (
            f"evaluation.against: a comparison with {', '.join(others)} takes a judge, and there is none "
            "(judge=none, or judge=gold of data without a reward): choose one, or set evaluation.against=[reference]"
        )
    path = select(cfg, "judge.path")
    check = getattr(parts.target("judge"), "check_folder", None)
    if check is not None and path is not None and (Path(str(path)) / "config.json").is_file():
        try:
            check(str(path))
        except JudgeError as error:
            yield str(error)


def _list_methods() -> list[str]:
    """Return the shipped methods that read lists."""
    from spo.types import ListLogps

    found = []
    for file in sorted((conf_dir() / "method").glob("*.yaml")):
        if locate(str(OmegaConf.select(OmegaConf.load(file), "loss._target_"))).inputs is ListLogps:
            found.append(file.stem)
    return found
