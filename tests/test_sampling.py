"""Sampling: the model's own distribution, by position, without a trace in the global state."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TopPLogitsWarper,
)

from benchmarks import sampling as benchmark
from spo.batching import even_parts_by_length
from spo.forward.probe import probe_drawing
from spo.logs import log_once
from spo.models import tabular
from spo.sampling import SampleBuffer, derive_seed, generate, sample, static
from spo.sampling.draw import next_tokens, nucleus
from spo.types import Sequences
from tests.helpers import (
    BOS,
    EOS,
    PAD,
    VOCAB,
    completion_logps,
    every_completion,
    in_processes,
    model_spec,
    save_model,
    sequences,
    tiny_llama,
    tiny_tokenizer,
)

PROMPTS = [[BOS, 5, 6], [BOS], [BOS, 7, 8, 9, 10]]
SAMPLERS = ["static", "generate"]


def draw(model: nn.Module, prompts: Any = PROMPTS, seed: int = 1, **changes: Any) -> Sequences:
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "temperature": 1.0,
        "stop_ids": (EOS,),
        "pad_token_id": PAD,
        "seeds": [derive_seed(seed, i) for i in range(len(prompts))],
        "sampler": "static",
    }
    return sample(model, prompts, **settings | changes)


def completions(drawn: Sequences) -> list[list[int]]:
    return drawn.completions()


def test_sample_depends_on_its_seed_and_not_on_global_state() -> None:
    model = tiny_llama(scale=0.2)
    state = torch.get_rng_state()
    first = draw(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(draw(model).input_ids, first.input_ids)
    assert completions(draw(model, seed=2)) != completions(first)


@pytest.mark.parametrize(
    ("sampler", "dtype"), [("static", torch.float32), ("static", torch.float64), ("generate", torch.float32)]
)
def test_sample_does_not_depend_on_other_rows(sampler: str, dtype: torch.dtype) -> None:
    model = tiny_llama(scale=0.3, dtype=dtype)
    prompts = [[BOS, *range(3, 3 + i % 7)] for i in range(96)]
    seeds = [derive_seed("row", i) for i in range(96)]

    def in_batches_of(size: int, order: Seq[int]) -> list[list[int]]:
        drawn: dict[int, list[int]] = {}
        for first in range(0, 96, size):
            rows = order[first : first + size]
            chosen = {"seeds": [seeds[i] for i in rows], "max_new_tokens": 12, "sampler": sampler}
            found = draw(model, [prompts[i] for i in rows], **chosen)
            drawn |= dict(zip(rows, completions(found), strict=True))
        return [drawn[i] for i in range(96)]

    whole = in_batches_of(96, range(96))
    assert in_batches_of(1, range(96)) == in_batches_of(4, range(96)) == in_batches_of(64, range(96)) == whole
    assert in_batches_of(7, range(95, -1, -1)) == whole
    assert len(set(map(tuple, whole))) > 80
    # one prompt with many seeds draws many completions, one seed with one prompt always the same
    assert len(set(map(tuple, completions(draw(model, [[BOS]] * 50))))) > 25
    assert len(set(map(tuple, completions(draw(model, [[BOS]] * 50, seeds=[3] * 50))))) == 1


def test_samples_start_with_prompts_and_pad_right() -> None:
    drawn = draw(tiny_llama(scale=0.2))
    for prompt, ids, start, end in zip(PROMPTS, drawn.input_ids, drawn.prompt_length, drawn.length, strict=True):
        assert ids[:start].tolist() == prompt
        assert 1 <= end - start <= 6
        assert (ids[end:] == PAD).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_without_dropout_restores_module_modes(sampler: str) -> None:
    model = tiny_llama(scale=0.2, dtype=torch.float32, attention_dropout=0.9, _attn_implementation="eager")
    reference = completions(draw(model, sampler=sampler))
    model.train()
    model.model.norm.eval()  # type: ignore[union-attr, operator]
    modes = [module.training for module in model.modules()]
    assert completions(draw(model, sampler=sampler)) == reference
    assert [module.training for module in model.modules()] == modes and not all(modes)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_restores_modes_after_an_error(sampler: str) -> None:
    model = tiny_llama().train()
    with pytest.raises(IndexError):
        draw(model, [[VOCAB + 3]], sampler=sampler)
    assert all(module.training for module in model.modules())


class Scripted(nn.Module):
    """A model whose ``generate`` returns given tokens after the prompt."""

    def __init__(self, *completions: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.completions = torch.tensor(completions)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
        self.input_ids, self.attention_mask = input_ids, attention_mask
        return torch.cat([input_ids, self.completions], dim=1)


@pytest.mark.parametrize(("bos", "eos", "pad"), [(1, 2, 0), (1, 2, 2), (4, 4, 4)])
def test_first_generated_eos_ends_a_completion(bos: int, eos: int, pad: int) -> None:
    model = Scripted([7, 8, eos, pad, pad], [eos, pad, pad, pad, pad], [7, 8, 9, 7, 8], [7, 8, 9, 7, eos])
    prompts = [[bos], [bos, 5], [bos, eos], [bos, eos, eos, 5]]
    drawn = draw(model, prompts, max_new_tokens=5, stop_ids=(eos,), pad_token_id=pad)
    assert completions(drawn) == [[7, 8, eos], [eos], [7, 8, 9, 7, 8], [7, 8, 9, 7, eos]]
    assert drawn.length.tolist() == [4, 3, 7, 9]
    # generate is given every prompt against its right edge, the padding masked by position
    assert model.attention_mask.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert [row[mask == 1].tolist() for row, mask in zip(model.input_ids, model.attention_mask, strict=True)] == prompts


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_with_one_id_for_bos_eos_and_pad(sampler: str) -> None:
    model = tiny_llama(scale=0.2, bos_token_id=4, eos_token_id=4, pad_token_id=4)
    ids = {"stop_ids": (4,), "pad_token_id": 4}
    drawn = draw(model, [[4, 4, 5], [4], [4, 6]] * 20, max_new_tokens=40, sampler=sampler, **ids)
    ended = 0
    for completion in completions(drawn):
        assert 4 not in completion[:-1]
        assert completion[-1] == 4 or len(completion) == 40
        ended += completion[-1] == 4
    assert ended > 10


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_greedy_equals_argmax_and_hf_generate(positions: str, sampler: str) -> None:
    if positions == "rotary":
        model = tiny_llama(2)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
            model = GPT2LMHeadModel(config).double().eval()
    drawn = draw(model, temperature=0.0, max_new_tokens=8, sampler=sampler)
    for prompt, completion in zip(PROMPTS, completions(drawn), strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        assert completion == ids[len(prompt) :]
        generated = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=EOS, pad_token_id=PAD
        )
        assert completion == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_follow_the_exact_distribution(sampler: str) -> None:
    """Chi-square over all 64 completions of three tokens of a vocabulary of four, the prompt padded on the left."""
    model = tiny_llama(scale=0.15, vocab_size=4, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    n, prompt = 4000, [1]
    with torch.no_grad():
        probability = completion_logps(model, every_completion(prompt, 4, 3)).exp()
    drawn = draw(model, [prompt] * n + [[1, 2, 3, 0]], max_new_tokens=3, stop_ids=(99,), sampler=sampler)
    counts = Counter(map(tuple, completions(drawn)[:n]))
    expected = dict(zip(itertools.product(range(4), repeat=3), (n * probability).tolist(), strict=True))
    assert min(expected.values()) > 3
    statistic = sum((counts[outcome] - mean) ** 2 / mean for outcome, mean in expected.items())
    assert 35 < statistic < 100  # 63 degrees of freedom: 0.2% and 99.8%


def test_lower_temperature_gives_fewer_distinct_samples() -> None:
    model = tiny_llama(scale=0.3)
    prompts = [[BOS]] * 200

    def distinct(temperature: float) -> int:
        return len(set(map(tuple, completions(draw(model, prompts, temperature=temperature, max_new_tokens=2)))))

    assert distinct(0.0) == 1 < distinct(0.2) < distinct(1.0) < distinct(5.0)


MEDDLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.5,
    "typical_p": 0.2,
    "repetition_penalty": 50.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 20)),
    "begin_suppress_tokens": [20],
    "forced_eos_token_id": 21,
    "exponential_decay_length_penalty": [1, 50.0],
    "sequence_bias": [[[22], 50.0]],
    "min_length": 40,
    "bad_words_ids": [[22]],
    "encoder_repetition_penalty": 9.0,
    "max_length": 4,
    "eos_token_id": [3, 4, 5, 6, 7, 8],
}


@pytest.mark.parametrize("key", [*MEDDLING, "all"])
def test_generation_config_of_the_folder_is_ignored(key: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", scale=0.2)
    plain = model_spec().base(folder)
    expected = completions(draw(plain, PROMPTS * 3, sampler="generate"))
    settings = MEDDLING if key == "all" else {key: MEDDLING[key]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    meddled = model_spec().base(folder)
    held = meddled.generation_config.to_dict()  # type: ignore[union-attr]
    assert all(completions(draw(meddled, PROMPTS * 3, sampler=sampler)) == expected for sampler in SAMPLERS)
    assert meddled.generation_config.to_dict() == held  # type: ignore[union-attr]


def test_derived_seed_depends_on_every_part() -> None:
    seeds = {derive_seed("probe", 0, 0), derive_seed("probe", 0, 1), derive_seed("probe", 1, 0), derive_seed("x", 0, 0)}
    assert len(seeds) == 4 and derive_seed("probe", 0, 0) in seeds
    assert derive_seed("stage", 3) == 244320886372465  # a cache or a rerun relies on it never changing


# ----------------------------------------------------------------------------------------------- the static sampler

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt2": {},
    "falcon": {"dtype": torch.float32, "alibi": True},  # biases by distance, made of the mask
    "qwen2_moe": {
        "dtype": torch.float32,
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "gemma2": {
        "dtype": torch.float32,  # eager attention to a row of padding is NaN in float64
        "sliding_window": 4,
        "head_dim": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"dtype": torch.float32}, "it does not take position ids"),
    "mamba": ({"state_size": 4}, "it has a state instead of keys and values"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "its layers hold more than keys and values"),
    "phi3": ({}, r"it overrides methods of generation \(prepare_inputs_for_generation\)"),
}


def tiny(architecture: str, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """Weights far from their small start, so that distributions are far from uniform."""
    config = AutoConfig.for_model(architecture, **SIZES | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def ragged(n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 13, (n,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (size,), generator=generator).tolist() for size in sizes]


def both(model: nn.Module, prompts: Any, **changes: Any) -> list[list[int]]:
    """Return the completions of the two samplers, which must be equal."""
    assert static.unsupported(model) is None
    ours, theirs = (completions(draw(model, prompts, sampler=sampler, **changes)) for sampler in SAMPLERS)
    assert ours == theirs
    return ours


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_static_equals_generate(architecture: str, temperature: float) -> None:
    model = tiny(architecture, **ARCHITECTURES[architecture])
    drawn = both(model, ragged(24), temperature=temperature, max_new_tokens=30)
    lengths = set(map(len, drawn))
    assert temperature == 0 or len(lengths) > 5, "rows end at many places, and leave the batch there"
    if "sliding_window" in ARCHITECTURES[architecture]:
        wide = tiny(architecture, **ARCHITECTURES[architecture] | {"sliding_window": 64})
        assert both(wide, ragged(24), temperature=temperature, max_new_tokens=30) != drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_static_equals_generate_in_lower_precision(dtype: torch.dtype) -> None:
    """But for the rounding of other batch shapes, which now and then sends a row another way."""
    model = tiny("llama", dtype)
    ours, theirs = (completions(draw(model, ragged(40), max_new_tokens=10, sampler=sampler)) for sampler in SAMPLERS)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert same == 40 if dtype == torch.float32 else same >= 32


def test_static_sampler_with_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    plain = tiny("llama")
    before = both(plain, ragged(12))
    adapted = get_peft_model(plain, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
    assert both(adapted, ragged(12)) != before
    with adapted.disable_adapter():
        assert both(adapted, ragged(12)) == before


def test_one_prompt_one_token_and_prompts_of_one_length() -> None:
    model = tiny("llama")
    assert [len(row) for row in both(model, ragged(9), max_new_tokens=1)] == [1] * 9
    assert len(both(model, [[BOS]], max_new_tokens=20)) == 1
    assert len(both(model, [[BOS]] * 5, max_new_tokens=20)) == 5  # nothing is padded
    assert len(both(model, [[BOS, i] for i in range(3, 9)], max_new_tokens=20)) == 6


class Counted:
    """The shapes of the ids that a model is given, by a hook on its forward."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


