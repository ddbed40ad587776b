"""The main job from end to end: what a person types, and what they find afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

import spo.evaluation.assess as spo_draws
import spo.stages.evaluate as spo_evaluate
import spo.stages.train as spo_train
from spo import cli
from spo.config.compose import compose
from spo.evaluation.judges import JudgeError
from spo.module import AlignmentModule
from spo.runs.resume import resumed_config
from spo.stages.prepare import prepare_run
from tests.commands import (
    SWEPT,
    TINY,
    Numbers,
    Sweep,
    entries,
    environment,
    history,
    job,
    numbers,
    rows,
    shared_cache,
    spo,
    sweep,
    untimed,
)
from tests.fixtures import write_hh_like

METHODS = ("spo", "dpo", "ipo")
READS_BETA = {"spo", "dpo", "ipo"}
PAIR_KEYS = ["loss", "loss/preference", "kl", "entropy", "logps/chosen", "logps/rejected"]
PAIR_KEYS += [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
EVAL_KEYS = [
    "win_rate",
    "win_rate_ci_low",
    "win_rate_ci_high",
    "reward",
    "kl",
    "entropy",
    "entropy_sequence",
    "distinct_2",
    "self_bleu",
    "length",
    "rewards/accuracies",
    "win_rate_length_controlled",
    "calibration/ece",
]
SAMPLE_KEYS = [
    "references",
    "prompt_id",
    "split",
    "sample_index",
    "prompt",
    "completion",
    "tokens",
    "reward",
    "logp_policy",
    "logp_reference",
    "reference_completion",
    "reference_tokens",
    "reference_reward",
    "verdict",
]
# Enough to notice a difference, and little more: hardly a probe, no checkpoint, three steps at full speed.
SMALL = (TINY, "trainer.max_steps=3", "scheduler.num_warmup_steps=0", "callbacks=none", "probe.num_prompts=1")
SMALL += ("evaluation.num_prompts=4",)


@pytest.fixture
def swept(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(tmp_path_factory)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


@pytest.fixture
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPO_CACHE_DIR", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


# --- one line, six runs --------------------------------------------------------------------------------------------


def test_sweep_jobs_have_directories_with_readable_names(swept: Sweep) -> None:
    assert [path.name for path in swept.folder.iterdir()] == ["sweep"]
    names = sorted(path.name for path in (swept.folder / "sweep").iterdir() if path.is_dir())
    assert len(names) == 6
    for method in METHODS:
        for seed in (1, 2):
            name = swept.directory(method, seed).name
            assert name in names and re.fullmatch(r"[A-Za-z0-9._-]{1,120}", name)
            assert (swept.directory(method, seed) / "metrics.json").is_file()


def test_a_sweep_makes_one_reference_model_and_samples_one_set_of_pairs(swept: Sweep) -> None:
    assert swept.cached == {"sft": 1, "pairs": 1}
    provenances = [json.loads(file.read_text()) for file in swept.folder.glob("*/*/provenance.json")]
    assert len(provenances) == 6 and len({one["inputs"]["pairs_sha256"] for one in provenances}) == 1


def test_runs_of_a_sweep_differ_by_method_and_by_seed(swept: Sweep) -> None:
    losses = {numbers(swept.directory(method, seed))["train/loss"] for method in METHODS for seed in (1, 2)}
    assert len(losses) == 6


# --- the run directory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_directory_has_its_files(swept: Sweep, method: str) -> None:
    run = swept.directory(method)
    files = ["config.yaml", "metrics.json", "history.jsonl", "samples.jsonl", "provenance.json", "report.html"]
    assert all((run / name).is_file() for name in files)
    assert all((run / "checkpoints" / name).is_file() for name in ("last.ckpt", "best.ckpt"))
    assert [file.name for file in (run / "policy").iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")] == []
    assert (run / "policy/model.safetensors").is_file()
    page = (run / "report.html").read_text()
    assert "<svg" in page and not re.search(r"(src|href)\s*=\s*[\"']?https?:", page)


@pytest.mark.parametrize("method", METHODS)
def test_metrics_have_their_documented_names(swept: Sweep, method: str) -> None:
    check_names(json.loads((swept.directory(method) / "metrics.json").read_text()), method)


def check_names(metrics: Numbers, method: str) -> None:
    coefficients = {"alpha": method == "spo", "beta": method in READS_BETA}
    wanted = {f"{split}/{key}" for split in ("train", "val") for key in PAIR_KEYS}
    wanted |= {f"eval/{key}" for key in EVAL_KEYS}
    wanted |= {f"data/pairs_{key}" for key in ("read", "used", "dropped", "truncated")} | {"train/grad_norm"}
    wanted |= {f"train/{name}" for name, read in coefficients.items() if read}
    assert wanted <= metrics.keys()
    assert all(read or f"train/{name}" not in metrics for name, read in coefficients.items())
    clock = re.compile(r"(^|[/_])(time|seconds|s|per_second|speed)$")
    assert all(isinstance(value, float) and value == value for value in metrics.values())
    assert {key.partition("/")[0] for key in metrics} == {"train", "val", "eval", "data", "trained", "policy", "time"}
    assert [key for key in metrics if clock.search(key) and not key.startswith("time/")] == []
    assert 0 <= metrics["eval/win_rate_ci_low"] <= metrics["eval/win_rate"] <= metrics["eval/win_rate_ci_high"] <= 1


def test_methods_share_all_metrics_that_apply_to_them(swept: Sweep) -> None:
    keys = {method: set(numbers(swept.directory(method))) for method in METHODS}
    assert keys["dpo"] == keys["ipo"]
    own = {"train/alpha", "train/buffer/age", "train/buffer/tokens", "train/loss/regularizer", "val/loss/regularizer"}
    assert keys["spo"] - keys["dpo"] == own and keys["dpo"] < keys["spo"]


def test_supervised_fine_tuning_is_a_method(swept: Sweep, tmp_path: Path) -> None:
    metrics = job(tmp_path / "run", swept.cache, *SWEPT, "method=sft", "evaluation.num_prompts=4")
    assert set(metrics) == set(numbers(swept.directory("dpo"))) - {"train/beta"}
    assert metrics["val/loss"] == pytest.approx(-metrics["val/logps/chosen"])


@pytest.mark.parametrize("method", METHODS)
def test_the_history_has_one_row_per_step(swept: Sweep, method: str) -> None:
    curve = rows(swept.directory(method) / "history.jsonl")
    assert [row["step"] for row in curve] == [0, 2, 4]
    assert all("val/loss" in row for row in curve) and all("train/loss" in row for row in curve[1:])
    final = numbers(swept.directory(method))
    last = {key: value for key, value in untimed(curve[-1]).items() if key != "step"}
    assert {key: final[key] for key in last} == last


def test_policy_equals_reference_before_the_first_step(swept: Sweep) -> None:
    for method in METHODS:
        assert history(swept.directory(method))[0]["val/kl"] == 0
    start = history(swept.directory("dpo"))[0]
    assert start["val/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert start["val/loss"] == pytest.approx(0.693147, abs=1e-6)


def test_every_evaluation_prompt_has_its_samples(swept: Sweep) -> None:
    run = swept.directory("spo")
    samples, metrics = rows(run / "samples.jsonl"), numbers(run)
    assert len(samples) == 8 == len({sample["prompt_id"] for sample in samples})
    assert all(set(sample) == set(SAMPLE_KEYS) for sample in samples)
    assert {sample["split"] for sample in samples} == {"test"}
    assert metrics["eval/win_rate"] == sum(sample["verdict"] for sample in samples) / 8
    assert metrics["eval/reward"] == pytest.approx(sum(sample["reward"] for sample in samples) / 8)
    for sample in samples:
        met = [one["reward"] for one in sample["references"]]
        wins = sum(sample["reward"] > reward for reward in met)
        ties = sum(sample["reward"] == reward for reward in met)
        assert sample["verdict"] == (wins + ties / 2) / len(met) and met[0] == sample["reference_reward"]
        assert 1 <= sample["tokens"] <= 64 and sample["logp_policy"] < 0 and sample["logp_reference"] < 0


def test_provenance_lists_the_inputs_of_the_run(swept: Sweep) -> None:
    record = json.loads((swept.directory("ipo", 2) / "provenance.json").read_text())
    assert {"git_sha", "git_dirty", "versions", "data", "weights", "seeds", "command"} <= record.keys()
    assert record["seeds"] == {"seed": 2, "data.seed": 0}
    assert record["versions"]["torch"] == torch.__version__
    assert record["command"].startswith("spo train -m +debug=tiny")
    assert all(re.fullmatch("[0-9a-f]{64}", record["inputs"][f"{name}_sha256"]) for name in ("reference", "pairs"))


def test_config_yaml_is_complete(swept: Sweep) -> None:
    run = swept.directory("spo")
    text = (run / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert "${" not in text and "???" not in text
    assert (config["method"]["name"], config["seed"], config["trainer"]["max_steps"]) == ("spo", 1, 4)
    assert config["paths"]["run"] == str(run) and config["regularizer"]["max_new_tokens"] == 64


@pytest.mark.parametrize("method", METHODS)
def test_the_saved_policy_loads_and_generates(swept: Sweep, method: str) -> None:
    run = swept.directory(method)
    loads_and_generates(run / "policy", rows(run / "samples.jsonl")[0]["prompt"])


def loads_and_generates(folder: Path, prompt: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert inputs["input_ids"].shape[1] < generated.shape[1] <= inputs["input_ids"].shape[1] + 8
    assert isinstance(tokenizer.decode(generated[0]), str)


# --- the same again ------------------------------------------------------------------------------------------------

NO_NETWORK = """
import os, socket
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        open(os.environ["ATTEMPTS"], "a").write(f"{address}\\n")
        raise OSError("the network is cut")
    return real(self, address)
