"""How many records a transaction may have by now: fewer where transactions of several processes get in each other's
way."""

from collections.abc import Callable
from typing import Final

_LEAST_HOLD_NS: Final = 1_000_000_000
"""What a deadlock costs: PostgreSQL looks for one after a second (deadlock_timeout), and all in it stand still."""
_MOST_HOLD_NS: Final = 60_000_000_000


class CheckpointSize:
    """``most``: what is configured. ``clock``: nanoseconds.

    A conflict halves the size. It grows back slowly, doubling after a hold without one; each conflict doubles the hold,
    and each growth halves it. So where processes write the same rows all the time they soon commit after every few, or
    every one, and do not meet again every second; and where they do not any more, it is as before within minutes.
    """

    def __init__(self, most: int, clock: Callable[[], int]) -> None:
        self.now = most
        """Commit when there are so many."""
        self._most = most
        self._clock = clock
        self._hold_ns = _LEAST_HOLD_NS
        self._grows_at_ns = 0

    def conflict(self, count: int) -> None:
        """A transaction of ``count`` records was in another's way, and is undone."""
        self.now = max(1, min(self.now, count) // 2)
        self._hold_ns = min(2 * self._hold_ns, _MOST_HOLD_NS)
        self._grows_at_ns = self._clock() + self._hold_ns

    def committed(self) -> None:
        """A transaction went through."""
        if self.now >= self._most:
            return
        now_ns = self._clock()
        if now_ns >= self._grows_at_ns:
            self.now = min(2 * self.now, self._most)
            self._hold_ns = max(self._hold_ns // 2, _LEAST_HOLD_NS)
            self._grows_at_ns = now_ns + self._hold_ns
