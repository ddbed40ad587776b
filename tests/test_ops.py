"""Log-probabilities, entropies and divergences: against float64 numpy, and against the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from spo.forward.head import completion_logits
from spo.ops import Logits, completion_targets, sum_per_sequence, token_entropy, token_kl, token_logps
from spo.ops.logps import DeferredLogits
from spo.types import Sequences
from tests.helpers import VOCAB, completion_logps, random_rows, sequences, tiny_llama

M = 11


def logits(seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(M, VOCAB, generator=generator, dtype=torch.float64)).to(dtype)


def targets() -> Tensor:
    return torch.arange(M) * 7 % VOCAB


def log_softmax(values: Tensor) -> Any:
    """float64 numpy, by the textbook."""
    x = values.double().numpy()
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ------------------------------------------------------------------------------------------------- from logits


def test_token_values_equal_numpy() -> None:
    p, q = logits(0), logits(1)
    log_p, log_q = log_softmax(p), log_softmax(q)
    np.testing.assert_allclose(token_logps(p, targets()), log_p[np.arange(M), targets()], rtol=1e-12)
    np.testing.assert_allclose(token_kl(p, q), (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(token_entropy(p), -(np.exp(log_p) * log_p).sum(-1), rtol=1e-12)


def test_token_gradients_equal_closed_forms() -> None:
    p, q = logits(0).requires_grad_(), logits(1)
    log_p, log_q = (torch.tensor(log_softmax(x.detach())) for x in (p, q))
    probability = log_p.exp()
    one_hot = torch.nn.functional.one_hot(targets(), VOCAB)
    kl = (probability * (log_p - log_q)).sum(-1, keepdim=True)
    entropy = -(probability * log_p).sum(-1, keepdim=True)
    for values, closed in [
        (token_logps(p, targets()), one_hot - probability),
        (token_kl(p, q), probability * (log_p - log_q - kl)),
        (token_entropy(p), -probability * (log_p + entropy)),
    ]:
        torch.testing.assert_close(torch.autograd.grad(values.sum(), p)[0], closed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_use_a_float32_softmax(dtype: torch.dtype) -> None:
    p, q = logits(0, 20.0, dtype), logits(1, 20.0, dtype)
    exact_p, exact_q = log_softmax(p), log_softmax(q)
    got = token_logps(p, targets())
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, exact_p[np.arange(M), targets()], atol=1e-4)
    np.testing.assert_allclose(token_kl(p, q), (np.exp(exact_p) * (exact_p - exact_q)).sum(-1), atol=1e-4)
    np.testing.assert_allclose(token_entropy(p), -(np.exp(exact_p) * exact_p).sum(-1), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_token_values_are_finite_for_huge_logits(dtype: torch.dtype) -> None:
    p = torch.full((3, VOCAB), -1e4, dtype=dtype)
    p[0, 4] = p[1] = 1e4
    q = p.flip(-1).clone()
    p.requires_grad_()
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    values = torch.stack([token_logps(p, torch.tensor([4, 4, 4])), token_entropy(p), token_kl(p, q)])
    gap = p[0, 4].double().item() - p[0, 5].double().item()
    expected = torch.tensor([[0.0, 1, 1], [0, 1, 1], [1, 0, 0]], dtype=torch.float64)
    expected *= torch.tensor([[-np.log(VOCAB)], [np.log(VOCAB)], [gap]])
    torch.testing.assert_close(values, expected.to(wide), rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(values.sum(), p)[0].isfinite().all()


@pytest.mark.parametrize("rows", [1, 4, M - 1])
def test_deferred_chunks_keep_value_and_gradient(rows: int) -> None:
    def all_of_them(given: Callable[[Tensor], Logits]) -> list[Tensor]:
        p, q = logits(0).requires_grad_(), logits(1)
        results = []
        for values in (token_logps(given(p), targets()), token_kl(given(p), given(q)), token_entropy(given(p))):
            gradient = torch.autograd.grad((values * torch.arange(1.0, M + 1)).sum(), p)[0]
            results += [values.detach(), gradient]
        with torch.no_grad():
            results.append(token_kl(given(p), q))
        return results

    whole = all_of_them(lambda given: given)
    in_chunks = all_of_them(lambda given: DeferredLogits(given, lambda states: states, rows))
    for got, want in zip(in_chunks, whole, strict=True):
        assert torch.equal(got, want)


def test_sum_per_sequence_value_and_gradient() -> None:
    batch = sequences([([1], [5, 6]), ([1, 2, 3], [4]), ([2, 2], [7, 8, 9])])
    values = torch.arange(1.0, 7.0, requires_grad=True)
    total = sum_per_sequence(values, batch)
    assert total.tolist() == [1 + 2, 3, 4 + 5 + 6]
    (gradient,) = torch.autograd.grad((total * torch.tensor([1.0, 10.0, 100.0])).sum(), values)
    assert gradient.tolist() == [1, 1, 10, 100, 100, 100]
    assert completion_targets(batch).tolist() == [5, 6, 4, 7, 8, 9]


# ------------------------------------------------------------------------------------------- through the model


def _config(name: str, **changes: Any) -> Any:
    small: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return getattr(transformers, name)(**small | changes)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("LlamaConfig", tie_word_embeddings=False),
    "llama_tied": lambda: _config("LlamaConfig", tie_word_embeddings=True),
    "qwen2": lambda: _config("Qwen2Config"),
    "mistral_sliding_window": lambda: _config("MistralConfig", sliding_window=3),
    "gemma2_soft_capped": lambda: _config(
        "Gemma2Config", head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=1.0, sliding_window=3
    ),
    "gpt_neox": lambda: _config("GPTNeoXConfig"),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        init_std=0.5,
    ),
    "phi_with_bias": lambda: _config("PhiConfig"),
    "granite_scaled_logits": lambda: _config("GraniteConfig", logits_scaling=7.0),
}


def build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).double().eval()


@pytest.fixture(autouse=True)
def float64_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the softmax of eager attention, the only one of Gemma 2, in float64, where transformers takes float32."""
    softmax = nn.functional.softmax

    def at_least(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim=dim, dtype=dtype and torch.promote_types(x.dtype, dtype))

    monkeypatch.setattr(nn.functional, "softmax", at_least)


