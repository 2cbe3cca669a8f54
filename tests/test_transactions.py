"""A handler process's transaction: effects and offsets together, or neither, on both databases, plain and async."""

import asyncio
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, Integer, create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from kafkasrcd.errors import HandlerError, OffsetWentBackwards, StaleAssignment, StoreError, StoreUnavailable
from kafkasrcd.storage.async_transaction import AsyncEffectsTransaction
from kafkasrcd.storage.offset_store import Advance, Layout, OffsetStore, TopicPartition
from kafkasrcd.storage.opening import open_store
from kafkasrcd.storage.transaction import CommitUnknown, EffectsTransaction, Kind, TransactionEnded
from tests import store_processes
from tests.awaited import Awaited, Transaction
from tests.postgres import PostgresServer
from tests.test_sqlite_store import answer, start
from tests.waiting import wait_until, wait_until_equal

GROUP = "billing"
BUSY_TIMEOUT_MS = 2_000
IDLE_SECONDS = 30.0
FIRST = TopicPartition("orders", 0)
SECOND = TopicPartition("orders", 1)
BY_KEY = Layout("key", 2)


class Base(DeclarativeBase):
    pass


class Effect(Base):
    """What the handlers under test write."""

    __tablename__ = "effects"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)


class Database:
    """One database that holds the store and the effects."""

    def __init__(self, url: str, server: PostgresServer | None) -> None:
        self.url = url
        self.server = server
        self.engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        Base.metadata.create_all(self.engine)
        self.store: OffsetStore = open_store(url, GROUP, BUSY_TIMEOUT_MS, shared_with_effects=True)

    @property
    def effects(self) -> list[int]:
        """Those that are committed."""
        with self.engine.connect() as connection:
            return list(connection.scalars(text("SELECT number FROM effects ORDER BY number")))

    @property
    def recorded(self) -> int | None:
        """Of FIRST."""
        return {row.topic_partition: row.next_offset for row in self.store.offsets()}.get(FIRST)

    def claim(self, *names: TopicPartition, owner: str = "host-a") -> int:
        """The epoch; of the last, where they differ."""
        return [claim.assignment_epoch for claim in self.store.claim(names or [FIRST], owner).values()][-1]

    def cut(self) -> int:
        """Cut the connections of transactions; how many there were."""
        assert self.server is not None
        return len(
            self.server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' "
                f"AND datname = '{self.name}'"
            )
        )

    @property
    def name(self) -> str:
        return str(self.engine.url.database)

    def close(self) -> None:
        self.store.close()
        self.engine.dispose()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(f"sqlite:///{tmp_path}/state.db", None)) as database:
        yield database


@pytest.fixture
def postgresql_database(postgres: PostgresServer) -> Iterator[Database]:
    with closing(Database(postgres.url(postgres.create_database()), postgres)) as database:
        yield database


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest) -> Database:
    found: Database = request.getfixturevalue(f"{request.param}_database")
    return found


@pytest.fixture(params=[EffectsTransaction, Awaited], ids=["plain", "async"])
def kind_of_transaction(request: pytest.FixtureRequest) -> type[EffectsTransaction] | type[Awaited]:
    kind: type[EffectsTransaction] | type[Awaited] = request.param
    return kind


Make = Callable[..., Transaction]


@pytest.fixture
def make(kind_of_transaction: type[EffectsTransaction] | type[Awaited]) -> Iterator[Make]:
    made: list[Transaction] = []

    def made_and_closed(url: str, idle_seconds: float = IDLE_SECONDS) -> Transaction:
        made.append(kind_of_transaction(url, GROUP, BUSY_TIMEOUT_MS, idle_seconds))
        return made[-1]

    yield made_and_closed
    for transaction in made:
        transaction.close()


@pytest.fixture
def transaction(make: Make, database: Database) -> Transaction:
    return make(database.url)


def write(number: int, tx: Connection | Session) -> int:
    tx.execute(text("INSERT INTO effects VALUES (:number)"), {"number": number})
    return number


