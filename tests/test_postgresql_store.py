"""What only the PostgreSQL store can get wrong: a server that is away or refuses, and other hosts at the same time."""

import itertools
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from statistics import median

import psycopg
import pytest

from kafkasrcd.errors import ConfigurationError, KafkasrcdError, StaleAssignment, StoreUnavailable
from kafkasrcd.storage import postgresql
from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.offset_rows import OffsetRows
from kafkasrcd.storage.offset_store import WHOLE, Advance, Layout, OffsetStore, TopicPartition
from kafkasrcd.storage.opening import open_store
from kafkasrcd.storage.postgresql import PostgresqlDatabase
from tests.postgres import WITH_PASSWORD, PostgresServer
from tests.waiting import wait_until

GROUP = "billing"
BUSY_TIMEOUT_MS = 5_000
FIRST = TopicPartition("orders", 0)
SECOND = TopicPartition("orders", 1)
HOSTS = 6
CLAIMS = 15
SECRET = "s3cr3t/@:"
SECRET_IN_URL = "s3cr3t%2F%40%3A"

pytestmark = pytest.mark.postgres


@pytest.fixture
def name(postgres: PostgresServer) -> str:
    """A database."""
    return postgres.create_database()


@pytest.fixture
def url(postgres: PostgresServer, name: str) -> str:
    return postgres.url(name)


@pytest.fixture
def store(url: str) -> Iterator[OffsetStore]:
    with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as opened:
        yield opened


@pytest.fixture
def hosts() -> Iterator[ThreadPoolExecutor]:
    """Other hosts; a test that fails lets go of what they wait for first."""
    with ThreadPoolExecutor(HOSTS) as threads:
        yield threads


def refused(url: str, kind: type[KafkasrcdError], *parts: str) -> None:
    """Opening ``url`` is refused by name, and nobody reads the password there."""
    with pytest.raises(KafkasrcdError) as raised:
        open_store(url, GROUP, BUSY_TIMEOUT_MS)
    said = str(raised.value)
    assert type(raised.value) is kind, said
    for part in parts:
        assert part in said
    for secret in (SECRET, SECRET_IN_URL, "s3cr3t"):
        assert secret not in f"{said} {raised.value.__cause__!r} {raised.value.__context__!r}"


def wait_until_waiting(postgres: PostgresServer, name: str, count: int = 1) -> None:
    """Wait until so many connections to the database called ``name`` wait for a lock."""
    wait_until(
        lambda: (
            postgres.execute(
                f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}' AND wait_event_type = 'Lock'"
            )
            == [(count,)]
        ),
        10,
        "a wait for a lock",
    )


