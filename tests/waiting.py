"""Waiting in tests: poll a condition until a deadline, and say what was seen last."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

DEFAULT_INTERVAL_SECONDS = 0.02


def wait_until(
    condition: Callable[[], T],
    deadline_seconds: float,
    describe: str,
    *,
    seen: Callable[[], object] | None = None,
    ignoring: tuple[type[Exception], ...] = (),
    interval_seconds: float = DEFAULT_INTERVAL_SECONDS,
) -> T:
    """Call `condition` until it returns something true, and return that.

    `describe` completes "waited for …". The failure shows what `condition` returned last, or what `seen()` returns
    where that says more. Exceptions of the types in `ignoring` count as "not yet"; every other one goes through.
    The condition is asked at least once, and once more at the deadline. Raises AssertionError.
    """
    deadline = time.monotonic() + deadline_seconds
    while True:
        # Read before the condition: a slow condition that becomes true late still counts, a false one is final.
        remaining = deadline - time.monotonic()
        last: object
        try:
            value = condition()
        except ignoring as error:
            last = error
        else:
            if value:
                return value
            last = value
        if remaining <= 0:
            shown = last if seen is None else seen()
            cause = last if isinstance(last, Exception) else None
            raise AssertionError(f"waited {deadline_seconds:g} s for {describe}; last seen: {shown!r}") from cause
        time.sleep(min(interval_seconds, remaining))


def wait_until_equal(
    read: Callable[[], T],
    expected: T,
    deadline_seconds: float,
    describe: str,
    *,
    ignoring: tuple[type[Exception], ...] = (),
    interval_seconds: float = DEFAULT_INTERVAL_SECONDS,
) -> None:
    """Call `read` until it returns `expected`. The failure shows the value read last. Raises AssertionError."""
    last: list[T] = []

    def equal() -> bool:
        last[:] = [read()]
        return last[0] == expected

    wait_until(
        equal,
        deadline_seconds,
        f"{describe} to be {expected!r}",
        seen=lambda: last[0] if last else "nothing",
        ignoring=ignoring,
        interval_seconds=interval_seconds,
    )
