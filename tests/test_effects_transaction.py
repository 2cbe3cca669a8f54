"""A handler process's transaction beside others: commits held up, hosts that freeze, cancellation at any moment."""

import asyncio
import contextlib
import socket
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from kafkasrcd.errors import StaleAssignment, StoreUnavailable
from kafkasrcd.storage.async_transaction import AsyncEffectsTransaction
from kafkasrcd.storage.offset_store import Advance, Layout, TopicPartition
from kafkasrcd.storage.opening import open_store
from kafkasrcd.storage.transaction import CommitUnknown, EffectsTransaction
from tests import store_processes
from tests.awaited import Awaited, Transaction
from tests.postgres import PostgresServer
from tests.store_processes import MOST_EFFECTS, PARTITIONS
from tests.test_sqlite_store import answer, start
from tests.test_transactions import BUSY_TIMEOUT_MS, FIRST, GROUP, IDLE_SECONDS, Database, Effect, Proxy, write
from tests.waiting import wait_until

HELD_UP_SECONDS = 1.5
PROCESSES = 8
FAIR_SECONDS = 2.0
"""All of them have had their turn by then: 0.2 s where it was measured, on two cores."""
BY_KEY = Layout("key", 2)


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """PostgreSQL, where a test does not say otherwise."""
    if getattr(request, "param", "postgresql") == "sqlite":
        made = Database(f"sqlite:///{tmp_path}/state.db", None)
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        made = Database(server.url(server.create_database()), server)
    with closing(made):
        yield made


on_both = pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)], indirect=True
)
on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture(params=[EffectsTransaction, Awaited], ids=["plain", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Transaction]]:
    made: list[Transaction] = []

    def made_and_closed(url: str, idle_seconds: float = IDLE_SECONDS) -> Transaction:
        made.append(request.param(url, GROUP, BUSY_TIMEOUT_MS, idle_seconds))
        return made[-1]

    yield made_and_closed
    for transaction in made:
        transaction.close()


class FrozenProxy(Proxy):
    """Once ``freezes``, keeps COMMIT to itself and every connection open: a host that froze just before."""

    freezes = False

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while sent := client.recv(65536):
                if self.freezes and b"COMMIT" in sent:
                    return
                server.sendall(sent)
            server.shutdown(socket.SHUT_RDWR)


def behind(proxy: Proxy, database: Database) -> str:
    assert database.server is not None
    return database.url.replace(str(database.server.port), str(proxy.port))


def at_commit(database: Database, does: str) -> None:
    """Have every effect do ``does`` when its transaction is committed."""
    assert database.server is not None
    for statement in (
        f"CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {does}; RETURN NULL; END $$",
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION late()",
    ):
        database.server.execute(statement, database.name)


@pytest.mark.postgres
class TestAtCommit:
    def test_what_the_server_refuses_was_not_made(self, database: Database, make: Callable[..., Transaction]) -> None:
        """It is known: there is nothing to find out, and the words are the server's."""
        at_commit(database, "IF NEW.number < 9 THEN RAISE 'customer has no address'; END IF")
        mine = database.claim()
        transaction = make(database.url)
        transaction.call(write, 1, "connection")
        with pytest.raises(StoreUnavailable, match="customer has no address") as error:
            transaction.commit([Advance(FIRST, mine, 3)])
        assert not isinstance(error.value, CommitUnknown)
        assert not transaction.active
        assert (database.effects, database.recorded) == ([], None)
        transaction.call(write, 9, "connection")
        assert transaction.commit([Advance(FIRST, mine, 3)]) == {}
        assert (database.effects, database.recorded) == ([9], 3)

    def test_one_that_is_still_being_made_is_waited_for(
        self, database: Database, make: Callable[..., Transaction]
    ) -> None:
        at_commit(database, f"PERFORM pg_sleep({HELD_UP_SECONDS})")
        advances = [Advance(FIRST, database.claim(), 3)]
        assert database.server is not None
        with closing(Proxy(database.server.port)) as proxy:
            transaction = make(behind(proxy, database))
            transaction.call(write, 1, "connection")
            proxy.cut_at_commit = "after"
            with pytest.raises(CommitUnknown):
                transaction.commit(advances)
            assert database.effects == []  # not yet
            assert transaction.settle(advances) is True
        assert (database.effects, database.recorded) == ([1], 3)

    def test_of_a_host_that_froze_the_successor_does_not_wait_for_ever(
        self, database: Database, make: Callable[..., Transaction]
    ) -> None:
        """It has advanced and holds the row, and its COMMIT does not come."""
        advances = [Advance(FIRST, database.claim(), 3)]
        assert database.server is not None
        with closing(FrozenProxy(database.server.port)) as proxy, ThreadPoolExecutor(1) as frozen:
            transaction = make(behind(proxy, database), 1.0)
            transaction.call(write, 1, "connection")
            proxy.freezes = True
            committing = frozen.submit(transaction.commit, advances)
            wait_until(lambda: idle_in_transaction(database), 10, "the advance")
            began = time.monotonic()
            claim = database.store.claim([FIRST], "host-b")[FIRST]
            assert time.monotonic() - began < 2
            assert (claim.assignment_epoch, claim.next_offset) == (2, None)
            with pytest.raises(CommitUnknown):
                committing.result(10)
            proxy.freezes = False
            assert transaction.settle(advances) is False
            transaction.call(write, 1, "connection")
            assert isinstance(transaction.commit(advances)[FIRST], StaleAssignment)
        assert (database.effects, database.recorded) == ([], None)


