"""The runners over a real ring, without Kafka: what is handled, how often, and what a handler's death leaves."""

import asyncio
import gc
import os
import random
import re
import select
import time
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kafkasrcd.message import Message, encode_headers
from kafkasrcd.settings import OnFailure, Settings
from kafkasrcd.workers import batch, concurrent_runner, cursor, handler_bindings, ring, sync_runner
from kafkasrcd.workers.commits import Commits
from kafkasrcd.workers.control import RecordFailed, RingBroken
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.dead_letter_sink import DeadLetterSink
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.frame import Columns, RecordError, encode_frame
from kafkasrcd.workers.ring import PAGE, READER_WAITING
from tests.runner_rig import KINDS, LONG_SECONDS, Act, Kind, Partition, Rig, json_of, settings_of
from tests.stepping import killed_at

PLAIN_SINGLE, ASYNC_SINGLE, PLAIN_BATCH, ASYNC_BATCH = KINDS
QUIET_SECONDS = 0.06
"""Enough for a runner that must do nothing to do it: three looks at the lease."""

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig() -> Generator[MakeRig]:
    made: list[Rig] = []

    def make(kind: Kind, settings: Settings | None = None, act: Act | None = None) -> Rig:
        made.append(Rig(kind, settings or settings_of(), act))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


def failing(*offsets: int, times: int = 10**9, error: type[Exception] = ValueError) -> Act:
    """An ``act`` that raises for ``offsets``, so many times for each."""
    left = dict.fromkeys(offsets, times)

    def act(message: Message[Any]) -> None:
        if left.get(message.offset, 0) > 0:
            left[message.offset] -= 1
            raise error(f"no luck with {message.offset}")

    return act


def attempts_at(rig: Rig, offset: int) -> int:
    return sum(offset in call for call in rig.calls)


# ---- what is handled -------------------------------------------------------------------------------------------------