def write_and_raise(number: int, tx: Connection | Session) -> None:
    write(number, tx)
    raise LookupError("no such customer")


def nothing(_: object, __: object) -> None:
    pass


class TestTogether:
    def test_effects_and_offset_are_there_at_once(self, database: Database, transaction: Transaction) -> None:
        mine = database.claim()
        active = [transaction.active]
        assert transaction.call(write, 1, "connection") == 1
        active.append(transaction.active)
        transaction.call(write, 2, "session")
        assert (database.effects, database.recorded) == ([], None)
        assert transaction.commit([Advance(FIRST, mine, 3)]) == {}
        assert (database.effects, database.recorded) == ([1, 2], 3)
        assert [*active, transaction.active] == [False, True, False]

    def test_one_transaction_after_the_other(self, database: Database, transaction: Transaction) -> None:
        mine = database.claim()
        for number in range(1, 4):
            transaction.call(write, number, "connection")
            assert transaction.commit([Advance(FIRST, mine, number)]) == {}
        assert (database.effects, database.recorded) == ([1, 2, 3], 3)

    def test_several_slots_and_partitions(self, database: Database, transaction: Transaction) -> None:
        claims = database.store.claim([FIRST, SECOND], "host-a", BY_KEY)
        transaction.call(write, 1, "connection")
        advances = [
            Advance(name, claims[name].assignment_epoch, 7 + slot, slot, BY_KEY)
            for name in (SECOND, FIRST)
            for slot in range(2)
        ]
        assert transaction.commit(advances) == {}
        assert {row.next_offset for row in database.store.offsets()} == {7}

    def test_without_a_call(self, database: Database, transaction: Transaction) -> None:
        assert transaction.commit([Advance(FIRST, database.claim(), 3)]) == {}
        assert database.recorded == 3

    def test_without_an_advance(self, database: Database, transaction: Transaction) -> None:
        transaction.call(write, 1, "connection")
        assert transaction.commit([]) == {}
        assert database.effects == [1]

    def test_nothing_is_kept_of_what_is_rolled_back(self, database: Database, transaction: Transaction) -> None:
        mine = database.claim()
        transaction.call(write, 1, "connection")
        transaction.rollback()
        assert not transaction.active
        transaction.rollback()
        transaction.call(write, 2, "connection")
        assert transaction.commit([Advance(FIRST, mine, 3)]) == {}
        assert database.effects == [2]

    def test_nothing_is_kept_of_what_is_closed(self, database: Database, transaction: Transaction) -> None:
        transaction.call(write, 1, "session")
        transaction.rollback()
        assert database.effects == []


class TestRefused:
    @pytest.mark.parametrize(
        ("epoch_back", "next_offset", "error"), [(1, 9, StaleAssignment), (0, 4, OffsetWentBackwards)]
    )
    def test_takes_the_effects_with_it(
        self,
        database: Database,
        transaction: Transaction,
        epoch_back: int,
        next_offset: int,
        error: type[StoreError],
    ) -> None:
        database.claim(FIRST, SECOND)
        mine = database.claim(FIRST, SECOND)
        assert database.store.advance([Advance(FIRST, mine, 5)]) == {}
        transaction.call(write, 1, "connection")
        refusals = transaction.commit([Advance(SECOND, mine, 8), Advance(FIRST, mine - epoch_back, next_offset)])
        assert {name: type(refusal) for name, refusal in refusals.items()} == {FIRST: error}
        assert not transaction.active
        assert {row.next_offset for row in database.store.offsets()} == {5, None}
        transaction.call(write, 2, "connection")
        assert transaction.commit([Advance(FIRST, mine, 9)]) == {}
        assert database.effects == [2]

    @pytest.mark.postgres
    def test_by_a_claim_that_is_being_made(self, postgresql_database: Database, make: Make) -> None:
        """Its commit comes after this one's look at the row, and before its end."""
        mine = postgresql_database.claim()
        transaction = make(postgresql_database.url)
        transaction.call(write, 1, "connection")
        with psycopg.connect(postgresql_database.url) as claiming:
            claiming.execute("UPDATE kafkasrcd_offsets SET assignment_epoch = assignment_epoch + 1, owner = 'host-b'")
            committed = threading.Timer(0.5, claiming.commit)
            committed.start()
            began = time.monotonic()
            refusals = transaction.commit([Advance(FIRST, mine, 3)])
            assert time.monotonic() - began > 0.3
            committed.join()
        assert isinstance(refusals[FIRST], StaleAssignment)
        assert postgresql_database.effects == []


