"""Where a partition starts: which record of the group's progress counts, and what is said where two disagree.

The authority is Kafka, whose committed offset operators see and move; with ``on_checkpoint`` it is the store, whose
offset is in one transaction with the handlers' effects, and Kafka's only follows it.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaException
from confluent_kafka import TopicPartition as KafkaTopicPartition

from kafkasrcd.daemon.kafka_offsets import Committed, committed_offsets, offsets_at
from kafkasrcd.daemon.questions import Questions
from kafkasrcd.daemon.reached import beyond, is_ours
from kafkasrcd.daemon.topic_patterns import subscribes
from kafkasrcd.errors import GroupError
from kafkasrcd.settings import AutoOffsetReset, CommitStrategy, Settings
from kafkasrcd.storage.offset_store import Claim, Layer, Layout, OffsetStore, TopicPartition
from kafkasrcd.workers.event_log import EventLog

_ANSWER_SECONDS: Final = 10.0
"""For the topics and the group's offsets: many times what a slow broker takes."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


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


class _Before(msgspec.Struct, frozen=True):
    """What there was when this daemon started: of each topic, how many partitions; which of them had an offset, and
    whether this daemon had committed it."""

    partitions: dict[str, int]
    committed: dict[TopicPartition, bool] = {}

    def had(self, name: TopicPartition) -> bool:
        """Whether the group started with this partition, or may have.

        Partitions are numbered in the order in which they are added, and this daemon records all of a topic at once
        when it starts with it. So where it has recorded the first ones, those behind them came later. Of what others
        have committed nothing follows: many commit only what they have read something of.
        """
        if name.partition >= self.partitions.get(name.topic, 0):
            return False
        ours = {each.partition: mine for each, mine in self.committed.items() if each.topic == name.topic}
        return not ours or not all(ours.values()) or name.partition in ours or max(ours) >= len(ours)


