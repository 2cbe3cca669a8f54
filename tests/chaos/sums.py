"""What the counts of each partition add up to: consumed = succeeded + skipped + dead-lettered + in flight.

The counts are cells that go on while they are read. Two statuses, one after the other, bound what each of them was at a
moment between; and in a storm's topic every offset has a record, so the offsets in flight bound the records in flight.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple

from kafkasrcd.daemon.control_client import ControlClient
from kafkasrcd.daemon.status import PartitionStatus, Status
from kafkasrcd.errors import KafkasrcdError
from tests.chaos.daemon_slot import DaemonSlot
from tests.chaos.fault import daemon_name
from tests.chaos.payment import LETTER_ERRORS, Flaw, Payment

TURN_RECORDS = 12
"""A handler process counts what succeeds at the end of its turn: 10 ms, of at least one a record."""
EVERY_SECONDS = 0.5


class Rules(NamedTuple):
    """What a storm's settings say of the counts."""

    slots: int
    """With more than one, records are finished behind the processed prefix too."""
    rolls_back: bool
    """What is rolled back is handled again, and counts again."""
    retries: int


def finished(status: PartitionStatus) -> int:
    """What is not in flight any more."""
    return status.succeeded + status.skipped + status.dead_lettered + status.scheduled


def imbalance(before: PartitionStatus, after: PartitionStatus, rules: Rules) -> str | None:
    """Why the counts of `before` and `after`, of the same epoch, cannot have added up at a moment between the two."""
    if before.position is None or before.processed is None or after.position is None or after.processed is None:
        return None
    # A slot's may read lower once its empty ring has a record again, behind offsets that were none of its own.
    least_processed = min(before.processed, after.processed)
    # A worker counts records when it begins to hand them off, and may wait with them, for room or for its lease.
    end = max(after.position, after.high_watermark or 0)
    most_in_flight = end - least_processed + TURN_RECORDS * rules.slots
    if before.messages - finished(after) > most_in_flight:
        return f"at least {before.messages - finished(after)} in flight, and no more than {most_in_flight} can be"
    if rules.rolls_back:
        return None
    least_in_flight = before.position - after.processed if rules.slots == 1 else 0
    if after.messages - finished(before) < least_in_flight:
        return f"at most {after.messages - finished(before)} in flight, and no less than {least_in_flight} can be"
    return None


def _counts(status: PartitionStatus) -> tuple[int, ...]:
    return status.messages, status.succeeded, status.skipped, status.dead_lettered, status.failures


def at_rest(statuses: Iterable[PartitionStatus], rules: Rules) -> list[str]:
    """Where everything is handled: the partitions of which something is in flight all the same, by their counts."""
    return [
        f"partition {status.partition}: {status.messages} consumed and {finished(status)} finished: {status}"
        for status in statuses
        if (status.messages > finished(status) if rules.rolls_back else status.messages != finished(status))
    ]


def lot_differences(
    before: Mapping[int, PartitionStatus],
    after: Mapping[int, PartitionStatus],
    lot: Mapping[int, Sequence[Payment]],
    rules: Rules,
) -> list[str]:
    """Where the counts of a partition, from rest to rest, have not grown by what its payments of `lot` are."""
    attempts = {Flaw.UNREADABLE: 1, Flaw.REFUSED: 1 + rules.retries, Flaw.REFUSED_ONCE: 1, Flaw.REJECTED: 1}
    found: list[str] = []
    for number in sorted(before.keys() | after.keys() | lot.keys()):
        payments = lot.get(number, ())
        letters = sum(payment.flaw in LETTER_ERRORS for payment in payments)
        failures = sum(attempts.get(payment.flaw, 0) for payment in payments)
        expected = (len(payments), len(payments) - letters, 0, letters, failures)
        grown = tuple(now - then for then, now in zip(_counts(before[number]), _counts(after[number]), strict=True))
        if grown != expected:
            found.append(
                f"partition {number}: consumed, succeeded, skipped, dead-lettered and failures have grown by {grown}, "
                f"and by {expected} they should"
            )
    return found


class SumsWatch:
    """Asks every daemon that answers, on a thread for each, from entering to leaving. What is found twice in a row is a
    trouble."""

    def __init__(self, slots: Sequence[DaemonSlot], rules: Rules) -> None:
        self.compared = 0
        """How often the counts of a partition were held against each other."""
        self.troubles: list[str] = []
        self._rules = rules
        self._suspects: set[tuple[int, int, int]] = set()
        """Daemon, partition and epoch of what did not add up when it was last looked at: a worker that is switched out
        between counting and moving its position is ahead of it until it goes on. A count that is lost stays lost."""
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._watch, args=(slot,), name=f"sums {slot.number}", daemon=True)
            for slot in slots
        ]

    def __enter__(self) -> "SumsWatch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def compare(self, daemon: int, before: Status, after: Status) -> None:
        """Hold one daemon's partitions of the same epoch against each other."""
        earlier = {(each.partition, each.assignment_epoch): each for each in before.partitions}
        for now in after.partitions:
            then = earlier.get((now.partition, now.assignment_epoch))
            if then is None or before.pid != after.pid:
                continue
            found = imbalance(then, now, self._rules)
            name = (daemon, now.partition, now.assignment_epoch)
            with self._lock:
                self.compared += 1
                if found is None:
                    self._suspects.discard(name)
                elif name not in self._suspects:
                    self._suspects.add(name)
                else:
                    where = f"partition {now.partition} of daemon {daemon_name(daemon)}, epoch {now.assignment_epoch}"
                    self.troubles.append(f"{where}: {found}:\n        {then}\n        {now}")

    def _watch(self, slot: DaemonSlot) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            try:
                client = ControlClient(slot.daemon.socket)
            except (KafkasrcdError, OSError):
                continue
            try:
                self.compare(slot.number, client.status(), client.status())
            except (KafkasrcdError, OSError):
                continue
            finally:
                client.close()
