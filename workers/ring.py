"""A ring of frames in shared memory: one writer process, one reader process, no lock between them.

``HEAD`` and ``TAIL`` count bytes ever published and ever released, so ``HEAD - TAIL`` bytes are in the ring and a
position modulo the capacity is a place in the data area. A frame lies in one piece: where it does not fit before the
end, a pad marker sends the reader to the start. A frame becomes visible by the one store into ``HEAD``, and its space
free by the one store into ``TAIL``; whoever is killed anywhere else has changed nothing the other side looks at.

Each frame carries the position it was published at, its assignment epoch, its length three times, and is refused
(``RingCorrupted``) where one of them is not what it must be.
"""

import os
from collections.abc import Sequence
from struct import Struct
from threading import Lock
from typing import Final

from kafkasrcd.errors import RecordTooLarge, RingCorrupted

PAGE: Final = 4096
LINE: Final = 8
"""Cells are 8 bytes; each of those below has a cache line (64 bytes) to itself, so that no two writers share one."""

# Written once by the creator, before either side maps the ring.
MAGIC: Final = 0 * LINE
CAPACITY: Final = 1 * LINE
EPOCH: Final = 2 * LINE
# Written by the writer alone.
HEAD: Final = 3 * LINE
WRITER_WAITING: Final = 4 * LINE
# Written by the reader alone.
TAIL: Final = 5 * LINE
READER_WAITING: Final = 6 * LINE
PROCESSED: Final = 7 * LINE
"""Next offset after the last record this ring's reader has finished."""
IN_FLIGHT: Final = 8 * LINE
"""Offset of the record in the handler's hands; below PROCESSED where there is none."""
HANDLED: Final = 9 * LINE
FAILURES: Final = 10 * LINE
"""Attempts that raised, and records that could not be deserialized."""
SKIPPED: Final = 11 * LINE
COMMITTABLE: Final = 12 * LINE
"""With ``manual`` and ``on_checkpoint``: next offset after the records that the handler committed, or that are in a
committed transaction. A successor of the reader begins there, and up to there space is released. Otherwise unused."""
UNSAVED: Final = 13 * LINE
"""1 while the reader's process has this ring's records in a transaction that is not committed yet."""
STARTED: Final = 14 * LINE
"""Next offset after the highest that was ever in the handler's hands; written where many are at once."""
IN_HANDS: Final = 15 * LINE
"""How many records (or batches) are in the handler's hands; written where many are at once."""
DEAD_LETTERED: Final = 16 * LINE
BURYING: Final = 18 * LINE
"""1 while a dead letter is being kept: what is in hand then is not in the handler's."""
CALLED_AT: Final = 17 * LINE
"""Boot time (ns) at which the oldest call that goes on began; written where many are at once, 0 where there is none."""
SCHEDULED: Final = 19 * LINE
"""Records put aside, to be handled again later."""
REDELIVERED: Final = 20 * LINE
"""Letters whose record was handled again, and is done."""
GIVEN_UP_LATER: Final = 22 * LINE
"""Records put aside before, that failed for the last time."""
KEPT_OPEN: Final = 23 * LINE
"""1 while records that are released already are not committed yet: an empty ring does not say that all is done."""
LETTER: Final = 21 * LINE
"""While the handler has the record of a letter in its hands, the letter's id; of several, one. Else 0."""

RING_MAGIC: Final = 0x6B61666B_73726301

_FRAME: Final = Struct("<QQqQ")  # magic ^ payload length, position, epoch, payload length
_TRAILER: Final = Struct("<Q")
_FRAME_MAGIC: Final = 0x6672616D655F3031
_PAD_MAGIC: Final = 0x7061645F66726D31
_ALIGNMENT: Final = 64
_OVERHEAD: Final = _FRAME.size + _TRAILER.size

_barrier = Lock()


