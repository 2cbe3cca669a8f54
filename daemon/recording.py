"""Recording how far the partitions have got: when, as far as what, and what follows from a refusal.

Runs on the event loop; the recorder's thread does the waiting.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

from kafkasrcd.daemon.lifecycle import ENDED, WORKING, State
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.daemon.reached import Reached
from kafkasrcd.daemon.recorder import Recorder
from kafkasrcd.errors import GroupError, KafkasrcdError, StoreError
from kafkasrcd.settings import CommitStrategy, Settings
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.deadline import Deadline
from kafkasrcd.workers.event_log import EventLog

_FINAL_RECORD_SECONDS: Final = 5.0
"""What the last record of a revocation may take even where handlers have used up its budget."""
_RECORD_RETRY_SECONDS: Final = 0.1
_AWAY_SECONDS: Final = 1.0
"""How often a store that took nothing is asked again: nothing goes on before."""


class Recording:
    """``on_fenced`` is told of a partition whose claim the store does not accept any more."""

    def __init__(
        self,
        settings: Settings,
        recorder: Recorder,
        partitions: dict[TopicPartition, Partition],
        on_fenced: Callable[[Partition, str], None],
    ) -> None:
        self.total_commits = 0
        self.store_problem = ""
        """Why the store takes nothing now; empty where it does."""
        self._recorder = recorder
        self._partitions = partitions
        self._on_fenced = on_fenced
        # What a handler commits goes out in the next turn, with what others have committed by then.
        manual = settings.commit_strategy is CommitStrategy.MANUAL
        self._interval_seconds = 0.0 if manual else settings.commit_interval_secs
        self._due = time.monotonic() + self._interval_seconds
        self._recording = asyncio.Lock()
        self._log = EventLog("recording")

    @property
    def is_due(self) -> bool:
        """Whether it is time for ``record_processed``; True once an interval."""
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = now + (min(_AWAY_SECONDS, self._interval_seconds) if self.store_problem else self._interval_seconds)
        return True

    async def record_processed(self) -> None:
        """The periodic commit; skipped while the one before it is still waiting for a store or a broker."""
        if not self._recording.locked():
            await self.record(list(self._partitions.values()), None)

    async def record_finally(self, partitions: list[Partition], deadline: Deadline) -> bool:
        """Record for the last time; again where that fails, until the deadline, and for ``_FINAL_RECORD_SECONDS`` in
        any case. False where not all is recorded.

        A rebalance overtakes a commit: the broker keeps it waiting behind this member's request to join, and then
        refuses it, since it is of the generation before. The next one is of the new generation.
        """
        least = Deadline(_FINAL_RECORD_SECONDS)
        while not await self.record(partitions, min(max(deadline.remaining, least.remaining), _FINAL_RECORD_SECONDS)):
            if deadline.passed and least.passed:
                break
            await asyncio.sleep(_RECORD_RETRY_SECONDS)
        return not _unrecorded(partitions)

    async def record(self, partitions: Iterable[Partition], seconds: float | None) -> bool:
        """Record what is to be recorded and is not yet; False where the store or Kafka did not take all of it."""
        try:
            async with asyncio.timeout(seconds), self._recording:
                # Looked at only now: the record before this one may have been of the same partitions.
                offsets = _unrecorded(partitions)
                if not offsets and self.store_problem:
                    # Nothing goes on until the store is known to take something: ask with what it has already.
                    offsets = self._one_more_time()
                if not offsets:
                    self.store_problem = ""
                    return True
                recorded = await self._recorder.record(offsets)
        except (StoreError, GroupError) as error:
            self.note_store(error)
            self._log.repeated("commit_failed", f"offsets are not recorded: {error}", same=(str(error),))
            return False
        except TimeoutError:
            self._log.error("commit_overdue", f"offsets are not recorded within {seconds:.0f} s")
            return False
        self.note_store(None)
        self.total_commits += 1
        now_ms = int(time.time() * 1000)
        for name, reached in recorded.accepted.items():
            partition = self._partitions.get(name)
            if partition is not None and partition.epoch == reached.assignment_epoch:
                partition.recorded = reached
                partition.last_commit_ms = now_ms
        for name, refusal in recorded.refused_by_store.items():
            partition = self._partitions.get(name)
            if partition is not None and partition.epoch == offsets[name].assignment_epoch:
                self._on_fenced(partition, str(refusal))
        for name, reason in recorded.refused_by_kafka.items():
            self._log.repeated("commit_refused", f"the commit of {name} is refused: {reason}", same=(name,))
        return not recorded.refused_by_kafka

    async def prove_membership(self) -> bool:
        """Whether the group accepts a commit of this member now or, where it has nothing to commit, has it down for a
        partition that it is claiming; True where there is none."""
        offsets = self._one_more_time()
        if not offsets:
            claiming = [name for name, each in self._partitions.items() if each.state is State.CLAIMING]
            return not claiming or bool(await self._recorder.is_assigned(claiming[0]))
        try:
            return bool((await self._recorder.record(offsets)).accepted)
        except (StoreError, GroupError):
            return False

    def note_store(self, error: KafkasrcdError | None) -> None:
        """What the last use of the store has shown."""
        self.store_problem = str(error) if isinstance(error, StoreError) else ""

    def on_store_away(self, reason: str) -> None:
        """A handler process cannot commit its transactions."""
        self._log.repeated("store_away", f"handlers cannot commit their transactions: {reason}", same=(reason,))
        self.store_problem = reason
        self._due = min(self._due, time.monotonic() + _AWAY_SECONDS)

    def _one_more_time(self) -> dict[TopicPartition, Reached]:
        """How far one partition at work has got, recorded already or not: to see whether it is taken."""
        for partition in self._partitions.values():
            if partition.state in WORKING and partition.memory is not None:
                return {partition.name: partition.reached(again=True)}
        return {}


def _unrecorded(partitions: Iterable[Partition]) -> dict[TopicPartition, Reached]:
    found: dict[TopicPartition, Reached] = {}
    for partition in partitions:
        if partition.memory is not None and partition.state not in ENDED:
            reached = partition.reached()
            before = partition.recorded
            if before is None or before.next_offsets != reached.next_offsets:
                found[partition.name] = reached
    return found
