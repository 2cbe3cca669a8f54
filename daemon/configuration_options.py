"""The options of every command that needs the configuration: ``--config`` and ``--set``."""

import os
from collections.abc import Callable, Collection
from functools import update_wrapper, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from kafkasrcd.daemon.configuration import Configuration

CONTROL_SETTINGS = ("group_id", "supervisor.runtime_directory", "supervisor.control_socket")
"""All that a command needs which only talks to a running daemon."""

STORE_SETTINGS = ("group_id", "commit_strategy", "store.url", "store.busy_timeout_ms")
"""All that a command needs which only looks into the offset store."""

P = ParamSpec("P")
R = TypeVar("R")


def configuration_options(
    command: Callable[Concatenate[Callable[..., "Configuration"], P], R],
) -> Callable[P, R]:
    """Give a command ``--config`` and ``--set``, and, as its first argument, a function that loads what they lead to.

    The function takes ``only``, as ``configuration.load`` does. Stands below ``@click.command()``, like an option.
    """

    @click.option(
        "-c",
        "--config",
        "path",
        type=click.Path(path_type=Path),
        envvar="KAFKASRCD_CONFIG",
        show_envvar=True,
        help="The configuration file. [default: ./kafkasrcd.toml, then /etc/kafkasrcd/kafkasrcd.toml]",
    )
    @click.option(
        "-s",
        "--set",
        "assignments",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_assignments,
        help="Set one setting, as in -s handler.processes=4; wins over environment and file. Repeatable.",
    )
    @wraps(command)
    def with_options(*args: Any, **options: Any) -> R:
        path: Path | None = options.pop("path")
        assignments: dict[str, str] = options.pop("assignments")

        def load_configuration(only: Collection[str] | None = None) -> "Configuration":
            from kafkasrcd.daemon.configuration import find_file, load

            return load(path or find_file(), assignments, os.environ, only=only)

        return command(load_configuration, *args, **options)

    return with_options


def with_configuration(
    *, only: Collection[str] | None = None
) -> Callable[[Callable[Concatenate["Configuration", P], R]], Callable[P, R]]:
    """Give a command ``--config`` and ``--set``, and, as its first argument, the configuration they lead to.

    ``only``: ``CONTROL_SETTINGS`` for a command that just talks to a running daemon, see ``configuration.load``. A
    configuration that cannot be used ends the command before it begins, with exit code 78:

        @click.command()
        @click.option("--json", "as_json", is_flag=True)
        @with_configuration()
        def show(configuration: Configuration, as_json: bool) -> None: ...
    """

    def decorate(command: Callable[Concatenate["Configuration", P], R]) -> Callable[P, R]:
        def loaded(load_configuration: Callable[..., "Configuration"], /, *args: P.args, **kwargs: P.kwargs) -> R:
            return command(load_configuration(only), *args, **kwargs)

        # Not by @wraps, to whose result mypy gives a named first parameter.
        update_wrapper(loaded, command)
        return configuration_options(loaded)

    return decorate


def _assignments(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    assignments: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key.strip():
            # Without what was given: it may be a password that lost its name.
            raise click.BadParameter("expected KEY=VALUE, as in handler.processes=4")
        assignments[key.strip()] = text  # the last one given for a key counts
    return assignments
