"""Work that costs a known amount of CPU and nothing else, as a handler's stand-in."""

import time
from itertools import repeat

CALIBRATION_RUNS = 20_000


def spin(iterations: int) -> None:
    """Hold the interpreter for `iterations` rounds of a loop.

    A fixed amount of work, not a fixed time on the clock: a process that waits for a core has not worked meanwhile.
    """
    # Not range(): its integers are allocated, which costs a quarter more or less as the heap happens to lie.
    for _ in repeat(None, iterations):
        pass


def calibrate(microseconds: int) -> int:
    """How many iterations cost that much CPU here, most of the time. Takes about a second."""
    iterations = 10_000
    costs_ns = sorted(_spin_ns(iterations) for _ in range(CALIBRATION_RUNS))
    # The machine's own speed varies by a tenth from second to second: the middle, not the best.
    return round(iterations * microseconds * 1000 / costs_ns[len(costs_ns) // 2])


def _spin_ns(iterations: int) -> int:
    started = time.thread_time_ns()
    spin(iterations)
    return time.thread_time_ns() - started
