"""The guard of the optimizer step: a loss or gradient that is not finite never reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spo.errors import UserError
from spo.metrics.sums import Group
from spo.notes import note
from spo.objective.learned import tensors_of
from spo.objective.pairs import PairScores, impossible

if TYPE_CHECKING:
    from spo.data import TokenizedPair
    from spo.module import AlignmentModule

MAX_NAMED_PAIRS = 3
COEFFICIENT_RANGE = (1e-6, 1e6)
"""Range of alpha and beta outside of which they are named as the likely cause."""
LARGE_WEIGHT = 1e15
"""Weight of a pair from which on it is named as the likely cause: squares of its gradient approach float32's limit."""
ASYNCHRONOUS_DEVICES = ("cuda",)
"""Types of devices that the host runs ahead of, and that copy to it without blocking it."""


class NonFiniteError(UserError):
    """A loss, gradient or weight that is infinite or undefined."""


@dataclass(frozen=True)
class StageKeys:
    """Configuration keys that messages of a training stage name.

    Attributes:
        lr: Key of the learning rate.
        clip_norm: Key of the largest gradient norm.
        stage: Name of the stage for people, empty for alignment.
        memory: Keys that decide how much memory a step takes.
        validation_memory: Keys that decide how much memory a validation takes.
    """

    lr: str = "optimizer.lr"
    clip_norm: str = "trainer.gradient_clip_val"
    stage: str = ""
    memory: Sequence[str] = (
        "data.micro_batch_size",
        "data.micro_batch_tokens",
        "data.max_length",
        "speed.max_logits",
    )
    validation_memory: Sequence[str] = ("data.eval_batch_size", "data.micro_batch_tokens", "data.max_length")


@dataclass(frozen=True)
class Step:
    """An optimizer step as the guard sees it.

    Attributes:
        number: Optimizer steps taken before it.
        loss: Loss of this process.
        grad_norm: Norm of the gradient, over all processes.
        is_bad: 1 if one of both is not finite on any process, else 0.
        scores: Scores of this process's pairs.
        metrics: Metrics of the step, which are forgotten if it is skipped.
    """

    number: int
    loss: Tensor
    grad_norm: Tensor
    is_bad: Tensor
    scores: Sequence[PairScores]
    metrics: Group


