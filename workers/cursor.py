"""A handler process's place in one partition: its ring, the frame in hand, and what happens to a record that fails."""

import os
import random
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from kafkasrcd.settings import OnFailure, Settings
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.control import Bind
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.frame import Columns, RecordError, decode_frame
from kafkasrcd.workers.handler_target import HandlerTarget
from kafkasrcd.workers.partition_memory import PartitionMemory
from kafkasrcd.workers.ring import FAILURES, HANDLED, IN_FLIGHT, PROCESSED, SKIPPED, RingReader

_NEVER: Final = -1


class PartitionCursor:
    """Where one partition's handling stands.

    ``columns`` is the frame in hand, ``index`` the next record in it. Records before PROCESSED are passed over: they
    were handled before this process started, or handed off a second time by a worker's successor.
    """

    def __init__(
        self, settings: Settings, target: HandlerTarget, bind: Bind, descriptors: list[int], log: EventLog
    ) -> None:
        memory_fd, self._worker_bell = descriptors
        self.target = target
        self.topic = bind.topic
        self.partition = bind.partition
        self.binding = bind.binding
        self.memory = PartitionMemory(memory_fd, bind.assignment_epoch)
        self.lease_cells = self.memory.cells
        self.cells = self.memory.ring_cells
        self.reader = RingReader(self.memory.ring, bind.assignment_epoch, self._worker_bell)
        self.columns: Columns | None = None
        self.index = 0
        self.attempts = 0
        """How often the handler raised for the record (or batch) at ``_attempted``."""
        self._attempted = _NEVER
        self.retry_at_ns = 0
        """Boot time before which the current record is not tried again."""
        self.failed: str | None = None
        """Why this partition stands still before the record at ``failed_offset``."""
        self.failed_offset = _NEVER
        self.reported = False
        self._loaded = self.cells[PROCESSED]
        """Next offset after the last frame in hand or before it."""
        self._releases: deque[tuple[int, int]] = deque()
        self._settings = settings
        self._log = log
        self._random = random.Random()  # noqa: S311 - for jitter

    @property
    def coordinates(self) -> dict[str, Any]:
        """For log lines."""
        return {"topic": self.topic, "partition": self.partition, "epoch": self.memory.epoch}

    @property
    def held_back(self) -> bool:
        """Whether one more frame would change nothing now: it stands still, waits to try again, or has no lease."""
        return self.failed is not None or self.retry_at_ns != 0 or not self.memory.leased

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
            if columns.errors:
                # In place of its value, so that decoding it fails and the path of good records has no test for it.
                values: list[Any] = list(columns.values)
                for error in columns.errors:
                    values[error.index] = error
                columns.values = values
            self.columns = columns
            self.release_processed()
        return True

    def release_processed(self) -> None:
        """Give the space of frames that are processed whole back to the worker."""
        processed = self.cells[PROCESSED]
        position = _NEVER
        while self._releases and self._releases[0][0] < processed:
            position = self._releases.popleft()[1]
        if position != _NEVER:
            self.reader.release(position)

    def succeeded(self, offset: int, count: int) -> None:
        """Everything up to ``offset`` is processed, ``count`` records by the handler since the last call."""
        self.cells[PROCESSED] = offset + 1
        self.cells[HANDLED] += count

    def put_back(self) -> None:
        """Nothing is in the handler's hands."""
        self.cells[IN_FLIGHT] = self.cells[PROCESSED] - 1

    def undecodable(self, offset: int, value: object, error: Exception) -> None:
        """The record cannot be deserialized: no further attempt would change that."""
        reason = value.reason if isinstance(value, RecordError) else f"{type(error).__name__}: {_text(error)}"
        self.cells[FAILURES] += 1
        self._log.repeated(
            "record_undecodable",
            f"{self.topic}[{self.partition}]@{offset} cannot be deserialized: {reason}",
            same=(self.binding,),
            offset=offset,
            **self.coordinates,
        )
        self._give_up([offset], f"cannot be deserialized: {reason}")

    def raised(self, offsets: Sequence[int], error: Exception) -> bool:
        """The handler raised for the record (or batch) at ``offsets``. True where that was the last attempt."""
        self.cells[FAILURES] += 1
        if offsets[0] != self._attempted:
            self.attempts = 0
            self._attempted = offsets[0]
        self.attempts += 1
        last = self.attempts > self._settings.max_retries
        # From the handler's own frame on: the lines above it are not the user's.
        error = error.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None)
        self._log.repeated(
            "handler_failed",
            f"{self.target.name} raised {type(error).__name__} at {self.topic}[{self.partition}]@{offsets[0]}: "
            f"{_text(error)} (attempt {self.attempts} of {self._settings.max_retries + 1})",
            same=(self.binding,),
            cause=error,
            offset=offsets[0],
            records=len(offsets),
            **self.coordinates,
        )
        if not last:
            self.retry_at_ns = boottime_ns() + self._backoff_ns()
            return False
        if len(offsets) == 1:
            said = _printable("".join(traceback.format_exception_only(error)).strip())
            self._give_up(offsets, f"{self.target.name} raised {said}")
        return True

    def close(self) -> None:
        """Give the shared memory back."""
        self.columns = None
        self.memory.close()
        os.close(self._worker_bell)

    def _give_up(self, offsets: Sequence[int], reason: str) -> None:
        self.attempts = 0
        if self._settings.handler.on_failure is OnFailure.STOP:
            self.failed = reason
            self.failed_offset = offsets[0]
            return
        self.cells[SKIPPED] += len(offsets)
        self.cells[PROCESSED] = offsets[-1] + 1
        self._log.repeated(
            "record_skipped",
            f"{self.topic}[{self.partition}]@{offsets[0]} is skipped: {reason}",
            same=(self.binding,),
            offset=offsets[0],
            **self.coordinates,
        )
        self.release_processed()

    def _backoff_ns(self) -> int:
        """Doubling with the attempts, capped, the upper half of it random: partitions that fail together spread."""
        milliseconds = min(
            self._settings.retry_backoff_ms * 2 ** min(self.attempts - 1, 30), self._settings.retry_backoff_max_ms
        )
        return int(milliseconds * self._random.uniform(0.5, 1.0) * 1e6)


def _text(error: Exception) -> str:
    """``str(error)``, also where the user's ``__str__`` raises: then it is not a death of the process."""
    try:
        return _printable(str(error))
    except Exception as second:  # noqa: BLE001 - the user's code may raise anything
        return f"(no text: {type(second).__name__})"


def _printable(text: str) -> str:
    """With what is no Unicode (of a file name) escaped: it could not be sent to the supervisor."""
    return text.encode(errors="backslashreplace").decode()
