"""The quiet after the storm: everything is committed, every daemon a member, every count right."""

import contextlib
from collections.abc import Mapping, Sequence

from confluent_kafka import KafkaException

from kafkasrcd.daemon.status import PartitionStatus
from kafkasrcd.errors import KafkasrcdError
from tests.chaos.daemon_slot import DaemonSlot
from tests.chaos.fault import daemon_name
from tests.chaos.group import GroupView, view_group
from tests.chaos.producer import PaymentProducer
from tests.chaos.report import shortened
from tests.chaos.sums import Rules, at_rest, lot_differences
from tests.kafka_cluster import KafkaCluster
from tests.waiting import wait_until

CAUGHT_UP_DEADLINE_SECONDS = 180.0
WHOLE_GROUP_DEADLINE_SECONDS = 90.0
"""For rebalances to end: one that waits for a member in vain waits for the rebalance timeout, 50 s."""
LOT_OF_EACH = 40
"""Payments with each flaw, of which the counts are looked at exactly, once everything is quiet."""
COUNTED_DEADLINE_SECONDS = 10.0
REST_ATTEMPTS = 3


class Quiet:
    """What does not come within its time is a trouble."""

    def __init__(
        self, cluster: KafkaCluster, topic: str, slots: Sequence[DaemonSlot], producer: PaymentProducer, rules: Rules
    ) -> None:
        self.troubles: list[str] = []
        self._cluster = cluster
        self._topic = topic
        self._slots = slots
        self._producer = producer
        self._rules = rules

    def await_caught_up(self) -> bool:
        """Everything is committed; False where that takes too long."""
        last: list[object] = []

        def caught_up() -> bool:
            ends = self._cluster.end_offsets(self._topic)
            committed = self._cluster.committed(self._topic, self._topic)
            last[:] = [{p: (committed.get(p, 0), end) for p, end in ends.items() if committed.get(p, 0) != end}]
            return not last[0]

        try:
            wait_until(
                caught_up,
                CAUGHT_UP_DEADLINE_SECONDS,
                "everything to be committed",
                seen=lambda: f"committed and end by partition: {last}",
                ignoring=(KafkaException,),
                interval_seconds=0.5,
            )
        except AssertionError as error:
            self.troubles.append(f"{error}{''.join(self._statuses())}")
            return False
        return True

    def await_whole_group(self) -> bool:
        """Every daemon that runs is a member, and every partition has one member; False where that takes too long."""
        partitions = self._cluster.partitions(self._topic)

        def expected() -> GroupView:
            return GroupView("STABLE", sum(slot.is_running for slot in self._slots), partitions)

        try:
            wait_until(
                lambda: view_group(self._cluster, self._topic) == expected(),
                WHOLE_GROUP_DEADLINE_SECONDS,
                "every running daemon to be a member of the group, and every partition to have one",
                seen=lambda: f"{view_group(self._cluster, self._topic)} in place of {expected()}",
                ignoring=(KafkaException,),
                interval_seconds=0.5,
            )
        except AssertionError as error:
            self.troubles.append(f"{error}{''.join(self._statuses())}")
            return False
        return True

    def _statuses(self) -> list[str]:
        """What the daemons say of themselves."""
        told: list[str] = []
        for slot in self._slots:
            try:
                status = slot.daemon.status()
            except (KafkasrcdError, OSError) as error:
                told.append(f"\n    daemon {daemon_name(slot.number)}: {error}")
                continue
            told.append(f"\n    daemon {daemon_name(slot.number)} is {status.state}, problems: {status.problems}")
            told += [
                f"\n        {p.partition} is {p.state}, at {p.position}, {p.processed}, {p.committed}: {p.problem}"
                for p in status.partitions
            ]
        return told

    def count_a_lot(self) -> None:
        """With nothing else going on: the counts grow by exactly what is produced. A late rebalance is let be."""
        for _ in range(REST_ATTEMPTS):
            before = self._at_rest()
            lot = self._producer.produce_lot(LOT_OF_EACH)
            if not self.await_caught_up():
                return
            after = self._at_rest()
            if _epochs(before) == _epochs(after):
                self.troubles += shortened(
                    "partitions whose counts are wrong at rest", lot_differences(before, after, lot, self._rules)
                )
                return
        self.troubles.append(f"the group was never at rest, {REST_ATTEMPTS} times")

    def _at_rest(self) -> dict[int, PartitionStatus]:
        """Every partition's status, once nothing of it is in flight; what its counts say to that is a trouble."""
        found: dict[int, PartitionStatus] = {}

        def wrong() -> list[str]:
            found.clear()
            for slot in self._slots:
                with contextlib.suppress(KafkasrcdError, OSError):
                    found.update({each.partition: each for each in slot.daemon.status().partitions})
            missing = set(self._cluster.partitions(self._topic)) - found.keys()
            return [f"no daemon has {missing}"] if missing else at_rest(found.values(), self._rules)

        try:
            wait_until(lambda: not wrong(), COUNTED_DEADLINE_SECONDS, "the counts to add up", seen=wrong)
        except AssertionError as error:
            self.troubles.append(str(error))
        return found


def _epochs(statuses: Mapping[int, PartitionStatus]) -> dict[int, int]:
    return {number: status.assignment_epoch for number, status in statuses.items()}
