"""Where a partition starts: which record of the group's progress counts, and what is said where two disagree.

The authority is Kafka, whose committed offset operators see and move; with ``on_checkpoint`` it is the store, whose
offset is in one transaction with the handlers' effects, and Kafka's only follows it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from confluent_kafka import OFFSET_BEGINNING, OFFSET_END

from kafkasrcd.daemon.kafka_offsets import Committed, committed_offsets, offsets_at
from kafkasrcd.daemon.membership import Membership
from kafkasrcd.daemon.reached import beyond
from kafkasrcd.settings import AutoOffsetReset, CommitStrategy, Settings
from kafkasrcd.storage.offset_store import Claim, Layer, Layout, OffsetStore, TopicPartition
from kafkasrcd.workers.event_log import EventLog


class StartPoint(msgspec.Struct, frozen=True):
    """Where a claimed partition starts, and which records from there on are done already (``layers``).

    ``next_offset`` is None, with the ``problem``, where it cannot start.
    """

    assignment_epoch: int
    next_offset: int | None
    layers: tuple[Layer, ...] = ()
    problem: str = ""

    def starts(self, layout: Layout) -> tuple[int, ...]:
        """For each slot of ``layout``, the offset before which it has nothing to do."""
        start = self.next_offset or 0
        for layer in self.layers:
            if layer.layout == layout:
                return tuple(max(start, next_offset) for next_offset in layer.next_offsets)
        return (start,) * layout.slots

    def carried(self, layout: Layout) -> tuple[Layer, ...]:
        """What slots of other layouts had done."""
        return tuple(layer for layer in self.layers if layer.layout != layout)


class StartPoints:
    """Blocks: used on the recorder's thread."""

    def __init__(self, settings: Settings, layout: Layout) -> None:
        self._settings = settings
        self._layout = layout
        self._store_decides = settings.commit_strategy is CommitStrategy.ON_CHECKPOINT
        self._log = EventLog("start")

    def find(
        self,
        claims: Mapping[TopicPartition, Claim],
        moved: Mapping[TopicPartition, int],
        store: OffsetStore,
        kafka: Membership,
    ) -> dict[TopicPartition, StartPoint]:
        """Where it was ``moved`` to, else where the authority has it, else where the other one has it, else by
        ``start_from``. The store is made to agree.

        Raises StoreError or GroupError where that cannot be found out now.
        """
        unmoved = [name for name in claims if name not in moved]
        committed = kafka.call(lambda consumer: committed_offsets(consumer, unmoved)).result() if unmoved else {}
        found: dict[TopicPartition, StartPoint] = {}
        for name, claim in claims.items():
            point = self._recorded(claim, moved.get(name), committed.get(name))
            if point is not None:
                found[name] = point
        missing = [name for name in claims if name not in found]
        if missing:
            offsets = kafka.call(lambda consumer: self._by_policy(consumer, missing)).result()
            for name in missing:
                epoch = claims[name].assignment_epoch
                found[name] = (
                    StartPoint(epoch, offsets[name])
                    if name in offsets
                    else StartPoint(epoch, None, problem="no committed offset, and auto_offset_reset is error")
                )
        self._correct_store(claims, found, store)
        return {name: found[name] for name in claims}

    def _recorded(self, claim: Claim, moved: int | None, committed: Committed | None) -> StartPoint | None:
        epoch, stored = claim.assignment_epoch, claim.next_offset
        of_store = None if stored is None else StartPoint(epoch, stored, claim.layers)
        of_kafka = None if committed is None else StartPoint(epoch, committed.next_offset, committed.layers)
        if moved is not None:
            return StartPoint(epoch, moved)
        if of_store is not None and of_kafka is not None and stored != of_kafka.next_offset:
            self._disagree(claim, of_kafka)
        if self._store_decides:
            return of_store or of_kafka
        if of_kafka is None and of_store is not None:
            self._warn(
                "start_from_store",
                claim.topic_partition,
                of_store,
                "has no offset committed in Kafka; it starts where the store has it",
            )
        return of_kafka or of_store

    def _disagree(self, claim: Claim, of_kafka: StartPoint) -> None:
        """Both values, and which counts. That Kafka lags behind the store is as it should be with ``on_checkpoint``."""
        stored, committed = claim.next_offset, of_kafka.next_offset
        start = stored if self._store_decides else committed
        behind = self._store_decides and (committed or 0) < (stored or 0)
        emit = self._log.info if behind else self._log.warning
        emit(
            "offsets_disagree",
            f"{claim.topic_partition} starts at {start}: the store has {stored}, the group in Kafka {committed}",
            topic=claim.topic_partition.topic,
            partition=claim.topic_partition.partition,
            offset=start,
            stored=stored,
            committed=committed,
        )

    def _warn(self, event: str, name: TopicPartition, point: StartPoint, what: str) -> None:
        self._log.warning(
            event, f"{name} {what}, {point.next_offset}", topic=name.topic, partition=name.partition,
            offset=point.next_offset,
        )  # fmt: skip

    def _by_policy(self, consumer: Any, names: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """For partitions that nobody has an offset of."""
        text = self._settings.start_from or self._settings.auto_offset_reset.value
        if text == AutoOffsetReset.ERROR:
            return {}
        kind, _, value = text.partition(":")
        if kind == "offset":
            return dict.fromkeys(names, int(value))
        if kind == "timestamp":
            at_ms = int(datetime.fromisoformat(value).timestamp() * 1000)
            return offsets_at(consumer, names, at_ms)
        return offsets_at(consumer, names, OFFSET_BEGINNING if text == AutoOffsetReset.EARLIEST else OFFSET_END)

    def _correct_store(
        self, claims: Mapping[TopicPartition, Claim], found: Mapping[TopicPartition, StartPoint], store: OffsetStore
    ) -> None:
        corrections: dict[TopicPartition, tuple[int, int]] = {}
        for name, point in found.items():
            claim = claims[name]
            if point.next_offset is None:
                continue
            if (claim.next_offset, beyond(point.next_offset, claim.layers)) != (point.next_offset, point.layers):
                corrections[name] = (claim.assignment_epoch, point.next_offset)
        if corrections:
            for refusal in store.restart(corrections, self._layout).values():
                raise refusal
