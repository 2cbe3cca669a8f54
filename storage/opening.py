"""From ``store.url`` to the store that it names."""

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.storage.memory_store import MemoryOffsetStore
from kafkasrcd.storage.offset_store import OffsetStore

MEMORY_URL = "memory://"


def open_store(url: str, group_id: str, busy_timeout_ms: int) -> OffsetStore:
    """Open the store of ``group_id`` at ``url``: ``sqlite:///path`` or ``memory://``.

    A path after three slashes is relative to the working directory; an absolute one has four. May block up to
    ``busy_timeout_ms`` a few times while other processes open the same file. Raises ``ConfigurationError`` where the
    URL, the file or its contents cannot be used until someone changes something, ``StoreUnavailable`` where another
    attempt may succeed (locked, disk full).
    """
    if url == MEMORY_URL:
        return MemoryOffsetStore(group_id)
    if url.startswith(("sqlite:", "sqlite+")):
        # Here, so that what keeps its offsets in memory does not load SQLAlchemy (0.2 s).
        from kafkasrcd.storage.sql_store import SqlOffsetStore

        return SqlOffsetStore(url, group_id, busy_timeout_ms)
    # Its scheme only: the rest may hold a password.
    scheme = url.partition(":")[0]
    raise ConfigurationError(f"store.url: {scheme!r} is not supported; use sqlite:///path or memory://")
