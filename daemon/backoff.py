"""How long to wait before a thing that ended is started again."""

import time
from collections import deque
from typing import Final

_FIRST_SECONDS: Final = 0.2
_MOST_SECONDS: Final = 10.0


class RestartBackoff:
    """Restarts within a window: the first at once, the next ones later and later, none past the limit."""

    def __init__(self, limit: int, window_seconds: float) -> None:
        self.total = 0
        """Restarts ever."""
        self._limit = limit
        self._window_seconds = window_seconds
        self._deaths: deque[float] = deque()

    def next_delay(self) -> float | None:
        """Note a death; the seconds to wait before the restart, or None where the limit is exceeded."""
        now = time.monotonic()
        while self._deaths and self._deaths[0] < now - self._window_seconds:
            self._deaths.popleft()
        self._deaths.append(now)
        recent = len(self._deaths)
        if recent > self._limit:
            return None
        self.total += 1
        return 0.0 if recent == 1 else min(_FIRST_SECONDS * 2 ** min(recent - 2, 30), _MOST_SECONDS)

    def forget(self) -> None:
        """What made it die is known and will not be met again: the next death is a first one."""
        self._deaths.clear()
