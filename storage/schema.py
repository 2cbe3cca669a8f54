"""The store's tables, and whether a database holds them.

With ``on_checkpoint`` they live in the user's own database, so every name begins with ``kafkasrcd_``.
"""

from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    inspect,
    select,
    text,
)

from kafkasrcd.errors import ConfigurationError

HEAD: Final = "0005"
"""The revision in ``migrations/`` that the tables below are."""
_BEFORE_ALEMBIC: Final = "kafkasrcd_schema"
"""Told a database of ours from a foreign one before there were migrations; its tables are those of revision 0001."""

FIRST_START: Final = "the first `kafkasrcd start` makes it; or check store.url, and as which user this runs"
"""What is missing, and the cure, for who does not make it."""

metadata = MetaData()

version = Table("kafkasrcd_version", MetaData(), Column("version_num", String(32), primary_key=True))
"""Alembic's own, under a name nobody else has."""

offsets = Table(
    "kafkasrcd_offsets",
    metadata,
    Column("group_id", String, primary_key=True),
    Column("topic", String, primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    # A layout, and a slot of it. With ordering by partition one handler process reads all of it: slot 0 of 1.
    Column("ordering", String, primary_key=True),
    Column("slots", Integer, primary_key=True, autoincrement=False),
    Column("handler_slot", Integer, primary_key=True, autoincrement=False),
    Column("next_offset", BigInteger),
    # On every row, and not once a partition: an advance must find it on the very row that it changes, or PostgreSQL
    # lets one through that began before a claim and ends after it.
    Column("assignment_epoch", BigInteger, nullable=False),
    Column("owner", String, nullable=False),
    Column("updated_ms", BigInteger, nullable=False),
    # librdkafka's logical offsets (-1001 is "none") are negative: one recorded by mistake must not become a position.
    CheckConstraint("next_offset >= 0", name="kafkasrcd_next_offset_is_real"),
    CheckConstraint("assignment_epoch >= 1", name="kafkasrcd_assignment_epoch_is_real"),
    CheckConstraint("handler_slot >= 0 AND handler_slot < slots", name="kafkasrcd_handler_slot_is_real"),
    # Every statement finds its rows by the key: the key's tree holds the row itself.
    sqlite_with_rowid=False,
)

offset_history = Table(
    "kafkasrcd_offset_history",
    metadata,
    Column("group_id", String, primary_key=True),
    Column("topic", String, primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("at_ms", BigInteger, primary_key=True, autoincrement=False),
    Column("next_offset", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)


dead_letters = Table(
    "kafkasrcd_dead_letters",
    metadata,
    # Never given out again, also after the highest was deleted: a person may have written it down.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True),
    Column("group_id", String, nullable=False),
    Column("topic", String, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("record_offset", BigInteger, nullable=False),
    Column("timestamp_ms", BigInteger, nullable=False),
    Column("record_key", LargeBinary),
    Column("record_value", LargeBinary),
    Column("headers", LargeBinary),
    Column("value_format", String, nullable=False),
    Column("schema_id", BigInteger),
    Column("error", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("traceback", String, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("first_failed_ms", BigInteger, nullable=False),
    Column("last_failed_ms", BigInteger, nullable=False),
    Column("host", String, nullable=False),
    Column("version", String, nullable=False),
    Column("state", String, nullable=False),
    Column("changed_ms", BigInteger, nullable=False),
    Column("changed_by", String, nullable=False),
    Column("note", String, nullable=False),
    # When the record is to be handled again, by whoever has its partition then.
    Column("due_ms", BigInteger),
    UniqueConstraint(
        "group_id", "topic", "partition", "record_offset", name="kafkasrcd_dead_letters_are_of_one_record"
    ),
    Index("kafkasrcd_dead_letters_by_state", "group_id", "state", "topic"),
    Index(
        "kafkasrcd_dead_letters_by_due",
        "group_id",
        "due_ms",
        postgresql_where=text("due_ms IS NOT NULL"),
        sqlite_where=text("due_ms IS NOT NULL"),
    ),
    sqlite_autoincrement=True,
)

intents = Table(
    "kafkasrcd_intents",
    metadata,
    # The key's first column finds all of a group. A topic is "" for all of them, a partition -1 for all of its topic.
    Column("group_id", String, primary_key=True),
    Column("topic", String, primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("kind", String, primary_key=True),
    Column("value", String, nullable=False),
    Column("set_by", String, nullable=False),
    Column("set_ms", BigInteger, nullable=False),
    Column("reason", String, nullable=False),
    sqlite_with_rowid=False,
)


def found_revision(connection: Connection, name: str, *, shared: bool) -> str | None:
    """The revision of our tables in the database called ``name``; None where it has none, "" before migrations.

    Raises ``ConfigurationError`` for a database that a newer kafkasrcd wrote, that has tables of our names that are not
    ours, or, unless it is ``shared`` with others, any other tables. Changes nothing.
    """
    tables = inspect(connection).get_table_names()
    if version.name in tables:
        revision: str | None = connection.scalar(select(version.c.version_num))
        if revision is None:
            raise ConfigurationError(f"{name} has no row in {version.name}: restore it, or move it away")
        if revision > HEAD:
            raise ConfigurationError(
                f"{name} was written by a newer kafkasrcd (schema {revision}, this one knows {HEAD}): "
                "upgrade this kafkasrcd, or name another place in store.url"
            )
        return revision
    if _BEFORE_ALEMBIC in tables:
        return ""
    if not tables:
        return None
    ours = metadata.tables.keys() & set(tables)
    if ours or not shared:
        raise ConfigurationError(
            f"{name} holds other tables ({', '.join(sorted(ours or tables)[:3])}) and not those of kafkasrcd: "
            "name another place in store.url"
        )
    return None


def require_schema(connection: Connection, name: str, *, shared: bool) -> None:
    """Raise ``ConfigurationError`` where our tables are not there at ``HEAD``.

    For who looks at what a daemon keeps, and neither makes a store nor migrates one under a daemon of another version.
    Changes nothing.
    """
    revision = found_revision(connection, name, shared=shared)
    if revision is None:
        raise ConfigurationError(f"{name} is no offset store yet: {FIRST_START}")
    if revision != HEAD:
        raise ConfigurationError(
            f"{name} was written by an older kafkasrcd (schema {revision or 'of before there were numbers'}, this one "
            f"needs {HEAD}): the next `kafkasrcd start` brings it up to date"
        )


def ensure_schema(connection: Connection, name: str, *, shared: bool) -> None:
    """Create our tables, or bring them up to ``HEAD``.

    Runs inside the caller's write transaction, under a lock that all openers share, so that one process does. Raises
    as ``found_revision`` does.
    """
    revision = found_revision(connection, name, shared=shared)
    if revision == HEAD:
        # Changes nothing, and finds out at the start, not at the first claim, that a database can only be read: SQLite
        # lets a write transaction begin in one.
        connection.execute(version.update().values(version_num=HEAD))
        return
    # Here, so that opening a database that is up to date does not load Alembic (0.2 s).
    from kafkasrcd.storage.migrating import migrate

    migrate(connection, before_alembic=revision == "")
