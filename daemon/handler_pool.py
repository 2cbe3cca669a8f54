"""The handler processes: started, kept alive, and given the partitions that are bound to them."""

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from kafkasrcd.daemon.backoff import RestartBackoff
from kafkasrcd.daemon.child_processes import ChildProcess, ForkServer
from kafkasrcd.daemon.hung_calls import MOST_STACKS, Hands, Stacks
from kafkasrcd.daemon.lifecycle import State
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.errors import ConfigurationError, KafkasrcdError, WorkerBootError
from kafkasrcd.settings import OnFailure, Settings
from kafkasrcd.storage.offset_store import Layout
from kafkasrcd.workers.control import (
    Bind,
    ControlMessage,
    Exit,
    Fenced,
    HandlerReady,
    HandlerRefused,
    LetterDue,
    LetterRefused,
    LettersDone,
    Quarantined,
    RecordFailed,
    Redeliver,
    RingBroken,
    Setup,
    StoreAway,
    Unbind,
)
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.failure_policy import failure_policy
from kafkasrcd.workers.formats import Shape
from kafkasrcd.workers.ring import LETTER
from kafkasrcd.workers.topic_matcher import topic_matcher

_BOOT_SECONDS: Final = 120.0
"""Importing the largest frameworks takes some ten seconds on a busy host."""
_BOOT_ATTEMPTS: Final = 3
"""Further ones for a process that was killed before it was ready."""


class HandlerEvents(Protocol):
    """What handler processes say about partitions, told on the event loop."""

    def on_record_failed(self, partition: Partition, reason: str) -> None: ...
    def on_letter_refused(self, partition: Partition, reason: str) -> None:
        """``reason`` is empty once the letter is written down."""
        ...

    def on_ring_broken(self, partition: Partition, reason: str) -> None: ...
    def on_fenced(self, partition: Partition, reason: str) -> None: ...
    def on_store_away(self, reason: str) -> None: ...


class LetterEvents(Protocol):
    """What becomes of letters that were given to handler processes; see DueLetters."""

    def on_done(self, binding: int, done: int) -> None: ...
    def on_unbound(self, binding: int) -> None: ...
    def on_process_ended(self, bindings: Sequence[int], letter_id: int | None, how: "HowEnded") -> None: ...


class Bound(NamedTuple):
    """One slot of a partition, bound to a handler process."""

    partition: Partition
    slot: int


class HowEnded(NamedTuple):
    """How a handler process has ended."""

    error: str
    how: str
    stacks: str

    def too_often(self, offset: int, deaths: int) -> Quarantined:
        """What the record is that has ended so many."""
        reason = f"its handler process ended {deaths} times, last: {self.how}"
        return Quarantined(offset=offset, error=self.error, reason=reason, attempts=deaths, traceback=self.stacks)


