"""``kafkasrcd init``."""

import shlex
from pathlib import Path

import click


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=".", required=False)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
def init(directory: Path, force: bool) -> None:
    """Write a commented kafkasrcd.toml and a handlers.py to start from.

    DIRECTORY is the folder they go into, created where it is missing; without it, this one.
    """
    from kafkasrcd.daemon.starter import write_starter

    for path in write_starter(directory, force=force):
        click.echo(f"wrote {path}")
    option = "" if directory == Path() else f" -c {shlex.quote(str(directory / 'kafkasrcd.toml'))}"
    click.echo(f"next: set brokers and topics there, then `kafkasrcd config check{option}`, `kafkasrcd start{option}`")
