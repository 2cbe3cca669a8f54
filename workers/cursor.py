"""A handler process's place in one slot of a partition: its ring, the frame in hand, and what happens to a record that
fails."""

import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from kafkasrcd.errors import ConfigurationError, HandlerMisuse
from kafkasrcd.settings import OnFailure, Settings
from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.dead_letters import DeadLetter, as_text
from kafkasrcd.version import installed_version
from kafkasrcd.workers.control import Bind, LetterDue
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.failure import Failure, failure_of, of_the_user
from kafkasrcd.workers.failure_policy import failure_policy
from kafkasrcd.workers.formats import Formats
from kafkasrcd.workers.frame import Columns, RecordError, decode_frame
from kafkasrcd.workers.handler_target import HandlerTarget
from kafkasrcd.workers.partition_memory import KEEPS_CELL, PartitionMemory
from kafkasrcd.workers.payload import key_decoder_of, refusing
from kafkasrcd.workers.prefix import Prefix
from kafkasrcd.workers.reasons import reason_of, text_of
from kafkasrcd.workers.retry_policy import RetryPolicy
from kafkasrcd.workers.ring import (
    DEAD_LETTERED,
    FAILURES,
    HANDLED,
    IN_FLIGHT,
    IN_HANDS,
    PROCESSED,
    SCHEDULED,
    SKIPPED,
    STARTED,
    RingReader,
)

if TYPE_CHECKING:
    from kafkasrcd.workers.commits import Commits
    from kafkasrcd.workers.redelivery import Redelivery

_NEVER: Final = -1
_FIRST_REFUSAL_NS: Final = 200_000_000
_MOST_REFUSAL_NS: Final = 10_000_000_000
"""Between attempts to keep a dead letter whose target is away."""


