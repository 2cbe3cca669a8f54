"""Records that a handler process gives up, on real shared memory and a real database; the test is the supervisor."""

import itertools
import sqlite3
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kafkasrcd import BatchFailed, Reject, RetryLater
from kafkasrcd.message import Message, commit_through, encode_headers
from kafkasrcd.settings import CommitStrategy, OnFailure, Ordering, Settings, StoreSettings
from kafkasrcd.storage.dead_letters import DeadLetter, LetterFilter
from kafkasrcd.storage.opening import open_dead_letters, open_store
from kafkasrcd.workers.control import LetterRefused, Quarantined
from kafkasrcd.workers.failure_policy import failure_policy
from kafkasrcd.workers.formats import Format
from kafkasrcd.workers.formats import Kind as FormatKind
from kafkasrcd.workers.frame import Columns, RecordError
from kafkasrcd.workers.ring import DEAD_LETTERED, FAILURES, HANDLED
from tests.runner_rig import KINDS, Kind, Partition, Rig, settings_of
from tests.test_checkpoint import Bench

STRATEGIES = [CommitStrategy.PERIODIC, CommitStrategy.ON_CHECKPOINT]


class Letters:
    """A rig whose dead letters go to a SQLite file; with ``on_checkpoint`` in its handler's transactions."""

    def __init__(self, folder: Path, kind: Kind, strategy: CommitStrategy) -> None:
        self.kind = kind
        self.strategy = strategy
        self.bench = Bench(folder, kind)
        self.path = self.bench.path
        self.rigs: list[Rig] = []

    def rig(self, act: Callable[[Message[Any]], None] | None = None, **settings: Any) -> Rig:
        whole = settings_of(OnFailure.DEAD_LETTER, strategy=self.strategy, **settings)
        rig = Rig(self.kind, whole, act, store_url=self.url)
        self.rigs.append(rig)
        return rig

    @property
    def url(self) -> str:
        # Others' tables are refused where the store does not share its database.
        return self.bench.url if self.strategy is CommitStrategy.ON_CHECKPOINT else f"{self.bench.url}-offsets"

    def start(self, rig: Rig, act: Callable[[Message[Any]], None]) -> None:
        rig.act = act
        if self.strategy is CommitStrategy.ON_CHECKPOINT:
            rig.start(self.bench.handler(rig, act))
        else:
            rig.start()

    def found(self) -> list[DeadLetter]:
        shared = self.strategy is CommitStrategy.ON_CHECKPOINT
        store = open_dead_letters(self.url, "kafkasrcd", 5_000, shared_with_effects=shared)
        try:
            return [each.letter for each in store.find(LetterFilter())]
        finally:
            store.close()

    def wait_done(self, rig: Rig, partition: Partition, offset: int) -> None:
        rig.wait_processed(partition, offset)

    def close(self) -> None:
        for rig in self.rigs:
            rig.close()
        self.bench.close()
        commit_through(None)


@pytest.fixture(params=STRATEGIES, ids=str)
def strategy(request: pytest.FixtureRequest) -> CommitStrategy:
    return CommitStrategy(request.param)


@pytest.fixture(params=KINDS, ids=str)
def letters(request: pytest.FixtureRequest, strategy: CommitStrategy, tmp_path: Path) -> Generator[Letters]:
    made = Letters(tmp_path, request.param, strategy)
    yield made
    made.close()


def failing(*offsets: int, error: Exception | None = None) -> Callable[[Message[Any]], None]:
    def act(message: Message[Any]) -> None:
        if message.offset in offsets:
            raise error or ValueError(f"no luck with {message.offset}")

    return act


def test_what_keeps_failing_is_kept_whole_and_the_rest_goes_on(letters: Letters) -> None:
    rig = letters.rig(max_retries=1)
    partition = rig.partition()
    headers = encode_headers([("trace", b"1"), ("trace", None)])
    values = [b"[0]", b"[1]", b"no JSON", None, b"[4]", b"[5]"]
    keys = [None, b"a", b"b", b"c", None, b""]
    rig.publish(partition, Columns(range(6), range(6), values, keys, [None, headers, None, None, headers, None]))
    letters.start(rig, failing(1, 3, 5))
    letters.wait_done(rig, partition, 6)
    found = letters.found()
    assert [(each.offset, each.key, each.value) for each in found] == [
        (1, b"a", b"[1]"),
        (2, b"b", b"no JSON"),
        (3, b"c", None),
        (5, b"", b"[5]"),
    ]
    assert [each.headers for each in found] == [headers, None, None, None]
    assert [each.error for each in found] == ["ValueError", "JSONDecodeError", "ValueError", "ValueError"]
    assert found[0].reason == "orders:handle raised ValueError: no luck with 1"
    assert "raise error or ValueError" in found[0].traceback
    assert "sync_runner" not in found[0].traceback
    assert found[1].reason.startswith("cannot be deserialized: ")
    assert [each.attempts for each in found] == [2, 1, 2, 2]
    assert all(each.first_failed_ms <= each.last_failed_ms for each in found)
    assert (partition.cells[DEAD_LETTERED], partition.cells[HANDLED]) == (4, 2)
    assert sorted({message.offset for message in rig.messages}) == [0, 4]
    if letters.strategy is CommitStrategy.ON_CHECKPOINT:
        assert letters.bench.effects() == [0, 4]
        assert letters.bench.recorded()[0] == 6
    assert rig.hear() == []


