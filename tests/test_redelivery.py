"""Letters whose records are handled again, on real shared memory and a real database; the test is the supervisor."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection

from kafkasrcd import Reject
from kafkasrcd.message import Message, commit_through, encode_headers
from kafkasrcd.settings import CommitStrategy, OnFailure, Ordering
from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.dead_letter_store import DeadLetterStore
from kafkasrcd.storage.dead_letters import DeadLetter, LetterFilter, LetterState, StoredLetter
from kafkasrcd.storage.opening import open_dead_letters, open_store
from kafkasrcd.workers.control import LetterDue, LetterRefused, LettersDone, Quarantined, Redeliver
from kafkasrcd.workers.frame import Columns
from kafkasrcd.workers.ring import DEAD_LETTERED, HANDLED, IN_HANDS, LETTER, PROCESSED, REDELIVERED, SCHEDULED
from tests.runner_rig import KINDS, Kind, Partition, Rig, json_of
from tests.test_dead_letters import STRATEGIES, Letters, failing


class Again(Letters):
    """A rig whose letters are handled again when the test says so."""

    def __init__(self, folder: Path, kind: Kind, strategy: CommitStrategy) -> None:
        super().__init__(folder, kind, strategy)
        if strategy is not CommitStrategy.ON_CHECKPOINT:
            open_store(self.url, "kafkasrcd", 5_000).close()

    def start(self, rig: Rig, act: Callable[[Message[Any]], None]) -> None:
        """``rig.act`` may be changed later."""
        rig.act = act

        def as_it_is_now(message: Message[Any]) -> None:
            if rig.act is not None:
                rig.act(message)

        if self.strategy is CommitStrategy.ON_CHECKPOINT:
            rig.start(self.bench.handler(rig, as_it_is_now))
        else:
            rig.start()

    @property
    def store(self) -> DeadLetterStore:
        shared = self.strategy is CommitStrategy.ON_CHECKPOINT
        return open_dead_letters(self.url, "kafkasrcd", 5_000, shared_with_effects=shared)

    def stored(self) -> list[StoredLetter]:
        with closing(self.store) as store:
            return list(store.find(LetterFilter()))

    def states(self) -> list[tuple[int, str, int]]:
        """Offset, state, attempts."""
        return [(each.letter.offset, each.state.value, each.letter.attempts) for each in self.stored()]

    def put(self, partition: Partition, *offsets: int, state: LetterState, **others: Any) -> list[int]:
        """Letters due now, as if their records had failed before."""
        with closing(self.store) as store:
            for offset in offsets:
                due_ms = None if state is LetterState.REPLAYING else wall_clock_ms() - 1
                store.bury(_letter(partition, offset, due_ms=due_ms, **others))
            ids = [each.id for each in store.find(LetterFilter()) if each.letter.offset in offsets]
            if state is LetterState.REPLAYING:
                for letter_id in ids:
                    assert store.change(letter_id, [LetterState.OPEN], state, by="alice", due_ms=wall_clock_ms() - 1)
            return ids

    def give(self, rig: Rig, partition: Partition, *letters: LetterDue) -> None:
        rig.supervisor.send(Redeliver(binding=partition.binding, letters=letters))

    def wait_settled(self, rig: Rig, count: int) -> None:
        """Until so many got somewhere."""

        def done() -> int:
            return sum(told.done for told in rig.hear() if isinstance(told, LettersDone))

        rig.wait(lambda: done() >= count, f"{count} letters to be done")
        assert done() == count


def _letter(partition: Partition, offset: int, **others: Any) -> DeadLetter:
    letter = DeadLetter(
        topic=partition.topic,
        partition=partition.binding,
        offset=offset,
        timestamp_ms=17,
        key=b"k",
        value=json_of(offset),
        headers=encode_headers([("trace", b"1")]),
        value_format="json",
        error="ValueError",
        reason="no luck",
        attempts=1,
        first_failed_ms=1,
        last_failed_ms=2,
        host="there",
        version="0",
    )
    return msgspec.structs.replace(letter, **others)


@pytest.fixture(params=STRATEGIES, ids=str)
def strategy(request: pytest.FixtureRequest) -> CommitStrategy:
    return CommitStrategy(request.param)


@pytest.fixture(params=KINDS, ids=str)
def again(request: pytest.FixtureRequest, strategy: CommitStrategy, tmp_path: Path) -> Generator[Again]:
    made = Again(tmp_path, request.param, strategy)
    yield made
    made.close()


def test_what_fails_is_put_aside_and_handled_at_its_time(again: Again) -> None:
    rig = again.rig(max_retries=2, scheduled=True)
    partition = rig.partition()
    rig.publish_values(partition, range(5))
    again.start(rig, failing(1, 3))
    rig.wait_processed(partition, 5)
    assert again.states() == [(1, "retrying", 1), (3, "retrying", 1)]
    assert all(each.letter.due_ms is not None for each in again.stored())
    assert (partition.cells[SCHEDULED], partition.cells[HANDLED], partition.cells[DEAD_LETTERED]) == (2, 3, 0)
    rig.act = failing(3)
    first, second = [LetterDue(id=each.id) for each in again.stored()]
    again.give(rig, partition, first, second)
    again.wait_settled(rig, 2)
    rig.wait(lambda: again.states() == [(3, "retrying", 2)], "one to be handled, and one put aside again")
    rig.act = failing(3)
    rig.wait(lambda: (again.stored()[0].letter.due_ms or 0) <= wall_clock_ms(), "it to be due")
    again.give(rig, partition, second)
    rig.wait(lambda: again.states() == [(3, "open", 3)], "it to be dead after the last attempt")
    assert again.stored()[0].letter.due_ms is None
    assert partition.cells[REDELIVERED] == 1
    assert sorted(set(rig.handled)) == [0, 1, 2, 4]
    if again.strategy is CommitStrategy.ON_CHECKPOINT:
        assert again.bench.effects() == [0, 1, 2, 4]
        assert again.bench.recorded()[0] == 5


def test_a_replayed_letter_has_one_attempt_and_stays_in_history(again: Again) -> None:
    rig = again.rig(max_retries=5)
    partition = rig.partition(next_offset=10)
    good, bad = again.put(partition, 3, 4, state=LetterState.REPLAYING)
    again.start(rig, failing(4))
    again.give(rig, partition, LetterDue(id=good), LetterDue(id=bad))
    again.wait_settled(rig, 2)
    rig.wait(lambda: again.states() == [(3, "replayed", 1), (4, "open", 2)], "both to be written down")
    assert again.stored()[0].changed_by == "alice"
    assert again.stored()[1].letter.reason == "orders:handle raised ValueError: no luck with 4"
    (message,) = rig.messages
    assert (message.key, message.timestamp_ms, message.payload) == (b"k", 17, {"number": 3})
    assert message.headers["trace"] == b"1"
    assert partition.processed == 10


def test_records_and_letters_take_turns(again: Again) -> None:
    rig = again.rig(max_retries=0, batch=2)
    partition = rig.partition(next_offset=100)
    ids = again.put(partition, *range(8), state=LetterState.RETRYING)
    rig.publish_values(partition, range(100, 140))
    again.give(rig, partition, *(LetterDue(id=letter_id) for letter_id in ids))
    again.start(rig, lambda message: None)
    again.wait_settled(rig, 8)
    rig.wait_processed(partition, 140)
    assert sorted(rig.handled) == [*range(8), *range(100, 140)]
    rig.wait(lambda: again.states() == [], "the letters to be gone")
    assert (partition.cells[REDELIVERED], partition.cells[HANDLED]) == (8, 40)
    rig.wait(lambda: partition.cells[LETTER] == 0, "nothing to be in hand")
    assert partition.memory.slots[0].in_flight is None


def test_what_is_not_due_any_more_is_left_alone(again: Again) -> None:
    rig = again.rig()
    partition = rig.partition()
    gone, discarded, later = again.put(partition, 1, 2, 3, state=LetterState.RETRYING)
    with closing(again.store) as store:
        store.change(discarded, [LetterState.RETRYING], LetterState.DISCARDED, by="bob")
        store.bury(_letter(partition, 3, due_ms=wall_clock_ms() + 60_000))
    with closing(sqlite3.connect(again.url.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute("DELETE FROM kafkasrcd_dead_letters WHERE id = ?", (gone,))
    again.start(rig, lambda message: None)
    again.give(rig, partition, LetterDue(id=gone), LetterDue(id=discarded), LetterDue(id=later))
    rig.wait(lambda: any(isinstance(told, LettersDone) for told in rig.hear()), "the answer")
    assert [told.done for told in rig.hear() if isinstance(told, LettersDone)] == [0]
    assert rig.calls == []
    assert again.states() == [(2, "discarded", 1), (3, "retrying", 1)]


def test_what_ended_its_process_too_often_is_not_called_again(again: Again) -> None:
    rig = again.rig(max_retries=5)
    partition = rig.partition()
    (letter_id,) = again.put(partition, 1, state=LetterState.RETRYING)
    again.start(rig, lambda message: None)
    ended = Quarantined(offset=0, error="HandlerTimeout", reason="killed", attempts=3, traceback="stacks")
    again.give(rig, partition, LetterDue(id=letter_id, alone=True, ended=ended))
    rig.wait(lambda: again.states() == [(1, "open", 2)], "it to be dead")
    (stored,) = again.stored()
    letter = stored.letter
    assert (letter.error, letter.reason, letter.traceback) == ("HandlerTimeout", "killed", "stacks")
    assert rig.calls == []


def test_what_cannot_be_read_or_is_rejected_is_dead_at_once(again: Again) -> None:
    rig = again.rig(max_retries=5)
    partition = rig.partition()
    ids = [
        *again.put(partition, 1, state=LetterState.RETRYING, value=b"no JSON"),
        *again.put(partition, 2, state=LetterState.RETRYING),
        *again.put(partition, 3, state=LetterState.RETRYING, value=None),
    ]

    def act(message: Message[Any]) -> None:
        if message.offset == 2:
            raise Reject("of no use")

    again.start(rig, act)
    again.give(rig, partition, *(LetterDue(id=letter_id) for letter_id in ids))
    again.wait_settled(rig, 3)
    rig.wait(lambda: again.states() == [(1, "open", 2), (2, "open", 2)], "two to be dead")
    assert again.stored()[0].letter.reason.startswith("cannot be deserialized: ")
    assert [message.payload for message in rig.messages] == [None]


def test_without_a_lease_no_letter_is_begun(again: Again) -> None:
    rig = again.rig()
    partition = rig.partition(leased=False)
    (letter_id,) = again.put(partition, 1, state=LetterState.RETRYING)
    again.start(rig, lambda message: None)
    again.give(rig, partition, LetterDue(id=letter_id))
    time.sleep(0.2)
    assert rig.calls == []
    partition.memory.extend_lease(60)
    again.wait_settled(rig, 1)
    assert rig.handled == [1]


def test_a_drain_waits_for_a_letter_in_hand(again: Again) -> None:
    rig = again.rig()
    partition = rig.partition(next_offset=5)
    (letter_id,) = again.put(partition, 1, state=LetterState.RETRYING)
    quiet: list[bool] = []
    seen: list[int] = []

    def act(message: Message[Any]) -> None:
        slot = partition.memory.slots[0]
        quiet.append(slot.in_flight is None)
        seen.append(slot.cells[LETTER])

    again.start(rig, act)
    again.give(rig, partition, LetterDue(id=letter_id))
    again.wait_settled(rig, 1)
    assert (quiet, seen) == ([False], [letter_id])
    rig.wait(lambda: partition.memory.slots[0].in_flight is None, "it to be quiet")
    assert partition.cells[PROCESSED] == 5


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_letter_that_cannot_be_looked_up_now_stays_due_and_the_log_says_so(
    tmp_path: Path, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    again = Again(tmp_path, kind, CommitStrategy.PERIODIC)
    path = again.url.removeprefix("sqlite:///")
    try:
        rig = again.rig()
        partition = rig.partition()
        (letter_id,) = again.put(partition, 1, state=LetterState.RETRYING)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("ALTER TABLE kafkasrcd_dead_letters RENAME TO elsewhere")
        again.start(rig, lambda message: None)
        again.give(rig, partition, LetterDue(id=letter_id))
        rig.wait(lambda: any(isinstance(told, LettersDone) for told in rig.hear()), "the answer")
        assert f"dead letter {letter_id} is not handled again yet" in caplog.text
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("ALTER TABLE elsewhere RENAME TO kafkasrcd_dead_letters")
        again.give(rig, partition, LetterDue(id=letter_id))
        again.wait_settled(rig, 1)
        assert (rig.handled, again.states()) == ([1], [])
    finally:
        again.close()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_outcome_that_cannot_be_written_down_is_kept_and_the_handler_not_called_again(
    tmp_path: Path, kind: Kind
) -> None:
    again = Again(tmp_path, kind, CommitStrategy.PERIODIC)
    try:
        rig = again.rig()
        partition = rig.partition()
        (letter_id,) = again.put(partition, 1, state=LetterState.RETRYING)

        def act(message: Message[Any]) -> None:
            with closing(sqlite3.connect(again.url.removeprefix("sqlite:///"))) as connection:
                connection.execute("ALTER TABLE kafkasrcd_dead_letters RENAME TO elsewhere")

        again.start(rig, act)
        again.give(rig, partition, LetterDue(id=letter_id))
        rig.wait(lambda: any(isinstance(told, LetterRefused) for told in rig.hear()), "the refusal")
        (refused, *_) = [told for told in rig.hear() if isinstance(told, LetterRefused)]
        assert refused.reason.startswith(f"what became of dead letter {letter_id} (orders[0]@1) cannot be written down")
        with closing(sqlite3.connect(again.url.removeprefix("sqlite:///"))) as connection:
            connection.execute("ALTER TABLE elsewhere RENAME TO kafkasrcd_dead_letters")
        again.wait_settled(rig, 1)
        assert again.states() == []
        assert rig.handled == [1]
        assert [told.reason for told in rig.hear() if isinstance(told, LetterRefused)][-1] == ""
    finally:
        again.close()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_on_checkpoint_what_is_overtaken_is_undone_with_its_effects(tmp_path: Path, kind: Kind) -> None:
    """While its handler runs the letter is changed, as by another process; the transaction is rolled back."""
    again = Again(tmp_path, kind, CommitStrategy.ON_CHECKPOINT)
    try:
        rig = again.rig(checkpoint_interval_ms=10)
        partition = rig.partition()
        overtaken, other = again.put(partition, 1, 2, state=LetterState.RETRYING)
        changes = iter(["UPDATE kafkasrcd_dead_letters SET attempts = 7 WHERE id = 1"])

        def handle(argument: Any, tx: Any) -> None:
            messages: list[Message[Any]] = argument if kind.is_batch else [argument]
            rig.calls.append([message.offset for message in messages])
            tx.exec_driver_sql(f"INSERT INTO effects VALUES ({messages[0].offset})")
            for change in changes:
                tx.exec_driver_sql(change)

        async def handle_async(argument: Any, tx: Any) -> None:
            def handle_here(connection: Connection) -> None:
                handle(argument, connection)

            await tx.run_sync(handle_here)

        rig.start(rig.target(handle_async if kind.is_async else handle))
        again.give(rig, partition, LetterDue(id=overtaken))
        rig.wait(lambda: any(isinstance(told, LettersDone) for told in rig.hear()), "the answer")
        assert (again.bench.effects(), again.states()) == ([], [(1, "retrying", 1), (2, "retrying", 1)])
        again.give(rig, partition, LetterDue(id=overtaken), LetterDue(id=other))
        rig.wait(lambda: again.bench.effects() == [1, 2] and again.states() == [], "both to be handled")
        assert rig.calls == [[1], [1], [2]]
    finally:
        again.close()


@pytest.mark.parametrize("ordering", [Ordering.PARTITION, Ordering.KEY])
def test_a_letter_never_meets_a_record_of_its_ordering_unit(tmp_path: Path, ordering: Ordering) -> None:
    again = Again(tmp_path, Kind(is_batch=False, is_async=True), CommitStrategy.PERIODIC)
    at_once: list[int] = []
    here: list[bytes | None] = []

    try:
        rig = again.rig(ordering=ordering, concurrency=50)
        partition = rig.partition(next_offset=100)
        ids = again.put(partition, *range(5), state=LetterState.RETRYING)
        rig.publish(partition, Columns(range(100, 120), [1] * 20, [json_of(0)] * 20, [b"k", b"other"] * 10))

        async def handle(message: Message[Any]) -> None:
            unit = message.key if ordering is Ordering.KEY else None
            here.append(unit)
            at_once.append(here.count(unit))
            await asyncio.sleep(0.002)
            here.remove(unit)

        again.give(rig, partition, *(LetterDue(id=letter_id) for letter_id in ids))
        rig.start(rig.target(handle))
        again.wait_settled(rig, 5)
        rig.wait_processed(partition, 120)
        assert len(at_once) == 25
        assert max(at_once) == 1
    finally:
        again.close()


def test_one_that_may_have_ended_a_process_is_alone_in_hand(tmp_path: Path) -> None:
    again = Again(tmp_path, Kind(is_batch=False, is_async=True), CommitStrategy.PERIODIC)
    alone: list[int] = []
    others: list[int] = []

    try:
        rig = again.rig(ordering=Ordering.NONE, concurrency=50)
        partition = rig.partition(next_offset=100)
        (letter_id,) = again.put(partition, 1, state=LetterState.RETRYING)

        async def handle(message: Message[Any]) -> None:
            in_hands = partition.memory.slots[0].cells[IN_HANDS]
            (alone if message.offset == 1 else others).append(in_hands)
            await asyncio.sleep(0.002)

        again.give(rig, partition, LetterDue(id=letter_id, alone=True))
        rig.start(rig.target(handle))
        rig.publish_values(partition, range(100, 200))
        again.wait_settled(rig, 1)
        rig.wait_processed(partition, 200)
        assert alone == [1]
        assert max(others) > 1
    finally:
        again.close()
        commit_through(None)


def test_the_last_failure_goes_into_the_topic_too_or_only_there() -> None:
    """``forgets``: what the store keeps of a record after its last attempt."""
    from kafkasrcd.settings import HandlerSettings, Settings
    from kafkasrcd.workers.redelivery import Redeliveries

    def forgets(**handler: Any) -> bool:
        return Redeliveries(Settings(handler=HandlerSettings(**handler)), Path(), "").forgets

    assert not forgets()
    assert forgets(dead_letter_store=False, dead_letter_topic="dead")
    assert forgets(on_failure=OnFailure.SKIP)
