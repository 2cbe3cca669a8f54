"""Dead letters as JSON lines, for machines: the shape, and nothing else."""

from typing import Any

import msgspec

from kafkasrcd.message import decode_headers
from kafkasrcd.storage.dead_letters import StoredLetter

LINE_VERSION = 1
"""Raised where a field is taken away or means something else; a new one raises nothing."""


class LetterLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``dead-letters list --json``.

    ``state``: ``retrying``, ``open``, ``replaying``, ``replayed``, ``discarded``; ``changed_ms``, ``changed_by`` and
    ``note`` are of its last change. ``timestamp_ms`` is the record's, -1 for none; ``due_ms`` is when it is handled
    again, null for not by itself. All times are milliseconds since 1970. ``kafkasrcd`` is the version that kept it,
    ``host`` where.
    """

    version: int = LINE_VERSION
    id: int
    state: str
    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    error: str
    reason: str
    attempts: int
    first_failed_ms: int
    last_failed_ms: int
    host: str
    kafkasrcd: str
    value_format: str
    schema_id: int | None
    changed_ms: int
    changed_by: str
    note: str
    due_ms: int | None


class WholeLetterLine(LetterLine, frozen=True, kw_only=True):
    """One line of ``dead-letters export`` and ``show --json``: with the record. Bytes are base64, null stays null."""

    traceback: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


def brief_line(stored: StoredLetter) -> bytes:
    """The JSON of a LetterLine, without the end of the line."""
    return msgspec.json.encode(LetterLine(**_brief(stored)))


def whole_line(stored: StoredLetter) -> bytes:
    """The JSON of a WholeLetterLine, without the end of the line."""
    letter = stored.letter
    headers = () if letter.headers is None else decode_headers(letter.headers).items_all()
    return msgspec.json.encode(
        WholeLetterLine(
            **_brief(stored),
            traceback=letter.traceback,
            key=letter.key,
            value=letter.value,
            headers=list(headers),
        )
    )


def _brief(stored: StoredLetter) -> dict[str, Any]:
    letter = stored.letter
    return {
        "id": stored.id,
        "state": stored.state.value,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "timestamp_ms": letter.timestamp_ms,
        "error": letter.error,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "first_failed_ms": letter.first_failed_ms,
        "last_failed_ms": letter.last_failed_ms,
        "host": letter.host,
        "kafkasrcd": letter.version,
        "value_format": letter.value_format,
        "schema_id": letter.schema_id,
        "changed_ms": stored.changed_ms,
        "changed_by": stored.changed_by,
        "note": stored.note,
        "due_ms": letter.due_ms,
    }
