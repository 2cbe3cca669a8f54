"""The effects of the rows with `on_checkpoint` and of their peer: one inserted row a message, in either database."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from tests.postgres import PostgresServer

BATCH = 500
"""Messages in a handler's hands at once, and in those of the loop."""

metadata = MetaData()

effects = Table(
    "effects",
    metadata,
    # The key refuses a second effect of a record; a missing one shows in the count.
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("record_offset", BigInteger, primary_key=True, autoincrement=False),
    Column("order_id", String, nullable=False),
    Column("user_id", Integer, nullable=False),
    Column("status", String, nullable=False),
    Column("net", Float, nullable=False),
)

reached = Table(
    "reached",
    metadata,
    Column("topic", String, primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("next_offset", BigInteger, nullable=False),
)
"""The hand-written loop's offsets."""


def effect(partition: int, offset: int, order: dict[str, Any]) -> dict[str, object]:
    """The row of one record."""
    return {
        "partition": partition,
        "record_offset": offset,
        "order_id": order["order_id"],
        "user_id": order["user"]["id"],
        "status": order["status"],
        "net": order["amounts"]["net"],
    }


@contextmanager
def sqlite_database() -> Generator[str]:
    """The `store.url` of a new file with empty tables, deleted on leaving."""
    with TemporaryDirectory(prefix="kafkasrcd-bench-") as folder:
        url = f"sqlite:///{Path(folder) / 'effects.db'}"
        _create_tables(url)
        yield url


@contextmanager
def postgres_database() -> Generator[str]:
    """The `store.url` of a database with empty tables, on a new server, both gone on leaving."""
    # A server each, so that no row pays for the vacuum and the checkpoint of the one before.
    with PostgresServer() as server:
        url = server.url(server.create_database())
        _create_tables(url)
        yield url


def connect(url: str) -> Engine:
    """SQLAlchemy's engine for a `store.url`; SQLite with the write-ahead log, synced at each commit as in the store."""
    if not url.startswith("sqlite:"):
        return create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    engine = create_engine(url, poolclass=NullPool)

    def prepare(connection: Any, _: ConnectionPoolEntry) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    event.listen(engine, "connect", prepare)
    return engine


def committed(engine: Engine, offsets: Table) -> int:
    """How many records the offsets in `offsets` say are done, all of a topic that begins at 0."""
    with engine.connect() as connection:
        found: Iterable[int | None] = connection.scalars(select(offsets.c.next_offset))
        return sum(next_offset or 0 for next_offset in found)


def require_exactly_once(engine: Engine, offsets: Table) -> int:
    """How many effects there are; raises AssertionError where that is not what `offsets` says."""
    with engine.connect() as connection:
        rows = connection.scalar(select(func.count()).select_from(effects)) or 0
    said = committed(engine, offsets)
    assert rows == said, f"{rows} effects, where the offsets say {said}"
    return rows


def _create_tables(url: str) -> None:
    engine = connect(url)
    metadata.create_all(engine)
    engine.dispose()