@dataclass
class Facts:
    """Numbers from which the likely cause follows. They are added up over processes.

    Attributes:
        masked: Positions of pairs with a token that a model masks.
        unlikely: Positions of pairs with a completion of probability zero under the policy.
        bad: Positions of pairs whose loss is not finite.
        policy: Positions of pairs whose log-probs under the policy are not finite.
        reference: Positions of pairs whose log-probs under the reference are not finite.
        losses: Loss and position of the other pairs.
        broken: Names of the tensors of policy and loss that are not finite.
    """

    masked: list[int] = field(default_factory=list)
    unlikely: list[int] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    policy: list[int] = field(default_factory=list)
    reference: list[int] = field(default_factory=list)
    losses: list[tuple[float, int]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def __add__(self, other: Facts) -> Facts:
        return Facts(**{name: [*value, *vars(other)[name]] for name, value in vars(self).items()})


class Guard:
    """Decides before each optimizer step whether it may be taken, the same on every process.

    The host does not wait for the device at each step where the optimizer can be told on the device to leave weights
    and state as they are, which PyTorch's fused optimizers can (``found_inf``). The host then reads the flag of a step
    one step later, before it starts the next update. Other optimizers, sharded weights, a reference that moves and the
    first step of a process cost one wait for one number. Running statistics of a loss are restored on the device.

    Args:
        module: Module whose steps are guarded.
        keys: Configuration keys that messages name.

    Attributes:
        max_skipped: Largest number of steps to skip; with 0 the first one ends the run.
        skipped: Steps that were skipped, as numbers of the steps taken before each.
    """

    def __init__(self, module: AlignmentModule, keys: StageKeys) -> None:
        self.module, self.keys = module, keys
        self.max_skipped = 0
        self.skipped: list[int] = []
        self._pending: tuple[Step, Any] | None = None
        # The array shares the memory of the tensor, which copies from a device do not block.
        self._flag = torch.zeros(1)
        self._flag_on_host = self._flag.numpy()
        self._is_first = True
        self._broken_at_start: int | None = None

    # --- the step ----------------------------------------------------------------------------------------------------

    @contextmanager
    def gate(self, optimizer: LightningOptimizer, loss: Tensor, grad_norm: Tensor, metrics: Group) -> Iterator[None]:
        """Make a context in which ``optimizer.step`` leaves weights and state as they are if the step is bad.

        Args:
            optimizer: Optimizer with the gradient of the step.
            loss: Loss of this process.
            grad_norm: Norm of the gradient, over all processes.
            metrics: Metrics of the step.

        Raises:
            NonFiniteError: This step or the one before it is bad, and no more may be skipped.
            UserError: A pair has a completion of probability zero.
        """
        self.settle()
        is_bad = self._over_processes((~(loss.isfinite() & grad_norm.isfinite())).float())  # fused optimizers want a 1
        self.module.statistics.restore_if(is_bad)
        step = Step(self.module.global_step, loss, grad_norm, is_bad, self.module.pairs.scores, metrics)
        if self._can_defer(optimizer.optimizer):
            with _told_to_skip(optimizer.optimizer, is_bad), self._update_in_words():
                yield
            self._read_later(step)
            return
        self._is_first = False
        if bool(is_bad):
            self._refuse(step)
            optimizer.zero_grad()  # An optimizer leaves weights without a gradient alone, and the step still counts.
        with self._update_in_words():
            yield

    @contextmanager
    def _update_in_words(self) -> Iterator[None]:
        step = self.module.global_step + 1
        try:
            yield
        except RuntimeError as error:
            if "without overflow" not in str(error):  # PyTorch's words for a factor that float32 cannot hold
                raise
            raise NonFiniteError(f"the update of step {step} overflows: {self._too_fast()}") from error

    def _can_defer(self, optimizer: Any) -> bool:
        return (
            self.module.device.type in ASYNCHRONOUS_DEVICES
            and getattr(optimizer, "_step_supports_amp_scaling", False)
            # A fused SGD does not initialize its momentum in a first step that it skips.
            and (isinstance(optimizer, torch.optim.Adam) or not self._is_first)
            and not self.module.reference_follows
            and not any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
        )

    def _read_later(self, step: Step) -> None:
        self._flag.copy_(step.is_bad, non_blocking=True)
        copied = torch.cuda.Event() if step.is_bad.is_cuda else None
        if copied is not None:
            copied.record()
        self._pending = step, copied

    def settle(self) -> None:
        """Read the flag of the last step if it has not been read, and act on it.

        Raises:
            NonFiniteError: The step is bad, and no more may be skipped.
        """
        if self._pending is None:
            return
        (step, copied), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        if self._flag_on_host[0]:
            self._refuse(step)

    def _refuse(self, step: Step) -> None:
        """Count a step that is not taken, or raise."""
        module = self.module
        train = module.trainer.datamodule.train  # type: ignore[attr-defined]
        facts = self._facts(step.scores, train, "training", step.number)
        loss_is_bad = not math.isfinite(float(step.loss))
        name = "loss" if loss_is_bad or facts.bad else "gradient"
        value = float(step.loss if loss_is_bad else step.grad_norm)
        pairs = describe_pairs(facts, train)
        cause = self._likely_cause(facts, train, step.number, name)
        what = "is not finite" if math.isfinite(value) else f"is {value:g}"
        stage = f" of {self.keys.stage}" if self.keys.stage else ""
        words = f"the {name} of step {step.number + 1}{stage} {what}, and the step was not taken: {pairs}; {cause}"
        if len(self.skipped) >= self.max_skipped:
            if self.skipped:
                count = len(self.skipped)
                words += f"; {count} steps were skipped before it (callbacks.nonfinite.max_skipped={self.max_skipped})"
            raise NonFiniteError(words)
        self.skipped.append(step.number)
        module.trained.skip_step(step.number)
        module.train_metrics.forget(step.metrics)
        self.note_skipped(words)

    def note_skipped(self, words: str = "steps whose loss or gradient was not finite were skipped") -> None:
        """Note the steps that were skipped, if there are any."""
        if self.skipped and self.module.trainer.is_global_zero:
            note("nonfinite_skipped", words, len(self.skipped))

    # --- pairs that a model cannot produce ---------------------------------------------------------------------------

    def check_possible(self, pairs: Sequence[TokenizedPair], split: str, step: int) -> None:
        """Stop a run if a completion of the pairs scored lately has the probability zero. This waits for the device.

        Args:
            pairs: Pairs of the split.
            split: Name of the split for people.
            step: Optimizer steps taken before the policy scored the pairs.

        Raises:
            UserError: There are such pairs.
        """
        masked, unlikely = self.module.pairs.take_impossible()
        self._refuse_impossible(masked, unlikely, pairs, split, step)

    def _refuse_impossible(
        self, masked: Sequence[int], unlikely: Sequence[int], pairs: Sequence[TokenizedPair], split: str, step: int
    ) -> None:
        has_moved = step > len(self.skipped)
        if places := sorted({*masked, *(() if has_moved else unlikely)}):
            raise UserError(
                f"{len(places)} {split} pairs, the first at {_where(pairs, places[0])}, have a completion whose "
                "probability under the policy or the reference is 0, because the model masks one of its tokens by a "
                "logit of -inf: remove these rows from data.path, or choose a model.path that does not mask them"
            )
        if unlikely:
            raise NonFiniteError(
                f"the policy has diverged by step {step}: {len(set(unlikely))} {split} pairs, the first at "
                f"{_where(pairs, min(unlikely))}, have a completion of probability 0: {self._too_fast()}"
            )

    # --- validation and weights --------------------------------------------------------------------------------------

    def check_validation(self, value: float, pairs: Sequence[TokenizedPair], step: int) -> None:
        """Refuse a validation loss that is not finite; note it instead where steps may be skipped.

        Args:
            value: Loss of the selection split.
            pairs: Pairs of the selection split.
            step: Optimizer steps taken so far.

        Raises:
            NonFiniteError: The loss is not finite.
        """
        if math.isfinite(value):
            return
        facts = self._facts(self.module.pairs.scores, pairs, "validation", step)
        cause = self._likely_cause(facts, pairs, step, "loss")
        words = f"the validation loss at step {step} is {value:g}: {describe_pairs(facts, pairs)}; {cause}"
        if self.max_skipped == 0:
            raise NonFiniteError(words)
        if self.module.trainer.is_global_zero:
            note("nonfinite_val_loss", words)

    def start(self) -> None:
        """Count the weights that are not finite from the start, such as a bias that masks tokens."""
        self._broken_at_start = self._count_broken()
        if self.module.device.type == "cuda":
            self._flag = self._flag.pin_memory()
            self._flag_on_host = self._flag.numpy()

    def check_weights(self) -> None:
        """Refuse to save weights or optimizer state that training made infinite or undefined.

        Raises:
            NonFiniteError: There are such numbers.
        """
        self.settle()
        if self._broken_at_start is None or self._count_broken() <= self._broken_at_start:
            return
        step = self.module.global_step
        names = ", ".join(_broken(self.module)[:MAX_NAMED_PAIRS]) or "the state of the optimizer"
        raise NonFiniteError(
            f"the update of step {step} made weights infinite or undefined ({names}), and they were not saved: "
            f"{self._too_fast()}"
        )

    def _count_broken(self) -> int:
        states = [state for one in self.module.trainer.optimizers for state in one.state.values()]
        numbers = [*_weights(self.module).values(), *(v for state in states for v in state.values())]
        counts = [(~_local(x).isfinite()).sum() for x in numbers if isinstance(x, Tensor) and x.is_floating_point()]
        device = self.module.device
        total = torch.stack([torch.zeros((), device=device), *(count.to(device) for count in counts)]).sum()
        return int(self._over_processes(total))

    def _over_processes(self, number: Tensor) -> Tensor:
        """Return the largest number of all processes. Lightning's own reduction would wait for the device."""
        if self.module.trainer.world_size > 1:
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return number

    # --- the cause ---------------------------------------------------------------------------------------------------

    def _facts(self, scores: Sequence[PairScores], pairs: Sequence[TokenizedPair], split: str, step: int) -> Facts:
        """Return the facts of all processes; all of them call this.

        Raises:
            UserError: A pair has a completion of probability zero.
        """
        facts = Facts(broken=_broken(self.module))
        for one in scores:
            index, losses = one.index.tolist(), one.losses.tolist()
            masked, unlikely = impossible(one.policy, one.reference)
            facts.masked += one.index[masked].tolist()
            facts.unlikely += one.index[unlikely].tolist()
            facts.bad += [place for place, loss in zip(index, losses, strict=True) if not math.isfinite(loss)]
            facts.losses += [(loss, place) for place, loss in zip(index, losses, strict=True) if math.isfinite(loss)]
            facts.policy += one.index[~one.policy.isfinite().all(0)].tolist()
            if one.reference is not None:
                facts.reference += one.index[~one.reference.isfinite().all(0)].tolist()
        if self.module.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.module.trainer.world_size
            torch.distributed.all_gather_object(gathered, facts)
            facts = sum(gathered, Facts())
        self._refuse_impossible(facts.masked, facts.unlikely, pairs, split, step)
        return facts

    def _likely_cause(self, facts: Facts, pairs: Sequence[TokenizedPair], step: int, name: str) -> str:
        """Return the likely cause and a remedy, starting from what is certain."""
        taken = step - len(self.skipped)
        if facts.broken:
            tensors = ", ".join(sorted(set(facts.broken))[:MAX_NAMED_PAIRS])
            if taken > 0:
                return f"likely cause: an earlier step made weights infinite or NaN ({tensors}): {self._too_fast()}"
            return (
                f"likely cause: the weights that training starts from are not finite ({tensors}): copy or download "
                "those of model.path again, or choose another model"
            )
        heaviest = max(
            facts.bad or [place for _, place in facts.losses], key=lambda i: pairs[i].weight or 1, default=None
        )
        if heaviest is not None and (pairs[heaviest].weight or 0) > LARGE_WEIGHT:
            return (
                f"likely cause: the weight {pairs[heaviest].weight:g} of {_where(pairs, heaviest)} is too large for "
                "float32: make the weights in data.path smaller, such as 1 on average"
            )
        coefficients = {name: schedule(step) for name, schedule in self.module.coefficients.items()}
        extreme = [
            f"{name}={value:g}"
            for name, value in coefficients.items()
            if not COEFFICIENT_RANGE[0] <= value <= COEFFICIENT_RANGE[1]
        ]
        if extreme and not facts.policy:
            return f"likely cause: {' and '.join(extreme)} makes numbers overflow: choose a value nearer to 1"
        if facts.reference and not facts.policy:
            return (
                "likely cause: the reference computes log-probs that are not finite: look at the weights of "
                "model.path, at model.dtype, and at model.attn_implementation"
            )
        if taken > 0:
            return f"likely cause: the weights have grown too fast: {self._too_fast()}"
        if self._is_half_precision():
            return (
                "likely cause: numbers overflow or cancel in half precision: set model.dtype=float32 and "
                "trainer.precision=32-true"
            )
        if facts.policy:
            return (
                "likely cause: the model computes log-probs that are not finite for these pairs, with finite weights: "
                "look at model.dtype and model.attn_implementation"
            )
        if not facts.bad and name == "loss":
            return "likely cause: the regularizer on samples of the policy: look at regularizer.weight"
        return f"likely cause: the loss overflows: look at alpha, beta and regularizer.weight, or {self._too_fast()}"

    def _too_fast(self) -> str:
        group = self.module.trainer.optimizers[0].param_groups[0]
        words = f"lower {self.keys.lr}={group.get('initial_lr', group['lr']):g}"
        if self.module.clip_norm is None:
            words += f", or limit the gradient with {self.keys.clip_norm}=1"
        return words

    def _is_half_precision(self) -> bool:
        is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.module.policy.parameters())
        return is_half or "16" in str(self.module.trainer.precision)


