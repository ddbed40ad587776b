"""The estimators of KL(policy || reference): values and gradients against enumeration, then by sampling."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kl_estimators import EOS, World, against_the_truth, flat_gradient, measure, without_baseline
from spo.config.checks import problems, warnings
from spo.config.compose import compose
from spo.forward.head import completion_logits
from spo.models import FrozenReference
from spo.ops import KL_ESTIMATORS, KLEstimator
from spo.ops.logps import DeferredLogits
from spo.regularizers import GlobalKL, NoRegularizer, Regularizer
from spo.types import Sequences
from tests.commands import TINY, history, job, shared_cache
from tests.helpers import frozen, make_data, make_module, make_trainer, random_pairs, random_rows, sequences, tiny_llama

NAMES: tuple[KLEstimator, ...] = tuple(KL_ESTIMATORS)
Batch = tuple[Tensor, Tensor, Sequences]
Expectation = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def world() -> World:
    """Two prompts of different length with 15 responses each: ended ones of 1 to 3 tokens, and cut ones."""
    world = World()
    assert len(world.responses) == 15 and sum(response[-1] != EOS for response in world.responses) == 8
    torch.testing.assert_close(world.logps(world.policy).exp().sum(-1), torch.ones(2, dtype=torch.float64))
    return world


def everything(world: World) -> list[tuple[int, int]]:
    return [(prompt, response) for prompt in range(world.prompts) for response in range(len(world.responses))]


def expectation(world: World, name: KLEstimator, draws: Iterable[tuple[float, list[tuple[int, int]]]]) -> Expectation:
    """Return the expected mean over a batch and its gradient, from every batch with its probability."""
    total = torch.zeros((), dtype=torch.float64)
    for probability, chosen in draws:
        total = total + probability * KL_ESTIMATORS[name](*world.batch(chosen)).mean()
    return total.detach(), flat_gradient(total, [world.policy])


def each_alone(world: World) -> list[tuple[float, list[tuple[int, int]]]]:
    probability = world.logps(world.policy).exp().detach() / world.prompts
    return [(probability[one].item(), [one]) for one in everything(world)]


def each_pair(world: World) -> list[tuple[float, list[tuple[int, int]]]]:
    """Two independent draws, one for each prompt."""
    first, second = world.logps(world.policy).exp().detach()
    return [(p.item() * q.item(), [(0, i), (1, j)]) for i, p in enumerate(first) for j, q in enumerate(second)]


def exact(world: World) -> Expectation:
    kl = world.kl()
    return kl.detach(), flat_gradient(kl, [world.policy])


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# --- by enumeration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenwise", "unbiased", "k1", "k3"])
def test_value_is_unbiased(world: World, name: KLEstimator) -> None:
    value, _ = expectation(world, name, each_alone(world))
    assert value > 0.5
    assert_equal(value, exact(world)[0])


def test_k2_value_is_half_mean_square_of_log_ratio(world: World) -> None:
    value, _ = expectation(world, "k2", each_alone(world))
    ours, theirs = world.logps(world.policy), world.logps(world.reference)
    assert_equal(value, ((ours.exp() * (ours - theirs).square()).sum(-1) / 2).mean().detach())
    assert value > 1.1 * exact(world)[0]


@pytest.mark.parametrize("name", ["unbiased", "k2"])
def test_gradient_is_unbiased(world: World, name: KLEstimator) -> None:
    _, gradient = expectation(world, name, each_alone(world))
    assert gradient.norm() > 0.2
    assert_equal(gradient, exact(world)[1])


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_two_have_expectation_of_single_sequences(world: World, name: KLEstimator) -> None:
    """So the baseline, taken over whatever is forwarded together, leaves the gradient unbiased."""
    pairs, alone = (expectation(world, name, draws) for draws in (each_pair(world), each_alone(world)))
    for ours, theirs in zip(pairs, alone, strict=True):
        assert_equal(ours, theirs)


def test_baseline_changes_gradient(world: World) -> None:
    chosen = [(0, len(world.responses) - 1), (1, len(world.responses) - 1)]
    together, apart = (estimate(*world.batch(chosen)) for estimate in (KL_ESTIMATORS["unbiased"], without_baseline))
    assert torch.equal(together, apart)
    difference = flat_gradient(together.sum(), [world.policy]) - flat_gradient(apart.sum(), [world.policy])
    assert difference.norm() > 0.01


def test_tokenwise_gradient_lacks_prefix_term(world: World) -> None:
    """KL = sum over prefixes of P(prefix) KL(prefix): it differentiates the second factor alone."""
    ours, theirs = world.policy.log_softmax(-1), world.reference.log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    reached = torch.stack(
        [
            sum(
                (ours[:, world.prefixes.index(prefix[:t]), prefix[t]] for t in range(len(prefix))), torch.zeros(2)
            ).exp()
            for prefix in world.prefixes
        ],
        dim=-1,
    )
    assert_equal((reached * kl).sum(-1).mean(), world.kl())
    present = flat_gradient((reached.detach() * kl).sum(-1).mean(), [world.policy])
    missing = flat_gradient((reached * kl.detach()).sum(-1).mean(), [world.policy])
    _, gradient = expectation(world, "tokenwise", each_alone(world))
    assert_equal(gradient, present)
    assert_equal(gradient + missing, exact(world)[1])
    assert missing.norm() > 0.1 * exact(world)[1].norm()


def test_k1_gradient_is_zero(world: World) -> None:
    _, gradient = expectation(world, "k1", each_alone(world))
    assert_equal(gradient, torch.zeros_like(gradient))


def test_k3_gradient_is_that_of_reverse_kl(world: World) -> None:
    ours, theirs = world.logps(world.policy), world.logps(world.reference)
    other = flat_gradient((theirs.exp() * (theirs - ours)).sum(-1).mean(), [world.policy])
    _, gradient = expectation(world, "k3", each_alone(world))
    assert_equal(gradient, other)
    assert (other - exact(world)[1]).norm() > 0.1


# --- by sampling ---------------------------------------------------------------------------------------------------

BIASED: dict[KLEstimator, tuple[bool, bool]] = {
    "tokenwise": (False, True),
    "unbiased": (False, False),
    "k1": (False, True),
    "k2": (True, False),
    "k3": (False, True),
}


def test_estimates_over_20000_samples_have_small_z_scores(world: World) -> None:
    """Each estimator is near its own expectation, and far from the KL's exactly where it is biased."""
    truth = torch.cat([part.reshape(-1) for part in exact(world)])
    found = measure(world.draws(batches=400, size=50, seed=1), [world.policy], KL_ESTIMATORS)
    for name, (value, gradient) in BIASED.items():
        expected = torch.cat([part.reshape(-1) for part in expectation(world, name, each_alone(world))])
        assert (expected - found[name].mean).abs().max() < 0.1
        # an entry that hardly varies is known up to the rounding of its square
        error = found[name].standard_error.clamp(min=1e-6)
        assert ((found[name].mean - expected) / error).abs().max() < 4, name
        z = ((found[name].mean - truth) / error).abs()
        assert (z[0] > 8) == value and (z[1:].max() > 8) == gradient, name
        assert value or z[0] < 4
        assert gradient or z[1:].max() < 4
    trace = {name: moments.variance[1:].sum() for name, moments in found.items()}
    assert trace["tokenwise"] < trace["unbiased"] < trace["k2"] < trace["k3"]
    assert found["tokenwise"].variance[0] == found["unbiased"].variance[0] < found["k1"].variance[0]


