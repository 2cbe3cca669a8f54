"""The dead letters' statements, on a connection that is in a transaction: the store's own, or a handler's."""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, delete, func, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from kafkasrcd.storage.dead_letters import (
    DeadLetter,
    DueLetter,
    LetterCount,
    LetterFilter,
    LetterState,
    Redelivered,
    StoredLetter,
)
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.storage.schema import dead_letters

_INSERTS: dict[str, Callable[[Table], Any]] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}
_RECORD = ("group_id", "topic", "partition", "record_offset")
_SINCE_FIRST = (*_RECORD, "first_failed_ms")
"""What stays where a letter is written again."""


class DeadLetterRows:
    """Those of ``group_id``. Every method runs in the caller's transaction and raises SQLAlchemy's errors."""

    def __init__(self, group_id: str, now_ms: Callable[[], int]) -> None:
        self._group_id = group_id
        self._now_ms = now_ms

    def bury(self, connection: Connection, letter: DeadLetter) -> None:
        """Keep ``letter``, open, or to be retried where it is due some time. A record has one letter: where it is
        buried again (after a crash before its offset was recorded, or after a seek back), that one says what was last.
        """
        values = {
            "group_id": self._group_id,
            "topic": letter.topic,
            "partition": letter.partition,
            "record_offset": letter.offset,
            "timestamp_ms": letter.timestamp_ms,
            "record_key": letter.key,
            "record_value": letter.value,
            "headers": letter.headers,
            "value_format": letter.value_format,
            "schema_id": letter.schema_id,
            "first_failed_ms": letter.first_failed_ms,
            **self._failure(letter),
        }
        statement = _INSERTS[connection.dialect.name](dead_letters).values(values)
        again = {name: statement.excluded[name] for name in values if name not in _SINCE_FIRST}
        connection.execute(statement.on_conflict_do_update(index_elements=_RECORD, set_=again))

    def find(self, connection: Connection, wanted: LetterFilter, most: int, after: int = 0) -> list[StoredLetter]:
        """Those of ``wanted``, by id, ``most`` at once; ``after``: of higher ids only."""
        statement = (
            select(dead_letters)
            .where(*self._where(wanted), dead_letters.c.id > after)
            .order_by(dead_letters.c.id)
            .limit(most)
        )
        return [_stored(row) for row in connection.execute(statement)]

    def ids(self, connection: Connection, wanted: LetterFilter) -> list[int]:
        """Those of ``wanted``, ascending."""
        statement = select(dead_letters.c.id).where(*self._where(wanted)).order_by(dead_letters.c.id)
        return list(connection.scalars(statement))

    def count(self, connection: Connection, wanted: LetterFilter) -> int:
        """How many are of ``wanted``."""
        return connection.scalar(select(func.count()).select_from(dead_letters).where(*self._where(wanted))) or 0

    def counts(self, connection: Connection, state: LetterState) -> list[LetterCount]:
        """Those in ``state``, by topic and error, most first."""
        statement = (
            select(dead_letters.c.topic, dead_letters.c.error, func.count().label("found"))
            .where(*self._where(LetterFilter(states=(state,))))
            .group_by(dead_letters.c.topic, dead_letters.c.error)
        )
        counts = [LetterCount(topic, error, found) for topic, error, found in connection.execute(statement)]
        return sorted(counts, key=lambda each: (-each.count, each.topic, each.error))

    def change(
        self,
        connection: Connection,
        letter_id: int,
        before: Sequence[LetterState],
        after: LetterState,
        by: str,
        note: str,
        seen: str | None = None,
        due_ms: int | None = None,
    ) -> bool:
        """Bring it from one of ``before`` to ``after``, due at ``due_ms``; False where it is in none of those, or not
        there, or changed last by another than ``seen``."""
        statement = (
            update(dead_letters)
            .where(*self._where(LetterFilter(ids=(letter_id,), states=tuple(before))))
            .where(*([] if seen is None else [dead_letters.c.changed_by == seen]))
            .values(state=after.value, changed_ms=self._now_ms(), changed_by=by, note=note, due_ms=due_ms)
        )
        return connection.execute(statement).rowcount == 1

    def hand_over(
        self, connection: Connection, letter_ids: Sequence[int], before: LetterState, by: str, due_ms: int
    ) -> list[int]:
        """Have those that are in the state ``before`` replayed by whoever has their partition; which they are."""
        wanted = LetterFilter(ids=tuple(letter_ids), states=(before,))
        statement = (
            update(dead_letters)
            .where(*self._where(wanted))
            .values(state=LetterState.REPLAYING.value, changed_ms=self._now_ms(), changed_by=by, note="", due_ms=due_ms)
            .returning(dead_letters.c.id)
        )
        return list(connection.scalars(statement))

    def due(self, connection: Connection, names: Sequence[TopicPartition], most: int) -> list[DueLetter]:
        """Those of ``names`` that are due now, the longest due first; of one partition in the order of its records."""
        letters = dead_letters.c
        statement = (
            select(letters.id, letters.topic, letters.partition, letters.record_offset, letters.record_key)
            .where(
                letters.group_id == self._group_id,
                letters.due_ms <= self._now_ms(),
                tuple_(letters.topic, letters.partition).in_([(name.topic, name.partition) for name in names]),
            )
            .order_by(letters.due_ms)
            .limit(most)
        )
        found = [
            DueLetter(
                id=row.id,
                topic=row.topic,
                partition=row.partition,
                offset=row.record_offset,
                key=_bytes(row.record_key),
            )
            for row in connection.execute(statement)
        ]
        return sorted(found, key=lambda each: each.offset)

    def settle(self, connection: Connection, redelivered: Redelivered) -> bool:
        """Write down what became of a letter that was due; False where it is not any more what was seen: someone else
        has replayed, discarded or replaced it. One that was retried and is handled is forgotten."""
        seen, failed = redelivered.seen, redelivered.failed
        letters = dead_letters.c
        as_seen = (
            letters.id == seen.id,
            letters.state == seen.state.value,
            letters.due_ms == seen.letter.due_ms,
            letters.attempts == seen.letter.attempts,
        )
        statement: Any
        if failed is None and seen.state is LetterState.REPLAYING:
            statement = update(dead_letters).values(
                state=LetterState.REPLAYED.value, changed_ms=self._now_ms(), due_ms=None
            )
        elif failed is None or redelivered.forgotten:
            statement = delete(dead_letters)
        else:
            statement = update(dead_letters).values(self._failure(failed))
        return connection.execute(statement.where(*as_seen)).rowcount == 1

    def _failure(self, letter: DeadLetter) -> dict[str, Any]:
        """What each failure writes."""
        return {
            "error": letter.error,
            "reason": letter.reason,
            "traceback": letter.traceback,
            "attempts": letter.attempts,
            "last_failed_ms": letter.last_failed_ms,
            "host": letter.host,
            "version": letter.version,
            "state": (LetterState.OPEN if letter.due_ms is None else LetterState.RETRYING).value,
            "due_ms": letter.due_ms,
            "changed_ms": self._now_ms(),
            "changed_by": "",
            "note": "",
        }

    def _where(self, wanted: LetterFilter) -> list[ColumnElement[bool]]:
        letters = dead_letters.c
        found: list[ColumnElement[bool]] = [letters.group_id == self._group_id]
        if wanted.ids:
            found.append(letters.id.in_(wanted.ids))
        if wanted.topic is not None:
            found.append(letters.topic == wanted.topic)
        if wanted.partition is not None:
            found.append(letters.partition == wanted.partition)
        if wanted.error is not None:
            found.append(letters.error == wanted.error)
        if wanted.since_ms is not None:
            found.append(letters.last_failed_ms >= wanted.since_ms)
        if wanted.has_due is not None:
            found.append(letters.due_ms.is_not(None) if wanted.has_due else letters.due_ms.is_(None))
        if wanted.changed_by is not None:
            found.append(letters.changed_by == wanted.changed_by)
        if wanted.states:
            found.append(letters.state.in_([state.value for state in wanted.states]))
        return found


def _stored(row: Row[tuple[object, ...]]) -> StoredLetter:
    return StoredLetter(
        id=row.id,
        state=LetterState(row.state),
        changed_ms=row.changed_ms,
        changed_by=row.changed_by,
        note=row.note,
        letter=DeadLetter(
            topic=row.topic,
            partition=row.partition,
            offset=row.record_offset,
            timestamp_ms=row.timestamp_ms,
            key=_bytes(row.record_key),
            value=_bytes(row.record_value),
            headers=_bytes(row.headers),
            value_format=row.value_format,
            schema_id=row.schema_id,
            error=row.error,
            reason=row.reason,
            traceback=row.traceback,
            attempts=row.attempts,
            first_failed_ms=row.first_failed_ms,
            last_failed_ms=row.last_failed_ms,
            host=row.host,
            version=row.version,
            due_ms=row.due_ms,
        ),
    )


def _bytes(found: bytes | None) -> bytes | None:
    """psycopg answers with a memoryview in places."""
    return None if found is None else bytes(found)
