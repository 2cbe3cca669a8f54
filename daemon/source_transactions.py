"""``on_checkpoint`` in a KafkaSource: the program's SQL and what it has polled, in one transaction."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from sqlalchemy import Connection

from kafkasrcd.errors import AssignmentLost, StoreUnavailable
from kafkasrcd.settings import Settings
from kafkasrcd.storage.offset_store import Advance, TopicPartition
from kafkasrcd.storage.transaction import CommitUnknown, EffectsTransaction
from kafkasrcd.workers.kafka_settings import session_timeout_ms
from kafkasrcd.workers.source_reader import SourceReader

_SETTLE_SECONDS: Final = 20.0
"""How long a database is asked whether it has made a commit."""


class SourceTransactions:
    """One connection, one transaction at a time. Made without connecting."""

    def __init__(self, settings: Settings) -> None:
        idle_seconds = session_timeout_ms(settings) / 1000
        self._transaction = EffectsTransaction(
            settings.store.url, settings.group_id, settings.store.busy_timeout_ms, idle_seconds
        )

    @contextmanager
    def scope(self) -> Iterator[Connection]:
        """What is done on the connection is in the transaction, and undone where the block raises."""
        with self._transaction.scope() as connection:
            yield connection

    def commit(self, reader: SourceReader) -> None:
        """What was done in ``scope`` and what was polled, together.

        Raises AssignmentLost or StoreUnavailable where nothing of it is committed; CommitUnknown, one of the latter,
        where nobody knows: then the store's row says it to who claims the partition next.
        """
        if reader.lost:
            raise AssignmentLost(f"{_listed(reader.lost)} went to another member: nothing of the checkpoint is kept")
        advances = reader.advances()
        try:
            refusals = self._transaction.commit(advances)
        except CommitUnknown as error:
            if not self._was_made(advances):
                raise StoreUnavailable(str(error)) from error
            refusals = {}
        if refusals:
            reader.fenced({name: str(refusal) for name, refusal in refusals.items()})
            raise AssignmentLost(
                f"{_listed(refusals)} was claimed by another member: nothing of the checkpoint is kept"
            )
        reader.commit()

    def rollback(self) -> None:
        """Undo what is open."""
        self._transaction.rollback()

    def close(self) -> None:
        """Undo what is open, and disconnect."""
        self._transaction.close()

    def _was_made(self, advances: Sequence[Advance]) -> bool:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            try:
                return self._transaction.settle(advances)
            except StoreUnavailable as error:
                if time.monotonic() > deadline:
                    raise CommitUnknown(str(error)) from error
                time.sleep(0.2)


def _listed(names: Iterable[TopicPartition]) -> str:
    return ", ".join(map(str, sorted(names)))