def test_finished_rows_leave_the_batch() -> None:
    model = tiny("llama")
    probe_drawing(model)
    counted = Counted(model)
    drawn = draw(model, ragged(30), max_new_tokens=40)
    lengths = drawn.completion_length.tolist()
    assert len(set(lengths)) > 8
    # a row is forwarded once for each of its tokens, the first of which is drawn from the prompts' forward
    width = max(map(len, ragged(30)))
    expected = [(30, width)] + [(sum(length > step for length in lengths), 1) for step in range(1, max(lengths))]
    assert counted.shapes == expected


@pytest.mark.parametrize("schedule", [(16, 4), (3, 1), (2, 0), (1, 0)])
def test_samples_do_not_depend_on_when_finished_rows_leave(
    schedule: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = tiny("llama"), ragged(24)
    expected = draw(model, prompts, max_new_tokens=40, sampler="generate").completions()
    copies: list[Any] = []
    copy = static._copy_to_host

    def early_copy(flags: torch.Tensor) -> Any:
        """Copy at once, as the device does, so that later changes do not show."""
        copies.append(flags.tolist())
        return lambda found=copies[-1]: found

    monkeypatch.setattr(static, "_check_schedule", lambda device: schedule)
    monkeypatch.setattr(static, "_copy_to_host", early_copy)
    counted = Counted(model)
    assert draw(model, prompts, max_new_tokens=40).completions() == expected
    rows = [rows for rows, width in counted.shapes if width == 1]
    assert rows == sorted(rows, reverse=True) and rows[-1] < rows[0]
    every, notice = schedule
    assert len(copies) in (len(rows) // every, (len(rows) + notice) // every, (len(rows) + 1 + notice) // every)
    assert copy(torch.tensor([True, False]))() == [True, False]


def test_loop_ends_when_all_rows_finish_at_once() -> None:
    model = tiny("llama")
    counted = Counted(model)
    token = both(model, [[BOS]], max_new_tokens=1, temperature=0.0)[0][0]
    counted.shapes.clear()
    drawn = draw(model, [[BOS]] * 4, temperature=0.0, stop_ids=(token,), max_new_tokens=30)
    assert completions(drawn) == [[token]] * 4
    assert counted.shapes == [(4, 1)]


def test_samples_do_not_depend_on_the_batch_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny("llama"), ragged(40)
    whole = both(model, prompts, max_new_tokens=20)
    counted = Counted(model)
    for most in (40 * 32 - 1, 400, 100, 1):
        monkeypatch.setattr(generate, "MAX_BATCH_TOKENS", most)
        counted.shapes.clear()
        assert both(model, prompts, max_new_tokens=20) == whole
        prefills = [shape for shape in counted.shapes if shape[1] > 1]
        assert all(rows * (width + 20) <= most or rows == 1 for rows, width in prefills)
        assert len(prefills) > 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon", "gemma2"])
def test_prompts_are_forwarded_within_the_prefill_limit(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny(architecture, **ARCHITECTURES[architecture]), ragged(24)
    whole = both(model, prompts, max_new_tokens=20)
    counted = Counted(model)
    monkeypatch.setattr(static, "MAX_PREFILL_TOKENS", 30)
    assert completions(draw(model, prompts, max_new_tokens=20)) == whole
    lengths, first, parts = sorted(map(len, prompts)), 0, 0
    while first < 24:
        rows, width = counted.shapes[parts]
        first, parts = first + rows, parts + 1
        assert width == lengths[first - 1] and rows * width <= 30  # none is padded to a longer part's width
    assert parts > 4


def test_prompts_are_batched_evenly_by_length() -> None:
    assert even_parts_by_length([5, 1, 5, 1, 5, 2, 5], 5, 60) == [[1, 3, 5, 0], [2, 4, 6]]
    assert even_parts_by_length([70, 1], 5, 60) == [[1], [0]]
    assert even_parts_by_length([3] * 4, 5, 60) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("architecture", OTHERS)
def test_unsupported_model_uses_generate_and_logs_why(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    changes, why = OTHERS[architecture]
    model = tiny(architecture, **changes)
    log_once.cache_clear()
    with caplog.at_level("INFO", logger="spo.sampling.generate"):
        ours, theirs = (completions(draw(model, ragged(8), sampler=sampler)) for sampler in SAMPLERS)
        draw(model)
    assert ours == theirs
    (message,) = (record.getMessage() for record in caplog.records if record.name == "spo.sampling.generate")
    assert re.match(rf"{type(model).__name__}: sampled by Hugging Face's generate, .*: {why}", message)


def test_unsupported_model_reasons() -> None:
    from peft import PromptTuningConfig, get_peft_model

    assert "not a model of transformers" in str(static.unsupported(Scripted()))
    table, _ = tabular.build(tiny_tokenizer(), context=2, scale=1.0, seed=0)
    assert "not a model of transformers" in str(static.unsupported(table))
    prompted = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "learns a prompt" in str(static.unsupported(prompted))
    encoder = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=9))
    assert "has an encoder" in str(static.unsupported(encoder))


def test_sharded_model_is_sampled_in_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks have as many prompts, but not as long: what is forwarded does not follow from their lengths."""
    model = tiny("llama")
    expected = both(model, ragged(9), max_new_tokens=8)
    monkeypatch.setattr(generate, "MAX_BATCH_TOKENS", 40)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert "sharded" in str(static.unsupported(model))
        counted = Counted(model)
        assert completions(draw(model, ragged(9), max_new_tokens=8)) == expected
        assert {rows for rows, _ in counted.shapes} == {9}
    finally:
        torch.distributed.destroy_process_group()


def test_cache_is_allocated_once_and_written_in_place() -> None:
    layer = static.PreallocatedLayer(3, 10, padded=True)
    new = torch.randn(3, 2, 10, 4)
    keys, values = layer.update(new[:, :, :6], 2 * new[:, :, :6])
    taken = layer.keys.data_ptr(), layer.values.data_ptr()
    assert torch.equal(keys, new[:, :, :6]) and torch.equal(values, 2 * new[:, :, :6])
    layer.keep(2, torch.tensor([0]), torch.tensor([2]))
    going = new[[2, 1]]
    for filled in range(7, 11):
        assert layer.get_mask_sizes(1) == (filled, 0) and layer.get_seq_length() == filled - 1
        keys, values = layer.update(going[:, :, filled - 1 : filled], 2 * going[:, :, filled - 1 : filled])
        assert torch.equal(keys, going[:, :, :filled]) and torch.equal(values, 2 * going[:, :, :filled])
        assert (keys.data_ptr(), values.data_ptr()) == taken
    assert layer.get_max_length() == 10


def test_next_tokens_invert_the_cumulative_distribution() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)) * 2
    for temperature in (0.7, 1.0):
        probability = (logits.double() / temperature).softmax(-1)[0]
        bounds = probability.cumsum(0)
        middle = bounds - probability / 2
        chosen = next_tokens(logits.expand(1000, -1), middle, temperature)
        certain = probability > 1e-6  # those before a token are known to a part in 1e7 each
        assert certain.sum() > 100 and torch.equal(chosen[certain], torch.arange(1000)[certain])
        edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        assert next_tokens(logits.expand(2, -1), edge, temperature).tolist() == [0, 999]
    assert next_tokens(logits, torch.tensor([0.3]), 0.0).tolist() == [int(logits.argmax())]


def test_nucleus_is_that_of_transformers() -> None:
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    for temperature, top_p in ((1.0, 0.9), (0.5, 0.3), (2.0, 0.999), (1.0, 1e-9)):
        weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
        expected = TopPLogitsWarper(top_p)(torch.empty(0), logits / temperature).isfinite()
        assert torch.equal(nucleus(weights, top_p), expected)
        numbers = torch.linspace(0, 1 - 1e-9, 200, dtype=torch.float64)
        drawn = next_tokens(logits, numbers, temperature, top_p)
        assert expected[torch.arange(200), drawn].all()


def test_nucleus_at_its_limits() -> None:
    weights = torch.tensor([[1.0, 4, 4, 1], [0, 0, 0, 7], [0, 5, 5, 0]], dtype=torch.float64)
    assert nucleus(weights, 0.4).tolist() == [
        [False, True, False, False],
        [False] * 3 + [True],
        [False, True] + [False] * 2,
    ]
    assert nucleus(weights, 0.41)[0].tolist() == [False, True, True, False]
    assert nucleus(weights, 0.8)[0].tolist() == [False, True, True, False]
    assert nucleus(weights, 0.9)[0].tolist() == [True, True, True, False]  # the lower id of equals
    assert nucleus(weights, 1.0).tolist() == [[True] * 4, [False] * 3 + [True], [False, True, True, False]]
    logits = torch.randn(100, 300, generator=torch.Generator().manual_seed(1))
    numbers = torch.rand(100, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(next_tokens(logits, numbers, 1.0, 1.0), next_tokens(logits, numbers, 1.0))
    assert torch.equal(next_tokens(logits, numbers, 1.0, 1e-12), logits.argmax(-1))
    masked = torch.tensor([[-torch.inf, 0.0, -torch.inf, -1.0]]).expand(50, -1)
    edges = torch.linspace(0, 1 - 2**-53, 50, dtype=torch.float64)
    assert set(next_tokens(masked, edges, 1.0, 0.99).tolist()) == {1, 3}


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.1, float("nan")])
def test_top_p_outside_of_its_range_is_refused(top_p: float) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 1, "temperature": 1.0, "stop_ids": [EOS], "pad_token_id": PAD}
    with pytest.raises(ValueError, match="top_p has to be above 0 and at most 1"):
        sample(tiny_llama(), [[BOS]], seeds=[0], sampler="static", top_p=top_p, **settings)


def test_sampling_benchmark_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    words = ["--prompts", "4", "--prompt", "6", "--new", "8", "--length", "4", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.sampling", *words, "--json", str(file)])
    benchmark.main()
    found = json.loads(file.read_text())
    assert found["agreement"] == 1 and found["rounds"] == 2 and 1 <= found["mean_length"] <= 8
    assert found["ratio_range"][0] <= found["ratio"] <= found["ratio_range"][1]
    assert found["shares_of_static"]["matrix products"] > 0
    assert f"{found['ratio']:.2f}x" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- buffer


def buffer(**changes: Any) -> SampleBuffer:
    settings: dict[str, Any] = {
        "refresh_every": 3,
        "num_samples": 4,
        "batch_size": 2,
        "max_new_tokens": 5,
        "stop_ids": (EOS,),
        "pad_token_id": PAD,
        "sampler": "static",
        "seed": 0,
    }
    return SampleBuffer([[BOS, i] for i in range(3, 13)], **settings | changes)


def test_buffer_is_stale_at_first_and_every_few_steps() -> None:
    held, model = buffer(), tiny_llama(scale=0.2)
    refreshed = []
    for step in range(8):
        if held.is_stale(step):
            held.refresh(model, step)
            refreshed.append(step)
        assert held.age(step) == step % 3
    assert refreshed == [0, 3, 6]


def test_buffer_draws_distinct_prompts_and_walks_through_its_rows() -> None:
    held = buffer()
    held.refresh(tiny_llama(scale=0.2), 0)
    assert held.samples is not None
    prompts = held.samples.input_ids[:, 1].tolist()
    assert len(set(prompts)) == 4
    served = [held.rows(step).input_ids[:, 1].tolist() for step in range(3)]
    assert served == [prompts[:2], prompts[2:], prompts[:2]]


def test_buffer_repeats_prompts_if_it_needs_more() -> None:
    held = buffer(num_samples=25)
    held.refresh(tiny_llama(scale=0.2), 0)
    assert held.samples is not None
    counts = Counter(held.samples.input_ids[:, 1].tolist())
    assert len(counts) == 10 and set(counts.values()) == {2, 3}


def test_buffer_depends_on_seed_and_step_alone() -> None:
    model = tiny_llama(scale=0.2)

    def rows(step: int = 3, **changes: Any) -> list[list[int]]:
        held = buffer(**changes)
        held.refresh(model, step)
        assert held.samples is not None
        return held.samples.input_ids.tolist()

    assert rows() == rows()
    assert all(rows() != other for other in (rows(step=6), rows(seed=1)))


@pytest.mark.parametrize("num_samples", [1, 4, 7])
def test_processes_hold_the_samples_that_one_draws(num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(scale=0.2)

    def work() -> dict[str, Any]:
        held = buffer(num_samples=num_samples)
        held.refresh(model, 3)
        return {name: torch.as_tensor(value).tolist() for name, value in held.state_dict().items()}

    alone = work()
    assert len(alone["length"]) == num_samples
    assert in_processes(3, work, monkeypatch) == [alone] * 3


def test_buffer_of_one_process_of_several_is_drawn_again(caplog: pytest.LogCaptureFixture) -> None:
    first = buffer(num_samples=2)
    first.refresh(tiny_llama(scale=0.2), 3)
    whole = buffer(num_samples=4)
    whole.load_state_dict(first.state_dict())
    assert whole.is_stale(4) and "of one process alone" in caplog.text


def test_buffer_samples_follow_the_policy() -> None:
    """Chi-square over all 64 completions of three tokens of a vocabulary of four, as the regularizer draws them."""
    model = tiny_llama(scale=0.15, vocab_size=4, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    settings = {"num_samples": 4000, "batch_size": 4000, "max_new_tokens": 3, "stop_ids": (99,), "pad_token_id": 0}
    held = SampleBuffer([[1]], refresh_every=1, sampler="static", seed=0, **settings)  # type: ignore[arg-type]
    held.refresh(model, 0)
    with torch.no_grad():
        expected = 4000 * completion_logps(model, every_completion([1], 4, 3)).exp()
    counts = Counter(map(tuple, completions(held.held)))
    found = torch.tensor([counts[outcome] for outcome in itertools.product(range(4), repeat=3)])
    assert 35 < ((found - expected) ** 2 / expected).sum() < 100  # 63 degrees of freedom: 0.2% and 99.8%


def test_empty_buffer_raises_an_error() -> None:
    with pytest.raises(RuntimeError, match="refresh"):
        buffer().rows(0)


def test_buffer_state_round_trip() -> None:
    held, model = buffer(), tiny_llama(scale=0.2)
    assert held.state_dict() == {}
    held.refresh(model, 3)
    other = buffer()
    other.load_state_dict(held.state_dict())
    assert not other.is_stale(5) and other.is_stale(6) and other.age(5) == 2
    ours, theirs = held.rows(4), other.rows(4)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.completion_index, theirs.completion_index)
    empty = buffer()
    empty.load_state_dict({})
    assert empty.is_stale(0)


def test_samples_have_the_log_probs_of_their_tokens() -> None:
    model = tiny_llama(scale=0.2)
    drawn = draw(model)
    again = sequences(list(zip(PROMPTS, completions(drawn), strict=True)))
    torch.testing.assert_close(completion_logps(model, drawn), completion_logps(model, again))


class RenamedCache(LlamaForCausalLM):
    """A model that takes its cache under the name that transformers 5.24 introduced."""

    def forward(self, *, cache: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(**{static.cache_keyword(LlamaForCausalLM): cache}, **kwargs)


def test_static_sampler_passes_the_cache_under_the_name_of_the_signature() -> None:
    model = tiny_llama(1, dtype=torch.float64)
    ids, numbers = torch.tensor([[BOS, 5, 6], [BOS, 7, 8]]), torch.rand(2, 6, dtype=torch.float64)
    settings: dict[str, Any] = {"temperature": 1.0, "stop_ids": (), "pad_token_id": PAD}
    plain = static.decode(model, ids, torch.ones_like(ids), numbers, **settings)
    model.__class__ = RenamedCache
    assert torch.equal(static.decode(model, ids, torch.ones_like(ids), numbers, **settings), plain)