def idle_in_transaction(database: Database) -> bool:
    """Whether someone is, after an advance."""
    assert database.server is not None
    return bool(
        database.server.execute(
            f"SELECT 1 FROM pg_stat_activity WHERE datname = '{database.name}' AND state = 'idle in transaction' "
            "AND query LIKE '%UPDATE kafkasrcd_offsets%'"
        )
    )


class TestReached:
    @on_both
    def test_is_what_its_slot_has(self, database: Database, make: Callable[..., Transaction]) -> None:
        mine = database.store.claim([FIRST], "host-a", BY_KEY)[FIRST].assignment_epoch
        transaction = make(database.url)
        assert transaction_reached(transaction, Advance(FIRST, mine, 0, 1, BY_KEY)) == 0
        assert database.store.advance([Advance(FIRST, mine, 7 + slot, slot, BY_KEY) for slot in range(2)]) == {}
        assert transaction_reached(transaction, Advance(FIRST, mine, 0, 1, BY_KEY)) == 8
        assert transaction_reached(transaction, Advance(FIRST, mine, 0, 2, BY_KEY)) is None
        assert transaction_reached(transaction, Advance(FIRST, mine, 0)) is None
        assert transaction_reached(transaction, Advance(TopicPartition("orders", 9), mine, 0)) is None
        database.store.claim([FIRST], "host-b", BY_KEY)
        assert transaction_reached(transaction, Advance(FIRST, mine, 0, 1, BY_KEY)) is None

    @pytest.mark.postgres
    def test_waits_for_a_transaction_of_a_process_that_was_killed(
        self, database: Database, make: Callable[..., Transaction]
    ) -> None:
        mine = database.claim()
        transaction = make(database.url)
        with psycopg.connect(database.url) as committing:
            committing.execute("UPDATE kafkasrcd_offsets SET next_offset = 3")
            committed = threading.Timer(0.5, committing.commit)
            committed.start()
            assert transaction_reached(transaction, Advance(FIRST, mine, 0)) == 3
            committed.join()


def transaction_reached(transaction: Transaction, asked: Advance) -> int | None:
    """And give back what is locked for it."""
    try:
        if isinstance(transaction, Awaited):
            return transaction.runner.run(transaction.transaction.reached(asked))
        assert isinstance(transaction, EffectsTransaction)
        return transaction.reached(asked)
    finally:
        transaction.rollback()


