"""What the commands exit with."""

from enum import IntEnum

from kafkasrcd.errors import (
    BrokerUnavailable,
    ConfigurationError,
    GroupError,
    KafkasrcdError,
    NotRunning,
    StoreUnavailable,
    WorkerError,
)


class ExitCode(IntEnum):
    """Stable: scripts and units depend on them. From 64 on they are those of sysexits(3), which systemd knows by name.

    A unit should say ``RestartPreventExitStatus=USAGE CONFIG``: another start cannot cure those.
    """

    OK = 0
    FAILURE = 1
    """What was asked for failed; the line on standard error says why."""
    USAGE = 2
    """The command line itself is wrong: an unknown command or option."""
    NOT_RUNNING = 3
    """No daemon answers on the control socket. The code of LSB's ``status`` for a program that is not running."""
    UNAVAILABLE = 69
    """EX_UNAVAILABLE: broker, offset store or schema registry cannot be reached. Trying again later may help."""
    SOFTWARE = 70
    """EX_SOFTWARE: a process of the daemon would not start or kept dying, or kafkasrcd has a bug."""
    CONFIG = 78
    """EX_CONFIG: the configuration, or a handler it names, cannot be used until someone changes it."""


def exit_code_for(error: KafkasrcdError) -> ExitCode:
    """The code a command exits with after ``error``."""
    match error:
        case NotRunning():
            return ExitCode.NOT_RUNNING
        case ConfigurationError():
            return ExitCode.CONFIG
        case StoreUnavailable() | GroupError() | BrokerUnavailable():
            return ExitCode.UNAVAILABLE
        case WorkerError():
            return ExitCode.SOFTWARE
        case _:
            return ExitCode.FAILURE
