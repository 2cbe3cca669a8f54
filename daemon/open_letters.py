"""How many dead letters wait for a person, and how many for their time: looked up now and then for the status."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from kafkasrcd.errors import StoreError
from kafkasrcd.settings import OnFailure, Settings
from kafkasrcd.storage.dead_letters import LetterCount, LetterState
from kafkasrcd.workers.failure_policy import failure_policy

_EVERY_SECONDS: Final = 10.0
_REST: Final = 50
"""Times what it took: commits wait for the same thread, and counting a million letters takes a second."""


class OpenLetters:
    """Belongs to the loop. Asks only where letters are kept in the store; one that does not answer changes nothing."""

    def __init__(self, settings: Settings, look_up: Callable[[LetterState], Awaitable[list[LetterCount]]]) -> None:
        self._look_up = look_up
        self._kept = failure_policy(settings) is OnFailure.DEAD_LETTER and settings.handler.dead_letter_store
        self._due = 0.0
        self._asking: asyncio.Task[None] | None = None
        self.open: list[LetterCount] = []
        """As they were last found."""
        self.retrying: list[LetterCount] = []

    def watch(self, now: float, *, store_answers: bool) -> None:
        """Once a second; does not block."""
        if self._kept and store_answers and now >= self._due and (self._asking is None or self._asking.done()):
            self._asking = asyncio.ensure_future(self._ask())

    def stop(self) -> None:
        """Wait for no answer any more."""
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self) -> None:
        asked = time.monotonic()
        try:
            self.open = await self._look_up(LetterState.OPEN)
            self.retrying = await self._look_up(LetterState.RETRYING)
        except StoreError:
            pass  # who records says so, and what to do
        now = time.monotonic()
        self._due = now + max(_EVERY_SECONDS, _REST * (now - asked))
