"""An exception of the user's in words: for a dead letter, for the log."""

import traceback
from types import TracebackType
from typing import Final, NamedTuple

from kafkasrcd.storage.dead_letters import as_text
from kafkasrcd.workers.failure_policy import class_name
from kafkasrcd.workers.reasons import printable

_BETWEEN: Final = ("kafkasrcd.workers.", "kafkasrcd.storage.", "concurrent.futures.")
"""The modules between a runner and the user's function."""


class Failure(NamedTuple):
    """Why a record is not handled: the error's class, its words, and the lines that led there."""

    error: str
    reason: str
    traceback: str = ""


def failure_of(error: Exception, target: str) -> Failure:
    """What the handler called ``target`` raised."""
    said = printable("".join(traceback.format_exception_only(error)).strip())
    trace = printable("".join(traceback.format_exception(error)))
    return Failure(class_name(type(error)), as_text(f"{target} raised {said}"), as_text(trace))


def of_the_user(error: Exception) -> Exception:
    """``error`` from the handler's own frame on: the lines above it are not the user's."""
    return error.with_traceback(_below_ours(error.__traceback__))


def _below_ours(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        if not str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_BETWEEN):
            return trace
        trace = trace.tb_next
    return trace
