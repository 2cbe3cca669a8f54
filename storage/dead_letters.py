"""What a dead letter is: a record that is not handled any more, whole, and why."""

from enum import StrEnum
from typing import Final

import msgspec

MOST_TEXT: Final = 64 * 1024
"""Characters of a reason or a traceback: a recursion's is longer, and says no more."""


class LetterState(StrEnum):
    """Where a dead letter is. Each change is one transaction."""

    OPEN = "open"
    REPLAYING = "replaying"
    """Given back to be handled, and not yet known to have been."""
    REPLAYED = "replayed"
    DISCARDED = "discarded"


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A record as the broker had it, and what was in the way of handling it.

    ``timestamp_ms`` is the record's, -1 for none. ``headers`` are encoded as ``Message.encoded_headers``. ``error`` is
    a class's name, ``reason`` its words; ``attempts`` counts those of one process. The other times are milliseconds
    since 1970.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: bytes | None
    value_format: str
    error: str
    reason: str
    attempts: int
    first_failed_ms: int
    last_failed_ms: int
    host: str
    version: str
    traceback: str = ""
    schema_id: int | None = None


class StoredLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter in the store: ``id`` names it, ``note`` and ``changed_by`` are of the last change."""

    id: int
    state: LetterState
    changed_ms: int
    letter: DeadLetter
    changed_by: str = ""
    note: str = ""


class LetterFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters; what is None or empty counts for all. ``since_ms``: failed then or later."""

    ids: tuple[int, ...] = ()
    topic: str | None = None
    partition: int | None = None
    error: str | None = None
    since_ms: int | None = None
    states: tuple[LetterState, ...] = ()


class LetterCount(msgspec.Struct, frozen=True):
    """How many letters of a topic are open, by the error's class."""

    topic: str
    error: str
    count: int


def as_text(text: str) -> str:
    """What every database takes as text: no NUL, no lone surrogates, no more than ``MOST_TEXT``."""
    text = text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT // 2]}\n[…]\n{text[-MOST_TEXT // 2 :]}"
