"""Logits of -inf: every number equals the one of the same model without the masked tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spo.errors import UserError
from spo.exact.optimum import total_variation
from spo.forward.probe import enable_packing
from spo.losses import DPOLoss, PreferenceLoss, SPOLoss, WeightedSPOLoss
from spo.models import FrozenReference
from spo.ops import KL_ESTIMATORS, KLEstimator, Logits, entropy, kl, token_entropy, token_kl, token_logps
from spo.ops.logps import DeferredLogits
from spo.regularizers import EnumeratedKL, LocalKL
from spo.sampling.draw import next_tokens
from spo.types import PairLogps
from tests.helpers import (
    PLAIN,
    VOCAB,
    Bigrams,
    Spied,
    make_data,
    make_module,
    make_trainer,
    random_pairs,
    random_rows,
    sequences,
)
from tests.test_ops import build

M = 9
SUPPORT = torch.tensor([i for i in range(VOCAB) if i % 3 or i == 0])
LOWEST: dict[str, Callable[[torch.dtype], float]] = {
    "-inf": lambda dtype: -torch.inf,
    "min": lambda dtype: torch.finfo(dtype).min,
    "-1e30": lambda dtype: -1e30,
}


def numbers(seed: int, rows: int = M) -> Tensor:
    return 3 * torch.randn(rows, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masked(logits: Tensor, lowest: float = -torch.inf) -> Tensor:
    kept = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, SUPPORT, True)
    return logits.masked_fill(~kept, lowest)


def value_and_gradient(of: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    values = of(leaf)
    (gradient,) = torch.autograd.grad((values * torch.arange(1, len(values) + 1)).sum(), leaf)
    return values.detach(), gradient


@pytest.mark.parametrize("mask", LOWEST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, 4])
def test_masked_tokens_count_as_absent(mask: str, dtype: torch.dtype, rows: int | None) -> None:
    """Value and gradient, whole and in chunks, against dense formulas on the tokens that are left."""
    p, q, lowest = numbers(0).to(dtype), numbers(1).to(dtype), LOWEST[mask](dtype)
    targets = torch.arange(M) % len(SUPPORT)

    def given(logits: Tensor) -> Logits:
        return logits if rows is None else DeferredLogits(logits, lambda states: states, rows)

    def dense_kl(p: Tensor) -> Tensor:
        log_p, log_q = p.log_softmax(-1), q.double()[:, SUPPORT].log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    cases: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        (
            lambda p: token_logps(given(p), SUPPORT[targets]),
            lambda p: p.log_softmax(-1).gather(1, targets[:, None])[:, 0],
        ),
        (lambda p: token_entropy(given(p)), lambda p: -(p.softmax(-1) * p.log_softmax(-1)).sum(-1)),
        (lambda p: token_kl(given(p), given(masked(q, lowest))), dense_kl),
        # The reference is masked by another number than the policy, or not at all. Without a mask it loses the
        # probability of the masked tokens to them.
        (lambda p: token_kl(given(p), masked(q, -1e30)), dense_kl),
    ]
    # A gradient is rounded to the dtype of the logits.
    rtol, atol = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-4, 1e-4), torch.bfloat16: (1e-2, 1e-4)}[dtype]
    for ours, dense in cases:
        got, gradient = value_and_gradient(ours, masked(p, lowest))
        want, expected = value_and_gradient(dense, p.double()[:, SUPPORT])
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
        torch.testing.assert_close(gradient[:, SUPPORT].double(), expected, rtol=rtol, atol=atol)
        rest = gradient.clone().index_fill(1, SUPPORT, 0)
        assert not rest.any()


def test_reference_that_is_not_masked_gives_a_finite_kl() -> None:
    p, q = masked(numbers(0)), numbers(1)
    got, gradient = value_and_gradient(lambda p: token_kl(p, q), p)
    log_p, log_q = p[:, SUPPORT].log_softmax(-1), q.log_softmax(-1)[:, SUPPORT]
    torch.testing.assert_close(got, (log_p.exp() * (log_p - log_q)).sum(-1))
    torch.testing.assert_close(gradient[:, SUPPORT].sum(1), torch.zeros(M, dtype=torch.float64), atol=1e-12, rtol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("of", [token_kl, lambda p, q: kl(p.log_softmax(-1), q.log_softmax(-1))])
def test_token_that_only_the_reference_masks_makes_its_position_infinite(of: Callable[..., Tensor]) -> None:
    p, q = numbers(0), numbers(1)
    q[2] = masked(q[2])
    got, gradient = value_and_gradient(lambda p: of(p, q), p)
    want, expected = value_and_gradient(lambda p: of(p, numbers(1)), p)
    other = [row for row in range(M) if row != 2]
    assert got[2] == torch.inf and not gradient[2].any()
    torch.testing.assert_close(got[other], want[other])
    torch.testing.assert_close(gradient[other], expected[other])


def test_genuine_nan_stays_visible() -> None:
    p = numbers(0)
    p[3, 4] = torch.nan
    of_policy = token_kl(p, numbers(1)), token_entropy(p), entropy(p.log_softmax(-1)), token_logps(p, SUPPORT[:M])
    for values in (*of_policy, token_kl(masked(numbers(1)), masked(p))):
        assert values.isnan().tolist() == [row == 3 for row in range(M)]


def test_gradients_pass_finite_differences() -> None:
    p, q = masked(numbers(0)), masked(numbers(1))

    def whole(logits: Tensor) -> Tensor:
        return p.index_copy(1, SUPPORT, logits)

    leaf = p[:, SUPPORT].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_kl(whole(x), q), leaf)
    assert torch.autograd.gradcheck(lambda x: token_entropy(whole(x)), leaf)
    assert torch.autograd.gradcheck(lambda x: token_logps(whole(x), SUPPORT[torch.arange(M)]), leaf)
    assert torch.autograd.gradcheck(lambda x: EnumeratedKL(1.0)(whole(x).log_softmax(-1), q.log_softmax(-1)), leaf)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_estimators_equal_those_of_the_smaller_vocabulary(name: KLEstimator) -> None:
    small = sequences(random_rows(4, seed=1, vocab=len(SUPPORT)))
    large = sequences(
        [
            (SUPPORT[ids[:start]].tolist(), SUPPORT[ids[start:end]].tolist())
            for ids, start, end in zip(small.input_ids, small.prompt_length, small.length, strict=True)
        ]
    )
    p, q = (numbers(seed, int(small.completion_length.sum())) for seed in (0, 1))
    estimate = KL_ESTIMATORS[name]
    got, gradient = value_and_gradient(lambda p: estimate(p, masked(q), large), masked(p))
    want, expected = value_and_gradient(lambda p: estimate(p, q[:, SUPPORT], small), p[:, SUPPORT])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient[:, SUPPORT], expected)


def test_exact_numbers_of_a_smaller_support() -> None:
    p, q = (masked(numbers(seed)).log_softmax(-1) for seed in (0, 1))
    small_p, small_q = (numbers(seed)[:, SUPPORT].log_softmax(-1) for seed in (0, 1))
    torch.testing.assert_close(entropy(p), entropy(small_p))
    torch.testing.assert_close(kl(p, q), kl(small_p, small_q))
    torch.testing.assert_close(total_variation(p, q), total_variation(small_p, small_q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_tokens_are_never_drawn(dtype: torch.dtype) -> None:
    """At both ends of the random numbers too, with the first and the last token masked."""
    logits = numbers(0, 50).float()
    logits[:, [0, 1, 7, -2, -1]] = -torch.inf
    for number in (0.0, 1 - torch.finfo(dtype).eps / 2, 0.5):
        tokens = next_tokens(logits.clone(), torch.full((50,), number, dtype=dtype), 1.0)
        assert logits.gather(1, tokens[:, None]).isfinite().all()


class Masking(Bigrams):
    """A model that masks some tokens of its vocabulary."""

    def __init__(self, seed: int, lowest: float, *tokens: int) -> None:
        super().__init__(seed)
        with torch.no_grad():
            self.head.bias[list(tokens)] = lowest


@pytest.mark.parametrize("loss", [SPOLoss(), DPOLoss(), WeightedSPOLoss()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_training_with_masked_vocabulary_stays_finite(loss: PreferenceLoss, lowest: float, tmp_path: Path) -> None:
    """Tokens that no completion has are masked: all numbers are those of a model without them."""
    pairs = random_pairs(6, seed=1, vocab=VOCAB - 4)
    last = range(VOCAB - 4, VOCAB)

    def train(models: list[nn.Module]) -> Spied:
        module = make_module(
            models[0],
            loss=loss,
            regularizer=LocalKL(0.3),
            reference=FrozenReference(),
            reference_model=models[1],
            speed=PLAIN,
            optimizer=torch.optim.AdamW,
        )
        make_trainer(tmp_path, max_steps=2).fit(module, datamodule=make_data(pairs, pairs, max_steps=2))
        return module

    masked = train([Masking(seed, lowest, *last) for seed in (0, 1)])
    small = [Bigrams(seed) for seed in (0, 1)]
    for model in small:
        model.head.weight = nn.Parameter(model.head.weight[:-4].detach().clone())
        model.head.bias = nn.Parameter(model.head.bias[:-4].detach().clone())
    whole = train([*small])
    for name, gradient in whole.gradients[1].items():
        torch.testing.assert_close(masked.gradients[1][name][: len(gradient)], gradient)
    assert not any(masked.gradients[1]["head.bias"][-4:])
    assert masked.trainer.callback_metrics["train/loss"].item() == pytest.approx(
        whole.trainer.callback_metrics["train/loss"].item()
    )


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("split", ["training", "validation"])
def test_pair_with_a_masked_token_is_named(split: str, lowest: float, tmp_path: Path) -> None:
    pairs = random_pairs(6, seed=1, vocab=VOCAB - 4)
    bad = replace(pairs[4], chosen_ids=(VOCAB - 1, *pairs[4].chosen_ids), where="rows.jsonl:5")
    both = [*pairs[:4], bad, *pairs[5:]]
    models: list[nn.Module] = [Masking(seed, lowest, VOCAB - 1) for seed in (0, 1)]
    module = make_module(models[0], loss=DPOLoss(), reference=FrozenReference(), reference_model=models[1], speed=PLAIN)
    data = make_data(both, pairs) if split == "training" else make_data(pairs, both)
    with pytest.raises(UserError, match=f"1 {split} pairs, the first at rows.jsonl:5, .*probability .* is 0, .* masks"):
        make_trainer(tmp_path, num_sanity_val_steps=-1).fit(module, datamodule=data)


@pytest.mark.parametrize("preference", [0.0, 1.0])
def test_label_of_probability_zero_counts_as_zero(preference: float) -> None:
    margin = torch.tensor([torch.inf, -torch.inf, 1.0], requires_grad=True)
    label = torch.full((3,), preference)
    sign, zeros = 1 if preference else -1, torch.zeros(3)
    losses = DPOLoss()(PairLogps(margin, zeros, zeros, zeros, preference=label), alpha=1.0, beta=1.0)
    torch.testing.assert_close(losses, -nn.functional.logsigmoid(sign * margin))
    assert not torch.autograd.grad(losses[2], margin)[0].isnan().any()


def test_masked_vocabulary_does_not_keep_a_model_from_packing() -> None:
    model: Any = build("phi_with_bias")
    with torch.no_grad():
        model.lm_head.bias[5:15] = -torch.inf
    assert enable_packing(model) is None
