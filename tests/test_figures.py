"""The figures of docs/explanation/theory.md: their numbers on synthetic records, and their files from a real sweep."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import spo
from tests.environments import ROOT

SCRIPT = ROOT / "docs" / "figures.py"
PNG = b"\x89PNG\r\n\x1a\n"
MODELS = {"tabular": "spo.models.tabular.build", "tiny": "spo.models.tiny.build"}


@pytest.fixture(scope="module")
def figures() -> Any:
    specification = importlib.util.spec_from_file_location("figures", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["figures"] = module  # where its dataclass looks itself up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as `python docs/figures.py` does
        specification.loader.exec_module(module)
    return module


def write_run(folder: Path, metrics: dict[str, float], history: Sequence[dict[str, float]] = (), **config: Any) -> None:
    folder.mkdir(parents=True)
    source = {"num_symbols": 2, "num_pairs": config.pop("num_pairs", None)}
    whole = {
        "model": {"initial": {"_target_": MODELS[config.pop("model", "tabular")]}},
        "method": {"name": config.pop("method", "spo")},
        "regularizer": {
            "_target_": f"spo.regularizers.{config.pop('regularizer', 'NoRegularizer')}",
            "estimator": config.pop("estimator", None),
        },
        "data": {"source": source, "max_new_tokens": 3, "seed": config.pop("seed", 0)},
        "alpha": {"value": config.pop("alpha", 1.0)},
        "beta": {"value": config.pop("beta", 1.0)},
    }
    assert not config
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))


def drawn(figures: Any, tmp_path: Path, name: str, *sweeps: str) -> None:
    file = figures.main([name, *(str(tmp_path / sweep) for sweep in sweeps), "--out", str(tmp_path / "images")])
    assert file == tmp_path / "images" / f"{name}.png"
    assert file.read_bytes()[:8] == PNG and 5_000 < file.stat().st_size < 100_000


def test_labels_figure_fits_a_power_law(figures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        for pairs in (100, 400, 1600, 6400):
            distance = (1 + seed) * pairs**-0.5
            metrics = {"exact/tv": distance, "exact/kl_optimum": 2 * distance**2}
            write_run(tmp_path / "labels" / f"{seed}-{pairs}", metrics, seed=seed, num_pairs=pairs)
    drawn(figures, tmp_path, "labels", "labels")
    out = capsys.readouterr().out
    assert "total variation: slope -0.500" in out and "√(KL / 2): slope -0.500" in out
    assert figures.slope([1, 2, 4], [3, 12, 48]) == pytest.approx((2, 3))


def test_alpha_figure_compares_entropies(figures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sweep, method in (("alpha", "spo"), ("beta", "dpo")):
        for model in MODELS:
            for value in (0.1, 1.0, 10.0):
                reached = {"exact/entropy": value / 10 + 0.25, "exact/entropy_optimum": value / 10, "exact/tv": 0.125}
                write_run(tmp_path / sweep / f"{model}-{value}", reached, method=method, model=model, **{sweep: value})
    drawn(figures, tmp_path, "alpha", "alpha", "beta")
    out = capsys.readouterr().out
    assert "SPO, table of logits: 3 runs, largest difference of entropy 2.5e-01 nats" in out
    assert "DPO, transformer: 3 runs" in out and "largest total variation 1.2e-01" in out


def test_leak_figure_averages_over_worlds(figures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, end in ((0, 0.5), (1, 0.75)):
        for regularizer in ("NoRegularizer", "GlobalKL", "LocalKL"):
            history = [{"step": 0, "exact/mass_outside": 0.25}, {"step": 10, "exact/mass_outside": end}, {"step": 10}]
            write_run(tmp_path / "leak" / f"{seed}-{regularizer}", {}, history, seed=seed, regularizer=regularizer)
    drawn(figures, tmp_path, "leak", "leak")
    out = capsys.readouterr().out
    assert "tabular, spo, global_kl: outside 0.250 -> 0.625, change +0.375 (from +0.250 to +0.500)" in out


def test_kl_estimators_figure_prints_distances(
    figures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, tv in (("k2", 0.01), ("tokenwise", 0.1)):
        write_run(tmp_path / "kl" / name, {"exact/tv": tv}, regularizer="GlobalKL", estimator=name)
    drawn(figures, tmp_path, "kl_estimators", "kl")
    assert "tokenwise: total variation 0.1000 (from 0.1000 to 0.1000)" in capsys.readouterr().out


def test_folder_without_runs_raises(figures: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="does not contain a finished run"):
        figures.main(["labels", str(tmp_path), "--out", str(tmp_path)])


SMALL = {
    "alpha": ["experiment=exact/alpha", "model=tabular", "data.seed=0", "alpha.value=0.5,2"],
    "labels": ["experiment=exact/labels", "data.seed=0", "data.source.num_pairs=200,400"],
    "leak": ["experiment=exact/leak", "model=tabular", "data.seed=0", "method=spo", "regularizer=none,local_kl"],
    "kl_estimators": ["experiment=exact/kl_estimators", "data.seed=0", "regularizer.estimator=tokenwise,unbiased"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_figure_is_drawn_from_its_documented_sweep(name: str, tmp_path: Path) -> None:
    spo("train", *SMALL[name], "trainer.max_steps=20", folder=tmp_path, cache=tmp_path / "cache")
    words = [name, f"outputs/sweeps/exact_{name}", "--out", "images"]
    done = subprocess.run([sys.executable, SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "images" / f"{name}.png").read_bytes()[:8] == PNG
    assert len(list((tmp_path / "outputs" / "sweeps" / f"exact_{name}").glob("*/metrics.json"))) == 2
