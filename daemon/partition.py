"""One assigned partition, as the supervisor sees it: its state, its shared memory, its worker."""

import asyncio
import os
import time
from typing import Any, Final, NamedTuple

import msgspec

from kafkasrcd.daemon.backoff import RestartBackoff
from kafkasrcd.daemon.child_processes import ChildProcess
from kafkasrcd.daemon.deadly_records import DeadlyRecords
from kafkasrcd.daemon.hung_calls import Hands
from kafkasrcd.daemon.lifecycle import ENDED, WORKING, State, transition
from kafkasrcd.daemon.pause_words import BREAKER, way_on
from kafkasrcd.daemon.reached import Reached, beyond
from kafkasrcd.daemon.rolling_rate import RollingRate
from kafkasrcd.daemon.start_points import StartPoint
from kafkasrcd.settings import CommitStrategy, Settings
from kafkasrcd.storage.intents import Intent
from kafkasrcd.storage.offset_store import WHOLE, Layer, Layout, TopicPartition
from kafkasrcd.workers.control import Quarantined
from kafkasrcd.workers.deadline import Deadline
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.partition_memory import (
    BYTES,
    HIGH_WATERMARK,
    KEEPS_CELL,
    LOG_START,
    MESSAGES,
    PREPARING,
    UNKNOWN,
    PartitionMemory,
)
from kafkasrcd.workers.ring import (
    COMMITTABLE,
    DEAD_LETTERED,
    FAILURES,
    GIVEN_UP_LATER,
    HANDLED,
    PROCESSED,
    REDELIVERED,
    SCHEDULED,
    SKIPPED,
)

_STORES_SETTLE_SECONDS: Final = 0.005
"""After the lease is ended, until what a handler process stored before it looked is visible here: a processor empties
its store buffer within a microsecond, and a process that is switched out has emptied it."""

_REAP_SECONDS: Final = 5.0
"""A killed process is gone within milliseconds, unless the kernel or the fork server is stuck."""

_ASKING_MS: Final = 3_000
"""Both answer within milliseconds."""

_UNCOMMITTED_MS: Final = 5_000
"""A handler that commits batches may well take so long."""

_log = EventLog("partition")


class Totals(NamedTuple):
    """Records handed off and their bytes; what became of them. ``redelivered``: of those put aside before, and of
    letters that were replayed, how many were handled; ``given_up_later``: how many of those put aside were not in the
    end. ``failures``: attempts that raised, and records that could not be deserialized."""

    messages: int = 0
    bytes: int = 0
    succeeded: int = 0
    skipped: int = 0
    dead_lettered: int = 0
    scheduled: int = 0
    redelivered: int = 0
    given_up_later: int = 0
    failures: int = 0

    @property
    def finished(self) -> int:
        """Records that are done with, one way or another."""
        return self.succeeded + self.skipped + self.dead_lettered + self.scheduled


