"""Records gathered for a handler of ``list[Message[T]]``."""

from collections import deque
from itertools import repeat
from typing import Any, NamedTuple

from kafkasrcd.message import Message
from kafkasrcd.outcomes import BatchFailed
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.frame import Columns
from kafkasrcd.workers.ring import IN_FLIGHT, PROCESSED

_Place = tuple[Columns, int]
"""Where a record was read: its frame, and which of it."""


class _Part(NamedTuple):
    """Some of a batch that failed, to be given to the handler by themselves. Once they are done, everything before
    ``through`` is."""

    messages: list[Message[Any]]
    places: list[_Place]
    through: int


class Batch:
    """The batch being gathered, or being tried again, for one partition.

    It is due when it is full, when it has waited long enough, or when the next record cannot join it because it cannot
    be deserialized. One that failed for the last time is halved, and halves that fail are halved again, so that only
    the records that fail alone are given up. While the records that a process before this one had in its hands when it
    died are not done, each is a batch of its own: the next death has one to blame.
    """

    def __init__(self, cursor: PartitionCursor, most: int, wait_ms: int, *, undone_together: bool) -> None:
        """``undone_together``: a call that raises leaves nothing of the whole batch."""
        self.messages: list[Message[Any]] = []
        """What the handler is given; never changed once it has it."""
        self._places: list[_Place] = []
        self._cursor = cursor
        self._most = most
        self._wait_ns = wait_ms * 1_000_000
        self._undone_together = undone_together
        self._since_ns = 0
        self._closed = False
        self._through: int | None = None
        """Of a part: what is done once it is."""
        self._parts: deque[_Part] = deque()
        self._passed: int | None = None
        """Once the last record is buried, everything before this is done."""

    @property
    def offsets(self) -> list[int]:
        """The offsets of its records."""
        return [message.offset for message in self.messages]

    def gather(self) -> int:
        """Take what is there; nanoseconds until the batch is due: 0 is now, -1 is when more records come, or the
        cursor's letter is buried."""
        cursor = self._cursor
        if cursor.letter is not None:
            return -1
        self._pass()
        if not self.messages and self._parts:
            self.messages, self._places, self._through = self._parts.popleft()
            self._closed = True
        most = 1 if cursor.cells[PROCESSED] < cursor.suspect_until else self._most
        while not self._closed and len(self.messages) < most and cursor.failed is None and cursor.load():
            if not self._take(most - len(self.messages)):
                break
        if not self.messages:
            return -1
        if self._closed or len(self.messages) >= most:
            return 0
        return max(0, self._since_ns + self._wait_ns - boottime_ns())

    def _take(self, room: int) -> bool:
        """From the frame in hand; False where a record of it has to be given up first."""
        cursor, messages = self._cursor, self.messages
        columns = cursor.columns
        if columns is None:
            return False
        if not messages:
            self._since_ns = boottime_ns()
        decode, topic, partition = cursor.target.decode, cursor.topic, cursor.partition
        first = index = cursor.index
        values: Any = columns.values
        offsets, timestamps, keys, headers = columns.offsets, columns.timestamps, columns.keys, columns.headers
        failed: Exception | None = None
        for index in range(first, min(first + room, len(values))):
            value = values[index]
            try:
                payload = None if value is None else decode(value)
            except Exception as error:  # noqa: BLE001 - whatever the decoder raises is about the record
                failed = error
                break
            key = None if keys is None else keys[index]
            header = None if headers is None else headers[index]
            messages.append(Message(payload, key, topic, partition, offsets[index], timestamps[index], header))
        else:
            index += 1
        self._places.extend(zip(repeat(columns), range(first, index), strict=False))
        cursor.index = index
        if failed is None:
            return True
        if messages:
            self._closed = True  # in order: what came before it is handled first
            return True
        cursor.cells[IN_FLIGHT] = offsets[index]
        cursor.letter = cursor.undecodable(columns, index, failed)
        cursor.put_back()
        if cursor.failed is None:
            cursor.index += 1
        return cursor.letter is None and cursor.failed is None

    def succeeded(self) -> None:
        """The handler returned."""
        through = self._end
        self._cursor.succeeded(through - 1, len(self.messages))
        self._next()

    def raised(self, error: Exception) -> None:
        """The handler raised."""
        cursor = self._cursor
        alone = len(self.messages) == 1
        if isinstance(error, BatchFailed):
            if not alone and self._some_failed(error):
                return
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        halved = self._through is not None and not alone
        backoff_ns = cursor.raised(self.offsets, error, 0 if halved else None)
        cursor.put_back()
        if backoff_ns is not None:
            cursor.retry_at_ns = boottime_ns() + backoff_ns
        elif not alone:
            self._halve()
        else:
            cursor.letter = cursor.give_up(*self._places[0], error)
            if cursor.failed is None:
                self._passed = self._end
                self._next()

    def rewind(self) -> None:
        """What is gathered is read again."""
        self.messages, self._places = [], []
        self._through = self._passed = None
        self._closed = False
        self._parts.clear()

    @property
    def _end(self) -> int:
        """Everything before is done once this batch is."""
        return self.messages[-1].offset + 1 if self._through is None else self._through

    def _halve(self) -> None:
        messages, places = self.messages, self._places
        half = len(messages) // 2
        self._cursor.forget_attempts(messages[0].offset)
        self._parts.appendleft(_Part(messages[half:], places[half:], self._end))
        self._parts.appendleft(_Part(messages[:half], places[:half], messages[half].offset))
        self._next()

    def _some_failed(self, error: BatchFailed) -> bool:
        """The handler says which: they are tried alone, in order. False where it names none of this batch."""
        named = {message.offset for message in error.failed}
        records = list(zip(self.messages, self._places, strict=True))
        failed = [(message, place) for message, place in records if message.offset in named]
        if not failed:
            return False
        cursor, end = self._cursor, self._end
        good = [(message, place) for message, place in records if message.offset not in named]
        first = failed[0][0].offset
        cursor.raised([message.offset for message, _ in failed], error, 0)
        cursor.forget_attempts(first)
        cursor.put_back()
        ends = [*(message.offset for message, _ in failed[1:]), end]
        parts = [_Part([message], [place], through) for (message, place), through in zip(failed, ends, strict=True)]
        if good and self._undone_together:
            parts.insert(0, _Part([message for message, _ in good], [place for _, place in good], first))
        elif good:
            cursor.succeeded(first - 1, len(good))
        self._parts.extendleft(reversed(parts))
        self._next()
        return True

    def _next(self) -> None:
        self.messages, self._places = [], []
        self._through = None
        self._closed = False
        self._pass()
        self._cursor.release_done()

    def _pass(self) -> None:
        """Where the last record is passed over, so is what a part of it says."""
        cursor = self._cursor
        if self._passed is not None and cursor.letter is None:
            cursor.cells[PROCESSED] = max(cursor.cells[PROCESSED], self._passed)
            self._passed = None
            cursor.put_back()
            cursor.release_done()
