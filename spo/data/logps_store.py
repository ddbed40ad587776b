"""Log-probs of sequences under one model, kept in a file that runs and processes share."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import struct
import zlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock
from torch import Tensor

from spo.data.rows import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")
LOCK_TIMEOUT_S = 60
"""How long others may take with the file."""


def sequence_key(prompt: Sequence[int], completion: Sequence[int]) -> bytes:
    """What a completion of a prompt is found by: a digest of its very tokens."""
    ids = array("q", [len(prompt), *prompt, *completion])
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


class _Damaged(Exception):
    """A row is not what was written."""


class LogpsStore:
    """Summed log-probs by the key of their sequence.

    A write is one transaction, and survives the end of the process however it comes. Of several processes that score
    the same sequence the first one's value stays, so that all read the same number from then on. A damaged file is
    noticed, by a checksum of each row, and set aside; what was in it is unknown again.

    Args:
        file: an sqlite database, made where it is missing. Its rollback journal, unlike a write-ahead log, also works
            on the network file systems of clusters.
        dtype: of the log-probs. In float64, as which they are kept, both float32 and float64 are exact.
    """

    def __init__(self, file: Path, dtype: torch.dtype) -> None:
        self.file, self.dtype = file, dtype

    def get(self, keys: Sequence[bytes]) -> Tensor:
        """``(N,)`` what is known, in nats, on the host; NaN where nothing is.

        Raises:
            DataError: the file cannot be used.
        """

        def read(database: sqlite3.Connection) -> list[float]:
            query = "SELECT logp, checksum FROM logps WHERE key = ?"
            return [_checked(key, database.execute(query, [key]).fetchone()) for key in keys]

        return torch.tensor(self._use(read), dtype=self.dtype)

    def put(self, keys: Sequence[bytes], logps: Tensor) -> None:
        """Keeps ``(N,)`` log-probs, but for NaN; once it returns they survive the end of the process.

        Raises:
            DataError: the file cannot be used.
        """
        values = zip(keys, logps.tolist(), strict=True)
        rows = [(key, logp, _checksum(key, logp)) for key, logp in values if logp == logp]
        self._use(lambda database: database.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?, ?)", rows))

    def _use(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # One at a time: a file that is moved while others have it open lends its journal's name to the new one.
            with FileLock(f"{self.file}.use.lock", timeout=LOCK_TIMEOUT_S, poll_interval=0.005):
                try:
                    return self._open_and(work)
                except (sqlite3.DatabaseError, _Damaged) as error:
                    if isinstance(error, sqlite3.OperationalError):
                        raise
                    self._set_aside()
                    return self._open_and(work)
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"the reference log-probs in {self.file} cannot be read or written ({error}): move the file away, or "
                "set reference.cache_dir"
            ) from error

    def _open_and(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with closing(sqlite3.connect(self.file, timeout=LOCK_TIMEOUT_S)) as database, database:
            # A power failure may cost the file, which would be noticed, and no commit waits for the disk.
            database.execute("PRAGMA synchronous = OFF")
            database.execute(
                "CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, logp REAL NOT NULL, checksum INTEGER NOT NULL)"
            )
            return work(database)

    def _set_aside(self) -> None:
        aside = self.file.with_suffix(".damaged")
        log.warning("the reference log-probs in %s are damaged: computing them again (moved to %s)", self.file, aside)
        self.file.replace(aside)
        Path(f"{self.file}-journal").unlink(missing_ok=True)  # it would be played back into the new file


def _checksum(key: bytes, logp: float) -> int:
    return zlib.crc32(key + struct.pack("<d", logp))


def _checked(key: bytes, row: tuple[object, object] | None) -> float:
    if row is None:
        return float("nan")
    logp, checksum = row
    if not isinstance(logp, float) or _checksum(key, logp) != checksum:
        raise _Damaged
    return logp
