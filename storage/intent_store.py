"""The intents of a group in its offset store's database, as commands use them."""

from collections.abc import Iterable

from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.intent_rows import IntentRows
from kafkasrcd.storage.intents import Intent, IntentKind, Scope
from kafkasrcd.storage.offset_rows import OffsetRows
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.storage.sql_store import Database


class IntentStore:
    """Blocks. Every method is one transaction; each raises ``StoreUnavailable`` where the database cannot be used
    now."""

    def __init__(self, database: Database, group_id: str) -> None:
        self._database = database
        self._rows = IntentRows(group_id)
        self._offsets = OffsetRows(group_id, wall_clock_ms)

    def set(self, intents: Iterable[Intent]) -> None:
        """Keep them, each in the place of one of its kind and scope; they survive a power cut."""
        with self._database.writing(durable=True) as connection:
            for intent in intents:
                self._rows.set(connection, intent, replace=True)

    def clear(self, kind: IntentKind, scopes: Iterable[Scope]) -> list[Intent]:
        """Take back those of ``kind`` about ``scopes`` and parts of them; what they were. That survives a power cut."""
        with self._database.writing(durable=True) as connection:
            return [intent for scope in scopes for intent in self._rows.clear(connection, kind, scope)]

    def intents(self) -> list[Intent]:
        """Every one of the group, ordered by scope."""
        with self._database.reading() as connection:
            return self._rows.all(connection)

    def partitions(self) -> list[TopicPartition]:
        """Those that the group has worked on so far."""
        with self._database.reading() as connection:
            return [stored.topic_partition for stored in self._offsets.stored(connection)]

    def close(self) -> None:
        """Give back connections."""
        self._database.close()
