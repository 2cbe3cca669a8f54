"""The shared memory of one partition under one assignment epoch: its own cells, and its ring.

A memfd made by the supervisor: it has no name, needs no room in /dev/shm, outlives a killed worker or handler, and is
gone with its last descriptor. The first page has the partition's cells; the ring follows.

The lease is the permission to go on. The supervisor moves it forward in every turn of its loop and sets it to 0 to stop
the partition. A worker hands nothing off, and a handler starts no record, once the clock has passed it: so a frozen and
thawed host stands still until its supervisor has proven that it still owns what it works on.
"""

import mmap
import os
from typing import Final

from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.ring import HEAD, IN_FLIGHT, LINE, PAGE, PROCESSED, TAIL, format_ring, ring_bytes

# Written by the supervisor alone.
LEASE: Final = 0 * LINE
"""Boot time in ns until which this partition may be worked on; 0 is stopped."""
# Written by the worker alone.
POSITION: Final = 1 * LINE
"""Next offset to hand off."""
HIGH_WATERMARK: Final = 2 * LINE
LOG_START: Final = 3 * LINE
MESSAGES: Final = 4 * LINE
"""Records handed off under this epoch."""
BYTES: Final = 5 * LINE
"""Key and value bytes handed off under this epoch."""
BROKER_DOWN_SINCE: Final = 6 * LINE
"""Boot time in ns since which the worker has had no broker, or UNKNOWN."""

UNKNOWN: Final = -1


class PartitionMemory:
    """One process's mapping of a partition's shared memory; each process makes its own from the descriptor."""

    def __init__(self, fd: int, epoch: int) -> None:
        """Map ``fd``, and own it."""
        self.fd = fd
        self.epoch = epoch
        view = memoryview(mmap.mmap(fd, 0))
        self.cells = view[:PAGE].cast("q")
        self.ring = view[PAGE:]
        self.ring_cells = self.ring[:PAGE].cast("q")

    @classmethod
    def create(cls, capacity: int, epoch: int, next_offset: int) -> "PartitionMemory":
        """New memory with an empty ring, for records from ``next_offset`` on. The lease has not begun."""
        fd = os.memfd_create("kafkasrcd-partition", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE + ring_bytes(capacity))
        memory = cls(fd, epoch)
        memory.cells[POSITION] = next_offset
        memory.cells[HIGH_WATERMARK] = UNKNOWN
        memory.cells[LOG_START] = UNKNOWN
        memory.cells[BROKER_DOWN_SINCE] = UNKNOWN
        format_ring(memory.ring, capacity, epoch, next_offset)
        return memory

    def extend_lease(self, seconds: float) -> None:
        """Allow work on this partition for ``seconds`` from now."""
        self.cells[LEASE] = boottime_ns() + int(seconds * 1e9)

    def stop(self) -> None:
        """End the lease now: no further record is handed off or started."""
        self.cells[LEASE] = 0

    @property
    def leased(self) -> bool:
        """Whether the partition may be worked on now."""
        return boottime_ns() < self.cells[LEASE]

    @property
    def position(self) -> int:
        """Next offset to hand off."""
        return self.cells[POSITION]

    @property
    def processed(self) -> int:
        """Next offset after the processed prefix.

        Where the ring is empty it is the position, which passes over offsets that hold no record (transaction
        markers, compaction). The position is read first: what was handed off before it is in the ring or processed.
        """
        position = self.cells[POSITION]
        tail = self.ring_cells[TAIL]
        if self.ring_cells[HEAD] == tail:
            return max(position, self.ring_cells[PROCESSED])
        return self.ring_cells[PROCESSED]

    @property
    def ring_processed(self) -> int:
        """Next offset after the last record that a handler finished; trusts nothing else in the ring."""
        return self.ring_cells[PROCESSED]

    @property
    def in_flight(self) -> int | None:
        """The offset in the handler's hands, or None.

        After ``stop``: the handler stores the record's offset here and then looks at the lease, so once some
        microseconds have let both stores reach memory, None means that no record has begun and none will.
        """
        offset = self.ring_cells[IN_FLIGHT]
        return None if offset < self.ring_cells[PROCESSED] else offset

    def handler_ended(self) -> None:
        """The handler process is dead: nothing is in its hands. Its cell is written for it, before it has a successor;
        else a drain would wait for a record that nobody holds."""
        self.ring_cells[IN_FLIGHT] = self.ring_cells[PROCESSED] - 1

    def close(self) -> None:
        """Close the descriptor. The mapping goes with the last view into it, the memory with its last mapping."""
        os.close(self.fd)
