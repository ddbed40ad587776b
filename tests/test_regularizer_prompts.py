"""Prompts of the sampled KL: those of a split, or of a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from spo.config.checks import problems
from spo.config.compose import compose
from spo.config.plan import plan
from spo.data import DataError, EvalPrompt, FileSource, PreparedPairs, Renderer, RowError, eval_prompts
from spo.data.prompt_file import PromptFile
from spo.data.splits import prepare
from spo.errors import ConfigProblems
from spo.models import FrozenReference
from spo.notes import collect_notes
from spo.ops import KL_ESTIMATORS
from spo.regularizers import GlobalKL, NoRegularizer
from spo.runs.identity import identity
from spo.stages.pairs import no_completer
from spo.stages.prepare import Prepared
from spo.stages.regularizer_prompts import regularizer_prompts
from spo.types import Sequences
from tests.data.tokenizers_built_here import ENDS_IN_EOS, build
from tests.helpers import (
    completion_logps,
    every_completion,
    frozen,
    make_data,
    make_module,
    make_trainer,
    random_pairs,
    tiny_llama,
)
from tests.test_regularizers import completion_logits

TEXTS = ["the cat", "on a mat", "the end"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


def global_kl(prompts: str = "train", **changes: Any) -> GlobalKL:
    settings = {"weight": 0.3, "refresh_every": 1, "num_samples": 6, "batch_size": 6, "max_new_tokens": 5}
    return GlobalKL(**settings | changes, estimator="tokenwise", prompts=prompts)


def write(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def renderer(**settings: Any) -> Renderer:
    return Renderer(build("adds_bos", ENDS_IN_EOS), 40, "drop_pair", **settings)


def prepared(pairs: PreparedPairs, renderer: Renderer, **prompts: list[EvalPrompt]) -> Prepared:
    found: Any = {"train": [], "selection": [], "test": [], **prompts}
    return Prepared(None, "", "", renderer.tokenizer, renderer, pairs, found, [], None)  # type: ignore[arg-type]


# --- samples -------------------------------------------------------------------------------------------------------


def regularized(folder: Path, regularizer: Any, prompts: Sequence[Sequence[int]]) -> Any:
    module = make_module(
        tiny_llama(0, scale=0.1),
        regularizer=regularizer,
        reference=FrozenReference(),
        reference_model=tiny_llama(1, scale=0.1),
        prompts=((1, 5), (1, 6, 7)),
    )
    module.prompts = dataclasses.replace(module.prompts, regularizer=prompts)
    make_trainer(folder).fit(module, datamodule=make_data(random_pairs(4, seed=1)))
    return module


def test_gradient_is_that_of_the_kl_on_the_given_prompts(tmp_path: Path) -> None:
    given = ((1, 9, 4), (1, 3))
    without = regularized(tmp_path, NoRegularizer(), given).gradients[0]
    module = regularized(tmp_path, global_kl(), given)
    held = module.buffer.held
    lengths = held.prompt_length.tolist()
    assert {tuple(row[:n].tolist()) for row, n in zip(held.input_ids, lengths, strict=True)} == set(given)
    policy, reference = tiny_llama(0, scale=0.1), frozen(tiny_llama(1, scale=0.1))
    batch = module.buffer.rows(0)
    p, q = (completion_logits(model, batch) for model in (policy, reference))
    (0.3 * KL_ESTIMATORS["tokenwise"](p, q, batch).mean()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(module.gradients[0][name] - without[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_without_prompts_of_its_own_the_training_prompts_are_sampled(tmp_path: Path) -> None:
    held = regularized(tmp_path, global_kl(), ()).buffer.held
    lengths = held.prompt_length.tolist()
    assert {tuple(row[:n].tolist()) for row, n in zip(held.input_ids, lengths, strict=True)} == {(1, 5), (1, 6, 7)}


def test_mean_over_samples_is_the_kl_on_the_given_prompt(tmp_path: Path) -> None:
    models = [tiny_llama(seed, vocab_size=3, eos_token_id=None, pad_token_id=None) for seed in (0, 1)]
    policy, reference = frozen(models[0]), frozen(models[1])

    def exact(prompt: Sequence[int]) -> float:
        """Return the KL by enumeration of all responses."""
        p, q = (completion_logps(model, every_completion(prompt, 3, 3)) for model in (policy, reference))
        return float((p.exp() * (p - q)).sum())

    module = make_module(policy, regularizer=global_kl(num_samples=2000, max_new_tokens=3), prompts=([1],), stop_ids=())
    module.prompts = dataclasses.replace(module.prompts, regularizer=[[2]])
    module._trainer = make_trainer(tmp_path)
    buffer = module.buffer
    assert buffer is not None
    buffer.refresh(policy, 0)
    batch: Sequences = buffer.held
    p, q = (completion_logits(model, batch) for model in (policy, reference))
    values = KL_ESTIMATORS["tokenwise"](p, q, batch)
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - exact([2])) < 4 * error < abs(exact([2]) - exact([1]))


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [TEXTS, CHATS], ids=["text", "chat"])
def test_prompts_of_a_file_have_the_tokens_of_the_pairs(tmp_path: Path, prompts: Sequence[Any]) -> None:
    ends: Any = (" a", " b") if prompts is TEXTS else ([{"role": "assistant", "content": c}] for c in "ab")
    chosen, rejected = ends
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt in prompts]
    source = FileSource(str(write(tmp_path / "pairs.jsonl", rows)), None, "stop")
    pairs = prepare(source.rows(no_completer), renderer(), 0, 0.0, 0.0, min_pairs=1)
    file = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in [*prompts, prompts[0]]])
    ids = PromptFile(str(file), None, "stop").token_ids(renderer())
    assert ids == [prompt.ids for prompt in eval_prompts(pairs.train, "train")] and len(ids) == 3


def test_columns_are_those_of_the_data(tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.jsonl", [{"question": "the cat"}])
    columns = {"prompt": "question", "chosen": "good"}
    assert PromptFile(str(file), columns, "stop").token_ids(renderer()) == [renderer().prompt_ids("the cat")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"promt": "the cat"}, "line 2: column 'prompt': missing; the row has promt"),
        ({"prompt": 3}, "line 2: column 'prompt': must be text or a list of messages"),
        ("{", "line 2: not valid JSON"),
    ],
)
def test_bad_row_stops_or_is_skipped(tmp_path: Path, row: Any, words: str) -> None:
    file = write(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}, row])
    with pytest.raises(RowError, match=words):
        PromptFile(str(file), None, "stop").token_ids(renderer())
    with collect_notes() as notes:
        assert len(PromptFile(str(file), None, "skip").token_ids(renderer())) == 1
    assert notes == {"notes/bad_prompts": 1}


def test_file_without_prompts_and_empty_prompt_are_explained(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(RowError, match="does not contain a row"):
        PromptFile(str(empty), None, "stop").token_ids(renderer())
    no_bos = Renderer(build("no_bos"), 40, "drop_pair")
    blank = write(tmp_path / "blank.jsonl", [{"prompt": ""}])
    with pytest.raises(RowError, match=r"line 1: column 'prompt': the prompt is empty"):
        PromptFile(str(blank), None, "stop").token_ids(no_bos)
    with pytest.raises(DataError, match="does not have a usable prompt"):
        PromptFile(str(blank), None, "skip").token_ids(no_bos)


# --- choice --------------------------------------------------------------------------------------------------------


def test_choice_gives_the_prompts(tmp_path: Path) -> None:
    pairs, made = PreparedPairs([], [], [], {}, []), renderer()
    selection = [EvalPrompt("id", "selection", (1, 2, 3), "x")]
    data = prepared(pairs, made, selection=selection)
    file = write(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}, {"prompt": "x" * 38}])
    cfg = compose(["data.max_length=40", "regularizer.max_new_tokens=5"])
    assert regularizer_prompts(cfg, data, global_kl()) == regularizer_prompts(cfg, data, NoRegularizer()) == ()
    assert regularizer_prompts(cfg, data, global_kl("selection")) == [(1, 2, 3)]
    with collect_notes() as notes:
        assert regularizer_prompts(cfg, data, global_kl(str(file))) == [made.prompt_ids("the cat")]
    assert notes == {"notes/long_regularizer_prompts": 1}
    others = [EvalPrompt("id", None, (1, 4), "y"), EvalPrompt("id2", None, (1,) * 36, "z")]
    unlabeled = dataclasses.replace(data, unlabeled=others)
    assert regularizer_prompts(cfg, unlabeled, global_kl("unlabeled")) == [(1, 4)]
    with pytest.raises(DataError, match=r"every prompt has a training pair in use; set data\.num_pairs"):
        regularizer_prompts(cfg, data, global_kl("unlabeled"))
    with pytest.raises(DataError, match="the selection split does not have a prompt; choose train"):
        regularizer_prompts(cfg, prepared(pairs, made), global_kl("selection"))
    long = write(tmp_path / "long.jsonl", [{"prompt": "x" * 38}])
    with pytest.raises(DataError, match=r"none of the 1 prompts leaves room for 5 sampled tokens within data\.max_len"):
        regularizer_prompts(cfg, data, global_kl(str(long)))


def test_content_of_the_file_is_part_of_the_identity(tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    cfg = compose([f"regularizer.prompts={file}"], run_dir=tmp_path / "run")
    before = identity(cfg)
    write(file, [{"prompt": "b"}])
    after = identity(cfg)
    assert before["regularizer_prompts"] != after["regularizer_prompts"] and before["digest"] != after["digest"]
    assert identity(compose(run_dir=tmp_path / "run"))["regularizer_prompts"] is None


def test_wrong_choices_are_explained(tmp_path: Path) -> None:
    choices = "choose train, selection, unlabeled, or a file with a column prompt"
    [problem] = problems(compose(["regularizer.prompts=trian"]))
    assert problem.startswith(f"regularizer.prompts=trian: {choices}")
    assert problem.endswith("did you mean train?")
    [problem] = problems(compose(["regularizer.prompts=3"]))  # a number is the name of a file too
    assert problem.startswith(f"regularizer.prompts=3: {choices}")
    [problem] = problems(compose(["data=enumerable", "model=tabular", "regularizer.prompts=selection"]))
    assert problem.endswith(
        "every split of an enumerable language has all of its prompts: choose regularizer.prompts=train"
    )
    [problem] = problems(compose(["regularizer.prompts=unlabeled"]))
    assert problem.startswith(
        "regularizer.prompts=unlabeled: every prompt of this data has training pairs; set data.num"
    )
    for given in ("data.num_pairs=100", "data.source.num_unlabeled=5"):
        assert problems(compose(["regularizer.prompts=unlabeled", given])) == []
    for overrides in (["method=dpo"], ["regularizer=local_kl"]):
        with pytest.raises(
            ConfigProblems, match=r"regularizer\.prompts=selection: unknown key;.* regularizer=global_kl has it"
        ):
            plan([*overrides, "regularizer.prompts=selection"])
