"""Rules about a loss alone: what it learns must be found by the optimizer and by checkpoints, and its metrics named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

from spo.config.checks.targets import CheckedParts

MAX_DEPTH = 6
"""Levels of attributes and containers in which tensors and modules of a loss are looked for."""
MAX_HELD = 1000
"""Objects of a container that are looked at."""
METRIC_KEY = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)*")


def loss_problems(parts: CheckedParts) -> Iterator[str]:
    """Yield why a loss cannot be trained, resumed or logged.

    Args:
        parts: Parts of the run.
    """
    from spo.losses import Loss

    if isinstance(parts.loss, Loss):
        yield from _inputs(parts.loss)
        yield from _state(parts.loss, getattr(parts.target("strategy.plugin"), "__name__", ""))
        yield from _metrics(parts.loss)


def _inputs(loss: Any) -> Iterator[str]:
    from spo.types import ListLogps

    if getattr(loss, "uses_lists", False) and loss.inputs is not ListLogps:
        yield (
            f"method.loss: {type(loss).__name__} declares uses_lists, which no longer has an effect: derive it from "
            "spo.losses.ListLoss, and write of_ranking"
        )


def _state(loss: Any, strategy: str) -> Iterator[str]:
    from torch import Tensor, nn
    from torch.nn.parameter import is_lazy

    name = type(loss).__name__
    if not isinstance(loss, nn.Module):
        if place := next(_hidden(loss, name, set()), None):
            yield f"method.loss: {place} would not be trained or saved: derive {name} from torch.nn.Module too"
        elif loss.has_statistics:
            yield (
                f"method.loss: {name} updates statistics, which a resumed run would not have: derive it from "
                "torch.nn.Module too, and keep them with register_buffer"
            )
        return
    if type(loss).__call__ is nn.Module.__call__:
        yield f"method.loss: torch.nn.Module comes first among the base classes of {name}: write it last"
    for path, module in loss.named_modules():
        if place := next(_hidden(module, ".".join(filter(None, (name, path))), set()), None):
            yield (
                f"method.loss: {place} would not be trained or saved: make it an attribute by itself, or use "
                "torch.nn.ModuleList, ModuleDict or ParameterList"
            )
    if any(map(is_lazy, loss.parameters())):
        yield f"method.loss: {name} has layers of unknown size: give their sizes instead of using lazy ones"
        return
    state = loss.state_dict()
    if loss.has_statistics and not any(key in state for key, _ in loss.named_buffers()):
        yield (
            f"method.loss: {name} updates statistics and does not have a buffer in its state, so a resumed run would "
            "not have them: keep them with register_buffer"
        )
    if others := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        yield f"method.loss: the state {others[0]} of {name} is not a tensor: keep it with register_buffer"
    if state and strategy == "DeepSpeedStrategy":
        yield f"strategy=deepspeed does not carry the parameters and buffers of {name}: choose strategy=ddp or fsdp"


def _hidden(value: Any, place: str, seen: set[int], depth: int = 0) -> Iterator[str]:
    """Yield the places of trainable tensors and modules that a loss holds and torch does not find.

    Args:
        value: Loss or one of its modules, or what it holds.
        place: Name of ``value`` for people.
        seen: Ids of the objects that were looked at.
        depth: Levels between the loss and ``value``.
    """
    from torch import Tensor, nn

    if depth and (isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.requires_grad)):
        yield place
        return
    if id(value) in seen or depth > MAX_DEPTH or isinstance(value, Tensor | type | ModuleType):
        return
    seen.add(id(value))
    for name, one in islice(_held(value, place, depth == 0), MAX_HELD):
        yield from _hidden(one, name, seen, depth + 1)


def _held(value: Any, place: str, is_loss: bool) -> Iterator[tuple[str, Any]]:
    """Yield the objects that an object holds, with their places."""
    if isinstance(value, Mapping):
        yield from ((f"{place}[{key!r}]", one) for key, one in value.items())
    elif hasattr(value, "_fields"):  # a named tuple, such as a term
        yield from ((f"{place}.{key}", getattr(value, key)) for key in value._fields)
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{place}[{i}]", one) for i, one in enumerate(value))
    elif isinstance(value, partial):
        yield from ((place, one) for one in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # A variable may not have a value yet.
                yield f"{place} ({name})", cell.cell_contents
    else:
        own = {key: one for key, one in getattr(value, "__dict__", {}).items() if key not in _REGISTERED}
        for of_class in type(value).__mro__ if is_loss else ():
            if of_class.__module__.partition(".")[0] not in _OURS:
                own = dict(vars(of_class)) | own
        yield from ((f"{place}.{key}", one) for key, one in own.items() if not key.startswith("__"))


_REGISTERED = ("_parameters", "_buffers", "_modules")
"""Attributes of a module in which torch finds its tensors and modules."""
_OURS = ("spo", "torch", "builtins", "abc", "typing")
"""Packages whose classes do not hold tensors."""


def _metrics(loss: Any) -> Iterator[str]:
    from spo.losses.base import LOSS_METRICS
    from spo.metrics.catalogue import find
    from spo.module import STEP_METRICS, TIME_METRICS
    from spo.watch import HEALTH_METRICS, PROBE_METRICS

    name, seen = type(loss).__name__, set(LOSS_METRICS)
    of_module = {*STEP_METRICS, *TIME_METRICS, *HEALTH_METRICS, *PROBE_METRICS}
    if isinstance(loss.extra_metrics, str):
        yield f"method.loss: {name}.extra_metrics is a text: write extra_metrics = ({loss.extra_metrics!r},)"
        return
    for key in loss.extra_metrics:
        if not isinstance(key, str) or not METRIC_KEY.fullmatch(key):
            yield (
                f"method.loss: {name}.extra_metrics has {key!r}: use lower-case letters, digits and _, in parts "
                "separated by /"
            )
        elif key in seen:
            yield f"method.loss: {name}.extra_metrics has {key!r} twice, or a metric that every loss has: remove it"
        elif key in of_module or key.startswith(("alpha/", "beta/", "reference/")) or find(key) is not None:
            yield f"method.loss: {name}.extra_metrics has {key!r}, the key of another metric: choose a name of its own"
        if isinstance(key, str):
            seen.add(key)
