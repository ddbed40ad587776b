"""Extrapolation between models: values by hand in float64, copied weights, and rejected models."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from spo import cli
from spo.config.compose import compose
from spo.errors import UserError
from spo.models import extrapolation
from spo.models.extrapolation import BUFFER_KEYS, extrapolate_weights, extrapolated
from spo.records.policy import write_policy_digests
from spo.runs.claim import claim
from spo.stages import factor_search
from spo.stages.extrapolate import evaluated_from
from spo.stages.extrapolation_plan import plan_extrapolation
from spo.stages.factor_search import DOUBLING_FACTORS, Candidate, best_candidate, search_factor
from tests.commands import TINY, enter, job, numbers
from tests.helpers import VOCAB, save_model
from tests.test_imports import LIBRARIES, run_and_list_modules

MASK = "model.layers.0.self_attn.rotary_emb.inv_freq"


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all files of a model folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Edit the tensors of a folder of one file."""
    tensors = weights(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def settings(folder: Path, **values: object) -> None:
    """Set keys of ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return save_model(tmp_path / "first", seed=1)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return save_model(tmp_path / "second", seed=2)


@pytest.mark.parametrize("factor", [0.5, -0.5, 3.0, -1.0, 0.0])
def test_every_weight_goes_on_in_its_direction(factor: float, first: Path, second: Path, tmp_path: Path) -> None:
    norm = "model.norm.weight"
    change(first, lambda tensors: tensors[norm].fill_(-1.0))
    change(second, lambda tensors: tensors[norm].fill_(-0.0))  # A sum with 0 would lose the sign.
    extrapolate_weights(first, second, factor, tmp_path / "out")
    start, end, found = weights(first), weights(second), weights(tmp_path / "out")
    assert found.keys() == start.keys() == end.keys()
    for name, value in found.items():
        by_hand = (1 + factor) * end[name].double() - factor * start[name].double()
        torch.testing.assert_close(value.double(), by_hand, rtol=1e-6, atol=1e-6)
        assert (factor != -1 or value.equal(start[name])) and (factor != 0 or value.equal(end[name]))
    names = {file.name for file in second.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names - ({"model.safetensors"} if factor else set()):
        assert (tmp_path / "out" / name).read_bytes() == (second / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


def test_extrapolations_of_one_line_agree(first: Path, second: Path, tmp_path: Path) -> None:
    for name, factor in (("a", 1.0), ("b", 2.0), ("c", 0.5)):
        extrapolate_weights(first, second, factor, tmp_path / name)
    a, b, c, end = (weights(tmp_path / name) for name in ("a", "b", "c", "second"))
    for name in end:
        torch.testing.assert_close(b[name] - end[name], 2 * (a[name] - end[name]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(c[name], (a[name] + end[name]) / 2, rtol=1e-5, atol=1e-5)
    # From the second model through the first one, the point that is reached lies on the other side.
    extrapolate_weights(tmp_path / "a", second, 1.0, tmp_path / "back")
    for name, value in weights(tmp_path / "back").items():
        torch.testing.assert_close(value, weights(first)[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sum_is_rounded_once_to_the_dtype_of_the_second_model(dtype: torch.dtype) -> None:
    start, end = (torch.randn(2000, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found = extrapolated(start, end.to(dtype), 0.3)
    assert found.dtype == dtype
    by_hand = (end.to(dtype).double() * 1.3 - start.double() * 0.3).float()
    assert (found != by_hand.to(dtype)).float().mean() < 0.01  # Sums beside the middle of two numbers
    in_half = end.to(dtype) + 0.3 * (end.to(dtype) - start.to(dtype))
    assert (in_half != by_hand.to(dtype)).float().mean() > 0.1


def test_float64_stays_exact_and_equal_values_stay() -> None:
    start, end = torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([1 / 7], dtype=torch.float64)
    assert extrapolated(start, end, 0.1).item() == 1 / 7 + 0.1 * (1 / 7 - 1 / 3)
    same = torch.tensor([-0.0, math.inf, -math.inf, 1e38])
    assert extrapolated(same, same, 7.0).view(torch.int32).equal(same.view(torch.int32))


def test_dtype_and_buffers_are_those_of_the_second_model(first: Path, second: Path, tmp_path: Path) -> None:
    change(first, lambda tensors: tensors.update({MASK: torch.ones(3), "steps": torch.tensor([1])}))
    change(second, lambda tensors: tensors.update({MASK: torch.zeros(3), "steps": torch.tensor([2])}))
    name = "model.norm.weight"
    change(second, lambda tensors: tensors.update({name: tensors[name].bfloat16() + 1}))
    extrapolate_weights(first, second, 0.5, tmp_path / "out")
    found, start, end = weights(tmp_path / "out"), weights(first), weights(second)
    assert found[MASK].equal(end[MASK]) and found["steps"].equal(end["steps"]) and BUFFER_KEYS.search(MASK)
    assert found[name].equal((1.5 * end[name].float() - 0.5 * start[name]).bfloat16())


def test_sharded_models_keep_their_files(first: Path, second: Path, tmp_path: Path) -> None:
    extrapolate_weights(first, second, 0.5, tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    for folder, size in ((first, "3KB"), (second, "5KB")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size=size)
    assert len(list(first.glob("*.safetensors"))) > len(files := sorted(second.glob("*.safetensors"))) > 1
    extrapolate_weights(first, second, 0.5, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == [file.name for file in files]
    assert all(load_file(tmp_path / "out" / file.name).keys() == load_file(file).keys() for file in files)
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(loaded[name].equal(expected[name]) for name in expected)


def test_tied_head_is_extrapolated_once(tmp_path: Path) -> None:
    first, second = (save_model(tmp_path / name, seed=s, tie_word_embeddings=True) for name, s in (("a", 1), ("b", 2)))
    extrapolate_weights(first, second, 0.5, tmp_path / "out")
    expected = weights(tmp_path / "out")
    assert "lm_head.weight" not in expected

    def repeat(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(first, repeat)  # the first file alone
    extrapolate_weights(first, second, 0.5, tmp_path / "of first")
    assert weights(tmp_path / "of first").keys() == expected.keys()
    change(second, repeat)  # both
    change(first, lambda tensors: tensors.pop("lm_head.weight"))  # the second file alone
    extrapolate_weights(first, second, 0.5, tmp_path / "of second")
    found = weights(tmp_path / "of second")
    assert found["lm_head.weight"].equal(found["model.embed_tokens.weight"])
    assert found["lm_head.weight"].equal(expected["model.embed_tokens.weight"])
    change(first, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    change(second, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"the latter has a head of its own \(lm_head.weight\)"):
        extrapolate_weights(first, second, 0.5, tmp_path / "none")
    settings(first, tie_word_embeddings=False)
    change(first, lambda tensors: tensors.pop("lm_head.weight"))
    change(second, repeat)
    with pytest.raises(UserError, match=r"1 tensor is in the former alone \(lm_head.weight\)"):
        extrapolate_weights(first, second, 0.5, tmp_path / "none")


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        value: Tensor = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[1, 4, 5, 6]])).logits
    return value


def test_head_of_one_model_may_be_tied_where_the_result_can_hold_it(tmp_path: Path) -> None:
    tied = save_model(tmp_path / "tied", seed=1, tie_word_embeddings=True)
    untied = save_model(tmp_path / "untied", seed=2)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    extrapolate_weights(tied, untied, 0.5, tmp_path / "out")
    found, start, end = weights(tmp_path / "out"), weights(tied), weights(untied)
    torch.testing.assert_close(found[head], 1.5 * end[head] - 0.5 * start[embedding])
    torch.testing.assert_close(found[embedding], 1.5 * end[embedding] - 0.5 * start[embedding])
    extrapolate_weights(tied, untied, -1.0, tmp_path / "back")
    assert logits(tmp_path / "back").equal(logits(tied))
    # A tied second model is rejected in both of its forms. Untied by hand, it is the same model, and is accepted.
    for form in ("embedding alone", "head repeated"):
        with pytest.raises(UserError, match="the former ties its head to the embedding"):
            extrapolate_weights(untied, tied, 0.5, tmp_path / form)
        change(tied, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    settings(tied, tie_word_embeddings=False)
    extrapolate_weights(untied, tied, 0.5, tmp_path / "by hand")
    extrapolate_weights(untied, tied, -1.0, tmp_path / "to the first")
    torch.testing.assert_close(weights(tmp_path / "by hand")[head], 1.5 * start[embedding] - 0.5 * end[head])
    assert logits(tmp_path / "to the first").equal(logits(untied))


def test_names_may_lack_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    for seed, name in ((1, "first"), (2, "second")):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    first, second = tmp_path / "first", tmp_path / "second"
    extrapolate_weights(first, second, 0.5, tmp_path / "out")
    change(
        first, lambda tensors: [tensors.update({n.removeprefix("transformer."): tensors.pop(n)}) for n in [*tensors]]
    )
    assert not any(name.startswith("transformer.") for name in weights(first))
    extrapolate_weights(first, second, 0.5, tmp_path / "short")
    assert (tmp_path / "short/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    extrapolate_weights(second, first, -1.0, tmp_path / "other way")
    assert all(
        value.equal(weights(second)[f"transformer.{name}"]) for name, value in weights(tmp_path / "other way").items()
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: change(folder, lambda t: t.pop("model.norm.weight")), "1 tensor is in the former alone (model"),
        (lambda folder: change(folder, lambda t: t.update(more=torch.ones(1))), "is in the latter alone (more)"),
        (
            lambda folder: change(folder, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
            "1 tensor has another shape or type (model.norm.weight [16] and [3])",
        ),
        (lambda folder: settings(folder, model_type="mistral"), "model_type is llama and mistral"),
        (lambda folder: settings(folder, vocab_size=24), "vocab_size is 23 and 24"),
        (lambda folder: settings(folder, num_attention_heads=4), "num_attention_heads is 2 and 4"),
        (lambda folder: settings(folder, quantization_config={"bits": 4}), "its weights are quantized"),
        (lambda folder: (folder / "config.json").unlink(), "does not have a config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "does not have weights as safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 20), "copy or download it again"),
        (
            lambda folder: (folder / "tokenizer.json").write_text(
                re.sub(r'"w3": ?3', '"w9": 3', (folder / "tokenizer.json").read_text())
            ),
            "their vocabularies differ in",
        ),
        (
            lambda folder: change(folder, lambda t: t.update({"model.norm.weight": torch.full((16,), -3e38)})),
            "the weight model.norm.weight does not stay finite in torch.float32",
        ),
    ],
)
def test_models_that_do_not_belong_together_are_refused(
    edit: Callable[[Path], object], message: str, first: Path, second: Path, tmp_path: Path
) -> None:
    edit(first)
    with pytest.raises(UserError, match=re.escape(message)):
        extrapolate_weights(first, second, 2.0, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_factor_and_folder_are_checked(first: Path, second: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a finite number"):
        extrapolate_weights(first, second, math.nan, tmp_path / "out")
    with pytest.raises(UserError, match="one of the two models"):
        extrapolate_weights(first, second, 0.5, second)


def test_older_result_stays_until_the_new_one_is_complete(
    first: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    extrapolate_weights(first, second, 0.5, out)
    before = (out / "model.safetensors").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr(extrapolation, "save_file", fail)
        extrapolate_weights(first, second, 1.0, out)
    assert (out / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 3
    extrapolate_weights(first, second, 1.0, out)
    assert (out / "model.safetensors").read_bytes() != before


# --- the search ------------------------------------------------------------------------------------------------------


def searched(score: Callable[[float], float | None]) -> tuple[list[float], float]:
    """Return the factors in the order in which a search tries them, and the best one."""
    tried = []

    def measure(factor: float) -> Candidate:
        tried.append(factor)
        value = score(factor)
        return Candidate(factor, {"val/win_rate": math.nan if value is None else value})

    found = search_factor(measure, "val/win_rate")
    assert [one.factor for one in found] == sorted(tried)
    return tried, best_candidate(found, "val/win_rate").factor


@pytest.mark.parametrize(
    ("score", "tried", "best"),
    [
        (lambda f: -((f - 0.3) ** 2), [0, 0.25, 0.5, 1, 0.125, 0.375], 0.25),
        (lambda f: -((f - 1.6) ** 2), [0, 0.25, 0.5, 1, 2, 4, 8, 1.5, 3], 1.5),
        (lambda f: -f, [0, 0.25, 0.5, 0.125], 0),
        (lambda _: 0.5, [0, 0.25, 0.5, 0.125], 0),  # Equal scores do not speak for going further.
        (lambda f: f, [*DOUBLING_FACTORS, 24], 32),
        (lambda f: {0: 0.4, 0.25: 0.3, 0.5: 0.6}.get(f, 0.2), [0, 0.25, 0.5, 1, 2, 0.375, 0.75], 0.5),
        (lambda f: None if f > 1 else f, [0, 0.25, 0.5, 1, 2, 4, 0.75, 1.5], 1),  # no number
        (lambda _: None, [0, 0.25, 0.5, 0.125], 0),
    ],
)
def test_search_goes_on_while_the_score_grows(
    score: Callable[[float], float | None], tried: list[float], best: float
) -> None:
    assert searched(score) == (tried, best)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("first second --out x", "one of the arguments --factor --search is required"),
        ("first second --out x --factor 1 --search", "not allowed with argument"),
        ("first second --factor 1", "the following arguments are required: --out"),
        ("first second --out x --factor 1 --select val/reward", "--select chooses the score of --search"),
        ("first second --out x --factor nan", "--factor nan: must be a finite number"),
        ("first second --out x --factor -1.5", "exchange the two models and write --factor 0.5"),
        ("first nowhere --out x --factor 1", "nowhere: there is neither a run directory nor a model folder"),
        ("reference second --out x --factor 1", "second is a model folder, and only a run has a reference"),
        ("first run --out x --factor 1", "run is not a run directory of spo: composed.yaml is missing"),
        ("first second --out x --search", "two model folders do not say on which prompts to search"),
        ("first second --out x --search judge=none", "there is neither a reward nor a judge that could tell"),
        ("first second --out x --search evaluation.selection_prompts=0", "leaves no prompt to search on"),
        ("first second --out first --factor 1", "first holds something else (config.json"),
        (". second --out x --factor 1", ". is neither a run directory, which has policy/, nor the folder of a model"),
        ("first second --out file --factor 1", "there is a file in place of a folder"),
    ],
)
def test_wrong_command_is_refused(
    words: str,
    message: str,
    first: Path,
    second: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "identity.json").touch()
    enter(tmp_path, tmp_path / "cache", monkeypatch)
    assert cli.main(["extrapolate", *words.split()]) > 0
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_wrong_command_is_answered_without_importing_torch(first: Path, tmp_path: Path) -> None:
    status, modules, errors = run_and_list_modules("extrapolate first nowhere --factor 1 --out x", tmp_path)
    assert status == 1 and "nowhere: there is neither" in errors and not {*LIBRARIES, "numpy"} & modules


def test_changed_policy_of_a_run_is_refused(first: Path, second: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "identity.json").touch()
    with pytest.raises(UserError, match="does not have a policy yet: finish it with spo train --resume"):
        plan_extrapolation(str(run), str(second), 0.5, None, tmp_path / "out")
    shutil.copytree(first, run / "policy")
    write_policy_digests(run)
    assert plan_extrapolation(str(run), str(second), 0.5, None, tmp_path / "out").first == run / "policy"
    change(run / "policy", lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16)}))
    with pytest.raises(UserError, match=r"is not what the run saved \(model.safetensors was changed\)"):
        plan_extrapolation(str(run), str(second), 0.5, None, tmp_path / "out")


def test_weights_alone_are_written_between_folders(
    first: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, tmp_path / "cache", monkeypatch)
    command = ["extrapolate", "first", "second", "--out", "out", "--factor"]
    assert cli.main([*command, "-0.5"]) == 0
    assert "To evaluate it like a run, add the data" in capsys.readouterr().out
    extrapolate_weights(first, second, -0.5, tmp_path / "expected")
    file = tmp_path / "out/policy/model.safetensors"
    assert file.read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out/extrapolation.json").read_text())["factor"] == -0.5
    written = file.stat().st_mtime_ns
    assert cli.main([*command, "-0.5"]) == 0 and file.stat().st_mtime_ns == written
    shutil.rmtree(tmp_path / "out/policy")  # as if the command had been killed
    assert cli.main([*command, "-0.5"]) == 0 and file.is_file()
    assert cli.main([*command, "1"]) == 1
    assert "out holds the factor -0.5 or other models: choose another --out" in capsys.readouterr().err


def run_of(folder: Path, *overrides: str) -> Path:
    """Write the directory of a run that has begun."""
    with claim(folder, compose(["logger=record", *overrides], run_dir=folder)):
        pass
    return folder


def test_configuration_of_a_run_is_trusted_as_far_as_that_of_an_evaluation(first: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    file = run / "composed.yaml"
    file.write_text(re.sub(r"_target_: spo\.losses\.SPOLoss", "_target_: os.system", file.read_text()))
    for given in (str(first), "reference"):
        with pytest.raises(UserError, match=r"runs os\.system as method\.loss.*add --allow os\.system"):
            plan_extrapolation(given, str(run), 0.5, None, tmp_path / "out")
    with pytest.raises(UserError, match=r"an evaluation can change .* only, not sft\.max_steps=3"):
        plan_extrapolation(str(first), str(run), 0.5, None, tmp_path / "out", ["sft.max_steps=3"])


def test_reference_with_an_adapter_is_refused(first: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "model=hf_lora", f"model.path={first}", "model.adapter_path=adapter")
    with pytest.raises(UserError, match=r"the reference of .* is a model with an adapter \(model\.adapter_path\)"):
        plan_extrapolation("reference", str(run), 0.5, None, tmp_path / "out")


def test_extrapolated_weights_are_evaluated_without_adapter_and_training(first: Path, tmp_path: Path) -> None:
    cfg = compose(["model=hf_lora", f"model.path={first}", "trainer.max_epochs=3", "sft.max_steps=5"], run_dir=tmp_path)
    own = evaluated_from(cfg, tmp_path / "weights", tmp_path / "out")
    assert (own.model.path, own.model.start, own.model.lora) == (str(first), str(tmp_path / "weights"), None)
    assert own.reference == {"_target_": "spo.models.FrozenReference"}
    assert (own.sft.max_steps, own.trainer.max_steps, own.trainer.max_epochs) == (0, 0, None)
    assert own.paths.run == str(tmp_path / "out") and cfg.model.lora is not None and cfg.trainer.max_epochs == 3


@pytest.mark.slow
def test_command_evaluates_like_a_run(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job(tmp_path / "run", cache_dir, TINY, "method=dpo", "optimizer.lr=3e-3")
    enter(tmp_path, cache_dir, monkeypatch)
    command = ["extrapolate", "reference", "run"]

    # From the run, and from folders with data of one's own.
    assert cli.main([*command, "--factor", "0.5", "--out", "further"]) == 0
    start_folder = Path(json.loads((tmp_path / "further/extrapolation.json").read_text())["first_path"])
    start, end = weights(start_folder), weights(tmp_path / "run/policy")
    for name, value in weights(tmp_path / "further/policy").items():
        torch.testing.assert_close(value, 1.5 * end[name] - 0.5 * start[name], rtol=1e-5, atol=1e-5)
    folders = ["extrapolate", str(start_folder), "run/policy", "--factor=0.5", "--out=folders"]
    assert cli.main([*folders, TINY, "method=dpo", "logger=record", "data.max_new_tokens=64"]) == 0
    of_folders, further = numbers(tmp_path / "folders"), numbers(tmp_path / "further")
    assert of_folders["eval/win_rate"] == further["eval/win_rate"] and of_folders["eval/kl"] == further["eval/kl"] > 0

    # The same command shows the result, and a different command is an error.
    written = (tmp_path / "further/metrics.json").stat().st_mtime_ns
    assert cli.main([*command, "--factor", "0.5", "--out", "further"]) == 0
    assert (tmp_path / "further/metrics.json").stat().st_mtime_ns == written
    capsys.readouterr()
    assert cli.main([*command, "--factor", "0.25", "--out", "further"]) == 1
    refused = capsys.readouterr().err
    assert "What differs:\n  - factor: 0.5 there, 0.25 now\n" in refused and "model.start" not in refused
    assert "the weights that training starts from have changed\nchoose another --out" in refused
    assert cli.main([*command, "--search", "--out", "further"]) == 1
    assert "further holds something else: choose another --out" in capsys.readouterr().err

    # A search, which is interrupted once.
    command = ["extrapolate", "reference", "run", "--search", "--out", "searched"]
    measure, calls = factor_search.evaluate_selection, 0

    def interrupted(*given: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise UserError("interrupted")
        return measure(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(factor_search, "evaluate_selection", interrupted)
    assert cli.main(command) == 1
    assert [one["factor"] for one in json.loads((tmp_path / "searched/search.json").read_text())["candidates"]] == [
        0,
        0.25,
    ]
    assert cli.main(command) == 0
    record = json.loads((tmp_path / "searched/search.json").read_text())
    assert calls == len(record["candidates"]) + 1  # None was measured twice, but for the one that failed.
    scores = {one["factor"]: one["metrics"]["val/win_rate"] for one in record["candidates"]}
    assert record["best"] == min(factor for factor in scores if scores[factor] == max(scores.values()))
    # The candidate at 0 is the run, and the best one the result.
    trained, found = numbers(tmp_path / "run"), numbers(tmp_path / "searched")
    assert scores[0] == trained["val/win_rate"] and scores[record["best"]] == found["val/win_rate"]
    assert "eval/win_rate" in found
    assert json.loads((tmp_path / "searched/extrapolation.json").read_text())["factor"] == record["best"]
    assert "come from the test prompts, which did not choose the factor" in " ".join(capsys.readouterr().out.split())

    assert cli.main([*command[:-1], "other", "--select", "val/accuracy"]) == 1
    assert "--select val/accuracy: the evaluation does not measure it" in capsys.readouterr().err
    assert cli.main([*command, "--select", "val/reward"]) == 1
    assert "searched holds another search" in capsys.readouterr().err
