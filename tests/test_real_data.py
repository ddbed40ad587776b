"""A model and data of one's own: Hugging Face folders, jsonl and HH transcripts, each real test with a made-up twin."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from spo import cli
from tests.commands import Numbers, history, job, rows, shared_cache, spo
from tests.fixtures import write_alpaca_like, write_hh_like, write_ranked_like
from tests.helpers import tiny_llama

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("SPO_DATA_DIR", ROOT / "../shared/data"))
METHODS = ("spo", "dpo", "ipo")
FEW = ["data.batch_size=4", "trainer.max_steps=3", "trainer.val_check_interval=3", "trainer.log_every_n_steps=3"]
FEW += ["probe.num_prompts=2", "regularizer.num_samples=4", "regularizer.batch_size=2"]
FEW += ["data.max_new_tokens=16", "evaluation.num_prompts=4", "evaluation.self_bleu_samples=2"]


class Input(NamedTuple):
    """A model folder and a file of pairs for each member of the group ``data``."""

    model: Path
    jsonl: Path
    hh: Path
    ranked_jsonl: Path

    def overrides(self, data: str, method: str = "spo", model: str = "hf") -> list[str]:
        few = [word for word in FEW if method.startswith("spo") or not word.startswith("regularizer")]
        return [f"model={model}", f"model.path={self.model}", f"data={data}", f"data.path={getattr(self, data)}", *few]


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Input:
    """Return a model of 512 tokens whose BOS and EOS share an id, and pairs with the lengths of published ones."""
    folder = tmp_path_factory.mktemp("made up")
    jsonl = write_alpaca_like(folder / "alpaca.jsonl.gz", prompts=100, seed=0)
    hh = write_hh_like(folder / "hh.jsonl.gz", pairs=150, seed=0)
    ranked = write_ranked_like(folder / "ranked.jsonl.gz", prompts=60, seed=0)
    model = folder / "model"
    config = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 512}
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    tiny_llama(dtype=torch.float32, scale=0.1, **config, **special).save_pretrained(model)
    with gzip.open(jsonl, "rt") as lines:
        small_tokenizer(json.loads(line)["chosen"] for line in lines).save_pretrained(model)
    return Input(model, jsonl, hh, ranked)


def small_tokenizer(texts: object) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 512 tokens; ``<s>`` begins and ends a text, as in stories260K."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="</s>")


@pytest.fixture(scope="session")
def real() -> Input:
    found = Input(
        DATA / "stories260K",
        DATA / "alpaca_eval_pairs.train.jsonl.gz",
        DATA / "hh_rlhf_harmless_base.part1.jsonl.gz",
        DATA / "alpaca_eval_ranked.train.jsonl.gz",
    )
    if not all(path.exists() for path in found):
        pytest.skip("no SPO_DATA_DIR")
    return found


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


@pytest.fixture
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPO_CACHE_DIR", str(cache))
    return tmp_path


# --- every method on both kinds of data ----------------------------------------------------------------------------

TRUNCATIONS = ("drop_pair", "trim_completion")


def limit(data: str, truncation: str) -> str:
    """Return the part of each data set that a short run reads: one pair in eight of AlpacaEval fits as it is."""
    return "data.limit=400" if (data, truncation) == ("jsonl", "drop_pair") else "data.limit=70"


def check(metrics: Numbers, run: Path) -> None:
    """Check a run on data without a reward: all other metrics exist, and the policy loads and generates."""
    assert {"train/loss", "val/loss", "eval/kl", "eval/entropy", "eval/rewards/accuracies"} <= metrics.keys()
    assert not [key for key in metrics if "win_rate" in key or "eval/reference/reward" in key]
    assert not [key for key in metrics if key == "eval/reward" or key.startswith("eval/reward/")]
    assert all(value == value for value in metrics.values())
    assert metrics["data/pairs_read"] == metrics["data/pairs_used"] + metrics["data/pairs_dropped"]
    start = history(run)[0]
    assert start["val/kl"] == pytest.approx(0, abs=1e-6)
    samples = rows(run / "samples.jsonl")
    assert {row["split"] for row in samples} == {"test"}
    assert 1 <= len(samples) <= 4 and not {"reward", "reference_reward", "verdict"} & samples[0].keys()
    assert (run / "report.html").is_file()
    model = AutoModelForCausalLM.from_pretrained(run / "policy")
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    inputs = tokenizer(samples[0]["prompt"], return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


def check_truncation(metrics: Numbers, truncation: str) -> None:
    assert (metrics["data/pairs_truncated"] > 0) == (truncation == "trim_completion")
    assert metrics["data/pairs_dropped"] > 0 or truncation == "trim_completion"


CASES = [
    pytest.param(data, method, truncation, marks=() if (data, method, truncation) in FAST else pytest.mark.slow)
    for FAST in [{("jsonl", "spo", "trim_completion"), ("hh", "dpo", "drop_pair")}]
    for data in ("jsonl", "hh")
    for method in METHODS
    for truncation in TRUNCATIONS
]


@pytest.mark.parametrize(("data", "method", "truncation"), CASES)
def test_every_method_trains_on_generated_data(
    data: str, method: str, truncation: str, made_up: Input, cache: Path, tmp_path: Path
) -> None:
    overrides = [
        *made_up.overrides(data, method),
        f"method={method}",
        f"data.truncation={truncation}",
        limit(data, truncation),
    ]
    metrics = job(tmp_path / "run", cache, *overrides)
    check(metrics, tmp_path / "run")
    check_truncation(metrics, truncation)


@pytest.mark.parametrize(("data", "method", "truncation"), CASES)
def test_every_method_trains_on_real_data(
    data: str, method: str, truncation: str, real: Input, cache: Path, tmp_path: Path
) -> None:
    overrides = [
        *real.overrides(data, method),
        f"method={method}",
        f"data.truncation={truncation}",
        limit(data, truncation),
    ]
    metrics = job(tmp_path / "run", cache, *overrides)
    check(metrics, tmp_path / "run")
    check_truncation(metrics, truncation)


LISTS = ["data.truncation=trim_completion", "data.max_length=128", "data.max_new_tokens=8", "data.limit=60"]
LIST_METHODS = pytest.mark.parametrize(
    ("method", "more"),
    [
        ("spo_ranked", []),
        ("spo_best_of_n", ["data.source.max_responses=4"]),
        pytest.param("sft", [], marks=pytest.mark.slow),
        pytest.param("dpo", ["data.source.max_responses=2"], marks=pytest.mark.slow),
    ],
)


@LIST_METHODS
def test_lists_of_generated_data_train(
    method: str, more: list[str], made_up: Input, cache: Path, tmp_path: Path
) -> None:
    lists(made_up, method, more, cache, tmp_path)


@LIST_METHODS
def test_lists_of_real_data_train(method: str, more: list[str], real: Input, cache: Path, tmp_path: Path) -> None:
    lists(real, method, more, cache, tmp_path)


def lists(source: Input, method: str, more: list[str], cache: Path, folder: Path) -> None:
    words = [word for word in source.overrides("ranked_jsonl", method) if not word.startswith("data.max_new_tokens")]
    metrics = job(folder / "run", cache, *words, f"method={method}", *LISTS, *more)
    check(metrics, folder / "run")
    assert 0 < metrics["train/rewards/accuracies"] < 1 and metrics["data/pairs_used"] > 40


@pytest.mark.slow
@pytest.mark.parametrize("data", ["jsonl", "hh"])
def test_the_command_trains_on_all_real_data(data: str, real: Input, cache: Path, tmp_path: Path) -> None:
    spo("train", *real.overrides(data), "hydra.run.dir=run", folder=tmp_path, cache=cache)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    check(metrics, tmp_path / "run")
    assert metrics["data/pairs_read"] == {"jsonl": 2800, "hh": 1800}[data]
    provenance = json.loads((tmp_path / "run/provenance.json").read_text())
    assert len(provenance["data"]["sha256"]) == len(provenance["weights"]["sha256"]) == 64


def test_an_adapter_trains_on_generated_data(made_up: Input, cache: Path, tmp_path: Path) -> None:
    adapter(made_up, "hh", "spo", cache, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", ["jsonl", "hh"])
def test_an_adapter_trains_on_real_data(data: str, method: str, real: Input, cache: Path, tmp_path: Path) -> None:
    adapter(real, data, method, cache, tmp_path)


def adapter(source: Input, data: str, method: str, cache: Path, folder: Path) -> None:
    """Trains one, and another that continues from it: the second run's reference is the adapter it was given."""
    overrides = [*source.overrides(data, method, "hf_lora"), f"method={method}", limit(data, "drop_pair")]
    check(job(folder / "run", cache, *overrides), folder / "run")
    assert (folder / "run/adapter/adapter_model.safetensors").is_file()
    check(job(folder / "next", cache, *overrides, f"model.adapter_path={folder / 'run/adapter'}"), folder / "next")