@contextmanager
def _told_to_skip(optimizer: Any, is_bad: Tensor) -> Iterator[None]:
    """Let a fused optimizer read on the device whether to leave weights and state alone, as with a gradient scaler."""
    optimizer.grad_scale, optimizer.found_inf = None, is_bad
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _weights(module: AlignmentModule) -> dict[str, Tensor]:
    """Return the weights of the policy, and the parameters and buffers of the loss, by name."""
    return dict(module.policy.named_parameters()) | tensors_of(module.loss)


def _broken(module: AlignmentModule) -> list[str]:
    """Return the names of tensors with broken numbers in this process.

    -inf may be a bias that masks a token, and a buffer may start at +inf, as a running minimum does.
    """
    found = _weights(module).items()
    return [
        name
        for name, x in found
        if (~(_local(x) < math.inf) if isinstance(x, nn.Parameter) else _local(x).isnan()).any()
    ]


def _where(pairs: Sequence[TokenizedPair], position: int) -> str:
    return pairs[position].where or f"pair {position}"


def describe_pairs(facts: Facts, pairs: Sequence[TokenizedPair]) -> str:
    """Return which pairs are at fault: those without a finite loss, else those of the step, largest loss first."""
    by_size = [place for _, place in sorted(facts.losses, key=lambda one: -abs(one[0]))]
    places = list(dict.fromkeys(facts.bad or by_size))
    named = "; ".join(_where(pairs, place) for place in places[:MAX_NAMED_PAIRS])
    if len(places) > MAX_NAMED_PAIRS:
        named += f"; {len(places) - MAX_NAMED_PAIRS} more"
    return f"{'the loss of these pairs is not finite' if facts.bad else 'its pairs are'} ({named})"
