"""The ring against a model, against damage, against a side that dies or is overtaken at any step, and between two real
processes."""

import os
import random
import select
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from threading import Lock
from typing import TypeVar
from zlib import crc32

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kafkasrcd.errors import RecordTooLarge, RingCorrupted
from kafkasrcd.workers import ring as ring_module
from kafkasrcd.workers.partition_memory import POSITION, PartitionMemory
from kafkasrcd.workers.ring import (
    CAPACITY,
    EPOCH,
    HEAD,
    MAGIC,
    PAGE,
    PROCESSED,
    TAIL,
    RingReader,
    RingWriter,
    format_ring,
    largest_payload,
    ring_bytes,
)
from tests.stepping import acting_at, die, exit_code_of, forked, killed_at
from tests.waiting import wait_until

A = TypeVar("A")
B = TypeVar("B")

THIS_EPOCH = 7
ALIGNMENT = 64
HEADER = range(32)
TRAILER_BYTES = 8
HANG_SECONDS = 20.0
"""Far longer than any wait here, far shorter than the time limit of a test: a wake-up that is lost shows as a hang."""

# Forked children only touch the ring and are killed or leave by os._exit.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def frame_bytes(payload: int) -> int:
    return -(-(payload + len(HEADER) + TRAILER_BYTES) // ALIGNMENT) * ALIGNMENT


def new_bell() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def rung(bell: int) -> bool:
    """Whether the bell was rung since this was asked last."""
    try:
        os.eventfd_read(bell)
    except BlockingIOError:
        return False
    return True


class Ring:
    """One ring in plain memory with both of its sides; each can be opened anew."""

    def __init__(self, capacity: int = PAGE) -> None:
        self.capacity = capacity
        self.memory = memoryview(bytearray(ring_bytes(capacity)))
        format_ring(self.memory, capacity, THIS_EPOCH, 0)
        self.cells = self.memory[:PAGE].cast("q")
        self.reader_bell = new_bell()
        self.writer_bell = new_bell()
        self.writer = self.open_writer()
        self.reader = self.open_reader()

    def open_writer(self) -> RingWriter:
        self.writer = RingWriter(self.memory, THIS_EPOCH, self.reader_bell)
        return self.writer

    def open_reader(self) -> RingReader:
        self.reader = RingReader(self.memory, THIS_EPOCH, self.writer_bell)
        return self.reader

    def publish(self, payload: bytes) -> bool:
        return self.writer.publish([payload])

    def close(self) -> None:
        os.close(self.reader_bell)
        os.close(self.writer_bell)


@pytest.fixture
def ring() -> Iterator[Ring]:
    opened = Ring()
    yield opened
    opened.close()


def all_frames(reader: RingReader) -> list[bytes]:
    payloads: list[bytes] = []
    while (frame := reader.read()) is not None:
        payloads.append(frame[0])
    return payloads


def frames_in(memory: memoryview) -> list[bytes]:
    """What a reader opened now would find, looked up in a copy."""
    return all_frames(RingReader(memoryview(bytearray(memory)), THIS_EPOCH, -1))


# ---- against a model -------------------------------------------------------------------------------------------------


class RingModel(RuleBasedStateMachine):
    """The model: the list of payloads ever published, how many of them were read, and how many released."""

    def __init__(self) -> None:
        super().__init__()
        self.published: list[bytes] = []
        self.released = 0
        self.read: list[tuple[int, int]] = []
        """Of the reader as opened last, and not released: the frame's number, and the position to release it by."""

    @initialize(pages=st.integers(1, 5))
    def create(self, pages: int) -> None:
        self.ring = Ring(pages * PAGE)

    def teardown(self) -> None:
        if hasattr(self, "ring"):
            self.ring.close()

    @property
    def next(self) -> int:
        return self.read[-1][0] + 1 if self.read else self.released

    @rule(data=st.data(), small=st.booleans(), filling=st.sampled_from([b"\0", b"\xff", b""]))
    def publish(self, data: st.DataObject, small: bool, filling: bytes) -> None:
        length = data.draw(st.integers(0, 200 if small else largest_payload(self.ring.capacity)), label="length")
        payload = filling * length or random.Random(len(self.published)).randbytes(length)
        cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=3), label="cuts"))
        parts = [payload[start:end] for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
        free = self.ring.capacity - self.ring.writer.used
        head = self.ring.cells[HEAD]
        if self.ring.writer.publish(parts):
            self.published.append(payload)
            assert frame_bytes(length) <= free
        else:
            assert self.ring.cells[HEAD] == head
            assert self.released < len(self.published), "an empty ring refuses a payload that fits"
            assert free < 2 * frame_bytes(length), "there is room, wherever the end of the data area is"

    @rule()
    def read_next(self) -> None:
        assert self.ring.reader.has_frame == (self.next < len(self.published))
        frame = self.ring.reader.read()
        if self.next == len(self.published):
            assert frame is None
        else:
            assert frame is not None
            assert frame[0] == self.published[self.next]
            self.read.append((self.next, frame[1]))

    @precondition(lambda self: bool(self.read))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(st.integers(0, len(self.read) - 1), label="released")
        number, position = self.read[chosen]
        self.ring.reader.release(position)
        self.released = number + 1
        del self.read[: chosen + 1]

    @rule()
    def read_and_release_all(self) -> None:
        while self.next < len(self.published):
            self.read_next()
        if self.read:
            self.ring.reader.release(self.read[-1][1])
            self.released = len(self.published)
            self.read.clear()

    @rule()
    def restart_writer(self) -> None:
        self.ring.open_writer()

    @rule()
    def restart_reader(self) -> None:
        self.ring.open_reader()
        self.read.clear()

    @invariant()
    def holds_what_is_not_released(self) -> None:
        if hasattr(self, "ring"):
            assert frames_in(self.ring.memory) == self.published[self.released :]
            assert 0 <= self.ring.reader.used <= self.ring.capacity


def test_any_interleaving_agrees_with_the_model() -> None:
    run_state_machine_as_test(
        RingModel,
        settings=hypothesis_settings(
            max_examples=200,
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.parametrize("pages", [1, 2, 3, 7])
@pytest.mark.parametrize("from_the_largest", [0, 1, 63, 64])
def test_the_largest_payload_goes_through_an_empty_ring_from_every_place(pages: int, from_the_largest: int) -> None:
    ring = Ring(pages * PAGE)
    payload = random.Random(pages).randbytes(largest_payload(ring.capacity) - from_the_largest)
    for place in range(0, ring.capacity, ALIGNMENT):
        ring.cells[HEAD] = ring.cells[TAIL] = 3 * ring.capacity + place
        ring.open_writer()
        assert all_frames(ring.open_reader()) == []
        assert ring.publish(payload), f"refused at {place}"
        assert all_frames(ring.reader) == [payload]
    ring.close()


def test_a_full_ring_refuses_and_overwrites_nothing(ring: Ring) -> None:
    published: list[bytes] = []
    for number in count():
        payload = number.to_bytes(2, "little") * 100
        if not ring.publish(payload):
            break
        published.append(payload)
    before = bytes(ring.memory)
    for length in (200, 300, largest_payload(ring.capacity)):
        assert not ring.publish(bytes(length))
    assert bytes(ring.memory) == before
    assert all_frames(ring.reader) == published
    assert not ring.publish(b"x" * 200), "what is read is not released"
    assert all_frames(ring.open_reader()) == published


def test_a_payload_that_never_fits_is_refused_whatever_is_in_the_ring(ring: Ring) -> None:
    too_long = largest_payload(ring.capacity) + 1
    with pytest.raises(RecordTooLarge, match=f"a frame of {too_long} bytes.* carries {too_long - 1}"):
        ring.writer.publish([bytes(too_long - 1), b"x"])
    assert ring.publish(b"first")
    with pytest.raises(RecordTooLarge):
        ring.publish(bytes(too_long))
    assert all_frames(ring.reader) == [b"first"]


@pytest.mark.parametrize("capacity", [PAGE + 1, PAGE - 64, 100])
def test_a_capacity_is_whole_pages(capacity: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        format_ring(memoryview(bytearray(ring_bytes(capacity))), capacity, THIS_EPOCH, 0)


# ---- damage ----------------------------------------------------------------------------------------------------------


def damages(memory: memoryview, places: range) -> Iterator[tuple[int, int]]:
    """Change each byte at ``places`` to each other value, one at a time; the byte is right again afterwards."""
    for place in places:
        right = memory[place]
        for difference in range(1, 256):
            memory[place] = right ^ difference
            yield place, difference
        memory[place] = right


@pytest.mark.parametrize("payload", [b"", bytes(8), bytes(300), b"\xff" * 64, random.Random(1).randbytes(500)], ids=len)
@pytest.mark.parametrize("laps", [0, 1, 5])
def test_a_changed_byte_in_header_or_trailer_is_never_read(payload: bytes, laps: int) -> None:
    ring = Ring(2 * PAGE)
    for _ in range(laps * ring.capacity // frame_bytes(100)):  # leaves frames of earlier laps in the data area
        assert ring.publish(bytes(100))
        frame = ring.reader.read()
        assert frame is not None
        ring.reader.release(frame[1])
    assert ring.publish(payload)
    assert ring.publish(b"after it")
    place = ring.cells[TAIL] % ring.capacity
    start = PAGE + (0 if place + frame_bytes(len(payload)) > ring.capacity else place)  # behind a pad
    trailer = start + len(HEADER) + len(payload)
    for places in (range(start, start + len(HEADER)), range(trailer, trailer + TRAILER_BYTES)):
        for place, difference in damages(ring.memory, places):
            reader = ring.open_reader()
            for _ in range(2):
                with pytest.raises(RingCorrupted):
                    pytest.fail(f"byte {place - start} changed by {difference:#x}: read {reader.read()!r}")
    assert all_frames(ring.open_reader()) == [payload, b"after it"]
    ring.close()


def test_a_changed_byte_in_a_pad_is_never_read(ring: Ring) -> None:
    payload = bytes(1000)
    while ring.publish(payload):
        pass
    frame = ring.reader.read()
    frame = ring.reader.read() if frame is not None else None
    assert frame is not None
    ring.reader.release(frame[1])
    last = bytes(1500)
    pad = ring.cells[HEAD]
    assert ring.publish(last)
    assert ring.cells[HEAD] > ring.capacity, "the frame is behind a pad"
    kept = frames_in(ring.memory)
    assert kept[-1] == last
    for place, difference in damages(ring.memory, range(PAGE + pad, PAGE + pad + len(HEADER))):
        reader = ring.open_reader()
        assert [frame[0] for frame in (reader.read() for _ in kept[:-1]) if frame is not None] == kept[:-1]
        with pytest.raises(RingCorrupted):
            pytest.fail(f"byte {place - PAGE - pad} changed by {difference:#x}: read {reader.read()!r}")
    assert all_frames(ring.open_reader()) == kept


@pytest.mark.parametrize("change", [-ALIGNMENT, ALIGNMENT, 1 << 40])
def test_a_pad_of_another_length_is_never_followed(ring: Ring, change: int) -> None:
    """Sound in itself, but not up to the end of the data area."""
    before = ring.capacity - 5 * ALIGNMENT
    ring.cells[HEAD] = ring.cells[TAIL] = before
    ring.open_reader()
    assert ring.publish(bytes(500))
    cells = ring.memory[PAGE + before : PAGE + before + len(HEADER)].cast("Q")
    assert cells[3] == 5 * ALIGNMENT, "it is a pad"
    cells[0] ^= cells[3] ^ (cells[3] + change)
    cells[3] += change
    for _ in range(2):
        with pytest.raises(RingCorrupted, match="a pad of"):
            pytest.fail(f"read {ring.reader.read()!r}")


def test_a_pad_past_the_head_is_never_followed(ring: Ring) -> None:
    before = ring.capacity - 5 * ALIGNMENT
    ring.cells[HEAD] = ring.cells[TAIL] = before
    ring.open_reader()
    assert ring.publish(bytes(500))
    ring.cells[HEAD] = before + ALIGNMENT
    with pytest.raises(RingCorrupted, match="a pad of"):
        pytest.fail(f"read {ring.reader.read()!r}")


def test_a_frame_of_another_epoch_is_never_read(ring: Ring) -> None:
    """As where two epochs share the memory: a writer that was not reaped, say."""
    ring.cells[EPOCH] = THIS_EPOCH - 1
    stale = RingWriter(ring.memory, THIS_EPOCH - 1, ring.reader_bell)
    ring.cells[EPOCH] = THIS_EPOCH
    assert stale.publish([b"stale"])
    with pytest.raises(RingCorrupted, match=f"epoch {THIS_EPOCH - 1}; this epoch is {THIS_EPOCH}"):
        ring.reader.read()


@pytest.mark.parametrize("side", [RingWriter, RingReader])
@pytest.mark.parametrize(
    ("cell", "value", "says"),
    [
        (MAGIC, 0, "no ring"),
        (MAGIC, ring_module.RING_MAGIC + 1, "no ring"),
        (CAPACITY, 2 * PAGE, "a ring of 8192 bytes in 8192 bytes"),
        (CAPACITY, 0, "a ring of 0 bytes in 8192 bytes"),
        (CAPACITY, -PAGE, "a ring of -4096 bytes"),
        (EPOCH, THIS_EPOCH + 1, f"epoch {THIS_EPOCH + 1}, not {THIS_EPOCH}"),
    ],
)
def test_neither_side_opens_what_is_not_its_ring(
    ring: Ring, side: type[RingWriter | RingReader], cell: int, value: int, says: str
) -> None:
    ring.cells[cell] = value
    with pytest.raises(RingCorrupted, match=says):
        side(ring.memory, THIS_EPOCH, -1)


@pytest.mark.parametrize(
    ("head", "tail"),
    [
        (0, 64),  # released more than was published
        (64, 128),
        (PAGE + 64, 0),  # published more than there is room for
        (2 * PAGE, 0),
        (2 * PAGE + 64, 64),
        (1 << 62, 0),
        (-64, 0),
        (65, 0),  # not where a frame can be
        (64, 1),
        (65, 1),
        (0, -64),
    ],
)
def test_contradictory_head_and_tail_return_nothing(ring: Ring, head: int, tail: int) -> None:
    assert ring.publish(b"one")
    assert ring.publish(b"two")
    ring.cells[HEAD] = head
    ring.cells[TAIL] = tail
    for read in (ring.reader.read, ring.open_reader().read):
        for _ in range(2):
            with pytest.raises(RingCorrupted):
                pytest.fail(f"read {read()!r}")
    if (head, tail) != (0, -64):  # the writer has no frame to look at
        with pytest.raises(RingCorrupted):
            pytest.fail(f"published: {ring.publish(b'three')}")


@pytest.mark.parametrize("change", [-2 * ALIGNMENT, -ALIGNMENT, ALIGNMENT, 10 * ALIGNMENT])
def test_a_head_that_is_at_no_frame_s_end_is_noticed_there(ring: Ring, change: int) -> None:
    for payload in (b"a" * 300, b"b" * 300):
        assert ring.publish(payload)
    ring.cells[HEAD] += change
    for payload in [b"a" * 300] if change < 0 else [b"a" * 300, b"b" * 300]:
        frame = ring.reader.read()
        assert frame is not None
        assert frame[0] == payload
    for _ in range(2):
        with pytest.raises(RingCorrupted):
            pytest.fail(f"read {ring.reader.read()!r}")


# ---- overtaken at every step -----------------------------------------------------------------------------------------
#
# One side stops between two of its instructions, the other does all that it does, the first goes on: every place where
# the scheduler could put a process to sleep.


def fill(ring: Ring, payload: bytes) -> int:
    """How many times ``payload`` goes into ``ring``."""
    for number in count():
        if not ring.publish(payload):
            return number
    raise AssertionError("unreachable")


def goes_to_sleep(writer: RingWriter, payload: bytes) -> bool:
    """What a writer does that needs room: whether it sleeps until its bell rings."""
    if writer.publish([payload]):
        return False
    writer.await_room()
    if writer.publish([payload]):
        writer.awake()
        return False
    return True


def overtaken_everywhere(
    prepare: Callable[[Ring], None], first: Callable[[Ring], A], other: Callable[[Ring], B]
) -> Iterator[tuple[Ring, A, B]]:
    """For each step of ``first``, on a prepared ring of its own: the ring after it, and what both returned."""
    for step in count():
        ring = Ring()
        prepare(ring)
        others: list[B] = []

        def act(ring: Ring = ring, others: list[B] = others) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ring_module, "_barrier", Lock())  # the other side is another process, and has its own
                others.append(other(ring))

        with acting_at(step, [ring_module], act) as acted:
            result = first(ring)
        if not acted:
            assert step > 10, "nothing was stepped through"
            ring.close()
            return
        yield ring, result, others[0]
        ring.close()


def nothing(_: Ring) -> None:
    """No preparation."""


def test_a_reader_that_goes_to_sleep_at_any_step_of_a_publish_is_woken() -> None:
    slept = set[bool]()
    for ring, published, sleeps in overtaken_everywhere(
        nothing, lambda ring: ring.publish(b"frame"), lambda ring: ring.reader.await_frame()
    ):
        assert published
        assert rung(ring.reader_bell) or not sleeps
        assert all_frames(ring.reader) == [b"frame"]
        slept.add(sleeps)
    assert slept == {True, False}


def test_a_publish_at_any_step_of_a_reader_going_to_sleep_wakes_it() -> None:
    slept = set[bool]()
    for ring, sleeps, published in overtaken_everywhere(
        nothing, lambda ring: ring.reader.await_frame(), lambda ring: ring.publish(b"frame")
    ):
        assert published
        assert rung(ring.reader_bell) or not sleeps
        assert all_frames(ring.reader) == [b"frame"]
        slept.add(sleeps)
    assert slept == {True, False}


PAYLOAD = b"p" * 500


def full_and_one_read(ring: Ring) -> None:
    fill(ring, PAYLOAD)
    assert ring.reader.read() is not None


def release_one(ring: Ring) -> None:
    ring.reader.release(frame_bytes(len(PAYLOAD)))


def release_and_publish(ring: Ring) -> bool:
    release_one(ring)
    return ring.publish(PAYLOAD)


def test_a_writer_that_goes_to_sleep_at_any_step_of_a_release_is_woken() -> None:
    slept = set[bool]()
    for ring, _, sleeps in overtaken_everywhere(
        full_and_one_read, release_one, lambda ring: goes_to_sleep(ring.writer, PAYLOAD)
    ):
        assert rung(ring.writer_bell) or not sleeps
        assert len(all_frames(ring.open_reader())) == (ring.capacity // frame_bytes(len(PAYLOAD)) - bool(sleeps))
        slept.add(sleeps)
    assert slept == {True, False}


def test_a_release_at_any_step_of_a_writer_going_to_sleep_wakes_it() -> None:
    slept = set[bool]()
    for ring, sleeps, _ in overtaken_everywhere(
        full_and_one_read, lambda ring: goes_to_sleep(ring.writer, PAYLOAD), release_one
    ):
        assert rung(ring.writer_bell) or not sleeps
        slept.add(sleeps)
    assert slept == {True, False}


def test_a_read_at_any_step_of_a_publish_finds_all_of_the_frame_or_nothing() -> None:
    found = set[tuple[bytes, ...]]()
    for ring, published, read in overtaken_everywhere(
        full_and_one_read,
        release_and_publish,
        lambda ring: tuple(all_frames(ring.reader)),
    ):
        assert published
        waiting = ring.capacity // frame_bytes(len(PAYLOAD)) - 1
        assert read in ((PAYLOAD,) * waiting, (PAYLOAD,) * (waiting + 1))
        assert all_frames(ring.open_reader()) == [PAYLOAD] * (waiting + 1)
        found.add(read)
    assert len(found) == 2


def test_a_publish_at_any_step_of_reading_and_releasing_disturbs_neither() -> None:
    kept = [b"1" * 1000, b"2" * 1000, b"3" * 1500]  # the next one goes around the end

    def read_and_release(ring: Ring) -> list[bytes]:
        payloads: list[bytes] = []
        while (frame := ring.reader.read()) is not None:
            payloads.append(frame[0])
            ring.reader.release(frame[1])
        return payloads

    def prepare(ring: Ring) -> None:
        for payload in kept:
            assert ring.publish(payload)

    last = b"4" * 1000
    outcomes = set[bool]()
    for ring, read, published in overtaken_everywhere(prepare, read_and_release, lambda ring: ring.publish(last)):
        left = all_frames(ring.reader)
        assert (read, left) in [(kept, []), (kept, [last]), ([*kept, last], [])]
        assert published == (read + left != kept)
        outcomes.add(published and not left)
    assert outcomes == {True, False}


# ---- killed at every step --------------------------------------------------------------------------------------------


class Shared:
    """A ring in shared memory whose sides live in processes: every opening is a mapping of its own."""

    def __init__(self, capacity: int = PAGE) -> None:
        self.memory = PartitionMemory.create(capacity, THIS_EPOCH, 0)
        self.reader_bell = new_bell()
        self.writer_bell = new_bell()

    def _map(self) -> memoryview:
        mapped = PartitionMemory(os.dup(self.memory.fd), THIS_EPOCH)
        mapped.close()  # the mapping stays for as long as the view
        return mapped.slots[0].ring

    def open_writer(self) -> RingWriter:
        return RingWriter(self._map(), THIS_EPOCH, self.reader_bell)

    def open_reader(self) -> RingReader:
        return RingReader(self._map(), THIS_EPOCH, self.writer_bell)

    def close(self) -> None:
        self.memory.close()
        os.close(self.reader_bell)
        os.close(self.writer_bell)


def write_all(shared: Shared, *payloads: bytes) -> list[bytes]:
    writer = shared.open_writer()
    for payload in payloads:
        assert writer.publish([payload])
    return list(payloads)


def before_the_end(shared: Shared) -> list[bytes]:
    """The next frame does not fit before the end, and is put at the start."""
    kept = write_all(shared, b"1" * 1000, b"2" * 1000, b"3" * 1500)
    reader = shared.open_reader()
    for _ in range(2):
        frame = reader.read()
        assert frame is not None
        reader.release(frame[1])
    return kept[2:]


def empty(_: Shared) -> list[bytes]:
    return []


def with_frames(shared: Shared) -> list[bytes]:
    return write_all(shared, b"earlier", b"frames")


@pytest.mark.parametrize("prepare", [empty, with_frames, before_the_end])
def test_a_writer_killed_at_any_step(prepare: Callable[[Shared], list[bytes]]) -> None:
    payload = b"z" * 1200
    seen: list[bool] = []
    for step in count():
        shared = Shared()
        kept = prepare(shared)
        reader = shared.open_reader()
        assert all_frames(reader) == kept
        assert reader.await_frame(), "it sleeps"

        def publish(shared: Shared = shared) -> None:
            assert shared.open_writer().publish([payload[:500], b"", payload[500:]])

        killed = killed_at(step, [ring_module], publish)
        visible = reader.has_frame
        successor = shared.open_writer()
        assert rung(shared.reader_bell) or not visible, "it sleeps on, with a frame there"
        found = all_frames(reader)
        assert found == [payload] * visible
        assert all_frames(shared.open_reader()) == kept + found
        # As a worker's successor: what may not have been handed off is, a second time.
        reader.release(successor.cells[HEAD])
        for each in (payload, b"next"):
            assert successor.publish([each])
        assert all_frames(reader) == [payload, b"next"]
        shared.close()
        seen.append(visible)
        if not killed:
            break
    assert len(seen) > 100
    assert seen == sorted(seen), "once there, always there"
    assert seen[0] is False
    assert seen[-1] is True


def test_a_writer_killed_at_any_step_of_waiting_for_room() -> None:
    for step in count():
        shared = Shared()
        writer = shared.open_writer()
        while writer.publish([PAYLOAD]):
            pass
        before = all_frames(shared.open_reader())

        def wait_for_room(shared: Shared = shared) -> None:
            assert goes_to_sleep(shared.open_writer(), PAYLOAD)

        killed = killed_at(step, [ring_module], wait_for_room)
        successor = shared.open_writer()
        assert not successor.publish([PAYLOAD])
        reader = shared.open_reader()
        assert all_frames(reader) == before
        reader.release(frame_bytes(len(PAYLOAD)))
        assert successor.publish([PAYLOAD])
        assert all_frames(reader) == [PAYLOAD]
        shared.close()
        if not killed:
            assert step > 100
            return


def test_a_reader_killed_at_any_step() -> None:
    payloads = [bytes([number]) * 500 for number in range(PAGE // frame_bytes(500))]
    last = b"after all"
    gone: list[int] = []
    for step in count():
        shared = Shared()
        writer = shared.open_writer()
        for payload in payloads:
            assert writer.publish([payload])
        assert goes_to_sleep(writer, PAYLOAD)

        def read_two(shared: Shared = shared) -> None:
            reader = shared.open_reader()
            for number in range(2):
                frame = reader.read()
                assert frame is not None
                assert frame[0] == payloads[number]
                reader.release(frame[1])
            assert not reader.await_frame()

        killed = killed_at(step, [ring_module], read_two)
        released = shared.memory.slots[0].cells[TAIL] // frame_bytes(500)
        successor = shared.open_reader()
        assert rung(shared.writer_bell) or not released, "the writer sleeps on, with room there"
        assert all_frames(successor) == payloads[released:]
        assert writer.publish([PAYLOAD]) == bool(released)
        successor.release(writer.cells[HEAD])
        assert writer.publish([last])
        assert all_frames(shared.open_reader()) == [last]
        shared.close()
        gone.append(released)
        if not killed:
            break
    assert len(gone) > 100
    assert gone == sorted(gone)
    assert set(gone) == {0, 1, 2}


# ---- two processes ---------------------------------------------------------------------------------------------------

_NOISE = random.Random(0).randbytes(1 << 16)
_LONGEST = 1500


def numbered(number: int) -> bytes:
    """The payload of that number: itself, some bytes, and a checksum."""
    start = number * 40503 % (len(_NOISE) - _LONGEST)
    length = (number * 2654435761 >> 7) % (_LONGEST if number % 16 == 0 else 100)
    body = number.to_bytes(8, "little") + _NOISE[start : start + length]
    return body + crc32(body).to_bytes(4, "little")


def number_of(payload: bytes) -> int:
    """Its number, or AssertionError where it is not whole."""
    assert crc32(payload[:-4]) == int.from_bytes(payload[-4:], "little")
    number = int.from_bytes(payload[:8], "little")
    assert payload == numbered(number)
    return number


def sleep_until(bell: int) -> None:
    """Until ``bell`` is rung; a time-out is a lost wake-up."""
    poller = select.poll()
    poller.register(bell, select.POLLIN)
    assert poller.poll(HANG_SECONDS * 1000), "nobody rang the bell"
    rung(bell)


def write(shared: Shared, total: int) -> None:
    """As a worker: from its predecessor's position on, sleeping where there is no room."""
    cells = shared.memory.cells
    writer = shared.open_writer()
    for number in range(cells[POSITION], total):
        payload = [numbered(number)]
        while not writer.publish(payload):
            writer.await_room()
            if writer.publish(payload):
                break
            sleep_until(shared.writer_bell)
            writer.awake()
        writer.awake()
        cells[POSITION] = number + 1


def handle(shared: Shared, total: int) -> None:
    """As a handler: each number once and in order, sleeping where there is none."""
    cells = shared.memory.slots[0].cells
    reader = shared.open_reader()
    while cells[PROCESSED] < total:
        frame = reader.read()
        if frame is None:
            if reader.await_frame():
                sleep_until(shared.reader_bell)
            reader.awake()
            continue
        number = number_of(frame[0])
        processed = cells[PROCESSED]
        assert number <= processed, f"{processed} to {number - 1} are missing"
        if number == processed:
            cells[PROCESSED] = number + 1
        reader.release(frame[1])


@contextmanager
def children() -> Generator[dict[int, Callable[[], None]]]:
    """Child processes by their ids, with what each runs; those still there at the end are killed."""
    running: dict[int, Callable[[], None]] = {}
    try:
        yield running
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)
            exit_code_of(child)


def ended(running: dict[int, Callable[[], None]]) -> None:
    """Wait for all; each ends by itself, and well."""
    while running:
        child, status = os.waitpid(next(iter(running)), 0)
        del running[child]
        assert status == 0


def test_no_wake_up_is_lost() -> None:
    """A ring of few frames: both sides sleep thousands of times."""
    total = 20_000
    shared = Shared()
    with children() as running:
        for run in (lambda: write(shared, total), lambda: handle(shared, total)):
            running[forked(run)] = run
        ended(running)
    assert shared.memory.slots[0].cells[PROCESSED] == total
    assert shared.memory.processed == total
    shared.close()


def test_sides_killed_and_replaced_under_load_lose_nothing() -> None:
    total = 200_000
    shared = Shared(16 * PAGE)
    chance = random.Random(4)
    processed = shared.memory.slots[0].cells
    with children() as running:

        def start(run: Callable[[], None]) -> None:
            running[forked(run)] = run

        def has_processed(number: int) -> bool:
            return processed[PROCESSED] >= number

        start(lambda: write(shared, total))
        start(lambda: handle(shared, total))
        # By progress and not by time, so that there are as many on any machine. The last is early enough for the writer
        # to be at work: the ring holds less than what is left.
        for moment in sorted(chance.sample(range(total * 9 // 10), 12)):
            wait_until(partial(has_processed, moment), HANG_SECONDS, f"{moment} frames", interval_seconds=0.001)
            victim = chance.choice(list(running))
            os.kill(victim, signal.SIGKILL)
            assert exit_code_of(victim) == -signal.SIGKILL, "it had ended before"
            start(running.pop(victim))
        ended(running)
    assert processed[PROCESSED] == total
    assert frames_in(shared.memory.slots[0].ring) == []
    shared.close()


def test_dying_ends_the_process() -> None:
    """What the tests above stand on."""
    assert exit_code_of(forked(die)) == -signal.SIGKILL