class TestHandlerRaises:
    @pytest.mark.parametrize("kind", ["connection", "session"])
    def test_only_its_call_is_undone(self, database: Database, transaction: Transaction, kind: Kind) -> None:
        mine = database.claim()
        transaction.call(write, 1, kind)
        with pytest.raises(LookupError, match="no such customer"):
            transaction.call(write_and_raise, 2, kind)
        transaction.call(write, 3, kind)
        with pytest.raises(LookupError):
            transaction.call(write_and_raise, 4, kind)
        assert transaction.commit([Advance(FIRST, mine, 5)]) == {}
        assert database.effects == [1, 3]

    def test_the_first(self, database: Database, transaction: Transaction) -> None:
        with pytest.raises(LookupError):
            transaction.call(write_and_raise, 1, "connection")
        transaction.call(write, 2, "connection")
        assert transaction.commit([]) == {}
        assert database.effects == [2]

    @pytest.mark.parametrize("kind", ["connection", "session"])
    def test_an_error_of_the_database(self, database: Database, transaction: Transaction, kind: Kind) -> None:
        transaction.call(write, 1, kind)
        with pytest.raises(IntegrityError):
            transaction.call(write, 1, kind)
        transaction.call(write, 2, kind)
        assert transaction.commit([]) == {}
        assert database.effects == [1, 2]

    def test_what_a_session_flushes_after_it(self, database: Database, transaction: Transaction) -> None:
        def add(number: int, session: Session) -> None:
            session.add(Effect(number=number))

        transaction.call(add, 1, "session")
        with pytest.raises(IntegrityError):
            transaction.call(add, 1, "session")
        transaction.call(add, 2, "session")
        assert transaction.commit([]) == {}
        assert database.effects == [1, 2]

    def test_after_a_session_was_committed(self, database: Database, transaction: Transaction) -> None:
        def commit_half(number: int, session: Session) -> None:
            write(number, session)
            session.commit()
            write(number + 1, session)
            if number == 10:
                raise LookupError

        transaction.call(commit_half, 1, "session")
        with pytest.raises(LookupError):
            transaction.call(commit_half, 10, "session")
        assert database.effects == []
        assert transaction.commit([]) == {}
        assert database.effects == [1, 2]

    def test_after_a_session_was_rolled_back_or_closed(self, database: Database, transaction: Transaction) -> None:
        def write_the_second(number: int, session: Session) -> None:
            write(number, session)
            session.rollback()
            write(number + 1, session)
            session.commit()
            session.close()

        transaction.call(write, 1, "session")
        transaction.call(write_the_second, 2, "session")
        assert transaction.commit([]) == {}
        assert database.effects == [1, 3]

    def test_with_savepoints_left_open(self, database: Database, transaction: Transaction) -> None:
        def leave_open(number: int, tx: Connection) -> None:
            tx.begin_nested()
            write(number, tx)
            tx.begin_nested()
            if number == 2:
                raise LookupError

        transaction.call(leave_open, 1, "connection")
        with pytest.raises(LookupError):
            transaction.call(leave_open, 2, "connection")
        transaction.call(leave_open, 3, "connection")
        assert transaction.commit([]) == {}
        assert database.effects == [1, 3]

    def test_with_savepoints_of_its_own(self, database: Database, transaction: Transaction) -> None:
        def try_both(number: int, tx: Connection) -> None:
            with suppress(LookupError), tx.begin_nested():
                write_and_raise(number, tx)
            with tx.begin_nested():
                write(number + 1, tx)

        transaction.call(try_both, 1, "connection")
        transaction.call(try_both, 3, "connection")
        assert transaction.commit([]) == {}
        assert database.effects == [2, 4]

    def test_an_error_of_another_database_is_the_handlers_own(
        self, database: Database, transaction: Transaction, tmp_path: Path
    ) -> None:
        """Nothing is wrong with ours, however much with that one."""

        def use_another(_: object, __: Connection) -> None:
            with create_engine(f"sqlite:///{tmp_path}/no/such/folder/x.db").connect():
                pass

        def use_another_server(_: object, __: Connection) -> None:
            with create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nowhere").connect():
                pass

        transaction.call(write, 1, "connection")
        for handler in (use_another, use_another_server):
            with pytest.raises(OperationalError):
                transaction.call(handler, 2, "connection")
        assert transaction.commit([]) == {}
        assert database.effects == [1]

    @pytest.mark.postgres
    @pytest.mark.parametrize(
        "statement",
        [
            "SELECT * FROM secrets",
            "SELECT number FROM effects FOR UPDATE NOWAIT",
            "SELECT 1 / 0",
            "SET search_path TO nowhere; CREATE TABLE x (y int)",
        ],
    )
    def test_an_error_about_its_own_statement_is_the_handlers_own(
        self, postgresql_database: Database, make: Make, statement: str
    ) -> None:
        """No privilege, a lock it does not wait for: trying everything again since the last commit is no cure."""
        database, server = postgresql_database, postgresql_database.server
        assert server is not None
        user = f"user_{database.name}"
        for sql in (
            f"CREATE ROLE {user} LOGIN",
            "CREATE TABLE secrets (x int)",
            f"GRANT ALL ON effects, kafkasrcd_offsets TO {user}",
            "INSERT INTO effects VALUES (7)",
        ):
            server.execute(sql, database.name)
        transaction = make(database.url.replace("postgres@", f"{user}@"))
        transaction.call(write, 1, "connection")
        with psycopg.connect(database.url) as other:
            other.execute("SELECT number FROM effects WHERE number = 7 FOR UPDATE")
            with pytest.raises(DBAPIError):
                transaction.call(lambda _, tx: tx.exec_driver_sql(statement), 2, "connection")
        assert transaction.commit([]) == {}
        assert database.effects == [1, 7]


