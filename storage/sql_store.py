"""The offset store in a SQL database."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from sqlalchemy import Connection

from kafkasrcd.errors import StoreError
from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.dead_letter_rows import DeadLetterRows
from kafkasrcd.storage.dead_letters import DueLetter, LetterCount, LetterState
from kafkasrcd.storage.intent_rows import IntentRows
from kafkasrcd.storage.intents import Intent
from kafkasrcd.storage.offset_rows import OffsetRows
from kafkasrcd.storage.offset_store import WHOLE, Advance, Claim, Layout, OffsetStore, StoredOffset, TopicPartition


class Database(ABC):
    """A kind of database, as the store uses it. Its tables are there and up to date.

    The transactions raise ``StoreUnavailable`` where the database cannot be used now.
    """

    @abstractmethod
    def writing(self, *, durable: bool) -> AbstractContextManager[Connection]:
        """A write transaction: committed at the end, rolled back if the block raises.

        ``durable`` survives a power cut. Without it the last such transactions may be missing after a power cut or the
        crash of a server (never after the death of a process of ours), but none in the middle. That saves waiting for
        the disk.
        """

    @abstractmethod
    def claiming(self, group_id: str) -> AbstractContextManager[Connection]:
        """A durable write transaction that no other one of this group's runs beside."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[Connection]:
        """A consistent view; waits for nobody."""

    @abstractmethod
    def close(self) -> None:
        """Give back connections."""


class SqlOffsetStore(OffsetStore):
    """Offsets of ``group_id`` in ``database``.

    Claims and restarts are on the disk when they return; an epoch once given out is never given out again. The last
    advances may be missing after a power cut or a crash of PostgreSQL, and only after one: then records are processed
    again, which Kafka's own offsets prevent where they are the authority, as with ``periodic``.
    """

    def __init__(self, database: Database, group_id: str, *, now_ms: Callable[[], int] = wall_clock_ms) -> None:
        self._database = database
        self._group_id = group_id
        self._rows = OffsetRows(group_id, now_ms)
        self._letters = DeadLetterRows(group_id, now_ms)
        self._intents = IntentRows(group_id)

    def claim(
        self, topic_partitions: Sequence[TopicPartition], owner: str, layout: Layout = WHOLE
    ) -> dict[TopicPartition, Claim]:
        if not topic_partitions:
            return {}
        with self._database.claiming(self._group_id) as connection:
            return self._rows.claim(connection, topic_partitions, owner, layout)

    def restart(
        self, starts: Mapping[TopicPartition, tuple[int, int]], layout: Layout = WHOLE
    ) -> dict[TopicPartition, StoreError]:
        if not starts:
            return {}
        with self._database.writing(durable=True) as connection:
            return self._rows.restart(connection, starts, layout)

    def advance(self, advances: Iterable[Advance]) -> dict[TopicPartition, StoreError]:
        asked = list(advances)
        if not asked:
            return {}
        with self._database.writing(durable=False) as connection:
            return self._rows.advance(connection, asked)

    def offsets(self) -> list[StoredOffset]:
        with self._database.reading() as connection:
            return self._rows.stored(connection)

    def remember(self, topic_partitions: Iterable[TopicPartition]) -> None:
        with self._database.writing(durable=False) as connection:
            self._rows.remember(connection, topic_partitions)

    def history(self, topic_partition: TopicPartition) -> list[tuple[int, int]]:
        with self._database.reading() as connection:
            return self._rows.history(connection, topic_partition)

    def count_letters(self, state: LetterState) -> list[LetterCount]:
        with self._database.reading() as connection:
            return self._letters.counts(connection, state)

    def due_letters(self, topic_partitions: Sequence[TopicPartition], most: int) -> list[DueLetter]:
        with self._database.reading() as connection:
            return self._letters.due(connection, topic_partitions, most)

    def intents(self) -> list[Intent]:
        with self._database.reading() as connection:
            return self._intents.all(connection)

    def set_intent(self, intent: Intent) -> None:
        with self._database.writing(durable=True) as connection:
            self._intents.set(connection, intent, replace=False)

    def close(self) -> None:
        self._database.close()
