"""What a commit strategy does inside a handler process: how it calls the handler, and when what is handled is done for
good."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from kafkasrcd.errors import HandlerMisuse
from kafkasrcd.message import Message, commit_through
from kafkasrcd.storage.dead_letters import DeadLetter, Redelivered, StoredLetter
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.dead_letter_sink import DeadLetterSink


class HeldUp(Exception):
    """The handler was not called, or what it did is rolled back: the runner begins its turn anew, with cursors that may
    have been rewound."""


class Commits:
    """``auto`` and ``periodic``: the handler is called as it is, and what it has handled is done.

    The other strategies override what they need. All of it runs where the runner does.
    """

    one_at_a_time = False
    """Whether a second call must not begin in this process before the first has ended and is counted."""

    def __init__(self, letters: DeadLetterSink) -> None:
        """``letters``: where dead letters go, but for what is in a transaction."""
        self._letters = letters

    def caller(self, cursor: PartitionCursor) -> Callable[[Any], Any]:
        """What to call for a message, or a batch, of ``cursor``; of an ``async def`` handler, a coroutine function."""
        return cursor.target.function

    def bury(self, cursor: PartitionCursor, letter: DeadLetter) -> None:
        """Keep ``letter`` of a record of ``cursor``; blocks. Raises KafkasrcdError where it cannot be kept now, or
        HeldUp."""
        self._letters.keep(letter)

    async def bury_async(self, cursor: PartitionCursor, letter: DeadLetter) -> None:
        """``bury`` of a runner with a loop."""
        await asyncio.to_thread(self.bury, cursor, letter)

    def letter(self, cursor: PartitionCursor, letter_id: int) -> StoredLetter | None:
        """What is known of a letter of a record of ``cursor``, here; blocks. Raises StoreUnavailable, or HeldUp."""
        return self._letters.find(letter_id)

    async def letter_async(self, cursor: PartitionCursor, letter_id: int) -> StoredLetter | None:
        """``letter`` of a runner with a loop."""
        return await asyncio.to_thread(self.letter, cursor, letter_id)

    def settle(self, cursor: PartitionCursor, redelivered: Redelivered) -> bool:
        """Write down what became of a letter whose record was handled again; blocks. False where someone else has
        changed it meanwhile. Raises as ``bury``."""
        return self._letters.settle(redelivered)

    async def settle_async(self, cursor: PartitionCursor, redelivered: Redelivered) -> bool:
        """``settle`` of a runner with a loop."""
        return await asyncio.to_thread(self.settle, cursor, redelivered)

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