@on_both
def test_processes_with_open_transactions_leave_others_a_turn(database: Database) -> None:
    """SQLite has one writer: all the others wait, and nobody is told that the database is locked."""
    url, timeout_ms = database.url, store_processes.BUSY_TIMEOUT_MS
    with closing(open_store(url, store_processes.GROUP, timeout_ms, shared_with_effects=True)) as store:
        names = PARTITIONS[:PROCESSES]
        claims = store.claim(names, "host-a")
        started = [start(store_processes.handle_until_refused, url, str(number)) for number in range(PROCESSES)]
        for name, (_, pipe) in zip(names, started, strict=True):
            pipe.send(claims[name].assignment_epoch)
        wait_until(lambda: least_handled(database) >= 3, 30, "effects of all of them")
        for _ in range(5):
            began = time.monotonic()
            store.claim(PARTITIONS[PROCESSES : PROCESSES + 4], "host-b")
            assert time.monotonic() - began < FAIR_SECONDS
            began = time.monotonic()
            open_store(url, store_processes.GROUP, timeout_ms, shared_with_effects=True).close()
            assert time.monotonic() - began < FAIR_SECONDS, "to open it is to write, too"
        claims = store.claim(names, "host-b")
        said = [answer(process, pipe) for process, pipe in started]
        committed = [claims[name].next_offset or 0 for name in names]
        assert said == committed
        assert database.effects == [
            number * MOST_EFFECTS + effect for number, count in enumerate(committed) for effect in range(count)
        ]


@on_sqlite
def test_who_waits_longest_writes_next(database: Database) -> None:
    waiting: list[tuple[BaseProcess, Pipe]] = []
    with closing(EffectsTransaction(database.url, GROUP, BUSY_TIMEOUT_MS, IDLE_SECONDS)) as transaction:
        transaction.call(write, 100, "connection")
        for number in range(5):
            waiting.append(
                start(store_processes.take_one_turn, database.url, str(number), "async" if number % 2 else "")
            )
            wait_until(lambda: waits_in_line(waiting[-1][0]), 30, "it to wait in line")
        assert transaction.commit([]) == {}
        # At once again, and yet behind all of them.
        transaction.call(write, 101, "connection")
        assert database.effects == [0, 1, 2, 3, 4, 100]
        transaction.rollback()
    assert [answer(process, pipe) for process, pipe in waiting] == [1, 2, 3, 4, 5]


def waits_in_line(process: BaseProcess) -> bool:
    """Whether it holds a lock for writing, which before its turn is a place in the queue."""
    locks = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return any(fields[1:5] == ["POSIX", "ADVISORY", "WRITE", str(process.pid)] for fields in locks)


