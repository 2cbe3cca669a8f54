"""The shared memory of one partition under one assignment epoch: its own cells, and its rings.

A memfd made by the supervisor: it has no name, needs no room in /dev/shm, outlives a killed worker or handler, and is
gone with its last descriptor. The first page has the partition's cells; the rings follow, one for each slot: one for
the whole partition, or, where its records go to several handler processes, one for each of these.

The lease is the permission to go on. The supervisor moves it forward in every turn of its loop and sets it to 0 to stop
the partition. A worker hands nothing off, and a handler starts no record, once the clock has passed it: so a frozen and
thawed host stands still until its supervisor has proven that it still owns what it works on. A paused partition has
another value there, which no clock is before either, and by which they know that they may sleep until they are woken.
"""

import mmap
import os
from collections.abc import Sequence
from typing import Final

from kafkasrcd.settings import CommitStrategy
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.ring import (
    BURYING,
    CALLED_AT,
    COMMITTABLE,
    FAILURES,
    HEAD,
    IN_FLIGHT,
    IN_HANDS,
    KEPT_OPEN,
    LETTER,
    LINE,
    PAGE,
    PROCESSED,
    TAIL,
    UNSAVED,
    format_ring,
    ring_bytes,
)

# Written by the supervisor alone.
LEASE: Final = 0 * LINE
"""Boot time in ns until which this partition may be worked on; 0 is stopped, PAUSED is paused."""
PAUSED: Final = -1
# Written by the worker alone.
POSITION: Final = 1 * LINE
"""Next offset to hand off."""
HIGH_WATERMARK: Final = 2 * LINE
LOG_START: Final = 3 * LINE
MESSAGES: Final = 4 * LINE
"""Records handed off under this epoch, each counted once."""
BYTES: Final = 5 * LINE
"""Key and value bytes handed off under this epoch."""
MESSAGES_BEFORE: Final = 9 * LINE
"""MESSAGES before POSITION: what was handed off behind it is handed off again, should the worker be killed now."""
BYTES_BEFORE: Final = 10 * LINE
BROKER_DOWN_SINCE: Final = 6 * LINE
"""Boot time in ns since which the worker has had no broker, or UNKNOWN."""

PREPARING: Final = 8 * LINE
"""Offset of the record that the worker prepares, or UNKNOWN; should it end the worker, or never end, the supervisor
reads it here."""

# Written once, when it is made.
SLOTS: Final = 7 * LINE

UNKNOWN: Final = -1

KEEPS_CELL: Final = {
    CommitStrategy.AUTO: PROCESSED,
    CommitStrategy.PERIODIC: PROCESSED,
    CommitStrategy.MANUAL: COMMITTABLE,
    CommitStrategy.ON_CHECKPOINT: COMMITTABLE,
}
"""The cell of a ring up to which records are done for good: a successor of the handler process begins there."""


class SlotMemory:
    """One slot's ring, and what its cells say. ``offset`` cells are written by the handler process alone."""

    def __init__(self, ring: memoryview) -> None:
        self.ring = ring
        self.cells = ring[:PAGE].cast("q")

    def done(self, cell: int, position: int) -> int:
        """Next offset after those that ``cell`` counts; ``position``, read before, where the ring is empty.

        Which passes over offsets that hold no record for this slot. What was handed off before ``position`` is in the
        ring or done.
        """
        tail = self.cells[TAIL]
        if self.cells[HEAD] == tail and not self.cells[KEPT_OPEN]:
            return max(position, self.cells[cell])
        return self.cells[cell]

    @property
    def in_flight(self) -> int | None:
        """The (oldest) offset in the handler's hands, or None.

        After ``stop``: the handler stores the record's offset here and then looks at the lease, so once some
        microseconds have let both stores reach memory, None means that no record has begun and none will. PROCESSED is
        read first: while something is in its hands, the handler moves IN_FLIGHT ahead of it, and PROCESSED after.
        """
        processed = self.cells[PROCESSED]
        offset = self.cells[IN_FLIGHT]
        return None if offset < processed else offset

    @property
    def oldest_call(self) -> int | None:
        """A number that stays while the oldest call of the handler goes on; None where there is none."""
        offset = self.in_flight
        if offset is None or self.cells[BURYING]:
            return None
        # Where many are in its hands, the oldest record that is not done may be one that waits to be tried again.
        # Where one is, a further attempt is another call.
        return self.cells[CALLED_AT] or offset + self.cells[FAILURES]

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is in the handler's hands or in its open transaction."""
        return self.in_flight is None and not self.cells[UNSAVED]

    @property
    def is_single(self) -> bool:
        """Whether what is in flight is one record (or batch), which can be blamed for what it did to its process."""
        return self.cells[IN_HANDS] <= 1

    def handler_ended(self) -> None:
        """The handler process is dead: nothing is in its hands. Its cells are written for it, before it has a
        successor; else a drain would wait for a record that nobody holds."""
        self.cells[IN_FLIGHT] = self.cells[PROCESSED] - 1
        self.cells[IN_HANDS] = 0
        self.cells[CALLED_AT] = 0
        self.cells[BURYING] = 0
        self.cells[LETTER] = 0
        self.cells[UNSAVED] = 0


