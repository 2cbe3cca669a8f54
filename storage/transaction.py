"""A handler process's transaction: the handler's SQL effects, and how far the process has got, together.

The driver's connection is in autocommit, and BEGIN, SAVEPOINT and COMMIT are sent as they are: so SQLAlchemy's own
``commit`` and ``rollback``, which a handler might call, end nothing (they raise), and everything else of a Connection
or Session works as it does elsewhere.
"""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, NoReturn

from sqlalchemy import URL, Connection, Engine, create_engine
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from kafkasrcd.errors import HandlerError, StoreError, StoreUnavailable
from kafkasrcd.storage import postgresql, sqlite
from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.offset_rows import OffsetRows
from kafkasrcd.storage.offset_store import Advance, TopicPartition

Kind = Literal["connection", "session"]

SAVEPOINT: Final = "SAVEPOINT kafkasrcd_call"
RELEASE: Final = "RELEASE SAVEPOINT kafkasrcd_call"
ROLL_BACK_TO: Final = "ROLLBACK TO SAVEPOINT kafkasrcd_call"

_SQLITE_LOST: Final = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_NOMEM,
}


class CommitUnknown(StoreUnavailable):
    """The connection was lost while a commit was being made: ``settle`` finds out whether it was."""


class TransactionEnded(HandlerError):
    """The handler ended the transaction itself. Everything since the last commit is rolled back or, where it sent a
    COMMIT, kept without its offsets."""


class Effects:
    """What the plain and the async transaction share: where they connect, and what their errors mean."""

    def __init__(self, url: str, group_id: str, busy_timeout_ms: int, idle_timeout_seconds: float) -> None:
        self.rows = OffsetRows(group_id, wall_clock_ms)
        self.is_sqlite = url.startswith("sqlite")
        if self.is_sqlite:
            self.url = URL.create("sqlite", database=str(sqlite.sqlite_path(url)))
            self.arguments: dict[str, Any] = {"timeout": busy_timeout_ms / 1000, "isolation_level": None}
        else:
            self.url = postgresql.postgresql_url(url)
            self.arguments = postgresql.connect_arguments(self.url, busy_timeout_ms, idle_timeout_seconds)
            self.arguments["autocommit"] = True
        # One round trip: what the call before has done stays, and this one can be undone by itself.
        both = f"{RELEASE}; {SAVEPOINT}"
        self.next_savepoint = (RELEASE, SAVEPOINT) if self.is_sqlite else (both,)
        self.begin = ("PRAGMA synchronous=FULL", "BEGIN IMMEDIATE") if self.is_sqlite else ("BEGIN",)

    @property
    def shown(self) -> str:
        """For messages."""
        return str(self.url.database) if self.is_sqlite else postgresql.shown(self.url)

    def in_transaction(self, connection: Connection) -> bool:
        """Whether the driver is in a transaction that can go on; also where the handler has closed the connection."""
        if connection.closed or connection.invalidated:
            return False
        driver: Any = connection.connection.driver_connection
        if self.is_sqlite:
            # Of aiosqlite's connection, the property is the one of its own.
            return bool(driver.in_transaction)
        return driver.info.transaction_status.name in ("INTRANS", "INERROR")

    def is_aborted(self, connection: Connection) -> bool:
        """Whether PostgreSQL takes no further statement before a rollback, as after an error that was swallowed."""
        driver: Any = connection.connection.driver_connection
        return not self.is_sqlite and driver.info.transaction_status.name == "INERROR"

    def lost(self, error: BaseException) -> StoreUnavailable | None:
        """``error``, or what it came from, in our words, where it ends the whole transaction; else None."""
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, DBAPIError):
                return self._lost(seen)
            seen = seen.__cause__ or seen.__context__
        return None

    def _lost(self, error: DBAPIError) -> StoreUnavailable | None:
        if not self.is_sqlite:
            explained = postgresql.explanation(self.url, error)
            return explained if isinstance(explained, StoreUnavailable) else None
        code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code not in _SQLITE_LOST:
            return None
        return StoreUnavailable(f"{self.shown} cannot be written now ({error.orig})")

    def explain(self, error: SQLAlchemyError) -> StoreUnavailable:
        """An error of a statement of ours: whatever it is, nothing was committed."""
        lost = self.lost(error)
        return lost or StoreUnavailable(f"{self.shown}: {str(error).splitlines()[0]}")

    def check_after(self, connection: Connection) -> None:
        """After a call that returned: raises TransactionEnded where the handler has ended the transaction, HandlerError
        where what it did cannot be kept."""
        if not self.in_transaction(connection):
            raise TransactionEnded(
                "the handler has ended the transaction it was given (a COMMIT or ROLLBACK sent as SQL, or a closed "
                "connection): kafkasrcd commits, together with the offsets; what was committed so has no offsets with "
                "it, and its records will be handled again"
            )
        if self.is_aborted(connection):
            raise HandlerError(
                "the handler has caught an error of the database and gone on: PostgreSQL has aborted what it did; let "
                "the error through, or put the statement into a savepoint of its own (tx.begin_nested())"
            )


