"""What is PostgreSQL's own in the store: its connections, its transactions, and what its errors mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.pool import QueuePool

from kafkasrcd.errors import ConfigurationError, KafkasrcdError, StoreUnavailable
from kafkasrcd.storage.refusals import Conflict
from kafkasrcd.storage.schema import ensure_schema, require_schema
from kafkasrcd.storage.sql_store import Database

_OLDEST: Final = 140_000
"""PostgreSQL 14."""
_CONNECT_SECONDS: Final = 5
_UNANSWERED_MS: Final = 25_000
"""As long as the keepalives below take to give up: none are sent while what was sent is not acknowledged, and then the
kernel would wait for a quarter of an hour."""
_IDLE_SECONDS: Final = 10
"""A store's transaction is some statements without a pause: one that a frozen host left open ends, and its locks."""
_SCHEMA_LOCK: Final = text("SELECT pg_advisory_xact_lock(hashtext('kafkasrcd schema'))")
_CLAIM_LOCK: Final = text("SELECT pg_advisory_xact_lock(hashtext('kafkasrcd claim'), hashtext(:group_id))")

_DURABLE: Final = (
    "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"
)
"""Whatever more than ``on`` the database asks for stays."""
_UNDEFINED_TABLE: Final = "42P01"
_LOCK_NOT_AVAILABLE: Final = "55P03"

_NEEDS_A_PERSON: Final = {
    "28000": "refuses this user; check pg_hba.conf and the user in store.url",
    "28P01": "refuses the password; check store.url",
    "3D000": "does not exist; create it",
    "42501": "may not be used so; grant the user USAGE and CREATE on the schema, and its rights on our tables",
    "3F000": "has no schema to create tables in; set the user's search_path",
}
"""At start these are configuration errors: trying again does not help."""
_MAY_PASS: Final = {
    "25006": "is read-only (a standby?); name the primary in store.url",
    "53100": "has a full disk; free space there",
    "53200": "is out of memory",
    "53300": "has no connection left; raise max_connections, or run fewer processes",
    _LOCK_NOT_AVAILABLE: "kept us waiting for a lock; see pg_locks for what holds it",
    "57P01": "was shut down",
    "57P02": "crashed",
    "57P03": "is starting or stopping",
    "25P03": "ended a transaction that stood still for too long",
}
_CONFLICTS: Final = {
    "40001": "could not serialize the transaction",
    "40P01": "ended a deadlock",
}


def postgresql_url(url: str) -> URL:
    """``postgresql://…`` with the driver named. Raises ConfigurationError for anything else, and without psycopg."""
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "store.url is not a URL; it looks like postgresql://user@host/database"
        ) from None  # the error would quote it, with its password
    if parts.drivername not in ("postgresql", "postgresql+psycopg"):
        raise ConfigurationError(f"store.url: {parts.drivername!r} is not supported; use postgresql://")
    if not parts.database:
        raise ConfigurationError("store.url names no database, as in postgresql://user@host/database")
    try:
        import psycopg  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise ConfigurationError(
            "store.url needs the driver of PostgreSQL: pip install 'kafkasrcd[postgresql]'"
        ) from None
    return parts.set(drivername="postgresql+psycopg")


def shown(url: URL) -> str:
    """For messages: without user and password."""
    port = f":{url.port}" if url.port else ""
    return f"PostgreSQL database {url.database!r} at {url.host or url.query.get('host') or 'the local socket'}{port}"


def connect_arguments(url: URL, busy_timeout_ms: int, idle_seconds: float) -> dict[str, Any]:
    """What every connection is made with; what ``url`` has itself counts."""
    options = (
        f"-c lock_timeout={busy_timeout_ms} -c idle_in_transaction_session_timeout={int(idle_seconds * 1000)} "
        f"{url.query.get('options', '')}"
    )
    arguments = {
        "connect_timeout": _CONNECT_SECONDS,
        "application_name": "kafkasrcd",
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": _UNANSWERED_MS,
    }
    return {**{name: value for name, value in arguments.items() if name not in url.query}, "options": options.strip()}


def explanation(url: URL, error: DBAPIError, *, at_start: bool = False) -> KafkasrcdError | None:
    """``error`` in our words, where it is about the database and not about a statement; else None."""
    state, said = _state(error), _said(error)
    if state in _NEEDS_A_PERSON:
        kind = ConfigurationError if at_start else StoreUnavailable
        return kind(f"{shown(url)} {_NEEDS_A_PERSON[state]} ({said})")
    if state in _CONFLICTS:
        return Conflict(f"{shown(url)} {_CONFLICTS[state]} ({said})")
    if state in _MAY_PASS:
        return StoreUnavailable(f"{shown(url)} {_MAY_PASS[state]} ({said})")
    if (
        error.connection_invalidated
        or (state is None and _is_operational(error))
        or (state or "").startswith(("08", "53"))
    ):
        return StoreUnavailable(f"{shown(url)} cannot be reached ({said}); start it, or check store.url and network")
    return None


