"""Adapters of peft on a loaded model: a fresh one, or a given one with the weights it was saved with."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from spo.bounds import DropoutRate, PositiveFloat, PositiveInt
from spo.errors import UserError
from spo.models.given_adapter import add_reference_adapter, check_given_adapter
from spo.models.library_errors import Origin, first_line, in_words, some
from spo.notes import note

ALL_LINEAR = "all-linear"
SIZE_MISMATCH = re.compile(r"size mismatch for (\S+):.*?Size\((.*?)\).*?Size\((.*?)\)", re.DOTALL)


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter (arXiv:2106.09685) of peft.

    Attributes:
        r: Rank of the update.
        alpha: Scale of the update, which is multiplied by alpha / r.
        dropout: Dropout probability of the adapter's input.
        target_modules: Names of the modules to adapt, a regular expression of their full names, or ``"all-linear"``.
    """

    r: PositiveInt
    alpha: PositiveFloat
    dropout: DropoutRate
    target_modules: str | Sequence[str]


def with_fresh_adapter(model: nn.Module, lora: LoraSettings, seed: int) -> nn.Module:
    """Return a model with a fresh adapter, which changes nothing until it is trained.

    Args:
        model: Model to adapt.
        lora: Settings of the adapter.
        seed: Random seed of the adapter's initialization.

    Raises:
        UserError: A name in ``model.lora.target_modules`` does not match a module, or peft cannot adapt one.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    check_targets(model, targets)
    choice = f"choose from {_listed(_leaf_names(model))}"
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # Declared as int, but peft takes any number.
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, settings)
        except (ValueError, TypeError, NotImplementedError) as error:
            kind = re.search(r"Target module (\w+)", str(error))
            reason = f"peft does not adapt a {kind[1]}" if kind else first_line(error)
            raise UserError(f"model.lora.target_modules={_shown(targets)}: {reason}; {choice}") from error
    if not any(p.requires_grad for p in adapted.parameters()):
        raise UserError(
            f"model.lora.target_modules={_shown(targets)}: {type(model).__name__} does not have such a layer to adapt; "
            f"{choice}, or model=hf without an adapter"
        )
    experts = [name for name, p in adapted.named_parameters() if "experts" in name and p.ndim == 3]
    if targets == ALL_LINEAR and experts:
        note(
            "experts_not_adapted",
            f"model.lora.target_modules={ALL_LINEAR} leaves the experts of this model as they are: their weights are "
            "not linear layers",
            len(experts),
        )
    return adapted


def check_targets(model: nn.Module, targets: str | Sequence[str]) -> None:
    """Refuse target names that do not match any module, which peft ignores as long as another one does.

    Args:
        model: Model to adapt.
        targets: Names, where each is the end of the full name of a module; or one regular expression of full names.

    Raises:
        UserError: A name does not match.
    """
    modules = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        try:
            fits = targets == ALL_LINEAR or any(re.fullmatch(targets, module) for module in modules)
        except re.error as error:
            raise UserError(f"model.lora.target_modules={targets}: not a regular expression ({error})") from error
        unmatched = [] if fits else [targets]
    else:
        unmatched = [name for name in targets if not any(f".{module}".endswith(f".{name}") for module in modules)]
        if not targets:
            raise UserError("model.lora.target_modules=[] names no module: write all-linear, or the names of modules")
    if not unmatched:
        return
    names = _leaf_names(model)
    close = [match for name in unmatched for match in difflib.get_close_matches(name, names, n=1)]
    if isinstance(targets, str):
        close = [f"[{name}]" for name in close]
    hint = f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""
    raise UserError(
        f"model.lora.target_modules: {', '.join(unmatched)} does not match any module of {type(model).__name__}{hint} "
        f"(it has {_listed(names)}; a list takes the ends of names, a text is a regular expression of whole names)"
    )


def _leaf_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of modules with weights of their own, in order."""
    owners = (name for name, module in model.named_modules() if name and list(module.parameters(recurse=False)))
    names = dict.fromkeys(name.rpartition(".")[2] for name in owners)
    return [name for name in names if not name.isdigit() and "norm" not in name.lower()]


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def _shown(targets: str | Sequence[str]) -> str:
    return targets if isinstance(targets, str) else f"[{','.join(targets)}]"


def with_given_adapter(model: nn.Module, path: str, *, is_trainable: bool) -> nn.Module:
    """Return a model with a saved adapter; one to train comes with a frozen copy, ``reference``.

    Args:
        model: Model that the adapter was made for.
        path: Folder of the adapter, or its name on the hub.
        is_trainable: Whether the adapter is to be trained.

    Raises:
        UserError: The adapter cannot be loaded, or its weights do not fit the model.
    """
    from peft import PeftConfig, PeftModel

    origin = Origin(path, "model.adapter_path")
    with in_words(origin), _quiet():
        config = PeftConfig.from_pretrained(path)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA" or config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{origin} cannot be used: this is a {kind} adapter for {config.task_type}; choose a LORA adapter of a "
            "causal language model"
        )
    check_given_adapter(config)
    _note_other_base(origin, config.base_model_name_or_path, getattr(model, "name_or_path", None))
    base = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    made_for = f"choose the model it was made for{base}"
    with in_words(origin), _quiet():
        try:
            adapted = PeftModel.from_pretrained(model, path, is_trainable=is_trainable)
            # peft only warns about tensors that do not fit. Loading them once more returns their names.
            report = adapted.load_adapter(path, adapter_name="default", is_trainable=is_trainable)
            if is_trainable:
                add_reference_adapter(adapted)
        except RuntimeError as error:
            mismatch = SIZE_MISMATCH.search(str(error))
            if mismatch is None:
                raise
            name, own, needed = mismatch.groups()
            raise UserError(
                f"{origin} cannot be loaded: it does not fit the model ({name} is {own} and not {needed}); {made_for}"
            ) from error
    missing, unexpected = sorted(report.missing_keys), sorted(report.unexpected_keys)
    found = [
        some(missing, "is missing", "are missing"),
        some(unexpected, "has no place in the model", "have no place in the model"),
    ]
    if problems := ", and ".join(filter(None, found)):
        raise UserError(
            f"{origin} cannot be loaded: it does not fit the model: {problems}; {made_for}, or copy it again"
        )
    infinite = sorted(name for name, p in adapted.named_parameters() if ".default." in name and not p.isfinite().all())
    if numbers := some(infinite, "has NaN or infinite numbers", "have NaN or infinite numbers"):
        raise UserError(f"{origin} cannot be used: {numbers}; copy it again, or give an earlier one")
    return adapted


def _note_other_base(origin: Origin, made_for: str | None, given: str | None) -> None:
    """Note an adapter that was made for a model of another name, which may have layers of the same shapes."""
    names = [Path(str(path)).name.lower() for path in (made_for, given) if path]
    if len(set(names)) > 1:
        note(
            "adapter_base",
            f"{origin} was made for {made_for}, and the model is {given}: their weights differ unless one is a copy "
            "of the other",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