def test_table_in_docs_matches_estimators() -> None:
    _, head, rule, *lines = against_the_truth(samples=320, seed=0)
    assert head.count("|") == rule.count("|") == 8
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [*NAMES, "unbiased, no baseline"]


# --- one batch -----------------------------------------------------------------------------------------------------


def random_batch(seed: int = 0, dtype: torch.dtype = torch.float64, vocab: int = 23) -> Batch:
    """Logits of prompts and completions of many lengths."""
    batch = sequences([*random_rows(9, seed), ([1, 2], [5]), ([1], [2])], extra=3)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, int(batch.completion_length.sum()), vocab)
    policy, reference = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return policy.requires_grad_(), reference, batch


def by_hand(name: KLEstimator, policy: Tensor, reference: Tensor, batch: Sequences) -> tuple[Tensor, Tensor]:
    """Values, and a sum whose gradient is that of the summed values, token by token."""
    of_tokens, targets = [], []
    log_p, log_q, first = policy.log_softmax(-1), reference.log_softmax(-1), 0
    for i, length in enumerate(batch.completion_length.tolist()):
        start = int(batch.prompt_length[i])
        targets.append(batch.input_ids[i, start : start + length].tolist())
        of_tokens.append([(log_p[first + t], log_q[first + t]) for t in range(length)])
        first += length
    kl = [[(p.exp() * (p - q)).sum() for p, q in rows] for rows in of_tokens]
    ratio = [
        sum(p[y] - q[y] for (p, q), y in zip(rows, ys, strict=True))
        for rows, ys in zip(of_tokens, targets, strict=True)
    ]
    if name in ("tokenwise", "unbiased"):
        values = [sum(row) for row in kl]
    else:
        values = [{"k1": r, "k2": r * r / 2, "k3": torch.exp(-r) - 1 + r}[name] for r in ratio]
    total = sum(values)
    if name == "unbiased":
        still = [[float(sum(row[t + 1 :]).detach()) if row[t + 1 :] else 0.0 for t in range(len(row))] for row in kl]
        for i, row in enumerate(still):
            for t, to_come in enumerate(row):
                others = [other[t] for j, other in enumerate(still) if j != i and t < len(other)]
                baseline = sum(others) / len(others) if others else 0.0
                total = total + of_tokens[i][t][0][targets[i][t]] * (to_come - baseline)
    return torch.stack(values).detach(), total


