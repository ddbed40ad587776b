"""Checks of what each ``_target_`` names: whether it exists, its parameters, their types and bounds; and its parts."""

from __future__ import annotations

import importlib.util
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from spo.config.checks.settings import HINTS, is_given, shown
from spo.config.nodes import (
    DATA_SOURCE,
    DIRECTIVES,
    detached,
    first_line,
    locate,
    nodes_with_target,
    select,
    source_key,
)
from spo.config.schema import typed_keys
from spo.config.values import violation
from spo.errors import JudgeError, missing_package
from spo.wording import suggestion

# Packages that classes of other packages need only when they are used; ours declare `needs_package`.
NEEDED_PACKAGES = {"DeepSpeedStrategy": "deepspeed", "TensorBoardLogger": "tensorboard"}


def target_problems(cfg: DictConfig) -> Iterator[str]:
    """Yield targets that cannot be imported, parameters they do not have, and values that these do not take."""
    for key, node in nodes_with_target(cfg):
        try:
            target = locate(str(node.get("_target_")))
        except ImportError as error:
            yield f"{key}: {error}"
            continue
        package = getattr(target, "needs_package", NEEDED_PACKAGES.get(getattr(target, "__name__", "")))
        if package is not None and importlib.util.find_spec(package) is None:
            yield f"{key}: {missing_package(package)}"
        yield from _arguments(key, node, target)
    if select(cfg, "model.lora") is not None and importlib.util.find_spec("peft") is None:
        yield f"model.lora: {missing_package('peft')}"


def _arguments(key: str, node: DictConfig, target: Callable[..., Any]) -> Iterator[str]:
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # Some builtins do not have a signature.
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = [str(name) for name in node if name not in DIRECTIVES]
    for name in given:
        if name not in names and not takes_any:
            short = str(node.get("_target_")).rpartition(".")[2]
            remedy = suggestion(name, names) or f"; ~{key}.{name} removes it"
            yield f"{key}.{name}: {short} does not have this parameter{remedy}"
    if not (node.get("_partial_") or node.get("_args_")):
        for name in names:
            if name not in given and parameters[name].default is inspect.Parameter.empty:
                yield f"{key}.{name} is not set ({key}.{name}=...)"
    for name, hint in parameter_types(target).items():
        path = f"{key}.{name}"
        # Keys of the schema are judged already.
        if name not in given or path in typed_keys() or not is_given(node, name):
            continue
        value = select(node, name)
        if value is None and name in parameters and parameters[name].default is None:
            continue  # Other packages annotate `x: int = None`.
        if words := violation(value, hint):
            yield f"{path}={shown(value)}: {HINTS.get(path, words) if value is None else words}"


def parameter_types(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a target's parameters, bounds included, as far as their names can be resolved."""
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    namespace = getattr(function, "__globals__", {})
    types: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        one = SimpleNamespace(__annotations__={name: annotation})
        try:
            types |= typing.get_type_hints(one, namespace, include_extras=True)
        except Exception:  # A name that exists for type checkers alone: this parameter is not judged.
            continue
    types.pop("return", None)
    return types


class CheckedParts:
    """The parts of a run that are cheap to build, built once for the checks.

    Args:
        cfg: Composed configuration.
        found: Problems found so far. A part with one is not built: that would report it a second time.

    Attributes:
        problems: Why parts could not be built, one sentence each.
    """

    def __init__(self, cfg: DictConfig, found: Sequence[str] = ()) -> None:
        self.cfg, self.found = cfg, list(found)
        self.problems: list[str] = []

    @cached_property
    def alpha(self) -> Any:
        """The schedule of alpha."""
        return self.build("alpha")

    @cached_property
    def beta(self) -> Any:
        """The schedule of beta."""
        return self.build("beta")

    @cached_property
    def loss(self) -> Any:
        """The loss."""
        return self.build("method.loss")

    @cached_property
    def regularizer(self) -> Any:
        """The regularizer."""
        return self.build("regularizer")

    @cached_property
    def optimizer(self) -> Any:
        """The function that makes the optimizer from its parameters."""
        return self.build("optimizer")

    @cached_property
    def source(self) -> Any:
        """The source of the data if it comes with the package; others may be costly to build."""
        keys = dict.fromkeys((DATA_SOURCE, source_key(self.cfg)))
        return self.build(source_key(self.cfg)) if all(_is_shipped(self.cfg, key) for key in keys) else None

    @cached_property
    def judge(self) -> Any:
        """The judge, ``None`` if there is none; a reward function may be anything, so those are not built."""
        return self.build("judge") if select(self.cfg, "judge.reward") is None else ANY_JUDGE

    @cached_property
    def reference(self) -> Any:
        """The class of the reference."""
        return self.target("reference")

    def target(self, key: str) -> Any:
        """Return what the node at a key names, ``None`` if it names nothing that can be imported."""
        try:
            return locate(str(select(self.cfg, f"{key}._target_")))
        except ImportError:
            return None

    def build(self, key: str) -> Any:
        """Return what the node at a key makes, ``None`` (and a problem) if it cannot be made."""
        from hydra.errors import InstantiationException
        from hydra.utils import instantiate
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        node = select(self.cfg, key)
        if not isinstance(node, DictConfig) or self.has_problem(key):
            return None
        try:
            return instantiate(detached(node), _convert_="all")
        except OmegaConfBaseException:  # A missing or unresolved value is reported by itself.
            return None
        except InstantiationException as error:
            cause = error.__cause__ or error
            wrong_value = (ValueError, TypeError, JudgeError, InstantiationException, MisconfigurationException)
            if not isinstance(cause, wrong_value):
                raise  # A fault in the code, not a wrong value.
            words = first_line(cause)
            self.problems.append(words if words.startswith(key) else f"{key}: {words}")
            return None

    def has_problem(self, key: str) -> bool:
        """Return whether a problem of a key, or of one below it, is known."""
        return any(one.startswith((f"{key}.", f"{key}:", f"{key}=")) for one in [*self.found, *self.problems])


ANY_JUDGE = object()


def _is_shipped(cfg: DictConfig, key: str) -> bool:
    return str(select(cfg, f"{key}._target_")).startswith("spo.")
