"""What the demo's handlers say they have handled, read from the files they write."""

from pathlib import Path
from typing import Final

import msgspec

_TAIL_BYTES: Final = 4096
"""Holds a whole line, which is some 250 bytes."""


class HandledLine(msgspec.Struct, frozen=True):
    """One line: ``orders`` and ``cents`` are its process's totals, the rest is the order."""

    orders: int
    cents: int
    order_id: str
    user: str
    amount_cents: int
    partition: int
    offset: int


class Tally(msgspec.Struct, frozen=True):
    """The totals over all processes. ``latest``: the last line of the file written last."""

    orders: int = 0
    cents: int = 0
    latest: HandledLine | None = None


def read_tally(folder: Path) -> Tally:
    """Add up the last lines of the files in ``folder``, that is, what has been handled since it was emptied."""
    last: dict[str, HandledLine] = {}
    latest: tuple[int, HandledLine | None] = (0, None)
    # Newer files first: <pid>.old.jsonl counts only in the moment between its renaming and its successor's first line.
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.name.endswith(".old.jsonl")):
        pid = path.name.partition(".")[0]
        try:
            line, written_ns = _last_line(path)
        except FileNotFoundError:  # renamed since; its process has handled on, and the next reading sees it
            continue
        if line is None or (pid in last and last[pid].orders >= line.orders):
            continue
        last[pid] = line
        latest = max(latest, (written_ns, line), key=lambda entry: entry[0])
    return Tally(sum(line.orders for line in last.values()), sum(line.cents for line in last.values()), latest[1])


def _last_line(path: Path) -> tuple[HandledLine | None, int]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # after the last newline there is nothing, or a torn line
        written_ns = path.stat().st_mtime_ns
    return (msgspec.json.decode(lines[-1], type=HandledLine) if lines else None), written_ns
