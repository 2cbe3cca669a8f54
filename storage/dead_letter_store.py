"""The dead letters of a group in its offset store's database, as commands and handler processes use them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.dead_letter_rows import DeadLetterRows
from kafkasrcd.storage.dead_letters import DeadLetter, LetterCount, LetterFilter, LetterState, Redelivered, StoredLetter
from kafkasrcd.storage.sql_store import Database

_PAGE: Final = 100
"""Letters read at once: each has a whole record."""


class DeadLetterStore:
    """Blocks. Every method is one transaction, or for ``find`` one a page; each raises ``StoreUnavailable`` where the
    database cannot be used now."""

    def __init__(self, database: Database, group_id: str, *, now_ms: Callable[[], int] = wall_clock_ms) -> None:
        self._database = database
        self._rows = DeadLetterRows(group_id, now_ms)

    def bury(self, letter: DeadLetter) -> None:
        """Keep ``letter``; it survives a power cut. To bury it again is right: a record has one letter."""
        with self._database.writing(durable=True) as connection:
            self._rows.bury(connection, letter)

    def find(self, wanted: LetterFilter, most: int | None = None) -> Iterator[StoredLetter]:
        """Those of ``wanted``, by id, no more than ``most``; read as they are asked for."""
        after, left = 0, most
        while left is None or left > 0:
            with self._database.reading() as connection:
                page = self._rows.find(connection, wanted, _PAGE if left is None else min(_PAGE, left), after)
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].id
            left = None if left is None else left - len(page)

    def ids(self, wanted: LetterFilter) -> list[int]:
        """Those of ``wanted``, ascending, without their records."""
        with self._database.reading() as connection:
            return self._rows.ids(connection, wanted)

    def count(self, wanted: LetterFilter) -> int:
        """How many are of ``wanted``."""
        with self._database.reading() as connection:
            return self._rows.count(connection, wanted)

    def counts(self, state: LetterState) -> list[LetterCount]:
        """Those in ``state``, by topic and error, most first."""
        with self._database.reading() as connection:
            return self._rows.counts(connection, state)

    def settle(self, redelivered: Redelivered) -> bool:
        """Write down what became of a letter whose record was handled again; survives a power cut. False where someone
        else has changed it meanwhile."""
        with self._database.writing(durable=True) as connection:
            return self._rows.settle(connection, redelivered)

    def change(
        self,
        letter_id: int,
        before: Sequence[LetterState],
        after: LetterState,
        *,
        by: str,
        note: str = "",
        seen: str | None = None,
        due_ms: int | None = None,
    ) -> bool:
        """Bring the letter from one of ``before`` to ``after``; False where it is in none of those, or not there: of
        two who try it, one does. ``seen``: only where its last change is still that of this ``changed_by``, which tells
        two apart who bring it from a state to the same one. ``due_ms``: when its record is handled again."""
        with self._database.writing(durable=True) as connection:
            return self._rows.change(connection, letter_id, before, after, by, note, seen, due_ms)

    def hand_over(self, letter_ids: Sequence[int], before: LetterState, by: str, due_ms: int) -> list[int]:
        """Have those that are in the state ``before`` replayed, from ``due_ms`` on, by the daemon that has their
        partition; which they are."""
        with self._database.writing(durable=True) as connection:
            return self._rows.hand_over(connection, letter_ids, before, by, due_ms)

    def close(self) -> None:
        """Give back connections."""
        self._database.close()
