"""Whether the broker can be reached: said once when it cannot, once when it can again, and asked ever more slowly."""

import asyncio
import time
from typing import Final

from kafkasrcd.daemon.recorder import Recorder
from kafkasrcd.workers.event_log import EventLog

_ASK_SECONDS: Final = 2.0
_FIRST_WAIT_SECONDS: Final = 0.5
_MOST_WAIT_SECONDS: Final = 10.0


class BrokerWatch:
    """Told by librdkafka of connections that are gone; finds out by itself whether any broker answers."""

    def __init__(self, brokers: str, recorder: Recorder) -> None:
        self.down_since: float | None = None
        """Seconds since 1970, or None."""
        self._brokers = brokers
        self._last_reason = ""
        self._recorder = recorder
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._log = EventLog("broker")

    def suspect(self, reason: str) -> None:
        """A connection is gone, or all are; ``reason`` in librdkafka's words, or empty."""
        if reason:
            self._last_reason = reason
        if self._task is None and not self._stopped:
            self._task = asyncio.get_running_loop().create_task(self.until_reachable())

    async def until_reachable(self) -> None:
        """Return when a broker answers; says so where that takes more than one try."""
        wait_seconds = _FIRST_WAIT_SECONDS
        while not await self._recorder.broker_answers(_ASK_SECONDS):
            if self.down_since is None:
                self.down_since = time.time()
                self._log.error(
                    "broker_unreachable",
                    f"no broker answers at {self._brokers}{self.reason}; it is tried until one does",
                    brokers=self._brokers,
                )
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, _MOST_WAIT_SECONDS)
        if self.down_since is not None:
            away = time.time() - self.down_since
            self._log.info("broker_back", f"a broker answers again, after {away:.0f} s", seconds=round(away, 1))
            self.down_since = None
        self._task = None

    @property
    def reason(self) -> str:
        """What librdkafka said last, in brackets, or empty."""
        return f" ({self._last_reason})" if self._last_reason else ""

    def stop(self) -> None:
        """Ask no more; connections that close from now on are closed by us."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
