"""Four ways to have a reference: a frozen copy, stored log-probs, the policy's initial adapter, none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import nn


class Reference:
    """Where reference log-probabilities come from.

    It is no ``nn.Module``, so the reference reaches neither an optimizer, nor a checkpoint, nor a sharding strategy.

    Attributes:
        scores_pairs: can score the pairs of the data set.
        scores_samples: can score any sequence, such as a sample of the policy.
    """

    scores_pairs: ClassVar[bool] = True
    scores_samples: ClassVar[bool] = True

    def attach(self, load: Callable[[], nn.Module]) -> None:
        """Gets ready for training; ``load`` builds the model that training starts from, where one is needed."""

    def to(self, device: torch.device) -> None:
        """Moves what it holds to the device of the policy."""

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """A context in which the yielded model is the reference; gradients are off."""
        raise RuntimeError(f"{type(self).__name__} has no model to score with")
        yield policy


class FrozenReference(Reference):
    """A frozen second copy of the model that training starts from."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None

    def attach(self, load: Callable[[], nn.Module]) -> None:
        self.model = load()

    def to(self, device: torch.device) -> None:
        if self.model is not None:
            self.model.to(device)

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        if self.model is None:
            raise RuntimeError("the frozen reference was not attached")
        with torch.no_grad():
            yield self.model


class PrecomputedReference(Reference):
    """Log-probs of the data set's pairs, computed once and kept on disk; no reference model stays in memory.

    Args:
        cache_dir: folder of the content-addressed cache.
        batch_size: pairs per forward pass while computing.
    """

    scores_samples: ClassVar[bool] = False

    def __init__(self, cache_dir: str, batch_size: int) -> None:
        self.cache_dir, self.batch_size = cache_dir, batch_size


class AdapterOffReference(Reference):
    """The initial state of the policy's own adapter: no second copy of the model.

    A fresh adapter starts as a no-op, so its initial state is the policy with the adapter switched off. A given
    adapter (``model.adapter_path``) is kept frozen under the name ``reference``, which is then the initial state.
    """

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        modes = {module: module.training for module in policy.modules()}
        policy.eval()  # adapter dropout must not reach the reference
        try:
            with torch.no_grad():
                if "reference" in policy.peft_config:  # type: ignore[operator]
                    policy.set_adapter("reference")  # type: ignore[operator]
                    try:
                        yield policy
                    finally:
                        policy.set_adapter("default")  # type: ignore[operator]
                else:
                    with policy.disable_adapter():  # type: ignore[operator]
                        yield policy
        finally:
            for module, training in modes.items():
                module.training = training


class NoReference(Reference):
    """No reference, for compositions in which no part needs one."""

    scores_pairs: ClassVar[bool] = False
    scores_samples: ClassVar[bool] = False
