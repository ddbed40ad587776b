"""Files of runs: their names, readers, writers and digests."""

from __future__ import annotations

import ast
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

import spo
from spo.errors import UserError
from spo.records import filenames
from spo.records.digests import code_version
from spo.records.files import flatten, read_json, read_jsonl, write_json, write_jsonl
from spo.records.operational_keys import EXECUTION_KEYS, OPERATIONAL_KEYS, is_operational, is_part_of_setting
from spo.records.sweep import SweepJob, read_jobs

ROOT = Path(spo.__file__).parent
NAMES = {value for key, value in vars(filenames).items() if key.isupper() and "." in value} - {".lock"}


def literals(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_file_names_are_written_in_one_place(file: Path) -> None:
    if file.name == "filenames.py":
        return
    repeated = {text for text in literals(file) if any(text == name or text.endswith(f"/{name}") for name in NAMES)}
    assert not repeated, "import spo.records.filenames instead"


def test_code_dependencies_exist_and_decide_the_version(tmp_path: Path) -> None:
    assert len({code_version(), code_version("ops"), code_version("types"), code_version("ops", "types")}) == 4
    with pytest.raises(ValueError, match=r"no such file or folder in the package: ops/nothing\.py"):
        code_version("types", "ops/nothing.py")


def test_modules_that_use_a_cache_list_existing_code() -> None:
    files = [file for file in ROOT.rglob("*.py") if "\nCODE_DEPENDENCIES = " in file.read_text()]
    assert len(files) == 7
    for file in files:
        module = ".".join(["spo", *file.relative_to(ROOT).with_suffix("").parts])
        code_version(*importlib.import_module(module).CODE_DEPENDENCIES)


def test_json_lines_hold_any_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": "one\u2028two\x85three\r"}, {"a": "\ud800", "b": math.pi}, {"a": "ä\n"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert "ä" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_files_hold_null_for_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "NaN")}], math.nan: 1}
    expected = {"a": None, "b": [1.5, None, {"c": [None, "NaN"]}], "nan": 1}
    write_json(tmp_path / "a.json", value)
    assert strict((tmp_path / "a.json").read_text()) == expected
    write_jsonl(tmp_path / "a.jsonl", [{"logp": -math.inf, "text": "\ud800"}, {"logp": -1.0}])
    rows = [strict(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [{"logp": None, "text": "\ud800"}, {"logp": -1.0}]


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_json_files_are_written_by_one_function(file: Path) -> None:
    """Nothing else passes the text of ``json.dumps`` to a file, where NaN would not be JSON."""
    if file.relative_to(ROOT).as_posix() == "records/files.py":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("write_text", "write", "json.dump")):
            assert "json.dump" not in ast.unparse(node), "use spo.records.files"


def test_damaged_json_lines_are_reported_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": ')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3: not a JSON object"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert read_json(file) is None
    write_json(file, {"path": Path("x")})
    assert read_json(file) == {"path": "x"}
    with pytest.raises(ValueError, match="Circular"):
        circular: list[Any] = []
        circular.append(circular)
        write_json(file, circular)
    assert read_json(file) == {"path": "x"} and [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_flatten_joins_keys() -> None:
    nested = {"a": {"b": {"c": 1}, "d": []}, "e": {}, 2: {"f": None}}
    assert flatten(nested) == {"a.b.c": 1, "a.d": [], "e": {}, "2.f": None}
    assert flatten({"a": {"b.c": {"d": 1}}}, "/") == {"a/b.c/d": 1}


def test_keys_below_an_operational_key_are_operational() -> None:
    assert is_operational("logger.wandb.project") and is_operational("speed") and is_operational("judge.timeout_s")
    assert not is_operational("judge.timeout") and not is_operational("judge") and not is_operational("speedy.a")
    assert not is_part_of_setting("speed.packing") and not is_part_of_setting("callbacks.health.p_eos")
    assert is_operational("trainer.devices") and is_operational("strategy.plugin") and not is_operational("trainer")
    assert is_part_of_setting("trainer.max_steps") and not OPERATIONAL_KEYS & EXECUTION_KEYS


def test_jobs_of_a_sweep_are_read(tmp_path: Path) -> None:
    assert read_jobs(tmp_path) == []
    job = {"overrides": ["seed=1"], "directory": "seed-1", "status": "failed", "same_as": None, "error": "x"}
    (tmp_path / "sweep.json").write_text(json.dumps({"command": "spo", "jobs": [job]}))
    assert read_jobs(tmp_path) == [SweepJob(["seed=1"], "seed-1", "failed", None, "x")]
