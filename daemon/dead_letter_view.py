"""Dead letters for people: a table of them, and one whole.

What a record or an exception says is anybody's: nothing of it reaches the terminal as a control sequence.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kafkasrcd.message import decode_headers
from kafkasrcd.storage.dead_letters import LetterState, StoredLetter

_PIPE_WIDTH: Final = 1_000
"""Into a pipe or a file goes everything, at the width it has."""
_BYTES_A_LINE: Final = 32
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Not in a text that is meant to be read; tabs and line feeds are."""


def print_letters(letters: Sequence[StoredLetter], *, states: bool) -> None:
    """A line each; with ``states`` also what was done with it."""
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("id", justify="right", no_wrap=True)
    if states:
        table.add_column("state", no_wrap=True)
    for name in ("record", "last failed"):
        table.add_column(name, no_wrap=True)
    table.add_column("attempts", justify="right", no_wrap=True)
    table.add_column("error", no_wrap=True)
    table.add_column("reason", no_wrap=True, overflow="ellipsis")
    if states:
        table.add_column("last change", no_wrap=True, overflow="ellipsis")
    for stored in letters:
        letter = stored.letter
        row: list[str | Text] = [
            str(stored.id),
            *([Text(stored.state.value, style=_STATE_STYLES.get(stored.state, ""))] if states else []),
            Text(f"{_one_line(letter.topic)}[{letter.partition}]@{letter.offset}"),
            moment(letter.last_failed_ms),
            f"{letter.attempts:,}",
            Text(_one_line(letter.error)),
            Text(_one_line(letter.reason)),
            *([Text(_one_line(_change(stored)))] if states else []),
        ]
        table.add_row(*row)
    console.print(table)


def print_letter(stored: StoredLetter) -> None:
    """Everything that is known of one."""
    letter = stored.letter
    schema = "" if letter.schema_id is None else f", schema {letter.schema_id}"
    failed = moment(letter.last_failed_ms)
    if letter.first_failed_ms != letter.last_failed_ms:
        failed = f"first {moment(letter.first_failed_ms)}, last {failed}"
    rows = [
        ("state", stored.state.value),
        ("changed", _change(stored)),
        ("record", f"{letter.topic}[{letter.partition}]@{letter.offset}"),
        ("timestamp", moment(letter.timestamp_ms) if letter.timestamp_ms >= 0 else "none"),
        ("failed", f"{failed}; attempts: {letter.attempts}"),
        ("kept by", f"kafkasrcd {letter.version} on {letter.host}"),
        ("error", letter.error),
        ("reason", letter.reason),
        ("key", _readable(letter.key)),
    ]
    headers = () if letter.headers is None else decode_headers(letter.headers).items_all()
    rows += [(f"header {name}", _readable(value)) for name, value in headers]
    rows.append((f"value, {letter.value_format}{schema}", _readable(letter.value)))
    if letter.traceback:
        rows.append(("traceback", letter.traceback))
    console = _console()
    console.print(Text(f"dead letter {stored.id}", style="bold"))
    for name, text in rows:
        lines = _printable(text).rstrip("\n").split("\n")
        shown = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
        console.print(Text.assemble((f"{_one_line(name)}:", "dim"), shown), soft_wrap=True)


def moment(at_ms: int) -> str:
    """A time of this host's zone, with it; milliseconds where a clock was wrong by millennia."""
    try:
        return datetime.fromtimestamp(at_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S%z")
    except (ValueError, OverflowError, OSError):
        return f"{at_ms} ms"


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def _change(stored: StoredLetter) -> str:
    by = f" by {stored.changed_by}" if stored.changed_by else ""
    note = f": {stored.note}" if stored.note else ""
    return f"{moment(stored.changed_ms)}{by}{note}"


def _readable(content: bytes | None) -> str:
    """The text it is, or its bytes in hex; a size only where there is something to see."""
    if content is None:
        return "(null)"
    if not content:
        return "(empty)"
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "\0"
    if not _CONTROL.search(text.replace("\r\n", "\n")):
        return text
    lines = [content[at : at + _BYTES_A_LINE].hex(" ") for at in range(0, len(content), _BYTES_A_LINE)]
    return "\n".join((f"{len(content):,} bytes, in hex", *lines))


def _printable(text: str) -> str:
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text.replace("\r\n", "\n")
    )


def _one_line(text: str) -> str:
    return " ".join(_printable(text).split())


_STATE_STYLES = {LetterState.OPEN: "yellow", LetterState.REPLAYING: "bold yellow", LetterState.REPLAYED: "green"}
