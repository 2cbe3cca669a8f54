"""What is SQLite's own in the store: the file, its transactions, and what its errors mean."""

import errno
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError

from kafkasrcd.errors import ConfigurationError, KafkasrcdError, StoreUnavailable
from kafkasrcd.storage.schema import FIRST_START, ensure_schema, found_revision, require_schema
from kafkasrcd.storage.sql_store import Database
from kafkasrcd.storage.turns import Turns, locked

WAL_RETRY_SECONDS = 0.01
"""Between attempts to turn on the write-ahead log: others hold the file for about a commit, 1 ms or so."""

BEGIN_TO_WRITE = "BEGIN IMMEDIATE"
DO_NOT_WAIT = "PRAGMA busy_timeout=0"

_WRITABLE = "the daemon's user must be able to write it and its folder"

_NEEDS_A_PERSON = {
    sqlite3.SQLITE_NOTADB: "is not a SQLite database; name another file in store.url",
    sqlite3.SQLITE_CORRUPT: "is damaged; restore it, or move it away and start from the group's offsets in Kafka",
    sqlite3.SQLITE_CANTOPEN: f"cannot be opened; {_WRITABLE}",
    sqlite3.SQLITE_READONLY: f"is read-only; {_WRITABLE}",
    sqlite3.SQLITE_PERM: f"may not be used; {_WRITABLE}",
}
"""At start these are configuration errors: trying again does not help."""

_MAY_PASS = {
    sqlite3.SQLITE_FULL: "has no room to grow; free space on its file system",
    sqlite3.SQLITE_IOERR: "had an input/output error; check its file system, quota and file size limit (ulimit -f)",
}
_ENDS_A_TRANSACTION = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB),
}
"""SQLite rolls all of it back by itself, or nothing more can be written."""
_PASSING_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE}
"""Of creating the folder and the file."""


class SqliteDatabase(Database):
    """The SQLite file of ``sqlite:///path``.

    Opening it creates what is missing: the folder (0700), the file (0600) and the tables. Raises
    ``ConfigurationError`` where the database is not ours (nor ``shared`` with other tables) or cannot be written,
    ``StoreUnavailable`` where it may be usable later. A write blocks up to ``busy_timeout_ms`` for the write lock.
    ``must_exist``: nothing is created or changed, and ``ConfigurationError`` says what is missing.
    """

    def __init__(self, url: str, busy_timeout_ms: int, *, shared: bool = False, must_exist: bool = False) -> None:
        self.path = path = sqlite_path(url)
        self._busy_timeout_ms = busy_timeout_ms
        self._shared = shared
        # Effects are written for as long as a checkpoint's interval at a time; the store's own writes take 1 ms or so.
        self._turns = Turns(path, busy_timeout_ms) if shared else None
        # isolation_level None: the driver begins nothing by itself. Its own choice, BEGIN DEFERRED, takes the write
        # lock in the middle of a transaction, and then fails at once where another writer was faster, without waiting.
        self._engine = create_engine(
            URL.create("sqlite", database=str(path)),
            connect_args={"timeout": busy_timeout_ms / 1000, "isolation_level": None},
        )
        try:
            with self._explained(at_start=True):
                self._identity = self._look() if must_exist else self._open()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def writing(self, *, durable: bool) -> Iterator[Connection]:
        """Alone from its start on. The log is written in order, and a durable one takes all before it to the disk."""
        with self._explained():
            self._refuse_a_replaced_file()
            with self._write_transaction("FULL" if durable else "NORMAL") as connection:
                yield connection

    @contextmanager
    def claiming(self, group_id: str) -> Iterator[Connection]:
        with self.writing(durable=True) as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self._explained():
            self._refuse_a_replaced_file()
            with self._transaction("BEGIN") as connection:
                yield connection

    def close(self) -> None:
        self._engine.dispose()
        if self._turns is not None:
            self._turns.close()

    @contextmanager
    def _transaction(self, *begin: str) -> Iterator[Connection]:
        with self._engine.connect() as connection, connection.begin():
            for statement in begin:
                connection.exec_driver_sql(statement)
            yield connection

    @contextmanager
    def _write_transaction(self, synchronous: str) -> Iterator[Connection]:
        """Where handlers write effects, in this writer's turn: it would not get the lock before they rest."""
        begin = (f"PRAGMA synchronous={synchronous}",)
        if self._turns is None:
            with self._transaction(*begin, BEGIN_TO_WRITE) as connection:
                yield connection
        else:
            with self._transaction(*begin) as connection:
                begin_in_turn(connection, self._turns, self._busy_timeout_ms)
                yield connection

    def _open(self) -> tuple[int, int] | None:
        _create_file(self.path)
        opened = identity(self.path)
        # First look, then touch: a database that is not ours keeps its journal mode.
        with self._transaction("BEGIN") as connection:
            found_revision(connection, str(self.path), shared=self._shared)
        self._turn_on_wal()
        with self._write_transaction("FULL") as connection:
            ensure_schema(connection, str(self.path), shared=self._shared)
        return opened

    def _look(self) -> tuple[int, int]:
        found = identity(self.path)
        if found is None:
            raise ConfigurationError(f"there is no offset store at {self.path}: {FIRST_START}")
        with self._transaction("BEGIN") as connection:
            require_schema(connection, str(self.path), shared=self._shared)
        return found

    def _turn_on_wal(self) -> None:
        """The mode is kept in the file. Changing it needs the file alone, and SQLite does not wait for that itself."""
        deadline = time.monotonic() + self._busy_timeout_ms / 1000
        while True:
            try:
                with self._engine.connect() as connection:
                    mode = connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar_one()
            except DBAPIError as error:
                if primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(WAL_RETRY_SECONDS)
                continue
            if mode != "wal":
                raise ConfigurationError(
                    f"{self.path}: its file system cannot hold a SQLite write-ahead log (a network file system?); "
                    "name a file on a local disk in store.url"
                )
            return

    def _refuse_a_replaced_file(self) -> None:
        refuse_a_replaced_file(self.path, self._identity)

    @contextmanager
    def _explained(self, at_start: bool = False) -> Iterator[None]:
        """Turn the errors of SQLite and of the file system into ours, which say what to do."""
        try:
            yield
        except (IntegrityError, ProgrammingError, DataError):
            raise  # Ours to mend, not the operator's.
        except DBAPIError as error:
            # Closed rather than kept: the next call opens the file anew and does not meet this connection's state.
            self._engine.dispose()
            raise explanation(self.path, self._busy_timeout_ms, error, at_start=at_start) from error
        except OSError as error:
            kind = ConfigurationError if at_start and error.errno not in _PASSING_ERRNOS else StoreUnavailable
            raise kind(f"{self.path} cannot be used ({error.strerror}); {_WRITABLE}") from error


