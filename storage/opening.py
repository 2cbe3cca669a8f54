"""From ``store.url`` to the store that it names."""

from typing import TYPE_CHECKING

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.storage.memory_store import MemoryOffsetStore
from kafkasrcd.storage.offset_store import OffsetStore

if TYPE_CHECKING:
    from kafkasrcd.storage.dead_letter_store import DeadLetterStore
    from kafkasrcd.storage.intent_store import IntentStore
    from kafkasrcd.storage.sql_store import Database

MEMORY_URL = "memory://"


def open_dead_letters(
    url: str,
    group_id: str,
    busy_timeout_ms: int,
    *,
    shared_with_effects: bool = False,
    must_exist: bool = False,
) -> "DeadLetterStore":
    """The dead letters of ``group_id`` in the store at ``url``. As ``open_store``, but that ``memory://`` has none.

    ``must_exist``: nothing is created or brought up to date; ``ConfigurationError`` where that would be needed.
    """
    if url == MEMORY_URL:
        raise ConfigurationError(
            "store.url is memory://, which keeps no dead letters: name a database, or set handler.dead_letter_topic"
        )
    from kafkasrcd.storage.dead_letter_store import DeadLetterStore

    return DeadLetterStore(_open_database(url, busy_timeout_ms, shared_with_effects, must_exist), group_id)


def open_intents(
    url: str, group_id: str, busy_timeout_ms: int, *, shared_with_effects: bool = False, must_exist: bool = False
) -> "IntentStore":
    """The intents of ``group_id`` in the store at ``url``. As ``open_dead_letters``."""
    if url == MEMORY_URL:
        raise ConfigurationError(
            "store.url is memory://, out of reach of commands: name a database to pause and resume by command; until "
            "then, what the breaker has paused goes on after a restart of kafkasrcd"
        )
    from kafkasrcd.storage.intent_store import IntentStore

    return IntentStore(_open_database(url, busy_timeout_ms, shared_with_effects, must_exist), group_id)


def open_store(url: str, group_id: str, busy_timeout_ms: int, *, shared_with_effects: bool = False) -> OffsetStore:
    """Open the store of ``group_id`` at ``url``: ``sqlite:///path``, ``postgresql://…`` or ``memory://``.

    A path after three slashes is relative to the working directory; an absolute one has four. May block up to
    ``busy_timeout_ms`` a few times while other processes open the same database. ``shared_with_effects``: a SQLite file
    may have others' tables. Raises ``ConfigurationError`` where the URL, the database or its contents cannot be used
    until someone changes something, ``StoreUnavailable`` where another attempt may succeed (locked, disk full, away).
    """
    if url == MEMORY_URL:
        return MemoryOffsetStore(group_id)
    from kafkasrcd.storage.sql_store import SqlOffsetStore

    return SqlOffsetStore(_open_database(url, busy_timeout_ms, shared_with_effects), group_id)


def _open_database(url: str, busy_timeout_ms: int, shared: bool, must_exist: bool = False) -> "Database":
    # The imports are here, so that what keeps its offsets in memory does not load SQLAlchemy (0.2 s).
    if url.startswith(("sqlite:", "sqlite+")):
        from kafkasrcd.storage.sqlite import SqliteDatabase

        return SqliteDatabase(url, busy_timeout_ms, shared=shared, must_exist=must_exist)
    if url.startswith(("postgresql:", "postgresql+")):
        from kafkasrcd.storage.postgresql import PostgresqlDatabase

        return PostgresqlDatabase(url, busy_timeout_ms, must_exist=must_exist)
    # Its scheme only: the rest may hold a password.
    scheme = url.partition(":")[0]
    raise ConfigurationError(
        f"store.url: {scheme!r} is not supported; use sqlite:///path, postgresql://user@host/database or memory://"
    )
