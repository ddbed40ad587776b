"""Caches of the reference model and of sampled completions: which settings of the data share an entry."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from spo.config.checks import problems
from spo.config.compose import compose
from spo.data import Completion, EvalPrompt, FileSource, Renderer, Row, RowError
from spo.data.rows import Writer
from spo.data.splits import prepare
from spo.data.stories import StoriesSource
from spo.records.digests import digest, model_digest
from spo.runs.identity import identity
from spo.sampling import derive_seed, sample
from spo.stages import pairs, reference_model
from spo.stages.from_config import resolve_values
from spo.stages.prepare import all_prompts
from tests.data.tokenizers_built_here import build
from tests.helpers import BOS, EOS, PAD, model_spec, save_model, tiny_llama
from tests.test_stories import source, writer

# Another value of each argument of the source.
CHANGES: dict[str, Any] = {
    "seed": 1,
    "num_sft": 41,
    "num_prompts": 31,
    "selection_prompts": 7,
    "test_prompts": 8,
    "pairs_per_prompt": 3,
    "limit": 5,
    "labels": "hard",
    "label_noise": 0.1,
    "responses": "grammar",
    "temperature": 0.5,
    "heroes": ["Mia"],
    "problems": ["lost"],
    "num_unlabeled": 9,
}


@pytest.fixture(scope="module")
def default() -> DictConfig:
    return resolve_values(compose(run_dir="run"))


def changed(cfg: DictConfig, **changes: Any) -> DictConfig:
    """Return a copy with other values of keys, whose dots are written as two underscores."""
    cfg = copy.deepcopy(cfg)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def made_by(cfg: DictConfig) -> StoriesSource:
    return StoriesSource(**{str(name): value for name, value in cfg.data.source.items() if name != "_target_"})


# --- the reference model -------------------------------------------------------------------------------------------


def test_supervised_rows_depend_on_the_declared_arguments_alone() -> None:
    assert CHANGES.keys() == inspect.signature(StoriesSource).parameters.keys()
    before = source().sft_rows()
    read = {name for name, value in CHANGES.items() if source(**{name: value}).sft_rows() != before}
    assert read == set(StoriesSource.sft_reads)


@pytest.fixture
def sft_key(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function from a configuration to the digest of the key of its reference model."""
    monkeypatch.setattr(reference_model, "cached", lambda root, kind, key, build: digest(key))
    spec = model_spec(initial=lambda: None)
    return lambda cfg, of=None: reference_model.reference_model(cfg, spec, of or made_by(cfg))


def test_settings_that_supervised_training_does_not_read_share_its_result(
    default: DictConfig, sft_key: Callable[..., str]
) -> None:
    before = sft_key(default)
    for name, value in CHANGES.items():
        key = sft_key(changed(default, **{f"data__source__{name}": value}))
        assert (key == before) == (name not in StoriesSource.sft_reads), name
    for same in ({"data__num_pairs": 9}, {"data__limit": 20}, {"seed": 3}, {"regularizer__prompts": "selection"}):
        assert sft_key(changed(default, **same)) == before, same
    for other in ({"data__max_length": 100}, {"sft__lr": 0.1}, {"data__truncation": "trim_prompt"}, {"data__seed": 1}):
        assert sft_key(changed(default, **other)) != before, other


class OtherStories(StoriesSource):
    """A source that could read all of its arguments for supervised training."""


def other_stories(**arguments: Any) -> StoriesSource:
    return StoriesSource(**{**arguments, "num_sft": arguments["num_prompts"]})


@pytest.mark.parametrize("name", ["OtherStories", "other_stories"])
def test_sources_of_others_keep_the_whole_key(default: DictConfig, sft_key: Callable[..., str], name: str) -> None:
    cfg = changed(default, data__source___target_=f"{__name__}.{name}")
    of = OtherStories(**{**CHANGES, "temperature": 1.0}) if name == "OtherStories" else made_by(default)
    assert len({sft_key(changed(cfg, data__source__num_prompts=n), of) for n in (100, 200)}) == 2


