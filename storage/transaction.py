"""A handler process's transaction: the handler's SQL effects, and how far the process has got, together.

The driver's connection is in autocommit, and BEGIN, SAVEPOINT and COMMIT are sent as they are: so SQLAlchemy's own
``commit`` and ``rollback``, which a handler might call, end nothing (they raise), and everything else of a Connection
or Session works as it does elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import Dialect, ExceptionContext
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from kafkasrcd.errors import (
    DeadLetterRefused,
    HandlerError,
    HandlerMisuse,
    KafkasrcdError,
    StoreError,
    StoreUnavailable,
)
from kafkasrcd.storage import postgresql, sqlite
from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.dead_letter_rows import DeadLetterRows
from kafkasrcd.storage.dead_letters import DeadLetter, LetterFilter, Redelivered, StoredLetter
from kafkasrcd.storage.offset_rows import OffsetRows
from kafkasrcd.storage.offset_store import Advance, TopicPartition
from kafkasrcd.storage.turns import Turns

Kind = Literal["connection", "session"]

SAVEPOINT: Final = "SAVEPOINT kafkasrcd_call"
RELEASE: Final = "RELEASE SAVEPOINT kafkasrcd_call"
ROLL_BACK_TO: Final = "ROLLBACK TO SAVEPOINT kafkasrcd_call"


class CommitUnknown(StoreUnavailable):
    """The connection was lost while a commit was being made: ``settle`` finds out whether it was."""


class TransactionEnded(HandlerError):
    """The handler ended the transaction itself. Everything since the last commit is rolled back or, where it sent a
    COMMIT, kept without its offsets."""


class Effects:
    """What the plain and the async transaction share: where they connect, and what their errors mean."""

    def __init__(self, url: str, group_id: str, busy_timeout_ms: int, idle_timeout_seconds: float) -> None:
        self.rows = OffsetRows(group_id, wall_clock_ms)
        self.letters = DeadLetterRows(group_id, wall_clock_ms)
        self.errors: list[DBAPIError] = []
        """Those of our own connection ``in_call``. A handler may have others, whose errors end nothing here, and may
        let none of ours through."""
        self.in_call = False
        self.ended = False
        """Whether a statement has ended the transaction, also where another has begun one since."""
        self.busy_timeout_ms = busy_timeout_ms
        self._path: Path | None = None
        self.turns: Turns | None = None
        self._identity: tuple[int, int] | None = None
        self.is_sqlite = url.startswith("sqlite")
        if self.is_sqlite:
            self._path = sqlite.sqlite_path(url)
            self.url = URL.create("sqlite", database=str(self._path))
            self.turns = Turns(self._path, busy_timeout_ms)
            self.arguments: dict[str, Any] = {"timeout": busy_timeout_ms / 1000, "isolation_level": None}
        else:
            self.url = postgresql.postgresql_url(url)
            self.arguments = postgresql.connect_arguments(self.url, busy_timeout_ms, idle_timeout_seconds)
            self.arguments["autocommit"] = True
        # One round trip: what the call before has done stays, and this one can be undone by itself.
        both = f"{RELEASE}; {SAVEPOINT}"
        self.next_savepoint = (RELEASE, SAVEPOINT) if self.is_sqlite else (both,)

    @property
    def shown(self) -> str:
        """For messages."""
        return str(self.url.database) if self.is_sqlite else postgresql.shown(self.url)

    def watch(self, engine: Engine) -> None:
        """Keep what its connection goes through in ``errors`` and ``ended``."""

        def note(context: ExceptionContext) -> None:
            if self.in_call and isinstance(context.sqlalchemy_exception, DBAPIError):
                self.errors.append(context.sqlalchemy_exception)

        def look(connection: Connection, *_: object) -> None:
            self.ended = self.ended or not self._is_in_transaction(connection)

        event.listen(engine, "handle_error", note)
        event.listen(engine, "after_cursor_execute", look)

    def bury(self, letter: DeadLetter, connection: Connection) -> None:
        """As a handler would."""
        self.letters.bury(connection, letter)

    def settle(self, redelivered: Redelivered, connection: Connection) -> bool:
        """As a handler would."""
        return self.letters.settle(connection, redelivered)

    def letter(self, connection: Connection, letter_id: int) -> StoredLetter | None:
        """As the transaction has it."""
        return next(iter(self.letters.find(connection, LetterFilter(ids=(letter_id,)), 1)), None)

    def refused(self, error: SQLAlchemyError) -> DeadLetterRefused:
        """An error of ``bury``: the database is there, and does not take it."""
        return DeadLetterRefused(f"{self.shown} does not take it: {str(error).splitlines()[0]}")

    def call_ended(self) -> None:
        """What its errors hold on to is let go."""
        self.in_call = False
        self.errors.clear()

    def check_place(self) -> None:
        """Before each use: raises StoreUnavailable where SQLite's file is gone or another one.

        SQLite would create an empty one, or write on into one that nobody can open any more.
        """
        if self._path is None:
            return
        try:
            self._identity = self._identity or sqlite.identity(self._path)
            sqlite.refuse_a_replaced_file(self._path, self._identity)
        except OSError as error:
            raise StoreUnavailable(f"{self._path} cannot be used ({error.strerror})") from error

    def close(self) -> None:
        """After the connection."""
        if self.turns is not None:
            self.turns.close()

    def in_transaction(self, connection: Connection) -> bool:
        """Whether the driver is in a transaction that can go on; also where the handler has closed the connection."""
        return not (self.ended or connection.closed or connection.invalidated) and self._is_in_transaction(connection)

    def _is_in_transaction(self, connection: Connection) -> bool:
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
        """What a handler raised, or what that came from, in our words, where it ends the transaction; else None."""
        seen: BaseException | None = error
        passed: set[int] = set()
        while seen is not None and id(seen) not in passed:
            passed.add(id(seen))
            if any(seen is ours for ours in self.errors):
                lost = self._lost(seen)
                if lost is not None:
                    return lost
            seen = seen.__cause__ or seen.__context__
        return None

    def _lost(self, error: BaseException) -> StoreUnavailable | None:
        if not isinstance(error, DBAPIError):
            return None
        if self._path is None:
            return postgresql.lost(self.url, error)
        return sqlite.lost(self._path, self.busy_timeout_ms, error)

    def explain(self, error: SQLAlchemyError) -> StoreUnavailable:
        """An error of a statement of ours: whatever it is, nothing was committed."""
        explained: KafkasrcdError | None = self._lost(error)
        if explained is None and not self.is_sqlite and isinstance(error, DBAPIError):
            explained = postgresql.explanation(self.url, error)
        if isinstance(explained, StoreUnavailable):
            return explained
        return StoreUnavailable(f"{self.shown}: {str(error).splitlines()[0]}")

    def explain_commit(self, error: SQLAlchemyError) -> StoreUnavailable:
        """An error of COMMIT: CommitUnknown where it may have been made all the same."""
        explained = self.explain(error)
        # SQLite says itself that it was not made; so does a server that goes on answering (a deferred constraint).
        answered = (
            isinstance(error, DBAPIError)
            and not error.connection_invalidated
            and getattr(error.orig, "sqlstate", None) is not None
        )
        return explained if self.is_sqlite or answered else CommitUnknown(str(explained))

    def why_ended(self, connection: Connection) -> StoreUnavailable | TransactionEnded:
        """Why a call's transaction is no more: lost, also where the handler swallowed that; else its own doing."""
        for error in self.errors:
            lost = self._lost(error)
            if lost is not None:
                return lost
        if not self.is_sqlite and not connection.closed and not connection.invalidated:
            driver: Any = connection.connection.driver_connection
            if driver.broken:  # noticed below SQLAlchemy, by a handler that uses psycopg's own connection
                return StoreUnavailable(f"{self.shown} cannot be reached: the connection was lost")
        return TransactionEnded(
            "the handler has ended the transaction it was given (a COMMIT or ROLLBACK sent as SQL, or a closed "
            "connection): kafkasrcd commits, together with the offsets; what was committed so has no offsets with "
            "it, and its records will be handled again"
        )

    def check_after(self, connection: Connection) -> None:
        """After a call that returned: raises as ``why_ended`` says where the transaction has ended, HandlerError where
        what the handler did cannot be kept."""
        if not self.in_transaction(connection):
            raise self.why_ended(connection)
        if self.is_aborted(connection):
            raise HandlerError(
                "the handler has caught an error of the database and gone on: PostgreSQL has aborted what it did; let "
                "the error through, or put the statement into a savepoint of its own (tx.begin_nested())"
            )