@pytest.mark.parametrize("name", NAMES)
def test_batch_equals_loop_over_tokens(name: KLEstimator) -> None:
    policy, reference, batch = random_batch()
    values = KL_ESTIMATORS[name](policy, reference, batch)
    expected, total = by_hand(name, policy, reference, batch)
    assert values.dtype == torch.float64 and values.shape == (11,)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, policy)[0] for value in (values.sum(), total))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_estimate_zero_if_policy_is_reference(name: KLEstimator) -> None:
    policy, _, batch = random_batch()
    values = KL_ESTIMATORS[name](policy, policy.detach(), batch)
    assert values.tolist() == [0.0] * len(batch)
    (gradient,) = torch.autograd.grad(values.sum(), policy)
    # k1's gradient is that of log pi(y): not zero for a sample, only on average
    assert gradient.abs().max() < 1e-12 if name != "k1" else gradient.abs().max() > 0.1


@pytest.mark.parametrize("name", ["tokenwise", "unbiased", "k2", "k3"])
def test_estimate_never_negative(name: KLEstimator) -> None:
    assert all((KL_ESTIMATORS[name](*random_batch(seed)) >= 0).all() for seed in range(5))
    assert (KL_ESTIMATORS["k1"](*random_batch()) < 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_widened(name: KLEstimator) -> None:
    half, reference, batch = random_batch(dtype=torch.bfloat16)
    values = KL_ESTIMATORS[name](half, reference, batch)
    wide = half.detach().double().requires_grad_()
    expected = KL_ESTIMATORS[name](wide, reference.double(), batch)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(v.mean(), x)[0].double() for v, x in ((values, half), (expected, wide)))
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.005 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_chunked_rows_give_same_estimate(name: KLEstimator) -> None:
    policy, reference, batch = random_batch()
    whole = KL_ESTIMATORS[name](policy, reference, batch)
    deferred = [DeferredLogits(logits, lambda states: states, 7) for logits in (policy, reference)]
    cut = KL_ESTIMATORS[name](*deferred, batch)
    assert torch.equal(cut, whole)
    ours, theirs = (torch.autograd.grad(values.sum(), policy)[0] for values in (cut, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_long_sequences_in_single_precision(name: KLEstimator) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = sequences([([1], [3] * 3000), ([1, 1], [4] * 2500)])
    shape = (5500, 8)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64)
    policy = reference + 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients, values = [], []
    for dtype in (torch.float32, torch.float64):
        logits = policy.to(dtype).requires_grad_()
        values.append(KL_ESTIMATORS[name](logits, reference.to(dtype), batch))
        gradients.append(torch.autograd.grad(values[-1].sum(), logits)[0].double())
    torch.testing.assert_close(values[0].double(), values[1], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))


