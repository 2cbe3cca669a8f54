"""The program's end of a KafkaSource: it reads the rings of its partitions itself, and says how far it has got.

Used by one thread at a time. Nothing here waits: who does, sleeps on ``bell`` and ``channel`` after ``announce``.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import repeat
from typing import Any, NamedTuple

from kafkasrcd.errors import RingCorrupted
from kafkasrcd.message import Message
from kafkasrcd.settings import CommitStrategy, Settings
from kafkasrcd.storage.offset_store import Advance, TopicPartition
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.commits import Commits
from kafkasrcd.workers.control import (
    Bind,
    ControlChannel,
    ControlMessage,
    Ended,
    Fenced,
    HandlerReady,
    Recorded,
    RingBroken,
    Setup,
    Unbind,
)
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.dead_letter_sink import DeadLetterSink
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.formats import Formats
from kafkasrcd.workers.frame import Columns
from kafkasrcd.workers.handler_target import HandlerTarget
from kafkasrcd.workers.partition_memory import BYTES, LEASE
from kafkasrcd.workers.ring import COMMITTABLE, FAILURES, HANDLED, IN_FLIGHT, KEPT_OPEN, PROCESSED, SKIPPED, UNSAVED


class SourceCursor(PartitionCursor):
    """With ``manual`` what is not committed need not be kept: should the program die, its partitions are read again
    from the committed offset by whoever gets them. Else a program that commits now and then would fill the ring."""

    in_transactions = False
    """With ``on_checkpoint``."""

    @property
    def is_open(self) -> bool:
        """Whether something of it was taken that is not committed."""
        return bool(self.cells[UNSAVED])

    def release_done(self) -> None:
        if self.in_transactions:
            super().release_done()  # what is rolled back is read again
            return
        done = self.cells[PROCESSED]
        position = None
        while self._releases and self._releases[0][0] < done:
            position = self._releases.popleft()[1]
        if position is not None:
            self.cells[KEPT_OPEN] = self.cells[self.keeps] < done  # first: afterwards the ring may look empty
            self.reader.release(position)


class Counts(NamedTuple):
    """What a source has had of one partition."""

    consumed: int = 0
    failed: int = 0
    bytes: int = 0

    def __add__(self, other: object) -> "Counts":
        """Both."""
        if not isinstance(other, Counts):
            return NotImplemented
        return Counts(self.consumed + other.consumed, self.failed + other.failed, self.bytes + other.bytes)


def _counts_of(cursor: PartitionCursor) -> Counts:
    cells = cursor.cells
    return Counts(cells[HANDLED] + cells[SKIPPED], cells[FAILURES], cursor.memory.cells[BYTES])


class SourceReader:
    """``on_bound`` and ``on_unbound`` (with whether it is lost) are told from within ``receive``."""

    def __init__(
        self,
        settings: Settings,
        target: HandlerTarget,
        channel: ControlChannel,
        on_bound: Callable[[TopicPartition], None],
        on_unbound: Callable[[TopicPartition, bool], None],
    ) -> None:
        self.channel = channel
        self.bell = -1
        """Rung by the workers; there once the engine has said who it is."""
        self.ended: Ended | None = None
        """The engine is gone."""
        self.paused: set[TopicPartition] = set()
        self.recorded: dict[int, str] = {}
        """Answers, by number: empty, or why not."""
        self._settings = settings
        self._target = target
        self._formats = Formats(settings)
        self._commits = Commits(DeadLetterSink(settings, ""))
        self._on_bound = on_bound
        self._on_unbound = on_unbound
        self._cursors: dict[int, SourceCursor] = {}
        self._turns: deque[SourceCursor] = deque()
        self._current: SourceCursor | None = None
        """Its frame is being read."""
        self._in_transactions = settings.commit_strategy is CommitStrategy.ON_CHECKPOINT
        self.lost: set[TopicPartition] = set()
        """With ``on_checkpoint``: partitions that went while something of theirs was taken and not committed."""
        self._in_hand: list[tuple[SourceCursor, int, int]] = []
        """What the program has taken and not finished: of whom, the last offset, and how many."""
        self._past: dict[TopicPartition, Counts] = {}
        self._log = EventLog("source")
        channel.setblocking(False)

    @property
    def is_ready(self) -> bool:
        """Whether the engine has said who it is."""
        return self.bell >= 0

    # ---- the engine ----------------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Hear what the engine has said since the last call."""
        while self.ended is None:
            try:
                received = self.channel.receive()
            except BlockingIOError:
                return
            if received is None:
                self.ended = Ended(error="WorkerError", reason="the source's engine was killed")
                return
            message, descriptors = received
            if isinstance(message, Bind):
                self._bind(message, descriptors)
            elif isinstance(message, Unbind):
                self._unbind(message)
            elif isinstance(message, Recorded):
                self.recorded[message.number] = message.problem
            elif isinstance(message, Ended):
                self.ended = message
            elif isinstance(message, Setup):
                self.bell, stacks = descriptors
                os.close(stacks)
                self.tell(HandlerReady((("", self._target.shape),)))

    def tell(self, message: ControlMessage) -> None:
        """Tell the engine something; where it is gone, ``receive`` will say so."""
        try:
            self.channel.send(message)
        except OSError:
            pass

    def _bind(self, bind: Bind, descriptors: list[int]) -> None:
        target = self._target.reading_or_refusing(self._formats.value(bind.topic))
        try:
            cursor = SourceCursor(self._settings, target, bind, descriptors, self._commits, self._log)
        except RingCorrupted as error:
            for descriptor in descriptors:
                os.close(descriptor)
            self.tell(RingBroken(binding=bind.binding, reason=str(error)))
            return
        cursor.in_transactions = self._in_transactions
        self._cursors[bind.binding] = cursor
        self._turns.append(cursor)
        self._on_bound(_name(cursor))

    def _unbind(self, unbind: Unbind) -> None:
        cursor = self._cursors.pop(unbind.binding, None)
        if cursor is None:
            return
        self._turns.remove(cursor)
        if self._current is cursor:
            self._current = None
        self._in_hand = [each for each in self._in_hand if each[0] is not cursor]
        name = _name(cursor)
        if cursor.is_open:
            self.lost.add(name)
        self._past[name] = self._past.get(name, Counts()) + _counts_of(cursor)
        cursor.close()
        self._on_unbound(name, unbind.lost)

    # ---- records -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """What was taken is processed."""
        for cursor, offset, count in self._in_hand:
            cells = cursor.cells
            cells[HANDLED] += count
            cells[PROCESSED] = offset + 1
            cursor.put_back()
        self._in_hand.clear()

    def drop_hand(self) -> None:
        """What was taken is not processed, and will not be by this program."""
        for cursor, _, _ in self._in_hand:
            cursor.put_back()
        self._in_hand.clear()

    def has_record(self) -> bool:
        """Whether ``take`` would find one now."""
        current = self._current
        if current is not None and current.columns is not None and current.index < len(current.columns.values):
            return True
        return self._next_cursor() is not None

    def advances(self) -> list[Advance]:
        """With ``on_checkpoint``: what was processed since the last one, as the store takes it."""
        return [
            Advance(_name(cursor), cursor.memory.epoch, cursor.cells[PROCESSED], cursor.bind.slot, cursor.bind.layout)
            for cursor in self._cursors.values()
            if cursor.cells[PROCESSED] > cursor.cells[COMMITTABLE]
        ]

    def fenced(self, refusals: Mapping[TopicPartition, str]) -> None:
        """The store has other owners for these: the engine finds out whose they are, and binds anew what is ours."""
        for cursor in self._cursors.values():
            refusal = refusals.get(_name(cursor))
            if refusal is not None:
                cursor.failed = refusal
                self.tell(Fenced(binding=cursor.binding, reason=refusal))

    def rewind(self) -> None:
        """With ``on_checkpoint``: what was taken since the last one is taken again."""
        self._in_hand.clear()
        self._current = None
        self.lost.clear()
        for cursor in self._cursors.values():
            cursor.rewind()
            cursor.cells[UNSAVED] = 0

    def commit(self) -> None:
        """What is processed may be committed."""
        for cursor in self._cursors.values():
            cursor.cells[COMMITTABLE] = cursor.cells[PROCESSED]
            cursor.cells[KEPT_OPEN] = cursor.cells[UNSAVED] = 0
            cursor.release_done()

    def take(self) -> Message[Any] | None:
        """The next record, into the program's hands; None where there is none now."""
        while True:
            cursor = self._current
            if cursor is None:
                cursor = self._next_cursor()
                if cursor is None:
                    return None
            columns, index = cursor.columns, cursor.index
            if columns is None or index >= len(columns.values):
                self._current = None
                continue
            offset = columns.offsets[index]
            cursor.cells[IN_FLIGHT] = offset
            # The cell first, then the lease: see PartitionMemory.in_flight.
            if boottime_ns() >= cursor.lease_cells[LEASE] or cursor.failed is not None:
                cursor.put_back()
                self._current = None
                continue
            value: Any = columns.values[index]
            try:
                payload = None if value is None else cursor.target.decode(value)
            except Exception as error:  # noqa: BLE001 - whatever the decoder raises is about the record
                cursor.undecodable(columns, index, error)
                cursor.put_back()
                cursor.index = index + 1
                continue
            cursor.index = index + 1
            if self._in_transactions:
                cursor.cells[UNSAVED] = 1
            self._in_hand.append((cursor, offset, 1))
            return Message(
                payload,
                None if columns.keys is None else columns.keys[index],
                cursor.topic,
                cursor.partition,
                offset,
                columns.timestamps[index],
                None if columns.headers is None else columns.headers[index],
            )

    def take_many(self, most: int) -> list[Message[Any]]:
        """As many as are there, of one partition after the other; none where there are none now."""
        taken: list[Message[Any]] = []
        while len(taken) < most:
            cursor = self._current or self._next_cursor()
            if cursor is None:
                break
            if cursor.columns is None or cursor.index >= len(cursor.columns.values):
                self._current = None
                continue
            part = self._from_frame(cursor, cursor.columns, most - len(taken))
            if part:
                taken += part
                continue
            if taken:
                break  # what cannot be read is passed over, and nothing before it may be in hand then
            message = self.take()
            if message is None:
                break
            taken.append(message)
        return taken

    def _from_frame(self, cursor: SourceCursor, columns: Columns, most: int) -> list[Message[Any]]:
        """The good records that come next in the frame in hand, up to the first that cannot be read."""
        first = cursor.index
        already = any(each[0] is cursor for each in self._in_hand)
        if not already:
            cursor.cells[IN_FLIGHT] = columns.offsets[first]
        messages: list[Message[Any]] = []
        if boottime_ns() < cursor.lease_cells[LEASE] and cursor.failed is None:
            messages = _messages(cursor, columns, first, min(first + most, len(columns.values)))
        if messages:
            cursor.index = first + len(messages)
            if self._in_transactions:
                cursor.cells[UNSAVED] = 1
            self._in_hand.append((cursor, messages[-1].offset, len(messages)))
        elif not already:
            cursor.put_back()
        return messages

    def _next_cursor(self) -> SourceCursor | None:
        """The next one in turn that has a record."""
        self.receive()  # once a frame: also where there is always something to take, others may be bound or taken away
        for _ in range(len(self._turns)):
            cursor = self._turns[0]
            self._turns.rotate(-1)
            if cursor.failed is not None or not cursor.memory.leased or _name(cursor) in self.paused:
                continue
            try:
                cursor.release_done()
                if cursor.load():
                    self._current = cursor
                    return cursor
            except RingCorrupted as error:
                cursor.failed = str(error)
                self.tell(RingBroken(binding=cursor.binding, reason=str(error)))
        return None

    # ---- sleeping ------------------------------------------------------------------------------------------------

    def announce(self) -> bool:
        """Before a sleep on the bell: False where a record has come by now."""
        return all(
            cursor.reader.await_frame()
            for cursor in self._cursors.values()
            if not cursor.held_back and _name(cursor) not in self.paused
        )

    def awake(self) -> None:
        """The sleep is over."""
        for cursor in self._cursors.values():
            cursor.reader.awake()
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            pass

    # ---- what is asked -------------------------------------------------------------------------------------------

    def assignment(self) -> list[TopicPartition]:
        """The partitions bound now, in order."""
        return sorted({_name(cursor) for cursor in list(self._cursors.values())})

    def pause(self, names: Iterable[TopicPartition]) -> None:
        """Take nothing of these before ``resume``."""
        self.paused.update(names)
        if self._current is not None and _name(self._current) in self.paused:
            self._current = None  # its frame goes on where it stands

    def resume(self, names: Iterable[TopicPartition]) -> None:
        """Take of these again."""
        self.paused.difference_update(names)

    def stand_still(self, name: TopicPartition) -> bool:
        """Take nothing more of it before it is bound anew; False where it is not bound."""
        found = [cursor for cursor in self._cursors.values() if _name(cursor) == name]
        for cursor in found:
            cursor.failed = "it goes on elsewhere"
        return bool(found)

    def counts(self) -> dict[TopicPartition, Counts]:
        """By partition, also of earlier assignments. From any thread."""
        counts = dict(self._past)
        for cursor in list(self._cursors.values()):
            counts[_name(cursor)] = counts.get(_name(cursor), Counts()) + _counts_of(cursor)
        return counts

    def close(self) -> None:
        """Give everything back."""
        for cursor in self._cursors.values():
            self._past[_name(cursor)] = self._past.get(_name(cursor), Counts()) + _counts_of(cursor)
            cursor.close()
        self._cursors.clear()
        self._turns.clear()
        self._current = None
        self.channel.close()
        if self.bell >= 0:
            os.close(self.bell)
            self.bell = -1


def _messages(cursor: SourceCursor, columns: Columns, first: int, stop: int) -> list[Message[Any]]:
    """Those from ``first`` up to ``stop``, or to the first that cannot be read. Loops in C, where all can be."""
    decode = cursor.target.decode
    values: Any = columns.values[first:stop]
    payloads: list[Any] = []
    try:
        payloads = (
            [None if value is None else decode(value) for value in values]
            if None in values
            else list(map(decode, values))
        )
    except Exception:  # noqa: BLE001 - it is about the record, which take() meets next
        with suppress(Exception):
            for value in values:
                payloads.append(None if value is None else decode(value))
    stop = first + len(payloads)
    nothing: repeat[Any] = repeat(None)
    return list(
        map(
            Message,
            payloads,
            nothing if columns.keys is None else columns.keys[first:stop],
            repeat(cursor.topic),
            repeat(cursor.partition),
            columns.offsets[first:stop],
            columns.timestamps[first:stop],
            nothing if columns.headers is None else columns.headers[first:stop],
        )
    )


def _name(cursor: PartitionCursor) -> TopicPartition:
    return TopicPartition(cursor.topic, cursor.partition)
