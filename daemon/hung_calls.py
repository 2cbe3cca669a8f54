"""Processes that do not get on: for how long a call of the user's code goes on, and where their threads are."""

import asyncio
import os
from typing import Final

from kafkasrcd.daemon.child_processes import ChildProcess
from kafkasrcd.workers.control import STACKS_SIGNAL

MOST_STACKS: Final = 8_000
"""Characters: what is quarantined goes along with each binding, or a worker's start, in one packet."""
_LONGEST_STEP_SECONDS: Final = 2.0
"""Of a supervisor that was away itself, no more than this counts: nobody looked."""
_ANSWER_SECONDS: Final = 1.0
"""The stacks are written by a signal's handler, within a millisecond of a process that runs at all."""


class Hands:
    """The calls of one process: of a handler process by binding, of a worker one."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float, float]] = {}
        """Which call, when it was looked at last, and for how many seconds it was seen."""

    def look(self, binding: int, call: int | None, now: float) -> None:
        """``call``: a number for the oldest one that goes on, or None; ``now`` in monotonic seconds."""
        if call is None:
            self._seen.pop(binding, None)
            return
        before, then, seconds = self._seen.get(binding, (call, now, 0.0))
        seconds = seconds + min(now - then, _LONGEST_STEP_SECONDS) if before == call else 0.0
        self._seen[binding] = (call, now, seconds)

    def longer_than(self, seconds: float) -> int | None:
        """The binding whose oldest call goes on for longer than that."""
        return next((binding for binding, (_, _, seen) in self._seen.items() if seen > seconds), None)

    def clear(self) -> None:
        """The process is another one."""
        self._seen.clear()


class Stacks:
    """A file in memory, which a process writes the stacks of its threads to when it is asked."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("kafkasrcd-stacks", os.MFD_CLOEXEC)

    async def ask(self, child: ChildProcess) -> str:
        """The stacks of ``child``; empty where it does not answer, being stopped."""
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        child.signal(STACKS_SIGNAL)
        before = -1
        for _ in range(round(_ANSWER_SECONDS / 0.05)):
            await asyncio.sleep(0.05)
            size = os.fstat(self.fd).st_size
            if size and size == before:
                break
            before = size
        return self.read()

    def read(self) -> str:
        """What was written last."""
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0).decode(errors="replace")

    def close(self) -> None:
        """Give it back."""
        os.close(self.fd)
