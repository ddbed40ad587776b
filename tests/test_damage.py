"""Every file of a run, damaged in every way, under every command: healed, or an error in words, and nothing lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from spo import cli
from tests.test_disk import EXACT

RUN = "sweep/run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with two finished runs of a sweep, in ``sweep``."""
    folder = tmp_path_factory.mktemp("damage")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPO_CACHE_DIR", str(folder / "cache"))
        for seed, name in enumerate(("run", "other")):
            assert cli.main(["train", *EXACT, f"seed={seed}", f"hydra.run.dir={folder / 'sweep' / name}"]) == 0
    yield folder
    torch.set_num_threads(threads)


def missing(file: Path) -> None:
    file.unlink(missing_ok=True)


def half(file: Path) -> None:
    content = file.read_bytes() if file.exists() else b"{"
    file.write_bytes(content[: len(content) // 2])


def folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def of_another_shape(file: Path) -> None:
    file.write_text('{"config": 1, "inputs": 2, "plugins": [], "step": "x", "error": 3, "attempts": "x", "jobs": 3}\n')


def a_list(file: Path) -> None:
    file.write_text("[1, 2]\n")


def not_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00\x81")


DAMAGES = (missing, half, of_another_shape, a_list, not_text, folder)
FILES = (
    "history.jsonl",
    "provenance.json",
    "samples.jsonl",
    "coefficients.json",
    "metrics.json",
    "composed.yaml",
    "config.yaml",
    "identity.json",
    ".lock",
    "failure.json",
    "health.json",
    "report.html",
    "sweep.json",
)
READ_BY_EVALUATE = ("coefficients.json", "composed.yaml", "config.yaml", "identity.json")
# Commands that cannot do without a file; with any other they end well, unless a folder is in its place.
NEEDED = {"composed.yaml": {"resume", "evaluate"}, "identity.json": {"resume", "evaluate"}, ".lock": set()}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_heals_or_is_an_error_in_words(
    name: str,
    damage: Callable[[Path], None],
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SPO_CACHE_DIR", str(runs / "cache"))
    monkeypatch.chdir(tmp_path)
    same = ("train", *EXACT, "seed=0", f"hydra.run.dir={tmp_path / RUN}")
    commands = {
        "report": ("report", RUN),
        "compare": ("compare", "sweep", "--anyway", "--metric", "eval/entropy", "--out", "compared"),
        "evaluate": ("evaluate", RUN),
        "resume": ("train", "--resume", RUN),
        "train": same,
        "train an unfinished run": same,
    }
    for command, words in commands.items():
        if command == "evaluate" and name not in READ_BY_EVALUATE:
            continue
        shutil.rmtree(tmp_path / "sweep", ignore_errors=True)
        shutil.copytree(runs / "sweep", tmp_path / "sweep")
        if "unfinished" in command:
            (tmp_path / RUN / "metrics.json").unlink()
        damage(tmp_path / ("sweep" if name == "sweep.json" else RUN) / name)
        kept = {path: path.read_bytes() for path in (tmp_path / RUN / "policy").iterdir()}
        status = cli.main(list(words))  # A traceback would be raised here.
        messages = capsys.readouterr().err
        assert status == 0 or f"{name}" in messages.partition("spo: ")[2] or command == "compare", messages
        if damage is not folder and command in ("report", "train"):
            assert status == 0, messages
        if command in NEEDED.get(name, ()) and damage not in (half, of_another_shape):
            assert (status == 1) == (name == "composed.yaml" or damage is missing), messages
        assert all(path.read_bytes() == content for path, content in kept.items())
