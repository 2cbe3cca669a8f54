"""Many records at once: which may pass each other, which may not, and what counts as processed meanwhile."""

import asyncio
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from typing import Any

import pytest

from kafkasrcd.message import Message, commit_through
from kafkasrcd.settings import CommitStrategy, OnFailure, Ordering
from kafkasrcd.workers.control import RecordFailed
from kafkasrcd.workers.ring import COMMITTABLE, IN_HANDS, PAGE, PROCESSED, STARTED
from tests.runner_rig import Kind, Partition, Rig, settings_of
from tests.waiting import wait_until

ASYNC = Kind(is_batch=False, is_async=True)
PLAIN = Kind(is_batch=False, is_async=False)


class Gate:
    """A handler whose records wait inside until they are let go; it notes who was in at once."""

    def __init__(self) -> None:
        self.inside: dict[int, asyncio.Event] = {}
        self.began: list[int] = []
        self.finished: list[int] = []
        self.most = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def handle(self, message: Message[Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self.began.append(message.offset)
        self.inside[message.offset] = asyncio.Event()
        self.most = max(self.most, len(self.inside))
        await self.inside[message.offset].wait()
        del self.inside[message.offset]
        self.finished.append(message.offset)

    def let_go(self, *offsets: int) -> None:
        for offset in offsets:
            wait_until(lambda offset=offset: offset in self.inside, 20, f"{offset} in the handler")  # type: ignore[misc]
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self.inside[offset].set)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def rigs() -> Generator[list[Rig]]:
    made: list[Rig] = []
    yield made
    for rig in made:
        rig.close()
    commit_through(None)


def make(rigs: list[Rig], kind: Kind = ASYNC, **settings: Any) -> tuple[Rig, Partition]:
    rig = Rig(kind, settings_of(**settings))
    rigs.append(rig)
    return rig, rig.partition(capacity=64 * PAGE)


def inside(rig: Rig, gate: Gate, *offsets: int) -> None:
    rig.wait(lambda: set(gate.inside) == set(offsets), f"{offsets} in the handler")


def test_keys_pass_each_other_and_themselves_never(rigs: list[Rig], gate: Gate) -> None:
    rig, partition = make(rigs, ordering=Ordering.KEY)
    rig.publish_keys(partition, 0, [b"a", b"a", b"b", b"a", b"c", b"b"])
    rig.start(rig.target(gate.handle))
    inside(rig, gate, 0, 2, 4)
    assert partition.processed == 0
    gate.let_go(2)
    inside(rig, gate, 0, 4, 5)
    gate.let_go(4, 5)
    inside(rig, gate, 0)
    assert partition.processed == 0, "the first record is not finished"
    gate.let_go(0)
    inside(rig, gate, 1)
    assert partition.processed == 1
    gate.let_go(1)
    inside(rig, gate, 3)
    assert partition.processed == 3, "the contiguous prefix"
    gate.let_go(3)
    rig.wait_processed(partition, 6)


def test_a_record_without_a_key_waits_for_none(rigs: list[Rig], gate: Gate) -> None:
    rig, partition = make(rigs, ordering=Ordering.KEY)
    rig.publish_keys(partition, 0, [None, None, b"", b""])
    rig.start(rig.target(gate.handle))
    inside(rig, gate, 0, 1, 2)
    gate.let_go(1, 2, 0, 3)
    rig.wait_processed(partition, 4)


def test_without_an_order_all_are_in_hand_up_to_the_limit(rigs: list[Rig], gate: Gate) -> None:
    rig, partition = make(rigs, ordering=Ordering.NONE, concurrency=3)
    rig.publish_keys(partition, 0, [b"same"] * 8)
    rig.start(rig.target(gate.handle))
    inside(rig, gate, 0, 1, 2)
    gate.let_go(1)
    inside(rig, gate, 0, 2, 3)
    gate.let_go(0, 2, 3, 4, 5, 6, 7)
    rig.wait_processed(partition, 8)
    assert gate.most == 3


def test_in_partition_order_partitions_are_beside_each_other(rigs: list[Rig], gate: Gate) -> None:
    rig, first = make(rigs, ordering=Ordering.PARTITION)
    second = rig.partition()
    for partition, offset in ((first, 0), (second, 100)):
        rig.publish_keys(partition, offset, [b"a", b"b"])
    rig.start(rig.target(gate.handle))
    inside(rig, gate, 0, 100)
    gate.let_go(100)
    inside(rig, gate, 0, 101)
    gate.let_go(0, 1, 101)
    rig.wait_processed(first, 2)


def test_a_retry_holds_up_its_own_key_alone(rigs: list[Rig]) -> None:
    rig, partition = make(rigs, ordering=Ordering.KEY, backoff_ms=60_000, backoff_max_ms=60_000)

    async def handle(message: Message[Any]) -> None:
        rig.calls.append([message.offset])
        if message.offset == 0:
            raise ValueError("not now")

    rig.publish_keys(partition, 0, [b"bad", b"good", b"bad", b"good"])
    rig.start(rig.target(handle))
    rig.wait(lambda: [3] in rig.calls, "the other key")
    assert sorted(rig.calls) == [[0], [1], [3]]
    assert partition.processed == 0
    assert partition.memory.slots[0].in_flight is None, "what waits to be tried again holds up no revocation"


def test_a_failure_stops_its_slot_behind_what_came_before(rigs: list[Rig]) -> None:
    rig, partition = make(rigs, ordering=Ordering.KEY, max_retries=0)

    async def handle(message: Message[Any]) -> None:
        await asyncio.sleep(0)
        if message.offset == 2:
            raise ValueError("never")

    rig.publish_keys(partition, 0, [b"a", b"b", b"bad", b"a"])
    rig.start(rig.target(handle))
    rig.wait(rig.hear, "the failure to be told")
    (told,) = rig.hear()
    assert isinstance(told, RecordFailed)
    assert told.offset == 2
    rig.wait(lambda: partition.memory.slots[0].in_flight is None, "the others to end")
    assert partition.processed == 2


def test_without_a_lease_nothing_begins_and_what_is_in_hand_ends(rigs: list[Rig], gate: Gate) -> None:
    rig, partition = make(rigs, ordering=Ordering.NONE, concurrency=2)
    rig.publish_keys(partition, 0, [None] * 6)
    rig.start(rig.target(gate.handle))
    inside(rig, gate, 0, 1)
    partition.memory.stop()
    assert partition.memory.slots[0].in_flight == 0
    gate.let_go(0)
    rig.wait(lambda: partition.processed == 1, "the first to end")
    assert partition.memory.slots[0].in_flight == 1
    gate.let_go(1)
    rig.wait(lambda: partition.memory.slots[0].in_flight is None, "all to be given back")
    assert gate.began == [0, 1]
    partition.memory.extend_lease(60)
    gate.let_go(2, 3, 4, 5)
    rig.wait_processed(partition, 6)


def test_threads_hold_plain_handlers(rigs: list[Rig]) -> None:
    rig, partition = make(rigs, PLAIN, ordering=Ordering.NONE, threads=4)
    together = threading.Barrier(4, timeout=20)

    def handle(message: Message[Any]) -> None:
        together.wait()
        rig.messages.append(message)

    rig.publish_keys(partition, 0, [b"k"] * 12)
    rig.start(rig.target(handle))
    rig.wait_processed(partition, 12)
    assert sorted(rig.handled) == list(range(12))


def test_what_a_dead_process_had_in_hand_is_handled_one_by_one(rigs: list[Rig], gate: Gate) -> None:
    """So that the next death has one record to blame; what nobody suspects is beside each other again."""
    rig, partition = make(rigs, ordering=Ordering.NONE)
    partition.cells[STARTED] = 3
    rig.publish_keys(partition, 0, [None] * 6)
    rig.start(rig.target(gate.handle))
    for offset in range(3):
        inside(rig, gate, offset)
        slot = partition.memory.slots[0]
        assert slot.in_flight == offset
        assert slot.is_single
        gate.let_go(offset)
    inside(rig, gate, 3, 4, 5)
    assert not partition.memory.slots[0].is_single
    assert partition.cells[IN_HANDS] == 3
    gate.let_go(3, 4, 5)
    rig.wait_processed(partition, 6)


@pytest.mark.parametrize("ordering", Ordering)
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("seed", range(4))
def test_any_interleaving_handles_all_in_order(rigs: list[Rig], ordering: Ordering, threads: int, seed: int) -> None:
    """Random keys, waits, failures, skips and losses of the lease; while it runs, nothing unfinished counts."""
    chance = random.Random(seed)
    count = 400
    kind = ASYNC if threads == 1 else PLAIN
    settings = settings_of(
        OnFailure.SKIP, max_retries=1, backoff_ms=1, ordering=ordering, threads=threads, concurrency=32
    )
    rig = Rig(kind, settings)
    rigs.append(rig)
    partitions = [rig.partition(capacity=64 * PAGE) for _ in range(2)]
    keys = [chance.choice([b"a", b"b", b"c", b"d", b"e", None]) for _ in range(count)]
    waits = [chance.choice([0.0, 0.0, 0.001, 0.004]) for _ in range(count)]
    fails = [chance.choice([0] * 20 + [1, 2]) for _ in range(count)]
    attempts: Counter[tuple[int, int]] = Counter()
    order: dict[object, list[int]] = defaultdict(list)
    done: set[tuple[int, int]] = set()
    lock = threading.Lock()

    def finish(message: Message[Any]) -> None:
        with lock:
            unit = (message.partition, keys[message.offset] if ordering is Ordering.KEY else None)
            attempts[message.partition, message.offset] += 1
            last = attempts[message.partition, message.offset] > fails[message.offset]
            if last or (fails[message.offset] == 2 and attempts[message.partition, message.offset] == 2):
                order[unit].append(message.offset)
                done.add((message.partition, message.offset))
            if not last:
                raise ValueError("told to")

    async def handle(message: Message[Any]) -> None:
        await asyncio.sleep(waits[message.offset])
        finish(message)

    def handle_plain(message: Message[Any]) -> None:
        time.sleep(waits[message.offset])
        finish(message)

    rig.start(rig.target(handle if kind is ASYNC else handle_plain))
    published = dict.fromkeys(range(2), 0)
    while any(number < count for number in published.values()):
        for number, partition in enumerate(partitions):
            some = min(chance.randrange(1, 60), count - published[number])
            if some:
                rig.publish_keys(partition, published[number], keys[published[number] : published[number] + some])
                published[number] += some
        if chance.random() < 0.2:
            partitions[0].memory.stop()
            time.sleep(0.01)
            partitions[0].memory.extend_lease(60)
        for number, partition in enumerate(partitions):
            processed = partition.processed
            with lock:
                assert {(number, offset) for offset in range(processed)} <= done, "an unfinished record counts"
    for partition in partitions:
        rig.wait_processed(partition, count)
    assert all(times == min(fails[offset] + 1, 2) for (_, offset), times in attempts.items())
    assert len(attempts) == 2 * count
    for unit, offsets in order.items():
        if ordering is Ordering.PARTITION or (ordering is Ordering.KEY and unit[1] is not None):  # type: ignore[index]
            assert offsets == sorted(offsets), unit


# ---- manual, at once -------------------------------------------------------------------------------------------------


def test_manual_commits_in_any_order_and_late(rigs: list[Rig], gate: Gate) -> None:
    rig, partition = make(rigs, ordering=Ordering.NONE, strategy=CommitStrategy.MANUAL)
    kept: dict[int, Message[Any]] = {}

    async def handle(message: Message[Any]) -> None:
        kept[message.offset] = message
        await asyncio.sleep(0)

    rig.publish_keys(partition, 0, [None] * 5)
    rig.start(rig.target(handle))
    rig.wait(lambda: partition.processed == 5, "all handled")
    assert partition.cells[COMMITTABLE] == 0
    for offset in (1, 3, 1):
        kept[offset].commit()
    assert partition.cells[COMMITTABLE] == 0
    kept[0].commit()
    assert partition.cells[COMMITTABLE] == 2
    assert not partition.is_empty
    for offset in (4, 2):
        kept[offset].commit()
    assert partition.cells[COMMITTABLE] == 5
    rig.wait(lambda: partition.is_empty, "the space to be given back")


def test_a_successor_begins_at_what_was_committed(rigs: list[Rig]) -> None:
    rig, partition = make(rigs, PLAIN, strategy=CommitStrategy.MANUAL)
    rig.publish_keys(partition, 0, [None] * 4)

    def handle(message: Message[Any]) -> None:
        rig.messages.append(message)
        if message.offset == 0:
            message.commit()

    rig.start(rig.target(handle))
    rig.wait(lambda: partition.processed == 4, "all handled")
    rig.stop()
    assert partition.cells[PROCESSED] == 4
    successor = Rig(PLAIN, rig.settings)
    rigs.append(successor)
    successor.bind(partition)

    def commit(message: Message[Any]) -> None:
        successor.messages.append(message)
        message.commit()

    successor.start(successor.target(commit))
    successor.wait(lambda: partition.cells[COMMITTABLE] == 4, "all committed")
    assert successor.handled == [1, 2, 3]
