"""Where to start, and how far it got: the store's and Kafka's record of both, on one thread.

One thread, so that commits never overtake each other, and the event loop never waits for a disk or a broker. In every
record the store comes first: what Kafka has, the store has.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from kafkasrcd.daemon.kafka_offsets import broker_answers, commit, committed_offsets, end_offsets
from kafkasrcd.daemon.membership import Membership
from kafkasrcd.errors import StoreError
from kafkasrcd.settings import AutoOffsetReset, Settings
from kafkasrcd.storage.offset_store import Advance, Claim, OffsetStore, TopicPartition
from kafkasrcd.workers.event_log import EventLog

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
        self._membership: Membership | None = None

    async def open(self, open_store: Callable[[], OffsetStore]) -> None:
        """Open the store, on the thread that will use it."""
        self._store = await self._run(open_store)

    def connect(self, membership: Membership) -> None:
        """Ask and commit as this member of the group from now on."""
        self._membership = membership

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
        return await self._run(lambda: self._kafka.call(lambda consumer: broker_answers(consumer, seconds)).result())

    def close(self) -> None:
        """Close the store, behind whatever is still going on; returns at once."""
        store = self._store
        if store is not None:
            self._thread.submit(store.close)
        self._thread.shutdown(wait=False)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    @property
    def _kafka(self) -> Membership:
        if self._membership is None:
            raise RuntimeError("the recorder is used before it is connected")
        return self._membership

    @property
    def _offsets(self) -> OffsetStore:
        if self._store is None:
            raise RuntimeError("the recorder is used before it is opened")
        return self._store

    def _claim(
        self, names: Sequence[TopicPartition], moved: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, StartPoint]:
        claims = self._offsets.claim(names, self._owner)
        starts: dict[TopicPartition, int] = dict(moved)
        unmoved = [name for name in names if name not in starts]
        if unmoved:
            starts |= self._kafka.call(lambda consumer: committed_offsets(consumer, unmoved)).result()
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
        policy = self._settings.auto_offset_reset
        if missing and policy is not AutoOffsetReset.ERROR:
            first = policy is AutoOffsetReset.EARLIEST
            starts |= self._kafka.call(lambda consumer: end_offsets(consumer, missing, first=first)).result()
        self._settle_disagreement({name: (claims[name], start) for name, start in starts.items()})
        return {
            name: StartPoint(claims[name].assignment_epoch, starts[name])
            if name in starts
            else StartPoint(claims[name].assignment_epoch, None, "no committed offset, and auto_offset_reset is error")
            for name in names
        }

    def _settle_disagreement(self, starts: Mapping[TopicPartition, tuple[Claim, int]]) -> None:
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
        for refusal in self._offsets.restart(corrections).values() if corrections else ():
            raise refusal

    def _record(self, offsets: Mapping[TopicPartition, tuple[int, int]]) -> Recorded:
        refused = self._offsets.advance(Advance(name, epoch, offset) for name, (epoch, offset) in offsets.items())
        taken = {name: at for name, at in offsets.items() if name not in refused}
        refused_by_kafka = self._kafka.call(lambda consumer: commit(consumer, taken)).result() if taken else {}
        accepted = {name: offset for name, (_, offset) in taken.items() if name not in refused_by_kafka}
        return Recorded(accepted, refused, refused_by_kafka)