def take_over(dialect: Dialect) -> None:
    """Have SQLAlchemy's own commit and rollback raise: they are not the handler's to call, nor needed by ours."""

    def refuse(_: object) -> NoReturn:
        raise HandlerMisuse(
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
        effects.watch(self._engine)
        self._connection: Connection | None = None
        self.active = False
        """Whether a transaction has begun."""
        self._in_savepoint = False

    def call(self, function: Callable[[Any, Any], object], argument: object, kind: Kind) -> object:
        """``function(argument, transaction)`` in a savepoint of the transaction, which is begun where there is none.

        Raises what ``function`` raises, with only this call's effects rolled back; StoreUnavailable or TransactionEnded
        where the whole transaction is gone.
        """
        connection = self._savepoint()
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
        finally:
            self._effects.call_ended()
        return returned

    @contextmanager
    def scope(self) -> Iterator[Connection]:
        """As a call of what is in the ``with`` block."""
        connection = self._savepoint()
        try:
            yield connection
            self._effects.check_after(connection)
        except BaseException as error:
            self._undo_call(connection, error)
            raise
        finally:
            self._effects.call_ended()

    def bury(self, letter: DeadLetter) -> None:
        """Keep ``letter``, in a savepoint as a call.

        Raises DeadLetterRefused where the database does not take it; otherwise as ``call``.
        """
        try:
            self.call(self._effects.bury, letter, "connection")
        except SQLAlchemyError as error:
            raise self._effects.refused(error) from error

    def letter(self, letter_id: int) -> StoredLetter | None:
        """A letter as this transaction has it."""
        connection = self._begun()
        try:
            return self._effects.letter(connection, letter_id)
        except SQLAlchemyError as error:
            raise self._gone(self._effects.explain(error)) from error

    def settle_letter(self, redelivered: Redelivered) -> bool:
        """Write down what became of a letter, as ``bury`` does; False where it is not as it was seen."""
        try:
            return bool(self.call(self._effects.settle, redelivered, "connection"))
        except SQLAlchemyError as error:
            raise self._effects.refused(error) from error

    def commit(self, advances: Sequence[Advance]) -> dict[TopicPartition, StoreError]:
        """Advance all, in the same transaction, and commit. Where any is refused, the whole is rolled back and the
        refusals are returned.

        Raises StoreUnavailable where nothing was committed, CommitUnknown where that is not known.
        """
        connection = self._begun()
        try:
            if self._in_savepoint:
                # Gone where a handler has ended the transaction and begun another unseen, as in one string of SQL: then
                # this one has not what the calls did.
                connection.exec_driver_sql(RELEASE)
            refusals = self._effects.rows.advance(connection, advances)
        except SQLAlchemyError as error:
            raise self._gone(self._effects.explain(error)) from error
        if refusals:
            self.rollback()
            return refusals
        try:
            connection.exec_driver_sql("COMMIT")
        except SQLAlchemyError as error:
            raise self._gone(self._effects.explain_commit(error)) from error
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

    def reached(self, mine: Advance) -> int | None:
        """How far the slot of ``mine`` is recorded; None where its partition was claimed by another owner.

        Waits for a transaction that is still being committed, as by a process that was killed, and locks the partition
        until the end of this one.
        """
        connection = self._begun()
        try:
            return self._effects.rows.reached(connection, mine)
        except SQLAlchemyError as error:
            raise self._gone(self._effects.explain(error)) from error

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
        self._effects.close()

    def _savepoint(self) -> Connection:
        """For one more call."""
        connection = self._begun()
        try:
            for statement in self._effects.next_savepoint if self._in_savepoint else (SAVEPOINT,):
                connection.exec_driver_sql(statement)
            self._in_savepoint = True
        except SQLAlchemyError as error:
            raise self._gone(self._effects.explain(error)) from error
        self._effects.in_call = True
        return connection

    def _begun(self) -> Connection:
        try:
            self._effects.check_place()
            if self._connection is None:
                self._connection = self._engine.connect()
                take_over(self._engine.dialect)  # only now: SQLAlchemy's own first look at a database rolls back
            if not self.active:
                self._begin(self._connection)
                self._effects.ended = False
                self.active = True
        except SQLAlchemyError as error:
            raise self._gone(self._effects.explain(error)) from error
        except StoreUnavailable:
            self._drop()
            raise
        return self._connection

    def _begin(self, connection: Connection) -> None:
        turns = self._effects.turns
        if turns is None:
            connection.exec_driver_sql("BEGIN")
        else:
            connection.exec_driver_sql("PRAGMA synchronous=FULL")
            sqlite.begin_in_turn(connection, turns, self._effects.busy_timeout_ms)

    def _undo_call(self, connection: Connection, error: BaseException) -> None:
        """Roll back to the savepoint; raises instead of returning where the whole transaction is gone."""
        lost = self._effects.lost(error)
        if lost is not None:
            raise self._gone(lost) from error
        if isinstance(error, (TransactionEnded, StoreUnavailable)):
            self._drop()
            return
        forget_state(connection)
        if not self._effects.in_transaction(connection):
            ended = self._effects.why_ended(connection)
            self._drop()
            raise ended from error
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
