"""Several tokens that end a completion: sampling, metrics, caches, and the generation config of a model folder."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlavaConfig

from spo.data import DataError, EvalPrompt, Renderer, TokenizedPair
from spo.data.collate import collate
from spo.data.enumerable import language_tokenizer
from spo.errors import UserError
from spo.evaluation import EvaluationSettings, completions
from spo.evaluation.cached_completions import cached_completions
from spo.exact import World
from spo.models import NoReference
from spo.models.generation import note_stops_in_text, read_stop_ids
from spo.models.saving import save_policy
from spo.notes import collect_notes
from spo.objective import Prompts, ScoredBatch
from spo.ops.logps import DeferredLogits
from spo.sampling import SampleBuffer, contents, derive_seed, generate, is_finished, sample, static, uncached
from spo.sampling.draw import uniform_numbers
from spo.types import Sequences
from spo.watch import Probe, ProbeSettings, completion_health
from tests.commands import TINY, job, rows
from tests.helpers import (
    BOS,
    EOS,
    PAD,
    PLAIN,
    VOCAB,
    model_spec,
    save_model,
    sequences,
    tiny_llama,
    tiny_tokenizer,
)

NEVER = (VOCAB + 1,)
PROMPTS = [[BOS, 3 + i % 7, *range(3, 3 + i % 3)] for i in range(40)]
SEEDS = [derive_seed("stops", i) for i in range(len(PROMPTS))]


def draw(model: Any, stop_ids: tuple[int, ...], sampler: Any, temperature: float = 1.0) -> list[list[int]]:
    drawn = sample(
        model,
        PROMPTS,
        max_new_tokens=12,
        temperature=temperature,
        stop_ids=stop_ids,
        pad_token_id=PAD,
        seeds=SEEDS,
        sampler=sampler,
    )
    return drawn.completions()


def cut(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """Return the tokens up to the first that ends a completion, which is part of it."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stop_ids), tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("stop_ids", [(6,), (6, EOS), (6, 17, EOS), (PAD, 6), tuple(range(3, 23, 2))])
def test_both_samplers_stop_at_the_first_of_the_stop_tokens(stop_ids: tuple[int, ...], temperature: float) -> None:
    model = tiny_llama(scale=0.3)
    free = draw(model, NEVER, "static", temperature)
    assert draw(model, NEVER, "generate", temperature) == free  # probes the model, which takes forward passes
    forwards: list[None] = []
    model.register_forward_hook(lambda *_: forwards.append(None))
    expected = [cut(tokens, stop_ids) for tokens in free]
    assert {len(tokens) for tokens in free} == {12} and len({*map(len, expected)}) > 1
    for sampler in ("static", "generate"):
        forwards.clear()
        assert draw(model, stop_ids, sampler, temperature) == expected
        assert len(forwards) == max(map(len, expected))  # no step after the last row has stopped


def test_rows_of_every_decoding_loop_are_padded_after_the_stop_token() -> None:
    model, stop_ids = tiny_llama(scale=0.3), (6, 17, EOS)
    prompts = torch.tensor([[BOS, token] for token in range(3, 19)])
    numbers = uniform_numbers(SEEDS[:16], 12, torch.device("cpu"))
    shared: dict[str, Any] = {"temperature": 1.0, "pad_token_id": PAD}
    loops = (static.decode, generate.generate_tokens, uncached.decode)
    for decode in loops:
        free = decode(model, prompts, torch.ones_like(prompts), numbers, stop_ids=NEVER, **shared).tolist()
        drawn = decode(model, prompts, torch.ones_like(prompts), numbers, stop_ids=stop_ids, **shared).tolist()
        expected = [cut(tokens, stop_ids) for tokens in free]
        assert drawn == [tokens + [PAD] * (len(row) - len(tokens)) for tokens, row in zip(expected, drawn, strict=True)]


