"""An SQLite file of numbers that runs and processes share."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import ClassVar, TypeVar

from filelock import FileLock

log = logging.getLogger(__name__)
T = TypeVar("T")
LOCK_TIMEOUT_S = 60
"""Seconds to wait for other processes that use the file."""


class DamagedRowError(Exception):
    """A row does not match its checksum."""


class SharedStore:
    """One table in an SQLite file, created where it is missing.

    A write is one transaction and survives the end of the process. The rollback journal, unlike a write-ahead log, also
    works on the network file systems of clusters.

    Args:
        file: SQLite file.

    Attributes:
        schema: Statement that creates the table.
        content: Plural noun for messages, such as "reference log-probs".
        location_key: Configuration key that places the file elsewhere.
        error: Exception to raise where the file cannot be used.
        recomputable: Whether the content is cheap to compute again. If so, a commit does not wait for the disk, and a
            damaged file is moved to ``*.damaged`` with a warning, after which its content counts as unknown.
    """

    schema: ClassVar[str]
    content: ClassVar[str]
    location_key: ClassVar[str]
    error: ClassVar[type[Exception]]
    recomputable: ClassVar[bool]

    def __init__(self, file: Path) -> None:
        self.file = file

    def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` in one transaction and return its result.

        Raises:
            Exception: The file cannot be read or written; the type is :attr:`error`.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # One process at a time: if others had the file open while it is moved, its journal would be taken for
            # that of the new file.
            with FileLock(f"{self.file}.use.lock", timeout=LOCK_TIMEOUT_S, poll_interval=0.005):
                try:
                    return self._run(work)
                except (sqlite3.DatabaseError, DamagedRowError) as error:
                    if not self.recomputable or isinstance(error, sqlite3.OperationalError):
                        raise
                    self._move_aside()
                    return self._run(work)
        except (sqlite3.Error, OSError) as error:
            raise self.error(
                f"the {self.content} in {self.file} cannot be read or written ({error}): move the file away, or set "
                f"{self.location_key}"
            ) from error

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with closing(sqlite3.connect(self.file, timeout=LOCK_TIMEOUT_S)) as database, database:
            if self.recomputable:
                # A power failure may damage the file, which the next read would detect.
                database.execute("PRAGMA synchronous = OFF")
            database.execute(self.schema)
            return work(database)

    def _move_aside(self) -> None:
        aside = self.file.with_suffix(".damaged")
        log.warning("the %s in %s are damaged: computing them again (moved to %s)", self.content, self.file, aside)
        self.file.replace(aside)
        # SQLite would play the old journal back into the new file.
        Path(f"{self.file}-journal").unlink(missing_ok=True)
