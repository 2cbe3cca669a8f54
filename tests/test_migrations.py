"""The store's tables from nothing and from every earlier time, on both databases."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, create_engine, inspect, text

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.storage.offset_store import Advance, Claim, Layout, TopicPartition
from kafkasrcd.storage.opening import open_store
from kafkasrcd.storage.schema import HEAD, metadata
from tests import store_processes
from tests.postgres import PostgresServer
from tests.test_sqlite_store import answer, start

GROUP = "billing"
BUSY_TIMEOUT_MS = 10_000
PROCESSES = 10
FIRST = TopicPartition("orders", 0)
SECOND = TopicPartition("orders", 1)

_COLUMNS_BEFORE_SLOTS = """
    group_id VARCHAR NOT NULL,
    topic VARCHAR NOT NULL,
    partition INTEGER NOT NULL,
    handler_slot INTEGER DEFAULT '0' NOT NULL,
    slots INTEGER DEFAULT '1' NOT NULL,
    next_offset BIGINT,
    assignment_epoch BIGINT NOT NULL,
    owner VARCHAR NOT NULL,
    updated_ms BIGINT NOT NULL,
    PRIMARY KEY (group_id, topic, partition, handler_slot)
"""
_ROWS = """
    ('billing', 'orders', 0, 0, 1, 120, 7, 'host-a', 1000),
    ('billing', 'orders', 1, 0, 1, NULL, 3, 'host-b', 2000),
    ('audit', 'orders', 0, 0, 1, 99, 1, 'host-c', 3000)
"""
BEFORE_ALEMBIC = f"""
    CREATE TABLE kafkasrcd_schema (version INTEGER NOT NULL, PRIMARY KEY (version));
    INSERT INTO kafkasrcd_schema VALUES (1);
    CREATE TABLE offsets ({_COLUMNS_BEFORE_SLOTS},
        CONSTRAINT next_offset_is_real CHECK (next_offset >= 0),
        CONSTRAINT assignment_epoch_is_real CHECK (assignment_epoch >= 1),
        CONSTRAINT handler_slot_is_real CHECK (handler_slot >= 0 AND handler_slot < slots)) WITHOUT ROWID;
    INSERT INTO offsets VALUES {_ROWS}
"""
"""As the first kafkasrcd made it; there was SQLite only."""
REVISION_0001 = f"""
    CREATE TABLE kafkasrcd_version (version_num VARCHAR(32) NOT NULL, PRIMARY KEY (version_num));
    INSERT INTO kafkasrcd_version VALUES ('0001');
    CREATE TABLE kafkasrcd_offsets ({_COLUMNS_BEFORE_SLOTS});
    INSERT INTO kafkasrcd_offsets VALUES {_ROWS}
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.url(server.create_database())
    return f"sqlite:///{tmp_path}/offsets.db"


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    yield engine
    engine.dispose()


def execute(engine: Engine, script: str) -> None:
    with engine.begin() as connection:
        for statement in script.split(";"):
            connection.execute(text(statement))


def opened_and_closed(url: str) -> None:
    open_store(url, GROUP, BUSY_TIMEOUT_MS).close()


def holds_what_was_there(url: str) -> None:
    """And goes on from there, also in more slots than one."""
    with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
        rows = [(row.topic_partition, row.assignment_epoch, row.next_offset, row.owner) for row in store.offsets()]
        assert rows == [(FIRST, 7, 120, "host-a"), (SECOND, 3, None, "host-b")]
        assert [row.updated_ms for row in store.offsets()] == [1000, 2000]
        assert store.advance([Advance(FIRST, 7, 121)]) == {}
        by_key = Layout("key", 2)
        assert store.claim([FIRST], "host-a", by_key) == {FIRST: Claim(FIRST, 8, 121)}
    with closing(open_store(url, "audit", BUSY_TIMEOUT_MS)) as store:
        assert [row.next_offset for row in store.offsets()] == [99]


def all_at_once(url: str) -> None:
    """Every process opens the store, claims and advances at the same moment."""
    started = [start(store_processes.claim_and_advance, url, f"host-{number}") for number in range(PROCESSES)]
    for _, pipe in started:
        pipe.send("go")
    for process, pipe in started:
        answer(process, pipe)


class TestAgree:
    def test_what_migrations_make_and_what_the_code_reads(self, url: str, engine: Engine) -> None:
        opened_and_closed(url)

        def ours(name: str | None, kind: str, _: object) -> bool:
            return kind != "table" or name in metadata.tables

        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"include_name": ours})
            assert compare_metadata(context, metadata) == []

    def test_what_alembic_does_not_compare(self, url: str, engine: Engine, tmp_path: Path) -> None:
        """Checks and keys; the clause that makes a row part of its key in SQLite."""
        opened_and_closed(url)
        with engine.connect() as connection:
            migrated = {name: made(connection, name) for name in metadata.tables}
        for name in reversed(metadata.tables):
            execute(engine, f"DROP TABLE {name}")
        metadata.create_all(engine)
        with engine.connect() as connection:
            assert migrated == {name: made(connection, name) for name in metadata.tables}