def fence() -> None:
    """Order every store before it ahead of every load and store after it.

    Two lock round trips: an atomic read-modify-write is a full barrier on x86-64, and release then acquire of the
    same lock is one on ARMv8. Python has no plainer one. About 0.1 µs, once a frame.
    """
    with _barrier:
        pass
    with _barrier:
        pass


def ring_bytes(capacity: int) -> int:
    """Bytes of shared memory for a ring of ``capacity``: its header page and its data."""
    return PAGE + capacity


def largest_payload(capacity: int) -> int:
    """The longest payload a ring of ``capacity`` bytes carries.

    Half the ring: then a frame that does not fit before the end always fits at the start once the ring is empty.
    """
    return capacity // 2 - _ALIGNMENT - _OVERHEAD


def format_ring(memory: memoryview, capacity: int, epoch: int, next_offset: int) -> None:
    """Lay out an empty ring in zeroed ``memory``; once, before either side opens it."""
    if capacity % PAGE:
        raise ValueError(f"a ring's capacity is a multiple of {PAGE}, not {capacity}")
    cells = memory[:PAGE].cast("q")
    cells[CAPACITY] = capacity
    cells[EPOCH] = epoch
    cells[PROCESSED] = next_offset
    cells[IN_FLIGHT] = next_offset - 1
    cells[COMMITTABLE] = next_offset
    cells[STARTED] = next_offset
    fence()
    cells[MAGIC] = RING_MAGIC


class _Side:
    """What writer and reader share: the mapped cells and data, checked once."""

    def __init__(self, memory: memoryview, epoch: int) -> None:
        self.cells = memory[:PAGE].cast("q")
        if self.cells[MAGIC] != RING_MAGIC:
            raise RingCorrupted("the shared memory holds no ring")
        self.capacity = self.cells[CAPACITY]
        if len(memory) != ring_bytes(self.capacity):
            raise RingCorrupted(f"a ring of {self.capacity} bytes in {len(memory)} bytes of shared memory")
        if self.cells[EPOCH] != epoch:
            raise RingCorrupted(f"the ring is of assignment epoch {self.cells[EPOCH]}, not {epoch}")
        self.epoch = epoch
        self.data = memory[PAGE:]

    @property
    def used(self) -> int:
        """Bytes between tail and head; raises RingCorrupted where the cells contradict each other.

        No race makes them contradict: each side is the only writer of one of the two, and the other only moves away
        from the bound it is checked against.
        """
        tail = self.cells[TAIL]
        head = self.cells[HEAD]
        if not 0 <= tail <= head <= tail + self.capacity or tail % _ALIGNMENT or head % _ALIGNMENT:
            raise RingCorrupted(f"head {head} and tail {tail} in a ring of {self.capacity} bytes")
        return head - tail