def test_data_without_supervised_rows_keeps_the_whole_key(tmp_path: Path, sft_key: Callable[..., str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    cfg = resolve_values(compose(["data=jsonl", f"data.path={file}"], run_dir="run"))
    read = FileSource(str(file), None, "stop")
    assert sft_key(cfg, read) != sft_key(changed(cfg, data__source__columns={"prompt": "q"}), read)


# --- completions of the pairs --------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of prompts of each draw, which a fake writer answers."""
    calls: list[int] = []

    def complete(cfg: Any, of: Any, prompts: Sequence[str], n: int) -> list[Completion]:
        calls.append(len(prompts))
        return [completion for group in writer(list(prompts), n) for completion in group]

    monkeypatch.setattr(pairs, "_complete", complete)
    return calls


def rows(cfg: DictConfig, base: Path, **changes: Any) -> tuple[list[Row], dict[str, int]]:
    settings = {"num_prompts": 12, "selection_prompts": 5, "test_prompts": 6, **changes}
    cfg = changed(cfg, paths__cache=str(base.parent), **{f"data__source__{key}": of for key, of in settings.items()})
    made = made_by(cfg)
    renderer = Renderer(build("adds_bos"), 64, "drop_pair")
    return pairs.preference_rows(cfg, model_spec(path=str(base)), made, str(base), renderer)


def test_labels_share_completions(default: DictConfig, tmp_path: Path, drawn: list[int]) -> None:
    base = save_model(tmp_path / "base")
    soft, dropped = rows(default, base)
    assert drawn == [12, 5, 6] and len(soft) == 23 and dropped == {"unfinished": 0, "identical": 0}
    expected = source(num_prompts=12, selection_prompts=5, test_prompts=6, pairs_per_prompt=1)
    assert [row.completions for row in soft] == [row.completions for row in expected.rows(writer)]
    same: dict[str, Any]
    for same in ({"labels": "hard"}, {"label_noise": 0.3}, {"num_unlabeled": 7}):
        found, _ = rows(default, base, **same)
        assert [{*row.completions} for row in found] == [{*row.completions} for row in soft]
    assert rows(default, base) == (soft, dropped) and drawn == [12, 5, 6]
    # Training prompts of other heroes leave the completions of the other splits as they are.
    rows(default, base, heroes=["Mia"])
    assert drawn == [12, 5, 6, 12]
    other = save_model(tmp_path / "other", seed=1)
    change: dict[str, Any]
    for change in ({"temperature": 0.5}, {"pairs_per_prompt": 2}, {"responses": str(other)}):
        drawn.clear()
        rows(default, base, **change)
        assert drawn == [12, 5, 6], change
    # The completions follow the weights of the writer, not the name of its folder.
    drawn.clear()
    save_model(other, seed=2)
    rows(default, base, responses=str(other))
    assert drawn == [12, 5, 6]


def test_another_model_writes_the_responses(
    default: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = save_model(tmp_path / "base"), save_model(tmp_path / "other", seed=3)
    cfg = changed(default, data__source__responses=str(other), data__source__temperature=0.7, data__max_new_tokens=6)
    reads = Renderer(build("adds_bos"), 64, "drop_pair")
    of = pairs._writer(cfg, model_spec(path=str(base)), made_by(cfg), str(base), reads, Writer(str(other), 0.7))
    assert of.key["base"] == model_digest(other) and of.key["temperature"] == 0.7
    temperatures: list[float] = []
    monkeypatch.setattr(
        pairs,
        "sample",
        lambda *args, **options: temperatures.append(options["temperature"]) or sample(*args, **options),
    )
    group = pairs._complete(cfg, of, ["w4 w5"], 3)
    assert temperatures == [0.7]
    # The writer reads and writes with its own tokenizer.
    seeds = [derive_seed("pairs", 0, "w4 w5", i) for i in range(3)]
    model = tiny_llama(3, dtype=torch.float32)
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.7, "stop_ids": [EOS], "pad_token_id": PAD}
    expected = sample(model, [[BOS, 4, 5]] * 3, **settings, seeds=seeds, sampler="generate").completions()
    assert [one.text for one in group] == ["".join(f"w{i}" for i in ids if i > PAD + 2) for ids in expected]
    assert [one.finished for one in group] == [ids[-1] == EOS for ids in expected]


def test_identity_holds_the_weights_of_the_writer(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "writer")
    cfg = compose([f"data.source.responses={folder}"], run_dir=tmp_path / "run")
    before = identity(cfg)
    save_model(folder, seed=5)
    after = identity(cfg)
    assert before["config"] == after["config"] and before["responses"] != after["responses"]
    assert before["digest"] != after["digest"]
    assert "responses" not in identity(compose(run_dir=tmp_path / "run"))


# --- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_follow_the_pairs_in_use() -> None:
    renderer = Renderer(build("adds_bos"), 400, "drop_pair")
    few = source(num_prompts=30, pairs_per_prompt=1)
    everything, part = (
        prepare(few.rows(writer), renderer, 0, 0.1, 0.1, 1, num_pairs=n, subset_seed=4) for n in (None, 12)
    )
    prompts, unlabeled = all_prompts(few, everything, renderer)
    assert texts(prompts["train"]) == set(few.prompts("train")) and unlabeled == []
    narrow, unlabeled = all_prompts(few, part, renderer)
    assert texts(narrow["train"]) == {pair.prompt_text for pair in part.train} and len(narrow["train"]) == 12
    assert texts(unlabeled) == set(few.prompts("train")) - texts(narrow["train"])
    assert (narrow["selection"], narrow["test"]) == (prompts["selection"], prompts["test"])
    # Further prompts of the source come first.
    further = source(num_prompts=30, pairs_per_prompt=1, num_unlabeled=8)
    assert texts(all_prompts(further, part, renderer)[1]) == set(further.unlabeled_prompts())
    # A prompt with a pair in use and one left out is not without pairs.
    both = source(num_prompts=30, pairs_per_prompt=2)
    made = prepare(both.rows(writer), renderer, 0, 0.1, 0.1, 1, num_pairs=30, subset_seed=4)
    prompts, unlabeled = all_prompts(both, made, renderer)
    assert not texts(unlabeled) & texts(prompts["train"]) and len(unlabeled) + len(prompts["train"]) == 30


def texts(prompts: Sequence[EvalPrompt]) -> set[str]:
    return {prompt.text for prompt in prompts}


def test_wrong_values_are_explained() -> None:
    words = {
        "data.source.label_noise=0.6": "data.source.label_noise=0.6: must be at least 0 and at most 0.5",
        "data.source.labels=medium": "data.source.labels=medium: choose soft, hard or deterministic",
        "data.source.temperature=0": "data.source.temperature=0: must be a positive number",
        "data.source.problems=lost": "data.source.problems=lost: must be a list",
        "data.source.num_unlabeled=-1": "data.source.num_unlabeled=-1: must be at least 0",
    }
    found = problems(compose([*words]))
    assert len(found) == len(words)
    assert all(any(one.startswith(text) for one in found) for text in words.values()), found
    assert problems(compose(["data.num_pairs=0", "data.subset_seed=-1"])) == [
        "data.num_pairs=0: must be at least 1, or null",
        "data.subset_seed=-1: must be at least 0 and below 4294967296",
    ]
    # These are found when the source is built.
    for override, text in {
        "data.source.heroes=[Bob]": "data.source.heroes: there is no Bob; the heroes of the story world are Mia,",
        "data.source.responses=gramar": "data.source.responses=gramar: choose reference, grammar, or the Hugging Face",
    }.items():
        [problem] = problems(compose([override]))
        assert problem.startswith(text)
    [problem] = problems(compose(["data=enumerable", "model=tabular", "data.num_pairs=5"]))
    assert "set data.source.num_pairs, the number of pairs of each prompt" in problem


def test_remarks_on_rows_survive_the_cache() -> None:
    before, after = FileSource("x.jsonl", None, "skip"), FileSource("x.jsonl", None, "skip")
    before.findings.add("empty_prompts", "x.jsonl:3", 2)
    before.bad_rows.append(RowError("x.jsonl:7", "must be text", "chosen"))
    before.dropped_pairs["tied"] = 4
    before.dropped_responses["empty"] = 1
    remarks = json.loads(json.dumps(pairs._remarks(before)))
    assert pairs._restore(after, remarks) == {"tied": 4}
    assert vars(after.findings) == vars(before.findings)
    assert [str(one) for one in after.bad_rows] == [str(one) for one in before.bad_rows]
    assert after.dropped_responses == before.dropped_responses
