"""What a dead letter is: a record that is not handled, or not for now, whole, and why."""

from enum import StrEnum
from typing import Final

import msgspec

MOST_TEXT: Final = 64 * 1024
"""Characters of a reason or a traceback: a recursion's is longer, and says no more."""


class LetterState(StrEnum):
    """Where a dead letter is. Each change is one transaction."""

    OPEN = "open"
    RETRYING = "retrying"
    """Put aside for a while, and handled again at its time; not dead yet."""
    REPLAYING = "replaying"
    """Given back to be handled, and not yet known to have been."""
    REPLAYED = "replayed"
    DISCARDED = "discarded"


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A record as the broker had it, and what was in the way of handling it.

    ``timestamp_ms`` is the record's, -1 for none. ``headers`` are encoded as ``Message.encoded_headers``. ``error`` is
    a class's name, ``reason`` its words; ``attempts`` counts those of one process. The other times are milliseconds
    since 1970. ``due_ms``: when it is handled again; None for not by itself.
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
    due_ms: int | None = None


class StoredLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter in the store: ``id`` names it, ``note`` and ``changed_by`` are of the last change."""

    id: int
    state: LetterState
    changed_ms: int
    letter: DeadLetter
    changed_by: str = ""
    note: str = ""


class DueLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A letter whose record is to be handled again now, and what decides where: its partition, key and offset."""

    id: int
    topic: str
    partition: int
    offset: int
    key: bytes | None


class Redelivered(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a letter whose record was handled again: ``seen`` is what it was before.

    ``failed`` is what it is now, due once more or dead; None where the record was handled. ``forgotten``: a record
    that is not handled any more leaves nothing behind, being skipped, or kept elsewhere.
    """

    seen: StoredLetter
    failed: DeadLetter | None = None
    forgotten: bool = False


class LetterFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters; what is None or empty counts for all. ``since_ms``: failed then or later; ``has_due``: whether it
    is handled again by itself; ``changed_by``: last."""

    ids: tuple[int, ...] = ()
    topic: str | None = None
    partition: int | None = None
    error: str | None = None
    since_ms: int | None = None
    states: tuple[LetterState, ...] = ()
    has_due: bool | None = None
    changed_by: str | None = None


class LetterCount(msgspec.Struct, frozen=True):
    """How many letters of a topic are open, by the error's class."""

    topic: str
    error: str
    count: int


def as_text(text: str) -> str:
    """What every database takes as text: no NUL, no lone surrogates, no more than ``MOST_TEXT``."""
    text = text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT // 2]}\n[…]\n{text[-MOST_TEXT // 2 :]}"
