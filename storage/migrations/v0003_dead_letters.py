"""Records that are not handled any more, whole, and why."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "kafkasrcd_dead_letters",
        sa.Column("id", _ID, sa.Identity(), primary_key=True),
        sa.Column("group_id", sa.String, nullable=False),
        sa.Column("topic", sa.String, nullable=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("record_offset", sa.BigInteger, nullable=False),
        sa.Column("timestamp_ms", sa.BigInteger, nullable=False),
        sa.Column("record_key", sa.LargeBinary),
        sa.Column("record_value", sa.LargeBinary),
        sa.Column("headers", sa.LargeBinary),
        sa.Column("value_format", sa.String, nullable=False),
        sa.Column("schema_id", sa.BigInteger),
        sa.Column("error", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("traceback", sa.String, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("first_failed_ms", sa.BigInteger, nullable=False),
        sa.Column("last_failed_ms", sa.BigInteger, nullable=False),
        sa.Column("host", sa.String, nullable=False),
        sa.Column("version", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("changed_ms", sa.BigInteger, nullable=False),
        sa.Column("changed_by", sa.String, nullable=False),
        sa.Column("note", sa.String, nullable=False),
        sa.UniqueConstraint(
            "group_id", "topic", "partition", "record_offset", name="kafkasrcd_dead_letters_are_of_one_record"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("kafkasrcd_dead_letters_by_state", "kafkasrcd_dead_letters", ["group_id", "state", "topic"])
