"""Kinds of reference: a frozen copy, its stored log-probs, both, the policy's initial adapter, none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from spo.bounds import PositiveInt
from spo.data.logps_store import LogpsStore
from spo.errors import UserError
from spo.forward.sharding import Sharding, needs_all_processes, reshard, shard
from spo.models.fingerprint import fingerprint
from spo.models.given_adapter import REFERENCE_ADAPTER
from spo.types import PreferenceBatch

if TYPE_CHECKING:
    from spo.forward.speed import Speed


class Reference:
    """A source of reference log-probabilities.

    It is not an ``nn.Module``, so the reference reaches no optimizer, no checkpoint and no sharding strategy.

    Attributes:
        scores_pairs: Whether it can score the pairs of the data set.
        scores_samples: Whether it can score any sequence, such as a sample of the policy.
        stores_logps: Whether it stores log-probs of pairs, which is of use only if the loss reads them from there.
        needs_adapter: Whether it needs a policy with an adapter.
        moves: Whether its weights change during training, in :meth:`after_step`. All other references stay as they are,
            which :meth:`check_unmoved` checks. Checkpoints have the weights of a reference that moves.
        key: Configuration key of the reference.
    """

    scores_pairs: ClassVar[bool] = True
    scores_samples: ClassVar[bool] = True
    stores_logps: ClassVar[bool] = False
    needs_adapter: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    key: str = "reference"
    _fingerprint: int | None = None

    def attach(self, load: Callable[[], nn.Module]) -> None:
        """Prepare for training.

        Args:
            load: Function that builds the model that training starts from; called only if the model is needed.
        """

    def use_store(self, open_store: Callable[[str, Speed, torch.device], LogpsStore]) -> None:
        """Take the function that opens stored log-probs, if this reference stores them during training.

        Args:
            open_store: Function from a folder, the layout of forward passes and their device to the store.
        """

    def precompute(self, score: Callable[[PrecomputedReference], dict[str, Tensor]]) -> dict[str, Tensor] | None:
        """Score all pairs before training, if that is what this reference does.

        Args:
            score: Function to ``(P, n)`` log-probs of the ``P`` pairs or lists of each split.
        """
        return None

    def describe(self) -> str:
        """Return a few words for the start panel."""
        return type(self).__name__.removesuffix("Reference").lower()

    def shard(self, mesh: DeviceMesh, settings: Sharding) -> None:
        """Shard the model over processes, if there is one."""

    def to(self, device: torch.device) -> None:
        """Move the model to the device of the policy."""

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Make a context in which the yielded model is the reference; gradients are off.

        Raises:
            RuntimeError: There is no model.
        """
        raise RuntimeError(f"{type(self).__name__} does not have a model to score with")
        yield policy

    def pair_logps(self, batch: PreferenceBatch, policy: nn.Module, speed: Speed) -> Tensor:
        """Return ``(N,)`` summed log-probs of a batch's sequences."""
        with self.active(policy) as reference:
            return speed.logps(reference, batch.sequences)

    def after_step(self, policy: nn.Module, step: int) -> None:
        """Follow the policy, if the class declares ``moves``. Called on every process after each step that was taken.

        Args:
            policy: Model in training, after the step.
            step: Optimizer steps taken so far, those that were skipped not counted: 1, 2, 3, and so on.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights that checkpoints have: those of a reference that moves, else none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the weights of :meth:`state_dict`."""

    def weights(self) -> Iterator[Tensor]:
        """Yield the weights that must not change unless the class declares ``moves``: those of its models.

        Of a sharded model it is the share of this process.
        """
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                yield from (_local(weight) for weight in value.state_dict().values() if isinstance(weight, Tensor))

    def check_unmoved(self) -> None:
        """Check that the weights are those of the first call, unless the class declares ``moves``.

        It waits for the device.

        Raises:
            UserError: A callback or a method of the reference changed the weights.
        """
        if self.moves:
            return
        now = fingerprint(self.weights())
        if self._fingerprint is None:
            self._fingerprint = now
        elif now != self._fingerprint:
            raise UserError(
                f"{self.key}: the weights of this {type(self).__name__} changed during training, and it does not "
                "declare that it moves: change them in after_step of a class with moves = True, and choose that "
                "class with reference._target_=MODULE.CLASS"
            )


