"""Reader of the files that the client of W&B writes offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, CHUNK = 7, 32 * 1024, struct.Struct("<IHB")
WHOLE, LAST = 1, 4  # types of chunks that end a record


def records(file: Path) -> Iterator[Record]:
    """Yield the records of a ``.wandb`` file: LevelDB's log format after a header."""
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
    """The offline W&B run of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        [file] = run_dir.glob("wandb/offline-run-*/*.wandb")
        self.name, self.folder, self.records = file.name, file.parent, list(records(file))
        [self.run] = [record.run for record in self.records if record.HasField("run")]

    def of_kind(self, kind: str) -> list[Any]:
        """Return the records of a kind, such as ``alert`` or ``artifact``."""
        return [getattr(record, kind) for record in self.records if record.HasField(kind)]

    def table(self, key: str, at: int = -1) -> list[dict[str, Any]]:
        """Return the rows of a table, as the history shows it the last time or another time."""
        shown = [row[f"{key}/path"] for row in self.history if f"{key}/path" in row]
        table = json.loads((self.folder / "files" / shown[at]).read_text())
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]

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
