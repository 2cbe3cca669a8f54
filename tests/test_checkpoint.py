"""Handlers in transactions, on real shared memory and a real database; the test is the supervisor."""

import asyncio
import sqlite3
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from kafkasrcd.message import Message, commit_through
from kafkasrcd.settings import CommitStrategy, Ordering
from kafkasrcd.storage.offset_store import Advance, OffsetStore, TopicPartition
from kafkasrcd.storage.opening import open_store
from kafkasrcd.workers.control import Fenced, RecordFailed, StoreAway
from kafkasrcd.workers.ring import COMMITTABLE, PROCESSED, UNSAVED
from tests.runner_rig import KINDS, THIS_EPOCH, Kind, Partition, Rig, settings_of

INSERT = text("INSERT INTO effects VALUES (:offset)")
NAMES = [TopicPartition("orders", number) for number in range(2)]


class Bench:
    """A database with a table of effects, a store in it whose claims are at the rig's epoch, and rigs on it."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.path = folder / "effects.db"
        self.url = f"sqlite:///{self.path}"
        self.kind = kind
        self.rigs: list[Rig] = []
        with closing(sqlite3.connect(self.path)) as made:
            made.execute("CREATE TABLE effects (offset INTEGER)")
        self.store: OffsetStore = open_store(self.url, "kafkasrcd", 5_000, shared_with_effects=True)
        for _ in range(THIS_EPOCH):
            self.store.claim(NAMES, "test")
        self.store.restart(dict.fromkeys(NAMES, (THIS_EPOCH, 0)))

    def rig(self, **settings: Any) -> Rig:
        made = Rig(self.kind, settings_of(strategy=CommitStrategy.ON_CHECKPOINT, **settings), store_url=self.url)
        self.rigs.append(made)
        return made

    def effects(self) -> list[int]:
        with closing(sqlite3.connect(self.path)) as look:
            return [offset for (offset,) in look.execute("SELECT offset FROM effects ORDER BY offset")]

    def recorded(self) -> list[int | None]:
        return [row.next_offset for row in self.store.offsets()]

    def handler(self, rig: Rig, act: Callable[[Message[Any]], None] | None = None) -> Any:
        """Inserts a row for each message, then acts."""

        def handle(argument: Any, tx: Any) -> None:
            messages: list[Message[Any]] = argument if self.kind.is_batch else [argument]
            rig.calls.append([message.offset for message in messages])
            for message in messages:
                tx.execute(INSERT, {"offset": message.offset})
                if act is not None:
                    act(message)
                rig.messages.append(message)

        async def handle_async(argument: Any, tx: Any) -> None:
            await asyncio.sleep(0)

            def handle_here(connection: Connection) -> None:
                handle(argument, connection)

            await tx.run_sync(handle_here)

        return rig.target(handle_async if self.kind.is_async else handle)

    def close(self) -> None:
        for rig in self.rigs:
            rig.close()
        self.store.close()
        commit_through(None)


@pytest.fixture(params=KINDS, ids=str)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Bench]:
    made = Bench(tmp_path, request.param)
    yield made
    made.close()


def wait_saved(rig: Rig, partition: Partition, offset: int) -> None:
    rig.wait(lambda: partition.cells[COMMITTABLE] == offset and not partition.cells[UNSAVED], f"{offset} to be saved")


def test_a_checkpoint_after_its_interval_saves_effects_and_offset(bench: Bench) -> None:
    rig = bench.rig()
    partition = rig.partition()
    rig.publish_values(partition, range(5))
    rig.start(bench.handler(rig))
    wait_saved(rig, partition, 5)
    rig.wait(lambda: partition.is_empty, "the space to be given back")
    assert bench.effects() == list(range(5))
    assert bench.recorded() == [5, 0]


def test_nothing_is_seen_before_a_checkpoint_and_a_lost_lease_makes_one(bench: Bench) -> None:
    rig = bench.rig(checkpoint_interval_ms=60_000)
    partition = rig.partition()
    rig.publish_values(partition, range(5))
    rig.start(bench.handler(rig))
    rig.wait(lambda: partition.processed == 5, "all handled")
    assert bench.effects() == []
    assert partition.cells[COMMITTABLE] == 0
    assert not partition.memory.is_quiet, "a revocation has to wait for it"
    partition.memory.stop()
    rig.ring()
    wait_saved(rig, partition, 5)
    assert bench.effects() == list(range(5))
    assert partition.memory.is_quiet


def test_a_checkpoint_has_no_more_messages_than_allowed(bench: Bench) -> None:
    rig = bench.rig(checkpoint_interval_ms=60_000, checkpoint_max_messages=2, batch=1)
    partition = rig.partition()
    rig.publish_values(partition, range(5))
    rig.start(bench.handler(rig))
    rig.wait(lambda: partition.processed == 5 and partition.cells[COMMITTABLE] == 4, "two checkpoints of two")
    assert bench.effects() == [0, 1, 2, 3]


def test_another_owner_fences_everything_that_was_not_saved(bench: Bench) -> None:
    """The other partition's effects in the same transaction are undone, too, and done again."""
    rig = bench.rig(checkpoint_interval_ms=60_000)
    lost, kept = rig.partition(), rig.partition()
    rig.publish_values(lost, range(3))
    rig.publish_values(kept, range(10, 13))
    rig.start(bench.handler(rig))
    rig.wait(lambda: lost.processed == 3 and kept.processed == 13, "all handled")
    # A claim goes through as soon as the transaction is out of the way; then comes the next one.
    for partition, offset in ((lost, 3), (kept, 13)):
        partition.memory.stop()
        rig.ring()
        wait_saved(rig, partition, offset)
    bench.store.claim([NAMES[0]], "another")
    lost.memory.extend_lease(60)
    kept.memory.extend_lease(60)
    rig.publish_values(lost, range(3, 6))
    rig.publish_values(kept, range(13, 16))
    rig.wait(lambda: kept.processed == 16, "the other's records")
    lost.memory.stop()
    kept.memory.stop()
    rig.ring()
    rig.wait(lambda: any(isinstance(told, Fenced) for told in rig.hear()), "the word of it")
    kept.memory.extend_lease(60)
    rig.ring()
    rig.wait(lambda: kept.processed == 16, "the other's records again")
    kept.memory.stop()
    rig.ring()
    wait_saved(rig, kept, 16)
    assert bench.effects() == [0, 1, 2, *range(10, 16)]
    assert lost.cells[COMMITTABLE] == 3


