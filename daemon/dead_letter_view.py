"""Dead letters for people: a table of them, and one whole.

What a record or an exception says is anybody's: nothing of it reaches the terminal as a control sequence.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Final, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kafkasrcd.message import decode_headers
from kafkasrcd.storage.dead_letters import LetterState, StoredLetter

_PIPE_WIDTH: Final = 1_000
"""Into a pipe or a file goes everything, at the width it has."""
_GAP: Final = 2
_LEAST_REASON: Final = 20
_BYTES_A_LINE: Final = 32
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Not in a text that is meant to be read; tabs and line feeds are."""


def print_letters(letters: Sequence[StoredLetter], *, states: bool) -> None:
    """A line each; with ``states`` also what was done with it. Only the last columns are cut to fit a terminal."""
    names = ["id", "record", "last failed", "attempts", "error", "reason"]
    if states:
        names = [names[0], "state", *names[1:], "last change"]
    rows = [_row(stored, states=states) for stored in letters]
    widths = [max(map(cell_len, column)) for column in zip(names, *rows, strict=True)]
    console = _console()
    cut = names.index("reason")
    left = console.width - sum(width + _GAP for width in widths[:cut])
    for index in range(cut, len(names)):
        share = max(_LEAST_REASON, left // (len(names) - index))
        widths[index] = min(widths[index], share)
        left -= widths[index] + _GAP
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    for name, width in zip(names, widths, strict=True):
        justify: Literal["right", "left"] = "right" if name in ("id", "attempts") else "left"
        table.add_column(name, justify=justify, no_wrap=True, width=width, overflow="ellipsis")
    for stored, row in zip(letters, rows, strict=True):
        style = _STATE_STYLES.get(stored.state, "")
        table.add_row(
            *(Text(cell, style=style if name == "state" else "") for name, cell in zip(names, row, strict=True))
        )
    # On a terminal that is too small for all the rest, lines go on in the next one.
    console.width = max(console.width, sum(widths) + _GAP * len(widths))
    console.print(table, soft_wrap=True)


def _row(stored: StoredLetter, *, states: bool) -> list[str]:
    letter = stored.letter
    cells = [
        str(stored.id),
        f"{letter.topic}[{letter.partition}]@{letter.offset}",
        moment(letter.last_failed_ms),
        f"{letter.attempts:,}",
        letter.error,
        letter.reason,
    ]
    if states:
        cells = [cells[0], stored.state.value, *cells[1:], _change(stored)]
    return [_one_line(cell) for cell in cells]


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
    due = "" if stored.letter.due_ms is None else f"; handled again from {moment(stored.letter.due_ms)} on"
    return f"{moment(stored.changed_ms)}{by}{note}{due}"


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


_STATE_STYLES = {
    LetterState.RETRYING: "cyan",
    LetterState.OPEN: "yellow",
    LetterState.REPLAYING: "bold yellow",
    LetterState.REPLAYED: "green",
}
