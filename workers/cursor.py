"""A handler process's place in one slot of a partition: its ring, the frame in hand, and what happens to a record that
fails."""

import os
import random
import traceback
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import OnFailure, Settings
from kafkasrcd.workers.control import Bind
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.formats import Formats
from kafkasrcd.workers.frame import Columns, RecordError, decode_frame
from kafkasrcd.workers.handler_target import HandlerTarget
from kafkasrcd.workers.partition_memory import KEEPS_CELL, PartitionMemory
from kafkasrcd.workers.payload import Decode, key_decoder_of, refusing
from kafkasrcd.workers.prefix import Prefix
from kafkasrcd.workers.reasons import reason_of
from kafkasrcd.workers.ring import FAILURES, HANDLED, IN_FLIGHT, IN_HANDS, PROCESSED, SKIPPED, STARTED, RingReader

if TYPE_CHECKING:
    from kafkasrcd.workers.commits import Commits

_NEVER: Final = -1
_BETWEEN: Final = ("kafkasrcd.workers.", "kafkasrcd.storage.", "concurrent.futures.")
"""The modules between a runner and the user's function."""


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
        self._attempts: dict[int, int] = {}
        """By offset, how often the handler raised for it (or for the batch that starts there)."""
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
        self._log = log
        self._random = random.Random()  # noqa: S311 - for jitter
        try:
            self._decode_key = key_decoder_of(Formats(settings).key(bind.topic))
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
            if self._decode_key is not None and columns.keys is not None:
                self._decode_keys(columns, self._decode_key)
            if columns.errors:
                # In place of its value, so that decoding it fails and the path of good records has no test for it.
                values: list[Any] = list(columns.values)
                for error in columns.errors:
                    values[error.index] = error
                columns.values = values
            self.columns = columns
            offsets = columns.offsets[self.index :]
            self.commits.loaded(self, offsets)
            if self.prefix is not None:
                self.prefix.load(offsets)
            self.release_done()
        return True

    def _decode_keys(self, columns: Columns, decode: Decode) -> None:
        """Those that cannot be decoded stay bytes, and make their records undecodable."""
        raw_keys: Sequence[bytes | None] = columns.keys or ()
        keys: list[Any] = []
        errors = list(columns.errors)
        for index, key in enumerate(raw_keys):
            try:
                keys.append(None if key is None else decode(key))
            except Exception as error:  # noqa: BLE001 - whatever the decoder raises is about the record
                keys.append(columns.raw_key(index))
                errors.append(RecordError(index, type(error).__name__, f"its key: {reason_of(error)}"))
        if columns.raw_keys is None:
            columns.raw_keys = raw_keys
        if len(errors) > len(columns.errors) and columns.raws is None:
            columns.raws = columns.values
        columns.keys = keys
        columns.errors = errors

    def rewind(self) -> None:
        """Read again what is not done for good."""
        self.reader.rewind()
        self.columns = None
        self.index = 0
        self._releases.clear()
        self._loaded = self.cells[PROCESSED] = self.cells[self.keeps]
        self.retry_at_ns = 0
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

    def undecodable(self, offset: int, value: object, error: Exception) -> None:
        """The record cannot be deserialized: no further attempt would change that."""
        reason = value.reason if isinstance(value, RecordError) else reason_of(error)
        self.cells[FAILURES] += 1
        self._log.repeated(
            "record_undecodable",
            f"{self.topic}[{self.partition}]@{offset} cannot be deserialized: {reason}",
            same=(self.binding,),
            offset=offset,
            **self.coordinates,
        )
        self._give_up(offset, f"cannot be deserialized: {reason}")

    def raised(self, offsets: Sequence[int], error: Exception) -> int | None:
        """The handler raised for the record (or batch) at ``offsets``: ns until the next attempt, or None where that
        was the last one."""
        self.cells[FAILURES] += 1
        processed = self.cells[PROCESSED]
        self._attempts = {offset: count for offset, count in self._attempts.items() if offset >= processed}
        attempts = self._attempts[offsets[0]] = self._attempts.get(offsets[0], 0) + 1
        error = error.with_traceback(_of_the_user(error.__traceback__))
        self._log.repeated(
            "handler_failed",
            f"{self.target.name} raised {type(error).__name__} at {self.topic}[{self.partition}]@{offsets[0]}: "
            f"{_text(error)} (attempt {attempts} of {self._settings.max_retries + 1})",
            same=(self.binding,),
            cause=error,
            offset=offsets[0],
            records=len(offsets),
            **self.coordinates,
        )
        if attempts <= self._settings.max_retries:
            return self._backoff_ns(attempts)
        del self._attempts[offsets[0]]
        if len(offsets) == 1:
            said = _printable("".join(traceback.format_exception_only(error)).strip())
            self._give_up(offsets[0], f"{self.target.name} raised {said}")
        return None

    def close(self) -> None:
        """Give the shared memory back."""
        self.commits.closed(self)
        self.columns = None
        self.memory.close()
        os.close(self._worker_bell)

    def _give_up(self, offset: int, reason: str) -> None:
        if self._settings.handler.on_failure is OnFailure.STOP:
            self.failed = reason
            self.failed_offset = offset
            return
        self.cells[SKIPPED] += 1
        self.finish(offset)
        self.commits.given_up(self, offset)
        self._log.repeated(
            "record_skipped",
            f"{self.topic}[{self.partition}]@{offset} is skipped: {reason}",
            same=(self.binding,),
            offset=offset,
            **self.coordinates,
        )
        self.release_done()

    def _backoff_ns(self, attempts: int) -> int:
        """Doubling with the attempts, capped, the upper half of it random: partitions that fail together spread."""
        milliseconds = min(
            self._settings.retry_backoff_ms * 2 ** min(attempts - 1, 30), self._settings.retry_backoff_max_ms
        )
        return int(milliseconds * self._random.uniform(0.5, 1.0) * 1e6)


def _of_the_user(trace: TracebackType | None) -> TracebackType | None:
    """From the handler's own frame on: the lines above it are not the user's."""
    while trace is not None and trace.tb_next is not None:
        if not str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_BETWEEN):
            return trace
        trace = trace.tb_next
    return trace


def _text(error: Exception) -> str:
    """``str(error)``, also where the user's ``__str__`` raises: then it is not a death of the process."""
    try:
        return _printable(str(error))
    except Exception as second:  # noqa: BLE001 - the user's code may raise anything
        return f"(no text: {type(second).__name__})"


def _printable(text: str) -> str:
    """With what is no Unicode (of a file name) escaped: it could not be sent to the supervisor."""
    return text.encode(errors="backslashreplace").decode()