class TestRefusedAtStart:
    @pytest.fixture
    def user(self, postgres: PostgresServer, name: str) -> str:
        """One who may do what every user may, and has to say a password."""
        if not postgres.execute(f"SELECT 1 FROM pg_roles WHERE rolname = '{WITH_PASSWORD}'"):
            postgres.execute(f"CREATE ROLE {WITH_PASSWORD} LOGIN PASSWORD '{SECRET}'")
        return WITH_PASSWORD

    def test_while_nobody_listens(self) -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]
            refused(
                f"postgresql://me:{SECRET_IN_URL}@127.0.0.1:{port}/kafka",
                StoreUnavailable,
                f"PostgreSQL database 'kafka' at 127.0.0.1:{port} cannot be reached",
                "start it, or check store.url",
            )

    def test_while_nobody_answers(self) -> None:
        """What the URL says of connections counts: 2 s here, and 5 without it."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            began = time.monotonic()
            refused(
                f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/kafka?connect_timeout=2",
                StoreUnavailable,
                "cannot be reached",
            )
            assert time.monotonic() - began < 4

    def test_a_host_that_nobody_knows(self) -> None:
        refused(f"postgresql://me:{SECRET_IN_URL}@nowhere.invalid/kafka", StoreUnavailable, "cannot be reached")

    def test_a_wrong_password(self, postgres: PostgresServer, name: str, user: str) -> None:
        refused(
            postgres.url(name, f"{user}:not-{SECRET_IN_URL}"), ConfigurationError, "refuses the password", "store.url"
        )

    def test_no_password(self, postgres: PostgresServer, name: str, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PGPASSWORD", raising=False)
        refused(postgres.url(name, user), ConfigurationError, "refuses the password")

    def test_the_right_password(self, postgres: PostgresServer, name: str, user: str) -> None:
        postgres.execute(f"GRANT CREATE ON SCHEMA public TO {user}", name)
        with closing(open_store(postgres.url(name, f"{user}:{SECRET_IN_URL}"), GROUP, BUSY_TIMEOUT_MS)) as store:
            assert store.claim([FIRST], "host-a")[FIRST].assignment_epoch == 1

    def test_a_user_who_may_not_create_tables(self, postgres: PostgresServer, name: str, user: str) -> None:
        refused(
            postgres.url(name, f"{user}:{SECRET_IN_URL}"), ConfigurationError, "grant the user USAGE and CREATE", name
        )

    def test_a_user_whom_nobody_created(self, postgres: PostgresServer, name: str) -> None:
        refused(postgres.url(name, f"stranger:{SECRET_IN_URL}"), ConfigurationError, "refuses this user")

    def test_a_database_that_nobody_created(self, postgres: PostgresServer) -> None:
        refused(postgres.url("nowhere"), ConfigurationError, "'nowhere'", "does not exist; create it")

    def test_a_database_that_has_no_connection_left(self, postgres: PostgresServer, name: str, user: str) -> None:
        postgres.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
        refused(postgres.url(name, f"{user}:{SECRET_IN_URL}"), StoreUnavailable, "has no connection left")

    def test_a_server_that_has_no_connection_left(self, postgres: PostgresServer, url: str) -> None:
        with ExitStack() as taken:
            with suppress(psycopg.OperationalError):
                for _ in range(1_000):
                    taken.enter_context(psycopg.connect(postgres.url()))
            refused(url, StoreUnavailable, "has no connection left", "max_connections")

    @pytest.mark.parametrize("is_new", [True, False])
    def test_a_database_that_can_only_be_read(
        self, postgres: PostgresServer, name: str, url: str, is_new: bool
    ) -> None:
        """At the start, not at the first claim. It may pass: a standby becomes the primary."""
        if not is_new:
            open_store(url, GROUP, BUSY_TIMEOUT_MS).close()
        postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        refused(url, StoreUnavailable, "is read-only", "name the primary")

    def test_a_server_that_is_too_old(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(postgresql, "_OLDEST", 990_000)
        refused(url, ConfigurationError, "is PostgreSQL 1", "needs 99 or newer")

    def test_without_the_driver(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "psycopg", None)
        refused(url, ConfigurationError, "pip install 'kafkasrcd[postgresql]'")


class TestUnavailable:
    @pytest.mark.parametrize("immediate", [False, True], ids=["shut down", "crashed"])
    def test_while_the_server_is_stopped(self, postgres: PostgresServer, store: OffsetStore, immediate: bool) -> None:
        mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
        postgres.stop(immediate=immediate)
        try:
            for call in calls(store, mine):
                with pytest.raises(StoreUnavailable, match=r"PostgreSQL database .* start it"):
                    call()
        finally:
            postgres.start()
        assert store.advance([Advance(FIRST, mine, 1)]) == {}
        assert store.claim([FIRST], "host-b")[FIRST].assignment_epoch == mine + 1, "an epoch was lost"

    def test_a_connection_that_was_cut_while_nothing_was_to_be_done_is_not_noticed(
        self, postgres: PostgresServer, store: OffsetStore, name: str
    ) -> None:
        mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
        for call in calls(store, mine):
            assert postgres.terminate_connections(name) == 1
            call()

    def test_a_connection_that_is_cut_in_a_call(
        self, postgres: PostgresServer, store: OffsetStore, url: str, name: str, hosts: ThreadPoolExecutor
    ) -> None:
        mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
        with psycopg.connect(url) as other:
            other.execute("SELECT FROM kafkasrcd_offsets FOR UPDATE")
            waiting = hosts.submit(store.advance, [Advance(FIRST, mine, 1)])
            wait_until_waiting(postgres, name)
            postgres.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = '{name}' AND wait_event_type = 'Lock'"
            )
            with pytest.raises(StoreUnavailable, match="was shut down"):
                waiting.result(10)
        assert [row.next_offset for row in store.offsets()] == [None]
        assert store.advance([Advance(FIRST, mine, 1)]) == {}

    def test_behind_a_lock_that_nobody_gives_back(self, url: str) -> None:
        with closing(open_store(url, GROUP, 200)) as store, psycopg.connect(url) as other:
            mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
            other.execute("SELECT FROM kafkasrcd_offsets FOR UPDATE")
            for call in calls(store, mine)[:3]:
                with pytest.raises(StoreUnavailable, match="kept us waiting for a lock; see pg_locks"):
                    call()
            assert store.offsets()[0].assignment_epoch == mine  # reading waits for nobody
            other.rollback()
            assert store.advance([Advance(FIRST, mine, 1)]) == {}

    def test_where_the_database_ends_long_statements(self, postgres: PostgresServer, url: str, name: str) -> None:
        postgres.execute(f"ALTER DATABASE {name} SET statement_timeout = 200")
        with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store, psycopg.connect(url) as other:
            mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
            other.execute("SELECT FROM kafkasrcd_offsets FOR UPDATE")
            for call in calls(store, mine)[:3]:
                with pytest.raises(StoreUnavailable, match="statement timeout"):
                    call()

    def test_where_the_tables_are_gone(self, postgres: PostgresServer, store: OffsetStore, name: str) -> None:
        mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
        postgres.execute("DROP TABLE kafkasrcd_offsets, kafkasrcd_offset_history", name)
        for call in calls(store, mine):
            with pytest.raises(StoreUnavailable, match="has lost its tables: restart"):
                call()

    def test_a_host_that_froze_with_its_locks_is_not_waited_for(
        self, store: OffsetStore, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
        monkeypatch.setattr(postgresql, "_IDLE_SECONDS", 0.5)
        rows = OffsetRows(GROUP, wall_clock_ms)
        with closing(PostgresqlDatabase(url, BUSY_TIMEOUT_MS)) as frozen:
            with ExitStack() as transaction:
                connection = transaction.enter_context(frozen.claiming(GROUP))
                rows.claim(connection, [FIRST], "host-b", WHOLE)
                assert store.claim([FIRST], "host-c")[FIRST].assignment_epoch == mine + 1
                with pytest.raises(StoreUnavailable, match="stood still"):
                    transaction.close()
            assert [(row.owner, row.next_offset) for row in store.offsets()] == [("host-c", None)]


def rows_at(at_ms: int) -> OffsetRows:
    return OffsetRows(GROUP, lambda: at_ms)


def calls(store: OffsetStore, mine: int) -> list[Callable[[], object]]:
    """One of each; the first three wait for a lock on FIRST's row."""
    return [
        lambda: store.advance([Advance(FIRST, mine, 1)]),
        lambda: store.restart({FIRST: (mine, 1)}),
        lambda: store.claim([FIRST], "host-a"),
        store.offsets,
        lambda: store.remember([FIRST]),
        lambda: store.history(FIRST),
    ]


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
class TestOtherHosts:
    """Whatever isolation the database gives transactions that ask for none."""

    @pytest.fixture
    def url(self, postgres: PostgresServer, name: str, isolation: str) -> str:
        postgres.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")
        return postgres.url(name)

    @pytest.fixture
    def other(self, url: str) -> Iterator[PostgresqlDatabase]:
        with closing(PostgresqlDatabase(url, BUSY_TIMEOUT_MS)) as database:
            yield database

    def test_an_advance_that_waits_for_a_claim_is_stale(
        self,
        postgres: PostgresServer,
        store: OffsetStore,
        other: PostgresqlDatabase,
        name: str,
        hosts: ThreadPoolExecutor,
    ) -> None:
        """It began before the claim's commit, when the row that it looks for was still there."""
        mine = store.claim([FIRST, SECOND], "host-a")[FIRST].assignment_epoch
        store.advance([Advance(FIRST, mine, 5)])
        with other.claiming(GROUP) as connection:
            claims = OffsetRows(GROUP, wall_clock_ms).claim(connection, [FIRST], "host-b", WHOLE)
            advancing = hosts.submit(store.advance, [Advance(FIRST, mine, 9), Advance(SECOND, mine, 9)])
            wait_until_waiting(postgres, name)
        refusals = advancing.result(10)
        assert {each: type(error) for each, error in refusals.items()} == {FIRST: StaleAssignment}
        assert "host-b" in str(refusals[FIRST])
        assert claims[FIRST].next_offset == 5
        assert [row.next_offset for row in store.offsets()] == [5, 9]

    def test_a_claim_that_waits_for_an_advance_reads_it(
        self,
        postgres: PostgresServer,
        store: OffsetStore,
        other: PostgresqlDatabase,
        name: str,
        hosts: ThreadPoolExecutor,
    ) -> None:
        mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
        with other.writing(durable=False) as connection:
            assert OffsetRows(GROUP, wall_clock_ms).advance(connection, [Advance(FIRST, mine, 9)]) == {}
            claiming = hosts.submit(store.claim, [FIRST], "host-b")
            wait_until_waiting(postgres, name)
        assert claiming.result(10)[FIRST].next_offset == 9

    def test_claims_at_once_have_epochs_of_their_own(self, url: str, hosts: ThreadPoolExecutor) -> None:
        """From the first on, which no row keeps apart."""
        ready = threading.Barrier(HOSTS)

        def claim(number: int) -> list[int]:
            with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
                names = [FIRST, SECOND] if number % 2 else [SECOND, FIRST]
                ready.wait(30)
                return [
                    store.claim(names, f"host-{number}", Layout("key", 1 + turn % 3))[FIRST].assignment_epoch
                    for turn in range(CLAIMS)
                ]

        given = list(hosts.map(claim, range(HOSTS)))
        assert all(epochs == sorted(epochs) for epochs in given)
        assert sorted(itertools.chain.from_iterable(given)) == list(range(1, HOSTS * CLAIMS + 1))

    def test_claims_of_other_groups_do_not_wait(self, url: str, other: PostgresqlDatabase) -> None:
        with other.claiming(GROUP) as connection:
            OffsetRows(GROUP, wall_clock_ms).claim(connection, [FIRST], "host-a", WHOLE)
            with closing(open_store(url, "audit", 300)) as store:
                assert store.claim([FIRST], "host-b")[FIRST].assignment_epoch == 1

    def test_two_write_down_one_minute(
        self,
        postgres: PostgresServer,
        store: OffsetStore,
        other: PostgresqlDatabase,
        name: str,
        hosts: ThreadPoolExecutor,
    ) -> None:
        mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
        store.advance([Advance(FIRST, mine, 5)])
        later: Future[None]
        with other.writing(durable=False) as connection:
            # Both of this minute; the other one also of the next, should it begin just now.
            now_ms = wall_clock_ms()
            for at_ms in (now_ms, now_ms + 60_000):
                rows_at(at_ms).remember(connection, [FIRST])
            later = hosts.submit(store.remember, [FIRST])
            wait_until_waiting(postgres, name)
        later.result(10)
        assert [next_offset for _, next_offset in store.history(FIRST)] == [5, 5]


