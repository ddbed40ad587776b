"""Log-probs of sequences under one model, in a file that runs and processes share."""

from __future__ import annotations

import hashlib
import sqlite3
import struct
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spo.errors import DataError
from spo.records.store import DamagedRowError, SharedStore


def sequence_key(prompt: Sequence[int], completion: Sequence[int]) -> bytes:
    """Return the key of a completion of a prompt: a digest of its token ids."""
    ids = array("q", [len(prompt), *prompt, *completion])
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


class LogpsStore(SharedStore):
    """Summed log-probs by the key of their sequence.

    Of several processes that score the same sequence the first one's value stays, so that all read the same number from
    then on. A checksum of each row detects damage.

    Args:
        file: SQLite file, created where it is missing.
        dtype: Type of the log-probs. The file holds float64, which represents float32 exactly.
    """

    schema = "CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, logp REAL NOT NULL, checksum INTEGER NOT NULL)"
    content = "reference log-probs"
    location_key = "reference.cache_dir"
    error = DataError
    recomputable = True

    def __init__(self, file: Path, dtype: torch.dtype) -> None:
        super().__init__(file)
        self.dtype = dtype

    def get(self, keys: Sequence[bytes]) -> Tensor:
        """Return the ``(N,)`` log-probs in nats, on the host; NaN where a sequence is unknown.

        Raises:
            DataError: The file cannot be used.
        """
        return self._tensor(self.transact(lambda database: _read(database, keys), reads=True))

    def put(self, keys: Sequence[bytes], logps: Tensor) -> Tensor:
        """Store ``(N,)`` log-probs, except NaN, and return those that are stored now, as :meth:`get` does.

        Raises:
            DataError: The file cannot be used.
        """
        values = zip(keys, logps.tolist(), strict=True)
        # NaN is the only value that differs from itself.
        rows = [(key, logp, _checksum(key, logp)) for key, logp in values if logp == logp]

        def write(database: sqlite3.Connection) -> list[float]:
            database.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?, ?)", rows)
            return _read(database, keys)

        return self._tensor(self.transact(write))

    def _tensor(self, logps: list[float]) -> Tensor:
        return torch.tensor(logps, dtype=self.dtype)


def _read(database: sqlite3.Connection, keys: Sequence[bytes]) -> list[float]:
    query = "SELECT logp, checksum FROM logps WHERE key = ?"
    return [_checked(key, database.execute(query, [key]).fetchone()) for key in keys]


def _checksum(key: bytes, logp: float) -> int:
    return zlib.crc32(key + struct.pack("<d", logp))


def _checked(key: bytes, row: tuple[object, object] | None) -> float:
    if row is None:
        return float("nan")
    logp, checksum = row
    if not isinstance(logp, float) or _checksum(key, logp) != checksum:
        raise DamagedRowError
    return logp