def made(connection: Connection, table: str) -> object:
    inspector = inspect(connection)
    without_rowid = connection.dialect.name == "sqlite" and "WITHOUT ROWID" in str(
        connection.scalar(text("SELECT sql FROM sqlite_master WHERE name = :name"), {"name": table})
    )
    checks = sorted((str(check["name"]), check["sqltext"]) for check in inspector.get_check_constraints(table))
    key = inspector.get_pk_constraint(table)["constrained_columns"]
    columns = [(each["name"], str(each["type"]), each["nullable"]) for each in inspector.get_columns(table)]
    return columns, key, checks, without_rowid


class TestUpgrade:
    def test_of_a_database_from_before_migrations(self, tmp_path: Path) -> None:
        path = tmp_path / "offsets.db"
        with closing(sqlite3.connect(path)) as before:
            before.executescript(BEFORE_ALEMBIC)
        holds_what_was_there(f"sqlite:///{path}")
        with closing(sqlite3.connect(path)) as after:
            tables = {name for (name,) in after.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        # SQLite's own comes with AUTOINCREMENT.
        assert tables == {*metadata.tables, "kafkasrcd_version", "sqlite_sequence"}

    def test_of_the_first_revision(self, url: str, engine: Engine) -> None:
        execute(engine, REVISION_0001)
        holds_what_was_there(url)

    @pytest.mark.parametrize("before", ["", REVISION_0001], ids=["from nothing", "from 0001"])
    def test_by_many_processes_at_once(self, url: str, engine: Engine, before: str) -> None:
        if before:
            execute(engine, before)
        all_at_once(url)
        with engine.connect() as connection:
            assert list(connection.scalars(text("SELECT version_num FROM kafkasrcd_version"))) == [HEAD]
            audited = text("SELECT next_offset FROM kafkasrcd_offsets WHERE group_id = 'audit'")
            assert list(connection.scalars(audited)) == ([99] if before else [])

    def test_that_fails_changes_nothing(self, url: str, engine: Engine) -> None:
        execute(engine, REVISION_0001)
        execute(engine, "CREATE TABLE kafkasrcd_offset_history (mine INTEGER)")
        with pytest.raises(Exception, match="kafkasrcd_offset_history"):
            opened_and_closed(url)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT version_num FROM kafkasrcd_version")) == "0001"
            assert connection.scalar(text("SELECT count(*) FROM kafkasrcd_offsets")) == 3
        execute(engine, "DROP TABLE kafkasrcd_offset_history")
        holds_what_was_there(url)


class TestOpening:
    def test_a_database_of_a_newer_kafkasrcd_is_refused(self, url: str, engine: Engine) -> None:
        opened_and_closed(url)
        newer = f"{int(HEAD) + 1:04}"
        execute(engine, f"UPDATE kafkasrcd_version SET version_num = '{newer}'")
        with pytest.raises(ConfigurationError, match=rf"newer kafkasrcd \(schema {newer}, .*: upgrade this"):
            opened_and_closed(url)

    def test_a_database_that_is_up_to_date_does_not_load_alembic(self, url: str) -> None:
        opened_and_closed(url)
        code = (
            "import sys\nfrom kafkasrcd.storage.opening import open_store\n"
            f"open_store({url!r}, 'billing', 5000).close()\nprint('alembic' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        assert done.stdout.strip() == "False"

    def test_others_tables_beside_ours(self, url: str, engine: Engine) -> None:
        """Always in PostgreSQL, whose databases are shared; in a SQLite file where effects are in it, too."""
        execute(engine, "CREATE TABLE customers (id INTEGER)")
        if engine.dialect.name == "sqlite":
            with pytest.raises(ConfigurationError, match=r"holds other tables \(customers\)"):
                opened_and_closed(url)
        open_store(url, GROUP, BUSY_TIMEOUT_MS, shared_with_effects=True).close()
        assert {*metadata.tables, "customers"} <= set(inspect(engine).get_table_names())

    @pytest.mark.parametrize("name", sorted(metadata.tables))
    def test_a_table_of_our_name_that_is_not_ours_is_refused(self, url: str, engine: Engine, name: str) -> None:
        execute(engine, f"CREATE TABLE {name} (id INTEGER)")
        opening: Callable[[], object] = lambda: open_store(url, GROUP, BUSY_TIMEOUT_MS, shared_with_effects=True)  # noqa: E731
        with pytest.raises(ConfigurationError, match=rf"holds other tables \({name}\)"):
            opening()
        assert [column["name"] for column in inspect(engine).get_columns(name)] == ["id"]
