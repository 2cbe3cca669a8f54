"""glibc's malloc, set for a worker: memory that a burst needed is given back after it.

By default malloc keeps librdkafka's fetch buffers, a megabyte each, in an arena of each of its threads, and what lies
between two small objects for ever: 9 MB more a worker, measured, at the same speed.
"""

import ctypes
from typing import Final

# malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

_LARGE_BYTES: Final = 512 * 1024
"""Larger than a batch of ordinary records, which comes and goes a thousand times a second; smaller than a fetch."""


class Allocator:
    """This process's malloc; where the libc is another than glibc, its own ways."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._is_glibc = hasattr(self._libc, "mallopt") and hasattr(self._libc, "malloc_trim")
        if self._is_glibc:
            self._libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
            self._libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)
            self._libc.mallopt(_M_ARENA_MAX, 1)

    def give_back(self) -> None:
        """Return every page that is free; about a millisecond."""
        if self._is_glibc:
            self._libc.malloc_trim(0)