class TestHandlerSwallows:
    def test_an_error_of_the_database(self, database: Database, transaction: Transaction) -> None:
        def swallow(number: int, tx: Connection) -> None:
            write(number, tx)
            with suppress(IntegrityError):
                write(1, tx)

        transaction.call(write, 1, "connection")
        if database.server is None:
            transaction.call(swallow, 2, "connection")  # SQLite undoes the failed statement, and that is all
        else:
            with pytest.raises(HandlerError, match="begin_nested"):
                transaction.call(swallow, 2, "connection")
        transaction.call(write, 3, "connection")
        assert transaction.commit([]) == {}
        assert database.effects == [1, 2, 3] if database.server is None else [1, 3]

    @pytest.mark.parametrize("method", ["commit", "rollback"])
    def test_the_end_of_the_transaction_that_it_asked_for(
        self, database: Database, transaction: Transaction, method: str
    ) -> None:
        def end(number: int, tx: Connection) -> None:
            write(number, tx)
            getattr(tx, method)()

        def end_and_go_on(number: int, tx: Connection) -> None:
            with suppress(HandlerError):
                end(number, tx)
            write(number + 1, tx)

        transaction.call(write, 1, "connection")
        with pytest.raises(HandlerError, match="kafkasrcd commits"):
            transaction.call(end, 2, "connection")
        with suppress(DBAPIError, SQLAlchemyError):
            transaction.call(end_and_go_on, 3, "connection")
        assert database.effects == []
        transaction.call(write, 5, "connection")
        assert transaction.commit([]) == {}
        assert set(database.effects) in ({1, 5}, {1, 3, 4, 5})

    def test_a_connection_that_it_closed(self, database: Database, transaction: Transaction) -> None:
        transaction.call(write, 1, "connection")
        with pytest.raises(HandlerError, match="kafkasrcd commits"):
            transaction.call(lambda _, tx: tx.close(), None, "connection")
        assert not transaction.active
        transaction.call(write, 2, "connection")
        assert transaction.commit([]) == {}
        assert database.effects == [2]

    @pytest.mark.parametrize("statements", [["COMMIT"], ["ROLLBACK"], ["COMMIT", "BEGIN"], ["ROLLBACK", "BEGIN"]])
    @pytest.mark.parametrize("then_raises", [False, True])
    def test_the_transaction_that_it_ended_in_sql(
        self, database: Database, transaction: Transaction, statements: list[str], then_raises: bool
    ) -> None:
        """At the latest the commit must not take what is left for the whole."""
        mine = database.claim()

        def end(number: int, tx: Connection) -> None:
            write(number, tx)
            for statement in statements:
                tx.exec_driver_sql(statement)
            if then_raises:
                raise LookupError

        transaction.call(write, 1, "connection")
        with pytest.raises(TransactionEnded, match="COMMIT or ROLLBACK"):
            transaction.call(end, 2, "connection")
        assert not transaction.active
        assert database.effects == ([1, 2] if statements[0] == "COMMIT" else [])
        transaction.call(write, 5, "connection")
        assert transaction.commit([Advance(FIRST, mine, 5)]) == {}
        assert database.recorded == 5

    @pytest.mark.parametrize("in_one_string", [False, True])
    def test_the_transaction_that_it_ended_unseen(
        self, database: Database, transaction: Transaction, in_one_string: bool
    ) -> None:
        """Below SQLAlchemy, or two statements at once: the commit finds that what it has is not what the calls did."""
        mine = database.claim()

        def end(_: object, tx: Connection) -> None:
            if in_one_string and database.server is not None:
                tx.exec_driver_sql("ROLLBACK; BEGIN")
            else:
                cursor = tx.connection.cursor()
                for statement in ("ROLLBACK", "BEGIN"):
                    cursor.execute(statement)
                cursor.close()

        transaction.call(write, 1, "connection")
        transaction.call(end, None, "connection")
        with pytest.raises(StoreUnavailable, match="kafkasrcd_call"):
            transaction.commit([Advance(FIRST, mine, 3)])
        assert not transaction.active
        assert (database.effects, database.recorded) == ([], None)