def take_over(dialect: Dialect) -> None:
    """Have SQLAlchemy's own commit and rollback raise: they are not the handler's to call, nor needed by ours."""

    def refuse(_: object) -> NoReturn:
        raise HandlerError(
            "the handler has called commit() or rollback() on the transaction it was given: kafkasrcd commits, "
            "together with the offsets; raise an exception to have the call rolled back"
        )

    for name in ("do_commit", "do_rollback"):
        setattr(dialect, name, refuse)


def forget_state(connection: Connection) -> None:
    """Have SQLAlchemy take no notice of what a transaction was like; the database's own is not touched."""
    with suppress(HandlerError, SQLAlchemyError):
        connection.rollback()
    connection._transaction = connection._nested_transaction = None


class EffectsTransaction:
    """One connection, one transaction at a time. Made without connecting; everything else blocks."""

    def __init__(self, url: str, group_id: str, busy_timeout_ms: int, idle_timeout_seconds: float) -> None:
        self._effects = Effects(url, group_id, busy_timeout_ms, idle_timeout_seconds)
        effects = self._effects
        self._engine: Engine = create_engine(
            effects.url, connect_args=effects.arguments, poolclass=NullPool, pool_reset_on_return=None
        )
        self._connection: Connection | None = None
        self.active = False
        """Whether a transaction has begun."""
        self._in_savepoint = False

    def call(self, function: Callable[[Any, Any], object], argument: object, kind: Kind) -> object:
        """``function(argument, transaction)`` in a savepoint of the transaction, which is begun where there is none.

        Raises what ``function`` raises, with only this call's effects rolled back; StoreUnavailable or TransactionEnded
        where the whole transaction is gone.
        """
        connection = self._begun()
        try:
            for statement in self._effects.next_savepoint if self._in_savepoint else (SAVEPOINT,):
                connection.exec_driver_sql(statement)
            self._in_savepoint = True
        except SQLAlchemyError as error:
            raise self._gone(self._effects.explain(error)) from error
        try:
            if kind == "connection":
                returned = function(argument, connection)
            else:
                with Session(connection, join_transaction_mode="create_savepoint", expire_on_commit=False) as session:
                    returned = function(argument, session)
                    session.commit()
            self._effects.check_after(connection)
        except BaseException as error:
            self._undo_call(connection, error)
            raise
        return returned

    def commit(self, advances: Sequence[Advance]) -> dict[TopicPartition, StoreError]:
        """Advance all, in the same transaction, and commit. Where any is refused, the whole is rolled back and the
        refusals are returned.

        Raises StoreUnavailable where nothing was committed, CommitUnknown where that is not known.
        """
        connection = self._begun()
        try:
            refusals = self._effects.rows.advance(connection, advances)
        except SQLAlchemyError as error:
            raise self._gone(self._effects.explain(error)) from error
        if refusals:
            self.rollback()
            return refusals
        try:
            connection.exec_driver_sql("COMMIT")
        except SQLAlchemyError as error:
            explained = self._effects.explain(error)
            if self._effects.is_sqlite:
                raise self._gone(explained) from error  # it says itself that it was not made
            raise self._gone(CommitUnknown(str(explained))) from error
        self._end(connection)
        return {}

    def settle(self, advances: Sequence[Advance]) -> bool:
        """After CommitUnknown: whether it was made. Raises StoreUnavailable where that cannot be found out now."""
        connection = self._begun()
        try:
            return self._effects.rows.are_recorded(connection, advances)
        except SQLAlchemyError as error:
            raise self._gone(self._effects.explain(error)) from error
        finally:
            self.rollback()

    def rollback(self) -> None:
        """Undo everything since the last commit; a no-op where there is nothing. Does not raise."""
        connection = self._connection
        if connection is None or not self.active:
            return
        try:
            connection.exec_driver_sql("ROLLBACK")
        except SQLAlchemyError:
            self._drop()
        else:
            self._end(connection)

    def close(self) -> None:
        """Undo what is open, and disconnect."""
        self._drop()

    def _begun(self) -> Connection:
        try:
            if self._connection is None:
                self._connection = self._engine.connect()
                take_over(self._engine.dialect)  # only now: SQLAlchemy's own first look at a database rolls back
            if not self.active:
                for statement in self._effects.begin:
                    self._connection.exec_driver_sql(statement)
                self.active = True
        except SQLAlchemyError as error:
            raise self._gone(self._effects.explain(error)) from error
        return self._connection

    def _undo_call(self, connection: Connection, error: BaseException) -> None:
        """Roll back to the savepoint; raises instead of returning where the whole transaction is gone."""
        lost = self._effects.lost(error)
        if lost is not None:
            raise self._gone(lost) from error
        if isinstance(error, TransactionEnded):
            self._drop()
            return
        forget_state(connection)
        if not self._effects.in_transaction(connection):
            self._drop()
            self._effects.check_after(connection)
        try:
            connection.exec_driver_sql(ROLL_BACK_TO)
        except SQLAlchemyError as second:
            raise self._gone(self._effects.explain(second)) from error

    def _gone(self, error: StoreUnavailable) -> StoreUnavailable:
        """The transaction is lost, and the connection is not trusted any more."""
        self._drop()
        return error

    def _end(self, connection: Connection) -> None:
        self.active = self._in_savepoint = False
        forget_state(connection)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self.active = self._in_savepoint = False
        if connection is not None:
            with suppress(Exception):
                connection.invalidate()
            with suppress(Exception):
                connection.close()
