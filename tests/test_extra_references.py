"""Further references of a method: their models are checked, scored, and part of what identifies a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from spo import cli
from spo.config.checks import problems
from spo.config.compose import compose
from spo.config.nodes import extra_references
from spo.data.collate import collate
from spo.errors import UserError
from spo.losses import DPOLoss, SPOLoss, Term
from spo.models import AdapterOffReference, CachedReference, FrozenReference, Reference
from spo.notes import collect_notes
from spo.objective.pairs import score
from spo.records.digests import model_digest
from spo.runs.identity import differences, identity
from spo.stages import from_config
from spo.stages.evaluate import evaluate_command
from spo.stages.extra_references import load_extra_references
from spo.stages.from_config import resolve_values
from spo.stages.reference_model import initial_model
from spo.types import PairLogps
from tests.commands import TINY, job
from tests.helpers import (
    FAST,
    PAD,
    completion_logps,
    frozen,
    make_data,
    make_module,
    make_trainer,
    model_spec,
    random_pairs,
    save_model,
    tiny_llama,
    tiny_tokenizer,
)

PAIRS = random_pairs(8, seed=0)
HERE = "tests.test_extra_references"
MOVING = "tests.test_moving_references.TrustRegionReference"
LOSS = ["method=dpo", f"method.loss._target_={HERE}.SecondOpinionLoss"]


class SecondOpinionLoss(DPOLoss):
    """DPO whose reference is the second one."""

    extra_references = ("second",)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        chosen, rejected = pair.references["second"]
        return super().of_pairs(
            replace(pair, reference_chosen=chosen, reference_rejected=rejected), alpha=alpha, beta=beta
        )


class TextLoss(SecondOpinionLoss):
    extra_references = "second"  # type: ignore[assignment]


class TermLoss(SPOLoss):
    """SPO that reads the tokens of the reference, and not their sums."""

    terms: Mapping[str, Term] = {"tokens": Term(lambda scored: scored.per_completion(scored.reference_tokens), True)}


class StoredMoving(CachedReference):
    moves = True


class AdapterMoving(AdapterOffReference):
    moves = True

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


class ForgetfulMoving(Reference):
    moves = True


class Undeclared(FrozenReference):
    def after_step(self, policy: nn.Module, step: int) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("second"), scale=0.2)


# --- checks of the configuration -----------------------------------------------------------------------------------


def found(*overrides: str) -> str:
    return "\n".join(problems(compose(overrides)))


def test_model_of_a_further_reference_is_checked(folder: Path, tmp_path: Path) -> None:
    path = f"extra_references.second={folder}"
    assert found(*LOSS, path) == found(*LOSS, f"+{path}") == ""
    assert found(*LOSS) == "method=dpo needs a model for its reference 'second': set extra_references.second=PATH"
    assert found(path) == (
        "extra_references.second: method=spo does not read this reference (it reads none beside the main one)"
    )
    (misspelled,) = found(*LOSS, path, f"extra_references.secnd={folder}").splitlines()
    assert misspelled.endswith("(it reads second); did you mean second?")
    nowhere = tmp_path / "nowhere"
    assert found(*LOSS, f"extra_references.second={nowhere}").startswith(
        f"extra_references.second={nowhere}: there is no such folder"
    )
    assert "extra_references.second=null: must be a Hugging Face folder" in found(*LOSS, "extra_references.second=null")
    assert "extra_references=3: must be a mapping" in found(*LOSS, "extra_references=3")
    assert "write the tuple ('second',)" in found("method=dpo", f"method.loss._target_={HERE}.TextLoss")


def test_term_needs_a_reference_with_logits() -> None:
    loss = ("method=spo", f"method.loss._target_={HERE}.TermLoss")
    assert found(*loss, "reference=frozen") == ""
    for reference in ("none", "precomputed"):
        assert found(*loss, "regularizer=none", f"reference={reference}") == (
            f"method=spo has a term that reads logits of a reference model, but reference={reference} provides none: "
            "choose reference=frozen (or adapter_off with model=hf_lora)"
        )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reference=cached", f"reference._target_={HERE}.StoredMoving"], "StoredMoving moves, so log-probabilities"),
        (
            ["model=hf_lora", "model.path=FOLDER", f"reference._target_={HERE}.AdapterMoving"],
            "AdapterMoving moves, but its weights are those of the policy",
        ),
        ([f"reference._target_={HERE}.ForgetfulMoving"], "write state_dict and load_state_dict"),
        ([f"reference._target_={HERE}.Undeclared"], "write moves = True in Undeclared"),
        (
            ["strategy=fsdp", "trainer.devices=2", f"reference._target_={MOVING}"],
            "choose strategy=ddp",
        ),
        (["strategy=deepspeed", f"reference._target_={MOVING}"], "choose strategy=ddp"),
    ],
)
def test_moving_reference_that_cannot_work_is_refused(overrides: list[str], words: str, folder: Path) -> None:
    text = found("method=dpo", *[one.replace("FOLDER", str(folder)) for one in overrides])
    assert [line for line in text.splitlines() if line.startswith("reference=") and words in line], text


def test_moving_reference_passes_the_checks() -> None:
    assert found("method=dpo", f"reference._target_={MOVING}") == ""
    assert found("method=dpo", f"reference._target_={MOVING}", "strategy=ddp") == ""


# --- loading -------------------------------------------------------------------------------------------------------


def loaded(path: Path, max_length: int = 32, tokenizer: Any = None) -> dict[str, FrozenReference]:
    cfg = OmegaConf.create({"extra_references": {"second": str(path)}, "data": {"max_length": max_length}})
    prepared = SimpleNamespace(spec=model_spec(), tokenizer=tokenizer or tiny_tokenizer())
    return load_extra_references(cfg, prepared)  # type: ignore[arg-type]


def test_further_reference_is_the_model_of_its_folder(folder: Path) -> None:
    [(name, reference)] = loaded(folder).items()
    batch = collate(PAIRS, range(8), PAD)
    with reference.active(nn.Linear(1, 1)) as model:
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
        assert torch.equal(completion_logps(model, batch.sequences), completion_logps(_plain(folder), batch.sequences))
    assert name == "second" and reference.key == "extra_references.second"
    no_key = OmegaConf.create({"data": {}})
    assert load_extra_references(no_key, SimpleNamespace()) == {}  # type: ignore[arg-type]


def _plain(folder: Path) -> nn.Module:
    return model_spec().start(folder)


def test_further_reference_with_other_tokens_or_a_short_context_is_refused(folder: Path) -> None:
    other = AutoTokenizer.from_pretrained(folder)
    other.add_tokens(["w100"])
    with pytest.raises(
        UserError, match=r"^extra_references\.second=\S+ cannot be a reference: its vocabulary .* 'w100'"
    ):
        loaded(folder, tokenizer=other)
    with pytest.raises(UserError, match=r"data\.max_length=65 is longer than this model's context of 64 tokens"):
        loaded(folder, max_length=65)


# --- scoring -------------------------------------------------------------------------------------------------------


def test_stored_logps_of_the_main_reference_are_not_those_of_another() -> None:
    own, second = tiny_llama(0), FrozenReference()
    second.attach(lambda: frozen(tiny_llama(2)))
    batch = collate(PAIRS, range(8), PAD)
    stored = replace(batch, reference_logps=torch.zeros(len(batch.sequences), dtype=torch.float64))
    speed = replace(FAST, packing=False)
    scored = score(stored, SecondOpinionLoss(), own, Reference(), speed, {"second": second})
    torch.testing.assert_close(
        scored.extra_references["second"], completion_logps(tiny_llama(2), batch.sequences).detach()
    )
    assert scored.reference_logps is not None and not scored.reference_logps.any()


@pytest.mark.parametrize("packs", [True, False])
def test_second_reference_trains_like_a_main_one(packs: bool, tmp_path: Path) -> None:
    def weights(**parts: Any) -> Tensor:
        second = parts.pop("second", None)
        module = make_module(tiny_llama(0), reference=FrozenReference(), beta=1.0, lr=0.05, **parts)
        if second is not None:
            module.extra_references = {"second": FrozenReference()}
            module.extra_references["second"].attach(lambda: frozen(second))
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.fit(module, datamodule=make_data(PAIRS, PAIRS, max_steps=2))
        assert module.speed.packs == packs
        return torch.cat([p.detach().flatten() for p in module.policy.parameters()])

    first, second = tiny_llama(1), tiny_llama(2)
    if not packs:  # What one model does not support, none of them does.
        second.model.rotary_emb.register_forward_pre_hook(  # type: ignore[union-attr]
            _refuse_packed_rows, with_kwargs=True
        )
    expected = weights(loss=DPOLoss(), reference_model=second)
    actual = weights(loss=SecondOpinionLoss(), reference_model=first, second=second)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def _refuse_packed_rows(module: nn.Module, args: Any, kwargs: Any) -> None:
    positions = kwargs["position_ids"]
    if len(positions) == 1 and (positions.diff() < 0).any():
        raise ValueError("this model does not take packed rows")


# --- identity ------------------------------------------------------------------------------------------------------


def test_identity_has_further_references_only_where_there_are_some(folder: Path, tmp_path: Path) -> None:
    plain = identity(compose(["method=dpo"], run_dir=tmp_path))
    assert not any("extra_references" in key for key in [*plain, *plain["config"]])
    copy = save_model(tmp_path / "copy", scale=0.2)
    cfg = compose([*LOSS, f"extra_references.second={copy}"], run_dir=tmp_path / "run")
    before = identity(cfg)
    assert before["config"]["extra_references.second"] == str(copy)
    state = load_file(copy / "model.safetensors")
    save_file({name: weight * 2 for name, weight in state.items()}, copy / "model.safetensors", {"format": "pt"})
    after = identity(cfg)
    assert before["digest"] != after["digest"]
    assert differences(before, after) == ["the weights of the further references have changed"]


# --- the model before supervised fine-tuning -----------------------------------------------------------------------

DEFAULT = "+method.default_references={second: initial}"
GIVEN = "extra_references.second=initial"
SMALL = [f"model.initial.{one}" for one in ("num_stories=50", "vocab_size=300", "hidden_size=16")]


def test_default_reference_is_used_where_the_user_gives_nothing(folder: Path, tmp_path: Path) -> None:
    assert found(*LOSS, DEFAULT) == found(*LOSS, GIVEN) == ""
    assert extra_references(compose([*LOSS, DEFAULT])) == {"second": "initial"}
    own = compose([*LOSS, DEFAULT, f"extra_references.second={folder}"])
    assert extra_references(own) == {"second": str(folder)}
    assert found("method=dpo", DEFAULT) == (
        "method.default_references.second: method=dpo does not read this reference (it reads none beside the main one)"
        ": remove it with ~method.default_references.second"
    )
    assert "method.default_references.second=" in found(*LOSS, "+method.default_references={second: /nowhere}")
    by_default, by_hand, other, plain = (
        identity(compose([*LOSS, *words], run_dir=tmp_path))
        for words in ([DEFAULT], [GIVEN], [GIVEN, "data.seed=1"], [f"extra_references.second={folder}"])
    )
    assert by_default == by_hand and by_default["config"]["extra_references.second"] == "initial"
    assert len({one["digest"] for one in (by_default, other, plain)}) == 3


def test_identity_has_the_weights_of_the_initial_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "initial", scale=0.2)
    monkeypatch.chdir(tmp_path)  # A folder of that name is not meant by the word.
    cfg = compose([*LOSS, GIVEN, "data=jsonl", "data.path=a"], run_dir=tmp_path / "run")
    assert identity(cfg)["extra_references"] == {"second": None}
    cfg = compose([*LOSS, GIVEN, "model=hf", f"model.path={model}"], run_dir=tmp_path / "run")
    assert identity(cfg)["extra_references"] == {"second": model_digest(model)}


def test_initial_model_is_the_one_before_fine_tuning(folder: Path, tmp_path: Path) -> None:
    words = [f"paths.cache={tmp_path}", *SMALL]
    cfg = resolve_values(compose([*LOSS, *words]))
    with collect_notes() as notes:
        path = initial_model(cfg, spec := from_config.model_spec(cfg))
        assert not notes
        assert initial_model(cfg, spec) == path
        other = resolve_values(compose([*LOSS, *words, "data.seed=1"]))
        assert initial_model(other, from_config.model_spec(other)) != path
        assert spec.initial is not None
        fresh, _ = spec.initial()
        saved = spec.start(path).state_dict()
        for name, weight in fresh.state_dict().items():
            assert torch.equal(saved[name], weight)
        given = resolve_values(compose([*LOSS, "model=hf", f"model.path={folder}", "sft.max_steps=5"]))
        assert initial_model(given, from_config.model_spec(given)) == str(folder) and not notes
        given.sft.max_steps = 0
        initial_model(given, from_config.model_spec(given))
        assert notes == {"notes/initial_is_reference": 1}


@pytest.mark.slow
def test_command_trains_and_evaluates_against_the_initial_model(cache_dir: Path, tmp_path: Path) -> None:
    words = [*LOSS, "judge=none", "trainer.max_steps=2", "data.source.responses=grammar"]
    tuned = job(tmp_path / "tuned", cache_dir, TINY, *words, DEFAULT)
    fresh = job(tmp_path / "fresh", cache_dir, TINY, *words, GIVEN, "sft.max_steps=0")
    rows = [json.loads((tmp_path / one / "history.jsonl").read_text().splitlines()[0]) for one in ("tuned", "fresh")]
    assert rows[0]["val/loss"] != pytest.approx(0.6931, abs=1e-3)
    assert rows[1]["val/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert fresh["notes/initial_is_reference"] == 1 and "notes/initial_is_reference" not in tuned
    inputs = [json.loads((tmp_path / one / "provenance.json").read_text())["inputs"] for one in ("tuned", "fresh")]
    digests = [one["extra_references_sha256"]["second"] for one in inputs]
    assert digests[0] == digests[1] and inputs[0]["reference_sha256"] != digests[0]
    # An evaluation on data of another seed reads the initial model of the run.
    evaluate_command(tmp_path / "tuned", ["data.seed=1"], [HERE])
    folders = {model_digest(one.parent) for one in (cache_dir / "initial").glob("*/config.json")}
    assert folders == {digests[0]}


@pytest.mark.slow
def test_command_trains_and_records_further_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "first"
    command = ["train", *LOSS, "+debug=tiny", "judge=none", "logger=record", "trainer.max_steps=2"]
    plain = ["train", "method=dpo", *command[3:]]
    assert cli.main([*plain, f"hydra.run.dir={run}"]) == 0
    second = tmp_path / "second"
    capsys.readouterr()
    assert cli.main([*command, f"extra_references.second={run}/policy", f"hydra.run.dir={second}"]) == 0
    panel = capsys.readouterr().out
    assert re.search(r"more references\W+second\b", panel)
    inputs = json.loads((second / "provenance.json").read_text())["inputs"]
    assert list(inputs["extra_references_sha256"]) == ["second"]
    rows = [json.loads((one / "history.jsonl").read_text().splitlines()[0]) for one in (run, second)]
    assert rows[0]["val/loss"] == pytest.approx(0.6931, abs=1e-3) != rows[1]["val/loss"]