class Partition:
    """From one assignment to its release. Used by the event loop only."""

    def __init__(self, name: TopicPartition, settings: Settings) -> None:
        self.name = name
        self.state = State.CLAIMING
        self.since_ms = int(time.time() * 1000)
        self.problem = ""
        """One sentence for the operator, or empty."""
        self.memory: PartitionMemory | None = None
        self.worker: ChildProcess | None = None
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Wakes the worker."""
        self.moving = False
        """Its worker's end is expected: it is about to start anew, at another offset or with a new claim."""
        self.paused: Intent | None = None
        """Why it is not to go on, whatever its state; None where it may."""
        self.contested = ""
        """Why its claim is in question: the store has a later one, made by another member."""
        self.bindings: dict[int, int] = {}
        """For each slot, in order: its binding, and the handler process it is bound to."""
        self.recorded: Reached | None = None
        """What the store and Kafka have of this epoch."""
        self.last_commit_ms: int | None = None
        self.ended = asyncio.Event()
        """Set once nothing of it runs any more: its successor may start."""
        self.backoff = RestartBackoff(settings.supervisor.worker_restarts, settings.supervisor.restart_window_seconds)
        self._settings = settings
        self._strategy = settings.commit_strategy
        self._layout: Layout = WHOLE
        self._carried: tuple[Layer, ...] = ()
        self._own: tuple[Layer, ...] = ()
        """How far its slots had got before, where some had got further than where it starts."""
        self.ring_is_broken = False
        """Nothing its rings say is trusted but how far the handler has got."""
        self._least: list[int] = []
        """For each slot, the furthest that it was seen done: it may read lower, once a record comes behind offsets
        that held none."""
        self.hands = Hands()
        """What the worker prepares, and for how long already."""
        self.hung_stacks: str | None = None
        """Of a worker that is killed, since what it prepares does not end; None for any other."""
        self.deadly = DeadlyRecords(settings.handler)
        """Those that have ended workers."""
        self.quarantined: tuple[Quarantined, ...] = ()
        """Records that have ended their handler process too often."""
        self._crash_offset = -1
        self._crashes = 0
        # Of earlier epochs of the same assignment, so that the totals grow through a restart at another offset.
        self._past = Totals()
        now = time.monotonic()
        self.message_rate = RollingRate(now)
        self.byte_rate = RollingRate(now)

    def enter(self, state: State, reason: str = "") -> None:
        """Change the state, by the table, and say so."""
        before = self.state
        self.state = transition(before, state)
        self.since_ms = int(time.time() * 1000)
        fields: dict[str, Any] = {
            "topic": self.name.topic,
            "partition": self.name.partition,
            "from": before.value,
            "to": state.value,
        }
        if self.memory is not None:
            fields |= {"epoch": self.memory.epoch}
        emit = _log.error if state is State.FAILED else _log.info
        emit("partition_state", f"{self.name} is {state}" + (f": {reason}" if reason else ""), **fields)

    def fail(self, reason: str, cure: str) -> None:
        """Stand still until someone looks."""
        if self.state in (State.FAILED, State.DRAINING) or self.state in ENDED:
            return
        self.problem = f"{reason}; {cure}"
        self.stop_work()
        self.enter(State.FAILED, reason)

    def pause(self, intent: Intent) -> None:
        """Start no further record before ``resume``, also where it is yet to begin. What a handler holds it finishes;
        the worker stays, and the ring as it is."""
        self.paused = intent
        if self.memory is not None and self.state in WORKING:
            self.memory.pause()
        if self.state is State.RUNNING:
            self.ready()

    def resume(self) -> None:
        """Go on with the next lease."""
        self.paused = None
        if self.memory is not None and self.state in WORKING:
            self.memory.stop()
        if self.state is State.PAUSED:
            self.ready()

    def ready(self) -> None:
        """Its worker is there: it runs, unless it is paused."""
        if self.paused is None:
            self.enter(State.RUNNING)
        else:
            self.enter(State.PAUSED, f"by {self.paused.set_by}: {self.paused.reason}")

    def stop_work(self) -> None:
        """Start no further record and end the worker: it holds nothing that is not in the ring."""
        if self.memory is not None:
            self.memory.stop()
        if self.worker is not None:
            self.worker.kill()

    async def settle(self, deadline: Deadline) -> bool:
        """After ``stop_work``: wait until no record is in flight or in an open transaction, and the worker is reaped;
        False at the deadline."""
        await asyncio.sleep(_STORES_SETTLE_SECONDS)
        wait_seconds = 0.001
        while self.memory is not None and not self.memory.is_quiet:
            if deadline.passed:
                return False
            await asyncio.sleep(min(wait_seconds, deadline.remaining))
            wait_seconds = min(wait_seconds * 2, 0.05)
        await self.worker_gone()
        return True

    async def worker_gone(self) -> None:
        """After ``stop_work``: until the worker is reaped, or a killed one is not heard of for some seconds."""
        if self.worker is not None:
            try:
                await asyncio.wait_for(self.worker.exited.wait(), _REAP_SECONDS)
            except TimeoutError:
                _log.error("worker_not_reaped", f"the killed worker of {self.name} is not reaped: is the host stuck?")

    def begin(self, start: StartPoint, layout: Layout) -> None:
        """Have memory for records from ``start`` on. Its lease has not begun."""
        if start.next_offset is None:
            raise ValueError(f"{self.name} has no offset to start at")
        starts = start.starts(layout)
        ring_bytes = self._settings.supervisor.ring_bytes
        self.memory = PartitionMemory.create(ring_bytes, start.assignment_epoch, start.next_offset, starts)
        if self.paused is not None:
            self.memory.pause()
        self.recorded = None
        self.ring_is_broken = False
        self._layout = layout
        self._carried = start.carried(layout)
        self._own = beyond(start.next_offset, (Layer(layout, starts),))
        self._least = list(starts)

    def reached(self, *, again: bool = False) -> Reached:
        """How far it has got, as the commit strategy counts; ``again``: as if the store had none of it.

        Never less than at an earlier call. Raises ValueError where it has no memory.
        """
        memory = self.memory
        if memory is None:
            raise ValueError(f"{self.name} has not begun")
        if self._strategy is CommitStrategy.AUTO:
            now = [max(memory.position, memory.processed)] * len(memory.slots)
        elif self.ring_is_broken:
            now = [slot.cells[KEEPS_CELL[self._strategy]] for slot in memory.slots]
        else:
            now = memory.done(KEEPS_CELL[self._strategy])
        self._least = [max(pair) for pair in zip(self._least, now, strict=True)]
        stored: tuple[bool, ...] = ()
        if self._strategy is CommitStrategy.ON_CHECKPOINT and not again:
            stored = tuple(
                slot.cells[COMMITTABLE] >= least for slot, least in zip(memory.slots, self._least, strict=True)
            )
        self._carried = beyond(min(self._least), self._carried)
        return Reached(memory.epoch, tuple(self._least), self._layout, self._carried, stored)

    @property
    def done_before(self) -> tuple[Layer, ...]:
        """What a worker need not hand off. Not what was done since: each of its workers counts what it hands off."""
        return (*self._own, *self.reached().carried)

    @property
    def epoch(self) -> int | None:
        """The assignment epoch; None until claimed."""
        return None if self.memory is None else self.memory.epoch

    @property
    def committed(self) -> int | None:
        """Next offset as the store and Kafka have it; None until something of this epoch is recorded."""
        return None if self.recorded is None else self.recorded.next_offset

    @property
    def position(self) -> int | None:
        """Next offset to hand off; None until claimed."""
        return None if self.memory is None else max(self.memory.position, self.memory.processed)

    @property
    def processed(self) -> int | None:
        """Next offset after the processed prefix; None until claimed."""
        if self.memory is None:
            return None
        done = self.memory.done(PROCESSED)
        if self._strategy is not CommitStrategy.AUTO:
            done = [max(pair) for pair in zip(done, self._least, strict=True)]
        return min(done)

    @property
    def high_watermark(self) -> int | None:
        """The next offset the broker will give out, as last heard."""
        if self.memory is None or self.memory.cells[HIGH_WATERMARK] == UNKNOWN:
            return None
        return self.memory.cells[HIGH_WATERMARK]

    @property
    def lag(self) -> int | None:
        """Offsets between what is processed (or still there) and the end; never negative."""
        if self.memory is None or self.high_watermark is None:
            return None
        return max(0, self.high_watermark - max(self.processed or 0, self.memory.cells[LOG_START]))

    @property
    def advice(self) -> str:
        """The problem, or what else stands in the way and is not meant to; empty where nothing does."""
        if not self.problem and self.paused is not None:
            return f"{self.paused.reason}; mend it, then {self.way_on}" if self.paused.set_by == BREAKER else ""
        if not self.problem and self.state is State.CLAIMING:
            asked_ms = time.time() * 1000 - self.since_ms
            return "the store and the broker are asked where it starts" if asked_ms > _ASKING_MS else ""
        if self.problem or self._strategy is not CommitStrategy.MANUAL or self.lag is None:
            return self.problem
        held = (self.processed or 0) - (self.committed or 0)
        idle_ms = time.time() * 1000 - max(self.last_commit_ms or 0, self.since_ms)
        if held > 0 and self.processed == self.position and self.lag > 0 and idle_ms > _UNCOMMITTED_MS:
            return (
                f"{held} records from offset {self.committed} on are processed and not committed, and no more fit the "
                "ring; the handler calls message.commit() for each, in any order"
            )
        return ""

    @property
    def way_on(self) -> str:
        """What ends its pause; empty where it is not paused."""
        return "" if self.paused is None else way_on(self.paused, self._settings)

    @property
    def totals(self) -> Totals:
        """Since the assignment."""
        memory = self.memory
        if memory is None:
            return self._past

        def of_slots(cell: int) -> int:
            return sum(slot.cells[cell] for slot in memory.slots)

        past = self._past
        # What became of records first: what is handed off meanwhile is in flight, and nothing is finished twice.
        finished = [of_slots(cell) for cell in (HANDLED, SKIPPED, DEAD_LETTERED, SCHEDULED)]
        return Totals(
            past.messages + memory.cells[MESSAGES],
            past.bytes + memory.cells[BYTES],
            past.succeeded + finished[0],
            past.skipped + finished[1],
            past.dead_lettered + finished[2],
            past.scheduled + finished[3],
            past.redelivered + of_slots(REDELIVERED),
            past.given_up_later + of_slots(GIVEN_UP_LATER),
            past.failures + of_slots(FAILURES),
        )

    def sample_rates(self, now: float) -> None:
        """Once a second; ``now`` is monotonic seconds."""
        totals = self.totals
        self.message_rate.observe(now, totals.messages)
        self.byte_rate.observe(now, totals.bytes)

    def quarantine(self, record: Quarantined) -> None:
        """Have handler processes that begin from now on not handle that record."""
        processed = self.processed or 0
        # All of them travel in one packet: of earlier ones the stacks, which are in the log, stay behind.
        before = [msgspec.structs.replace(each, traceback="") for each in self.quarantined if each.offset >= processed]
        self.quarantined = (*before, record)

    def count_crash(self, offset: int) -> int:
        """How often the record at ``offset`` was in flight when its handler process died."""
        self._crashes = self._crashes + 1 if offset == self._crash_offset else 1
        self._crash_offset = offset
        return self._crashes

    @property
    def preparing(self) -> int | None:
        """Offset of the record that the worker prepares, or None."""
        if self.memory is None or self.state not in WORKING or self.memory.cells[PREPARING] == UNKNOWN:
            return None
        return self.memory.cells[PREPARING]

    def worker_ended(self, how: str) -> Quarantined | None:
        """Count its end against the record that it was preparing; that record, where the next worker refuses it."""
        stacks, self.hung_stacks = self.hung_stacks, None
        offset = self.preparing
        if self.memory is None or offset is None:
            return None
        self.memory.cells[PREPARING] = UNKNOWN
        refused = self.deadly.count(offset, how, stacks, self.memory.position)
        if refused is not None:
            self.backoff.forget()
        return refused

    def drop_memory(self) -> None:
        """Nothing runs in it any more. What waits in it is handed off again, by its successor or by another member."""
        totals = self.totals
        self._past = totals._replace(messages=min(totals.messages, totals.finished))
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def end(self) -> None:
        """Released, whole."""
        self.drop_memory()
        self.worker = None
        os.close(self.bell)
        self.ended.set()