# --- what is set about data has an effect --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "data.truncation=trim_completion",
        pytest.param("data.truncation=trim_prompt", marks=pytest.mark.slow),
        "data.seed=1",
    ],
)
def test_settings_of_the_data_change_the_result(
    change: str, made_up: Input, cache: Path, tmp_path: Path, plain: Numbers
) -> None:
    changed = job(tmp_path / "changed", cache, *made_up.overrides("hh", "dpo"), "method=dpo", "data.limit=150", change)
    assert changed["val/logps/chosen"] != plain["val/logps/chosen"]
    assert changed["train/logps/chosen"] != plain["train/logps/chosen"]


@pytest.fixture(scope="module")
def plain(made_up: Input, tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    overrides = [*made_up.overrides("hh", "dpo"), "method=dpo", "data.limit=150"]
    return job(tmp_path_factory.mktemp("plain"), shared_cache(tmp_path_factory), *overrides)


# --- data that does not fit, and rows that are wrong ---------------------------------------------------------------


def test_many_dropped_pairs_lead_to_a_warning_with_advice(
    made_up: Input, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*made_up.overrides("jsonl", "dpo"), "method=dpo", "data.min_pairs=4"]
    metrics = job(tmp_path / "run", cache, *overrides)
    message = " ".join(capsys.readouterr().out.replace("│", " ").split())
    dropped, read = metrics["data/pairs_dropped"], metrics["data/pairs_read"]
    assert dropped > read / 2
    assert "pairs were dropped" in message
    assert "data.truncation=trim_completion" in message and "data.truncation=trim_prompt" in message


def test_too_few_pairs_are_an_error_with_advice(here: Path, made_up: Input, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *made_up.overrides("jsonl"), "data.limit=40", "logger=record", "hydra.run.dir=run"]
    assert cli.main(words) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message and "data.min_pairs=32 are needed" in message
    assert "data.truncation=trim_completion" in message
    assert not (here / "run/metrics.json").exists()


@pytest.mark.slow
def test_few_real_pairs_fit_a_short_context(real: Input, cache: Path, tmp_path: Path) -> None:
    words = ["train", *real.overrides("jsonl", "dpo"), "method=dpo", "hydra.run.dir=run"]
    done = spo(*words, folder=tmp_path, cache=cache)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["data/pairs_used"] / metrics["data/pairs_read"] == pytest.approx(0.13, abs=0.02)
    assert "pairs were dropped" in " ".join(done.stdout.split())


GOOD = [{"prompt": f"Say {i}.", "chosen": f" It is {i}.", "rejected": f" No {i}, no."} for i in range(60)]
BAD = [
    ('{"prompt": "Say 7.", "chosen": 7, "rejected": " no"}', "chosen", "must be text"),
    ('{"prompt": "Say 7.", "rejected": " no"}', "chosen", "missing"),
    ('{"prompt": "Say 7.", "chosen": " yes", "rejected": " no", "preference": 1.5}', "preference", "between 0 and 1"),
    ('{"prompt": "Say 7.", "chosen": " yes"', None, "JSON"),
]


def write(file: Path, *bad: str) -> Path:
    lines = [json.dumps(row) for row in GOOD]
    lines[7:7] = bad
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize(("row", "column", "reason"), BAD)
def test_a_bad_row_is_an_error_with_its_place(
    row: str, column: str | None, reason: str, here: Path, made_up: Input, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(here / "pairs.jsonl", row)
    words = [*made_up._replace(jsonl=file).overrides("jsonl"), "logger=record", "hydra.run.dir=run"]
    assert cli.main(["train", *words]) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    message = message.strip().splitlines()[-1]
    assert message.startswith("spo: ") and f"{file}" in message and line_in(message) == 8 and reason in message
    assert column is None or f"column {column!r}" in message


def line_in(message: str) -> int:
    """Return the line number that a message names."""
    [number] = re.findall(r"(?:, line |:)(\d+)", message)
    return int(number)


def test_bad_rows_are_skipped_counted_and_listed(made_up: Input, cache: Path, tmp_path: Path) -> None:
    equal = '{"prompt": "Say 7.", "chosen": " yes", "rejected": " yes"}'
    file = write(tmp_path / "pairs.jsonl", *(row for row, *_ in BAD), equal)
    overrides = [*made_up._replace(jsonl=file).overrides("jsonl", "dpo"), "method=dpo", "data.on_bad_row=skip"]
    metrics = job(tmp_path / "run", cache, *overrides)
    assert metrics["data/pairs_read"] == 65 and metrics["data/pairs_used"] == 60 and metrics["data/pairs_dropped"] == 5
    listed = rows(tmp_path / "run/bad_rows.jsonl")
    assert [row["column"] for row in listed] == ["chosen", "chosen", "preference", None, "rejected"]
    assert [line_in(row["where"]) for row in listed] == [8, 9, 10, 11, 12]
    assert all(row["reason"] for row in listed)


# --- a data set of the hub -----------------------------------------------------------------------------------------


def test_a_folder_in_the_format_of_the_hub_is_read(made_up: Input, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    renamed = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in GOOD]
    for split, part in {"train": renamed[:40], "test": renamed[40:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    overrides = ["data=hub", f"data.path={folder}", "+data.source.columns.prompt=question"]
    overrides.append("data.source.split.test=test")
    kept = [word for word in made_up.overrides("jsonl", "dpo") if not word.startswith(("data=", "data.path"))]
    metrics = job(tmp_path / "run", cache, *overrides, *kept, "method=dpo")
    assert metrics["data/pairs_used"] == 60
    assert {row["prompt"] for row in rows(tmp_path / "run/samples.jsonl")} <= {row["question"] for row in renamed[40:]}


def test_inspect_shows_rows_of_a_user_file(here: Path, made_up: Input, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in made_up.overrides("hh", "dpo") if word not in FEW]
    assert cli.main(["inspect", *words, "data.limit=100", "--limit", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Human:" in shown and "mask" in shown and "hh.jsonl.gz" in shown
    assert "truncated" in shown and "dropped" in shown
