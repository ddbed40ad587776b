"""The table and the figure of docs/iterations.md, on made-up iterations."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from tests.environments import ROOT
from tests.iterations import make_iteration


def test_seeds_are_averaged_from_the_lowest_to_the_highest_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    directories = [tmp_path / name for name in ("a", "b")]
    for directory, rate in zip(directories, (0.6, 0.8), strict=True):
        make_iteration(directory, 1)
        file = directory / "round-1" / "metrics.json"
        ends = {"eval/win_rate": rate, "eval/win_rate_ci_low": rate - 0.1, "eval/win_rate_ci_high": rate + 0.05}
        file.write_text(json.dumps(json.loads(file.read_text()) | ends))
    drawn = importlib.import_module("figures").main(["iterations", *map(str, directories), "--out", str(tmp_path)])
    assert drawn.read_bytes().startswith(b"\x89PNG")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| dpo")]
    assert len(rows) == 2 and "| 0.700 [0.500, 0.850] |" in rows[1]
