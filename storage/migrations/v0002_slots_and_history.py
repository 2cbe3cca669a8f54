"""A row for each slot of a layout, so that records of one partition can be spread over handler processes; and the
history of offsets."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.rename_table("kafkasrcd_offsets", "kafkasrcd_offsets_0001")
    if op.get_bind().dialect.name == "postgresql":
        # The name of the key would be taken.
        op.execute("ALTER INDEX kafkasrcd_offsets_pkey RENAME TO kafkasrcd_offsets_0001_pkey")
    op.create_table(
        "kafkasrcd_offsets",
        sa.Column("group_id", sa.String, primary_key=True),
        sa.Column("topic", sa.String, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("ordering", sa.String, primary_key=True),
        sa.Column("slots", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("handler_slot", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("next_offset", sa.BigInteger),
        sa.Column("assignment_epoch", sa.BigInteger, nullable=False),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("updated_ms", sa.BigInteger, nullable=False),
        sa.CheckConstraint("next_offset >= 0", name="kafkasrcd_next_offset_is_real"),
        sa.CheckConstraint("assignment_epoch >= 1", name="kafkasrcd_assignment_epoch_is_real"),
        sa.CheckConstraint("handler_slot >= 0 AND handler_slot < slots", name="kafkasrcd_handler_slot_is_real"),
        sqlite_with_rowid=False,
    )
    columns = "next_offset, assignment_epoch, owner, updated_ms"
    op.execute(
        "INSERT INTO kafkasrcd_offsets "  # noqa: S608 - both parts are ours
        f"(group_id, topic, partition, ordering, slots, handler_slot, {columns}) "
        f"SELECT group_id, topic, partition, 'partition', 1, 0, {columns} FROM kafkasrcd_offsets_0001"
    )
    op.drop_table("kafkasrcd_offsets_0001")
    op.create_table(
        "kafkasrcd_offset_history",
        sa.Column("group_id", sa.String, primary_key=True),
        sa.Column("topic", sa.String, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at_ms", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("next_offset", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
