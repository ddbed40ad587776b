"""A sequence has the numbers of a plain forward pass over it alone, whatever is in its batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from spo.data import TokenizedPair
from spo.data.logps_store import LogpsStore, sequence_key
from spo.errors import UserError
from spo.evaluation.judges.local import LocalModel
from spo.forward import probe
from spo.forward.head import completion_logits, completion_states
from spo.forward.neighbors import Company, company_of, rope_thresholds
from spo.forward.probe import Drawing, probe_company, probe_drawing
from spo.forward.speed import Speed
from spo.losses import DPOLoss
from spo.models import FrozenReference, NoReference
from spo.notes import collect_notes
from spo.ops import completion_targets, token_logps
from spo.sampling import derive_seed, sample, static
from spo.stages.reference_logps import fill
from tests.helpers import EOS, FAST, PAD, PLAIN, VOCAB, make_data, make_module, make_trainer, sequences
from tests.test_ops import _config

THRESHOLD = 12
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": THRESHOLD,
    "rope_theta": 10000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
STATES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 4,
    "pad_token_id": PAD,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("LlamaConfig"),
    "gpt2": lambda: _config("GPT2Config", n_positions=64, n_layer=2, n_head=2, n_embd=16),
    "opt": lambda: _config("OPTConfig", ffn_dim=24, word_embed_proj_dim=16),
    "bloom": lambda: _config("BloomConfig", n_layer=2, n_head=2),
    "gemma3_sliding": lambda: _config("Gemma3TextConfig", head_dim=8, sliding_window=5),
    "mixtral": lambda: _config("MixtralConfig", num_local_experts=4),
    # Positions depend on the longest sequence.
    "llama_longrope": lambda: _config("LlamaConfig", rope_parameters=LONGROPE),
    "llama_dynamic": lambda: _config("LlamaConfig", rope_parameters=DYNAMIC, max_position_embeddings=THRESHOLD),
    "phi3_longrope": lambda: _config(
        "Phi3Config", original_max_position_embeddings=THRESHOLD, rope_parameters=LONGROPE
    ),
    "gemma3_dynamic": lambda: _config(
        "Gemma3TextConfig",
        head_dim=8,
        sliding_window=5,
        max_position_embeddings=THRESHOLD,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    # States and convolutions.
    "mamba": lambda: transformers.MambaConfig(**STATES, initializer_range=0.5),
    "mamba2": lambda: transformers.Mamba2Config(
        **STATES, expand=2, num_heads=4, head_dim=8, n_groups=1, chunk_size=4, initializer_range=0.5
    ),
    "recurrent_gemma": lambda: _config(
        "RecurrentGemmaConfig", num_hidden_layers=4, lru_width=16, attention_window_size=5, head_dim=8
    ),
    "rwkv": lambda: transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, context_length=64, use_cache=True
    ),
    # It counts positions from the first column, whether that is padding or not.
    "bart": lambda: transformers.BartConfig(
        vocab_size=VOCAB, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=24, init_std=0.5
    ),
}
STATIC = ("llama", "gpt2", "opt", "gemma3_sliding", "mixtral", "llama_longrope", "llama_dynamic", "gemma3_dynamic")
SCALED = ("llama_longrope", "llama_dynamic", "phi3_longrope", "gemma3_dynamic")
LENGTHS = [(2, 4), (3, 17), (1, 2), (5, 6), (4, 9), (3, 17), (7, 13)]


def built(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(MODELS[name]()).float().eval()


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [(ids(prompt, i), ids(completion, 50 + i)) for i, (prompt, completion) in enumerate(LENGTHS)]


def alone(name: str, prompt: list[int], completion: list[int]) -> Tensor:
    """Return log-probs by a plain forward pass of a fresh model over one sequence."""
    with torch.no_grad():
        logps = built(name)(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].log_softmax(-1)
    return logps[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("speed", [PLAIN, FAST], ids=["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_in_a_batch_equal_those_of_each_sequence_alone(name: str, speed: Speed) -> None:
    model = built(name)
    speed = speed.resolve_for(model)
    batch = speed.arrange(sequences(ROWS))
    assert name not in ("llama", "llama_longrope", "gpt2") or speed.packs == speed.packing
    for _ in range(2):  # Some models remember what they computed before.
        with torch.no_grad(), collect_notes() as notes:
            got = token_logps(speed.logits(model, batch), completion_targets(batch))
        for part, row in zip(got.split(batch.completion_length.tolist()), ROWS, strict=True):
            torch.testing.assert_close(part, alone(name, *row), rtol=0, atol=1e-5 * max(1, float(part.abs().max()) / 8))
    assert not notes and (name in SCALED) == (vars(model).get("_noted") == {"sequences_run_alone"})


@pytest.mark.parametrize("speed", [PLAIN, FAST], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_gradients_in_a_batch_are_the_sums_of_those_alone(name: str, speed: Speed) -> None:
    model = built(name)
    speed = speed.resolve_for(model)
    weights = torch.linspace(-1, 1, sum(len(completion) for _, completion in ROWS))

    def slopes(rows: list[Any], weights: Tensor) -> list[Tensor]:
        batch = speed.arrange(sequences(rows))
        values = token_logps(speed.logits(model, batch), completion_targets(batch))
        return list(torch.autograd.grad((values * weights).sum(), list(model.parameters())))

    parts = weights.split([len(completion) for _, completion in ROWS])
    singly = [slopes([row], part) for row, part in zip(ROWS, parts, strict=True)]
    for got, *wanted in zip(slopes(ROWS, weights), *singly, strict=True):
        expected = torch.stack(wanted).sum(0)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_deferred_states_keep_the_order_of_the_sequences() -> None:
    model = built("phi3_longrope")
    batch = sequences(ROWS, extra=3)
    states = completion_states(model, batch)
    together = token_logps(completion_logits(model, batch, max_logits=1), completion_targets(batch))
    assert len(states) == len(together) == sum(len(completion) for _, completion in ROWS)
    torch.testing.assert_close(together, torch.cat([alone("phi3_longrope", *row) for row in ROWS]), rtol=0, atol=1e-5)


def test_short_sequences_are_as_before_after_a_long_one() -> None:
    for short in (5, THRESHOLD, THRESHOLD + 3):
        model, row = built("llama_dynamic"), (ids(2, 0), ids(short - 2, 1))
        for _ in range(2):
            batch = sequences([row])
            got = token_logps(completion_logits(model, batch), completion_targets(batch))
            torch.testing.assert_close(got, alone("llama_dynamic", *row), rtol=0, atol=1e-5)
            completion_logits(model, sequences([(ids(5, 2), ids(24, 3))]))


# -------------------------------------------------------------------------------------------------------- sampling

PROMPTS = [ids(length, 20 + length) for length in (3, 1, 9, 11, 16, 3)]
NEW = 7


def drawn(model: nn.Module, prompts: list[list[int]], sampler: Any, **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {
        "max_new_tokens": NEW,
        "temperature": 1.0,
        "stop_ids": [EOS],
        "pad_token_id": PAD,
        "seeds": [derive_seed(*prompt) for prompt in prompts],
    }
    return sample(model, prompts, sampler=sampler, **settings | changes).completions()


def greedy(model: nn.Module, prompt: list[int]) -> list[int]:
    """Decode by a plain forward pass over the whole prefix for each token."""
    row = list(prompt)
    while len(row) < len(prompt) + NEW and (len(row) == len(prompt) or row[-1] != EOS):
        row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        (name, sampler)
        for sampler in ("static", "generate")
        for name in MODELS
        if sampler == "generate" or name in STATIC
    ],
)
def test_samples_are_those_of_each_prompt_alone(name: str, sampler: str) -> None:
    model = built(name)
    together = drawn(model, PROMPTS, sampler)
    assert together == [drawn(model, [prompt], sampler)[0] for prompt in PROMPTS]
    with torch.no_grad():
        assert drawn(model, PROMPTS, sampler, temperature=0.0) == [greedy(built(name), prompt) for prompt in PROMPTS]
    assert (static.unsupported(model) is None) == (name in STATIC)
    apart = name in (*SCALED, "bart", "recurrent_gemma", "rwkv")
    assert apart == (vars(model).get("_noted") == {"samples_drawn_alone"})


def test_static_loop_is_not_used_where_a_cache_changes_positions() -> None:
    """RoBERTa counts positions from the tokens of each call, so it starts anew at every token after the prompt."""
    model = transformers.RobertaForCausalLM(
        _config("RobertaConfig", is_decoder=True, max_position_embeddings=64)
    ).eval()
    assert static.unsupported(model) is None
    with torch.no_grad():
        assert drawn(model, PROMPTS, "static", temperature=0.0) == [greedy(model, prompt) for prompt in PROMPTS]


def test_samples_below_a_threshold_share_a_batch() -> None:
    model, shapes = built("llama_longrope"), []
    probe_drawing(model)
    model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    drawn(model, [ids(2, 0), ids(5, 1)], "static", max_new_tokens=THRESHOLD - 4)
    assert shapes[0] == (2, 5) and {width for _, width in shapes[1:]} == {1} and not vars(model).get("_noted")
    shapes.clear()
    drawn(model, [ids(2, 0), ids(5, 1)], "static", max_new_tokens=THRESHOLD - 3)  # the longer prompt may cross it
    assert (1, 2) in shapes and (1, 5) in shapes and (1, 6) in shapes


# ---------------------------------------------------------------------------------------------------- through a run


def pairs() -> list[TokenizedPair]:
    texts: dict[str, Any] = {"prompt_text": "", "chosen_text": "", "rejected_text": ""}
    lengths = [(2, 3, 20), (3, 15, 4), (1, 2, 3), (4, 18, 16), (2, 5, 4), (6, 7, 5)]
    return [
        TokenizedPair(tuple(ids(p, i)), (*ids(c, 30 + i), EOS), (*ids(r, 60 + i), EOS), prompt_id=str(i), **texts)
        for i, (p, c, r) in enumerate(lengths)
    ]


@pytest.mark.parametrize("speed", [PLAIN, FAST], ids=["padded", "packed"])
@pytest.mark.parametrize("stored", [False, True], ids=["frozen", "precomputed"])
@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_loss_at_step_zero_is_log_two(name: str, stored: bool, speed: Speed, tmp_path: Path) -> None:
    logps: dict[str, Tensor] = {}
    if stored:
        store, model = LogpsStore(tmp_path / "store.sqlite", torch.float32), built(name)
        rows = [(pair.prompt_ids, completion) for pair in pairs() for completion in pair.completions]
        fill(store, model, rows, PAD, speed.resolve_for(model), batch_tokens=60)
        table = store.get([sequence_key(*row) for row in rows]).view(-1, 2)
        logps = {"train": table, "selection": table}
    reference = NoReference() if stored else FrozenReference()
    module = make_module(
        built(name),
        loss=DPOLoss(),
        reference=reference,
        reference_model=built(name),
        speed=speed,
        micro_batch_size=4,
    )
    data = make_data(pairs(), pairs(), reference_logps=logps, eval_batch_size=3)
    trainer = make_trainer(tmp_path, val_check_interval=1)
    trainer.validate(module, datamodule=data, verbose=False)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(math.log(2), abs=1e-6)


def test_run_notes_that_sequences_and_samples_are_apart() -> None:
    with collect_notes() as notes:
        model = built("phi3_longrope")
        completion_logits(model, sequences(ROWS[:2]))
        assert notes == {"notes/sequences_run_alone": 1}
        drawn(model, PROMPTS, "static")
        assert notes == {"notes/sequences_run_alone": 1, "notes/samples_drawn_alone": 1}
    with collect_notes() as notes:
        model = built("phi3_longrope")
        completion_logits(model, sequences([ROWS[0], ROWS[2]]))  # both below the threshold
        assert not notes


def test_judge_asks_questions_of_different_scales_apart() -> None:
    local = LocalModel(transformers.AutoModelForCausalLM, "none", "float32", False, "cpu", 2)
    rows = [[3] * length for length in (5, 20, 3, 30, 12, 13)]
    for name, batches in (("llama", [[2, 0], [4, 5], [1, 3]]), ("phi3_longrope", [[2, 0], [4], [5, 1], [3]])):
        local.__dict__["model"] = built(name)
        assert [list(batch) for batch in local.batches(rows)] == batches


@pytest.mark.parametrize("what", ["scores", "samples", "start"])
def test_sharded_model_that_needs_several_forward_passes_is_refused(what: str, tmp_path: Path) -> None:
    model = built("llama_longrope")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        completion_logits(model, sequences(ROWS[:1]))
        with pytest.raises(UserError, match=r"strategy=fsdp: a .*LlamaForCausalLM .* use strategy=ddp"):
            if what == "scores":
                completion_logits(model, sequences(ROWS))
            elif what == "samples":
                drawn(model, PROMPTS, "static")
            else:
                model.company = Company.NONE  # type: ignore[assignment]
                PLAIN.resolve_for(model)
    finally:
        torch.distributed.destroy_process_group()


# -------------------------------------------------------------------------------------------------------- the probe


class Widthwise(transformers.LlamaForCausalLM):
    """Divides its embeddings by the width of the batch from a number of tokens on, which no configuration tells."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        width = input_ids.shape[1] if kwargs.get("past_key_values") is None else 1
        scale = 1.0 if width <= self.config.chunk_size else 1 + 1 / width
        embedded = self.get_input_embeddings()(input_ids) * scale
        return super().forward(inputs_embeds=embedded, **kwargs)