def test_nothing_is_passed_over_while_a_letter_cannot_be_kept(letters: Letters) -> None:
    rig = letters.rig(max_retries=0, batch=1)
    partition = rig.partition()
    # The database is away, for the letter as for all else.
    path = Path(letters.url.removeprefix("sqlite:///"))
    if letters.strategy is not CommitStrategy.ON_CHECKPOINT:
        open_store(letters.url, "kafkasrcd", 5_000).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE kafkasrcd_dead_letters RENAME TO elsewhere")
    rig.publish_values(partition, range(4))
    letters.start(rig, failing(2))
    rig.wait(lambda: any(isinstance(told, LetterRefused) for told in rig.hear()), "the refusal")
    time.sleep(0.3)
    assert partition.processed == 2
    assert 3 not in rig.handled
    refused = [told for told in rig.hear() if isinstance(told, LetterRefused)]
    assert all(told.reason.startswith("offset 2 cannot be dead-lettered") for told in refused)
    assert all("dead_letters" in told.reason for told in refused)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE elsewhere RENAME TO kafkasrcd_dead_letters")
    letters.wait_done(rig, partition, 4)
    assert [each.offset for each in letters.found()] == [2]
    last = [told for told in rig.hear() if isinstance(told, LetterRefused)][-1]
    assert last.reason == ""


