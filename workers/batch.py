"""Records gathered for a handler of ``list[Message[T]]``."""

from collections import deque
from typing import Any, NamedTuple

from kafkasrcd.message import Message
from kafkasrcd.outcomes import BatchFailed
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.frame import Columns
from kafkasrcd.workers.ring import IN_FLIGHT, PROCESSED


class _Item(NamedTuple):
    """A record in the batch, and where it was read."""

    message: Message[Any]
    columns: Columns
    place: int


class _Part(NamedTuple):
    """Some of a batch that failed, to be given to the handler by themselves. Once they are done, everything before
    ``through`` is."""

    items: list[_Item]
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
        self._items: list[_Item] = []
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
    def messages(self) -> list[Message[Any]]:
        """What the handler is given."""
        return [item.message for item in self._items]

    @property
    def offsets(self) -> list[int]:
        """The offsets of its records."""
        return [item.message.offset for item in self._items]

    def gather(self) -> int:
        """Take what is there; nanoseconds until the batch is due: 0 is now, -1 is when more records come, or the
        cursor's letter is buried."""
        cursor = self._cursor
        if cursor.letter is not None:
            return -1
        self._pass()
        if not self._items and self._parts:
            self._items, self._through = self._parts.popleft()
            self._closed = True
        while not self._closed and self._is_open() and cursor.load():
            self._take_next()
        if not self._items:
            return -1
        if self._closed or len(self._items) >= self._room():
            return 0
        return max(0, self._since_ns + self._wait_ns - boottime_ns())

    def _is_open(self) -> bool:
        cursor = self._cursor
        return cursor.failed is None and cursor.letter is None and len(self._items) < self._room()

    def _room(self) -> int:
        return 1 if self._cursor.cells[PROCESSED] < self._cursor.suspect_until else self._most

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
            if self._items:
                self._closed = True  # in order: what came before it is handled first
                return
            cursor.cells[IN_FLIGHT] = offset
            cursor.letter = cursor.undecodable(columns, index, error)
            cursor.put_back()
            if cursor.failed is None:
                cursor.index += 1
            return
        if not self._items:
            self._since_ns = boottime_ns()
        message = Message(
            payload,
            columns.keys[index] if columns.keys is not None else None,
            cursor.topic,
            cursor.partition,
            offset,
            columns.timestamps[index],
            columns.headers[index] if columns.headers is not None else None,
        )
        self._items.append(_Item(message, columns, index))
        cursor.index += 1

    def succeeded(self) -> None:
        """The handler returned."""
        through = self._end
        self._cursor.succeeded(through - 1, len(self._items))
        self._next()

    def raised(self, error: Exception) -> None:
        """The handler raised."""
        cursor = self._cursor
        alone = len(self._items) == 1
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
            _, columns, place = self._items[0]
            cursor.letter = cursor.give_up(columns, place, error)
            if cursor.failed is None:
                self._passed = self._end
                self._next()

    def rewind(self) -> None:
        """What is gathered is read again."""
        self._items = []
        self._through = self._passed = None
        self._closed = False
        self._parts.clear()

    @property
    def _end(self) -> int:
        """Everything before is done once this batch is."""
        return self._items[-1].message.offset + 1 if self._through is None else self._through

    def _halve(self) -> None:
        items, end = self._items, self._end
        half = len(items) // 2
        self._cursor.forget_attempts(items[0].message.offset)
        self._parts.appendleft(_Part(items[half:], end))
        self._parts.appendleft(_Part(items[:half], items[half].message.offset))
        self._next()

    def _some_failed(self, error: BatchFailed) -> bool:
        """The handler says which: they are tried alone, in order. False where it names none of this batch."""
        named = {message.offset for message in error.failed}
        failed = [item for item in self._items if item.message.offset in named]
        if not failed:
            return False
        cursor, end = self._cursor, self._end
        good = [item for item in self._items if item.message.offset not in named]
        cursor.raised([item.message.offset for item in failed], error, 0)
        cursor.forget_attempts(failed[0].message.offset)
        cursor.put_back()
        ends = [*(item.message.offset for item in failed[1:]), end]
        parts = [_Part([item], through) for item, through in zip(failed, ends, strict=True)]
        first = failed[0].message.offset
        if good and self._undone_together:
            parts.insert(0, _Part(good, first))
        elif good:
            cursor.succeeded(first - 1, len(good))
        self._parts.extendleft(reversed(parts))
        self._next()
        return True

    def _next(self) -> None:
        self._items = []
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