def getaddrinfo(host, *args, real=socket.getaddrinfo, **kwargs):
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        open(os.environ["ATTEMPTS"], "a").write(f"{host}\\n")
        raise socket.gaierror("the network is cut")
    return real(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
"""


def test_warm_cache_and_missing_network_do_not_change_a_bit(swept: Sweep, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/sitecustomize.py").write_text(NO_NETWORK)
    # The code under test stays on the path, since another copy of it would not share the cache.
    path = os.pathsep.join(filter(None, [str(tmp_path / "cut"), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": path, "ATTEMPTS": str(tmp_path / "attempts"), "HF_HUB_OFFLINE": "0"}
    words = ["train", *SWEPT, "method=spo", "seed=1", "hydra.run.dir=warm"]
    spo(*words, folder=tmp_path / "empty", cache=swept.cache, **variables)
    assert not (tmp_path / "attempts").exists()
    warm, cold = tmp_path / "empty/warm", swept.directory("spo", 1)
    assert numbers(warm) == numbers(cold)
    assert history(warm) == history(cold)
    assert (warm / "samples.jsonl").read_bytes() == (cold / "samples.jsonl").read_bytes()
    assert {kind: len(entries(swept.cache, kind)) for kind in ("sft", "pairs")} == swept.cached
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["warm"]


def test_repeating_a_command_shows_the_result(here: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *SMALL, "logger=record", "hydra.run.dir=run"]
    assert cli.main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in (here / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "win rate" in shown and "optimizer steps" not in shown
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {".lock", "spo.log"}

    assert cli.main([*words, "seed=2"]) == 1
    messages = capsys.readouterr().err
    assert "seed: 0 there, 2 now" in messages and "Traceback" not in messages
    assert numbers(here / "run") and not (here / "run.1").exists()


@pytest.mark.slow
def test_a_rerun_moves_the_old_run_aside(cache: Path, tmp_path: Path) -> None:
    first = job(tmp_path / "run", cache, *SMALL)
    second = job(tmp_path / "run", cache, *SMALL, "seed=2", "rerun=true")
    assert numbers(tmp_path / "run.1") == first and numbers(tmp_path / "run") == second
    assert first != second


# --- interruptions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    method: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job(tmp_path / "whole", cache, TINY, f"method={method}", "trainer.log_every_n_steps=1")
    step = AlignmentModule.training_step

    def interrupted(self: AlignmentModule, window: Any, batch_idx: int) -> None:
        if self.global_step == 3:
            raise RuntimeError("the power is gone")
        step(self, window, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr(AlignmentModule, "training_step", interrupted)
        job(tmp_path / "broken", cache, TINY, f"method={method}", "trainer.log_every_n_steps=1")
    assert not (tmp_path / "broken/metrics.json").exists()
    assert job(tmp_path / "broken", cache, TINY, f"method={method}", "trainer.log_every_n_steps=1") == whole
    assert history(tmp_path / "broken") == history(tmp_path / "whole")


def test_a_failing_judge_does_not_lose_the_training(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = [word for word in SMALL if word != "callbacks=none"]
    nobody = ["judge=openai", "judge.base_url=http://127.0.0.1:9/v1", "judge.model=m", "judge.key_variable=null"]
    with pytest.raises(JudgeError, match="unanswered"):
        job(run, cache, *small, *nobody, "judge.max_retries=0")
    assert not (run / "metrics.json").exists() and (run / "failure.json").exists()
    trained = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    metrics = spo_train.train(resumed_config(run, ["judge=gold"]))
    assert untimed(metrics) == job(tmp_path / "other", cache, *small)
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == trained and not (run / "failure.json").exists()


def test_a_run_interrupted_in_its_evaluation_keeps_its_curves(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job(tmp_path / "whole", cache, TINY, "method=dpo")

    def interrupted(*_: Any) -> None:
        raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr(spo_train, "evaluate_run", interrupted)
        job(tmp_path / "broken", cache, TINY, "method=dpo")
    assert job(tmp_path / "broken", cache, TINY, "method=dpo") == whole
    assert history(tmp_path / "broken") == history(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["same command", "--resume"])
def test_a_killed_run_resumes_bit_for_bit(way: str, cache: Path, tmp_path: Path) -> None:
    settings = [TINY, "logger=record", "trainer.max_steps=40", "trainer.val_check_interval=5"]
    settings += ["trainer.log_every_n_steps=5", "probe.num_prompts=2"]
    words = ["train", *settings, "hydra.run.dir=broken"]
    spo("train", *settings, "hydra.run.dir=whole", folder=tmp_path, cache=cache)
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [Path(sys.executable).with_name("spo"), *words],
        cwd=tmp_path,
        env=environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    reached = broken / "history.jsonl"
    while not (reached.exists() and '"step": 15' in reached.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "metrics.json").exists()
    spo(*(words if way == "same command" else ["train", "--resume", "broken"]), folder=tmp_path, cache=cache)
    assert numbers(broken) == numbers(tmp_path / "whole")
    assert history(broken) == history(tmp_path / "whole")
    assert [row["step"] for row in history(broken)] == list(range(0, 41, 5))
    policies = [(tmp_path / name / "policy/model.safetensors").read_bytes() for name in ("broken", "whole")]
    assert policies[0] == policies[1]


@pytest.mark.slow
def test_a_finished_run_trains_more_steps(here: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(here / "run", cache, TINY, "method=dpo", "scheduler=constant")
    assert cli.main(["train", "--resume", "run", "alpha=0.3"]) == 1
    keys = "trainer.max_steps, trainer.max_epochs, trainer.max_time, "
    assert f"it can change {keys}" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "run", "trainer.max_steps=6"]) == 0
    assert [row["step"] for row in history(here / "run")] == [0, 2, 4, 6]
    straight = job(here / "straight", cache, TINY, "method=dpo", "scheduler=constant", "trainer.max_steps=6")
    assert numbers(here / "run") == straight


# --- a finished run ------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(swept: Sweep, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of a finished run, in the folder in which commands run."""
    torch.set_num_threads(1)
    monkeypatch.setenv("SPO_CACHE_DIR", str(swept.cache))
    shutil.copytree(swept.directory("ipo"), here / "run", symlinks=True)
    return here / "run"


def evaluations(run: Path) -> list[Numbers]:
    return [numbers(path) for path in sorted((run / "evaluations").iterdir())]


def test_an_evaluation_repeats_the_numbers_of_the_run(finished: Path) -> None:
    before = numbers(finished)
    assert cli.main(["evaluate", "run"]) == 0
    [again] = evaluations(finished)
    of_selection = {f"val/{name}" for name in spo_evaluate.SELECTION_METRICS}
    assert again == {key: value for key, value in before.items() if key.startswith("eval/") or key in of_selection}
    assert numbers(finished) == before


def test_the_selection_split_is_evaluated_too(swept: Sweep) -> None:
    run = swept.directory("dpo")
    metrics, samples = numbers(run), rows(run / "samples.selection.jsonl")
    assert {row["split"] for row in samples} == {"selection"} and len(samples) == 8
    assert set(SAMPLE_KEYS) == samples[0].keys()
    assert not {row["prompt_id"] for row in samples} & {row["prompt_id"] for row in rows(run / "samples.jsonl")}
    assert metrics["val/win_rate"] == pytest.approx(sum(row["verdict"] for row in samples) / 8)
    assert metrics["val/reward"] == pytest.approx(sum(row["reward"] for row in samples) / 8)
    assert metrics["val/win_rate_ci_low"] <= metrics["val/win_rate"] <= metrics["val/win_rate_ci_high"]
    last = history(run)[-1]  # of these samples, not of the last probe
    assert (last["val/kl"], last["val/entropy"]) == (metrics["val/kl"], metrics["val/entropy"])
    assert "val/win_rate" not in last


def test_without_selection_prompts_there_are_no_val_metrics_of_evaluation(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # These stories make a reference model of their own, which need not be good.
    overrides = ["probe.num_prompts=0", "data.source.selection_prompts=0", "sft.max_steps=10"]
    metrics = job(tmp_path / "run", cache, *SMALL, *overrides)
    assert "there will be no val/win_rate" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert {"eval/win_rate", "val/loss"} <= metrics.keys()
    assert not {f"val/{name}" for name in spo_evaluate.SELECTION_METRICS} & metrics.keys()
    assert not (tmp_path / "run" / "samples.selection.jsonl").exists()


def test_an_evaluation_against_chosen_responses_and_another_run(finished: Path, here: Path, swept: Sweep) -> None:
    other = swept.directory("dpo")
    shutil.copytree(other, here / "theirs", symlinks=True)
    assert cli.main(["evaluate", "run", "evaluation.against=[reference,chosen,theirs]"]) == 0
    [metrics] = evaluations(finished)
    [folder] = (finished / "evaluations").iterdir()
    samples, theirs = rows(folder / "samples.jsonl"), rows(other / "samples.jsonl")
    for row, their in zip(samples, theirs, strict=True):
        assert row["prompt_id"] == their["prompt_id"]
        met = row["opponents"]["theirs"]
        assert (met["completion"], met["tokens"], met["reward"]) == tuple(
            their[key] for key in ("completion", "tokens", "reward")
        )
        assert met["verdict"] == (row["reward"] > their["reward"]) + 0.5 * (row["reward"] == their["reward"])
    verdicts = [row["opponents"]["theirs"]["verdict"] for row in samples]
    assert metrics["eval/win_rate/theirs"] == pytest.approx(sum(verdicts) / len(verdicts))
    compared = [row for row in samples if "chosen" in row["opponents"]]
    assert metrics["eval/prompts/chosen"] == len(compared) <= metrics["eval/prompts/theirs"] == 8
    assert {"eval/win_rate", "eval/win_rate/chosen_length_controlled_ci_high"} <= metrics.keys()


def test_run_on_other_prompts_is_rejected_as_an_opponent(
    finished: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "theirs").mkdir()
    lines = (finished / "samples.jsonl").read_text().splitlines(keepends=True)
    (here / "theirs" / "samples.jsonl").write_text("".join(lines[:5]))
    assert cli.main(["evaluate", "run", "evaluation.against=[theirs]"]) == 1
    messages = " ".join(capsys.readouterr().err.split())
    assert "theirs was evaluated on other prompts: it does not have samples for 3 of the 8" in messages
    for value, words in (("[nothing]", "nothing is neither reference nor chosen"), ("chosen", "must be a list")):
        assert cli.main(["evaluate", "run", f"evaluation.against={value}"]) == 1
        assert words in " ".join(capsys.readouterr().err.split())


def test_an_interrupted_evaluation_reuses_its_completions(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []
    draw, assess = spo_draws.draw_together, spo_evaluate.assess

    def counted(model: Any, stage: str, *args: Any) -> Any:
        drawn.append(stage)
        return draw(model, stage, *args)

    def broken(*args: Any) -> Any:
        raise JudgeError("the judge is out of service")

    monkeypatch.setattr(spo_draws, "draw_together", counted)
    monkeypatch.setattr(spo_evaluate, "assess", broken)
    again = ["evaluate", "run", "evaluation.seed=5", "evaluation.num_prompts=3", "evaluation.selection_prompts=2"]
    assert cli.main(again) == 1
    assert "the judge is out of service" in capsys.readouterr().err
    assert drawn == ["policy", "reference"] * 2 and not (finished / "evaluations").exists()
    monkeypatch.setattr(spo_evaluate, "assess", assess)
    assert cli.main(again) == 0 and cli.main([*again, "judge=none"]) == 0 and len(drawn) == 4
    with_judge, without = sorted(evaluations(finished), key=len, reverse=True)
    assert {key: with_judge[key] for key in without} == without
    assert cli.main([*again, "evaluation.temperature=0.5"]) == 0 and len(drawn) == 8


def test_samples_and_win_rate_at_every_validation(cache: Path, tmp_path: Path) -> None:
    settings = ["callbacks=samples", "callbacks.samples.num_prompts=3", "evaluation.selection_prompts=0"]
    metrics = job(tmp_path / "run", cache, TINY, *settings)
    samples = rows(tmp_path / "run" / "samples.validation.jsonl")
    assert [(row["step"], row["split"]) for row in samples] == [(s, "selection") for s in (0, 2, 4) for _ in range(3)]
    validations = [row for row in history(tmp_path / "run") if "val/samples/win_rate" in row]
    assert [row["step"] for row in validations] == [0, 2, 4]
    for row in validations:
        here = [sample for sample in samples if sample["step"] == row["step"]]
        assert row["val/samples/win_rate"] == pytest.approx(sum(one["verdict"] for one in here) / 3)
        assert row["val/samples/reward"] == pytest.approx(sum(one["reward"] for one in here) / 3)
        assert row["val/samples/length"] == pytest.approx(sum(one["tokens"] for one in here) / 3)
    first, *_, last = validations
    assert first["val/samples/kl"] == pytest.approx(0, abs=1e-4) and last["val/samples/kl"] > 0.01
    names = ("win_rate", "win_rate_ci_low", "win_rate_ci_high", "reward", "kl", "entropy", "length")
    assert {name: metrics[f"val/samples/{name}"] for name in names} == {
        name: last[f"val/samples/{name}"] for name in names
    }
    assert not {"val/win_rate", "val/reward"} & metrics.keys()  # a selector measured on a few prompts would be luck
    assert len({row["reference_completion"] for row in samples}) == 3 < len({row["completion"] for row in samples})
    plain = job(tmp_path / "plain", cache, TINY, "evaluation.selection_prompts=0")
    assert plain == {key: value for key, value in metrics.items() if key in plain}  # looking changes nothing


class OftenDown:
    """A judge that only compares, and is out of service the first two times."""

    identity: dict[str, Any] = {"judge": "often down"}  # noqa: RUF012
    asked = 0

    def scores(self, prompts: list[str], completions: list[str]) -> None:
        return None

    def verdicts(self, comparisons: list[Any]) -> list[float]:
        self.asked += 1
        if self.asked <= 2:
            raise JudgeError("the endpoint does not answer")
        return [1.0] * len(comparisons)

    def usage(self) -> dict[str, float]:
        return {"calls": float(self.asked)}


def test_a_judge_that_fails_at_validation_does_not_stop_training(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge = [f"judge._target_={__name__}.OftenDown", "~judge.reward"]
    metrics = job(tmp_path / "run", cache, TINY, "callbacks=samples", "callbacks.samples.num_prompts=3", *judge)
    samples = rows(tmp_path / "run" / "samples.validation.jsonl")
    assert [(row["step"], row.get("verdict")) for row in samples] == [
        (step, verdict) for step, verdict in ((0, None), (2, None), (4, 1.0)) for _ in range(3)
    ]
    assert [row["step"] for row in history(tmp_path / "run") if "val/samples/win_rate" in row] == [4]
    [message] = [record.getMessage() for record in caplog.records if "endpoint" in record.getMessage()]
    cause = "the endpoint does not answer"
    assert message == f"the samples of this validation do not have verdicts, training continues: {cause}"
    assert metrics["eval/judge/calls"] == 5  # three validations, two splits


def test_an_evaluation_with_other_settings(finished: Path) -> None:
    assert cli.main(["evaluate", "run", "evaluation.num_prompts=4", "evaluation.samples_per_prompt=2"]) == 0
    [folder] = (finished / "evaluations").iterdir()
    samples = rows(folder / "samples.jsonl")
    assert [sample["sample_index"] for sample in samples] == [0, 1] * 4
    assert len({sample["prompt_id"] for sample in samples}) == 4


def test_an_evaluation_on_other_data(finished: Path, here: Path) -> None:
    file = write_hh_like(here / "pairs.jsonl.gz", 120, seed=0)
    assert cli.main(["evaluate", "run", "data=hh", f"data.path={file}", "evaluation.num_prompts=4"]) == 0
    [other] = evaluations(finished)
    assert "eval/kl" in other and "eval/win_rate" not in other and "eval/reward" not in other
    [folder] = (finished / "evaluations").iterdir()
    assert all("Human:" in sample["prompt"] for sample in rows(folder / "samples.jsonl"))


@pytest.mark.parametrize("override", ["method=dpo", "beta=0.3", "sft.max_steps=3", "model.path=x"])
def test_an_evaluation_rejects_overrides_of_training(
    override: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "run", override]) == 1
    messages = capsys.readouterr().err
    assert messages.startswith("spo: an evaluation can change") and override.partition("=")[0] in messages
    assert not (finished / "evaluations").exists()


def test_the_report_can_be_written_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    assert cli.main(["report", "run"]) == 0
    assert capsys.readouterr().out.strip().endswith("run/report.html")
    assert len((finished / "report.html").read_text()) == pytest.approx(len(page), rel=0.05)


def test_commands_on_other_folders_are_errors(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    for command in ("evaluate empty", "evaluate nowhere", "train --resume nowhere", "report nowhere"):
        words = command.split()
        assert cli.main(words) == 1
        messages = capsys.readouterr().err
        assert messages.startswith("spo: ") and words[-1] in messages and "Traceback" not in messages


def test_inspect_shows_tokens_and_masks(here: Path, swept: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", *SWEPT, f"paths.cache={swept.cache}", "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("tokens of prompt + chosen") == 2 and shown.count("tokens of prompt + rejected") == 2
    assert "BOS" in shown and "EOS" in shown and re.search(r"mask \.+#*", shown)
    counts = {name: int(re.search(rf"\b{name}\W+(\d+)", shown)[1]) for name in ("read", "used", "dropped")}  # type: ignore[index]
    assert counts["read"] == 192 == counts["used"] + counts["dropped"] and counts["dropped"] > 0


# --- the alignment step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spo", pytest.param("ipo", marks=pytest.mark.slow)])
def test_without_steps_the_policy_equals_the_reference(method: str, cache: Path, tmp_path: Path) -> None:
    settings = ["trainer.max_steps=0", "evaluation.num_prompts=64", "evaluation.samples_per_prompt=3"]
    metrics = job(tmp_path / "run", cache, TINY, f"method={method}", *settings, "evaluation.bootstrap_samples=1000")
    assert metrics["eval/kl"] == 0
    assert metrics["eval/win_rate_ci_low"] < 0.5 < metrics["eval/win_rate_ci_high"]
    assert metrics["eval/win_rate_ci_high"] - metrics["eval/win_rate_ci_low"] < 0.25
    assert metrics["val/kl"] == 0 and "train/loss" not in metrics


CHANGES = [
    ("", "regularizer.refresh_every=1"),
    ("", "regularizer.num_samples=16"),
    ("", "regularizer=local_kl"),
    ("", "regularizer=none"),
    ("", "alpha=0.5"),
    ("", "beta=3"),
    ("", "seed=5"),
    ("method=dpo", "method.loss.label_smoothing=0.2"),
    ("method=ipo", "method.loss.length_normalize=false"),
]
MORE_CHANGES = [
    ("", "regularizer.batch_size=4"),
    ("regularizer=none", "regularizer=local_kl"),
    ("", "alpha=linear"),
    ("", "method=spo_weighted"),
    ("method=dpo", "beta=0.5"),
    ("method=dpo", "regularizer=global_kl"),
    ("method=ipo", "beta=0.5"),
    ("", "data.group_by_length=2"),
]
_done: dict[tuple[str, ...], Numbers] = {}


def aligned(cache: Path, folder: Path, *overrides: str) -> Numbers:
    """Three steps with these settings, once per session."""
    chosen = tuple(filter(None, overrides))
    if chosen not in _done:
        _done[chosen] = job(folder / str(len(_done)), cache, *SMALL, *chosen)
    return _done[chosen]


@pytest.mark.parametrize(
    ("given", "change"), [*CHANGES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CHANGES)]
)
def test_settings_have_an_effect_on_the_policy(given: str, change: str, cache: Path, tmp_path: Path) -> None:
    before, after = aligned(cache, tmp_path, given), aligned(cache, tmp_path, given, change)
    # what the policy thinks of the selection pairs, whatever the loss makes of it
    assert before["val/logps/chosen"] != after["val/logps/chosen"]


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("", "data.micro_batch_size=3"),
        ("", "data.micro_batch_tokens=150"),
        pytest.param("method=dpo", "data.micro_batch_size=3", marks=pytest.mark.slow),
        pytest.param("method=dpo", "data.eval_batch_size=5", marks=pytest.mark.slow),
    ],
)
def test_the_size_of_a_forward_pass_does_not_change_the_policy(
    method: str, change: str, cache: Path, tmp_path: Path
) -> None:
    before, after = aligned(cache, tmp_path, method), aligned(cache, tmp_path, method, change)
    for key in before:
        if key.startswith(("train/", "val/")):
            assert after[key] == pytest.approx(before[key], rel=1e-5, abs=1e-5), key


# --- references ----------------------------------------------------------------------------------------------------


def test_precomputed_log_probs_train_like_a_frozen_copy(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "stored"
    precomputed = ["method=dpo", "reference=precomputed", f"reference.cache_dir={stored}"]
    frozen = aligned(cache, tmp_path, "method=dpo")
    first = job(tmp_path / "first", cache, *SMALL, *precomputed)
    for key in ("train/loss", "val/loss", "train/grad_norm", "val/rewards/margins"):
        assert first[key] == pytest.approx(frozen[key], abs=1e-5), key

    [file] = stored.glob("*.sqlite")
    whole = file.read_bytes()
    [(count, some)] = asked(file, "SELECT count(*), min(logp) FROM logps")
    assert re.search(rf"stored log-probs of {count} sequences, {count} of them new", capsys.readouterr().out)
    job(tmp_path / "second", cache, *SMALL, *precomputed, "seed=2", "beta=0.3")
    assert re.search(rf"stored log-probs of {count} sequences, 0 of them new", capsys.readouterr().out)
    assert file.read_bytes() == whole and list(stored.glob("*.sqlite")) == [file]

    place = whole.index(struct.pack(">d", some))
    file.write_bytes(whole[: place + 4] + bytes([whole[place + 4] ^ 0xFF]) + whole[place + 5 :])
    caplog.clear()
    assert job(tmp_path / "third", cache, *SMALL, *precomputed) == first
    assert "are damaged: computing them again" in caplog.text


def asked(file: Path, query: str) -> list[Any]:
    """Return the answers of the store of reference log-probs."""
    with closing(sqlite3.connect(file)) as database:
        return database.execute(query).fetchall()


def test_cached_log_probs_train_like_a_frozen_copy(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "stored"
    kept = ["method=dpo", "reference=cached", f"reference.cache_dir={stored}"]
    frozen = aligned(cache, tmp_path, "method=dpo")
    first = job(tmp_path / "first", cache, *SMALL, *kept)
    assert frozen.keys() == first.keys() and "val/kl" in first
    for key in ("train/loss", "val/loss", "train/grad_norm", "val/rewards/margins"):
        assert first[key] == pytest.approx(frozen[key], abs=1e-5), key
    [file] = stored.glob("*.sqlite")
    [(count,)] = asked(file, "SELECT count(*) FROM logps")
    capsys.readouterr()
    job(tmp_path / "second", cache, *SMALL, "method=dpo", "reference=precomputed", f"reference.cache_dir={stored}")
    counts = re.search(r"stored log-probs of (\d+) sequences, (\d+) of them new", capsys.readouterr().out)
    assert counts is not None and int(counts[1]) - int(counts[2]) == count > 0  # only those it had not come to


def test_the_reference_is_loaded_only_if_needed(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = job(tmp_path / "run", cache, *SMALL, "regularizer=none", "reference=none")
    assert re.search(r"reference +none", capsys.readouterr().out)
    start = history(tmp_path / "run")[0]
    assert "val/kl" not in start and "val/entropy" in start and metrics["eval/kl"] > 0
    frozen = aligned(cache, tmp_path, "regularizer=none")
    assert "val/kl" in frozen and {key: frozen[key] for key in metrics} == metrics


@pytest.mark.slow
def test_a_sweep_makes_one_reference_pass(cache: Path, tmp_path: Path) -> None:
    words = ["train", "-m", *SMALL, "logger=record", "method=dpo", "reference=precomputed"]
    words += ["seed=1,2", "beta=0.1,0.3", "optimizer.lr=0.001,0.002", f"reference.cache_dir={tmp_path / 'stored'}"]
    done = spo(*words, "hydra.sweep.dir=sweep", folder=tmp_path, cache=cache)
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 8
    assert len(list((tmp_path / "stored").glob("*.sqlite"))) == 1
    logs = [log.read_text() for log in (tmp_path / "sweep").glob("*/spo.log")]
    assert sum(log.count("scoring the pairs") for log in logs) == 1
    assert "damaged" not in done.stderr


def test_a_prompt_is_evaluated_even_if_its_pair_is_dropped(cache: Path) -> None:
    cfg = compose([f"paths.cache={cache}", *SMALL])
    prepared = prepare_run(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))
    used = {pair.prompt_id for pair in prepared.pairs.test}
    prompts = [prompt.prompt_id for prompt in prepared.sampling_prompts("test", cfg.data.max_new_tokens)]
    assert used < set(prompts) and len(prompts) == 64 and prompts == sorted(prompts)


# --- the default, in full ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """``spo train`` from an empty folder with a cold cache, and after it the baselines: the folder and the cache."""
    folder, cold = tmp_path_factory.mktemp("default"), tmp_path_factory.mktemp("cold")
    spo("train", "hydra.run.dir=spo", folder=folder, cache=cold)
    spo("train", "method=dpo", "hydra.run.dir=dpo", folder=folder, cache=cold)
    spo("train", "method=ipo", "hydra.run.dir=ipo", folder=folder, cache=cold)
    return folder, cold


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_default_beats_its_reference(method: str, defaults: tuple[Path, Path]) -> None:
    metrics = json.loads((defaults[0] / method / "metrics.json").read_text())
    check_names(metrics, method)
    assert metrics["eval/win_rate"] > {"spo": 0.77, "dpo": 0.75, "ipo": 0.72}[method]  # means of seeds: .82, .80, .79
    assert {len(row["references"]) for row in rows(defaults[0] / method / "samples.jsonl")} == {8}
    assert metrics["eval/reward"] > metrics["eval/reference/reward"]
    assert len(rows(defaults[0] / method / "samples.jsonl")) == 256


@pytest.mark.slow
def test_the_default_does_not_depend_on_the_cache(defaults: tuple[Path, Path]) -> None:
    folder, cache = defaults
    spo("train", "hydra.run.dir=warm", folder=folder, cache=cache)
    assert numbers(folder / "warm") == numbers(folder / "spo")
    assert history(folder / "warm") == history(folder / "spo")


# --- several processes ---------------------------------------------------------------------------------------------

TWO = ("strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
# Devices add up in an order of their own: what that changes in float32 may be enough to draw another token.
EXACTLY = "model.dtype=float64"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "strategy"), [("dpo", "ddp"), ("dpo", "fsdp")])
def test_two_devices_write_one_record(method: str, strategy: str, cache: Path, tmp_path: Path) -> None:
    words = ["train", TINY, "logger=record", f"method={method}", EXACTLY]
    spo(*words, f"strategy={strategy}", *TWO[1:], "hydra.run.dir=two", folder=tmp_path, cache=cache)
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    assert [row["step"] for row in history(tmp_path / "two")] == [0, 2, 4]
    if method == "dpo":
        one, two = job(tmp_path / "one", cache, TINY, "method=dpo", EXACTLY), numbers(tmp_path / "two")
        assert one.keys() - two.keys() <= {"policy/saved_gap"}  # Gathered weights are compared one by one instead.
        for key in one.keys() & two.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-4), key
        for name in ("samples.jsonl", "samples.selection.jsonl"):
            drawn = [[row["completion"] for row in rows(tmp_path / run / name)] for run in ("one", "two")]
            assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_two_devices_share_cached_log_probs(cache: Path, tmp_path: Path) -> None:
    words = ["train", TINY, "logger=record", "method=dpo", "reference=cached", f"reference.cache_dir={tmp_path}"]
    words += [EXACTLY]
    spo(*words, *TWO, "hydra.run.dir=two", folder=tmp_path, cache=cache)
    [file] = tmp_path.glob("*.sqlite")
    [(count,)] = asked(file, "SELECT count(*) FROM logps")
    one, two = job(tmp_path / "one", cache, TINY, "method=dpo", EXACTLY), numbers(tmp_path / "two")
    for key in one:
        if key.startswith(("train/", "val/")):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-4), key
    job(tmp_path / "again", cache, *words[1:])  # everything that one device needs is there
    assert asked(file, "SELECT count(*) FROM logps") == [(count,)]


@pytest.mark.slow
def test_jobs_run_side_by_side(cache: Path, tmp_path: Path) -> None:
    words = ["train", "-m", TINY, "launcher=joblib", "logger=record", "method=dpo,ipo", "hydra.sweep.dir=sweep"]
    spo(*words, folder=tmp_path, cache=cache)
    found = {path.parent.name: numbers(path.parent) for path in tmp_path.glob("sweep/*/metrics.json")}
    assert len(found) == 2
    for method in ("dpo", "ipo"):
        [name] = [name for name in found if f"method-{method}" in name]
        assert found[name] == job(tmp_path / method, cache, TINY, f"method={method}")
