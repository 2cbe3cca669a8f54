"""Replaying dead letters through the handler: they are marked as due, and the daemon that has their partitions does the
rest, in the order and the transactions of its own. A command that ends changes nothing about that.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final

from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.dead_letter_store import DeadLetterStore
from kafkasrcd.storage.dead_letters import LetterFilter, LetterState

_LOOK_SECONDS: Final = 0.3
_QUIET_SECONDS: Final = 5.0
"""A daemon looks once a second; where nothing happens for so long, there may be none."""
_AT_ONCE: Final = 500
"""IDs in one statement, which has a limit."""


class Handover:
    """One command's. ``by`` names it, and no other."""

    def __init__(self, store: DeadLetterStore, by: str, say: Callable[[str], None]) -> None:
        self._store = store
        self._by = by
        self._say = say
        self._ids: list[int] = []

    def give(self, letter_ids: Sequence[int], before: LetterState) -> int:
        """Mark those that are in the state ``before``; how many that were. Raises StoreUnavailable."""
        for at in range(0, len(letter_ids), _AT_ONCE):
            self._ids += self._store.hand_over(letter_ids[at : at + _AT_ONCE], before, self._by, wall_clock_ms())
        return len(self._ids)

    def wait(self, done: Callable[[], None], stopped: Callable[[], bool]) -> None:
        """Until each is replayed, or open again, or ``stopped``; ``done`` is called for each. Blocks."""
        left, quiet_since, said = len(self._ids), time.monotonic(), False
        while left and not stopped():
            time.sleep(_LOOK_SECONDS)
            now_left = self._store.count(LetterFilter(states=(LetterState.REPLAYING,), changed_by=self._by))
            for _ in range(left - now_left):
                done()
            if now_left < left:
                left, quiet_since = now_left, time.monotonic()
            elif not said and time.monotonic() - quiet_since > _QUIET_SECONDS:
                said = True
                self._say(
                    f"{left:,} wait for a daemon that has their partitions; is one running (kafkasrcd status)? Ctrl-C "
                    "leaves them to it"
                )

    def count(self, state: LetterState) -> int:
        """How many of them are in ``state`` now."""
        return sum(
            self._store.count(LetterFilter(ids=tuple(self._ids[at : at + _AT_ONCE]), states=(state,)))
            for at in range(0, len(self._ids), _AT_ONCE)
        )