def lost(url: URL, error: DBAPIError) -> StoreUnavailable | None:
    """``error`` of a handler's statement in our words, where its transaction cannot go on; else None.

    A table that may not be used, a lock that was not to be had: that is of one statement, and a savepoint undoes it.
    """
    state = _state(error)
    explained = None if state in _NEEDS_A_PERSON or state == _LOCK_NOT_AVAILABLE else explanation(url, error)
    return explained if isinstance(explained, StoreUnavailable) else None


class PostgresqlDatabase(Database):
    """The PostgreSQL database of ``postgresql://…``, version 14 or newer.

    Opening it creates what is missing of the tables. Raises ``ConfigurationError`` where it cannot be used until
    someone changes something, ``StoreUnavailable`` where another attempt may succeed. After a lost connection the next
    transaction has a new one. ``must_exist``: nothing is created or changed, and ``ConfigurationError`` says what is
    missing.
    """

    def __init__(self, url: str, busy_timeout_ms: int, *, must_exist: bool = False) -> None:
        self._url = postgresql_url(url)
        self._engine: Engine = create_engine(
            self._url,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=1,
            pool_pre_ping=True,  # a connection that was cut while nothing was to be done is not the store's absence
            isolation_level="READ COMMITTED",  # whatever the database's own: a claim reads what it has waited for
            connect_args=connect_arguments(self._url, busy_timeout_ms, _IDLE_SECONDS),
        )
        try:
            with self._explained(at_start=True), self._engine.begin() as connection:
                self._refuse_an_old_server(connection)
                if must_exist:
                    require_schema(connection, shown(self._url), shared=True)
                else:
                    connection.execute(_SCHEMA_LOCK)
                    ensure_schema(connection, shown(self._url), shared=True)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def writing(self, *, durable: bool) -> Iterator[Connection]:
        with self._explained(), self._engine.begin() as connection:
            connection.exec_driver_sql(_DURABLE if durable else "SET LOCAL synchronous_commit = off")
            yield connection

    @contextmanager
    def claiming(self, group_id: str) -> Iterator[Connection]:
        with self.writing(durable=True) as connection:
            connection.execute(_CLAIM_LOCK, {"group_id": group_id})
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self._explained(), self._engine.begin() as connection:
            yield connection

    def close(self) -> None:
        self._engine.dispose()

    def _unexpected(self, error: DBAPIError) -> StoreUnavailable | None:
        """Of a statement of the store's own, which are known to be right: then the database is not as it should be."""
        if _state(error) == _UNDEFINED_TABLE:
            return StoreUnavailable(f"{shown(self._url)} has lost its tables: restart kafkasrcd ({_said(error)})")
        if isinstance(error, (OperationalError, InternalError, InterfaceError)):
            return StoreUnavailable(f"{shown(self._url)} cannot be used now ({_said(error)})")
        return None

    def _refuse_an_old_server(self, connection: Connection) -> None:
        version = int(connection.exec_driver_sql("SHOW server_version_num").scalar_one())
        if version < _OLDEST:
            raise ConfigurationError(
                f"{shown(self._url)} is PostgreSQL {version // 10_000}; kafkasrcd needs {_OLDEST // 10_000} or newer"
            )

    @contextmanager
    def _explained(self, at_start: bool = False) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            explained = explanation(self._url, error, at_start=at_start)
            if explained is None:
                explained = self._unexpected(error)
            if explained is None:
                raise  # ours to mend, not the operator's
            # Not kept: the next call meets none of this connection's state.
            self._engine.dispose()
            raise explained from error


def _state(error: DBAPIError) -> str | None:
    """PostgreSQL's SQLSTATE."""
    return getattr(error.orig, "sqlstate", None) or _state_in(str(error.orig))


def _said(error: DBAPIError) -> str:
    reason = str(error.orig).strip().splitlines()
    return reason[0] if reason else type(error.orig).__name__


def _is_operational(error: DBAPIError) -> bool:
    return type(error.orig).__name__ in ("OperationalError", "InterfaceError", "ConnectionTimeout")


def _state_in(said: str) -> str | None:
    """A refused connection has no SQLSTATE in psycopg, only the server's words."""
    for words, state in (
        ("password authentication failed", "28P01"),
        ("no password supplied", "28P01"),
        ("no pg_hba.conf entry", "28000"),
        ("Peer authentication failed", "28000"),
        ("too many clients", "53300"),
        ("too many connections", "53300"),
        ("remaining connection slots", "53300"),
        ('role "', "28000"),
        ("does not exist", "3D000"),
        ("is starting up", "57P03"),
        ("is shutting down", "57P03"),
    ):
        if words in said:
            return state
    return None
