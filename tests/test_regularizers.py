"""The KL regularizers: brute force by enumeration, and what they do to a policy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from spo.config.checks import problems
from spo.config.compose import compose
from spo.data.collate import collate
from spo.forward.head import completion_logits
from spo.models import FrozenReference
from spo.objective import Divergence, Run, StepTerm
from spo.ops import KL_ESTIMATORS
from spo.regularizers import (
    EnumeratedKL,
    GlobalKL,
    LocalKL,
    NoRegularizer,
    PairRegularizer,
    Regularizer,
    SampleRegularizer,
)
from spo.types import Sequences, Window
from tests.helpers import (
    PAD,
    Spied,
    completion_logps,
    every_completion,
    frozen,
    make_data,
    make_module,
    make_trainer,
    random_pairs,
    random_rows,
    sequences,
    tiny_llama,
)

TOKENS, LENGTH = 3, 3


def global_kl(**changes: Any) -> GlobalKL:
    settings = {"weight": "beta", "refresh_every": 4, "num_samples": 8, "batch_size": 2, "max_new_tokens": 5}
    return GlobalKL(**settings | {"estimator": "tokenwise"} | changes)  # type: ignore[arg-type]


def three_token_models() -> tuple[nn.Module, nn.Module, Sequences]:
    """Policy, reference, and every sequence of three tokens over a vocabulary of three."""
    policy, reference = (tiny_llama(seed, vocab_size=TOKENS, eos_token_id=None, pad_token_id=None) for seed in (0, 1))
    return policy, frozen(reference), every_completion([1], TOKENS, LENGTH)


def divergences(policy: nn.Module, reference: nn.Module, batch: Sequences) -> Tensor:
    with torch.no_grad():
        reference_logits = completion_logits(reference, batch)
    return global_kl()(completion_logits(policy, batch), reference_logits, batch)


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True))
    return torch.cat([g.flatten() for g in filled])


def test_tokenwise_expectation_equals_exact_sequence_kl() -> None:
    policy, reference, everything = three_token_models()
    log_p, log_q = completion_logps(policy, everything), completion_logps(reference, everything)
    probability = log_p.exp()
    assert probability.sum().item() == pytest.approx(1, rel=1e-12)
    exact = (probability * (log_p - log_q)).sum()
    token_wise = divergences(policy, reference, everything)
    assert exact > 0.5
    torch.testing.assert_close((probability * token_wise).sum(), exact, rtol=1e-12, atol=0)
    # a single sequence's value is not its log-ratio: the two agree in expectation only
    assert (token_wise - (log_p - log_q)).abs().max() > 0.1


def test_tokenwise_gradient_holds_prefixes_fixed() -> None:
    """Check that the estimator drops from the exact gradient the dependence of prefixes on the policy."""
    policy, reference, everything = three_token_models()
    log_p = completion_logps(policy, everything)
    exact = gradient((log_p.exp() * (log_p - completion_logps(reference, everything))).sum(), policy)
    token_wise = divergences(policy, reference, everything)
    weights = completion_logps(policy, everything).exp().detach()
    ours = gradient((weights * token_wise).sum(), policy)
    missing = gradient((completion_logps(policy, everything).exp() * token_wise.detach()).sum(), policy)
    # Llama's norms work in float32 whatever the weights are
    torch.testing.assert_close(ours + missing, exact, rtol=1e-5, atol=2e-6)
    assert (ours - exact).norm() > 0.01 * exact.norm()


def test_divergence_and_gradient_zero_if_policy_is_reference() -> None:
    policy, reference = tiny_llama(3), frozen(tiny_llama(3))
    values = divergences(policy, reference, sequences(random_rows(5, seed=0)))
    assert values.tolist() == [0.0] * 5
    assert gradient(values.sum(), policy).abs().max() < 1e-13


def test_divergence_never_negative_and_reference_without_gradient() -> None:
    batch = sequences(random_rows(20, seed=0))
    policy, reference = tiny_llama(0), frozen(tiny_llama(1))
    values = divergences(policy, reference, batch)
    assert (values > 0).all() and values.shape == (20,)
    values.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for p in reference.parameters())


def test_local_and_global_kl_are_same_function_of_sequences() -> None:
    batch = sequences(random_rows(4, seed=0))
    p, q = (completion_logits(tiny_llama(seed), batch).detach() for seed in (0, 1))
    assert torch.equal(LocalKL("beta")(p, q, batch), global_kl()(p, q, batch))


def test_large_weight_drives_policy_to_reference() -> None:
    """A tabular policy over one token: minimizes L_pref + beta KL; the optimum nears the reference as beta grows."""
    reference = torch.tensor([[2.0, 0.0, -1.0, 0.5]], dtype=torch.float64).log_softmax(-1)
    one = Sequences(torch.tensor([[1, 0]]), torch.tensor([1]), torch.tensor([2]))

    def optimum(beta: float) -> Tensor:
        logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logps = logits.log_softmax(-1)
            preference = -torch.nn.functional.logsigmoid(logps[0, 2] - logps[0, 0])
            total = preference + beta * LocalKL(1.0)(logits, reference, one).sum()
            total.backward()
            return total

        optimizer.step(closure)
        return logits.detach().log_softmax(-1)

    distances = [(optimum(beta).exp() - reference.exp()).abs().max().item() for beta in (0.1, 1.0, 10.0, 1e4)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1 and distances[-1] < 1e-4


def test_weight_follows_beta_or_is_a_number() -> None:
    assert LocalKL("beta").weight_at(0.3) == 0.3
    assert LocalKL(2).weight_at(0.3) == 2.0
    assert NoRegularizer().weight_at(0.3) == 0.0


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, "alpha", None, True])
def test_invalid_weights_raise(weight: Any) -> None:
    for make in (lambda: LocalKL(weight), lambda: global_kl(weight=weight)):
        with pytest.raises(ValueError, match=r"regularizer\.weight must be"):
            make()


@pytest.mark.parametrize("name", ["refresh_every", "num_samples", "batch_size", "max_new_tokens"])
def test_invalid_counts_raise(name: str) -> None:
    with pytest.raises(ValueError, match=rf"regularizer\.{name} must be at least 1, got 0"):
        global_kl(**{name: 0})


def test_batch_larger_than_buffer_raises() -> None:
    with pytest.raises(ValueError, match=r"batch_size \(9\) exceeds regularizer\.num_samples \(8\)"):
        global_kl(batch_size=9)
    assert isinstance(global_kl(batch_size=8), Regularizer)


# --- declarations, and regularizers from outside the package -------------------------------------------------------


@pytest.mark.parametrize(
    ("regularizer", "declared"),
    [
        (NoRegularizer(), (False, False, False, False, None, 0.0)),
        (LocalKL("beta"), (True, True, True, False, None, None)),
        (global_kl(), (True, True, False, False, "kl", 0.3)),
        (EnumeratedKL("beta"), (True, True, False, True, None, 0.3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_declarations_of_each_shipped_regularizer(regularizer: Regularizer, declared: tuple[Any, ...]) -> None:
    found = (
        regularizer.adds_term,
        regularizer.needs_reference,
        regularizer.needs_reference_logits,
        regularizer.needs_enumeration,
        regularizer.probe_metric,
        regularizer.kl_weight(0.3),
    )
    assert found == declared
    assert regularizer.follows_beta == regularizer.adds_term


class SquaredOnSamples(SampleRegularizer):
    def __call__(self, policy_logits: Any, reference_logits: Any, sequences: Sequences) -> Tensor:
        return KL_ESTIMATORS["tokenwise"](policy_logits, reference_logits, sequences) ** 2


class SquaredOnPairs(PairRegularizer):
    def __call__(self, policy_logits: Any, reference_logits: Any, sequences: Sequences) -> Tensor:
        return KL_ESTIMATORS["tokenwise"](policy_logits, reference_logits, sequences) ** 2


class Decay(Regularizer):
    """Half the squared norm of the weights: a part of its own, without a reference, that counts its steps."""

    needs_reference: ClassVar[bool] = False

    def part(self, run: Run) -> Divergence:
        return DecayPart(run, self.weight_at)


class DecayPart(Divergence):
    steps = 0

    def terms(self, window: Window, step: int) -> Iterator[StepTerm]:
        self.steps += 1
        yield lambda: self.weight(step) * sum((p**2).sum() for p in self.run.policy.parameters()) / 2

    def validation_value(self, means: Mapping[str, float]) -> float:
        return 7.0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def gradients_of(folder: Path, regularizer: Regularizer, **changes: Any) -> tuple[Spied, dict[str, Tensor]]:
    settings = {"reference": FrozenReference(), "reference_model": tiny_llama(1, scale=0.1)} | changes
    module = make_module(tiny_llama(0, scale=0.1), regularizer=regularizer, micro_batch_size=2, **settings)
    make_trainer(folder).fit(module, datamodule=make_data(random_pairs(4, seed=1), micro_batch_size=2))
    return module, module.gradients[0]


def test_plugin_divergences_reach_the_gradient(tmp_path: Path) -> None:
    _, without = gradients_of(tmp_path, NoRegularizer())
    pairs = collate(random_pairs(4, seed=1), range(4), PAD).sequences
    for regularizer in (SquaredOnSamples(0.3, 1, 5, 5, 6), SquaredOnPairs(0.3)):
        module, with_it = gradients_of(tmp_path, regularizer)
        batch = module.buffer.rows(0) if module.buffer is not None else pairs
        policy, reference = tiny_llama(0, scale=0.1), frozen(tiny_llama(1, scale=0.1))
        p, q = (completion_logits(model, batch) for model in (policy, reference))
        (0.3 * (KL_ESTIMATORS["tokenwise"](p, q, batch) ** 2).mean()).backward()
        for name, parameter in policy.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(with_it[name] - without[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_plugin_part_needs_no_reference_and_keeps_its_state(tmp_path: Path) -> None:
    _, without = gradients_of(tmp_path, NoRegularizer(), reference=None, reference_model=None)
    module, with_it = gradients_of(tmp_path, Decay(0.5), reference=None, reference_model=None)
    for name, parameter in tiny_llama(0, scale=0.1).named_parameters():
        torch.testing.assert_close(with_it[name] - without[name], 0.5 * parameter.detach(), rtol=1e-5, atol=1e-6)
    checkpoint: dict[str, Any] = {"state_dict": {}, "global_step": 1}
    module.on_save_checkpoint(checkpoint)
    resumed = make_module(tiny_llama(0), regularizer=Decay("beta"), beta=0.2)
    resumed.on_load_checkpoint(checkpoint)
    assert isinstance(resumed.regularization, DecayPart) and resumed.regularization.steps == 1
    assert resumed.reads_beta and not resumed.needs_reference_model
    pairs = random_pairs(4, seed=1)
    make_trainer(tmp_path).validate(resumed, datamodule=make_data(pairs, pairs), verbose=False)
    assert resumed.validated["loss"] == pytest.approx(resumed.validated["loss/preference"] + 0.2 * 7.0)


def test_configuration_rejects_classes_not_derived_from_regularizer() -> None:
    [problem] = problems(compose(["regularizer._target_=collections.Counter", "regularizer=none"]))
    assert problem == "regularizer: Counter is not a regularizer: derive it from spo.regularizers.Regularizer"
