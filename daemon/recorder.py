"""Where to start, and how far it got: the store's and Kafka's record of both, on one thread.

One thread, so that commits never overtake each other, and the event loop never waits for a disk or a broker. In every
record the store comes first: what Kafka has, the store has.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import msgspec
from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaException
from confluent_kafka import TopicPartition as KafkaTopicPartition

from kafkasrcd.daemon.membership import commit
from kafkasrcd.errors import GroupError, StoreError
from kafkasrcd.settings import AutoOffsetReset, Settings
from kafkasrcd.storage.offset_store import Advance, Claim, OffsetStore, TopicPartition
from kafkasrcd.workers.event_log import EventLog

_BROKER_SECONDS: Final = 10.0
"""A request for committed offsets or for the ends of partitions: many times what a slow broker takes."""

T = TypeVar("T")


class StartPoint(msgspec.Struct, frozen=True):
    """Where a claimed partition starts; ``next_offset`` is None, with the ``problem``, where it cannot."""

    assignment_epoch: int
    next_offset: int | None
    problem: str = ""


class Recorded(msgspec.Struct, frozen=True):
    """What became of a record: ``accepted`` by store and Kafka; refused by the store; refused by Kafka."""

    accepted: dict[TopicPartition, int]
    refused_by_store: dict[TopicPartition, StoreError]
    refused_by_kafka: dict[TopicPartition, str]


class Recorder:
    """The coroutines run on the recorder's thread, one after the other; a cancelled one finishes there, unheard."""

    def __init__(self, settings: Settings, owner: str) -> None:
        self._settings = settings
        self._owner = owner
        self._log = EventLog("recorder")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._store: OffsetStore | None = None
        self._consumer: Consumer | None = None

    async def open(self, open_store: Callable[[], OffsetStore]) -> None:
        """Open the store, on the thread that will use it."""
        self._store = await self._run(open_store)

    def connect(self, consumer: Consumer) -> None:
        """Use this consumer, the group's member, from now on."""
        self._consumer = consumer

    async def claim(
        self, names: Sequence[TopicPartition], moved: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, StartPoint]:
        """Claim, and find where each starts: where it was ``moved`` to, else where the group has committed, else
        where the store has it, else by ``auto_offset_reset``.

        Raises StoreError or GroupError where that cannot be found out now; the caller tries again.
        """
        return await self._run(lambda: self._claim(names, moved))

    async def record(self, offsets: Mapping[TopicPartition, tuple[int, int]]) -> Recorded:
        """Record ``{partition: (assignment_epoch, next_offset)}`` in the store, then commit what it took to Kafka.

        Raises StoreError where the store took nothing, GroupError where Kafka took nothing.
        """
        return await self._run(lambda: self._record(offsets))

    async def broker_answers(self, seconds: float) -> bool:
        """Whether some broker answers within ``seconds``."""
        return await self._run(lambda: self._ask_broker(seconds))

    def close(self) -> None:
        """Close the store, behind whatever is still going on; returns at once."""
        store = self._store
        if store is not None:
            self._thread.submit(store.close)
        self._thread.shutdown(wait=False)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _tools(self) -> tuple[OffsetStore, Consumer]:
        if self._store is None or self._consumer is None:
            raise RuntimeError("the recorder is used before it is opened and connected")
        return self._store, self._consumer

    def _ask_broker(self, seconds: float) -> bool:
        _, consumer = self._tools()
        try:
            consumer.list_topics(topic="", timeout=seconds)
        except KafkaException:
            return False
        return True

    def _claim(
        self, names: Sequence[TopicPartition], moved: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, StartPoint]:
        store, consumer = self._tools()
        claims = store.claim(names, self._owner)
        starts: dict[TopicPartition, int] = dict(moved)
        starts |= self._committed(consumer, [name for name in names if name not in starts])
        for name in names:
            stored = claims[name].next_offset
            if name not in starts and stored is not None:
                self._log.warning(
                    "start_from_store",
                    f"{name} has no offset committed in Kafka; it starts at {stored}, which the store has",
                    topic=name.topic,
                    partition=name.partition,
                    offset=stored,
                )
                starts[name] = stored
        missing = [name for name in names if name not in starts]
        if missing and self._settings.auto_offset_reset is not AutoOffsetReset.ERROR:
            starts |= self._ends(consumer, missing)
        self._settle_disagreement(store, {name: (claims[name], start) for name, start in starts.items()})
        return {
            name: StartPoint(claims[name].assignment_epoch, starts[name])
            if name in starts
            else StartPoint(claims[name].assignment_epoch, None, "no committed offset, and auto_offset_reset is error")
            for name in names
        }

    def _settle_disagreement(self, store: OffsetStore, starts: Mapping[TopicPartition, tuple[Claim, int]]) -> None:
        """Kafka is the authority: where the store has another offset, say both and correct the store."""
        corrections: dict[TopicPartition, tuple[int, int]] = {}
        for name, (claim, start) in starts.items():
            if claim.next_offset == start:
                continue
            corrections[name] = (claim.assignment_epoch, start)
            if claim.next_offset is not None:
                self._log.warning(
                    "offsets_disagree",
                    f"{name} starts at {start}; the store had {claim.next_offset}",
                    topic=name.topic,
                    partition=name.partition,
                    offset=start,
                    stored=claim.next_offset,
                )
        for refusal in store.restart(corrections).values() if corrections else ():
            raise refusal

    def _committed(self, consumer: Consumer, names: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        if not names:
            return {}
        try:
            answered = consumer.committed([_kafka(name) for name in names], timeout=_BROKER_SECONDS)
        except KafkaException as exception:
            raise GroupError(f"the committed offsets cannot be read: {exception.args[0].str()}") from exception
        return _valid(answered)

    def _ends(self, consumer: Consumer, names: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """The first or the next offset of each, by ``auto_offset_reset``: one request for all."""
        earliest = self._settings.auto_offset_reset is AutoOffsetReset.EARLIEST
        end = OFFSET_BEGINNING if earliest else OFFSET_END
        try:
            answered = consumer.offsets_for_times([_kafka(name, end) for name in names], timeout=_BROKER_SECONDS)
        except KafkaException as exception:
            raise GroupError(f"the partitions' ends cannot be read: {exception.args[0].str()}") from exception
        found = _valid(answered)
        if len(found) < len(names):
            raise GroupError(f"the broker does not say where {sorted(set(names) - found.keys())[0]} starts")
        return found

    def _record(self, offsets: Mapping[TopicPartition, tuple[int, int]]) -> Recorded:
        store, consumer = self._tools()
        refused = store.advance(Advance(name, epoch, offset) for name, (epoch, offset) in offsets.items())
        taken = {name: at for name, at in offsets.items() if name not in refused}
        refused_by_kafka = commit(consumer, taken) if taken else {}
        accepted = {name: offset for name, (_, offset) in taken.items() if name not in refused_by_kafka}
        return Recorded(accepted, refused, refused_by_kafka)


def _kafka(name: TopicPartition, offset: int | None = None) -> KafkaTopicPartition:
    if offset is None:
        return KafkaTopicPartition(name.topic, name.partition)
    return KafkaTopicPartition(name.topic, name.partition, offset)


def _valid(answered: Sequence[KafkaTopicPartition]) -> dict[TopicPartition, int]:
    """The offsets that are there; raises GroupError for a partition that came with an error."""
    found: dict[TopicPartition, int] = {}
    for partition in answered:
        if partition.error is not None:
            raise GroupError(f"{partition.topic}[{partition.partition}]: {partition.error.str()}")
        if partition.offset >= 0:
            found[TopicPartition(partition.topic, partition.partition)] = partition.offset
    return found