def test_a_successor_begins_where_the_store_has_it(bench: Bench) -> None:
    """Its predecessor was killed after its commit, and before its word of it."""
    rig = bench.rig()
    partition = rig.partition()
    bench.store.advance([Advance(NAMES[0], THIS_EPOCH, 3)])
    rig.publish_values(partition, range(6))
    rig.start(bench.handler(rig))
    wait_saved(rig, partition, 6)
    assert bench.effects() == [3, 4, 5]


def test_a_failing_record_stops_behind_what_is_saved(bench: Bench) -> None:
    def act(message: Message[Any]) -> None:
        if message.offset == 2:
            raise ValueError("never")

    rig = bench.rig(max_retries=1, batch=1)
    partition = rig.partition()
    rig.publish_values(partition, range(5))
    rig.start(bench.handler(rig, act))
    rig.wait(lambda: any(isinstance(told, RecordFailed) for told in rig.hear()), "the failure")
    wait_saved(rig, partition, 2)
    assert bench.effects() == [0, 1]
    assert partition.cells[PROCESSED] == 2


def test_a_locked_database_is_waited_for(bench: Bench) -> None:
    rig = bench.rig()
    partition = rig.partition()
    rig.publish_values(partition, range(3))
    with closing(sqlite3.connect(bench.path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        rig.start(bench.handler(rig))
        rig.wait(lambda: any(isinstance(told, StoreAway) for told in rig.hear()), "the word of it")
        assert partition.cells[COMMITTABLE] == 0
        holder.execute("ROLLBACK")
    wait_saved(rig, partition, 3)
    assert bench.effects() == [0, 1, 2]


def test_key_order_in_transactions(bench: Bench) -> None:
    rig = bench.rig(ordering=Ordering.KEY)
    partition = rig.partition()
    rig.publish_keys(partition, 0, [b"a", b"b", None, b"a"] * 10)
    rig.start(bench.handler(rig))
    wait_saved(rig, partition, 40)
    assert bench.effects() == list(range(40))