@pytest.mark.parametrize("error", [Reject("of no use"), KeyError("missing")])
def test_what_is_not_worth_another_attempt_gets_none(
    tmp_path: Path, strategy: CommitStrategy, error: Exception
) -> None:
    for number, kind in enumerate(KINDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        letters = Letters(folder, kind, strategy)
        rig = letters.rig(max_retries=50, backoff_ms=60_000, batch=1, non_retryable=["LookupError"])
        partition = rig.partition()
        rig.publish_values(partition, range(3))
        letters.start(rig, failing(1, error=error))
        letters.wait_done(rig, partition, 3)
        (found,) = letters.found()
        assert (found.offset, found.attempts) == (1, 1)
        assert found.error == ("kafkasrcd.Reject" if isinstance(error, Reject) else "KeyError")
        letters.close()


def test_a_handler_says_when_it_is_called_again(letters: Letters) -> None:
    waits: list[float] = []

    def act(message: Message[Any]) -> None:
        if message.offset == 1 and len(waits) < 3:
            waits.append(time.monotonic())
            raise RetryLater(after=0.3)

    rig = letters.rig(max_retries=5, backoff_ms=60_000, backoff_max_ms=60_000, batch=1)
    partition = rig.partition()
    rig.publish_values(partition, range(3))
    letters.start(rig, act)
    letters.wait_done(rig, partition, 3)
    assert all(later - earlier >= 0.3 for earlier, later in itertools.pairwise(waits))
    assert not letters.found()


@pytest.mark.parametrize("ordering", list(Ordering))
def test_lanes_bury_their_own(tmp_path: Path, ordering: Ordering) -> None:
    """Many records in hand, of which every fifth fails."""
    letters = Letters(tmp_path, Kind(is_batch=False, is_async=True), CommitStrategy.PERIODIC)
    rig = letters.rig(max_retries=1, ordering=ordering, concurrency=20)
    partition = rig.partition()
    rig.publish_keys(partition, 0, [b"%d" % (number % 7) for number in range(100)])
    letters.start(rig, failing(*range(0, 100, 5)))
    letters.wait_done(rig, partition, 100)
    assert [each.offset for each in sorted(letters.found(), key=lambda each: each.offset)] == list(range(0, 100, 5))
    assert sorted(rig.handled) == [offset for offset in range(100) if offset % 5]
    letters.close()


def test_a_quarantined_record_is_not_handled(letters: Letters) -> None:
    rig = letters.rig()
    bad = Quarantined(offset=2, error="HandlerProcessEnded", reason="it ended 3 times", attempts=3, traceback="there")
    partition = rig.partition(quarantined=(bad,))
    rig.publish_values(partition, range(5))
    letters.start(rig, lambda _: None)
    letters.wait_done(rig, partition, 5)
    (found,) = letters.found()
    assert (found.offset, found.value, found.error, found.reason) == (2, b'{"number": 2}', bad.error, bad.reason)
    assert (found.attempts, found.traceback) == (3, "there")
    assert rig.handled == [0, 1, 3, 4]


def test_what_a_worker_refuses_is_kept_with_its_attempts_and_stacks(letters: Letters) -> None:
    rig = letters.rig()
    partition = rig.partition()
    error = RecordError(1, "WorkerTimeout", "it hung", 3, "there")
    raws = [b"1", b"raw", b"1"]
    rig.publish(partition, Columns(range(3), [1] * 3, [b"1", None, b"1"], [b"k"] * 3, errors=[error], raws=raws))
    letters.start(rig, lambda _: None)
    letters.wait_done(rig, partition, 3)
    (found,) = letters.found()
    assert (found.offset, found.key, found.value, found.error) == (1, b"k", b"raw", "WorkerTimeout")
    assert (found.attempts, found.traceback) == (3, "there")


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_a_handler_says_which_of_a_batch_failed(tmp_path: Path, strategy: CommitStrategy, is_async: bool) -> None:
    letters = Letters(tmp_path, Kind(is_batch=True, is_async=is_async), strategy)
    rig = letters.rig(max_retries=1, batch=10)
    partition = rig.partition()
    rig.publish_values(partition, range(10))
    calls: list[list[int]] = []
    good: list[int] = []

    def handle(messages: list[Message[Any]], tx: Any = None) -> None:
        calls.append([message.offset for message in messages])
        failed = [message for message in messages if message.offset in (3, 7)]
        good.extend(message.offset for message in messages if message not in failed)
        if failed:
            raise BatchFailed(failed) from OSError("the shelf is full")

    async def handle_async(messages: list[Message[Any]], tx: Any = None) -> None:
        handle(messages)

    rig.start(rig.target(handle_async if is_async else handle))
    letters.wait_done(rig, partition, 10)
    if strategy is CommitStrategy.ON_CHECKPOINT:
        assert calls == [[*range(10)], [0, 1, 2], [3], [3], [4, 5, 6], [7], [7], [8, 9]], "all of it was undone"
    else:
        assert calls == [[*range(10)], [3], [3], [7], [7]]
    assert [each.offset for each in letters.found()] == [3, 7]
    assert all("OSError: the shelf is full" in each.traceback for each in letters.found())
    assert (partition.cells[HANDLED], partition.cells[DEAD_LETTERED]) == (8, 2)
    letters.close()


def test_one_bad_record_of_a_large_batch_is_found_by_halving(tmp_path: Path) -> None:
    letters = Letters(tmp_path, Kind(is_batch=True, is_async=False), CommitStrategy.PERIODIC)
    rig = letters.rig(max_retries=0, batch=500)
    partition = rig.partition(capacity=1024 * 1024)
    rig.publish_values(partition, range(500))
    letters.start(rig, failing(321))
    letters.wait_done(rig, partition, 500)
    assert [each.offset for each in letters.found()] == [321]
    assert len(rig.calls) < 25
    assert partition.cells[FAILURES] < 12
    letters.close()


def test_after_a_death_the_records_that_were_in_hand_are_given_one_by_one(tmp_path: Path) -> None:
    letters = Letters(tmp_path, Kind(is_batch=True, is_async=False), CommitStrategy.PERIODIC)
    first = letters.rig(batch=10)
    partition = first.partition()
    first.publish_values(partition, range(30))
    dying = SystemExit()

    def die(message: Message[Any]) -> None:
        if message.offset == 13:
            raise dying

    letters.start(first, die)
    assert first.wait_ended() is dying
    partition.memory.slots[0].handler_ended()
    second = letters.rig(batch=10)
    second.bind(partition)
    letters.start(second, lambda _: None)
    letters.wait_done(second, partition, 30)
    assert second.calls == [*([offset] for offset in range(10, 20)), [*range(20, 30)]]
    letters.close()


def test_where_there_is_no_place_for_letters_a_partition_stops() -> None:
    assert failure_policy(Settings()) is OnFailure.DEAD_LETTER
    memory = Settings(store=StoreSettings(url="memory://"))
    assert failure_policy(memory) is OnFailure.STOP


def test_a_letter_names_the_schema_that_its_value_names() -> None:
    registered = Format(kind=FormatKind.AVRO)
    assert registered.schema_id(b"\0\0\0\1\2rest") == 258
    assert [registered.schema_id(raw) for raw in (None, b"", b"\0\0\0", b"\1\0\0\1\2")] == [None] * 4
    assert Format(kind=FormatKind.AVRO, schema="order.avsc").schema_id(b"\0\0\0\1\2rest") is None
    assert Format(kind=FormatKind.JSON).schema_id(b"\0\0\0\1\2rest") is None


def test_what_failed_of_a_batch_is_named_by_its_messages() -> None:
    with pytest.raises(TypeError, match="the messages"):
        BatchFailed([3])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
