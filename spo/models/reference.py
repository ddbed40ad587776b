"""Ways to have a reference: a frozen copy, its stored log-probs, both, the policy's initial adapter, none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from spo.bounds import PositiveInt
from spo.data.logps_store import LogpsStore
from spo.types import PreferenceBatch

if TYPE_CHECKING:
    from spo.forward.speed import Speed


class Reference:
    """Where reference log-probabilities come from.

    It is no ``nn.Module``, so the reference reaches neither an optimizer, nor a checkpoint, nor a sharding strategy.

    Attributes:
        scores_pairs: can score the pairs of the data set.
        scores_samples: can score any sequence, such as a sample of the policy.
        stores_logps: Stores log-probabilities of pairs while training, so something has to read them.
        needs_adapter: Works only with a policy that has an adapter.
    """

    scores_pairs: ClassVar[bool] = True
    scores_samples: ClassVar[bool] = True
    stores_logps: ClassVar[bool] = False
    needs_adapter: ClassVar[bool] = False

    def attach(self, load: Callable[[], nn.Module]) -> None:
        """Gets ready for training; ``load`` builds the model that training starts from, where one is needed."""

    def to(self, device: torch.device) -> None:
        """Moves what it holds to the device of the policy."""

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """A context in which the yielded model is the reference; gradients are off."""
        raise RuntimeError(f"{type(self).__name__} has no model to score with")
        yield policy

    def pair_logps(self, batch: PreferenceBatch, policy: nn.Module, speed: Speed) -> Tensor:
        """``(N,)`` summed log-probs of the sequences of a batch: those that came with it, else computed now."""
        if batch.reference_logps is not None:
            return batch.reference_logps
        with self.active(policy) as reference:
            return speed.logps(reference, batch.sequences)


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


class CachedReference(FrozenReference):
    """A frozen copy whose log-probs of the pairs are kept on disk as they come, so that none is computed twice.

    Training starts at once, and only pairs that are used are scored: later epochs, resumed runs, and other jobs with
    the same reference find them.

    A step in which something is scored waits for the device once, to write it down before the step is over.

    Args:
        cache_dir: folder of the stored log-probs.

    Attributes:
        store: where they are kept; without one it is a :class:`FrozenReference`.
        open_store: finds it for the layout and the device that log-probs are computed with, when they are first asked
            for: what the models take is known no earlier.
    """

    stores_logps: ClassVar[bool] = True

    def __init__(self, cache_dir: str) -> None:
        super().__init__()
        self.cache_dir = cache_dir
        self.store: LogpsStore | None = None
        self.open_store: Callable[[Speed, torch.device], LogpsStore] | None = None

    def pair_logps(self, batch: PreferenceBatch, policy: nn.Module, speed: Speed) -> Tensor:
        device = batch.index.device
        if self.store is None and self.open_store is not None:
            self.store = self.open_store(speed, device)
        if self.store is None or batch.keys is None:
            return super().pair_logps(batch, policy, speed)
        logps = self.store.get(batch.keys)
        missing = logps.isnan().nonzero().squeeze(-1)
        if len(missing) > 0:
            sequences = batch.sequences
            if len(missing) < len(logps):
                sequences = speed.arrange(sequences.to("cpu").rows(missing)).to(device)
            with self.active(policy) as reference:
                logps[missing] = speed.logps(reference, sequences).cpu()
            self.store.put([batch.keys[i] for i in missing.tolist()], logps[missing])
        return logps.to(device, non_blocking=True)


class PrecomputedReference(Reference):
    """Log-probs of the data set's pairs, computed before training and kept on disk; no reference model stays in memory.

    Args:
        cache_dir: folder of the stored log-probs.
        batch_tokens: tokens of a forward pass while computing, at most.

    Attributes:
        found: sequences of the data set whose log-probs were there.
        computed: sequences for which they were computed.
    """

    scores_samples: ClassVar[bool] = False

    def __init__(self, cache_dir: str, batch_tokens: PositiveInt) -> None:
        self.cache_dir, self.batch_tokens = cache_dir, batch_tokens
        self.found = self.computed = 0


class AdapterOffReference(Reference):
    """The initial state of the policy's own adapter: no second copy of the model.

    A fresh adapter starts as a no-op, so its initial state is the policy with the adapter switched off. A given
    adapter (``model.adapter_path``) is kept frozen under the name ``reference``, which is then the initial state.
    """

    needs_adapter: ClassVar[bool] = True

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