def cut(database: Database) -> None:
    assert database.cut() == 1


@pytest.mark.postgres
class TestConnectionLost:
    @pytest.fixture
    def database(self, postgresql_database: Database) -> Database:
        return postgresql_database

    def after_a_loss(self, database: Database, transaction: Transaction) -> None:
        """Nothing is kept, and everything since the last commit can be done again."""
        assert not transaction.active
        assert (database.effects, database.recorded) == ([], None)
        mine = database.claim()
        transaction.call(write, 1, "connection")
        assert transaction.commit([Advance(FIRST, mine, 1)]) == {}
        assert (database.effects, database.recorded) == ([1], 1)

    def test_between_two_calls(self, database: Database, transaction: Transaction) -> None:
        transaction.call(write, 1, "connection")
        cut(database)
        with pytest.raises(StoreUnavailable, match="PostgreSQL database"):
            transaction.call(write, 2, "connection")
        self.after_a_loss(database, transaction)

    @pytest.mark.parametrize("kind", ["connection", "session"])
    @pytest.mark.parametrize("then", ["", "swallows", "raises its own", "raises its own from None"])
    def test_in_a_call(self, database: Database, transaction: Transaction, kind: Kind, then: str) -> None:
        def lose(number: int, tx: Connection | Session) -> None:
            cut(database)
            try:
                write(number, tx)
            except DBAPIError:
                if not then:
                    raise
                if then == "raises its own":
                    raise LookupError  # noqa: B904 - as handlers do
                if then == "raises its own from None":
                    raise LookupError from None

        transaction.call(write, 1, kind)
        with pytest.raises(StoreUnavailable):
            transaction.call(lose, 2, kind)
        self.after_a_loss(database, transaction)

    def test_at_the_end_of_a_call(self, database: Database, transaction: Transaction) -> None:
        def lose(number: int, tx: Connection) -> None:
            write(number, tx)
            cut(database)

        transaction.call(write, 1, "connection")
        transaction.call(lose, 2, "connection")  # nobody has noticed
        with pytest.raises(StoreUnavailable):
            transaction.commit([Advance(FIRST, database.claim(), 3)])
        self.after_a_loss(database, transaction)

    def test_while_the_server_is_down(self, database: Database, transaction: Transaction) -> None:
        assert database.server is not None
        transaction.call(write, 1, "connection")
        database.server.stop(immediate=True)
        try:
            for _ in range(2):
                with pytest.raises(StoreUnavailable):
                    transaction.call(write, 2, "connection")
            with pytest.raises(StoreUnavailable):
                transaction.commit([])
            with pytest.raises(StoreUnavailable):
                transaction.settle([])
            transaction.rollback()
        finally:
            database.server.start()
        database.engine.dispose()
        wait_until(lambda: database.store.offsets() == [], 10, "the store", ignoring=(StoreUnavailable,))
        self.after_a_loss(database, transaction)

    def test_by_a_pause_that_takes_too_long(self, database: Database, make: Make) -> None:
        """A host that froze with the locks of its transaction: the successor need not wait for it."""
        transaction = make(database.url, 0.3)
        transaction.call(write, 1, "connection")
        time.sleep(1)
        with pytest.raises(StoreUnavailable, match="stood still"):
            transaction.call(write, 2, "connection")
        self.after_a_loss(database, transaction)

    def test_to_a_deadlock(self, database: Database, transaction: Transaction) -> None:
        assert database.server is not None
        database.server.execute("INSERT INTO effects VALUES (101), (102)", database.name)
        touch = "UPDATE effects SET number = number WHERE number = "
        transaction.call(lambda _, tx: tx.exec_driver_sql(f"{touch} 101"), None, "connection")
        with psycopg.connect(database.url) as other:
            other.execute("SET deadlock_timeout = '30s'")  # so that it is ours that is chosen
            other.execute(f"{touch} 102".encode())
            waiting = threading.Thread(target=lambda: other.execute(f"{touch} 101".encode()))
            waiting.start()
            wait_until(
                lambda: database.server and database.server.execute("SELECT 1 FROM pg_locks WHERE NOT granted"),
                10,
                "the other to wait",
            )
            with pytest.raises(StoreUnavailable, match="deadlock"):
                transaction.call(lambda _, tx: tx.exec_driver_sql(f"{touch} 102"), None, "connection")
            waiting.join()
        assert not transaction.active

    def test_to_a_failed_serialization(self, database: Database, transaction: Transaction) -> None:
        assert database.server is not None
        database.server.execute("INSERT INTO effects VALUES (101)", database.name)
        database.server.execute(f"ALTER DATABASE {database.name} SET default_transaction_isolation = 'repeatable read'")
        change = "UPDATE effects SET number = number + 100 WHERE number > 100"

        def look(_: object, tx: Connection) -> None:
            tx.exec_driver_sql("SELECT * FROM effects")

        transaction.call(look, None, "connection")
        database.server.execute(change, database.name)
        with pytest.raises(StoreUnavailable, match="serialize"):
            transaction.call(lambda _, tx: tx.exec_driver_sql(change), None, "connection")
        assert not transaction.active


