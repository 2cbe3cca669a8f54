"""Records that end, or hang, the worker that prepares them: counted, and after so many deaths not prepared again."""

from typing import Final

import msgspec

from kafkasrcd.daemon.hung_calls import MOST_STACKS
from kafkasrcd.settings import HandlerSettings
from kafkasrcd.workers.control import Quarantined

_MOST_WITH_STACKS: Final = 8
"""All that is refused travels in one packet."""


class DeadlyRecords:
    """Of one partition, since its assignment."""

    def __init__(self, settings: HandlerSettings) -> None:
        self.refused: tuple[Quarantined, ...] = ()
        """What the next worker passes on as errors, unprepared."""
        self._settings = settings
        self._offset = -1
        self._deaths = 0

    def count(self, offset: int, how: str, stacks: str | None, position: int) -> Quarantined | None:
        """The record at ``offset`` has ended one more worker; the record, where it is refused from now on.

        ``stacks``: of a worker that was killed, since it did not get on; None for any other. Nothing before
        ``position`` is prepared again.
        """
        self._deaths = self._deaths + 1 if offset == self._offset else 1
        self._offset = offset
        if self._deaths < self._settings.crash_attempts:
            return None
        times = "once" if self._deaths == 1 else f"{self._deaths} times, last"
        if stacks is not None:
            how = f"by taking longer than {self._settings.timeout_seconds:g} s"
        record = Quarantined(
            offset=offset,
            error="WorkerProcessEnded" if stacks is None else "WorkerTimeout",
            reason=f"its deserializer ended the worker {times} {how}",
            attempts=self._deaths,
            traceback=(stacks or "")[:MOST_STACKS],
        )
        before = [each for each in self.refused if each.offset >= position]
        without = len(before) + 1 - _MOST_WITH_STACKS
        stripped = [msgspec.structs.replace(each, traceback="") for each in before[: max(0, without)]]
        self.refused = (*stripped, *before[len(stripped) :], record)
        return record
