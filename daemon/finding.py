"""One line of a check list."""

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from kafkasrcd.daemon.exit_codes import ExitCode


class Outcome(StrEnum):
    """``NOTE`` is something that will probably surprise, and does not stop anything."""

    GOOD = "good"
    NOTE = "note"
    BAD = "bad"


class Finding(msgspec.Struct, frozen=True):
    """What was looked at, how it is, and, where it is not good, what to do about it.

    ``exit_code``: what a command that ends for it exits with; OK unless ``BAD``.
    """

    outcome: Outcome
    text: str
    cure: str = ""
    exit_code: ExitCode = ExitCode.OK

    def line(self, marks: dict[Outcome, str]) -> str:
        """As a check list has it."""
        return f"{marks[self.outcome]} {self.text}" + (f" -> {self.cure}" if self.cure else "")


def exit_code(findings: Iterable[Finding]) -> ExitCode:
    """A wrong configuration counts before an unreachable broker, since it is certain."""
    codes = {finding.exit_code for finding in findings} - {ExitCode.OK}
    if ExitCode.CONFIG in codes:
        return ExitCode.CONFIG
    return min(codes, default=ExitCode.OK)