class Proxy:
    """Between a client and the server: passes everything on, and cuts at a COMMIT if it is told to."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.cut_at_commit = ""
        """``before`` it has reached the server, or ``after``, with its answer; once."""
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in (self._listening, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._sockets += [client, server]
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(server, client), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while sent := client.recv(65536):
                cut, self.cut_at_commit = (self.cut_at_commit, "") if b"COMMIT" in sent else ("", self.cut_at_commit)
                if cut:
                    client.shutdown(socket.SHUT_RDWR)
                if cut != "before":
                    server.sendall(sent)
                if cut:
                    break
            server.shutdown(socket.SHUT_WR if sent else socket.SHUT_RDWR)

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while received := source.recv(65536):
                target.sendall(received)
            target.shutdown(socket.SHUT_RDWR)


@pytest.mark.postgres
class TestCommitUnknown:
    @pytest.fixture
    def database(self, postgresql_database: Database) -> Database:
        return postgresql_database

    @pytest.fixture
    def proxy(self, database: Database) -> Iterator[Proxy]:
        assert database.server is not None
        with closing(Proxy(database.server.port)) as proxy:
            yield proxy

    @pytest.fixture
    def transaction(self, make: Make, database: Database, proxy: Proxy) -> Transaction:
        assert database.server is not None
        return make(database.url.replace(str(database.server.port), str(proxy.port)))

    @pytest.mark.parametrize("cut_at", ["before", "after"])
    def test_is_found_out(self, database: Database, proxy: Proxy, transaction: Transaction, cut_at: str) -> None:
        advances = [Advance(FIRST, database.claim(), 3)]
        transaction.call(write, 1, "connection")
        proxy.cut_at_commit = cut_at
        with pytest.raises(CommitUnknown):
            transaction.commit(advances)
        assert not transaction.active
        made = cut_at == "after"
        if made:
            wait_until_equal(lambda: database.effects, [1], 10, "the effects")
        assert transaction.settle(advances) is made
        assert transaction.settle(advances) is made
        assert not transaction.active
        assert (database.effects, database.recorded) == (([1], 3) if made else ([], None))
        transaction.call(write, 2, "connection")
        assert transaction.commit([Advance(FIRST, 1, 4)]) == {}

    @pytest.mark.parametrize(("successor_at", "made"), [(None, False), (2, False), (3, True), (5, True)])
    def test_after_another_claim(
        self, database: Database, proxy: Proxy, transaction: Transaction, successor_at: int | None, made: bool
    ) -> None:
        advances = [Advance(FIRST, database.claim(), 3)]
        transaction.call(write, 1, "connection")
        proxy.cut_at_commit = "before"
        with pytest.raises(CommitUnknown):
            transaction.commit(advances)
        successor = database.claim(owner="host-b")
        if successor_at is not None:
            assert database.store.advance([Advance(FIRST, successor, successor_at)]) == {}
        assert transaction.settle(advances) is made

    def test_waits_for_a_commit_that_the_server_is_still_making(
        self, database: Database, transaction: Transaction
    ) -> None:
        mine = database.claim()
        with psycopg.connect(database.url) as committing:
            committing.execute("UPDATE kafkasrcd_offsets SET next_offset = 3")
            committed = threading.Timer(0.5, committing.commit)
            committed.start()
            assert transaction.settle([Advance(FIRST, mine, 3)]) is True
            committed.join()


class TestSqlite:
    def test_while_another_process_writes(self, sqlite_database: Database, make: Make, tmp_path: Path) -> None:
        transaction = make(sqlite_database.url)
        with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match=r"state\.db was locked .* 2000 ms"):
                transaction.call(write, 1, "connection")
            assert time.monotonic() - began >= BUSY_TIMEOUT_MS / 1000
            assert not transaction.active
            other.execute("ROLLBACK")
        transaction.call(write, 1, "connection")
        assert transaction.commit([]) == {}
        assert sqlite_database.effects == [1]

    def test_while_the_file_is_gone(self, sqlite_database: Database, make: Make, tmp_path: Path) -> None:
        transaction = make(sqlite_database.url)
        mine = sqlite_database.claim()
        transaction.call(write, 1, "connection")
        path = tmp_path / "state.db"
        path.rename(tmp_path / "elsewhere.db")
        with pytest.raises(StoreUnavailable, match=r"state\.db was moved, deleted or replaced"):
            transaction.commit([Advance(FIRST, mine, 1)])
        with pytest.raises(StoreUnavailable, match=r"state\.db"):
            transaction.call(write, 1, "connection")
        assert not path.exists(), "a new, empty database would be taken for the store"
        (tmp_path / "elsewhere.db").rename(path)
        transaction.call(write, 1, "connection")
        assert transaction.commit([Advance(FIRST, mine, 1)]) == {}

    @pytest.mark.parametrize("is_async", ["", "async"])
    def test_at_the_file_size_limit(self, sqlite_database: Database, is_async: str) -> None:
        """Whatever is in the database afterwards, effects and offset agree."""
        said = answer(*start(store_processes.write_until_the_file_size_limit, sqlite_database.url, is_async))
        assert "state.db" in said
        assert "file size limit (ulimit -f)" in said
        assert sqlite_database.recorded == len(sqlite_database.effects)


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
class TestCancelled:
    """A call that is cancelled, and one whose handler waited for something that was."""

    @pytest.fixture
    def database(self, kind: str, request: pytest.FixtureRequest) -> Database:
        found: Database = request.getfixturevalue(f"{kind}_database")
        return found

    def test_in_the_handler(self, database: Database) -> None:
        async def main() -> None:
            transaction = AsyncEffectsTransaction(database.url, GROUP, BUSY_TIMEOUT_MS, IDLE_SECONDS)
            entered = asyncio.Event()

            async def write(number: int, tx: AsyncConnection) -> None:
                await tx.execute(text("INSERT INTO effects VALUES (:number)"), {"number": number})
                if number == 2:
                    entered.set()
                    await asyncio.sleep(60)

            await transaction.call(write, 1, "connection")
            call = asyncio.create_task(transaction.call(write, 2, "connection"))
            await entered.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert not transaction.active
            # Whoever goes on all the same is told that what was done before is gone, too.
            with pytest.raises(StoreUnavailable, match="cancelled"):
                await transaction.commit([])
            await transaction.call(write, 3, "connection")
            assert await transaction.commit([]) == {}
            await transaction.close()

        asyncio.run(main())
        assert database.effects == [3]

    def test_in_a_statement(self, database: Database) -> None:
        slow = (
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 3000000) SELECT max(x) FROM n"
            if database.server is None
            else "SELECT pg_sleep(60)"
        )

        async def main() -> None:
            transaction = AsyncEffectsTransaction(database.url, GROUP, BUSY_TIMEOUT_MS, IDLE_SECONDS)

            async def linger(number: int, tx: AsyncConnection) -> None:
                await tx.execute(text("INSERT INTO effects VALUES (:number)"), {"number": number})
                await tx.exec_driver_sql(slow)

            call = asyncio.create_task(transaction.call(linger, 2, "connection"))
            await asyncio.sleep(0.3)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert not transaction.active
            with suppress(StoreUnavailable):
                await transaction.commit([])
            await transaction.close()

        asyncio.run(main())
        assert database.effects == []

    def test_only_what_the_handler_waited_for(self, database: Database) -> None:
        async def main() -> None:
            transaction = AsyncEffectsTransaction(database.url, GROUP, BUSY_TIMEOUT_MS, IDLE_SECONDS)

            async def write(number: int, tx: AsyncConnection) -> None:
                await tx.execute(text("INSERT INTO effects VALUES (:number)"), {"number": number})
                if number == 2:
                    other = asyncio.create_task(asyncio.sleep(60))
                    other.cancel()
                    await other

            await transaction.call(write, 1, "connection")
            with pytest.raises(asyncio.CancelledError):
                await transaction.call(write, 2, "connection")
            await transaction.call(write, 3, "connection")
            assert await transaction.commit([]) == {}
            await transaction.close()

        asyncio.run(main())
        assert database.effects == [1, 3]