class HandlerSlot:
    """The place of one handler process; the process in it may be replaced, its bell and bindings stay."""

    def __init__(self, slot: int, backoff: RestartBackoff) -> None:
        self.slot = slot
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Rung by the workers of the bound partitions."""
        self.bound: dict[int, Bound] = {}
        self.child: ChildProcess | None = None
        self.stacks = Stacks()
        self.hands = Hands()
        self.killed_for = ""
        """Why the process in it was killed; empty where it was not, by this pool."""
        self.ready = False
        self.problem = ""
        """Why the process in it cannot work; empty where it can."""
        self.backoff = backoff
        self.restart: asyncio.TimerHandle | None = None
        """The last one that was planned."""

    def how_ended(self, exit_code: int) -> HowEnded:
        """The process that was in it."""
        if not self.killed_for:
            return HowEnded("HandlerProcessEnded", f"ended with {describe_exit(exit_code)}", "")
        return HowEnded("HandlerTimeout", self.killed_for, self.stacks.read()[:MOST_STACKS])


class HandlerPool:
    """N handler processes. A partition is bound to the one that has the fewest, or, with ordering by key or none, each
    of its slots to one of them."""

    def __init__(
        self,
        settings: Settings,
        layout: Layout,
        base_directory: Path,
        fork_server: ForkServer,
        store_url: str,
        events: HandlerEvents,
        schema_directory: Path | None = None,
    ) -> None:
        self.layout = layout
        """How every partition's records are spread: over all of these processes, or not."""
        self.letters: LetterEvents
        """Set before anything is bound."""
        self._settings = settings
        self._setup = msgspec.json.encode(settings)
        self._base_directory = str(base_directory)
        self._store_url = store_url
        self._schema_directory = "" if schema_directory is None else str(schema_directory)
        self._fork_server = fork_server
        self._events = events
        self._log = EventLog("handlers")
        self._on_failure = failure_policy(settings)
        self._tasks: set[asyncio.Task[None]] = set()
        self._bindings = 0
        self._shapes: list[tuple[Callable[[str], object], Shape]] = []
        self._stopping = False
        self._boot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        supervisor = settings.supervisor
        # No limit: without handlers nothing goes on, and a record that kills is stopped by its partition's own count.
        self.slots = [
            HandlerSlot(slot, RestartBackoff(1_000_000, supervisor.restart_window_seconds))
            for slot in range(settings.handler.processes or len(os.sched_getaffinity(0)))
        ]

    async def start(self) -> None:
        """Start all and wait until each has imported its targets.

        Raises ConfigurationError where one cannot, WorkerBootError where that takes longer than ``_BOOT_SECONDS``.
        """
        for slot in self.slots:
            self._spawn(slot)
        try:
            await asyncio.wait_for(asyncio.shield(self._boot), _BOOT_SECONDS)
        except TimeoutError:
            raise WorkerBootError(
                f"a handler process has not imported its target within {_BOOT_SECONDS:.0f} s: does its module wait for "
                "something when it is imported?"
            ) from None

    def bind(self, partition: Partition) -> None:
        """Give ``partition`` (which has its memory) to handler processes."""
        if self.layout.slots == 1:
            self._bind(min(self.slots, key=lambda slot: len(slot.bound)), Bound(partition, 0))
        else:
            for index, slot in enumerate(self.slots):
                self._bind(slot, Bound(partition, index))

    def _bind(self, slot: HandlerSlot, bound: Bound) -> None:
        self._bindings += 1
        bound.partition.bindings[self._bindings] = slot.slot
        slot.bound[self._bindings] = bound
        if slot.ready:
            self._send_bind(slot, self._bindings, bound)

    def bells(self, partition: Partition) -> list[int]:
        """The bell of each of its slots' handler processes, in the order of the slots."""
        return [self.slots[slot].bell for slot in partition.bindings.values()]

    def ring(self, partition: Partition) -> None:
        """Have the handler processes look at it: its lease has ended, and what they have open of it is to be closed."""
        for bell in self.bells(partition):
            os.eventfd_write(bell, 1)

    def shape(self, topic: str) -> Shape:
        """What records of ``topic`` are to be prepared as."""
        return next((shape for matches, shape in self._shapes if matches(topic)), Shape.PLAIN)

    def unbind(self, partition: Partition) -> None:
        """Take it back; nothing of it is in flight. A no-op where it is not bound."""
        for binding, number in partition.bindings.items():
            slot = self.slots[number]
            self.letters.on_unbound(binding)
            if slot.bound.pop(binding, None) is not None and slot.child is not None and slot.ready:
                slot.child.send(Unbind(binding, lost=partition.state is State.LOST))
        partition.bindings.clear()

    def redeliver(self, binding: int, letters: Sequence[LetterDue]) -> bool:
        """Have the records of these letters handled; False where there is no process now that could."""
        slot = next((slot for slot in self.slots if binding in slot.bound), None)
        if slot is None or slot.child is None or not slot.ready:
            return False
        slot.child.send(Redeliver(binding=binding, letters=tuple(letters)))
        return True

    async def kill(self, partition: Partition) -> None:
        """End the processes that hold records of ``partition`` past its deadline; their others go on after."""
        if partition.memory is None:
            return
        for number, memory in zip(partition.bindings.values(), partition.memory.slots, strict=True):
            child = self.slots[number].child
            if child is not None and not memory.is_quiet:
                child.kill()
                await child.exited.wait()

    async def stop(self, seconds: float) -> None:
        """End all: idle ones by themselves, the rest killed after ``seconds``."""
        self._stopping = True
        for slot in self.slots:
            if slot.restart is not None:
                slot.restart.cancel()
        children = [slot.child for slot in self.slots if slot.child is not None and slot.child.exit_code is None]
        for child in children:
            child.send(Exit())
        waits = [asyncio.ensure_future(child.exited.wait()) for child in children]
        if waits:
            _, late = await asyncio.wait(waits, timeout=seconds)
            for child in children:
                child.kill()
            if late:
                await asyncio.wait(late, timeout=1.0)
        for slot in self.slots:
            os.close(slot.bell)
            slot.stacks.close()

    def _spawn(self, slot: HandlerSlot) -> None:
        slot.ready = False
        slot.child = self._process(slot)
        setup = Setup(
            settings=self._setup,
            base_directory=self._base_directory,
            store_url=self._store_url,
            slot=slot.slot,
            schema_directory=self._schema_directory,
        )
        slot.hands.clear()
        slot.killed_for = ""
        slot.child.send(setup, (slot.bell, slot.stacks.fd))

    def _process(self, slot: HandlerSlot) -> ChildProcess:
        return self._fork_server.spawn(
            "handler",
            f"kafkasrcd-h{slot.slot}",
            lambda message: self._on_message(slot, message),
            lambda exit_code: self._on_exit(slot, exit_code),
        )

    def _on_message(self, slot: HandlerSlot, message: ControlMessage) -> None:
        if isinstance(message, HandlerReady):
            slot.ready = True
            slot.problem = ""
            self._shapes = [(topic_matcher(pattern or "^"), shape) for pattern, shape in message.shapes]
            for binding, bound in slot.bound.items():
                self._send_bind(slot, binding, bound)
            if not self._boot.done() and all(other.ready for other in self.slots):
                self._boot.set_result(None)
        elif isinstance(message, HandlerRefused):
            slot.problem = message.reason
            if self._booted:
                self._log.error("handler_refused", f"handler {slot.slot} cannot start again: {message.reason}")
            else:
                self._fail_boot(ConfigurationError(message.reason))
        elif isinstance(message, LettersDone):
            self.letters.on_done(message.binding, message.done)
        elif isinstance(message, StoreAway):
            self._events.on_store_away(message.reason)
        elif isinstance(message, RecordFailed | RingBroken | Fenced | LetterRefused) and message.binding in slot.bound:
            partition = slot.bound[message.binding].partition
            if isinstance(message, RecordFailed):
                self._events.on_record_failed(partition, f"offset {message.offset}: {message.error}")
            elif isinstance(message, RingBroken):
                self._events.on_ring_broken(partition, message.reason)
            elif isinstance(message, LetterRefused):
                self._events.on_letter_refused(partition, message.reason)
            else:
                self._events.on_fenced(partition, message.reason)

    def _on_exit(self, slot: HandlerSlot, exit_code: int) -> None:
        slot.ready = False
        if self._stopping:
            return
        if not self._booted and not self._boot_again(slot, exit_code):
            return
        self._blame(slot, exit_code)
        delay = slot.backoff.next_delay() or 0.0
        self._log.error(
            "handler_died",
            f"handler {slot.slot} ended with {describe_exit(exit_code)}; it starts again in {delay:.1f} s",
            slot=slot.slot,
            exit_code=exit_code,
        )
        slot.restart = asyncio.get_running_loop().call_later(delay, self._spawn, slot)

    def _boot_again(self, slot: HandlerSlot, exit_code: int) -> bool:
        """Whether one that ended before it was ready is worth another attempt: killed by someone else, perhaps for want
        of memory, and not too often. One that ends by itself does so again."""
        said = f"a handler process ended with {describe_exit(exit_code)} while importing its target"
        if exit_code not in (-signal.SIGKILL, -signal.SIGTERM):
            self._fail_boot(ConfigurationError(said))
        elif slot.backoff.total >= _BOOT_ATTEMPTS:
            self._fail_boot(WorkerBootError(f"{said}, {slot.backoff.total + 1} times"))
        else:
            return True
        return False

    @property
    def _booted(self) -> bool:
        return self._boot.done() and self._boot.exception() is None

    def _fail_boot(self, error: KafkasrcdError) -> None:
        """The first reason counts; others say the same, or follow from it."""
        if not self._boot.done():
            self._boot.set_exception(error)
            self._boot.exception()  # looked at, so that asyncio does not complain where nobody waits any more

    def _blame(self, slot: HandlerSlot, exit_code: int) -> None:
        """Count the death against the record that was in its hands, and stop a partition whose record kills.

        Where it had several, none is counted: its successor handles them one at a time.
        """
        held: list[tuple[Partition, int]] = []
        is_single = True
        letter_id = 0
        for partition, number in slot.bound.values():
            if partition.memory is None:
                continue
            memory = partition.memory.slots[number]
            offset = memory.in_flight
            if offset is not None:
                held.append((partition, offset))
                is_single = is_single and memory.is_single
                letter_id = letter_id or memory.cells[LETTER]
            memory.handler_ended()
        is_single = is_single and len(held) == 1
        how = slot.how_ended(exit_code)
        blamed = letter_id if is_single or not held else None
        self.letters.on_process_ended(list(slot.bound), blamed, how)
        if is_single and letter_id:
            return  # the offset in its hands stood for the letter's record
        for partition, offset in held:
            deaths = partition.count_crash(offset) if is_single else 0
            self._log.warning(
                "record_in_flight",
                f"{partition.name}@{offset} was in the hands of handler {slot.slot} when it ended"
                + ("" if is_single else ", with others"),
                topic=partition.name.topic,
                partition=partition.name.partition,
                offset=offset,
                deaths=deaths,
            )
            if deaths >= self._settings.handler.crash_attempts:
                self._quarantine(partition, how.too_often(offset, deaths))

    def _quarantine(self, partition: Partition, record: Quarantined) -> None:
        """The record is not given to the handler again."""
        if self._on_failure is OnFailure.STOP:
            self._events.on_record_failed(partition, f"offset {record.offset}: {record.reason}")
        else:
            partition.quarantine(record)

    def watch(self, now: float) -> None:
        """Now and then, ``now`` in monotonic seconds: kill a process whose handler has had a record for too long."""
        timeout_seconds = self._settings.handler.timeout_seconds
        for slot in self.slots:
            for binding, bound in slot.bound.items():
                memory = bound.partition.memory
                slot.hands.look(binding, None if memory is None else memory.slots[bound.slot].oldest_call, now)
            late = slot.hands.longer_than(timeout_seconds) if timeout_seconds else None
            if late is not None and slot.ready and not slot.killed_for:
                slot.killed_for = f"killed, since a call of the handler took longer than {timeout_seconds:g} s"
                task = asyncio.get_running_loop().create_task(self._kill_hung(slot, slot.bound[late]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _kill_hung(self, slot: HandlerSlot, bound: Bound) -> None:
        child = slot.child
        if child is None or child.pid is None:
            return
        stacks = await slot.stacks.ask(child)
        partition = bound.partition
        self._log.error(
            "handler_hung",
            f"handler {slot.slot} has had a record of {partition.name} for longer than handler.timeout_seconds, and is "
            f"killed:\n{stacks or 'no stacks: it does not answer'}",
            slot=slot.slot,
            topic=partition.name.topic,
            partition=partition.name.partition,
        )
        child.kill()

    def _send_bind(self, slot: HandlerSlot, binding: int, bound: Bound) -> None:
        partition = bound.partition
        if slot.child is None or partition.memory is None:
            return
        slot.child.send(
            Bind(
                binding=binding,
                topic=partition.name.topic,
                partition=partition.name.partition,
                assignment_epoch=partition.memory.epoch,
                slot=bound.slot,
                layout=self.layout,
                quarantined=partition.quarantined,
            ),
            (partition.memory.fd, partition.bell),
        )


def describe_exit(exit_code: int) -> str:
    """An exit code in words."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
