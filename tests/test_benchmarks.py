"""The benchmarks at a toy size: what they compute, what they write, and what they refuse. No time is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from benchmarks import gpu, gpu_tests, hh_lengths, methods, scaling, step
from benchmarks.common import Ratio, alternate
from benchmarks.gpu_stages import STAGES, Bench, Fit, compare_fits
from benchmarks.utilization import forward_flops, real_work
from benchmarks.workloads import FILES, HH, SIZES, Clock, Data, Workload, find_data, statistics
from spo.config.compose import compose
from spo.data import TokenizedPair
from spo.errors import UserError
from spo.forward.head import base_model
from tests import benchmark_stages
from tests.environments import ROOT, run
from tests.fixtures import write_alpaca_like, write_hh_like


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    ratio = Ratio.of([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)  # the ratio of the medians would be 4
    assert ratio.entries("x") == {"x": 3.0, "x_range": [2.0, 4.0]}
    with pytest.raises(ValueError, match="at least one round"):
        Ratio.of([], [])
    with pytest.raises(ValueError):
        Ratio.of([1.0], [1.0, 2.0])


def test_each_round_has_every_contestant_once_in_an_order_of_its_own() -> None:
    calls: list[tuple[str, int]] = []

    def contestant(name: str) -> Callable[[int], float]:
        def measure(number: int) -> float:
            calls.append((name, number))
            return 10.0 * number + ord(name)

        return measure

    measured = alternate({name: contestant(name) for name in "abc"}, rounds=6, seed=1)
    assert measured == {name: [10.0 * number + ord(name) for number in range(6)] for name in "abc"}
    rounds = [[name for name, number in calls if number == i] for i in range(6)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert [number for _, number in calls] == sorted(number for _, number in calls)
    with pytest.raises(ValueError, match="rounds=0"):
        alternate({"a": contestant("a")}, rounds=0)


@pytest.mark.parametrize(("steps", "seconds"), [(4, 9.0), (10, 21.0), (20, 42.0)])
def test_a_step_bears_its_share_of_a_drawing(steps: int, seconds: float) -> None:
    clock = Clock()
    clock.seconds, clock.metrics = seconds, {"time/sampling_s": 1.0}
    assert clock.per_step(steps) == seconds / steps
    # steps of 2 s and drawings of 1 s: one in 4 or 10 steps, two in 20
    assert clock.per_step(steps, refresh_every=10) == pytest.approx(2.1)


def pair(prompt: int, chosen: int, rejected: int) -> TokenizedPair:
    ids = [tuple(range(n)) for n in (prompt, chosen, rejected)]
    return TokenizedPair(ids[0], ids[1], ids[2], "", "", "", prompt_id="")


def test_statistics_of_a_padded_batch_by_hand() -> None:
    found = statistics([pair(6, 2, 4), pair(1, 1, 2)])
    # rows of 8, 10, 2 and 3 tokens, all padded to 10; 14 of the 23 tokens are prompt
    assert found == {
        "prompt_tokens": 3.5,
        "completion_tokens": 2.25,
        "padding_share": pytest.approx(1 - 23 / 40),
        "prompt_share": pytest.approx(14 / 23),
    }


def test_made_up_pairs_have_the_stated_lengths(tmp_path: Path) -> None:
    HH.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    logs = {name: torch.tensor([float(len(row[name].split())) for row in rows]).log() for name in rows[0]}
    for name, (mean, spread) in {"prompt": HH.prompt, "chosen": HH.completion, "rejected": HH.completion}.items():
        assert float(logs[name].mean()) == pytest.approx(mean, abs=0.1), name
        assert float(logs[name].std()) == pytest.approx(spread, abs=0.1), name


def test_missing_file_is_reported_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPO_DATA_DIR", str(tmp_path))
    data = find_data("hh", tmp_path / "cache")
    assert data.name == "synthetic" and data.path.is_file()
    assert capsys.readouterr().out.splitlines() == [
        f"{FILES['hh']} is not in SPO_DATA_DIR: using made-up pairs with the lengths of HH"
    ]
    (tmp_path / FILES["hh"]).touch()
    assert find_data("hh", tmp_path / "cache").path == tmp_path / FILES["hh"]


@pytest.mark.parametrize(("name", "least", "most"), [("1m", 0.8e6, 1.2e6), ("10m", 9e6, 11e6)])
def test_sizes_are_what_they_are_called(name: str, least: float, most: float) -> None:
    state = torch.random.get_rng_state()
    model = SIZES[name].model()
    assert least < sum(parameter.numel() for parameter in model.parameters()) < most
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Small files in the place of the published ones."""
    write_hh_like(tmp_path / FILES["hh"], 80, seed=0)
    write_alpaca_like(tmp_path / FILES["alpaca_eval"], 80, seed=0)
    return tmp_path