class StartPoints:
    """Blocks: used on the recorder's thread, but for ``look_around``."""

    def __init__(self, settings: Settings, layout: Layout) -> None:
        self._settings = settings
        self._layout = layout
        self._store_decides = settings.commit_strategy is CommitStrategy.ON_CHECKPOINT
        self._policy = settings.start_from or settings.auto_offset_reset.value
        self._before: Future[_Before] | None = None
        self._known_before: _Before | None = None
        self._in_kafka: set[TopicPartition] = set()
        """Those that the group was seen to have an offset of."""
        self._log = EventLog("start")

    def look_around(self, kafka: Questions) -> None:
        """Before the group is joined: ask what there is by then. Does not block.

        Before, so that what other members record in the same first generation is not taken for what there was.
        """
        self._before = kafka.call(self._look)

    def note_committed(self, names: Iterable[TopicPartition]) -> None:
        """The group in Kafka has an offset of these. While it has members, an offset goes with its topic only: one
        that is gone later belonged to a topic that was deleted, and created anew where there is a partition again."""
        self._in_kafka.update(names)

    def find(
        self,
        claims: Mapping[TopicPartition, Claim],
        moved: Mapping[TopicPartition, int],
        store: OffsetStore,
        kafka: Questions,
    ) -> dict[TopicPartition, StartPoint]:
        """Where it was ``moved`` to, else where the authority has it, else where the other one has it, else by
        ``start_from``; a partition of a topic that was created anew, at its beginning. The store is made to agree.

        Raises StoreError or GroupError where that cannot be found out now.
        """
        if self._before is None:
            self._before = kafka.call(_count)  # by now members may have recorded something: of that nothing follows
        unmoved = [name for name in claims if name not in moved]
        committed = kafka.call(lambda consumer: committed_offsets(consumer, unmoved)).result() if unmoved else {}
        absent = [name for name in unmoved if name not in committed]
        before = self._what_was_before(kafka) if absent else _Before({})
        anew = {name for name in absent if name in self._in_kafka}
        found: dict[TopicPartition, StartPoint] = {}
        for name in sorted(anew):
            self._log.warning(
                "topic_recreated",
                f"{name} had an offset in Kafka, which went with its topic: what the store has, "
                f"{claims[name].next_offset}, is of the one before",
                topic=name.topic,
                partition=name.partition,
                stored=claims[name].next_offset,
            )
        for name, claim in claims.items():
            point = None if name in anew else self._recorded(claim, moved.get(name), committed.get(name))
            if point is not None:
                found[name] = point
        missing = [name for name in claims if name not in found]
        if missing:
            added = [name for name in missing if name in anew or not before.had(name)]
            offsets = self._first_offsets(missing, added, kafka)
            for name in missing:
                epoch = claims[name].assignment_epoch
                found[name] = (
                    StartPoint(epoch, offsets[name])
                    if name in offsets
                    else StartPoint(epoch, None, problem="no committed offset, and auto_offset_reset is error")
                )
        self._correct_store(claims, found, store)
        self._in_kafka -= anew
        self._in_kafka |= committed.keys()
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

    def _first_offsets(
        self, names: Sequence[TopicPartition], added: Sequence[TopicPartition], kafka: Questions
    ) -> dict[TopicPartition, int]:
        """For partitions that nobody has an offset of: by ``start_from``, which says where in a topic the group
        starts. Those that were ``added`` since belong to it from their first record on, whatever that says."""
        if self._policy == AutoOffsetReset.ERROR:
            return {}
        offsets: dict[TopicPartition, int] = {}
        if added:
            offsets |= kafka.call(lambda consumer: offsets_at(consumer, added, OFFSET_BEGINNING)).result()
        if others := [name for name in names if name not in added]:
            offsets |= kafka.call(lambda consumer: self._by_policy(consumer, others)).result()
        for name in added:
            self._log.info(
                "partition_added",
                f"{name} is newer than the group's start: it is read from its beginning, {offsets[name]}",
                topic=name.topic,
                partition=name.partition,
                offset=offsets[name],
            )
        return offsets

    def _by_policy(self, consumer: Consumer, names: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        kind, _, value = self._policy.partition(":")
        if kind == "offset":
            return dict.fromkeys(names, int(value))
        if kind == "timestamp":
            since = datetime.fromisoformat(value) - _EPOCH
            return offsets_at(consumer, names, -(-since // _MILLISECOND))  # rounded up: nothing older
        return offsets_at(consumer, names, OFFSET_BEGINNING if kind == AutoOffsetReset.EARLIEST else OFFSET_END)

    def _what_was_before(self, kafka: Questions) -> _Before:
        if self._before is None:
            self._before = kafka.call(_count)
        try:
            before = self._before.result()
        except GroupError:
            self._before = None  # it is asked again with the next claim
            raise
        if before is not self._known_before:
            self._known_before = before
            self._in_kafka |= before.committed.keys()
        return before

    def _look(self, consumer: Consumer) -> _Before:
        before = _count(consumer)
        names = [
            TopicPartition(topic, number)
            for topic, partitions in before.partitions.items()
            if any(subscribes(each, topic, self._settings.supervisor.group_protocol) for each in self._settings.topics)
            if partitions < sys.maxsize
            for number in range(partitions)
        ]
        return _Before(before.partitions, _committers(consumer, names))

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


def _count(consumer: Consumer) -> _Before:
    try:
        topics = consumer.list_topics(timeout=_ANSWER_SECONDS).topics
    except KafkaException as exception:
        raise GroupError(f"the topics cannot be listed: {exception.args[0].str()}") from exception
    # Where the broker cannot say what a topic has, it may have had anything.
    counts = {name: len(topic.partitions) if topic.error is None else sys.maxsize for name, topic in topics.items()}
    return _Before(counts)


def _committers(consumer: Consumer, names: Sequence[TopicPartition]) -> dict[TopicPartition, bool]:
    """Those that the group has an offset of: whether this daemon committed it."""
    asked = [KafkaTopicPartition(name.topic, name.partition) for name in names]
    try:
        answered = consumer.committed(asked, timeout=_ANSWER_SECONDS) if asked else []
    except KafkaException as exception:
        raise GroupError(f"the committed offsets cannot be read: {exception.args[0].str()}") from exception
    return {
        TopicPartition(each.topic, each.partition): is_ours(each.metadata or "")
        for each in answered
        if each.error is None and each.offset >= 0
    }