def test_one_token_sequence_has_no_score_term() -> None:
    batch = sequences([([1, 1], [3]), ([1], [2])])
    policy, reference = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy.requires_grad_()
    values = [KL_ESTIMATORS[name](policy, reference, batch) for name in ("tokenwise", "unbiased")]
    assert torch.equal(*values)
    assert torch.equal(*(torch.autograd.grad(v.sum(), policy)[0] for v in values))


# --- as a regularizer ----------------------------------------------------------------------------------------------


def global_kl(estimator: KLEstimator) -> GlobalKL:
    return GlobalKL(0.3, refresh_every=2, num_samples=10, batch_size=5, max_new_tokens=6, estimator=estimator)


@pytest.mark.parametrize("name", NAMES)
def test_step_gradient_is_mean_over_micro_batches(name: KLEstimator, tmp_path: Path) -> None:
    def step(regularizer: Regularizer) -> tuple[dict[str, Tensor], Sequences | None]:
        module = make_module(
            tiny_llama(0, scale=0.1),
            regularizer=regularizer,
            reference=FrozenReference(),
            reference_model=tiny_llama(1, scale=0.1),
            micro_batch_size=1,
        )
        data = make_data(random_pairs(4, seed=1), micro_batch_size=1)
        make_trainer(tmp_path).fit(module, datamodule=data)
        assert all(p.grad is None for p in module.reference.model.parameters())
        return module.gradients[0], None if module.buffer is None else module.buffer.rows(0)

    (with_it, rows), (without, _) = step(global_kl(name)), step(NoRegularizer())
    assert rows is not None
    policy, reference = tiny_llama(0, scale=0.1), frozen(tiny_llama(1, scale=0.1))
    for first in range(0, 5, 2):
        part = rows.rows(slice(first, first + 2))
        estimates = KL_ESTIMATORS[name](completion_logits(policy, part), completion_logits(reference, part), part)
        (0.3 * estimates.sum() / 5).backward()
    for key, parameter in policy.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(with_it[key] - without[key], parameter.grad, rtol=1e-4, atol=1e-6)


def test_unknown_estimators_raise() -> None:
    with pytest.raises(ValueError, match=r"regularizer\.estimator=k4: choose one of tokenwise, unbiased, k1, k2, k3"):
        global_kl("k4")  # type: ignore[arg-type]
    (message,) = problems(compose(["regularizer.estimator=k4"]))
    assert message.startswith("regularizer.estimator=k4: choose tokenwise, unbiased, k1, k2 or k3")


def test_configuration_selects_estimator_and_warns_of_k1() -> None:
    assert compose(["method=spo"]).regularizer.estimator == "tokenwise"
    for name in NAMES:
        notes = warnings(compose([f"regularizer.estimator={name}"]))
        assert len(notes) == (name == "k1") and all("does not regularize" in note for note in notes)


def test_run_with_each_estimator(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    few = (TINY, "trainer.max_steps=3", "trainer.log_every_n_steps=1", "callbacks=none", "probe.num_prompts=1")
    few += ("regularizer.num_samples=8", "regularizer.batch_size=8", "regularizer.refresh_every=1")
    few += ("scheduler.num_warmup_steps=0", "evaluation.num_prompts=4", "beta=10")
    found = {}
    for name in NAMES:
        metrics = job(tmp_path / name, shared_cache(tmp_path_factory), *few, f"regularizer.estimator={name}")
        found[name] = [row["train/loss/regularizer"] for row in history(tmp_path / name) if "train/loss" in row]
        assert math.isfinite(metrics["eval/kl"])
    # The policy starts as the reference, where k1 alone has a gradient: values differ once two steps are done.
    assert all(values[0] == pytest.approx(0, abs=1e-5) for values in found.values())
    assert found["tokenwise"][1] == found["unbiased"][1] != found["k1"][1]
    assert len({values[2] for values in found.values()}) == 5
    assert all(found[name][2] > 0 for name in NAMES if name != "k1")
