"""Packed rows equal padded batches for every supported model; any other model is rejected with a message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from spo.forward import flex, grouped, probe
from spo.forward.attention import BACK_ENDS
from spo.forward.head import completion_logits
from spo.forward.packing import Group, Groups, pack
from spo.forward.probe import enable_packing
from spo.forward.sharding import Sharding, shard
from spo.forward.speed import Speed, compile_blocks
from spo.logs import log_once
from spo.ops import completion_targets, token_logps
from spo.types import Sequences
from tests.helpers import FAST, PLAIN, VOCAB, random_rows, sequences, tiny_llama
from tests.test_ops import ARCHITECTURES, _config, build, gradients

ACCEPTED: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("LlamaConfig"),
    "qwen2": lambda: _config("Qwen2Config"),
    "qwen3": lambda: _config("Qwen3Config", head_dim=8),
    "mistral": lambda: _config("MistralConfig", sliding_window=None),
    "mixtral": lambda: _config("MixtralConfig", num_local_experts=4),
    "gemma": lambda: _config("GemmaConfig", head_dim=8),
    "phi": ARCHITECTURES["phi_with_bias"],
    "gpt_neox": ARCHITECTURES["gpt_neox"],
    "gpt2": ARCHITECTURES["gpt2"],
    "opt": ARCHITECTURES["opt"],
    "granite": ARCHITECTURES["granite_scaled_logits"],
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mistral": (lambda: _config("MistralConfig", sliding_window=3), "its attention takes sliding_window"),
    "gemma2": (lambda: _config("Gemma2Config", head_dim=8, sliding_window=3), "it has layers of sliding_attention"),
    "gemma2_full": (
        lambda: _config("Gemma2Config", head_dim=8, layer_types=["full_attention"] * 2),
        "its attention takes softcap",
    ),
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4),
        "it has layers of linear_attention",
    ),
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2),
        "its attention implementation cannot be set",
    ),
}
ROWS = [*random_rows(4, seed=3), ([5], [6]), ([5], [7, 8, 9]), ([4, 4, 4], [4]), ([5], [9])]


def made(config: Callable[[], Any], **settings: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config(), **settings).eval()
    return model if isinstance(model, transformers.MixtralForCausalLM) else model.double()


def assert_same(got: Tensor, want: Tensor) -> None:
    """To what is left of float64 where architectures round to float32 on the way."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.abs().max())))


def values(model: nn.Module, batch: Sequences) -> Tensor:
    return token_logps(completion_logits(model, batch), completion_targets(batch))


@pytest.fixture(params=["groups", "launches", "flex"])
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each attention on this device: FlexAttention is not the CPU's, and runs there uncompiled."""
    chosen = {request.param: BACK_ENDS[request.param]}
    monkeypatch.setattr(probe, "back_ends", lambda device: list(chosen))
    if request.param == "flex":
        monkeypatch.setattr(probe, "_leaks", lambda model, rows: False)  # which takes a gradient
    return request.param


