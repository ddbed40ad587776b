"""Run directories of version 0.1.0 evaluate, report, compare and resume, and their old names import.

``old_runs/0.1.0`` was made by these commands in an empty folder, the second of them killed after the checkpoint of
step 2. Reports, ``best.ckpt``, logs and the files of W&B were removed::

    spo train --config-dir conf +debug=smallest logger=record hydra.run.dir=outputs/finished
    spo train --config-dir conf +debug=smallest logger=record hydra.run.dir=outputs/interrupted
    spo train -m --config-dir conf +debug=smallest method=dpo,spo seed=1,2 hydra.sweep.dir=outputs/sweep

``conf/debug/smallest.yaml`` lies beside the runs, and ``targets.txt`` lists every ``_target_`` of that version's
configuration. The runs do not hold their reference model, so the tests make it again.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import get_object

from spo import cli
from spo._old_names import OLD_NAMES

OLD = Path(__file__).parent / "old_runs" / "0.1.0"
CODE = "0.1.0+c0818d445e68"
SAME_RUN = ("train", "--config-dir", "conf", "+debug=smallest", "logger=record")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of each run and the configuration that started it."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(OLD, folder / "outputs")
    (folder / "conf/debug").mkdir(parents=True)
    shutil.copy(OLD / "smallest.yaml", folder / "conf/debug")
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SPO_CACHE_DIR", str(folder / "cache"))
    yield
    torch.set_num_threads(threads)


def copied(name: str, to: Path) -> Path:
    return Path(shutil.copytree(OLD / name, to / name))


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "history.jsonl").read_text().splitlines()]


# --- commands ------------------------------------------------------------------------------------------------------


def test_old_runs_hold_their_code_version_and_no_machine_name() -> None:
    for file in OLD.rglob("identity.json"):
        assert read(file)["code"] == CODE
    for file in OLD.rglob("provenance.json"):
        assert read(file)["platform"] == "Linux"


def test_old_run_evaluates(folder: Path) -> None:
    run = folder / "outputs/finished"
    assert cli.main(["evaluate", str(run), "evaluation.num_prompts=4"]) == 0
    [found] = (run / "evaluations").glob("*/metrics.json")
    new, old = read(found), read(run / "metrics.json")
    assert {key for key in old if key.startswith("eval/")} <= new.keys()
    # The policy is stored and the reference is made again; their pairs give the numbers of that version.
    for key in ("eval/rewards/margins", "eval/rewards/accuracies"):
        assert new[key] == pytest.approx(old[key], rel=1e-2), key
    assert read(run / "provenance.json") == read(OLD / "finished/provenance.json")


def test_old_run_reports(folder: Path) -> None:
    run = folder / "outputs/finished"
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Soft Preference Optimization" in page and CODE in page


def test_old_sweep_compares_with_the_same_result(folder: Path) -> None:
    sweep = folder / "outputs/sweep"
    assert cli.main(["compare", str(sweep), "--out", str(folder / "compared")]) == 0
    old, new = read(sweep / "comparison/comparison.json"), read(folder / "compared/comparison.json")
    assert not new["problems"] and new["prompts"] == old["prompts"] and new["seeds"] == old["seeds"]
    assert [method["best"] for method in new["methods"]] == ["beta 0.1", "alpha 0.1, beta 0.1"]
    for before, after in zip(old["methods"], new["methods"], strict=True):
        assert after["name"] == before["name"]
        for key, numbers in before["metrics"].items():
            # Version 0.1 had other intervals; see the changelog.
            found = after["metrics"][key]
            assert found["value"] == pytest.approx(numbers["value"]), f"{before['name']}: {key}"
            if numbers["low"] is not None:
                assert found["low"] <= found["value"] <= found["high"], f"{before['name']}: {key}"


def test_interrupted_old_run_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied("interrupted", tmp_path)
    started = (run / "history.jsonl").read_text()
    assert steps(run) == [0, 2] and not (run / "metrics.json").exists()
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert steps(run) == [0, 2, 4] and (run / "history.jsonl").read_text().startswith(started)
    metrics, uninterrupted = read(run / "metrics.json"), read(OLD / "finished/metrics.json")
    # The seconds before the interruption are unknown: checkpoints of that version do not have them.
    assert uninterrupted.keys() - {"time/train_s"} <= metrics.keys() and "time/train_s" not in metrics
    assert all(map(math.isfinite, metrics.values()))
    # The uninterrupted run of that version has the same final loss; a run of the first steps alone would not.
    assert metrics["val/loss"] == pytest.approx(uninterrupted["val/loss"], rel=1e-2)
    code = _code_of_now()
    [note] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: code")]
    assert note == f"note: code {CODE} started this run; it continues at step 2 with code {code}"
    [continued] = read(run / "provenance.json")["continued_with"]
    assert continued["code"] == code and continued["step"] == 2 and continued["at"]
    assert read(run / "provenance.json")["code"] == read(run / "identity.json")["code"] == CODE


def test_finished_old_run_resumes_for_more_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied("finished", tmp_path)
    assert cli.main(["train", "--resume", str(run)]) == 0  # nothing is left to do
    assert "continued_with" not in read(run / "provenance.json")
    assert cli.main(["train", "--resume", str(run), "trainer.max_steps=6"]) == 0
    assert steps(run) == [0, 2, 4, 6]
    assert read(run / "metrics.4.json") == read(OLD / "finished/metrics.json")
    assert [one["step"] for one in read(run / "provenance.json")["continued_with"]] == [4]
    assert capsys.readouterr().err.count("note: code") == 1
    assert cli.main(["train", "--resume", str(run), "trainer.max_steps=7"]) == 0  # the same code adds no entry
    assert [one["step"] for one in read(run / "provenance.json")["continued_with"]] == [4]
    assert "note: code" not in capsys.readouterr().err


# Keys that the old version did not have, or gave another default.
NEW_KEYS = {
    f"  - {key}"
    for key in (
        "callbacks.checkpoint.every_n_steps",
        "callbacks.checkpoint.top_k",
        "alpha.value",
        "data.default_alpha",
        "data.default_reference_samples",
        "data.default_refresh_every",
        "data.default_round_prompts",
        "data.regime",
        "evaluation.policy",
        "evaluation.reference_samples",
        "evaluation.reference_seed",
        *(f"method.best_on.{regime}.{key}" for regime in ("few_pairs", "narrow") for key in ("beta", "lr")),
        "method.best_on.stories.beta",
        "method.best_on.stories.lr",
        "method.default_lr",
        "model.default_lr",
        "model.start",
        "regularizer.refresh_every",
        "callbacks.health.kl",
        "callbacks.health.kl_per_token",
        "callbacks.health.overfitting",
        "callbacks.nonfinite._target_",
        "callbacks.nonfinite.action",
        "callbacks.nonfinite.max_skipped",
        "data.num_pairs",
        "data.subset_seed",
        *(
            f"data.source.{key}"
            for key in ("label_noise", "responses", "temperature", "heroes", "problems", "num_unlabeled")
        ),
        "data.chat_template",
        "data.chat_template_kwargs",
        "data.split_special_tokens",
        "model.attn_implementation",
        "trainer.max_time",
        "optimizer._target_",
        "optimizer.decay_norm_and_bias",
        "regularizer.prompts",
        "scheduler.num_warmup_steps",
        "trainer.max_epochs",
    )
}


@pytest.mark.parametrize("name", ["finished", "interrupted"])
def test_repeated_command_fails_with_other_code(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied(name, tmp_path)
    assert cli.main([*SAME_RUN, f"hydra.run.dir={run}"]) == 1
    *keys, difference = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  - ")]
    assert {key.split(":")[0] for key in keys} == NEW_KEYS
    assert difference == f"  - the code of spo: {CODE} there, {_code_of_now()} now"
    assert read(run / "provenance.json") == read(OLD / name / "provenance.json")


def _code_of_now() -> str:
    return str(resolve_name("spo.records.digests.code_version")())


# --- names ---------------------------------------------------------------------------------------------------------


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "_target_")
        for value in node.values():
            yield from targets(value)


def test_every_target_of_old_runs_is_importable() -> None:
    listed = set((OLD / "targets.txt").read_text().split())
    held = {target for file in OLD.rglob("composed.yaml") for target in targets(yaml.safe_load(file.read_text()))}
    assert {target for target in held if target.startswith("spo.")} <= listed and len(listed) == 45
    for target in sorted(held | listed):
        assert callable(get_object(target)), target


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_name_imports_the_object_of_the_new_name(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"^{old} has moved to {OLD_NAMES[old]}; version 0.3"):
        _forget(old)
        found = import_module(old)
    assert found is resolve_name(OLD_NAMES[old])
    package, _, name = old.rpartition(".")
    namespace: dict[str, Any] = {}
    exec(f"from {package} import {name}", namespace)
    assert namespace[name] is found


def _forget(name: str) -> None:
    """Undo an import: Python looks for a name, and warns, only once in a process."""
    sys.modules.pop(name, None)
    parent, _, child = name.rpartition(".")
    vars(import_module(parent)).pop(child, None)


def test_deprecation_warning_points_at_the_import() -> None:
    _forget("spo.speed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import spo.speed  # type: ignore[import-not-found]  # noqa: F401
    assert [warning.filename for warning in caught if "spo.speed" in str(warning.message)] == [__file__]


def test_unknown_old_name_is_not_found() -> None:
    for name in ("spo.runtime.nothing", "spo.nothing"):
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
            import_module(name)
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from spo.reports.wording import nothing")