class Crowded(transformers.LlamaForCausalLM):
    """Divides its embeddings by the number of rows, as experts drop tokens that exceed their capacity."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids) / len(input_ids)
        return super().forward(inputs_embeds=embedded, **kwargs)


@pytest.mark.parametrize("speed", [PLAIN, FAST], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("double", "chunk", "company"),
    [
        (Widthwise, 0, Company.EQUAL_LENGTHS),
        (Widthwise, 5, Company.EQUAL_LENGTHS),
        (Widthwise, 40, Company.EQUAL_LENGTHS),
        (Crowded, 0, Company.NONE),
    ],
)
def test_probe_finds_a_model_whose_sequences_change_each_other(
    double: Any, chunk: int, company: Company, speed: Speed
) -> None:
    torch.manual_seed(0)
    model = double(_config("LlamaConfig", chunk_size=chunk, tie_word_embeddings=False)).eval()
    rows = [*ROWS, (ids(3, 8), ids(chunk, 9))]
    resolved = speed.resolve_for(model)
    assert company_of(model) is company and not resolved.packing
    batch = resolved.arrange(sequences(rows))
    got = token_logps(resolved.logits(model, batch), completion_targets(batch))
    for part, row in zip(got.split(batch.completion_length.tolist()), rows, strict=True):
        single = sequences([row])
        expected = token_logps(completion_logits(model, single), completion_targets(single))
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)
    # Widthwise reads the width where a batch is not decoded yet, which is why only `generate` is asked about its cache.
    for sampler in ("static", "generate") if double is Crowded else ("generate",):
        assert drawn(model, PROMPTS, sampler) == [drawn(model, [prompt], sampler)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gemma3_sliding", "mixtral", "mamba", "mamba2"])
def test_probe_leaves_ordinary_models_alone(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = built(name).to(dtype)
        state = torch.get_rng_state()
        assert probe_company(model) is Company.ANY and probe_drawing(model) == Drawing()
        assert torch.equal(torch.get_rng_state(), state)


def test_probe_runs_once_for_a_model_and_is_short() -> None:
    model, tokens = built("gemma3_sliding"), []
    model.register_forward_pre_hook(lambda _, __, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True)
    PLAIN.resolve_for(model, model)
    assert len(tokens) == 8 and sum(tokens) < 250
    PLAIN.resolve_for(model)
    assert len(tokens) == 8


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, [16, 15, 7, 2]),
        ({"sliding_window": 30, "attention_chunk_size": None}, [38, 37, 29, 2]),
        ({"sliding_window": 4096}, [16, 15, 7, 2]),
        ({"nested": {"chunk_size": 20}, "use_conv_bias": True}, [28, 27, 19, 2]),
        ({"max_position_embeddings": 12}, [9, 8, 3, 2]),
        ({"rope_parameters": LONGROPE}, [9, 8, 3, 2]),
    ],
)
def test_probe_rows_exceed_the_lengths_of_a_configuration(changes: dict[str, Any], lengths: list[int]) -> None:
    rows = probe._rows_around_lengths(_config("LlamaConfig", **changes))
    assert [len(prompt) + len(completion) for prompt, completion in rows] == lengths


def test_thresholds_of_rotary_positions() -> None:
    thresholds = {name: rope_thresholds(MODELS[name]()) for name in MODELS}
    longrope, dynamic = [(False, THRESHOLD)], [(True, THRESHOLD)]
    scaled = dict(zip(SCALED, (longrope, dynamic, longrope, dynamic), strict=True))
    assert thresholds == {name: scaled.get(name, []) for name in MODELS}
    custom = SimpleNamespace(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=30)
    assert rope_thresholds(custom) == [(True, 30)] and rope_thresholds(None) == []


def test_probed_models_that_draw_otherwise_than_they_score() -> None:
    for name in ("bart", "recurrent_gemma"):
        assert probe_drawing(built(name)) == Drawing(Company.EQUAL_LENGTHS)
    assert probe_drawing(built("rwkv")) == Drawing(Company.NONE)
    assert probe_company(built("bart")) is probe_company(built("rwkv")) is Company.ANY


def test_padding_of_a_wide_batch_is_cut() -> None:
    model = built("phi3_longrope")
    wide = sequences(ROWS[:1], extra=20)
    got = token_logps(completion_logits(model, wide), completion_targets(wide))
    torch.testing.assert_close(got, alone("phi3_longrope", *ROWS[0]), rtol=0, atol=1e-5)