class RingWriter(_Side):
    """The worker's side. ``bell`` is an eventfd that wakes the reader."""

    def __init__(self, memory: memoryview, epoch: int, bell: int) -> None:
        super().__init__(memory, epoch)
        self._bell = bell
        self._largest = largest_payload(self.capacity)
        self.cells[WRITER_WAITING] = 0
        # A predecessor may have been killed between the store into HEAD and the bell.
        if self.cells[READER_WAITING]:
            os.eventfd_write(bell, 1)

    def publish(self, parts: Sequence[bytes]) -> bool:
        """Make the payload that ``parts`` add up to the next frame; False where the ring has no room for it now.

        Does not block. Raises RecordTooLarge for one that never fits.
        """
        length = sum(map(len, parts))
        if length > self._largest:
            raise RecordTooLarge(f"a frame of {length} bytes; a ring of {self.capacity} carries {self._largest}")
        head = self.cells[HEAD]
        place = head % self.capacity
        size = -(-(length + _OVERHEAD) // _ALIGNMENT) * _ALIGNMENT
        pad = self.capacity - place if place + size > self.capacity else 0
        if self.used + pad + size > self.capacity:
            return False
        if pad:
            _FRAME.pack_into(self.data, place, _PAD_MAGIC ^ pad, head, self.epoch, pad)
            head += pad
            place = 0
        _FRAME.pack_into(self.data, place, _FRAME_MAGIC ^ length, head, self.epoch, length)
        place += _FRAME.size
        for part in parts:
            end = place + len(part)
            self.data[place:end] = part
            place = end
        _TRAILER.pack_into(self.data, place, head ^ length)
        fence()
        self.cells[HEAD] = head + size
        # The reader stores READER_WAITING, fences, then loads HEAD; here HEAD is stored, fenced, then READER_WAITING
        # loaded. Whichever store comes second, its side sees the other's: no wake-up is lost.
        fence()
        if self.cells[READER_WAITING]:
            os.eventfd_write(self._bell, 1)
        return True

    def await_room(self) -> None:
        """Announce that the writer is about to sleep until the reader has released a frame.

        ``publish`` must be tried once more after this and before sleeping.
        """
        self.cells[WRITER_WAITING] = 1
        fence()

    def awake(self) -> None:
        """Take back ``await_room``."""
        self.cells[WRITER_WAITING] = 0


class RingReader(_Side):
    """The handler's side. ``bell`` is an eventfd that wakes the writer.

    Reading runs ahead of releasing: a frame's space stays taken, and its records can be read again by a successor,
    until ``release``. A reader opened anew starts at the oldest frame not released.
    """

    def __init__(self, memory: memoryview, epoch: int, bell: int) -> None:
        super().__init__(memory, epoch)
        self._bell = bell
        self._next = self.cells[TAIL]
        self.cells[READER_WAITING] = 0
        # A predecessor may have been killed between the store into TAIL and the bell.
        if self.cells[WRITER_WAITING]:
            os.eventfd_write(bell, 1)

    @property
    def has_frame(self) -> bool:
        """Whether there is a frame that ``read`` has not returned."""
        return bool(self.cells[HEAD] != self._next)

    def read(self) -> tuple[bytes, int] | None:
        """A copy of the next frame's payload and the position to ``release`` it by, or None where there is none."""
        while True:
            published = self.used - (self._next - self.cells[TAIL])
            if not published:
                return None
            place = self._next % self.capacity
            magic, position, epoch, length = _FRAME.unpack_from(self.data, place)
            if position != self._next or epoch != self.epoch:
                raise RingCorrupted(
                    f"at {self._next} lies a frame of position {position}, epoch {epoch}; this epoch is {self.epoch}"
                )
            if magic ^ length == _PAD_MAGIC:
                if length != self.capacity - place or length > published:
                    raise RingCorrupted(f"a pad of {length} bytes at {place} in a ring of {self.capacity}")
                self._next += length
                continue
            if magic ^ length != _FRAME_MAGIC:
                raise RingCorrupted(f"no frame at position {position}")
            size = -(-(length + _OVERHEAD) // _ALIGNMENT) * _ALIGNMENT
            if length > largest_payload(self.capacity) or size > published or place + size > self.capacity:
                raise RingCorrupted(f"a frame of {length} bytes at {position}, where {published} are published")
            start = place + _FRAME.size
            if _TRAILER.unpack_from(self.data, start + length)[0] != position ^ length:
                raise RingCorrupted(f"the frame at {position} has no end")
            self._next = position + size
            return bytes(self.data[start : start + length]), self._next

    def release(self, position: int) -> None:
        """Free the frame that ``read`` returned with ``position``, and every one before it."""
        self.cells[TAIL] = position
        fence()
        if self.cells[WRITER_WAITING]:
            os.eventfd_write(self._bell, 1)

    def rewind(self) -> None:
        """Read again from the oldest frame that is not released."""
        self._next = self.cells[TAIL]

    def await_frame(self) -> bool:
        """Announce that the reader is about to sleep; False where a frame is there already, and it must not."""
        self.cells[READER_WAITING] = 1
        fence()
        return not self.has_frame

    def awake(self) -> None:
        """Take back ``await_frame``."""
        self.cells[READER_WAITING] = 0