class PartitionCursor:
    """Where one slot's handling stands.

    ``columns`` is the frame in hand, ``index`` the next record in it. Records before PROCESSED are passed over: they
    were handled before this process started, or handed off a second time by a worker's successor.
    """

    def __init__(
        self,
        settings: Settings,
        target: HandlerTarget,
        bind: Bind,
        descriptors: list[int],
        commits: "Commits",
        log: EventLog,
    ) -> None:
        memory_fd, self._worker_bell = descriptors
        self.target = target
        self.bind = bind
        self.topic = bind.topic
        self.partition = bind.partition
        self.binding = bind.binding
        self.memory = PartitionMemory(memory_fd, bind.assignment_epoch)
        self.lease_cells = self.memory.cells
        slot = self.memory.slots[bind.slot]
        self.cells = slot.cells
        self.reader = RingReader(slot.ring, bind.assignment_epoch, self._worker_bell)
        self.keeps = KEEPS_CELL[settings.commit_strategy]
        # What a process before this one had handled, and neither committed nor put into a transaction, died with it.
        self.cells[PROCESSED] = self.cells[self.keeps]
        self.put_back()
        self.suspect_until = self.cells[STARTED]
        """A process before this one may have ended by a record before this offset."""
        self.commits = commits
        self.call = commits.caller(self)
        """The handler, as the commit strategy has it called."""
        self.prefix: Prefix | None = None
        """Where records are finished in any order."""
        self.full = False
        """So much of it is in hand that no more is taken for now."""
        self.columns: Columns | None = None
        self.index = 0
        self.letter: DeadLetter | None = None
        """Where records are handled one after the other: the one to bury before the next record."""
        self.letter_refusals = 0
        """How often in a row a letter could not be kept."""
        self.due: deque[LetterDue] = deque()
        """Letters whose records are to be handled again."""
        self.redelivery: Redelivery | None = None
        """Where records are handled one after the other: the first of ``due``, in hand."""
        self.letters_left = 0
        """How many letters the supervisor has given and not heard of again."""
        self.letters_done = 0
        """Of these, how many got somewhere."""
        self.left_out: dict[int, DeadLetter | None] = {}
        """By offset, records whose bytes did not fit their frame; their letters, once Kafka has given these."""
        self._quarantined = {each.offset: each for each in bind.quarantined}
        self._attempts: dict[int, tuple[int, int]] = {}
        """By offset, how often the handler raised for it (or for the batch that starts there), and when first."""
        self.retry_at_ns = 0
        """Boot time before which the current record is not tried again."""
        self.failed: str | None = None
        """Why this slot stands still before the record at ``failed_offset``."""
        self.failed_offset = _NEVER
        self.reported = False
        self._loaded = self.cells[PROCESSED]
        """Next offset after the last frame in hand or before it."""
        self._releases: deque[tuple[int, int]] = deque()
        self._settings = settings
        self._on_failure = failure_policy(settings)
        self._retries = RetryPolicy(settings)
        self._log = log
        formats = Formats(settings)
        self._value_format = formats.value(bind.topic)
        try:
            self._decode_key = key_decoder_of(formats.key(bind.topic))
        except ConfigurationError as error:
            self._decode_key = refusing(error)

    @property
    def coordinates(self) -> dict[str, Any]:
        """For log lines."""
        return {"topic": self.topic, "partition": self.partition, "epoch": self.memory.epoch}

    @property
    def held_back(self) -> bool:
        """Whether one more frame would change nothing now: it has enough, stands still, waits to try again, or has no
        lease."""
        return self.full or self.failed is not None or self.retry_at_ns != 0 or not self.memory.leased

    def load(self) -> bool:
        """Have a record at ``index``; False where the ring has no more. Raises RingCorrupted."""
        while self.columns is None or self.index >= len(self.columns.values):
            self.columns = None
            frame = self.reader.read()
            if frame is None:
                return False
            payload, position = frame
            columns = decode_frame(payload)
            self._releases.append((columns.offsets[-1], position))
            # Not PROCESSED alone: a batch in the making has taken records that are not processed yet.
            loaded = max(self._loaded, self.cells[PROCESSED])
            self._loaded = max(loaded, columns.offsets[-1] + 1)
            self.index = 0
            if columns.offsets[0] < loaded:
                self.index = sum(1 for offset in columns.offsets if offset < loaded)
            self.decode_keys(columns)
            if columns.errors or self._quarantined:
                self._with_errors(columns)
            self.columns = columns
            offsets = columns.offsets[self.index :]
            self.commits.loaded(self, offsets)
            if self.prefix is not None:
                self.prefix.load(offsets)
            self.release_done()
        return True

    def decode_keys(self, columns: Columns) -> None:
        """Those that cannot be decoded stay bytes, and make their records undecodable."""
        keys, decode = columns.keys, self._decode_key
        if keys is None or decode is None:
            return
        decoded: list[Any] = []
        errors = list(columns.errors)
        for index, key in enumerate(keys):
            try:
                decoded.append(None if key is None else decode(key))
            except Exception as error:  # noqa: BLE001 - whatever the decoder raises is about the record
                decoded.append(columns.raw_key(index))
                errors.append(RecordError(index, type(error).__name__, f"its key: {reason_of(error)}"))
        if columns.raw_keys is None:
            columns.raw_keys = keys
        columns.keys = decoded
        columns.errors = errors

    def rewind(self) -> None:
        """Read again what is not done for good."""
        self.reader.rewind()
        self.columns = None
        self.index = 0
        self._releases.clear()
        self._loaded = self.cells[PROCESSED] = self.cells[self.keeps]
        self.retry_at_ns = 0
        self.letter = None
        self.due.clear()
        self.redelivery = None
        self.left_out.clear()
        if self.prefix is not None:
            self.prefix.clear()
        self.put_back()

    def release_done(self) -> None:
        """Give the space of frames whose records are all done for good back to the worker."""
        done = self.cells[self.keeps]
        position = _NEVER
        while self._releases and self._releases[0][0] < done:
            position = self._releases.popleft()[1]
        if position != _NEVER:
            self.reader.release(position)

    def succeeded(self, offset: int, count: int) -> None:
        """Everything up to ``offset`` is processed, ``count`` records by the handler since the last call."""
        self.cells[PROCESSED] = offset + 1
        self.cells[HANDLED] += count

    def finish(self, offset: int) -> None:
        """The record at ``offset`` is finished, in any order; ``prefix`` has it."""
        if self.prefix is None:
            self.cells[PROCESSED] = offset + 1
            return
        moved = self.prefix.finish(offset)
        if moved is not None:
            if self.cells[IN_HANDS] > 1:
                # First this: while others are in the handler's hands, IN_FLIGHT is not below PROCESSED.
                oldest = self.prefix.oldest
                self.cells[IN_FLIGHT] = moved if oldest is None else oldest
            self.cells[PROCESSED] = moved

    def put_back(self) -> None:
        """Nothing is in the handler's hands."""
        self.cells[IN_FLIGHT] = self.cells[PROCESSED] - 1

    def undecodable(self, columns: Columns, index: int, error: Exception) -> DeadLetter | None:
        """The record cannot be deserialized, or has ended its process: no further attempt would change that. What
        becomes of it is as ``give_up`` says."""
        offset = columns.offsets[index]
        self.cells[FAILURES] += 1
        quarantined = self._quarantined.get(offset)
        if quarantined is not None:
            self._log.repeated(
                "record_quarantined",
                f"{self.topic}[{self.partition}]@{offset} is not handled any more: {quarantined.reason}",
                same=(self.binding,),
                offset=offset,
                **self.coordinates,
            )
            failure = Failure(quarantined.error, quarantined.reason, quarantined.traceback)
            return self._given_up(columns, index, failure, quarantined.attempts, wall_clock_ms())
        value: object = columns.values[index]
        attempts = 1
        if isinstance(value, RecordError):
            failure = Failure(value.error, value.reason, value.traceback)
            attempts = value.attempts
        else:
            failure = Failure(type(error).__name__, reason_of(error))
        self._log.repeated(
            "record_undecodable",
            f"{self.topic}[{self.partition}]@{offset} cannot be deserialized: {failure.reason}",
            same=(self.binding,),
            offset=offset,
            **self.coordinates,
        )
        failure = failure._replace(reason=f"cannot be deserialized: {failure.reason}")
        return self._given_up(columns, index, failure, attempts, wall_clock_ms())

    def raised(self, offsets: Sequence[int], error: Exception, retries: int | None = None) -> int | None:
        """The handler raised for the record (or batch) at ``offsets``: ns until the next attempt here, or None where
        that was the last one, of ``retries`` further ones (unset: as configured)."""
        self.cells[FAILURES] += 1
        processed = self.cells[PROCESSED]
        self._attempts = {offset: before for offset, before in self._attempts.items() if offset >= processed}
        attempts, first_ms = self._attempts.get(offsets[0], (0, wall_clock_ms()))
        attempts += 1
        self._attempts[offsets[0]] = attempts, first_ms
        most = self._retries.attempts if retries is None else retries + 1
        error = of_the_user(error)
        self._log.repeated(
            "handler_failed",
            f"{self.target.name} raised {type(error).__name__} at {self.topic}[{self.partition}]@{offsets[0]}: "
            f"{text_of(error)} (attempt {attempts} of {most})",
            same=(self.binding,),
            cause=error,
            offset=offsets[0],
            records=len(offsets),
            **self.coordinates,
        )
        return None if self._retries.scheduled else self._retries.next_ns(error, attempts, most)

    def forget_attempts(self, offset: int) -> None:
        """What starts at ``offset`` is tried again in another way."""
        self._attempts.pop(offset, None)

    def give_up(self, columns: Columns, index: int, error: Exception) -> DeadLetter | None:
        """The handler raised for the record for the last time here.

        Returns the letter to bury, after which ``buried`` is called; or None, where the record is skipped now, or the
        slot stands still before it.
        """
        attempts, first_ms = self._attempts.pop(columns.offsets[index], (1, wall_clock_ms()))
        failure = failure_of(error, self.target.name)
        if isinstance(error, HandlerMisuse):
            self._stop_before(columns.offsets[index], failure)
            return None
        wait_ns = self._retries.next_ns(error, attempts) if self._retries.scheduled else None
        if wait_ns is None:
            return self._given_up(columns, index, failure, attempts, first_ms)
        return self._letter(columns, index, failure, attempts, first_ms, wall_clock_ms() + wait_ns // 1_000_000)

    def whole(self, letter: DeadLetter) -> DeadLetter:
        """``letter`` with its record's bytes, which Kafka is asked for where they were left out; blocks.

        Raises DeadLetterRefused where they cannot be had now.
        """
        if letter.offset not in self.left_out:
            return letter
        whole = self.left_out[letter.offset]
        if whole is None:
            # Here, since hardly a process ever needs it.
            from kafkasrcd.workers.record_of_kafka import with_record

            whole = self.left_out[letter.offset] = with_record(letter, self._settings, self._value_format)
        return whole

    def buried(self, letter: DeadLetter) -> None:
        """The letter is kept: its record is passed over."""
        self.letter = None
        if letter.due_ms is None:
            self.cells[DEAD_LETTERED] += 1
            self._pass_over(letter.offset, "record_dead_lettered", "is dead-lettered", letter.reason)
        else:
            self.cells[SCHEDULED] += 1
            self._pass_over(letter.offset, "record_put_aside", "is put aside, to be tried again", letter.reason)

    def letter_refused(self) -> int:
        """A letter could not be kept: ns until it is tried again."""
        self.letter_refusals += 1
        return int(min(_FIRST_REFUSAL_NS * 2 ** min(self.letter_refusals - 1, 30), _MOST_REFUSAL_NS))

    def close(self) -> None:
        """Give the shared memory back."""
        self.commits.closed(self)
        self.columns = None
        self.memory.close()
        os.close(self._worker_bell)

    def _given_up(
        self, columns: Columns, index: int, failure: Failure, attempts: int, first_ms: int
    ) -> DeadLetter | None:
        offset = columns.offsets[index]
        if self._on_failure is OnFailure.STOP:
            self._stop_before(offset, failure)
            return None
        if self._on_failure is OnFailure.SKIP:
            self.cells[SKIPPED] += 1
            self._pass_over(offset, "record_skipped", "is skipped", failure.reason)
            return None
        return self._letter(columns, index, failure, attempts, first_ms)

    def _letter(
        self,
        columns: Columns,
        index: int,
        failure: Failure,
        attempts: int,
        first_ms: int,
        due_ms: int | None = None,
    ) -> DeadLetter:
        offset = columns.offsets[index]
        value = columns.values[index] if columns.raws is None else columns.raws[index]
        return DeadLetter(
            topic=self.topic,
            partition=self.partition,
            offset=offset,
            timestamp_ms=columns.timestamps[index],
            key=columns.raw_key(index),
            value=value,
            headers=None if columns.headers is None else columns.headers[index],
            value_format=self._value_format.name,
            schema_id=self._value_format.schema_id(value),
            error=failure.error,
            reason=as_text(failure.reason),
            traceback=as_text(failure.traceback),
            attempts=attempts,
            first_failed_ms=first_ms,
            last_failed_ms=wall_clock_ms(),
            host=socket.gethostname(),
            version=installed_version(),
            due_ms=due_ms,
        )

    def _stop_before(self, offset: int, failure: Failure) -> None:
        self.failed = failure.reason
        self.failed_offset = offset

    def _pass_over(self, offset: int, event: str, what: str, reason: str) -> None:
        self.left_out.pop(offset, None)
        self.finish(offset)
        self.commits.given_up(self, offset)
        self._log.repeated(
            event,
            f"{self.topic}[{self.partition}]@{offset} {what}: {reason}",
            same=(self.binding,),
            offset=offset,
            **self.coordinates,
        )
        self.release_done()

    def _with_errors(self, columns: Columns) -> None:
        """In place of the value of a record that is not to be handled, why: so that decoding it fails, and the path of
        good records has no test for it."""
        values: list[Any] = list(columns.values)
        errors = [*columns.errors]
        if self._quarantined:
            errors += [
                RecordError(index, quarantined.error, quarantined.reason)
                for index, offset in enumerate(columns.offsets)
                if (quarantined := self._quarantined.get(offset)) is not None
            ]
        for error in errors:
            values[error.index] = error
            if error.left_out:
                self.left_out[columns.offsets[error.index]] = None
        columns.raws = columns.values if columns.raws is None else columns.raws
        columns.values = values
