"""A deadline is passed down through every wait, so that a budget is spent once."""

import time


class Deadline:
    """A moment on the monotonic clock. It can be brought forward, never put off."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds left; 0 when passed."""
        return max(0.0, self._at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether nothing is left."""
        return self.remaining == 0.0

    def shorten(self, seconds: float) -> None:
        """At most ``seconds`` from now."""
        self._at = min(self._at, time.monotonic() + seconds)
