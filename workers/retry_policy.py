"""Whether, and when, a record whose handler raised is tried again."""

import random
from typing import Final

from kafkasrcd.outcomes import RetryLater
from kafkasrcd.settings import Retry, Settings
from kafkasrcd.workers.failure_policy import NeverAgain

_LONGEST_SECONDS: Final = 86_400.0


class RetryPolicy:
    """What the settings say. ``scheduled``: it waits in the store, and not in its place."""

    def __init__(self, settings: Settings) -> None:
        self.scheduled = settings.handler.retry is Retry.SCHEDULED
        self.attempts = settings.max_retries + 1
        """Of one record, in all."""
        self._backoff_ms = settings.retry_backoff_ms
        self._backoff_max_ms = settings.retry_backoff_max_ms
        self._never_again = NeverAgain(settings.handler.non_retryable)
        self._random = random.Random()  # noqa: S311 - for jitter

    def next_ns(self, error: Exception, attempts: int, most: int | None = None) -> int | None:
        """ns until the next attempt, ``attempts`` having failed, the last with ``error``; None where there is none.
        ``most``: attempts in all, as configured where it is unset."""
        if attempts >= (self.attempts if most is None else most) or self._never_again(error):
            return None
        return self._after_ns(error) if isinstance(error, RetryLater) else self._backoff_ns(attempts)

    def _after_ns(self, error: RetryLater) -> int:
        """As the handler asks, within a day: what it gives may be anything."""
        try:
            return int(min(max(error.after, 0.0), _LONGEST_SECONDS) * 1e9)
        except (TypeError, ValueError):
            return self._backoff_ns(1)

    def _backoff_ns(self, attempts: int) -> int:
        """Doubling with the attempts, capped, the upper half of it random: partitions that fail together spread."""
        milliseconds = min(self._backoff_ms * 2 ** min(attempts - 1, 30), self._backoff_max_ms)
        return int(milliseconds * self._random.uniform(0.5, 1.0) * 1e6)