def plainly(model: nn.Module, batch: Sequences) -> Tensor:
    """One unpadded forward per sequence, every position through the head."""
    rows = []
    for ids, start, end in zip(batch.input_ids, batch.prompt_length, batch.length, strict=True):
        rows.append(model(input_ids=ids[None, :end], use_cache=False).logits[0, start - 1 : end - 1])
    return torch.cat(rows)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_completion_logits_equal_the_plain_forward(name: str) -> None:
    model = build(name)
    batch = sequences(random_rows(5, seed=1), extra=2)
    got = completion_logits(model, batch)
    assert got.shape == (int(batch.completion_length.sum()), VOCAB)
    torch.testing.assert_close(got, plainly(model, batch), rtol=1e-9, atol=1e-9)
    exact = token_logps(plainly(model, batch), completion_targets(batch)).split(batch.completion_length.tolist())
    torch.testing.assert_close(completion_logps(model, batch), torch.stack([part.sum() for part in exact]))


def gradients(values: Tensor, model: nn.Module) -> list[Tensor]:
    weights = torch.arange(1.0, len(values) + 1, dtype=values.dtype)
    return list(torch.autograd.grad((values * weights).sum(), list(model.parameters()), materialize_grads=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_deferred_logits_equal_the_plain_forward(name: str) -> None:
    """Value and gradient of each weight, the head's and its bias among them, a few rows at a time."""
    model = build(name)
    if name == "phi_with_bias":
        torch.nn.init.normal_(model.lm_head.bias)
    batch = sequences(random_rows(6, seed=2), extra=2)
    at_once: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: at_once.append(out[..., 0].numel())
    )
    logits = completion_logits(model, batch, max_logits=4 * VOCAB + 3)
    values = token_logps(logits, completion_targets(batch))
    found = gradients(values, model)
    handle.remove()
    assert isinstance(logits, DeferredLogits) and max(at_once) == 4
    rows = torch.arange(len(values))
    expected = plainly(model, batch).log_softmax(-1)[rows, completion_targets(batch)]
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    for (weight, _), got, want in zip(model.named_parameters(), found, gradients(expected, model), strict=True):
        # Gemma 2 computes with the weights of its norms in float32, so their gradients are sums of float32 numbers.
        in_float32 = name.startswith("gemma2") and "norm" in weight
        atol = 1e-6 * float(want.abs().max()) if in_float32 else 1e-11
        torch.testing.assert_close(
            got, want, rtol=1e-11, atol=atol, msg=lambda text, weight=weight: f"{weight}: {text}"
        )
    assert isinstance(completion_logits(model, batch, max_logits=len(values) * VOCAB), Tensor)
    with torch.no_grad():
        one_by_one = token_logps(completion_logits(model, batch, max_logits=1), completion_targets(batch))
    torch.testing.assert_close(one_by_one, values)


def test_deferred_logits_restore_the_backbone() -> None:
    model = build("llama")
    batch = sequences(random_rows(5, seed=1))
    before = completion_logps(model, batch)
    completion_logps(model, batch, max_logits=1)
    assert "forward" not in vars(model.model)
    assert torch.equal(completion_logps(model, batch), before)
    assert torch.equal(completion_logps(model, batch, completion_only=False), before)


def test_logits_include_soft_capping() -> None:
    # the cap of 2 binds on this model, so a path that skipped it would be seen above
    model = build("gemma2_soft_capped")
    assert 1.9 < completion_logits(model, sequences(random_rows(5, seed=1))).abs().max() <= 2


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_completion_logits_of_an_adapted_model(targets: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        build("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False)
    )
    model = model.double().eval()
    batch = sequences(random_rows(5, seed=1))
    got = completion_logits(model, batch)
    torch.testing.assert_close(got, plainly(model, batch), rtol=1e-9, atol=1e-9)
    few = completion_logits(model, batch, max_logits=1)
    # the adapter's state may be another one when deferred logits are made
    assert isinstance(few, DeferredLogits) == (targets == "all-linear")
    torch.testing.assert_close(token_entropy(few), token_entropy(got))
    with model.disable_adapter():
        assert (completion_logits(model, batch) - got).abs().max() > 1e-3


def test_head_runs_on_completion_positions_only() -> None:
    model = build("llama")
    seen: list[torch.Size] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    batch = sequences(random_rows(5, seed=1), extra=3)
    completion_logits(model, batch)
    assert seen == [(1, int(batch.completion_length.sum()), 16)]
    handle.remove()
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=batch.input_ids).logits.shape == (*batch.input_ids.shape, VOCAB)


def test_head_is_restored_after_an_error() -> None:
    model = build("llama")
    with pytest.raises(IndexError):
        completion_logits(model, sequences([([1], [VOCAB + 5])]))
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mistral_sliding_window"])
def test_log_probs_ignore_padding_order_and_neighbors(name: str) -> None:
    model = build(name).float()
    rows = random_rows(6, seed=3)
    together = completion_logps(model, sequences(rows))
    alone = torch.cat([completion_logps(model, sequences([row])) for row in rows])
    for other in (
        alone,
        completion_logps(model, sequences(rows, extra=17)),
        completion_logps(model, sequences(rows, extra=17, pad=9)),
        completion_logps(model, sequences(rows[::-1])).flip(0),
    ):
        torch.testing.assert_close(other, together, rtol=0, atol=1e-5)


def test_log_probs_count_completion_tokens_only() -> None:
    """The prompt's own tokens are conditioned on, never scored."""
    model = build("llama")
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    table = model(input_ids=ids).logits.log_softmax(-1)[0]
    for prompt in (1, 2, 4):
        batch = Sequences(ids, torch.tensor([prompt]), torch.tensor([5]))
        expected = sum(table[t - 1, ids[0, t]] for t in range(prompt, 5))
        torch.testing.assert_close(completion_logps(model, batch)[0], expected)
    # an offset on the logits of the prompt's positions cannot reach the loss
    batch = Sequences(ids, torch.tensor([3]), torch.tensor([5]))
    weights = torch.autograd.grad(completion_logps(model, batch).sum(), model.lm_head.weight)[0]
    hidden = model.model(input_ids=ids).last_hidden_state[0, 2:4].detach()
    error = torch.nn.functional.one_hot(ids[0, 3:], VOCAB) - table[2:4].exp()
    torch.testing.assert_close(weights, (error.T @ hidden).detach())


def test_masks_follow_positions_if_bos_eos_and_pad_coincide() -> None:
    batch = sequences([([1], [1, 1]), ([1, 1, 1], [1])], extra=2, pad=1)
    assert batch.completion_index.tolist() == [1, 2, 6 + 3]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert batch.completion_length.tolist() == [2, 1]
    model = tiny_llama()
    table = model(input_ids=torch.tensor([[1, 1, 1]])).logits.log_softmax(-1)[0, :, 1]
    torch.testing.assert_close(completion_logps(model, batch), torch.stack([table[0] + table[1], table[2]]))


def test_sequence_rows_are_cut_to_the_longest() -> None:
    batch = sequences(random_rows(6, seed=2), extra=4)
    for index in (slice(1, 3), torch.tensor([4, 0])):
        part = batch.rows(index)
        assert part.input_ids.shape[1] == int(batch.length[index].max())
        model = tiny_llama()
        torch.testing.assert_close(completion_logps(model, part), completion_logps(model, batch)[index])