class FrozenReference(Reference):
    """A second copy of the model that training starts from. It stays as it is, unless a subclass declares ``moves``."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None

    def attach(self, load: Callable[[], nn.Module]) -> None:
        self.model = load()
        self._fingerprint = None
        self.check_unmoved()

    def describe(self) -> str:
        return f"{super().describe()}, a copy that moves" if self.moves else "frozen copy"

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict() if self.moves and self.model is not None else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.moves and self.model is not None:
            self.model.load_state_dict(state)

    def shard(self, mesh: DeviceMesh, settings: Sharding) -> None:
        if self.model is not None:
            self.check_unmoved()
            shard(self.model, mesh, settings)
            self._fingerprint = None  # From here on it is that of the share of this process.
            self.check_unmoved()

    def to(self, device: torch.device) -> None:
        if self.model is not None:
            self.model.to(device)

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        if self.model is None:
            raise RuntimeError("the frozen reference was not attached")
        try:
            with torch.no_grad():
                yield self.model
        finally:
            reshard(self.model)


class FollowingReference(FrozenReference):
    """A copy that moves towards the policy every few steps (TR-DPO, arXiv:2404.09656).

    Args:
        share: Share of the way to the policy that each move goes; 1 copies the policy.
        every: Optimizer steps between two moves.
    """

    moves: ClassVar[bool] = True

    def __init__(self, share: Annotated[float, Gt(0), Le(1)], every: PositiveInt) -> None:
        super().__init__()
        self.share, self.every = share, every

    def describe(self) -> str:
        return f"copy that moves by {self.share:g} of the way to the policy every {self.every} steps"

    @torch.no_grad()
    def after_step(self, policy: nn.Module, step: int) -> None:
        if step % self.every == 0 and self.model is not None:
            for own, new in zip(self.model.parameters(), policy.parameters(), strict=True):
                own.lerp_(new.to(own), self.share)


class CachedReference(FrozenReference):
    """A frozen copy whose log-probs of the pairs are stored on disk during training, so that none is computed twice.

    Training starts at once, and only pairs that are used are scored. Later epochs, resumed runs, and other jobs with
    the same reference read the stored log-probs.

    A step that scores a pair waits for the device once, to write the log-probs before the step ends. A pair that the
    process has seen before is served from memory, without the lock that processes share.

    Args:
        cache_dir: Folder of the stored log-probs.

    Attributes:
        store: Stored log-probs. Without a store this is a :class:`FrozenReference`.
        open_store: Function from layout and device to the store. It is called when log-probs are first needed, since
            the layout that the models support is not known earlier.
        known: Log-probs that this process has read or stored, by the key of the sequence.
    """

    stores_logps: ClassVar[bool] = True

    def __init__(self, cache_dir: str) -> None:
        super().__init__()
        self.cache_dir = cache_dir
        self.store: LogpsStore | None = None
        self.open_store: Callable[[Speed, torch.device], LogpsStore] | None = None
        self.known: dict[bytes, float] = {}

    def use_store(self, open_store: Callable[[str, Speed, torch.device], LogpsStore]) -> None:
        self.open_store = partial(open_store, self.cache_dir)

    def describe(self) -> str:
        return "frozen copy, its log-probs of the pairs stored"

    def pair_logps(self, batch: PreferenceBatch, policy: nn.Module, speed: Speed) -> Tensor:
        device = batch.index.device
        if self.store is None and self.open_store is not None:
            self.store = self.open_store(speed, device)
        if self.store is None or batch.keys is None:
            return super().pair_logps(batch, policy, speed)
        if unread := [key for key in batch.keys if key not in self.known]:
            self._remember(unread, self.store.get(unread))
        missing = [i for i, key in enumerate(batch.keys) if key not in self.known]
        others_score = self._is_needed_by_others(len(missing) > 0, device)
        if missing:
            self.check_unmoved()  # Other runs read what is stored, so it must be of the weights that name the store.
            sequences = batch.sequences
            if len(missing) < len(batch.keys):
                sequences = speed.arrange(sequences.to("cpu").rows(torch.tensor(missing))).to(device)
            with self.active(policy) as reference:
                computed = speed.logps(reference, sequences).cpu()
            keys = [batch.keys[i] for i in missing]
            self._remember(keys, self.store.put(keys, computed))
        elif others_score:
            with self.active(policy) as reference:
                speed.logps(reference, batch.sequences)
        # NaN is not stored, so a sequence that has it is computed each time.
        logps = [self.known.get(key, torch.nan) for key in batch.keys]
        return torch.tensor(logps, dtype=self.store.dtype).to(device, non_blocking=True)

    def _remember(self, keys: Sequence[bytes], logps: Tensor) -> None:
        """Keep log-probs in memory, except NaN, so that a sequence is looked up once by a process."""
        self.known |= {key: logp for key, logp in zip(keys, logps.tolist(), strict=True) if logp == logp}

    def _is_needed_by_others(self, is_needed: bool, device: torch.device) -> bool:
        """Return whether a process misses log-probs, if the forward pass of one process needs all of them."""
        if self.model is None or not needs_all_processes(self.model):
            return False
        flag = torch.tensor(int(is_needed), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)


class PrecomputedReference(Reference):
    """Log-probs of all pairs, computed before training and stored on disk; no reference model stays in memory.

    Args:
        cache_dir: Folder of the stored log-probs.
        batch_tokens: Most tokens per forward pass while computing.

    Attributes:
        found: Number of sequences whose log-probs were stored before.
        computed: Number of sequences whose log-probs were computed by this run.
    """

    scores_samples: ClassVar[bool] = False
    stores_logps: ClassVar[bool] = True

    def __init__(self, cache_dir: str, batch_tokens: PositiveInt) -> None:
        self.cache_dir, self.batch_tokens = cache_dir, batch_tokens
        self.found = self.computed = 0

    def precompute(self, score: Callable[[PrecomputedReference], dict[str, Tensor]]) -> dict[str, Tensor]:
        return score(self)

    def describe(self) -> str:
        return f"stored log-probs of {self.found + self.computed} sequences, {self.computed} of them new"


class AdapterOffReference(Reference):
    """The initial state of the policy's own adapter: no second copy of the model.

    A fresh adapter starts as a no-op, so its initial state is the policy with the adapter switched off. A given
    adapter (``model.adapter_path``) is frozen under the name ``reference``, which is then the initial state.
    """

    needs_adapter: ClassVar[bool] = True
    policy: nn.Module | None = None

    def describe(self) -> str:
        return "initial state of the adapter"

    def weights(self) -> Iterator[Tensor]:
        if self.policy is not None:
            reshard(self.policy)
            yield from (_local(weight) for weight in self.policy.parameters() if not weight.requires_grad)

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        if self.policy is None:
            self.policy = policy
            self.check_unmoved()
        modes = {module: module.training for module in policy.modules()}
        policy.eval()  # Adapter dropout must not reach the reference.
        try:
            with torch.no_grad(), _initial_adapter(policy):
                yield policy
        finally:
            for module, training in modes.items():
                module.training = training


class NoReference(Reference):
    """The absence of a reference, for compositions in which no part needs one."""

    scores_pairs: ClassVar[bool] = False
    scores_samples: ClassVar[bool] = False

    def describe(self) -> str:
        return "none"


@contextmanager
def _initial_adapter(policy: Any) -> Iterator[None]:
    """Make a context in which a policy computes what it did before training.

    peft switches ``requires_grad`` of the adapters along. In a sharded model this has to reach the shards, since
    the next step takes it over from them.
    """
    given = REFERENCE_ADAPTER in policy.peft_config
    reshard(policy)
    with nullcontext() if given else policy.disable_adapter():
        if given:
            policy.set_adapter(REFERENCE_ADAPTER)
        try:
            yield
        finally:
            reshard(policy)
            if given:
                policy.set_adapter("default")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
