"""One line per event, with a stable key: for people on a terminal, as JSON elsewhere.

Each process writes its own lines to standard error; a line is one write, shorter than what a pipe takes in one piece
in all but the longest tracebacks. The same event of the same partition, repeated, is counted and not repeated.
"""

import json
import logging
import sys
import time
from typing import Any, Final, TextIO

import orjson

_REPEAT_SECONDS: Final = 5.0
"""How long the same failure stays silent, counted: readable at a million failures a second, and never stale."""

_root = logging.getLogger("kafkasrcd")


class _JsonLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "message": record.getMessage(),
            "pid": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except orjson.JSONEncodeError:  # text that is no Unicode (of file names), an integer of more than 64 bits
            return json.dumps(line, default=str)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{seconds}.{int(record.msecs):03d}Z"


class _HumanLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in getattr(record, "fields", {}).items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock} {record.levelname.lower():7} {record.getMessage()}"
        if fields:
            text += f"  ({fields})"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def configure(log_format: str, level: str, stream: TextIO | None = None) -> None:
    """Send the events of this process to ``stream`` (standard error). ``log_format``: auto, human or json."""
    output = sys.stderr if stream is None else stream
    human = log_format == "human" or (log_format == "auto" and output.isatty())
    handler = logging.StreamHandler(output)
    handler.setFormatter(_HumanLine() if human else _JsonLine())
    _root.handlers[:] = [handler]
    _root.propagate = False
    _root.setLevel(level.upper())


class EventLog:
    """The events of one part of the program: a key to search for, a sentence to read, fields to filter by."""

    def __init__(self, part: str) -> None:
        self._log = _root.getChild(part)
        self._silent: dict[tuple[object, ...], tuple[float, int]] = {}

    def debug(self, event: str, text: str, **fields: Any) -> None:
        self._emit(logging.DEBUG, event, text, fields)

    def info(self, event: str, text: str, **fields: Any) -> None:
        self._emit(logging.INFO, event, text, fields)

    def warning(self, event: str, text: str, **fields: Any) -> None:
        self._emit(logging.WARNING, event, text, fields)

    def error(self, event: str, text: str, *, cause: BaseException | None = None, **fields: Any) -> None:
        """``cause``'s traceback is part of the line."""
        self._emit(logging.ERROR, event, text, fields, cause)

    def repeated(
        self, event: str, text: str, *, same: tuple[object, ...], cause: BaseException | None = None, **fields: Any
    ) -> None:
        """An error that may come a million times a second: one line each few seconds for ``same``, with a count."""
        now = time.monotonic()
        since, silent = self._silent.get((event, *same), (-_REPEAT_SECONDS, 0))
        if now - since < _REPEAT_SECONDS:
            self._silent[(event, *same)] = (since, silent + 1)
            return
        self._silent[(event, *same)] = (now, 0)
        if silent:
            fields["repeated"] = silent
        self._emit(logging.ERROR, event, text, fields, cause)

    def _emit(
        self, level: int, event: str, text: str, fields: dict[str, object], cause: BaseException | None = None
    ) -> None:
        if self._log.isEnabledFor(level):
            self._log.log(level, "%s", text, extra={"event": event, "fields": fields}, exc_info=cause)
