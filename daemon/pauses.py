"""Which partitions are paused: by intents in the offset store, looked up once a second, and by the breaker's own."""

import asyncio
import time
from collections.abc import Callable, Mapping

from kafkasrcd.daemon.partition import Partition
from kafkasrcd.daemon.pause_words import BREAKER, way_on
from kafkasrcd.daemon.recorder import Recorder
from kafkasrcd.errors import StoreError
from kafkasrcd.settings import Settings
from kafkasrcd.storage.intents import Intent, IntentKind, Scope
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.event_log import EventLog


class Pauses:
    """Belongs to the loop. A store that does not answer changes nothing. ``on_changed`` is told of a partition that was
    paused or resumed."""

    def __init__(
        self,
        settings: Settings,
        recorder: Recorder,
        partitions: Mapping[TopicPartition, Partition],
        on_changed: Callable[[Partition], None],
    ) -> None:
        self._settings = settings
        self._recorder = recorder
        self._partitions = partitions
        self._on_changed = on_changed
        self._stored: dict[Scope, Intent] = {}
        self._unstored: dict[Scope, Intent] = {}
        """The breaker's that the store does not have yet."""
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._log = EventLog("pauses")

    def watch(self, *, store_answers: bool) -> None:
        """Once a second; does not block."""
        if store_answers and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._watch())

    async def look_up(self) -> None:
        """Store what is not stored yet, ask the store, and have the partitions follow. Raises StoreError where that
        cannot be done now."""
        async with self._looking:  # or one asked before a resume could store again what that has taken back
            told = dict(self._unstored)
            found = await self._recorder.intents(list(told.values()))
            self._stored = {intent.scope: intent for intent in found if intent.kind is IntentKind.PAUSE}
            for scope in told:
                del self._unstored[scope]
        for partition in list(self._partitions.values()):
            self._follow(partition)

    def trip(self, partition: Partition, reason: str) -> None:
        """Pause it now, wherever it goes from here, and whether or not the store can be told now."""
        name = partition.name
        intent = Intent(
            kind=IntentKind.PAUSE,
            scope=Scope(name.topic, name.partition),
            set_by=BREAKER,
            set_ms=int(time.time() * 1000),
            reason=reason,
        )
        self._log.error(
            "dead_letter_breaker",
            f"{name} is paused: {reason}; mend it, then {way_on(intent, self._settings)}",
            topic=name.topic,
            partition=name.partition,
        )
        self._unstored[intent.scope] = intent
        self._follow(partition)
        self.watch(store_answers=True)

    def stop(self) -> None:
        """Wait for no answer any more."""
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        try:
            await self.look_up()
            while self._unstored:  # the breaker's, since it was asked
                await self.look_up()
        except StoreError as error:
            self._log.repeated(
                "pauses_unknown", f"whether partitions are to be paused is not known now: {error}", same=(str(error),)
            )

    def _follow(self, partition: Partition) -> None:
        intent = self._of(partition.name)
        if intent == partition.paused:
            return
        if intent is None:
            partition.resume()
        else:
            partition.pause(intent)
        self._on_changed(partition)

    def _of(self, name: TopicPartition) -> Intent | None:
        """The nearest one that is about it."""
        for scope in Scope(name.topic, name.partition).around():
            intent = self._unstored.get(scope) or self._stored.get(scope)
            if intent is not None:
                return intent
        return None
