"""What a group was told to do until it is told otherwise."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "kafkasrcd_intents",
        sa.Column("group_id", sa.String, primary_key=True),
        sa.Column("topic", sa.String, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("value", sa.String, nullable=False),
        sa.Column("set_by", sa.String, nullable=False),
        sa.Column("set_ms", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sqlite_with_rowid=False,
    )
