"""The one clock for leases and progress: nanoseconds since boot, suspend included, the same in every process."""

from time import CLOCK_BOOTTIME, clock_gettime_ns


def boottime_ns() -> int:
    """Nanoseconds since boot, counting time asleep (clock_gettime(2), CLOCK_BOOTTIME), so that a thawed host sees
    how long it was away."""
    return clock_gettime_ns(CLOCK_BOOTTIME)
