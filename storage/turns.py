"""Whose turn it is to write in a SQLite file, where several processes are in a transaction nearly all of the time.

SQLite's write lock has no queue. Who waits for it looks every 0.1 s whether it is free, and a process that begins its
next transaction right after a commit is faster than that every time: all others are told that the database is locked.
So there is a queue, of locks on bytes of a file beside the database, which the kernel gives back at their holder's end.
Who comes takes the last place and moves up; only the first looks for the write lock, often.
"""

import asyncio
import fcntl
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from sqlalchemy.exc import DBAPIError

from kafkasrcd.errors import StoreUnavailable

_LOOK_SECONDS: Final = 0.002
"""Less than a commit takes, and 1 % of a core for each process that waits."""
_PLACES: Final = 16
"""More may wait; which of those comes in next is chance. Each place costs a writer 3 µs."""


class Turns:
    """One writer's place in the queue for the database at ``path``."""

    def __init__(self, path: Path, busy_timeout_ms: int) -> None:
        self._path = path
        self._busy_timeout_ms = busy_timeout_ms
        self._file: int | None = None

    def wait(self, begin: Callable[[], object]) -> None:
        """Call ``begin``, which takes the write lock or says at once that it is taken, until it has succeeded.

        Blocks for the busy timeout at most. Raises StoreUnavailable, or what ``begin`` raises.
        """
        deadline = self._deadline()
        try:
            for _ in self._moving_up(deadline):
                time.sleep(_LOOK_SECONDS)
            while True:
                try:
                    begin()
                except DBAPIError as error:
                    _raise_unless_taken(error, deadline)
                else:
                    return
                time.sleep(_LOOK_SECONDS)
        finally:
            self._leave()

    async def wait_async(self, begin: Callable[[], Awaitable[object]]) -> None:
        """As ``wait``, awaited."""
        deadline = self._deadline()
        try:
            for _ in self._moving_up(deadline):
                await asyncio.sleep(_LOOK_SECONDS)
            while True:
                try:
                    await begin()
                except DBAPIError as error:
                    _raise_unless_taken(error, deadline)
                else:
                    return
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self._leave()

    def close(self) -> None:
        """Nothing is held afterwards. It can be used again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _deadline(self) -> float:
        return time.monotonic() + self._busy_timeout_ms / 1000

    def _moving_up(self, deadline: float) -> Iterator[None]:
        """Yields wherever there is something to wait for; ends in the first place."""
        try:
            if self._file is None:
                self._file = os.open(f"{self._path}-turns", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for place in reversed(range(_PLACES)):
                while not _is_taken(self._file, place):
                    if time.monotonic() > deadline:
                        raise locked(self._path, self._busy_timeout_ms, "others were waiting to write")
                    yield
                if place + 1 < _PLACES:
                    fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place + 1)
        except OSError as error:
            raise StoreUnavailable(f"{self._path}-turns cannot be used ({error.strerror})") from error

    def _leave(self) -> None:
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, _PLACES, 0)


def locked(path: Path, busy_timeout_ms: int, said: str) -> StoreUnavailable:
    """The error for a write lock that was not to be had."""
    return StoreUnavailable(
        f"{path} was locked by another process for {busy_timeout_ms} ms ({said}); "
        "find what holds it (fuser), or raise store.busy_timeout_ms"
    )


def _is_taken(file: int, place: int) -> bool:
    """Whether it is this process's now."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        return False
    return True


def _raise_unless_taken(error: DBAPIError, deadline: float) -> None:
    """Raise ``error`` if it is about anything else than the write lock, or came too late."""
    code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
        raise error