def run_module(name: str, *words: str, **variables: str) -> None:
    """``python -m benchmarks.NAME WORDS``, which must succeed."""
    run(["python", "-m", f"benchmarks.{name}", *words], ROOT, **variables)


OPTIONS = ("--rounds", "2", "--steps", "2", "--threads", "1")


def check(result: dict[str, Any], data: str) -> None:
    assert result["data"] == data and result["rounds"] == 2
    assert 0 <= result["agreement"] < 1e-4
    assert result["trl_step_s"] > 0
    assert 0 < result["spo_sample_tokens"] <= 128
    for key in ("ratio_dpo", "ratio_spo", "spo_over_dpo"):
        low, high = result[f"{key}_range"]
        assert 0 < low <= result[key] <= high, key


def test_against_trl(
    files: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.setenv("SPO_DATA_DIR", str(files))
    monkeypatch.setenv("SPO_CACHE_DIR", str(cache_dir))
    result = step.main(["--size", "toy", "--data", "hh", *OPTIONS, "--json", str(files / "result.json")])
    check(result, "hh")
    assert json.loads((files / "result.json").read_text()) == result
    assert result["environment"]["threads"] == 1
    out = capsys.readouterr().out
    assert -1 < out.find("agreement: ") < out.find("seconds per step") < out.find("ratio_dpo: ")


def test_use_of_the_device_by_hand(files: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = find_data("synthetic", cache_dir)
    workload = Workload(SIZES["toy"], data, steps=2, threads=1, cache=cache_dir)
    parts = workload.started("method=dpo")
    windows = workload.windows(parts, seed=0)
    works = [real_work([batch.sequences for batch in window]) for window in windows]
    pairs = [workload.pairs([window]) for window in windows]
    lengths = [sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids or ()) for p in step_) for step_ in pairs]
    assert [work.tokens for work in works] == lengths
    monkeypatch.setattr(step, "matmul_rate", lambda device: 1e9)
    found = step.on_device(workload, works, {"x": 2.0})
    assert found["tokens_per_s"] == {"x": pytest.approx(sum(lengths) / 4)}
    flops = sum(forward_flops(parts.module.policy.config, work) for work in works) / 2
    assert found["utilization"] == {"x": pytest.approx(4 * flops / 2e9)}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param("alpaca_eval", marks=pytest.mark.nightly),
        pytest.param("synthetic", marks=pytest.mark.slow),
    ],
)
def test_the_command(data: str, files: Path, cache_dir: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    out = files / "result.json"
    options = ["--size", "toy", "--data", data, *OPTIONS, "--trl-defaults", "--profile", "--json", str(out)]
    run_module("step", "--against", "trl", *options, SPO_CACHE_DIR=str(cache_dir), SPO_DATA_DIR=str(files))
    result = json.loads(out.read_text())
    check(result, data)
    assert 0 < result["matrix_product_share_dpo"] < 1
    assert result["ratio_trl_defaults"] > 0


@pytest.mark.nightly
def test_ablation_switches_off_one_key_at_a_time(files: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPO_DATA_DIR", str(files))
    monkeypatch.setenv("SPO_CACHE_DIR", str(cache_dir))
    options = ("--ablation", "--size", "toy", "--data", "hh", "--rounds", "1", "--steps", "2", "--threads", "1")
    result = step.main([*options, "--json", str(files / "result.json")])
    names = ["as it comes", *step.speed_ups(), "all switched off"]
    for method in ("DPO", "SPO"):
        rows = result["ablation"][method]
        assert list(rows) == names
        assert rows["as it comes"]["slower"] == 1
        assert all(row["step_s"] > 0 for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("key", methods.method_keys("all"))
def test_a_step_runs_the_policy_once(key: str, cache_dir: Path) -> None:
    data = methods.with_columns(find_data("synthetic", cache_dir), cache_dir, pairs=100)
    workload = methods.workload_of(key, SIZES["toy"], data, steps=1, threads=1, cache=cache_dir)
    overrides = [word for word in workload.overrides if not word.startswith("regularizer.")]
    parts, calls = workload.parts(*overrides, "regularizer=none"), []
    base_model(parts.module.policy).register_forward_pre_hook(lambda *_: calls.append(1))
    # Before the first step, the model is probed for packed rows.
    counting = LambdaCallback(on_train_batch_start=lambda *_: calls.clear())
    parts.trainer.callbacks.append(counting)  # type: ignore[attr-defined]
    parts.trainer.fit(parts.module, datamodule=parts.data)
    assert len(calls) == 1


def test_steps_of_methods_are_compared_with_those_of_dpo(
    files: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPO_DATA_DIR", str(files))
    monkeypatch.setenv("SPO_CACHE_DIR", str(cache_dir))
    words = ["--methods", "kto,mrpo", "--size", "toy", "--data", "hh", *OPTIONS, "--json", str(files / "result.json")]
    result = step.main(words)
    assert json.loads((files / "result.json").read_text()) == result
    assert [*result["methods"]] == ["dpo", "kto", "mrpo"] and result["methods"]["dpo"]["over_dpo"] == 1
    assert all(len(times) == 2 and min(times) > 0 for times in result["seconds"].values())
    assert "| `kto` | " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no method dpoo"):
        step.main(["--methods", "dpoo", "--size", "toy"])


def test_every_key_that_differs_from_plain_is_switched_off_by_itself() -> None:
    overrides = step.speed_ups()
    plain = compose(["speed=plain"], run_dir=".").speed
    default = compose([], run_dir=".").speed
    assert set(overrides) == {f"{key} off" for key in plain if plain[key] != default[key]}
    for name, [override] in overrides.items():
        key = name.removesuffix(" off")
        changed = compose([override], run_dir=".").speed
        assert {other for other in plain if changed[other] != default[other]} == {key}
        assert changed[key] == plain[key]


def test_curves_are_of_what_they_say() -> None:
    curves = scaling.curves()
    for point in curves["prompt_share"].points:
        assert point.prompt + point.completion == scaling.LENGTH
        assert point.prompt / scaling.LENGTH == pytest.approx(point.x, abs=0.01)
    assert {point.vocabulary for point in curves["vocabulary"].points} == {8192, 32768, 131072, 262144}
    assert all(point.refresh_every == point.x for point in curves["refresh_every"].points)
    assert {point.line for point in curves["batch"].points} == {"DPO", "DPO, speed=plain"}


@pytest.mark.slow
def test_scaling_measures_and_draws(tmp_path: Path, cache_dir: Path) -> None:
    out, plots = tmp_path / "result.json", tmp_path / "plots"
    options = ["--only", "num_samples", "--threads", "1", "--json", str(out), "--plot", str(plots)]
    run_module("scaling", *options, SPO_CACHE_DIR=str(cache_dir))
    rows = json.loads(out.read_text())["curves"]["num_samples"]
    assert [row["x"] for row in rows] == [4, 8, 16, 32]
    assert all(row["step_s"] > 0 and row["memory_mib"] > 0 for row in rows)
    assert rows[-1]["memory_mib"] > rows[0]["memory_mib"]  # eight times the samples are held and scored
    assert [file.name for file in plots.iterdir()] == ["performance_spo.png"]


@pytest.mark.nightly
def test_a_sweep_prepares_once(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    run_module("sweep_cost", "--jobs", "2", "--json", str(out))
    result = json.loads(out.read_text())
    assert result["jobs"] == 2
    assert (result["sweep_models"], result["separate_models"]) == (1, 2)
    assert result["sweep_prepare_s"] > 0 and result["separate_prepare_s"] > 0
    assert result["ratio"] == pytest.approx(result["separate_s"] / result["sweep_s"])


def test_workload_that_needs_a_gpu_is_rejected_with_a_message(
    files: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = find_data("synthetic", cache_dir)
    with pytest.raises(UserError, match="needs a CUDA device, and there is none here: choose --size 1m or 10m"):
        Workload(SIZES["1b"], data, steps=2, threads=1, cache=cache_dir)


# --- what is measured on a GPU -------------------------------------------------------------------------------------


def test_stored_lengths_are_those_of_hh() -> None:
    stored = hh_lengths.stored_lengths()
    about = json.loads(hh_lengths.FILE.read_text())
    assert len(stored) == hh_lengths.STORED_PAIRS and hh_lengths.means(stored) == about["means"]
    assert about["means"] == pytest.approx(about["means_of_all_pairs"], rel=0.02)
    assert stored == sorted(stored, key=lambda one: (sum(one), one))
    assert all(min(one) > 0 and one[0] + max(one[1:]) <= 512 for one in stored)


def test_evenly_spaced_lengths_by_hand() -> None:
    lengths = [(n, 1, 1) for n in (8, 3, 5, 1, 7, 2, 6, 4)]
    assert hh_lengths.evenly_spaced(lengths, 4) == [(2, 1, 1), (4, 1, 1), (6, 1, 1), (8, 1, 1)]
    assert hh_lengths.evenly_spaced(lengths, 8) == sorted(lengths)


def test_random_pairs_have_stored_lengths_and_follow_from_the_seed() -> None:
    pairs = hh_lengths.random_pairs(200, vocabulary=50, seed=1)
    stored = set(hh_lengths.stored_lengths())
    lengths = [(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids or ())) for p in pairs]
    assert set(lengths) <= stored and len(set(lengths)) > 100
    ids = {token for p in pairs for token in (*p.prompt_ids, *p.chosen_ids, *(p.rejected_ids or ()))}
    assert ids == set(range(3, 50))
    assert pairs == hh_lengths.random_pairs(200, vocabulary=50, seed=1)
    assert pairs != hh_lengths.random_pairs(200, vocabulary=50, seed=2)


@pytest.mark.slow
def test_lengths_are_made_again_from_the_data() -> None:
    path = Path(os.environ.get("SPO_DATA_DIR", "")) / FILES["hh"]
    if not path.is_file():
        pytest.skip("no SPO_DATA_DIR")
    made = hh_lengths.describe(hh_lengths.measured_lengths(Data("hh", path)))
    assert [list(one) for one in made.pop("lengths")] == json.loads(hh_lengths.FILE.read_text()).pop("lengths")
    assert made.items() <= json.loads(hh_lengths.FILE.read_text()).items()


SETTINGS = gpu.Settings(device="cpu", size="toy", pairs=4, rounds=2, steps=3)


def test_a_stage_that_fails_or_dies_or_hangs_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 0.0)
    out = tmp_path / "result.json"
    names = ["tests", "steps", "steps again", "sampler", "attention", "compile", "last"]
    monkeypatch.setattr(gpu, "BUDGETS_S", dict.fromkeys(names, 60.0) | {"compile": 4.0})
    result = gpu.run_stages(names, SETTINGS, time.monotonic() + 300, str(out), benchmark_stages.serve)
    assert json.loads(out.read_text()) == result
    stages = result["stages"]
    assert stages["tests"] == {"status": "skipped", "error": "no accelerator"}
    assert stages["steps"]["result"] == {"stages_of_process": 1}
    assert stages["steps again"]["result"] == {"stages_of_process": 2}
    found = {name: (stages[name]["status"], stages[name]["error"]) for name in ("sampler", "attention", "compile")}
    assert found == {
        "sampler": ("failed", "RuntimeError: no luck"),
        "attention": ("failed", "its process ended with status 9"),
        "compile": ("failed", "stopped after 4 s"),
    }
    assert stages["sampler"]["result"] == {"half": 3}  # what was measured before the error stays
    assert stages["attention"]["result"] == {"half": 1}
    assert stages["last"]["status"] == "done" and stages["last"]["result"] == {"stages_of_process": 1}
    assert result["environment"] == {"device": "cpu"}


def test_without_time_every_stage_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    gpu.main(["--device", "cpu", "--minutes", "0.01", "--json", str(out)])
    stages = json.loads(out.read_text())["stages"]
    assert list(stages) == ["tests", *STAGES] == list(gpu.BUDGETS_S)
    assert all(entry["status"] == "skipped" and "out of time" in entry["error"] for entry in stages.values())
    assert capsys.readouterr().out.count("skipped") == len(stages)


def test_a_contestant_that_fails_is_replaced_and_the_others_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(SETTINGS)
    monkeypatch.setattr(bench, "facts", dict)
    monkeypatch.setitem(vars(bench), "matmul_flops_per_s", 100.0)
    calls: list[tuple[str, int]] = []

    def contestant(name: str, seconds: float, fails_in: int | None = None) -> Callable[[Bench, int], Fit]:
        def fit(_: Bench, number: int) -> Fit:
            calls.append((name, number))
            if number == fails_in:
                raise RuntimeError(f"{name} is broken")
            return Fit([seconds, 3 * seconds], [10, 30], [100, 300], 1.0, 7 + number, {"packed": True})

        return fit

    def absent(_: Bench, number: int) -> Fit:
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    contestants = {"a": contestant("a", 1.0), "b": contestant("b", 2.0, 0), "c": contestant("c", 2.0, 1), "d": absent}
    reports: list[str] = []
    result = compare_fits(
        bench,
        contestants,
        {"ratio": ("c", "a"), "none": ("b", "a")},
        {"b": ("b, padded", contestant("b, padded", 4.0))},
        lambda new: reports.append(json.dumps(new)),
        until=float("inf"),
    )
    arms = result["arms"]
    assert calls[:4] == [("a", 0), ("b", 0), ("b, padded", 0), ("c", 0)]
    assert sorted(calls[4:]) == [("a", 1), ("b, padded", 1), ("c", 1)]
    assert arms["b"] == {"status": "failed", "error": "RuntimeError: b is broken"}
    assert arms["d"] == {"status": "skipped", "error": "trl is not installed"}
    assert (arms["c"]["status"], arms["c"]["rounds"]) == ("failed", 1)  # its first round stays
    assert arms["a"] == {
        "status": "done",
        "rounds": 2,
        "step_s": 2.0,
        "step_s_range": [1.0, 3.0],
        "warm_up_s": [1.0, 1.0],
        "tokens_per_s": 10.0,
        "utilization": 1.0,
        "peak_bytes": 8,
        "packed": True,
        "seconds": [[1.0, 3.0], [1.0, 3.0]],
    }
    assert result["ratio"] == 2.0 and "none" not in result
    assert len(reports) == 1 + 7 and reports[1] != reports[2]
    with pytest.raises(RuntimeError, match="a: RuntimeError: a is broken"):
        compare_fits(bench, {"a": contestant("a", 1.0, 0)}, {}, {}, lambda new: None, until=float("inf"))
    calls.clear()
    compare_fits(bench, {"a": contestant("a", 1.0), "c": contestant("c", 1.0)}, {}, {}, lambda new: None, until=0.0)
    assert calls == [("a", 0)]  # out of time after the first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "3m"}, "--size 3m: choose one of toy, 1m"),
        ({"size": "1b"}, "--size 1b needs a GPU: choose --size toy"),
        ({"steps": 2}, "--steps 2: the first 2 steps do not count"),
    ],
)
def test_impossible_settings_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Bench(replace(SETTINGS, **changes))


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path: Path, cache_dir: Path) -> None:
    """The result file shows results of a stage while it runs, and at the end those of all stages."""
    pytest.importorskip("trl", reason="trl is not installed")
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "8", "--json", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "SPO_CACHE_DIR": str(cache_dir)})
    seen: dict[str, Any] = {}
    while process.poll() is None:
        if out.exists() and "arms" in (steps := json.loads(out.read_text())["stages"]["steps"]).get("result", {}):
            seen.setdefault(steps["status"], steps["result"]["arms"].keys() & {"spo: DPO", "spo: SPO"})
        time.sleep(0.05)
    assert process.returncode == 0
    assert "running" in seen and seen["done"] == {"spo: DPO", "spo: SPO"}
    result = json.loads(out.read_text())
    stages = {name: entry.get("result", {}) for name, entry in result["stages"].items()}
    assert {name: entry["status"] for name, entry in result["stages"].items()} == {
        "tests": "skipped",
        **dict.fromkeys(STAGES, "done"),
    }
    assert result["settings"]["size"] == "toy" and result["environment"]["device"]
    arms = stages["steps"]["arms"]
    assert list(arms) == ["spo: DPO", "TRL: DPO", "spo: SPO"]
    for arm in (*arms.values(), *stages["compile"]["arms"].values()):
        low, high = arm["step_s_range"]
        assert 0 < low <= arm["step_s"] <= high
        assert arm["tokens_per_s"] > 0 and 0 < arm["utilization"] < 1
    assert all(stages["steps"][key] > 0 for key in ("ratio_dpo", "ratio_spo", "spo_over_dpo"))
    assert stages["compile"]["ratio"] > 0
    assert stages["steps"]["weights"] == "float32" and 100 < stages["steps"]["prompt_tokens"] < 130
    assert stages["sampler"]["agreement"] == 1 and stages["sampler"]["ratio"] > 0
    variants = stages["attention"]["variants"]
    for name in ("sdpa, padded", "groups, packed"):
        differences = [value for key, value in variants[name].items() if key.endswith("_difference")]
        assert len(differences) == 4 and max(differences) < 1e-5 and variants[name]["backward_s"] > 0
    assert variants["flex, packed"]["output_difference"] < 1e-5  # it has no backward pass on a CPU


