"""Events a second over the last minute, right from the first second."""

from collections import deque
from typing import Final

WINDOW_SECONDS: Final = 60.0
"""The seed's window."""


class RollingRate:
    """From samples of a growing total, taken at least once a second."""

    def __init__(self, now: float, total: int = 0) -> None:
        self._samples: deque[tuple[float, int]] = deque([(now, total)])

    def observe(self, now: float, total: int) -> None:
        """The total was ``total`` at ``now`` (seconds, any clock)."""
        self._samples.append((now, total))
        # One sample older than the window stays, so that the window is always covered.
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def per_second(self) -> float:
        """Over the window, or over the time since the first sample where that is shorter; 0.0 before two."""
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return max(0.0, (after - before) / (last - first)) if last > first else 0.0