class PartitionMemory:
    """One process's mapping of a partition's shared memory; each process makes its own from the descriptor."""

    def __init__(self, fd: int, epoch: int) -> None:
        """Map ``fd``, and own it."""
        self.fd = fd
        self.epoch = epoch
        view = memoryview(mmap.mmap(fd, 0))
        self.cells = view[:PAGE].cast("q")
        size = (len(view) - PAGE) // max(1, self.cells[SLOTS])
        self.slots = [SlotMemory(view[start : start + size]) for start in range(PAGE, len(view), size)]

    @classmethod
    def create(cls, capacity: int, epoch: int, next_offset: int, starts: Sequence[int] = ()) -> "PartitionMemory":
        """New memory for records from ``next_offset`` on, with an empty ring of ``capacity`` bytes for each slot.

        ``starts``: for each slot, the offset before which it has nothing to do. The lease has not begun.
        """
        starts = starts or (next_offset,)
        fd = os.memfd_create("kafkasrcd-partition", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE + len(starts) * ring_bytes(capacity))
        os.pwrite(fd, len(starts).to_bytes(8, "little"), 8 * SLOTS)
        memory = cls(fd, epoch)
        memory.cells[POSITION] = next_offset
        memory.cells[HIGH_WATERMARK] = UNKNOWN
        memory.cells[LOG_START] = UNKNOWN
        memory.cells[BROKER_DOWN_SINCE] = UNKNOWN
        memory.cells[PREPARING] = UNKNOWN
        for slot, start in zip(memory.slots, starts, strict=True):
            format_ring(slot.ring, capacity, epoch, max(start, next_offset))
        return memory

    def extend_lease(self, seconds: float) -> None:
        """Allow work on this partition for ``seconds`` from now."""
        self.cells[LEASE] = boottime_ns() + int(seconds * 1e9)

    def stop(self) -> None:
        """End the lease now: no further record is handed off or started."""
        self.cells[LEASE] = 0

    def pause(self) -> None:
        """As ``stop``, and for long: nobody need look at the lease again before the bells are rung."""
        self.cells[LEASE] = PAUSED

    @property
    def paused(self) -> bool:
        """Whether the lease has ended by ``pause``."""
        return self.cells[LEASE] == PAUSED

    @property
    def leased(self) -> bool:
        """Whether the partition may be worked on now."""
        return boottime_ns() < self.cells[LEASE]

    @property
    def position(self) -> int:
        """Next offset to hand off."""
        return self.cells[POSITION]

    def done(self, cell: int) -> list[int]:
        """For each slot, the next offset after those that ``cell`` counts. The position is read first."""
        position = self.cells[POSITION]
        return [slot.done(cell, position) for slot in self.slots]

    @property
    def processed(self) -> int:
        """Next offset after the processed prefix."""
        return min(self.done(PROCESSED))

    @property
    def is_empty(self) -> bool:
        """Whether all that was handed off is done for good."""
        return all(slot.cells[HEAD] == slot.cells[TAIL] for slot in self.slots)

    @property
    def is_quiet(self) -> bool:
        """After ``stop``: whether nothing is in a handler's hands or in its open transaction."""
        return all(slot.is_quiet for slot in self.slots)

    def close(self) -> None:
        """Close the descriptor. The mapping goes with the last view into it, the memory with its last mapping."""
        os.close(self.fd)
