"""How many of a partition's last records became dead letters."""

from collections import deque
from typing import Final, NamedTuple

MOST_RECORDS: Final = 1_000
"""Records further back do not count, however young: where a fast partition begins to fail, a minute of good records
must not outvote the bad ones until thousands have gone by."""


class _Sample(NamedTuple):
    at: float
    finished: int
    dead: int


class DeadLetterWindow:
    """From samples of growing totals. It begins with the first, and reaches ``seconds`` back, or ``MOST_RECORDS``
    (``least_records`` where that is more), whichever is less; a sample's records count or do not as a whole."""

    def __init__(self, seconds: float, least_records: int) -> None:
        self._seconds = seconds
        self._least = least_records
        self._most = max(MOST_RECORDS, least_records)
        self._samples: deque[_Sample] = deque()

    def observe(self, now: float, finished: int, dead: int) -> None:
        """At ``now`` (seconds, any clock) ``finished`` records were done with, ``dead`` of them as dead letters."""
        samples = self._samples
        # Without the ones that say nothing new there are no more samples than records that count.
        if not samples or samples[-1].finished != finished:
            samples.append(_Sample(now, finished, dead))
        while len(samples) > 1 and (
            samples[1].at <= now - self._seconds or finished - samples[1].finished >= self._most
        ):
            samples.popleft()

    @property
    def counts(self) -> tuple[int, int]:
        """(dead letters, records) in the window."""
        if not self._samples:
            return 0, 0
        first, last = self._samples[0], self._samples[-1]
        return last.dead - first.dead, last.finished - first.finished

    def exceeds(self, ratio: float) -> bool:
        """Whether more of them became dead letters, of enough records to tell."""
        dead, finished = self.counts
        return finished >= self._least and dead > ratio * finished
