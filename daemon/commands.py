"""The command line: the group ``kafkasrcd`` and how its commands end.

A command is imported when it is called, or listed; its module must be cheap to import, with anything heavy (Kafka,
SQLAlchemy, rich) imported inside the command.
"""

import sys
import traceback
from importlib import import_module
from typing import Any

import click

from kafkasrcd.daemon.exit_codes import ExitCode, exit_code_for
from kafkasrcd.errors import KafkasrcdError

COMMANDS = {
    "init": "kafkasrcd.daemon.init_command:init",
    "start": "kafkasrcd.daemon.service_commands:start",
    "status": "kafkasrcd.daemon.service_commands:status",
    "stop": "kafkasrcd.daemon.service_commands:stop",
    "pause": "kafkasrcd.daemon.pause_commands:pause",
    "resume": "kafkasrcd.daemon.pause_commands:resume",
    "dead-letters": "kafkasrcd.daemon.dead_letter_commands:dead_letters",
    "config": "kafkasrcd.daemon.config_commands:config",
    "demo": "kafkasrcd.daemon.demo_commands:demo",
}
"""Every command and the function it is. A new command is registered here, in the order of ``--help``."""


class CommandGroup(click.Group):
    """Finds commands in ``COMMANDS``, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name].partition(":")
        command = getattr(import_module(module), function)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KafkasrcdError as error:
            report(error)
            ctx.exit(exit_code_for(error))
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own, and the end of a pipe, which it answers by ending quietly
        except OSError as error:  # a full disk, a missing permission: the system's words name what it was about
            click.echo(f"kafkasrcd: {error}", err=True)
            ctx.exit(ExitCode.FAILURE)
        except Exception as error:  # noqa: BLE001 - the last place where a bug can be given its exit code
            traceback.print_exception(error)
            click.echo(f"kafkasrcd: a bug in kafkasrcd: {type(error).__name__}: {error}; please report it", err=True)
            ctx.exit(ExitCode.SOFTWARE)


def report(error: KafkasrcdError) -> None:
    """Say on standard error what went wrong: a line for each thing, each starting with ``kafkasrcd:``."""
    for line in str(error).splitlines():
        click.echo(f"kafkasrcd: {line}", err=True)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(None, "--version", package_name="kafkasrcd", message="kafkasrcd %(version)s")
def main() -> None:
    """Run a Kafka consumer group as Python function calls, on all cores.

    Start with `kafkasrcd init`, then `kafkasrcd config check`.

    \b
    Exit codes: 0 done; 1 failed; 2 wrong command line; 3 not running; 69 broker or
    store not reachable; 70 a process would not run, or a bug; 78 wrong configuration.
    """
    # What a terminal's encoding lacks is escaped; by default it would end the command.
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # a test's replacement has none
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
