"""Alembic's revisions of the store's tables, each a file; found by ``kafkasrcd.storage.migrating``."""