def test_a_completion_is_finished_by_its_last_token_alone() -> None:
    drawn = sequences([([9], [3, 4, EOS]), ([9, EOS], [3, 4]), ([EOS], [3, 9]), ([3], [EOS])])
    assert is_finished(drawn, (EOS, 9)).tolist() == [True, False, True, True]
    assert is_finished(drawn, (EOS,)).tolist() == [True, False, False, True]
    assert contents(drawn, (EOS, 9)) == [[3, 4], [3, 4], [3], []]
    assert contents(drawn, (EOS,)) == [[3, 4], [3, 4], [3, 9], []]


@pytest.mark.parametrize("deferred", [False, True])
def test_p_eos_is_the_probability_of_all_stop_tokens(deferred: bool) -> None:
    ends = [((3, 4, EOS), (5, EOS)), ((3, 9), (4, 4, EOS)), ((5, 5, 5), (6, 9))]  # the last one was cut
    pairs = [TokenizedPair((BOS, 8), *pair, "", "", "", str(i)) for i, pair in enumerate(ends)]
    batch = collate(pairs, range(3), PAD)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(int(batch.sequences.completion_length.sum()), 6, generator=generator, dtype=torch.float64)
    head = torch.randn(6, VOCAB, generator=generator, dtype=torch.float64)
    logits = states @ head
    scored = ScoredBatch(batch, DeferredLogits(states, lambda rows: rows @ head, 4) if deferred else logits)
    last = batch.sequences.completion_length.cumsum(0) - 1
    assert batch.completions is not None
    probability = logits.softmax(-1)[last[batch.completions[0]]]  # where the chosen completions end
    for stop_ids, ended in (((EOS,), [0]), ((EOS, 9), [0, 1]), ((PAD, EOS, 9), [0, 1]), ((EOS, 5), [0, 2])):
        found = completion_health(scored, stop_ids)["p_eos"]
        expected = torch.full_like(found, torch.nan)
        expected[ended] = probability[ended][:, list(stop_ids)].sum(-1)
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("labels", [None, [1.0, 0.0, 1.0]])
def test_health_follows_from_shapes_alone(labels: list[float] | None, deferred: bool) -> None:
    """Fake tensors do not have values. Code that waits for a value of the device fails with them."""
    pairs = [TokenizedPair((BOS, 8), (3, EOS), (5, 4, EOS), "", "", "", str(i)) for i in range(3)]
    batch = collate(pairs, range(3), PAD)
    batch = replace(batch, label=None if labels is None else torch.tensor(labels))
    states, head = torch.randn(int(batch.sequences.completion_length.sum()), 6), torch.randn(6, VOCAB)
    logits = DeferredLogits(states, lambda rows: rows @ head, 4) if deferred else states @ head
    real = completion_health(ScoredBatch(batch, logits), (EOS, 9))
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = completion_health(ScoredBatch(batch, logits), (EOS, 9))
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in real.items()}


def test_probe_counts_any_stop_token_as_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Sequences] = []

    def recorded(*args: Any, **settings: Any) -> Sequences:
        drawn.append(sample(*args, **settings))
        return drawn[-1]

    monkeypatch.setattr("spo.watch.sample", recorded)
    shared = {"speed": PLAIN, "seed": 0, "global_rank": 0, "world_size": 1, "device": torch.device("cpu")}
    prompts = Prompts(PROMPTS, [], (5, 9, EOS), PAD)
    run: Any = SimpleNamespace(policy=tiny_llama(1, scale=0.2), reference=NoReference(), prompts=prompts, **shared)
    found = Probe(run, ProbeSettings(len(PROMPTS), 6)).measure(PROMPTS)
    [samples] = map(Sequences.completions, drawn)
    assert found["finished"] == pytest.approx(sum(ids[-1] in (5, 9, EOS) for ids in samples) / len(PROMPTS))
    assert 0.3 < found["finished"] < 0.9 and not any({5, 9, EOS} & {*ids[:-1]} for ids in samples)


# ----------------------------------------------------------------------------------------------------------- caches


