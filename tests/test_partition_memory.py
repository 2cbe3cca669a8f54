"""The cells of a partition: what is in flight, what is processed, and the permission to go on."""

import os
from collections.abc import Iterator

import pytest

from kafkasrcd.workers.partition_memory import POSITION, PartitionMemory
from kafkasrcd.workers.ring import IN_FLIGHT, PAGE, PROCESSED, RingReader, RingWriter


@pytest.fixture
def memory() -> Iterator[PartitionMemory]:
    memory = PartitionMemory.create(4 * PAGE, epoch=3, next_offset=10)
    yield memory
    memory.close()


@pytest.fixture
def bell() -> Iterator[int]:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    yield bell
    os.close(bell)


def test_nothing_has_happened_at_first(memory: PartitionMemory) -> None:
    assert (memory.position, memory.processed, memory.slots[0].in_flight) == (10, 10, None)
    assert not memory.leased


def test_a_lease_begins_and_ends(memory: PartitionMemory) -> None:
    seen: list[bool] = []
    for seconds in (60, -1):
        memory.extend_lease(seconds)
        seen.append(memory.leased)
    memory.extend_lease(60)
    memory.stop()
    assert [*seen, memory.leased] == [True, False, False]


def test_a_pause_is_no_lease_and_is_told_from_other_ends(memory: PartitionMemory) -> None:
    memory.extend_lease(60)
    memory.pause()
    assert (memory.leased, memory.paused) == (False, True)
    memory.stop()
    assert (memory.leased, memory.paused) == (False, False)
    memory.pause()
    memory.extend_lease(60)
    assert (memory.leased, memory.paused) == (True, False)


def test_another_mapping_sees_the_same(memory: PartitionMemory) -> None:
    other = PartitionMemory(os.dup(memory.fd), epoch=3)
    seen: list[int | None] = []
    for cell, value in ((IN_FLIGHT, 10), (PROCESSED, 11)):
        other.slots[0].cells[cell] = value
        seen.append(memory.slots[0].in_flight)
    other.close()
    assert seen == [10, None]


def test_what_a_dead_handler_held_is_in_nobodys_hands(memory: PartitionMemory) -> None:
    memory.slots[0].cells[IN_FLIGHT] = 10
    memory.slots[0].handler_ended()
    assert memory.slots[0].in_flight is None
    assert memory.processed == 10


def test_an_empty_ring_is_processed_up_to_the_position(memory: PartitionMemory, bell: int) -> None:
    """Which passes over offsets that hold no record."""
    writer, reader = RingWriter(memory.slots[0].ring, 3, bell), RingReader(memory.slots[0].ring, 3, bell)
    assert writer.publish([b"records 10 and 11"])
    memory.cells[POSITION] = 12
    assert memory.processed == 10
    memory.slots[0].cells[PROCESSED] = 12
    frame = reader.read()
    assert frame is not None
    reader.release(frame[1])
    memory.cells[POSITION] = 15
    assert memory.processed == 15
    assert memory.slots[0].cells[PROCESSED] == 12
