"""Many processes on one PostgreSQL at the same time, and the death of its server: nothing given twice, nothing lost."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain

import pytest

from kafkasrcd.errors import StoreUnavailable
from kafkasrcd.storage.offset_store import Advance, Layout, OffsetStore, TopicPartition
from kafkasrcd.storage.opening import open_store
from tests import store_processes
from tests.postgres import PostgresServer
from tests.store_processes import BUSY_TIMEOUT_MS, CONTENDED, GROUP, PARTITIONS, TURNS
from tests.test_sqlite_store import answer, start
from tests.waiting import wait_until

pytestmark = pytest.mark.postgres

FIRST = PARTITIONS[0]
PROCESSES = 8


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.url(postgres.create_database())


@pytest.fixture
def store(url: str) -> Iterator[OffsetStore]:
    with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as opened:
        yield opened


def test_after_a_crash_of_the_server_claims_are_kept(postgres: PostgresServer, store: OffsetStore) -> None:
    epochs: list[int] = []
    for _ in range(3):
        epochs.append(store.claim([FIRST], "host-a")[FIRST].assignment_epoch)
        postgres.restart(immediate=True)
        wait_until(lambda: bool(store.offsets()), 10, "the store", ignoring=(StoreUnavailable,))
    assert epochs == [1, 2, 3]


def test_processes_that_claim_and_advance(url: str) -> None:
    """From before the tables exist: no deadlock, no epoch given twice, no advance lost."""
    started = [start(store_processes.claim_and_advance, url, f"host-{number}") for number in range(PROCESSES)]
    for _, pipe in started:
        pipe.send("go")
    answers: list[tuple[store_processes.Epochs, dict[TopicPartition, int]]]
    answers = [answer(process, pipe) for process, pipe in started]
    with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
        rows = {row.topic_partition: row for row in store.offsets()}
    for each in CONTENDED:
        given = [epochs[each] for epochs, _ in answers]
        assert all(epochs == sorted(epochs) for epochs in given)
        assert sorted(chain.from_iterable(given)) == list(range(1, PROCESSES * TURNS + 1))
        assert rows[each].next_offset == sum(accepted[each] for _, accepted in answers)


def test_rows_are_locked_in_one_order(url: str) -> None:
    """Whatever order they are asked in and the server finds them in: else advances and claims end in deadlocks."""
    by_key = Layout("key", 8)
    stop = threading.Event()

    def claim_again_and_again() -> None:
        with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
            while not stop.is_set():
                store.claim(PARTITIONS[:20], "host-b", by_key)

    def advance_again_and_again(backwards: bool) -> None:
        with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
            names = sorted(PARTITIONS[:20], reverse=backwards)
            while not stop.is_set():
                epochs = {row.topic_partition: row.assignment_epoch for row in store.offsets()}
                store.advance(
                    Advance(name, epochs.get(name, 1), 7, slot, by_key) for name in names for slot in range(8)
                )

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(claim_again_and_again) for _ in range(2)]
        running += [threads.submit(advance_again_and_again, backwards) for backwards in (False, True)]
        time.sleep(3)
        stop.set()
        for each in running:
            each.result()
