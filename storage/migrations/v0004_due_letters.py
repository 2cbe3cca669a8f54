"""Letters whose records are to be handled again, and when."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("kafkasrcd_dead_letters", sa.Column("due_ms", sa.BigInteger))
    is_due = sa.text("due_ms IS NOT NULL")
    op.create_index(
        "kafkasrcd_dead_letters_by_due",
        "kafkasrcd_dead_letters",
        ["group_id", "due_ms"],
        postgresql_where=is_due,
        sqlite_where=is_due,
    )
