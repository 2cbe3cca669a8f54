"""The offset store in a SQL database."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sqlalchemy import Connection, Update, bindparam, make_url, or_, select, update
from sqlalchemy.exc import ArgumentError

from kafkasrcd.errors import ConfigurationError, StoreError
from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.offset_store import Advance, Claim, OffsetStore, StoredOffset, TopicPartition
from kafkasrcd.storage.refusals import refusal
from kafkasrcd.storage.schema import offsets
from kafkasrcd.storage.sqlite import SqliteDatabase

WHOLE_PARTITION = {"handler_slot": 0, "slots": 1}
"""One handler reads all of a partition. Ordering by key will add a row for each handler."""

# The names of parameters differ from those of columns, as SQLAlchemy asks for.
_OF_THE_OWNER = update(offsets).where(
    offsets.c.group_id == bindparam("its_group"),
    offsets.c.topic == bindparam("its_topic"),
    offsets.c.partition == bindparam("its_partition"),
    offsets.c.handler_slot == bindparam("its_slot"),
    offsets.c.assignment_epoch == bindparam("its_epoch"),
)
_RESTART = _OF_THE_OWNER.values(next_offset=bindparam("new_offset"), updated_ms=bindparam("now_ms"))
_ADVANCE = _RESTART.where(or_(offsets.c.next_offset.is_(None), offsets.c.next_offset <= bindparam("new_offset")))


class SqlOffsetStore(OffsetStore):
    """Offsets of ``group_id`` in the database at ``url``; today ``sqlite:///path``.

    Opening it creates what is missing: the folder (0700), the file (0600) and the tables. Raises
    ``ConfigurationError`` where the database is not ours or cannot be written, ``StoreUnavailable`` where it may be
    usable later. A call blocks up to ``busy_timeout_ms`` for the write lock, then for one small write.

    Claims and restarts are on the disk when they return; an epoch once given out is never given out again. The last
    advances may be missing after a power cut, and only after one: then records are processed again, which Kafka's own
    offsets prevent where they are the authority, as with ``periodic``.
    """

    def __init__(
        self, url: str, group_id: str, busy_timeout_ms: int, *, now_ms: Callable[[], int] = wall_clock_ms
    ) -> None:
        self._group_id = group_id
        self._now_ms = now_ms
        # A second kind of database joins here, with the methods of this one.
        self._database = SqliteDatabase(_sqlite_path(url), busy_timeout_ms)
        insert = self._database.insert(offsets)
        self._claim = insert.on_conflict_do_update(
            index_elements=[offsets.c.group_id, offsets.c.topic, offsets.c.partition, offsets.c.handler_slot],
            set_={
                "assignment_epoch": offsets.c.assignment_epoch + 1,
                "owner": insert.excluded.owner,
                "updated_ms": insert.excluded.updated_ms,
            },
        )

    def claim(self, topic_partitions: Sequence[TopicPartition], owner: str) -> dict[TopicPartition, Claim]:
        wanted = list(dict.fromkeys(topic_partitions))
        if not wanted:
            return {}
        now_ms = self._now_ms()
        rows = [
            {
                "group_id": self._group_id,
                "topic": topic_partition.topic,
                "partition": topic_partition.partition,
                **WHOLE_PARTITION,
                "assignment_epoch": 1,
                "owner": owner,
                "updated_ms": now_ms,
            }
            for topic_partition in wanted
        ]
        with self._database.writing(durable=True) as connection:
            connection.execute(self._claim, rows)
            stored = self._stored(connection, wanted)
        return {
            topic_partition: Claim(
                topic_partition, stored[topic_partition].assignment_epoch, stored[topic_partition].next_offset
            )
            for topic_partition in wanted
        }

    def restart(self, starts: Mapping[TopicPartition, tuple[int, int]]) -> dict[TopicPartition, StoreError]:
        return self._move(_RESTART, {key: Advance(key, *start) for key, start in starts.items()}, durable=True)

    def advance(self, advances: Iterable[Advance]) -> dict[TopicPartition, StoreError]:
        return self._move(_ADVANCE, {advance.topic_partition: advance for advance in advances}, durable=False)

    def offsets(self) -> list[StoredOffset]:
        with self._database.reading() as connection:
            return sorted(self._stored(connection).values(), key=lambda row: row.topic_partition)

    def close(self) -> None:
        self._database.close()

    def _move(
        self, statement: Update, asked: dict[TopicPartition, Advance], durable: bool
    ) -> dict[TopicPartition, StoreError]:
        if not asked:
            return {}
        now_ms = self._now_ms()
        rows = [
            {
                "its_group": self._group_id,
                "its_topic": advance.topic_partition.topic,
                "its_partition": advance.topic_partition.partition,
                "its_slot": WHOLE_PARTITION["handler_slot"],
                "its_epoch": advance.assignment_epoch,
                "new_offset": advance.next_offset,
                "now_ms": now_ms,
            }
            for advance in asked.values()
        ]
        with self._database.writing(durable=durable) as connection:
            if connection.execute(statement, rows).rowcount == len(rows):
                return {}
            # Some matched no row. Which ones shows in the rows as they are now: what was recorded reads as asked.
            stored = self._stored(connection, asked)
        return {
            topic_partition: refusal(advance, stored.get(topic_partition))
            for topic_partition, advance in asked.items()
            if not _recorded(advance, stored.get(topic_partition))
        }

    def _stored(
        self, connection: Connection, of: Iterable[TopicPartition] | None = None
    ) -> dict[TopicPartition, StoredOffset]:
        rows = select(
            offsets.c.topic,
            offsets.c.partition,
            offsets.c.assignment_epoch,
            offsets.c.next_offset,
            offsets.c.owner,
            offsets.c.updated_ms,
        ).where(
            offsets.c.group_id == self._group_id,
            offsets.c.handler_slot == WHOLE_PARTITION["handler_slot"],
        )
        if of is not None:
            rows = rows.where(offsets.c.topic.in_({topic_partition.topic for topic_partition in of}))
        return {
            (key := TopicPartition(topic, partition)): StoredOffset(key, *rest)
            for topic, partition, *rest in connection.execute(rows)
        }


def _recorded(asked: Advance, stored: StoredOffset | None) -> bool:
    return stored is not None and (stored.assignment_epoch, stored.next_offset) == (
        asked.assignment_epoch,
        asked.next_offset,
    )


def _sqlite_path(url: str) -> Path:
    """The file of ``sqlite:///path``, absolute: the process may change its working directory later."""
    try:
        parts = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError(f"store.url {url!r} is not a URL; it looks like sqlite:////var/lib/x.db") from error
    if parts.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ConfigurationError(f"store.url: {parts.drivername!r} is not supported; use sqlite:///path")
    if parts.query:
        raise ConfigurationError(f"store.url {url!r}: nothing may follow the path of the file")
    if parts.database in (None, "", ":memory:"):
        raise ConfigurationError(f"store.url {url!r} names no file; use sqlite:///path, or memory:// to keep nothing")
    return Path(str(parts.database)).absolute()
