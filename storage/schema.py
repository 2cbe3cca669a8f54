"""The store's tables, and whether a database holds them.

Created from empty here. Alembic's migrations take over in ``ensure_schema``, where it says so.
"""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    inspect,
    select,
)

from kafkasrcd.errors import ConfigurationError

SCHEMA_VERSION = 1
"""Goes up with every change to a table below."""

metadata = MetaData()

schema_version = Table(
    # A name nobody else has: it is what tells our database from a foreign one.
    "kafkasrcd_schema",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
)

offsets = Table(
    "offsets",
    metadata,
    Column("group_id", String, primary_key=True),
    Column("topic", String, primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    # With ordering by partition one handler reads all of it: slot 0 of 1.
    Column("handler_slot", Integer, primary_key=True, autoincrement=False, default=0, server_default="0"),
    Column("slots", Integer, nullable=False, default=1, server_default="1"),
    Column("next_offset", BigInteger),
    Column("assignment_epoch", BigInteger, nullable=False),
    Column("owner", String, nullable=False),
    Column("updated_ms", BigInteger, nullable=False),
    # librdkafka's logical offsets (-1001 is "none") are negative: one recorded by mistake must not become a position.
    CheckConstraint("next_offset >= 0", name="next_offset_is_real"),
    CheckConstraint("assignment_epoch >= 1", name="assignment_epoch_is_real"),
    CheckConstraint("handler_slot >= 0 AND handler_slot < slots", name="handler_slot_is_real"),
    # Every statement finds its rows by the key: the key's tree holds the row itself.
    sqlite_with_rowid=False,
)


def found_version(connection: Connection, name: str) -> int | None:
    """The version of the tables in the database called ``name``, or None where it is empty.

    Raises ``ConfigurationError`` for a database that is not ours, or that a newer kafkasrcd wrote. Changes nothing.
    """
    tables = inspect(connection).get_table_names()
    if not tables:
        return None
    if schema_version.name not in tables:
        raise ConfigurationError(
            f"{name} holds other tables ({', '.join(sorted(tables)[:3])}) and not those of kafkasrcd: "
            "name another place in store.url"
        )
    version: int | None = connection.scalar(select(schema_version.c.version))
    if version is None:
        raise ConfigurationError(f"{name} has no row in {schema_version.name}: restore it, or move it away")
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"{name} was written by a newer kafkasrcd (schema version {version}, this one knows {SCHEMA_VERSION}): "
            "upgrade this kafkasrcd, or name another place in store.url"
        )
    return version


def ensure_schema(connection: Connection, name: str) -> None:
    """Create the tables where there are none. Runs inside the caller's write transaction, so that one process does.

    Raises as ``found_version`` does.
    """
    version = found_version(connection, name)
    if version is None:
        metadata.create_all(connection, checkfirst=False)
        connection.execute(schema_version.insert().values(version=SCHEMA_VERSION))
    else:
        # Changes nothing, and finds out at the start, not at the first claim, that a database can only be read: SQLite
        # lets a write transaction begin in one.
        connection.execute(schema_version.update().values(version=version))
    # An older version is for Alembic to bring up, from here and in this transaction. There is none before 1.
