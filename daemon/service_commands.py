"""``kafkasrcd start``, ``status`` and ``stop``."""

from typing import TYPE_CHECKING

import click

from kafkasrcd.daemon.configuration_options import CONTROL_SETTINGS, with_configuration
from kafkasrcd.daemon.seconds_option import checked_seconds

if TYPE_CHECKING:
    from kafkasrcd.daemon.configuration import Configuration


@click.command()
@with_configuration()
def start(configuration: "Configuration") -> None:
    """Run the daemon in the foreground, until SIGTERM, SIGINT or `kafkasrcd stop`.

    A second signal ends the drain at once; what is processed by then is still committed.
    """
    import asyncio

    from kafkasrcd.daemon.exit_codes import exit_code_for
    from kafkasrcd.daemon.places import control_path, store_url
    from kafkasrcd.daemon.supervisor import Supervisor
    from kafkasrcd.errors import KafkasrcdError
    from kafkasrcd.workers import event_log

    settings, base = configuration.settings, configuration.base_directory
    event_log.configure(settings.supervisor.log_format, settings.supervisor.log_level)
    for warning in configuration.warnings:
        event_log.EventLog("configuration").warning("configuration_warning", warning)

    async def run() -> None:
        await Supervisor(settings, base, store_url(settings, base), control_path(settings, base)).run()

    try:
        asyncio.run(run())
    except KafkasrcdError as error:
        # An event like all others: a line of another form would break whatever reads the log.
        exit_code = exit_code_for(error)
        event_log.EventLog("supervisor").error("ended", str(error), exit_code=exit_code.value)
        click.get_current_context().exit(exit_code)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The whole status as JSON, for machines.")
@with_configuration(only=CONTROL_SETTINGS)
def status(configuration: "Configuration", as_json: bool) -> None:
    """Show what the running daemon is doing, and what is wrong with it. Exits with 3 where none is running."""
    from kafkasrcd.daemon.control_client import ControlClient
    from kafkasrcd.daemon.places import control_path
    from kafkasrcd.daemon.status_view import print_status

    client = ControlClient(control_path(configuration.settings, configuration.base_directory))
    try:
        if as_json:
            click.echo(client.status_json().decode().rstrip())
        else:
            print_status(client.status())
    finally:
        client.close()


@click.command()
@click.option(
    "--timeout",
    type=float,
    callback=checked_seconds,
    default=None,
    metavar="SECONDS",
    help="Wait no longer than this; then exit 1.",
)
@with_configuration(only=CONTROL_SETTINGS)
def stop(configuration: "Configuration", timeout: float | None) -> None:
    """Drain the running daemon, and wait until it has ended. Exits with 3 where none is running."""
    from kafkasrcd.daemon.control_client import ControlClient
    from kafkasrcd.daemon.places import control_path
    from kafkasrcd.errors import KafkasrcdError

    client = ControlClient(control_path(configuration.settings, configuration.base_directory))
    try:
        client.stop()
        if not client.wait_ended(timeout):
            raise KafkasrcdError(f"still draining after {timeout:g} s; `kafkasrcd stop` again ends the drain now")
    finally:
        client.close()
