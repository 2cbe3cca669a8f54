"""What a commit strategy does inside a handler process: how it calls the handler, and when what is handled is done for
good."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from kafkasrcd.errors import HandlerMisuse
from kafkasrcd.message import Message, commit_through
from kafkasrcd.storage.dead_letters import DeadLetter
from kafkasrcd.workers.cursor import PartitionCursor


class HeldUp(Exception):
    """The handler was not called, or what it did is rolled back: the runner begins its turn anew, with cursors that may
    have been rewound."""


class Commits:
    """``auto`` and ``periodic``: the handler is called as it is, and what it has handled is done.

    The other strategies override what they need. All of it runs where the runner does.
    """

    one_at_a_time = False
    """Whether a second call must not begin in this process before the first has ended and is counted."""

    def __init__(self, keep_letter: Callable[[DeadLetter], None]) -> None:
        """``keep_letter``: where dead letters go. May be called from several threads."""
        self._keep_letter = keep_letter

    def caller(self, cursor: PartitionCursor) -> Callable[[Any], Any]:
        """What to call for a message, or a batch, of ``cursor``; of an ``async def`` handler, a coroutine function."""
        return cursor.target.function

    def bury(self, cursor: PartitionCursor, letter: DeadLetter) -> None:
        """Keep ``letter`` of a record of ``cursor``; blocks. Raises KafkasrcdError where it cannot be kept now, or
        HeldUp."""
        self._keep_letter(letter)

    async def bury_async(self, cursor: PartitionCursor, letter: DeadLetter) -> None:
        """``bury`` of a runner with a loop."""
        await asyncio.to_thread(self.bury, cursor, letter)

    def loaded(self, cursor: PartitionCursor, offsets: Sequence[int]) -> None:
        """These records have been read from the ring."""

    def given_up(self, cursor: PartitionCursor, offset: int) -> None:
        """The record is skipped: as if it had been handled."""

    def closed(self, cursor: PartitionCursor) -> None:
        """The slot is not this process's any more."""

    def turn(self) -> float:
        """Between two turns of a plain runner: do what is due. Milliseconds until something will be; may block."""
        return float("inf")

    async def turn_async(self) -> float:
        """``turn`` of a runner with a loop."""
        return float("inf")

    def end(self) -> None:
        """The process ends; nothing of it is open any more, or it is undone."""

    async def end_async(self) -> None:
        """``end`` of a runner with a loop."""


def refuse_message_commits(strategy: str) -> None:
    """Have ``message.commit()`` raise in this process: with ``strategy`` it would not do what it says."""

    def refuse(message: Message[Any]) -> None:
        raise HandlerMisuse(
            f"message.commit() is for commit_strategy manual, and this is {strategy}: leave it out, or set "
            "commit_strategy"
        )

    commit_through(refuse)
