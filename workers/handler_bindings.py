"""The partitions bound to one handler process, and its talk with the supervisor."""

import os
from collections.abc import Callable
from typing import Final

from kafkasrcd.errors import KafkasrcdError, RingCorrupted
from kafkasrcd.settings import Settings
from kafkasrcd.storage.dead_letters import DeadLetter
from kafkasrcd.workers.batch import Batch
from kafkasrcd.workers.commits import Commits
from kafkasrcd.workers.control import (
    Bind,
    ControlChannel,
    Exit,
    LetterRefused,
    LettersDone,
    RecordFailed,
    Redeliver,
    RingBroken,
    Unbind,
)
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.formats import Formats
from kafkasrcd.workers.handler_target import HandlerTargets
from kafkasrcd.workers.redelivery import Redeliveries

IDLE_MS: Final = 1000.0
"""The longest sleep: a wake-up cannot be lost on x86-64 or ARMv8 (see ring.fence), elsewhere it is this late."""
LEASE_WAIT_MS: Final = 20.0
"""How soon a partition whose lease had run out is looked at again."""


def lease_wait_ms(cursor: PartitionCursor) -> float:
    """How long until a partition without a lease is worth another look: the end of a pause is told by the bell."""
    return IDLE_MS if cursor.memory.paused else LEASE_WAIT_MS


