"""Letters that are due go to the handler processes that have their partitions.

The store says which, about once a second; a handler process is given the ids of some and reads the letters itself. None
is given to two, since a partition's records go to the owner of the partition; and what becomes of a letter is written
down only where it is still as it was when it was read.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from kafkasrcd.daemon.handler_pool import HandlerPool, HowEnded
from kafkasrcd.daemon.lifecycle import State
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.errors import StoreError
from kafkasrcd.settings import Settings
from kafkasrcd.storage.dead_letters import DueLetter
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.storage.opening import MEMORY_URL
from kafkasrcd.workers.control import LetterDue, Quarantined
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.spread import slot_of

_LOOKED_UP: Final = 500
_GIVEN: Final = 20
"""To one slot at once: a handler process may have the records of so many in memory."""

LookUp = Callable[[Sequence[TopicPartition], int], Awaitable[list[DueLetter]]]


class DueLetters:
    """Belongs to the loop. A store that does not answer changes nothing: they are due as before."""

    def __init__(
        self,
        settings: Settings,
        partitions: Mapping[TopicPartition, Partition],
        handlers: HandlerPool,
        look_up: LookUp,
    ) -> None:
        self._has_store = settings.store.url != MEMORY_URL
        self._crash_attempts = settings.handler.crash_attempts
        self._partitions = partitions
        self._handlers = handlers
        self._look_up = look_up
        self._looking: asyncio.Task[None] | None = None
        self._given: dict[int, set[int]] = {}
        """By binding, the letters it has."""
        self._deaths: dict[int, int] = {}
        """By letter, how many processes it has ended."""
        self._suspects: set[int] = set()
        """Letters that were, with others, in the hands of a process that died."""
        self._ended: dict[int, Quarantined] = {}
        """Letters that have ended their process too often."""
        self._log = EventLog("handlers")

    def watch(self, *, store_answers: bool = True) -> None:
        """Once a second; does not block."""
        if self._has_store and store_answers and (self._looking is None or self._looking.done()):
            self._looking = asyncio.ensure_future(self._look())

    def stop(self) -> None:
        """Give no more."""
        self._has_store = False
        if self._looking is not None:
            self._looking.cancel()

    def on_done(self, binding: int, done: int) -> None:
        """The handler process has nothing left of what it was given; ``done`` of them got somewhere."""
        for letter_id in self._given.pop(binding, ()):
            self._suspects.discard(letter_id)
            if self._ended.pop(letter_id, None) is not None:
                self._deaths.pop(letter_id, None)
        if done:
            self.watch()

    def on_unbound(self, binding: int) -> None:
        """The process has the partition no more."""
        self._given.pop(binding, None)

    def on_process_ended(self, bindings: Sequence[int], letter_id: int | None, how: HowEnded) -> None:
        """The process with ``bindings`` has ended: by the record of ``letter_id``, or 0 for by none; None where nobody
        knows, and each letter that it had may be the one."""
        given = [each for binding in bindings for each in self._given.pop(binding, ())]
        if not letter_id:
            self._suspects.update(given if letter_id is None else ())
            return
        deaths = self._deaths[letter_id] = self._deaths.get(letter_id, 0) + 1
        self._log.warning(
            "letter_in_flight",
            f"the record of dead letter {letter_id} was in the hands of a handler process when it ended",
            letter=letter_id,
            deaths=deaths,
        )
        if deaths >= self._crash_attempts:
            self._ended[letter_id] = how.too_often(0, deaths)

    async def _look(self) -> None:
        names = [
            name
            for name, partition in self._partitions.items()
            if partition.state is State.RUNNING and any(binding not in self._given for binding in partition.bindings)
        ]
        if not names:
            return
        try:
            found = await self._look_up(names, _LOOKED_UP)
        except StoreError:
            return  # who records says so, and what to do
        for binding, letters in self._by_binding(found).items():
            chosen = letters[:_GIVEN]
            if self._handlers.redeliver(binding, [self._due(letter.id) for letter in chosen]):
                self._given[binding] = {letter.id for letter in chosen}

    def _by_binding(self, found: Sequence[DueLetter]) -> dict[int, list[DueLetter]]:
        by_binding: dict[int, list[DueLetter]] = {}
        for letter in found:
            partition = self._partitions.get(TopicPartition(letter.topic, letter.partition))
            if partition is None or partition.state is not State.RUNNING or not partition.bindings:
                continue
            slot = slot_of(self._handlers.layout, letter.key, letter.offset)
            binding = list(partition.bindings)[slot]
            if binding not in self._given:
                by_binding.setdefault(binding, []).append(letter)
        return by_binding

    def _due(self, letter_id: int) -> LetterDue:
        alone = letter_id in self._suspects or letter_id in self._deaths
        return LetterDue(id=letter_id, alone=alone, ended=self._ended.get(letter_id))