def least_handled(database: Database) -> int:
    handled = [number // MOST_EFFECTS for number in database.effects]
    return min(handled.count(number) for number in range(PROCESSES))


@asynccontextmanager
async def an_async_transaction(database: Database) -> AsyncGenerator[AsyncEffectsTransaction]:
    transaction = AsyncEffectsTransaction(database.url, GROUP, BUSY_TIMEOUT_MS, IDLE_SECONDS)
    try:
        yield transaction
    finally:
        await transaction.close()


async def write_async(number: int, tx: Any) -> None:
    await tx.execute(text("INSERT INTO effects VALUES (:number)"), {"number": number})


def nobody_is_in_the_way(database: Database) -> bool:
    """Whether whoever writes next need not wait, and no connection is left in a transaction."""
    if database.server is not None:
        others = (
            f"SELECT 1 FROM pg_stat_activity WHERE datname = '{database.name}' AND state <> 'idle' "
            "AND pid <> pg_backend_pid()"
        )
        return not database.server.execute(others)
    with closing(sqlite3.connect(database.name, timeout=0, isolation_level=None)) as other:
        try:
            other.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
    return True


class TestCancelled:
    @on_both
    def test_again_while_the_first_is_seen_to(self, database: Database) -> None:
        async def main() -> None:
            async with an_async_transaction(database) as transaction:
                entered = asyncio.Event()

                async def linger(number: int, tx: AsyncConnection) -> None:
                    await write_async(number, tx)
                    entered.set()
                    await asyncio.sleep(60)

                call = asyncio.create_task(transaction.call(linger, 1, "connection"))
                await entered.wait()
                while not call.done():
                    call.cancel()
                    await asyncio.sleep(0)
                with pytest.raises(asyncio.CancelledError):
                    await call
                await asyncio.to_thread(wait_until, lambda: nobody_is_in_the_way(database), 5, "the connection to end")

        asyncio.run(main())
        assert database.effects == []

    @on_sqlite
    def test_while_it_waits_for_its_turn_to_write(self, database: Database) -> None:
        """Its BEGIN is carried out when the lock is free, and nobody would end what it began."""

        async def main() -> None:
            async with an_async_transaction(database) as transaction:
                with closing(sqlite3.connect(database.name, isolation_level=None)) as other:
                    other.execute("BEGIN IMMEDIATE")
                    call = asyncio.create_task(transaction.call(write_async, 1, "connection"))
                    await asyncio.sleep(0.3)
                    call.cancel()
                    await asyncio.sleep(0.1)
                    other.execute("ROLLBACK")
                    with pytest.raises(asyncio.CancelledError):
                        await call
                assert nobody_is_in_the_way(database)
                await transaction.call(write_async, 2, "connection")
                assert await transaction.commit([]) == {}

        asyncio.run(main())
        assert database.effects == [2]

    @pytest.mark.postgres
    def test_in_a_commit(self, database: Database) -> None:
        mine = database.claim()

        async def main() -> None:
            async with an_async_transaction(database) as transaction:
                await transaction.call(write_async, 1, "connection")
                with psycopg.connect(database.url) as other:
                    other.execute("SELECT FROM kafkasrcd_offsets FOR UPDATE")
                    commit = asyncio.create_task(transaction.commit([Advance(FIRST, mine, 3)]))
                    await asyncio.sleep(0.3)
                    commit.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await commit
                assert nobody_is_in_the_way(database)
                with pytest.raises(StoreUnavailable, match="cancelled"):
                    await transaction.commit([Advance(FIRST, mine, 4)])
                assert await transaction.settle([Advance(FIRST, mine, 3)]) is False

        asyncio.run(main())
        assert (database.effects, database.recorded) == ([], None)


class TestAsyncHandlers:
    """Written as users write them; what else holds for plain ones is in ``test_transactions``."""

    @on_both
    def test_with_objects_in_a_session(self, database: Database) -> None:
        async def handler(number: int, session: AsyncSession) -> int:
            session.add(Effect(number=number))
            await session.flush()
            if number == 2:
                raise LookupError
            if number == 3:
                await session.rollback()
            if number == 4:
                await session.commit()
            session.add(Effect(number=number + 10))
            return number

        async def main() -> None:
            async with an_async_transaction(database) as transaction:
                for number in (1, 2, 3, 4):
                    with pytest.raises(LookupError) if number == 2 else contextlib.nullcontext():
                        assert await transaction.call(handler, number, "session") == number
                assert await transaction.commit([]) == {}

        asyncio.run(main())
        assert database.effects == [1, 4, 11, 13, 14]

    @on_both
    def test_with_a_savepoint(self, database: Database) -> None:
        async def handler(number: int, tx: AsyncConnection) -> None:
            await write_async(number, tx)
            with suppress(LookupError):
                async with tx.begin_nested():
                    await write_async(number + 10, tx)
                    raise LookupError
            async with tx.begin_nested():
                await write_async(number + 20, tx)

        async def main() -> None:
            async with an_async_transaction(database) as transaction:
                await transaction.call(handler, 1, "connection")
                await transaction.call(handler, 2, "connection")
                assert await transaction.commit([]) == {}

        asyncio.run(main())
        assert database.effects == [1, 2, 21, 22]


@pytest.mark.postgres
def test_a_loss_that_only_the_driver_has_noticed(database: Database) -> None:
    """A handler may use psycopg's own connection, whose errors SQLAlchemy does not see."""

    def use_the_driver(number: int, tx: Connection) -> None:
        driver = tx.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        assert database.cut() == 1
        with suppress(psycopg.Error):
            driver.execute("INSERT INTO effects VALUES (%s)", (number,))
        if number == 2:
            raise LookupError

    with closing(EffectsTransaction(database.url, GROUP, BUSY_TIMEOUT_MS, IDLE_SECONDS)) as transaction:
        for number in (1, 2):
            with pytest.raises(StoreUnavailable, match="the connection was lost"):
                transaction.call(use_the_driver, number, "connection")
            assert not transaction.active
        transaction.call(write, 3, "connection")
        assert transaction.commit([]) == {}
    assert database.effects == [3]