class HandlerBindings:
    """What a runner serves. Runners differ in how they call the handler; this is what they share."""

    def __init__(
        self,
        settings: Settings,
        targets: HandlerTargets,
        channel: ControlChannel,
        bell: int,
        redeliveries: Redeliveries,
    ) -> None:
        self.channel = channel
        self.bell = bell
        """Rung by the workers of every bound partition; owned by the caller."""
        self.commits: Commits
        """As the commit strategy has it; set before anything is bound."""
        self.redeliveries = redeliveries
        self.on_rewound: Callable[[], None] | None = None
        self._settings = settings
        self._targets = targets
        self._formats = Formats(settings)
        self._log = EventLog("handler")
        self._cursors: dict[int, PartitionCursor] = {}
        self._batches: dict[int, Batch] = {}
        channel.setblocking(False)

    def cursors(self) -> list[PartitionCursor]:
        """The bound partitions, in the order they were bound."""
        return list(self._cursors.values())

    def batch(self, cursor: PartitionCursor) -> Batch:
        """The batch being gathered for ``cursor``."""
        return self._batches[cursor.binding]

    @property
    def has_async(self) -> bool:
        """Whether a handler is ``async def``."""
        return any(target.is_async for target in self._targets.all())

    def rewind(self) -> None:
        """Read everything again from where it is done for good."""
        for cursor in self._cursors.values():
            cursor.rewind()
            self.letters_dropped(cursor)
        for batch in self._batches.values():
            batch.rewind()
        if self.on_rewound is not None:
            self.on_rewound()

    def receive(self) -> bool:
        """Do what the supervisor asked for since the last call; False when it is time to end."""
        while True:
            try:
                received = self.channel.receive()
            except BlockingIOError:
                return True
            if received is None:
                return False
            message, descriptors = received
            if isinstance(message, Bind):
                self._bind(message, descriptors)
            elif isinstance(message, Unbind):
                self._unbind(message.binding)
            elif isinstance(message, Redeliver):
                self._redeliver(message)
            elif isinstance(message, Exit):
                return False
            else:
                raise TypeError(f"a handler process was told {message!r}")

    def _bind(self, bind: Bind, descriptors: list[int]) -> None:
        target = self._targets.for_topic(bind.topic).reading_or_refusing(self._formats.value(bind.topic))
        try:
            cursor = PartitionCursor(self._settings, target, bind, descriptors, self.commits, self._log)
        except RingCorrupted as error:
            for descriptor in descriptors:
                os.close(descriptor)
            self.channel.send(RingBroken(binding=bind.binding, reason=str(error)))
            return
        self._cursors[bind.binding] = cursor
        handler = self._settings.handler
        self._batches[bind.binding] = Batch(
            cursor,
            handler.batch_max_messages,
            handler.batch_max_wait_ms,
            undone_together=self.commits.one_at_a_time,
        )

    def _unbind(self, binding: int) -> None:
        cursor = self._cursors.pop(binding, None)
        self._batches.pop(binding, None)
        if cursor is not None:
            cursor.close()

    def _redeliver(self, message: Redeliver) -> None:
        cursor = self._cursors.get(message.binding)
        if cursor is not None:
            cursor.due.extend(message.letters)
            cursor.letters_left += len(message.letters)

    def letter_waits(self, cursor: PartitionCursor, letter_id: int, error: KafkasrcdError) -> None:
        """It cannot be handled again now, its schema or the store being away: it stays due, and is given again."""
        self._log.repeated(
            "redelivery_waits",
            f"dead letter {letter_id} is not handled again yet: {error}",
            same=(cursor.binding,),
            letter=letter_id,
            **cursor.coordinates,
        )

    def letter_done(self, cursor: PartitionCursor, *, dropped: bool = False) -> None:
        """One that was given is not in hand any more; ``dropped``: nothing came of it, and it is due as before."""
        if cursor.letters_left:
            cursor.letters_done += not dropped
            self._letters_left(cursor, cursor.letters_left - 1)

    def letters_dropped(self, cursor: PartitionCursor) -> None:
        """Nothing comes of those that are left; they are due as before."""
        if cursor.letters_left:
            self._letters_left(cursor, 0)

    def _letters_left(self, cursor: PartitionCursor, left: int) -> None:
        cursor.letters_left = left
        if not left:
            self.channel.send(LettersDone(binding=cursor.binding, done=cursor.letters_done))
            cursor.letters_done = 0

    def await_frames(self) -> bool:
        """Announce a sleep to every idle partition's worker; False where one has a frame by now."""
        return all(cursor.reader.await_frame() for cursor in self._cursors.values() if not cursor.held_back)

    def awake(self) -> None:
        """The sleep is over."""
        for cursor in self._cursors.values():
            cursor.reader.awake()
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            pass

    def report_failed(self, cursor: PartitionCursor) -> None:
        """Tell the supervisor, once, that the partition stands still before a record that failed."""
        if cursor.failed is not None and not cursor.reported:
            cursor.reported = True
            self.channel.send(RecordFailed(binding=cursor.binding, offset=cursor.failed_offset, error=cursor.failed))

    def letter_refused(self, cursor: PartitionCursor, letter: DeadLetter, error: KafkasrcdError) -> int:
        """Tell the supervisor that the slot waits for a dead letter's target: ns until it is tried again."""
        what = "put aside" if letter.due_ms is not None else "dead-lettered"
        return self.not_written(cursor, f"offset {letter.offset} cannot be {what}", error)

    def not_written(self, cursor: PartitionCursor, what: str, error: KafkasrcdError) -> int:
        """Tell the supervisor that the slot waits until a letter is written down: ns until that is tried again."""
        self._log.repeated(
            "dead_letter_refused",
            f"{cursor.topic}[{cursor.partition}]: {what}, and its partition waits: {error}",
            same=(cursor.binding,),
            **cursor.coordinates,
        )
        reason = f"{what}, and is waited for: {error}"
        self.channel.send(LetterRefused(binding=cursor.binding, reason=reason))
        return cursor.letter_refused()

    def letter_buried(self, cursor: PartitionCursor, letter: DeadLetter) -> None:
        """The letter is kept: go on behind its record."""
        self.letter_written(cursor)
        cursor.buried(letter)

    def letter_written(self, cursor: PartitionCursor) -> None:
        """What was to be written of a letter is."""
        if cursor.letter_refusals:
            cursor.letter_refusals = 0
            self.channel.send(LetterRefused(binding=cursor.binding, reason=""))

    def report_broken(self, cursor: PartitionCursor, error: RingCorrupted) -> None:
        """Tell the supervisor that the ring has to be replaced, and read it no more."""
        cursor.failed = str(error)
        cursor.reported = True
        self._log.error("ring_corrupted", f"the ring is replaced: {error}", **cursor.coordinates)
        self.channel.send(RingBroken(binding=cursor.binding, reason=str(error)))
