"""One row a partition: who owns it, and how far it has been processed."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "kafkasrcd_offsets",
        sa.Column("group_id", sa.String, primary_key=True),
        sa.Column("topic", sa.String, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("handler_slot", sa.Integer, primary_key=True, autoincrement=False, server_default="0"),
        sa.Column("slots", sa.Integer, nullable=False, server_default="1"),
        sa.Column("next_offset", sa.BigInteger),
        sa.Column("assignment_epoch", sa.BigInteger, nullable=False),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("updated_ms", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