def begin_in_turn(connection: Connection, turns: Turns, busy_timeout_ms: int) -> None:
    """Take the write lock when it is this writer's turn; ``turns`` waits, and not SQLite."""
    connection.exec_driver_sql(DO_NOT_WAIT)
    turns.wait(lambda: connection.exec_driver_sql(BEGIN_TO_WRITE))
    connection.exec_driver_sql(wait_again(busy_timeout_ms))


def explanation(path: Path, busy_timeout_ms: int, error: DBAPIError, *, at_start: bool = False) -> KafkasrcdError:
    """``error`` in our words; a ConfigurationError only ``at_start``, else StoreUnavailable."""
    code, text = primary_code(error), str(error.orig)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return locked(path, busy_timeout_ms, text)
    cure = _MAY_PASS.get(code)
    if cure is None:
        cure = _NEEDS_A_PERSON.get(code, "cannot be used; see SQLite's words")
        if at_start:
            return ConfigurationError(f"{path} {cure} ({text})")
    return StoreUnavailable(f"{path} {cure} ({text})")


def wait_again(busy_timeout_ms: int) -> str:
    """The opposite of ``DO_NOT_WAIT``."""
    return f"PRAGMA busy_timeout={busy_timeout_ms}"


def lost(path: Path, busy_timeout_ms: int, error: DBAPIError) -> StoreUnavailable | None:
    """``error`` of a handler's statement in our words, where its transaction cannot go on; else None."""
    explained = explanation(path, busy_timeout_ms, error) if primary_code(error) in _ENDS_A_TRANSACTION else None
    return explained if isinstance(explained, StoreUnavailable) else None


def sqlite_path(url: str) -> Path:
    """The file of ``sqlite:///path``, absolute: the process may change its working directory later."""
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigurationError(f"store.url {url!r} is not a URL; it looks like sqlite:////var/lib/x.db") from error
    if parts.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ConfigurationError(f"store.url: {parts.drivername!r} is not supported; use sqlite:///path")
    if parts.host:
        raise ConfigurationError(
            f"store.url {url!r} names a host ({parts.host}); an absolute path has four slashes: sqlite:////var/lib/x.db"
        )
    if parts.query:
        raise ConfigurationError(f"store.url {url!r}: nothing may follow the path of the file")
    if parts.database in (None, "", ":memory:"):
        raise ConfigurationError(f"store.url {url!r} names no file; use sqlite:///path, or memory:// to keep nothing")
    return Path(str(parts.database)).absolute()


def _create_file(path: Path) -> None:
    """Only the daemon's user may read offsets; SQLite gives its -wal and -shm files the mode of this one.

    Created exclusively: opening and closing a file that a connection of this process has open drops its locks (POSIX).
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass


def refuse_a_replaced_file(path: Path, opened: tuple[int, int] | None) -> None:
    """Raise StoreUnavailable where ``path`` is not what was ``opened``, or not there.

    A deleted file can still be written through its open descriptor, and all that would be gone at the end.
    """
    found = identity(path)
    if found is None or found != opened:
        raise StoreUnavailable(
            f"{path} was moved, deleted or replaced while in use: nothing is recorded until the same file is "
            "back, or kafkasrcd is restarted"
        )


def identity(path: Path) -> tuple[int, int] | None:
    """Which file is at ``path``; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def primary_code(error: DBAPIError) -> int:
    """SQLite's primary result code: the low byte of the extended one."""
    return getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
