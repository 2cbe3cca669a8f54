"""Records gathered for a handler of ``list[Message[T]]``."""

from collections import deque
from typing import Any

from kafkasrcd.message import Message
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.ring import IN_FLIGHT


class Batch:
    """The batch being gathered, or being tried again, for one partition.

    It is due when it is full, when it has waited long enough, or when the next record cannot join it because it
    cannot be deserialized. A batch that failed for the last time is given once more record by record, so that only
    the records that fail alone are given up.
    """

    def __init__(self, cursor: PartitionCursor, most: int, wait_ms: int) -> None:
        self.messages: list[Message[Any]] = []
        self._cursor = cursor
        self._most = most
        self._wait_ns = wait_ms * 1_000_000
        self._since_ns = 0
        self._closed = False
        self._alone: deque[Message[Any]] = deque()

    @property
    def offsets(self) -> list[int]:
        """The offsets of its records."""
        return [message.offset for message in self.messages]

    def gather(self) -> int:
        """Take what is there; nanoseconds until the batch is due: 0 is now, -1 is when more records come."""
        if not self.messages and self._alone:
            self.messages = [self._alone.popleft()]
            self._closed = True
        cursor = self._cursor
        while not self._closed and cursor.failed is None and len(self.messages) < self._most and cursor.load():
            self._take_next()
        if not self.messages:
            return -1
        if self._closed or len(self.messages) >= self._most:
            return 0
        return max(0, self._since_ns + self._wait_ns - boottime_ns())

    def _take_next(self) -> None:
        cursor = self._cursor
        columns = cursor.columns
        if columns is None:
            return
        index = cursor.index
        value: Any = columns.values[index]
        offset = columns.offsets[index]
        try:
            payload = None if value is None else cursor.target.decode(value)
        except Exception as error:  # noqa: BLE001 - whatever the decoder raises is about the record
            if self.messages:
                self._closed = True  # in order: what came before it is handled first
                return
            cursor.cells[IN_FLIGHT] = offset
            cursor.undecodable(offset, value, error)
            cursor.put_back()
            if cursor.failed is None:
                cursor.index += 1
            return
        if not self.messages:
            self._since_ns = boottime_ns()
        self.messages.append(
            Message(
                payload,
                columns.keys[index] if columns.keys is not None else None,
                cursor.topic,
                cursor.partition,
                offset,
                columns.timestamps[index],
                columns.headers[index] if columns.headers is not None else None,
            )
        )
        cursor.index += 1

    def succeeded(self) -> None:
        """The handler returned."""
        self._cursor.succeeded(self.messages[-1].offset, len(self.messages))
        self._next()

    def raised(self, error: Exception) -> None:
        """The handler raised."""
        cursor = self._cursor
        backoff_ns = cursor.raised(self.offsets, error)
        cursor.put_back()
        if backoff_ns is not None:
            cursor.retry_at_ns = boottime_ns() + backoff_ns
            return
        if len(self.messages) > 1:
            self._alone.extend(self.messages)
            self._next()
        elif cursor.failed is None:
            self._next()

    def rewind(self) -> None:
        """What is gathered is read again."""
        self.messages = []
        self._closed = False
        self._alone.clear()

    def _next(self) -> None:
        self.messages = []
        self._closed = False
        self._cursor.release_done()
