"""An SQLite file of numbers that runs and processes share."""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import ClassVar, TypeVar

from filelock import FileLock

from spo.errors import DISK_ERRORS

log = logging.getLogger(__name__)
T = TypeVar("T")
LOCK_TIMEOUT_S = 60
"""Seconds to wait for other processes that use the file."""
# Result codes of SQLite that do not mean a damaged file: the system's error that each stands for, if any.
_OF_THE_SYSTEM = {
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_BUSY: None,
    sqlite3.SQLITE_LOCKED: None,
    sqlite3.SQLITE_NOMEM: None,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_INTERRUPT: None,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


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

    def transact(self, work: Callable[[sqlite3.Connection], T], *, reads: bool = False) -> T:
        """Run ``work`` in one transaction and return its result.

        Args:
            work: Function of the open database.
            reads: Whether ``work`` only reads, so that a file that cannot be written will do.

        Raises:
            Exception: The file cannot be read or written; the type is :attr:`error`.
        """
        try:
            try:
                return self._locked(work)
            except (sqlite3.OperationalError, OSError) as error:
                if not (reads and _errno(error) in _NOT_WRITABLE and self.file.is_file()):
                    raise
                return self._run(work, read_only=True)
        except (sqlite3.Error, OSError, DamagedRowError) as error:
            reason, remedy = DISK_ERRORS.get(_errno(error) or 0, (str(error), "move the file away, or {elsewhere}"))
            raise self.error(
                f"the {self.content} in {self.file} cannot be read or written ({reason or 'a row is damaged'}): "
                f"{remedy.format(elsewhere=f'set {self.location_key}')}"
            ) from error

    def _locked(self, work: Callable[[sqlite3.Connection], T]) -> T:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # One process at a time: if others had the file open while it is moved, its journal would be taken for
        # that of the new file.
        with FileLock(f"{self.file}.use.lock", timeout=LOCK_TIMEOUT_S, poll_interval=0.005):
            try:
                return self._run(work)
            except (sqlite3.DatabaseError, DamagedRowError) as error:
                if not self.recomputable or _code(error) in _OF_THE_SYSTEM:
                    raise
                self._move_aside()
                return self._run(work)

    def _run(self, work: Callable[[sqlite3.Connection], T], read_only: bool = False) -> T:
        address = f"{self.file.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        with closing(sqlite3.connect(address, timeout=LOCK_TIMEOUT_S, uri=True)) as database, database:
            if read_only:
                return work(database)
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


def _code(error: Exception) -> int | None:
    """Return SQLite's primary result code of an error, ``None`` if it does not have one."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _errno(error: Exception) -> int | None:
    """Return the number of the system's error that an error stands for, ``None`` if it stands for none."""
    if isinstance(error, OSError):
        return error.errno if error.errno in DISK_ERRORS else None
    return _OF_THE_SYSTEM.get(_code(error) or 0)