def test_buffer_of_other_stop_tokens_is_drawn_again(caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"refresh_every": 9, "num_samples": 8, "batch_size": 2, "max_new_tokens": 6, "seed": 0}

    def buffer(*stop_ids: int) -> SampleBuffer:
        return SampleBuffer(PROMPTS, stop_ids=stop_ids, pad_token_id=PAD, sampler="static", **settings)

    model, first = tiny_llama(scale=0.3), buffer(5, EOS)
    first.refresh(model, 3)
    state = first.state_dict()
    same, other, older = buffer(5, EOS), buffer(5, 6, EOS), buffer(EOS)
    same.load_state_dict(state)
    assert not same.is_stale(4) and torch.equal(same.held.input_ids, first.held.input_ids) and not caplog.text
    other.load_state_dict(state)
    assert other.is_stale(4) and "drawing new samples" in caplog.text
    older.load_state_dict({key: value for key, value in state.items() if key != "stop_ids"})  # of version 0.1.0
    assert not older.is_stale(4)


def test_cached_completions_keep_log_probs_that_json_does_not_have(tmp_path: Path) -> None:
    prompts = [EvalPrompt("a", "test", (BOS,), "a")]
    settings: Any = SimpleNamespace(samples_per_prompt=1, max_new_tokens=8, temperature=1.0, seed=0)
    draws = completions.Draws(["x"], [1], [-math.inf], [0.5], [-math.inf], [math.inf])
    for _ in range(2):
        found = cached_completions(tmp_path, prompts, (), {"policy": "m"}, "policy", settings, lambda: draws)
        assert found == draws
    [file] = tmp_path.glob("draws/*/draws.json")
    json.loads(file.read_text(), parse_constant=pytest.fail)


def test_cached_completions_depend_on_the_stop_tokens(tmp_path: Path) -> None:
    model, prompts = tiny_llama(scale=0.3, dtype=torch.float32), [EvalPrompt("p", "test", (BOS, 4), "w4")]
    limits = {"num_prompts": 1, "selection_prompts": 0, "samples_per_prompt": 20, "max_new_tokens": 8, "batch_size": 20}
    others = {"confidence": 0.9, "bootstrap_samples": 1, "self_bleu_samples": 0, "seed": 0, "against": ["reference"]}
    settings = EvaluationSettings(temperature=1.0, **limits, **others)  # type: ignore[arg-type]

    def lengths(*stop_ids: int) -> list[int]:
        def drawn() -> completions.Draws:
            return completions.draw(model, "policy", prompts, settings, PLAIN, stop_ids, PAD, tokenizer_text)

        return cached_completions(tmp_path, prompts, stop_ids, {"policy": "model"}, "policy", settings, drawn).tokens

    few, more = lengths(EOS), lengths(5, 6, 7, EOS)
    assert sum(more) < sum(few) and lengths(EOS) == few


def tokenizer_text(ids: Any) -> str:
    """Return the words of all tokens, special ones too."""
    return " ".join(f"w{token}" for token in ids)


def test_texts_of_samples_do_not_contain_the_token_that_ends_them() -> None:
    prompts = [EvalPrompt(str(i), "test", tuple(ids), "") for i, ids in enumerate(PROMPTS)]
    settings = EvaluationSettings(40, 0, 1, 6, 1.0, 40, ["reference"], 0.9, 1, 0, 0)
    model = tiny_llama(scale=0.2)
    found = completions.draw(model, "policy", prompts, settings, PLAIN, (5, 9, EOS), PAD, tokenizer_text)
    words = [[int(word[1:]) for word in text.split()] for text in found.texts]
    assert not any({5, 9, EOS} & {*ids} for ids in words)
    finished = [tokens - len(ids) for tokens, ids in zip(found.tokens, words, strict=True)]
    assert {*finished} == {0, 1} and all(ended or len(ids) == 6 for ended, ids in zip(finished, words, strict=True))


