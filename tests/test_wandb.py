"""What Weights & Biases is told: read out of the files that its client writes while offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.proto.wandb_internal_pb2 import Record

from tests.commands import SECRETS, Sweep, rows, sweep

HEADER, BLOCK, CHUNK = 7, 32 * 1024, struct.Struct("<IHB")
METHODS = ("spo", "dpo", "ipo")
WHOLE, LAST = 1, 4  # kinds of chunk that end a record


def records(file: Path) -> Iterator[Record]:
    """The records of a ``.wandb`` file: LevelDB's log format behind a header of its own."""
    data, at, parts = file.read_bytes(), HEADER, b""
    while at + CHUNK.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < CHUNK.size:
            at += left
            continue
        _, size, kind = CHUNK.unpack_from(data, at)
        at += CHUNK.size
        parts += data[at : at + size]
        at += size
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


class Offline:
    """The offline run of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        [file] = run_dir.glob("wandb/offline-run-*/*.wandb")
        self.folder, self.records = file.parent, list(records(file))
        [self.run] = [record.run for record in self.records if record.HasField("run")]

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run.config.update if item.key != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        logged = [record.history.item for record in self.records if record.HasField("history")]
        return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in logged]

    @property
    def summary(self) -> dict[str, Any]:
        items = [item for record in self.records if record.HasField("summary") for item in record.summary.update]
        return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@pytest.fixture
def swept(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(tmp_path_factory)


@pytest.fixture
def six(swept: Sweep) -> dict[tuple[str, int], Offline]:
    return {(method, seed): Offline(swept.directory(method, seed)) for method in METHODS for seed in (1, 2)}


def test_jobs_of_a_sweep_are_runs_of_one_group(six: dict[tuple[str, int], Offline]) -> None:
    assert len({offline.run.run_id for offline in six.values()}) == 6
    assert {offline.run.run_group for offline in six.values()} == {"sweep"}
    for (method, _), offline in six.items():
        assert offline.run.job_type == method and method in offline.run.tags


def test_names_carry_method_coefficients_and_seed(six: dict[tuple[str, int], Offline]) -> None:
    names = {key: offline.run.display_name for key, offline in six.items()}
    assert names["spo", 1] == "spo_alpha-0.1_beta-0.1_seed-1"
    assert names["dpo", 2] == "dpo_beta-0.1_seed-2"
    assert names["ipo", 1] == "ipo_beta-1_seed-1"
    assert len(set(names.values())) == 6


def test_the_config_is_the_resolved_one_with_provenance(swept: Sweep, six: dict[tuple[str, int], Offline]) -> None:
    for (method, seed), offline in six.items():
        run = swept.directory(method, seed)
        config = offline.config
        provenance = config.pop("provenance")
        assert config == yaml.safe_load((run / "config.yaml").read_text())
        assert provenance == json.loads((run / "provenance.json").read_text())


def test_curves_and_final_numbers_are_those_of_the_record(swept: Sweep, six: dict[tuple[str, int], Offline]) -> None:
    for (method, seed), offline in six.items():
        run = swept.directory(method, seed)
        shown: dict[int, dict[str, Any]] = {}
        for row in offline.history:
            if "trainer/global_step" in row:
                shown.setdefault(row["trainer/global_step"], {}).update(row)
        for row in rows(run / "history.jsonl"):
            step = row.pop("step")
            assert {key: shown[step].get(key) for key in row} == pytest.approx(row)
        final = json.loads((run / "metrics.json").read_text())
        assert {key: offline.summary.get(key) for key in final} == pytest.approx(final)


def test_samples_are_a_table(swept: Sweep, six: dict[tuple[str, int], Offline]) -> None:
    for (method, seed), offline in six.items():
        [file] = offline.folder.glob("files/media/table/samples*.table.json")
        table, samples = json.loads(file.read_text()), rows(swept.directory(method, seed) / "samples.jsonl")
        assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == samples


def test_no_secret_of_the_environment_is_written_anywhere(swept: Sweep) -> None:
    files = [file for file in swept.folder.rglob("*") if file.is_file()]
    assert len(files) > 60
    for file in files:
        content = file.read_bytes()
        assert all(secret.encode() not in content for secret in SECRETS.values()), file
    assert all(secret not in swept.done.stdout + swept.done.stderr for secret in SECRETS.values())