@pytest.mark.slow
def test_a_gpu_that_is_not_there(tmp_path: Path, cache_dir: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--minutes", "8", "--only", "tests", "steps", "--json", str(out)]
    variables = {"SPO_CACHE_DIR": str(cache_dir), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables})
    assert done.returncode == 1
    stages = json.loads(out.read_text())["stages"]
    assert (stages["tests"]["status"], stages["tests"]["error"]) == ("skipped", "no accelerator")
    assert stages["tests"]["result"]["counts"]["skipped"] > 10
    assert (stages["steps"]["status"], stages["steps"]["error"][:31]) == ("failed", "this size needs a CUDA device, ")


NOISY_TEST = """
import logging

import pytest


@pytest.mark.gpu
def test_noisy() -> None:
    for _ in range(1000):
        logging.getLogger("noise").error("a line that a library logs")
    raise RuntimeError("the device is gone")
"""


def test_failure_of_a_gpu_test_is_recorded_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can ask again: what libraries log must not drive the trace out of the result."""
    file = tmp_path / "tests" / "test_noisy.py"
    file.parent.mkdir()
    file.write_text(NOISY_TEST)
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = gpu_tests.run_gpu_tests(60)
    line = NOISY_TEST.splitlines().index('    raise RuntimeError("the device is gone")') + 1
    message = f"{file}:{line}: RuntimeError: the device is gone"
    assert found["failures"] == {"tests/test_noisy.py::test_noisy": message}
    assert found["counts"] == {"failed": 1} and found["exit_status"] == 1
    assert 'raise RuntimeError("the device is gone")' in found["output"]
