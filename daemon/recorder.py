"""Where to start, and how far it got: the store's and Kafka's record of both, on one thread.

One thread, so that commits never overtake each other, and the event loop never waits for a disk or a broker. In every
record the store comes first: what Kafka has, the store has.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import msgspec

from kafkasrcd.daemon.group_members import describe_group
from kafkasrcd.daemon.kafka_offsets import broker_answers, commit
from kafkasrcd.daemon.membership import Membership
from kafkasrcd.daemon.questions import Questions
from kafkasrcd.daemon.reached import Reached
from kafkasrcd.daemon.start_points import StartPoint, StartPoints
from kafkasrcd.errors import StaleAssignment, StoreError
from kafkasrcd.settings import CommitStrategy, Settings
from kafkasrcd.storage.dead_letters import DueLetter, LetterCount, LetterState
from kafkasrcd.storage.intents import Intent
from kafkasrcd.storage.offset_store import Advance, Layout, OffsetStore, TopicPartition

T = TypeVar("T")

_REMEMBER_SECONDS: Final = 60.0
"""The history has one entry a minute."""


class Recorded(msgspec.Struct, frozen=True):
    """What became of a record: ``accepted`` by store and Kafka; refused by the store; refused by Kafka."""

    accepted: dict[TopicPartition, Reached]
    refused_by_store: dict[TopicPartition, StoreError]
    refused_by_kafka: dict[TopicPartition, str]


class Recorder:
    """The coroutines run on the recorder's thread, one after the other; a cancelled one finishes there, unheard."""

    def __init__(self, settings: Settings, owner: str, layout: Layout) -> None:
        self._settings = settings
        self._owner = owner
        self._layout = layout
        self._handlers_advance = settings.commit_strategy is CommitStrategy.ON_CHECKPOINT
        self._start_points = StartPoints(settings, layout)
        self._remember_due = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._store: OffsetStore | None = None
        self._membership: Membership | None = None
        self._questions: Questions | None = None

    async def open(self, open_store: Callable[[], OffsetStore]) -> None:
        """Open the store, on the thread that will use it."""
        self._store = await self._run(open_store)

    def connect(self, membership: Membership) -> None:
        """Commit as this member of the group from now on."""
        self._membership = membership
        self._questions = Questions(self._settings)

    def look_around(self) -> None:
        """Once a broker answers, and before the group is joined: see what it has. Does not block."""
        if self._questions is not None:
            self._start_points.look_around(self._questions)

    async def claim(
        self, names: Sequence[TopicPartition], moved: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, StartPoint]:
        """Claim, and find where each starts: see ``StartPoints``.

        Raises StoreError or GroupError where that cannot be found out now; the caller tries again.
        """
        return await self._run(lambda: self._claim(names, moved))

    async def record(self, offsets: Mapping[TopicPartition, Reached]) -> Recorded:
        """Record how far each has got in the store, then commit what it took to Kafka.

        Raises StoreError where the store took nothing, GroupError where Kafka took nothing.
        """
        return await self._run(lambda: self._record(offsets))

    async def is_assigned(self, name: TopicPartition) -> bool | None:
        """Whether the group's coordinator has this partition down for this member; None where it does not say now, as
        in a rebalance. Not on the recorder's thread.
        """
        group = await asyncio.to_thread(describe_group, self._settings)
        return None if group is None else group.gives(self._kafka.member_id, name)

    async def idle(self) -> None:
        """Until everything that was asked before is over, also what nobody waits for any more."""
        await self._run(lambda: None)

    async def broker_answers(self, seconds: float) -> bool:
        """Whether some broker answers within ``seconds``."""
        return await self._run(lambda: self._kafka.call(lambda consumer: broker_answers(consumer, seconds)).result())

    async def count_letters(self, state: LetterState) -> list[LetterCount]:
        """How many dead letters are in ``state``. Raises StoreError where that cannot be found out now."""
        return await self._run(lambda: self._offsets.count_letters(state))

    async def due_letters(self, names: Sequence[TopicPartition], most: int) -> list[DueLetter]:
        """Those of ``names`` that are to be handled again now, ``most`` at once. Raises StoreError."""
        return await self._run(lambda: self._offsets.due_letters(names, most))

    async def intents(self, told: Sequence[Intent] = ()) -> list[Intent]:
        """Keep those that are ``told``, then all there are. Raises StoreError where that cannot be done now."""
        return await self._run(lambda: self._intents(told))

    def close(self) -> None:
        """Close the store, behind whatever is still going on; returns at once."""
        store = self._store
        if store is not None:
            self._thread.submit(store.close)
        if self._questions is not None:
            self._questions.close()
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
        claims = self._offsets.claim(names, self._owner, self._layout)
        if self._questions is None:
            raise RuntimeError("the recorder is used before it is connected")
        return self._start_points.find(claims, moved, self._offsets, self._questions)

    def _intents(self, told: Sequence[Intent]) -> list[Intent]:
        for intent in told:
            self._offsets.set_intent(intent)
        return self._offsets.intents()

    def _record(self, offsets: Mapping[TopicPartition, Reached]) -> Recorded:
        refused = self._offsets.advance(
            Advance(name, reached.assignment_epoch, next_offset, slot, reached.layout)
            for name, reached in offsets.items()
            for slot, next_offset in enumerate(reached.next_offsets)
            if not (reached.stored and reached.stored[slot])
        )
        if self._handlers_advance:
            # A handler's transaction was faster than this, and the store is further already.
            refused = {name: error for name, error in refused.items() if isinstance(error, StaleAssignment)}
        taken = {name: reached for name, reached in offsets.items() if name not in refused}
        refused_by_kafka = self._kafka.call(lambda consumer: commit(consumer, taken)).result() if taken else {}
        accepted = {name: reached for name, reached in taken.items() if name not in refused_by_kafka}
        self._start_points.note_committed(accepted)
        if taken and time.monotonic() >= self._remember_due:
            self._remember_due = time.monotonic() + _REMEMBER_SECONDS
            self._offsets.remember(taken)
        return Recorded(accepted, refused, refused_by_kafka)