def test_every_record_is_handled_once_and_in_order(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    partition = rig.partition(next_offset=5)
    rig.start()
    offsets = [*range(5, 105), *range(200, 300, 7)]
    for start in range(0, len(offsets), 10):
        rig.publish_values(partition, offsets[start : start + 10])
    rig.wait_processed(partition, offsets[-1] + 1)
    assert rig.handled == offsets
    assert [message.payload for message in rig.messages] == [{"number": offset} for offset in offsets]
    assert partition.counts == (len(offsets), 0, 0)
    assert partition.memory.slots[0].in_flight is None
    assert rig.hear() == []


def test_batches_are_of_the_size_that_is_set(make_rig: MakeRig) -> None:
    for kind in (PLAIN_BATCH, ASYNC_BATCH):
        rig = make_rig(kind, settings_of(batch=4))
        partition = rig.partition()
        for start in range(0, 12, 3):
            rig.publish_values(partition, range(start, start + 3))
        rig.start()
        rig.wait_processed(partition, 12)
        assert rig.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("kind", [PLAIN_BATCH, ASYNC_BATCH], ids=str)
def test_a_batch_waits_to_fill_and_no_longer(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(batch=6, wait_ms=150))
    partition = rig.partition()
    rig.start()
    before = time.monotonic()
    rig.publish_values(partition, range(3))
    rig.wait_processed(partition, 3)
    assert time.monotonic() - before >= 0.15
    assert rig.calls == [[0, 1, 2]]


def test_a_message_has_every_field(make_rig: MakeRig, kind: Kind) -> None:
    pairs = [("trace", b"1"), ("kind", None), ("trace", b"2")]
    rig = make_rig(kind)
    partition = rig.partition("audit", next_offset=70)
    at = datetime(2024, 2, 29, 12, 30, 0, 250_000, tzinfo=UTC)
    rig.publish(
        partition,
        Columns(
            [70, 71, 72],
            [int(at.timestamp() * 1000), -1, 0],
            [b'{"a": 1}', None, b"[]"],
            [b"key", None, b""],
            [encode_headers(pairs), None, encode_headers([])],
        ),
    )
    rig.publish(partition, Columns([73], [1], [b"1"]))
    rig.start()
    rig.wait_processed(partition, 74)
    full, tombstone, odd, bare = rig.messages
    assert (full.topic, full.partition, full.offset, full.key) == ("audit", 0, 70, b"key")
    assert full.payload == {"a": 1}
    assert full.timestamp == at
    assert full.timestamp is not None
    assert full.timestamp.tzinfo is UTC
    assert full.headers.items_all() == tuple(pairs)
    assert full.headers["trace"] == b"2"
    assert full.headers.get_all("trace") == [b"1", b"2"]
    assert (tombstone.payload, tombstone.key, tombstone.timestamp, dict(tombstone.headers)) == (None, None, None, {})
    assert (odd.payload, odd.key, odd.timestamp) == ([], b"", datetime(1970, 1, 1, tzinfo=UTC))
    assert (bare.payload, bare.key, len(bare.headers)) == (1, None, 0)


def test_each_topic_has_its_handler(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    orders, audit = rig.partition("orders"), rig.partition("audit")
    rig.start()
    for partition in (orders, audit):
        rig.publish_values(partition, range(3))
    for partition in (orders, audit):
        rig.wait_processed(partition, 3)
    assert sorted((message.topic, message.partition, message.offset) for message in rig.messages) == [
        *(("audit", 1, offset) for offset in range(3)),
        *(("orders", 0, offset) for offset in range(3)),
    ]


# ---- waking up -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sleeps_until_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at the ring once a second: what is not woken stays asleep."""
    for module in (sync_runner, concurrent_runner):
        monkeypatch.setattr(module, "IDLE_MS", 120_000.0)


@pytest.mark.usefixtures("sleeps_until_woken")
def test_a_sleeping_runner_is_woken_by_every_partition(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    partitions = [rig.partition() for _ in range(3)]
    rig.start()
    for turn in range(20):
        for partition in partitions:
            if turn % 2:
                rig.wait(partial(partition.cells.__getitem__, READER_WAITING), "the runner to sleep")
            rig.publish_values(partition, [turn])
            rig.wait_processed(partition, turn + 1)


@pytest.mark.usefixtures("sleeps_until_woken")
def test_a_sleeping_runner_hears_its_supervisor(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    rig.start()
    time.sleep(QUIET_SECONDS)
    late = rig.partition()
    rig.publish_values(late, range(3))
    rig.wait_processed(late, 3)
    rig.stop()


@pytest.mark.usefixtures("sleeps_until_woken")
def test_a_worker_that_waits_for_room_is_woken(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(batch=3))
    partition = rig.partition(capacity=PAGE)
    rig.start()
    chance = random.Random(8)
    total = 2_000
    poller = select.poll()
    poller.register(partition.bell, select.POLLIN)
    for offset in range(total):
        parts = encode_frame(Columns([offset], [-1], [b'"%s"' % (b"x" * chance.randrange(1200))])).parts
        while not partition.writer.publish(parts):
            partition.writer.await_room()
            if partition.writer.publish(parts):
                break
            assert poller.poll(LONG_SECONDS * 1000), f"nobody rang for the worker at {offset}"
            os.eventfd_read(partition.bell)
        partition.writer.awake()
    rig.wait_processed(partition, total)
    assert rig.handled == list(range(total))


@pytest.mark.usefixtures("sleeps_until_woken")
@pytest.mark.parametrize("kind", [PLAIN_BATCH, ASYNC_BATCH], ids=str)
def test_a_batch_that_fills_while_it_waits_is_due_at_once(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(batch=6, wait_ms=60_000))
    partition = rig.partition()
    rig.start()
    rig.publish_values(partition, range(3))
    time.sleep(QUIET_SECONDS)  # it has gathered them
    rig.publish_values(partition, range(3, 6))
    rig.wait_processed(partition, 6)
    assert rig.calls == [[0, 1, 2, 3, 4, 5]]


# ---- a handler that raises -------------------------------------------------------------------------------------------


def test_a_record_that_keeps_failing_stops_its_partition(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(OnFailure.STOP, max_retries=2), failing(3))
    partition = rig.partition()
    rig.start()
    rig.publish_values(partition, range(6))
    rig.wait(rig.hear, "the partition to stop")
    time.sleep(QUIET_SECONDS)
    (told,) = rig.hear()
    assert isinstance(told, RecordFailed)
    assert (told.binding, told.offset) == (partition.binding, 3)
    assert told.error == "orders:handle raised ValueError: no luck with 3"
    assert rig.handled[-3:] == [0, 1, 2]
    assert partition.processed == 3
    assert partition.memory.slots[0].in_flight is None
    assert not partition.is_empty, "what was not processed stays"
    assert [call for call in rig.calls if call == [3]] == [[3]] * 3, "alone, and as often as is set"
    if kind.is_batch:
        assert rig.calls == [[0, 1, 2, 3, 4, 5]] * 3 + [[0, 1, 2], [3, 4, 5]] + [[3]] * 3, "halved, and halved again"
        assert partition.counts == (3, 7, 0)
    else:
        assert rig.calls == [[0], [1], [2]] + [[3]] * 3
        assert partition.counts == (3, 3, 0)


def test_a_record_that_keeps_failing_is_skipped_and_counted(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(OnFailure.SKIP, max_retries=1), failing(0, 3, 5))
    partition = rig.partition()
    rig.start()
    rig.publish_values(partition, range(6))
    rig.wait_processed(partition, 6)
    assert rig.hear() == []
    assert partition.counts == (3, 11 if kind.is_batch else 6, 3), "a batch: twice, then three parts of it, then alone"
    assert [offset for offset, _ in groupby(rig.handled)] == [1, 2, 4], (
        "4 twice, where a part of a batch failed behind it"
    )
    assert partition.memory.slots[0].in_flight is None
    assert partition.memory.processed == partition.memory.position


def test_without_retries_one_failure_is_the_last(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(OnFailure.SKIP, max_retries=0, batch=1), failing(1))
    partition = rig.partition()
    rig.start()
    rig.publish_values(partition, range(3))
    rig.wait_processed(partition, 3)
    assert attempts_at(rig, 1) == 1


def test_a_record_that_succeeds_in_the_end_is_no_failure(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(max_retries=3), failing(2, times=2))
    partition = rig.partition()
    rig.start()
    rig.publish_values(partition, range(4))
    rig.wait_processed(partition, 4)
    assert rig.hear() == []
    assert partition.counts == (4, 2, 0)
    assert rig.calls[-1][-1] == 3
    assert attempts_at(rig, 2) == 3


def test_every_record_has_all_of_its_attempts(make_rig: MakeRig, kind: Kind) -> None:
    """Also after one that needed several, and took so long that its turn was over."""
    fail = failing(0, 1, 2, times=2)

    def act(message: Message[Any]) -> None:
        fail(message)
        time.sleep(0.015)

    rig = make_rig(kind, settings_of(max_retries=2, batch=1), act)
    partition = rig.partition()
    rig.publish_values(partition, range(4))
    rig.start()
    rig.wait(lambda: partition.processed == 4 or rig.hear(), "all to be processed")
    assert rig.hear() == []
    assert rig.calls == [[0]] * 3 + [[1]] * 3 + [[2]] * 3 + [[3]]


def test_an_attempt_waits_twice_as_long_as_the_one_before(make_rig: MakeRig) -> None:
    rig = make_rig(PLAIN_SINGLE, settings_of(max_retries=50, backoff_ms=1_000, backoff_max_ms=5_000))
    partition = rig.partition()
    descriptors = [os.dup(partition.memory.fd), os.dup(partition.bell)]
    opened = PartitionCursor(
        rig.settings,
        rig.target(),
        partition.bind,
        descriptors,
        Commits(DeadLetterSink(rig.settings, "")),
        EventLog("test"),
    )
    waits: list[float] = []
    for _ in range(40):
        backoff_ns = opened.raised([7], ValueError("again"))
        assert backoff_ns is not None
        waits.append(backoff_ns / 1e9)
        base = min(2.0 ** (len(waits) - 1), 5.0)
        assert base / 2 <= waits[-1] <= base
    assert len({round(wait, 3) for wait in waits[3:]}) > 20, "at random, so that partitions do not come back together"
    opened.close()


def test_a_backoff_is_waited_out(make_rig: MakeRig, kind: Kind) -> None:
    times: list[float] = []
    fail = failing(1)

    def act(message: Message[Any]) -> None:
        if message.offset == 1:
            times.append(time.monotonic())
        fail(message)

    rig = make_rig(kind, settings_of(OnFailure.SKIP, max_retries=2, backoff_ms=60, batch=1), act)
    partition = rig.partition()
    rig.start()
    rig.publish_values(partition, range(3))
    rig.wait_processed(partition, 3)
    first, second, third = times
    assert second - first >= 0.03
    assert third - second >= 0.06


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every turn of every partition, and with every look at the supervisor's messages."""
    counted: list[None] = []

    def count_calls(owner: object, name: str) -> None:
        real = vars(owner)[name]

        def counting(*arguments: Any) -> Any:
            counted.append(None)
            return real(*arguments)

        monkeypatch.setattr(owner, name, counting)

    count_calls(sync_runner, "_turn")
    count_calls(vars(concurrent_runner)["_Slot"], "turn")
    count_calls(handler_bindings.HandlerBindings, "receive")
    return counted


def test_a_long_backoff_is_slept_through(make_rig: MakeRig, kind: Kind, looks: list[None]) -> None:
    rig = make_rig(kind, settings_of(max_retries=1, backoff_ms=20_000, backoff_max_ms=20_000, batch=1), failing(0))
    partition = rig.partition()
    for offset in range(3):
        rig.publish_values(partition, [offset])
    rig.start()
    rig.wait(lambda: partition.counts[1] == 1, "the first attempt")
    looks.clear()
    time.sleep(0.25)
    assert len(looks) < 10, "it looks again and again instead of sleeping"


def test_without_a_lease_it_looks_now_and_then(make_rig: MakeRig, kind: Kind, looks: list[None]) -> None:
    rig = make_rig(kind)
    partition = rig.partition(leased=False)
    rig.publish_values(partition, range(3))
    rig.start()
    time.sleep(0.25)
    assert 3 <= len(looks) < 60, "every 20 ms"


def test_without_work_it_sleeps(make_rig: MakeRig, kind: Kind, looks: list[None]) -> None:
    rig = make_rig(kind)
    partition = rig.partition()
    rig.start()
    for offset in range(3):
        rig.publish_values(partition, [offset])
        rig.wait_processed(partition, offset + 1)
    rig.wait(lambda: partition.cells[READER_WAITING], "the runner to sleep")
    time.sleep(0.02)
    looks.clear()
    time.sleep(0.25)
    assert len(looks) < 10


def test_a_runner_at_work_is_not_rung_for(make_rig: MakeRig, kind: Kind) -> None:
    """A bell for every frame would be a system call for every frame."""
    waiting: list[int] = []
    rig = make_rig(kind)
    partition = rig.partition()

    def act(_: Message[Any]) -> None:
        waiting.append(partition.cells[READER_WAITING])

    rig.act = act
    rig.start()
    for offset in range(50):
        rig.publish_values(partition, [offset])
        if offset % 5 == 0:
            rig.wait(partial(partition.cells.__getitem__, READER_WAITING), "the runner to sleep")
    rig.wait_processed(partition, 50)
    assert waiting == [0] * 50


def test_a_frame_that_comes_as_it_goes_to_sleep_keeps_it_awake(
    make_rig: MakeRig, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[int] = []
    late = [0, 1, 2]
    rig = make_rig(kind)
    partition = rig.partition()
    real = ring.RingReader.await_frame

    def overtaken(reader: ring.RingReader) -> bool:
        if late:
            rig.publish_values(partition, [late.pop(0)])
        return real(reader)

    def act(_: Message[Any]) -> None:
        waiting.append(partition.cells[READER_WAITING])

    monkeypatch.setattr(ring.RingReader, "await_frame", overtaken)
    rig.act = act
    rig.start()
    rig.wait_processed(partition, 3)
    assert waiting == [0, 0, 0], "each frame would ring a bell"


def test_a_backoff_holds_up_nothing_else(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(max_retries=1, backoff_ms=60_000, backoff_max_ms=60_000))
    failing_one, other = rig.partition("failing"), rig.partition("other")

    def act(message: Message[Any]) -> None:
        if message.topic == "failing":
            raise ValueError("not now")

    rig.act = act
    rig.start()
    rig.publish_values(failing_one, range(3))
    rig.wait(lambda: failing_one.counts[1] == 1, "the first attempt")
    rig.publish_values(other, range(5))
    rig.wait_processed(other, 5, 5.0)
    assert failing_one.processed == 0
    assert failing_one.memory.slots[0].in_flight is None


def test_a_partition_that_stands_still_holds_up_nothing_else(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(max_retries=0))
    failing_one, other = rig.partition("failing"), rig.partition("other")

    def act(message: Message[Any]) -> None:
        if message.topic == "failing":
            raise ValueError("never")

    rig.act = act
    rig.start()
    rig.publish_values(failing_one, [0])
    rig.wait(rig.hear, "the partition to stop")
    for offset in range(20):
        rig.publish_values(other, [offset])
        rig.publish_values(failing_one, [offset + 1])
    rig.wait_processed(other, 20)
    assert len(rig.hear()) == 1


@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
def test_a_handler_that_ends_the_process_ends_it_with_its_record_in_flight(
    make_rig: MakeRig, kind: Kind, ending: type[BaseException]
) -> None:
    """As a crash, which the supervisor counts against the record."""

    def act(message: Message[Any]) -> None:
        if message.offset == 2:
            raise ending

    rig = make_rig(kind, settings_of(batch=2), act)
    partition = rig.partition()
    rig.publish_values(partition, range(4))
    with pytest.raises(ending):
        rig.run()
    assert partition.processed == 2
    assert partition.memory.slots[0].in_flight == 2


class Speechless(Exception):
    """One whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError("no such file: \udcff.csv"), r"raised OSError: no such file: \\udcff.csv"),
        (Speechless(), r"raised .*Speechless: <exception str\(\) failed>"),
        (ValueError("two\nlines"), r"raised ValueError: two\nlines"),
        (ValueError(), r"raised ValueError$"),
    ],
    ids=["a file name that is no text", "no text at all", "two lines", "empty"],
)
def test_whatever_a_handler_raises_can_be_told(make_rig: MakeRig, kind: Kind, error: Exception, says: str) -> None:
    """Otherwise the process would end instead of the partition, and again and again: nothing is in flight to blame."""

    def act(_: Message[Any]) -> None:
        raise error

    rig = make_rig(kind, settings_of(max_retries=1), act)
    partition = rig.partition()
    rig.publish_values(partition, [0])
    rig.start()
    rig.wait(rig.hear, "the partition to stop")
    (told,) = rig.hear()
    assert isinstance(told, RecordFailed)
    assert re.search(says, told.error)


def test_whatever_a_decoder_raises_can_be_told(make_rig: MakeRig, kind: Kind) -> None:
    def decode(_: Any) -> Any:
        raise ValueError("not for \udcff")

    rig = make_rig(kind)
    partition = rig.partition()
    rig.publish_values(partition, [0])
    rig.start(msgspec.structs.replace(rig.target(), decode=decode))
    rig.wait(rig.hear, "the partition to stop")
    (told,) = rig.hear()
    assert isinstance(told, RecordFailed)
    assert told.error == r"cannot be deserialized: ValueError: not for \udcff"


def test_a_cancellation_from_within_is_a_failure_of_the_record(make_rig: MakeRig) -> None:
    """As where what the handler waits for was cancelled by someone else: its partition must not go silent."""

    async def one(message: Message[Any]) -> None:
        rig.calls.append([message.offset])
        if message.offset == 1:
            waiting = asyncio.get_running_loop().create_future()
            waiting.cancel()
            await waiting
        rig.messages.append(message)

    async def many(messages: list[Message[Any]]) -> None:
        for message in messages:
            await one(message)

    for kind, function in ((ASYNC_SINGLE, one), (ASYNC_BATCH, many)):
        rig = make_rig(kind, settings_of(OnFailure.SKIP, max_retries=1, batch=1))
        partition = rig.partition()
        rig.publish_values(partition, range(3))
        rig.start(rig.target(function))
        rig.wait_processed(partition, 3)
        assert rig.calls == [[0], [1], [1], [2]]
        assert partition.counts == (2, 2, 1)


def test_a_coroutine_that_nobody_awaits_is_a_failure_of_the_record(make_rig: MakeRig) -> None:
    """As from a plain function around an async one: without a check, all would count as processed and nothing run."""

    async def real(_: object) -> None:
        raise AssertionError("never runs")

    def plain(argument: Any) -> object:
        return real(argument)

    for kind in (PLAIN_SINGLE, PLAIN_BATCH):
        for runner_is_async in (False, True):
            rig = make_rig(Kind(kind.is_batch, runner_is_async), settings_of(max_retries=1))
            target = Rig.target(make_rig(kind), plain)
            partition = rig.partition()
            rig.publish_values(partition, [0])
            rig.start(target)
            rig.wait(rig.hear, "the partition to stop")
            (told,) = rig.hear()
            assert isinstance(told, RecordFailed)
            assert "coroutine" in told.error
            assert "async def" in told.error
            assert partition.processed == 0
            rig.stop()


def test_what_a_plain_handler_returns_is_ignored(make_rig: MakeRig) -> None:
    rig = make_rig(PLAIN_SINGLE)
    partition = rig.partition()
    rig.publish_values(partition, range(3))

    def handle(message: Message[Any]) -> object:
        return [message]

    rig.start(rig.target(handle))
    rig.wait_processed(partition, 3)


def test_a_defect_ends_the_runner_and_not_one_partition_in_silence(
    make_rig: MakeRig, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(kind)
    partition = rig.partition()

    def broken(_: PartitionCursor) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(PartitionCursor, "put_back", broken)
    monkeypatch.setattr(PartitionCursor, "release_done", broken)
    rig.publish_values(partition, range(3))
    rig.start()
    deadline = time.monotonic() + LONG_SECONDS
    while rig.error is None and time.monotonic() < deadline:
        time.sleep(0.005)
    with pytest.raises(RuntimeError, match="a defect"):
        rig.stop()


# ---- records that cannot be deserialized -----------------------------------------------------------------------------


def test_an_undecodable_record_stops_its_partition_without_retries(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    partition = rig.partition()
    rig.publish_values(partition, range(5), at_2=b"{not json")
    rig.start()
    rig.wait(rig.hear, "the partition to stop")
    time.sleep(QUIET_SECONDS)
    (told,) = rig.hear()
    assert isinstance(told, RecordFailed)
    assert told.offset == 2
    assert told.error.startswith("cannot be deserialized: JSONDecodeError: ")
    assert rig.handled == [0, 1], "what came before it is handled first"
    assert partition.processed == 2
    assert partition.memory.slots[0].in_flight is None
    assert partition.counts == (2, 1, 0)


def test_undecodable_records_are_skipped_and_counted(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(OnFailure.SKIP))
    partition = rig.partition()
    rig.publish_values(partition, range(6), at_0=b"", at_2=b"x", at_3=b"\xff", at_5=b"{")
    rig.start()
    rig.wait_processed(partition, 6)
    assert rig.handled == [1, 4]
    assert partition.counts == (2, 4, 4)
    assert partition.memory.slots[0].in_flight is None


def test_a_record_that_the_worker_refused_is_told_with_its_reason(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    partition = rig.partition()
    errors = [RecordError(1, "RecordTooLarge", "a record of 9 bytes")]
    rig.publish(partition, Columns(range(3), [0] * 3, [json_of(0), None, json_of(2)], errors=errors))
    rig.start()
    rig.wait(rig.hear, "the partition to stop")
    (told,) = rig.hear()
    assert isinstance(told, RecordFailed)
    assert (told.offset, told.error) == (1, "cannot be deserialized: a record of 9 bytes")
    assert rig.handled == [0]


def test_a_tombstone_is_no_failure(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    partition = rig.partition()
    rig.publish_values(partition, range(3), at_0=None, at_2=None)
    rig.start()
    rig.wait_processed(partition, 3)
    assert [message.payload for message in rig.messages] == [None, {"number": 1}, None]
    assert partition.counts == (3, 0, 0)


def test_one_bad_record_of_many_costs_the_others_nothing(make_rig: MakeRig) -> None:
    for kind in (PLAIN_BATCH, ASYNC_BATCH):
        rig = make_rig(kind, settings_of(OnFailure.SKIP, max_retries=1, batch=10), failing(4))
        partition = rig.partition()
        rig.publish_values(partition, range(30))
        rig.start()
        rig.wait_processed(partition, 30)
        halves = [[0, 1, 2, 3, 4], [0, 1], [2, 3, 4], [2], [3, 4], [3], [4], [4], [5, 6, 7, 8, 9]]
        assert rig.calls == [[*range(10)], [*range(10)], *halves, [*range(10, 20)], [*range(20, 30)]]
        assert partition.counts == (29, 7, 1)


# ---- the lease -------------------------------------------------------------------------------------------------------


def test_nothing_is_handled_before_the_lease_begins(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    partition = rig.partition(leased=False)
    rig.publish_values(partition, range(3))
    rig.start()
    time.sleep(QUIET_SECONDS)
    assert rig.calls == []
    assert partition.memory.slots[0].in_flight is None
    partition.memory.extend_lease(60)
    rig.wait_processed(partition, 3)


@pytest.mark.parametrize("how", ["stopped", "expired"])
def test_the_end_of_the_lease_is_before_the_next_record(make_rig: MakeRig, kind: Kind, how: str) -> None:
    rig = make_rig(kind, settings_of(batch=3))
    partition = rig.partition()

    def act(message: Message[Any]) -> None:
        assert partition.memory.slots[0].in_flight == message.offset - (message.offset % 3 if kind.is_batch else 0)
        if message.offset == 4 and len(rig.messages) == 4:
            if how == "stopped":
                partition.memory.stop()
            else:
                partition.memory.extend_lease(0.001)
                time.sleep(0.002)

    rig.act = act
    rig.publish_values(partition, range(9))
    rig.start()
    last = 5 if kind.is_batch else 4
    rig.wait(lambda: partition.processed == last + 1, "the record in hand to be finished")
    time.sleep(QUIET_SECONDS)
    assert rig.handled == list(range(last + 1))
    assert partition.memory.slots[0].in_flight is None
    assert partition.memory.processed == last + 1
    partition.memory.extend_lease(60)
    rig.wait_processed(partition, 9)
    assert rig.handled == list(range(9)), "each once"


def test_a_lease_that_ends_while_records_are_gathered(make_rig: MakeRig) -> None:
    for kind in (PLAIN_BATCH, ASYNC_BATCH):
        rig = make_rig(kind)
        partition = rig.partition()

        def decode(value: Any, partition: Partition = partition) -> Any:
            partition.memory.stop()
            return value

        rig.publish_values(partition, range(3))
        rig.start(msgspec.structs.replace(rig.target(), decode=decode))
        memory = partition.memory
        rig.wait(lambda: not memory.leased, "the lease to end")  # noqa: B023 - waited for right here
        time.sleep(QUIET_SECONDS)
        assert rig.calls == []
        assert partition.memory.slots[0].in_flight is None
        partition.memory.extend_lease(60)
        rig.wait_processed(partition, 3)
        assert rig.calls == [[0, 1, 2]]


def test_a_lease_that_ends_during_a_backoff_ends_it(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(max_retries=5, backoff_ms=30, batch=1), failing(0, times=1))
    partition = rig.partition()
    rig.publish_values(partition, range(2))
    rig.start()
    rig.wait(lambda: partition.counts[1] == 1, "the first attempt")
    partition.memory.stop()
    time.sleep(0.03 + QUIET_SECONDS)
    assert rig.calls == [[0]]
    assert partition.memory.slots[0].in_flight is None
    partition.memory.extend_lease(60)
    rig.wait_processed(partition, 2)
    assert rig.calls == [[0], [0], [1]]


def test_a_lease_of_one_partition_is_no_other_s(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    stopped, other = rig.partition(leased=False), rig.partition()
    rig.start()
    for partition in (stopped, other):
        rig.publish_values(partition, range(5))
    rig.wait_processed(other, 5)
    assert stopped.processed == 0


# ---- records handed off twice ----------------------------------------------------------------------------------------


def test_records_handed_off_twice_are_passed_over(make_rig: MakeRig, kind: Kind) -> None:
    """A worker's successor begins with what its predecessor may not have handed off."""
    rig = make_rig(kind, settings_of(batch=4))
    partition = rig.partition()
    for offsets in ([0, 1, 2], [0, 1, 2], [2, 3, 4, 5], [3, 4], [5, 9], [5, 9, 10]):
        rig.publish_values(partition, offsets)
    rig.start()
    rig.wait_processed(partition, 11)
    assert rig.handled == [0, 1, 2, 3, 4, 5, 9, 10]
    assert partition.counts == (8, 0, 0)


@pytest.mark.parametrize("kind", [PLAIN_BATCH, ASYNC_BATCH], ids=str)
def test_they_are_passed_over_while_a_batch_waits_to_fill(make_rig: MakeRig, kind: Kind) -> None:
    in_flight: list[int | None] = []
    rig = make_rig(kind, settings_of(batch=100, wait_ms=80))
    partition = rig.partition()

    def act(_: Message[Any]) -> None:
        in_flight.append(partition.memory.slots[0].in_flight)

    rig.act = act
    rig.publish_values(partition, range(5))
    rig.start()
    rig.publish_values(partition, range(5))
    rig.publish_values(partition, range(3, 7))
    rig.wait_processed(partition, 7)
    assert rig.handled == list(range(7))
    assert in_flight == [0] * 7


def test_a_successor_passes_over_what_was_processed(make_rig: MakeRig, kind: Kind) -> None:
    first = make_rig(kind, settings_of(batch=2))
    partition = first.partition()
    first.publish_values(partition, range(5))
    first.publish_values(partition, range(5, 10))

    def act(message: Message[Any]) -> None:
        if message.offset == 3:
            partition.memory.stop()

    first.act = act
    first.start()
    first.wait(lambda: partition.processed == 4, "half of a frame")
    first.stop()
    partition.memory.extend_lease(60)
    second = make_rig(kind)
    second.bind(partition)
    second.start()
    second.wait_processed(partition, 10)
    assert first.handled == [0, 1, 2, 3]
    assert second.handled == [4, 5, 6, 7, 8, 9]


# ---- fairness --------------------------------------------------------------------------------------------------------


def test_a_slow_partition_does_not_starve_another(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(batch=5))
    slow, fast = rig.partition("slow"), rig.partition("fast")
    slow_before_fast_ended: list[int] = []

    def note(messages: list[Message[Any]]) -> None:
        rig.messages.extend(messages)
        if messages[0].topic == "fast" and messages[-1].offset == 49:
            slow_before_fast_ended.append(sum(message.topic == "slow" for message in rig.messages))

    def handle(argument: Any) -> None:
        messages: list[Message[Any]] = argument if kind.is_batch else [argument]
        if messages[0].topic == "slow":
            time.sleep(0.012)
        note(messages)

    async def handle_async(argument: Any) -> None:
        messages: list[Message[Any]] = argument if kind.is_batch else [argument]
        if messages[0].topic == "slow":
            await asyncio.sleep(0.012)
        note(messages)

    for partition in (slow, fast):
        rig.publish_values(partition, range(50))
    rig.publish_values(slow, range(50, 300))
    rig.start(rig.target(handle_async if kind.is_async else handle))
    rig.wait_processed(fast, 50)
    # Plain batches take turns, one and one; the turn of single records is 10 ms: one of the slow, all of the fast.
    assert slow_before_fast_ended[0] <= (55 if kind.is_batch else 10)
    assert slow.processed < 300
    slow.memory.stop()


def test_async_handlers_that_wait_do_so_together(make_rig: MakeRig) -> None:
    rig = make_rig(ASYNC_SINGLE)
    running: set[str] = set()
    together = 0

    async def handle(message: Message[Any]) -> None:
        nonlocal together
        assert message.topic not in running, "one record at a time in each partition"
        running.add(message.topic)
        await asyncio.sleep(0.005)
        together = max(together, len(running))
        running.discard(message.topic)
        rig.messages.append(message)

    partitions = [rig.partition(f"topic-{number}") for number in range(4)]
    for partition in partitions:
        rig.publish_values(partition, range(10))
    rig.start(rig.target(handle))
    for partition in partitions:
        rig.wait_processed(partition, 10)
    assert together == 4


# ---- rings that cannot be read ---------------------------------------------------------------------------------------


def test_a_damaged_ring_is_told_once_and_left_alone(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind, settings_of(batch=1))
    damaged, other = rig.partition(), rig.partition()
    rig.publish_values(damaged, [0])
    second = ring.PAGE + damaged.cells[ring.HEAD]
    rig.publish_values(damaged, [1])
    damaged.memory.slots[0].ring[second + 8] ^= 1
    rig.start()
    rig.wait(rig.hear, "the ring to be told of")
    for offset in range(5):
        rig.publish_values(other, [offset])
    rig.wait_processed(other, 5)
    time.sleep(QUIET_SECONDS)
    (told,) = rig.hear()
    assert isinstance(told, RingBroken)
    assert told.binding == damaged.binding
    assert damaged.processed == 1
    assert damaged.memory.slots[0].in_flight is None


def test_a_damaged_frame_is_told_likewise(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    partition = rig.partition()
    rig.publish_values(partition, range(3))
    partition.memory.slots[0].ring[PAGE + 32 + 10] ^= 0x40
    rig.start()
    rig.wait(rig.hear, "the ring to be told of")
    (told,) = rig.hear()
    assert isinstance(told, RingBroken)
    assert rig.calls == []
    assert partition.processed == 0


def descriptors() -> int:
    gc.collect()  # what tests before have left to the collector
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:kafkasrcd-partition")


def test_a_ring_of_another_epoch_is_told_and_leaves_nothing_open(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    rig.start()
    other = rig.partition()
    rig.publish_values(other, [0])
    rig.wait_processed(other, 1)
    stale = rig.partition()
    rig.publish_values(stale, [0])
    rig.wait_processed(stale, 1)
    before = descriptors()
    for number in range(1, 6):
        wrong = msgspec.structs.replace(stale.bind, binding=50 + number, assignment_epoch=99)
        rig.supervisor.send(wrong, (stale.memory.fd, stale.bell))
    rig.wait(lambda: len(rig.hear()) == 5, "the refusals")
    assert [told.binding for told in rig.hear() if isinstance(told, RingBroken)] == [51, 52, 53, 54, 55]
    assert descriptors() == before


def test_an_unbound_partition_leaves_nothing_open(make_rig: MakeRig, kind: Kind) -> None:
    rig = make_rig(kind)
    rig.start()
    other = rig.partition()
    rig.publish_values(other, [0])
    rig.wait_processed(other, 1)
    partition = rig.partition()
    rig.publish_values(partition, range(3))
    rig.wait_processed(partition, 3)
    open_before, mapped_before = descriptors(), mappings()
    rig.unbind(partition)
    rig.publish_values(other, [1])
    rig.wait_processed(other, 2)
    rig.wait(lambda: mappings() == mapped_before - 1, "its memory to be unmapped")
    # Its memory, its worker's bell, and the one that a Python mapping keeps for itself.
    assert descriptors() == open_before - 3
    rig.publish_values(partition, [3])
    time.sleep(QUIET_SECONDS)
    assert partition.processed == 3, "it is not looked at again"
    rig.bind(partition)
    rig.wait_processed(partition, 4)


# ---- a handler process that dies -------------------------------------------------------------------------------------


def dying_partition(rig: Rig) -> tuple[Partition, int]:
    """A partition with good and bad records in two frames, and the read end of a pipe that hears of each record."""
    heard, said = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    rig.descriptors.append(said)
    partition = rig.partition()
    rig.publish_values(partition, range(3))
    rig.publish_values(partition, range(3, 6), at_4=b"bad")

    def act(message: Message[Any]) -> None:
        os.write(said, bytes([message.offset]))
        if message.offset == 5:
            rig.exit()

    rig.act = act
    return partition, heard


def resume(successor: Rig, partition: Partition) -> None:
    """Handle and release what is left, and end."""

    def act(message: Message[Any]) -> None:
        if message.offset == 5:
            successor.exit()

    successor.act = act
    successor.bind(partition)
    if partition.processed < 6:
        successor.run()
    else:
        successor.start()
        successor.wait_processed(partition, 6)
        successor.stop()


def test_a_handler_process_killed_at_any_line_loses_nothing(kind: Kind) -> None:
    """At any line of those that decide; test_ring has each instruction of the ring."""
    modules = [sync_runner, concurrent_runner, batch, cursor, handler_bindings]
    settings = settings_of(OnFailure.SKIP, batch=2)
    good = [0, 1, 2, 3, 5]
    blamed: list[int | None] = []
    repeated = 0
    for step in count():
        rig = Rig(kind, settings)
        partition, heard = dying_partition(rig)
        killed = killed_at(step, modules, rig.run, lines=True)
        try:
            first = list(os.read(heard, 100))
        except BlockingIOError:
            first = []
        processed, in_flight = partition.processed, partition.memory.slots[0].in_flight
        blamed.append(in_flight)
        successor = Rig(kind, settings)
        resume(successor, partition)
        second = successor.handled
        assert first == good[: len(first)], "in order, each once"
        assert second == [offset for offset in good if offset >= processed], "it resumes after the last processed"
        twice = [offset for offset in first if offset >= processed]
        assert first + second[len(twice) :] == good, "every record, by one or the other"
        assert len(twice) <= (2 if kind.is_batch else 1)
        if twice:
            assert in_flight == twice[0], "who is repeated is who was in flight"
        repeated += bool(twice)
        assert partition.processed == 6
        assert partition.memory.slots[0].in_flight is None
        successor.close()
        rig.close()
        os.close(heard)
        del rig, partition, successor
        if len(blamed) % 20 == 0:
            gc.collect()  # a mapping holds a descriptor until it goes, and these refer to each other
        if not killed:
            break
    assert len(blamed) > 100
    assert repeated > 3
    assert {None, 0, 2, 5} <= set(blamed)