@pytest.fixture(params=[256, 4])
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Small groups in one call, or a call for each prompt and each of the longer completions."""
    monkeypatch.setattr(grouped, "MAX_MASKED_TOKENS", request.param)
    return request.param


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_packed_equals_padded_for_accepted_architectures(name: str, own: str, together: int) -> None:
    model = made(ACCEPTED[name], attn_implementation=own)
    padded = values(model, sequences(ROWS))
    padded_gradients = gradients(padded, model)
    plain = model(torch.tensor([[3, 4, 5]])).logits
    assert enable_packing(model) is None
    for shared in (True, False):
        packed = values(model, pack(sequences(ROWS), share_prompts=shared))
        assert_same(packed, padded)
        for got, want in zip(gradients(packed, model), padded_gradients, strict=True):
            assert_same(got, want)
    # without the keyword the model is what it was
    torch.testing.assert_close(model(torch.tensor([[3, 4, 5]])).logits, plain)
    prompt = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    generated = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    fresh = made(ACCEPTED[name], attn_implementation=own)
    assert torch.equal(generated, fresh.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("name", REFUSED)
def test_rejected_model_gets_a_warning_and_stays_as_it_was(name: str, caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()
    config, reason = REFUSED[name]
    model = made(config, attn_implementation="eager").float()
    own, before = model.config._attn_implementation, values(model, sequences(ROWS))
    with caplog.at_level(logging.WARNING, logger="spo"):
        settled = FAST.resolve_for(model)
    assert [record.getMessage() for record in caplog.records if record.name == "spo.forward.speed"] == [
        f"{type(model).__name__}: batches are padded, not packed: {reason}"
    ]
    assert not settled.packing and settled.arrange(sequences(ROWS)).packed is None
    assert model.config._attn_implementation == own
    assert torch.equal(values(model, sequences(ROWS)), before)


def test_probe_rejects_a_model_with_other_packed_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float, dropout: float) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    model = tiny_llama(attn_implementation="sdpa")
    monkeypatch.setitem(BACK_ENDS, "groups", leaking)
    reason = enable_packing(model)
    assert reason is not None and reason.startswith("packed and padded log-probs differ by ")
    assert model.config._attn_implementation == "sdpa"


def test_probe_rejects_a_model_whose_sequences_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little: in half precision the difference of the log-probs would drown in rounding."""

    def leaking(query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float, dropout: float) -> Tensor:
        attended = grouped.attend_by_group(query, key, value, groups, scale, dropout)
        return attended + 1e-7 * value.mean(dim=2, keepdim=True).repeat_interleave(query.shape[1] // value.shape[1], 1)

    model = tiny_llama(dtype=torch.float32, attn_implementation="sdpa")
    monkeypatch.setitem(BACK_ENDS, "groups", leaking)
    assert enable_packing(model) == "a sequence in a packed row changes another one"


def test_editing_a_sequence_leaves_the_others_bit_identical(back_end: str, together: int) -> None:
    """Neither its log-probs nor its part of the gradient, to the last bit, whatever is edited."""
    model = tiny_llama(attn_implementation="sdpa")
    assert enable_packing(model) is None
    embeddings = model.requires_grad_(False).get_input_embeddings()

    def scored(rows: list[tuple[list[int], list[int]]], watched: range) -> tuple[Tensor, Tensor]:
        """Log-probs of the watched rows, and their gradient with respect to the embedded tokens of the row."""
        batch = pack(sequences(rows), share_prompts=True)
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            kept.append(out.detach().requires_grad_(back_end != "flex"))  # on the CPU it has no backward
            return kept[0]

        handle = embeddings.register_forward_hook(keep)
        found = values(model, batch).split(batch.completion_length.tolist())
        handle.remove()
        chosen = torch.cat([found[i] for i in watched])
        return chosen.detach(), torch.autograd.grad(chosen.sum(), kept[0])[0] if chosen.requires_grad else chosen

    rows = [([3, 4, 5, 6], [7, 8, 9]), ([3, 4, 5, 6], [10, 11]), ([12], [13, 14, 15, 16, 17]), ([18, 19], [20])]
    for edited in range(len(rows)):
        prompt, completion = rows[edited]
        others = [*rows]
        others[edited] = (prompt, [(token + 5) % VOCAB for token in completion])
        watched = [i for i in range(len(rows)) if i != edited]
        for i in watched:
            before, gradient = scored(rows, range(i, i + 1))
            after, other_gradient = scored(others, range(i, i + 1))
            assert torch.equal(before, after) and torch.equal(gradient, other_gradient)
        own, _ = scored(rows, range(edited, edited + 1))
        assert not torch.equal(own, scored(others, range(edited, edited + 1))[0])


def test_back_ends_equal_padded_attention(back_end: str, together: int) -> None:
    model = tiny_llama(attn_implementation="sdpa", num_attention_heads=4, num_key_value_heads=2)
    padded = values(model, sequences(ROWS))
    expected = gradients(padded, model)
    assert enable_packing(model) is None
    assert back_end in model.config._attn_implementation
    if back_end == "flex":  # on the CPU it has no backward
        model.requires_grad_(False)
    packed = values(model, pack(sequences(ROWS), share_prompts=True))
    assert_same(packed, padded)
    if back_end != "flex":
        for got, want in zip(gradients(packed, model), expected, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_back_ends_take_the_mixed_dtypes_of_autocast(back_end: str) -> None:
    """Under autocast, rotary embeddings leave queries and keys in float32 beside values in bfloat16."""
    groups = Groups((Group(3, (2, 4)), Group(1, (2,))))
    query, key, value = torch.randn(3, 1, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = BACK_ENDS[back_end](query, key, value.bfloat16(), groups, None)
    halves = (tensor.bfloat16() for tensor in (query, key, value))
    assert torch.equal(found, BACK_ENDS[back_end](*halves, groups, None)) and found.dtype == torch.bfloat16


def test_packed_row_holds_each_prompt_once() -> None:
    batch = sequences([([1, 3], [4, 5]), ([1], [6]), ([1, 3], [7]), ([1, 3], [8, 9, 10])])
    packed = pack(batch, share_prompts=True).packed
    assert packed is not None
    assert packed.input_ids.tolist() == [[1, 3, 4, 5, 7, 8, 9, 10, 1, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 2, 3, 4, 0, 1]]
    assert packed.predictors.tolist() == [1, 2, 8, 1, 1, 5, 6]
    assert [(group.prompt, group.completions) for group in packed.groups.members] == [(2, (2, 1, 3)), (1, (1,))]
    apart = pack(batch, share_prompts=False).packed
    assert apart is not None
    assert apart.input_ids.tolist() == [[1, 3, 4, 5, 1, 6, 1, 3, 7, 1, 3, 8, 9, 10]]
    assert [group.completions for group in apart.groups.members] == [(2,), (1,), (1,), (3,)]


class Masking(transformers.LlamaForCausalLM):
    """Adds to the attention mask what is zero at the start, as Doge does."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(()))
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(self._masked, with_kwargs=True)

    def _masked(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        return args, kwargs if mask is None else {**kwargs, "attention_mask": mask + self.bias}


def test_probe_rejects_a_model_that_makes_its_own_mask() -> None:
    model = Masking(_config("LlamaConfig", attn_implementation="sdpa"))
    assert enable_packing(model) == "it makes its own attention mask"


@pytest.mark.parametrize("own", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn2"])
def test_probe_rejects_other_attention_implementations(own: str) -> None:
    model = tiny_llama()
    model.config._attn_implementation_internal = own
    assert enable_packing(model) == f"packing does not support model.attn_implementation={own}; use sdpa"


def test_probe_accepts_a_mixture_of_experts() -> None:
    """Their products have other shapes, and other last bits, when a sequence elsewhere is edited."""
    torch.manual_seed(0)
    config = _config("MixtralConfig", hidden_size=256, intermediate_size=128, num_hidden_layers=3, num_local_experts=8)
    model = transformers.MixtralForCausalLM(config).eval()
    assert enable_packing(model) is None


LAYOUTS: list[list[tuple[int, ...]]] = [
    [(2, 1)],
    [(65, 32, 33), (4, 1, 2)],
    [(45, 22, 23), (20, 20), (150, 75, 75), (1, 1), (1, 1)],
    [(64, 64), (64, 32, 32), (3, 1, 1)],
    [(300, 100, 200)],
    [(7, 130, 5, 131)],
    [(400, 300, 128), (256, 256, 256)],
]


def layout(lengths: list[tuple[int, ...]]) -> Groups:
    return Groups(tuple(Group(prompt, completions) for prompt, *completions in lengths))  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", LAYOUTS)
def test_flex_blocks_are_those_with_visible_tokens_and_full_where_all_are(lengths: list[tuple[int, ...]]) -> None:
    groups, size = layout(lengths), flex.FLEX_BLOCK_TOKENS
    mask = flex.block_mask(groups, torch.device("cpu"))
    seen = grouped.visibility_mask(groups.members, torch.device("cpu"))
    rest = -len(seen) % size
    tiles = nn.functional.pad(seen, (0, rest, 0, rest)).unflatten(0, (-1, size)).unflatten(2, (-1, size))
    for counts, indices, expected in (
        (mask.full_kv_num_blocks, mask.full_kv_indices, tiles.all(3).all(1)),
        (mask.kv_num_blocks, mask.kv_indices, tiles.any(3).any(1) & ~tiles.all(3).all(1)),
    ):
        assert counts is not None and indices is not None and counts.dtype == indices.dtype == torch.int32
        for count, index, row in zip(counts[0, 0], indices[0, 0], expected, strict=True):
            assert index[:count].tolist() == row.nonzero().flatten().tolist()
    if max(map(max, lengths)) >= 256:
        assert mask.full_kv_num_blocks is not None and mask.full_kv_num_blocks.sum() > 0


def attention_by_definition(query: Tensor, key: Tensor, value: Tensor, groups: Groups) -> Tensor:
    """Attention over all pairs of tokens, with each head of keys copied."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    products = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    seen = grouped.visibility_mask(groups.members, query.device)
    return products.masked_fill(~seen, -torch.inf).softmax(-1) @ value


def heads(groups: Groups, query_heads: int, key_heads: int, dtype: torch.dtype = torch.float64) -> Any:
    """Random queries, keys and values for a row."""
    generator, length = torch.Generator().manual_seed(0), sum(group.length for group in groups.members)
    sizes = (query_heads, key_heads, key_heads)
    return [torch.randn(1, n, length, 16, generator=generator, dtype=dtype) for n in sizes]


@pytest.mark.parametrize("attend", [grouped.attend_by_group, grouped.attend_in_launches])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("lengths", LAYOUTS[:-1])
def test_attention_by_group_equals_its_definition(
    lengths: list[tuple[int, ...]], key_heads: int, attend: Callable[..., Tensor]
) -> None:
    groups = layout(lengths)
    given = [tensor.requires_grad_() for tensor in heads(groups, 6, key_heads)]
    found, expected = attend(*given, groups, None), attention_by_definition(*given, groups)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    for got, want in zip(
        *(torch.autograd.grad((out * weights).sum(), given) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("key_heads", [2, 6])
@pytest.mark.parametrize("lengths", LAYOUTS[:-1])
def test_attention_by_blocks_equals_its_definition(lengths: list[tuple[int, ...]], key_heads: int) -> None:
    groups = layout(lengths)
    given = heads(groups, 6, key_heads)
    torch.testing.assert_close(flex.attend_by_blocks(*given, groups, None), attention_by_definition(*given, groups))


@pytest.mark.slow
def test_compiled_kernel_skips_the_mask_in_full_blocks() -> None:
    """The uncompiled kernel of a CPU computes the mask everywhere. The compiled one reads the blocks."""
    groups = layout(LAYOUTS[-1])
    given = heads(groups, 4, 2, torch.float32)
    mask = flex.block_mask(groups, torch.device("cpu"))
    kernel: Any = flex._compiled_flex_attention()
    with torch.no_grad():
        found = kernel(*given, block_mask=mask, enable_gqa=True)
        torch.testing.assert_close(found, attention_by_definition(*given, groups), rtol=1e-4, atol=1e-5)
        mask.mask_mod = lambda batch, head, q, k: q < 0
        only_full = kernel(*given, block_mask=mask, enable_gqa=True)
    assert mask.full_kv_num_blocks is not None
    reached = mask.full_kv_num_blocks[0, 0].repeat_interleave(flex.FLEX_BLOCK_TOKENS)[: found.shape[2]] > 0
    assert reached.any() and not reached.all()
    assert only_full[0, :, reached].abs().amax(-1).min() > 0, (
        "tokens of full blocks are seen whatever the mask computes"
    )
    assert (only_full[0, :, ~reached] == 0).all()


def test_calls_of_similar_shape_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = layout([(300, 40, 40), *[(20, 300), (300, 20)] * 4, (300, 40, 40), (310, 40, 33)])
    calls, launches = len(list(grouped.kernel_calls(groups, torch.device("cpu")))), list[int]()
    kernel = grouped.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        launches.append(len(args[0]))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(grouped, "scaled_dot_product_attention", counted)
    grouped.attend_in_launches(*heads(groups, 2, 2), groups, None)
    assert len(launches) == 2 and sum(launches) == calls == 14


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 256, 257, 700, 1025, 5000])
def test_padding_of_a_launch_is_at_most_half(length: int) -> None:
    padded = grouped._padded_length(length)
    assert length <= padded <= max(1.5 * length, 128) and padded % 64 == 0


def test_packed_equals_padded_with_an_adapter(caplog: pytest.LogCaptureFixture) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build("llama"), settings).double().eval()
    padded = values(model, sequences(ROWS))
    speed = FAST.resolve_for(model)
    assert speed.packing and not caplog.records
    packed = values(model, speed.arrange(sequences(ROWS)))
    assert_same(packed, padded)
    with model.disable_adapter():
        assert (values(model, speed.arrange(sequences(ROWS))) - packed).abs().max() > 1e-3


def test_packed_gradients_with_gradient_checkpointing() -> None:
    model = tiny_llama(attn_implementation="sdpa").train()
    assert enable_packing(model) is None and model.training
    batch = pack(sequences(ROWS), share_prompts=True)
    expected = gradients(values(model, batch), model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for got, want in zip(gradients(values(model, batch), model), expected, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("speed", [FAST, PLAIN], ids=["fast", "plain"])
def test_speed_settings_keep_the_log_probs(speed: Speed) -> None:
    model = tiny_llama(attn_implementation="sdpa")
    expected = token_logps(completion_logits(model, sequences(ROWS)), completion_targets(sequences(ROWS)))
    sums = torch.stack([part.sum() for part in expected.split(sequences(ROWS).completion_length.tolist())])
    speed = speed.resolve_for(model)
    assert_same(speed.logps(model, speed.arrange(sequences(ROWS))), sums)


def test_packed_rows_use_attention_dropout() -> None:
    model = tiny_llama(attn_implementation="sdpa", attention_dropout=0.5)
    assert enable_packing(model) is None
    batch = pack(sequences(ROWS), share_prompts=True)
    torch.manual_seed(0)
    still = values(model, batch)
    assert torch.equal(values(model, batch), still)
    model.train()
    assert (values(model, batch) - still).abs().max() > 1e-3


@pytest.mark.parametrize("order", ["compiled, then sharded", "sharded, then compiled"])
def test_compiled_blocks_of_a_sharded_model_are_one_graph(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both orders the hooks that gather the weights run outside of the graph, which all blocks and lengths share."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    counters = torch._dynamo.utils.counters

    def losses(*changes: Callable[[nn.Module], None]) -> list[float]:
        torch._dynamo.reset()
        counters.clear()
        model, found = tiny_llama(1, dtype=torch.float32).train(), []
        for change in changes:
            change(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            ids = torch.randint(VOCAB, (2, 6 + step), generator=torch.Generator().manual_seed(step))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    plain = losses()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        changes = [compile_blocks, lambda model: shard(model, mesh, Sharding())]
        assert losses(*(changes if order.startswith("compiled") else changes[::-1])) == pytest.approx(plain, rel=1e-6)
    finally:
        torch.distributed.destroy_process_group()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