class TestDurability:
    @pytest.mark.parametrize(
        ("default", "of_claims", "of_advances"),
        [("on", "on", "off"), ("off", "on", "off"), ("remote_apply", "remote_apply", "off")],
    )
    def test_claims_and_restarts_wait_for_the_disk_and_advances_do_not(
        self, postgres: PostgresServer, name: str, url: str, default: str, of_claims: str, of_advances: str
    ) -> None:
        postgres.execute(f"ALTER DATABASE {name} SET synchronous_commit = {default}")
        with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
            for statement in (
                "CREATE TABLE seen (setting text)",
                "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$",
                "CREATE TRIGGER see AFTER INSERT OR UPDATE ON kafkasrcd_offsets EXECUTE FUNCTION see()",
            ):
                postgres.execute(statement, name)

            def seen() -> set[str]:
                return {setting for (setting,) in postgres.execute("DELETE FROM seen RETURNING setting", name)}

            mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
            assert seen() == {of_claims}
            assert store.advance([Advance(FIRST, mine, 1)]) == {}
            assert seen() == {of_advances}
            assert store.restart({FIRST: (mine, 0)}) == {}
            assert seen() == {of_claims}

    def test_five_hundred_partitions_are_one_statement(self, store: OffsetStore) -> None:
        """8 ms where it was measured; one by one it is 100 and more."""
        many = [TopicPartition("clicks", partition) for partition in range(500)]
        claims = store.claim(many, "host-a")
        times: list[float] = []
        for next_offset in range(10):
            started = time.perf_counter()
            assert store.advance(Advance(each, claims[each].assignment_epoch, next_offset) for each in many) == {}
            times.append(time.perf_counter() - started)
        assert median(times) < 0.08
