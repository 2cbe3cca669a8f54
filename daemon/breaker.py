"""The breaker: pauses a partition whose records become dead letters, before all of its topic does."""

from collections.abc import Callable, Mapping

from kafkasrcd.daemon.dead_letter_window import DeadLetterWindow
from kafkasrcd.daemon.lifecycle import WORKING
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.settings import Settings
from kafkasrcd.storage.offset_store import TopicPartition


class Breaker:
    """Belongs to the loop. ``trip`` pauses a partition, for the reason given. A partition's window begins when its work
    begins: with an assignment, or after a pause."""

    def __init__(
        self,
        settings: Settings,
        partitions: Mapping[TopicPartition, Partition],
        trip: Callable[[Partition, str], None],
    ) -> None:
        self._handler = settings.handler
        self._partitions = partitions
        self._trip = trip
        self._windows: dict[Partition, DeadLetterWindow] = {}

    def look(self, now: float) -> None:
        """In every turn of the loop, ``now`` in monotonic seconds: what dead letters there are after the word to stop
        are those of one turn."""
        ratio = self._handler.max_dead_letter_ratio
        if ratio >= 1:
            return
        before, self._windows = self._windows, {}
        for partition in list(self._partitions.values()):
            if partition.state not in WORKING or partition.paused is not None:
                continue
            window = before.get(partition) or self._window()
            totals = partition.totals
            later = totals.given_up_later  # finished before, when they were put aside
            window.observe(now, totals.finished + later, totals.dead_lettered + later)
            if not window.exceeds(ratio):
                self._windows[partition] = window
                continue
            dead, finished = window.counts
            self._trip(
                partition,
                f"{dead:,} of its last {finished:,} records became dead letters, {dead / finished:.0%}, and "
                f"handler.max_dead_letter_ratio is {ratio:g}",
            )

    def _window(self) -> DeadLetterWindow:
        return DeadLetterWindow(self._handler.dead_letter_window_seconds, self._handler.dead_letter_min_records)
