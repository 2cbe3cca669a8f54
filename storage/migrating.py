"""Bringing the tables up to date, with Alembic and without a file of its settings."""

from pathlib import Path
from typing import Any, Final

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from kafkasrcd.storage.schema import HEAD, metadata, version

_REVISIONS: Final = Path(__file__).parent / "migrations"


def migrate(connection: Connection, *, before_alembic: bool) -> None:
    """From nothing, or from any earlier revision, to ``HEAD``, inside the caller's transaction.

    ``before_alembic``: the tables are those that were there before there were migrations.
    """
    if before_alembic:
        version.create(connection)
        connection.execute(version.insert().values(version_num="0001"))
        connection.execute(text("ALTER TABLE offsets RENAME TO kafkasrcd_offsets"))
        connection.execute(text("DROP TABLE kafkasrcd_schema"))
    config = Config()
    config.set_main_option("script_location", str(_REVISIONS).replace("%", "%%"))
    config.set_main_option("version_locations", str(_REVISIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    script = ScriptDirectory.from_config(config)

    def steps(revision: Any, _: Any) -> Any:
        return script._upgrade_revs(HEAD, revision)

    with EnvironmentContext(config, script, fn=steps, destination_rev=HEAD) as environment:
        environment.configure(connection=connection, target_metadata=metadata, version_table=version.name)
        environment.run_migrations()