def test_enumerable_language_needs_one_token_that_ends_a_response() -> None:
    renderer = Renderer(language_tokenizer(3), 5, "trim_completion", allow_empty=True, stop_ids=(0, 2))
    with pytest.raises(DataError, match="needs one token that ends a response, and this model has 0, 2"):
        World.of(SimpleNamespace(prompts=(), responses=()), renderer, [])  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- generation configs of folders


def model_folder(folder: Path, config: Any = None, generation: Any = None) -> Path:
    folder.mkdir()
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": 3}, {"eos_token_id": [9, 7, 9]}, (7, 9)),
        ({"eos_token_id": 3}, {"eos_token_id": None}, ()),
        ({"eos_token_id": 3}, {"do_sample": True, "temperature": 0.6}, ()),
        ({"eos_token_id": [3, 0]}, None, (0, 3)),
        ({"eos_token_id": None}, None, ()),
        ({"text_config": {"eos_token_id": [5, 3]}}, None, (3, 5)),
        ({"eos_token_id": 4, "text_config": {"eos_token_id": 5}}, None, (4,)),
        ({}, {"eos_token_id": [7, None]}, (7,)),
        ({}, {"eos_token_id": [], "do_sample": False, "top_p": 0.5, "num_return_sequences": 9}, ()),
    ],
)
def test_stop_tokens_of_a_folder(config: Any, generation: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    with collect_notes() as notes:
        assert read_stop_ids(model_folder(tmp_path / "model", config, generation), 10) == expected
    assert not notes


@pytest.mark.parametrize("given", [[7, 10], [7, -1], [7, "</s>"], [True, 7], [7, 2.0]])
def test_stop_token_beyond_the_vocabulary_is_noted(given: Any, tmp_path: Path, caplog: Any) -> None:
    folder = model_folder(tmp_path / "model", {}, {"eos_token_id": given})
    with collect_notes() as notes:
        assert read_stop_ids(folder, 10) == (7,)
    assert notes == {"notes/unknown_stop_ids": 1} and "not one of its 10 tokens" in caplog.text


def test_stop_token_that_is_a_word_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<end>"])  # as a word that is never split, which is not a special token
    with collect_notes() as notes:
        note_stops_in_text("chat", (EOS, VOCAB), tokenizer)
        assert not notes
        note_stops_in_text("chat", (EOS, 5, VOCAB), tokenizer)
    assert notes == {"notes/stop_ids_in_text": 1} and "completions end at 5 ('w5')" in caplog.text


@pytest.mark.parametrize("content", ['{"eos_token_id": [7', "[]"])
def test_damaged_generation_config_is_an_error(content: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", {"eos_token_id": 3}, content)
    with pytest.raises(UserError, match=r"generation_config.json is (damaged|not a JSON object)"):
        read_stop_ids(folder, 10)


def test_stop_tokens_of_a_model_agree_with_transformers(tmp_path: Path) -> None:
    # The text model of a composite model has the ids.
    llava = LlavaConfig(text_config={"model_type": "llama", "vocab_size": 40, "eos_token_id": [8, 6]})
    llava.save_pretrained(tmp_path / "llava")
    assert model_spec().stop_ids(tmp_path / "llava") == (6, 8)
    folder = save_model(tmp_path / "model", eos_token_id=[5, EOS])
    assert model_spec().stop_ids(folder) == (EOS, 5)
    (folder / "generation_config.json").unlink()
    assert model_spec().stop_ids(folder) == (EOS, 5)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert sorted(loaded.generation_config.eos_token_id) == [EOS, 5]


SAMPLING = {"do_sample": True, "top_k": 64, "top_p": 0.95, "bos_token_id": BOS}
REJECTED = {"do_sample": False, "temperature": 0.3, "top_k": 7}
"""Settings that transformers warns of, and does not save once the config is changed."""


@pytest.mark.parametrize("defaults", [SAMPLING, REJECTED], ids=["valid", "rejected"])
@pytest.mark.parametrize("stop_ids", [(17,), (EOS, 6, 17)])
def test_saved_policy_generates_up_to_the_stop_tokens(
    stop_ids: tuple[int, ...], defaults: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", scale=0.3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 9], **defaults}))
    policy = model_spec().policy(folder, seed=0)
    policy.generation_config.max_length = 40  # type: ignore[union-attr]  # transformers rejects a config that was changed
    save_policy(policy, tiny_tokenizer(), tmp_path / "policy", stop_ids=stop_ids)
    saved = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == (17 if stop_ids == (17,) else [EOS, 6, 17])
    kept = {**defaults, "max_length": 40, "pad_token_id": PAD}
    assert kept.items() <= {"do_sample": False, **saved}.items()
    assert policy.generation_config.eos_token_id == [EOS, 9]  # type: ignore[union-attr]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ends = set()
    for prompt, free in zip(PROMPTS[:8], draw(policy, NEVER, "static", temperature=0.0), strict=False):
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
        assert ids == cut(free, stop_ids)
        ends.add(ids[-1])
    assert ends & {*stop_ids} and AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "</s>"


def test_reference_model_keeps_its_own_stop_tokens(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", eos_token_id=[5, EOS])
    save_policy(model_spec().base(folder), tiny_tokenizer(), tmp_path / "sft")
    assert GenerationConfig.from_pretrained(tmp_path / "sft").eos_token_id == [5, EOS]


CHAT = (
    "{% for message in messages %}{{ 'w20 ' if message.role == 'user' else 'w21 ' }}{{ message.content }}"
    "{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w21 ' }}{% endif %}"
)


@pytest.mark.slow
def test_samples_of_a_chat_model_end_with_the_turn(tmp_path: Path) -> None:
    """The end of a turn is not the tokenizer's EOS, and both end a generation."""
    end, limit = VOCAB, 24
    folder = save_model(tmp_path / "chat", scale=0.2, vocab_size=VOCAB + 1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, end], **SAMPLING}))

    def turn(role: str, *words: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(f"w{word}" for word in words)}]

    pairs = [(turn("user", i, 6), turn("assistant", 5, i), turn("assistant", i, 4)) for i in range(7, 20)] * 2
    data = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    words = ["method=spo", "model=hf", f"model.path={folder}", "data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}"]
    words += [TINY, "judge=none", f"data.max_new_tokens={limit}", "data.max_length=60"]
    words += ["evaluation.num_prompts=5", "evaluation.samples_per_prompt=8"]
    metrics = job(tmp_path / "run", tmp_path / "cache", *words)

    drawn = rows(tmp_path / "run" / "samples.jsonl")
    texts = [(row["completion"], row["tokens"]) for row in drawn]
    texts += [(row["reference_completion"], row["reference_tokens"]) for row in drawn]
    assert not any("<" in text for text, _ in texts)
    # A draw ends a turn or the text with a probability of about 2 in 24, so few are as long as the limit.
    assert sum(tokens < limit for _, tokens in texts) > 0.6 * len(texts)
    assert all(text.count("w") <= tokens - (tokens < limit) for text, tokens in texts)
    assert metrics["eval/length"] == pytest.approx(sum(row["tokens"] for row in drawn) / len(drawn))
    assert metrics["val/finished"] > 0 and 0.02 < metrics["val/p_eos"] < 0.5

    policy = tmp_path / "run" / "policy"
    saved = json.loads((policy / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [EOS, end] and SAMPLING.items() <= saved.items()
    assert AutoTokenizer.from_pretrained(policy).eos_token_id == EOS
    model: Any = AutoModelForCausalLM.from_pretrained(policy)
    prompt = torch.tensor([[BOS, 20, 7, 6, end, 21]] * 64)
    torch.manual_seed(0)
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit)[:, 6:].tolist()
    assert any(end in ids for ids in generated)
    for ids in generated:
        stopped = cut(ids, (EOS, end))
        assert ids == stopped + [PAD] * (len(ids) - len(stopped))
