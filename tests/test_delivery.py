"""The proof of delivery: two daemons in one group, a producer running throughout, a ledger of what handlers did.

Whatever happens, nothing is lost, and the order within every partition is kept. A join and a SIGTERM repeat nothing;
a kill repeats what the design says and no more.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from kafkasrcd.daemon.status import Status
from kafkasrcd.errors import NotRunning
from kafkasrcd.storage.opening import open_store
from tests.daemon_process import QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster
from tests.ledger import Coordinate, Ledger, SteadyProducer
from tests.waiting import wait_until

PARTITIONS = 12

PROTOCOLS = {
    "cooperative-sticky": QUICK_SESSION,
    "range": (*QUICK_SESSION, "supervisor.partition_assignment_strategy=range"),
    "kip-848": ("supervisor.group_protocol=consumer", "supervisor.lease_seconds=2"),
}


@pytest.fixture(params=PROTOCOLS)
def settings(request: pytest.FixtureRequest) -> Sequence[str]:
    return PROTOCOLS[request.param]


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    return topic_name


def _daemon(kafka: KafkaCluster, topic: str, folder: Path, settings: Sequence[str], name: str = "a") -> DaemonProcess:
    return DaemonProcess(folder, kafka.bootstrap, topic, "tests.ledger:append", name=name, settings=settings)


def _wait_handled(folder: Path, more: int = 2_000) -> None:
    """Until so many further records have been handled: the group is at work again."""
    before = Ledger(folder).counts.total()
    wait_until(lambda: Ledger(folder).counts.total() > before + more, 60, f"{more} more records handled")


def _wait_shared(first: DaemonProcess, second: DaemonProcess) -> None:
    """Until the two have divided the partitions, and all of them run."""

    def shared() -> bool:
        statuses: list[Status] = [first.status(), second.status()]
        partitions = [partition for status in statuses for partition in status.partitions]
        return (
            len({partition.partition for partition in partitions}) == len(partitions) == PARTITIONS
            and all(partition.state == "running" for partition in partitions)
            and all(status.partitions for status in statuses)
        )

    wait_until(shared, 60, "two daemons that share the partitions", ignoring=(NotRunning,))


def _finish(kafka: KafkaCluster, topic: str, producer: SteadyProducer, *daemons: DaemonProcess) -> Ledger:
    """End the producer, let the daemons catch up, stop them, and check what holds in every scenario."""
    producer.stop()
    ends = kafka.end_offsets(topic)
    for daemon in daemons:
        daemon.wait_caught_up(ends)
    for daemon in daemons:
        assert daemon.terminate() == 0
    folder = daemons[0].folder
    ledger = Ledger(folder)
    assert not ledger.lost(producer.acknowledged)
    assert not ledger.counts.keys() - producer.acknowledged
    assert not ledger.disorder
    assert kafka.committed(topic, topic) == ends
    store = open_store(f"sqlite:///{folder / 'offsets.db'}", topic, 5_000)
    try:
        assert {row.topic_partition.partition: row.next_offset for row in store.offsets()} == ends
    finally:
        store.close()
    return ledger


def test_joining_and_leaving_by_sigterm_repeats_nothing(
    kafka: KafkaCluster, topic: str, tmp_path: Path, settings: Sequence[str]
) -> None:
    with SteadyProducer(kafka.bootstrap, topic, PARTITIONS) as producer, _daemon(kafka, topic, tmp_path, settings) as a:
        a.wait_running(PARTITIONS)
        _wait_handled(tmp_path)
        with _daemon(kafka, topic, tmp_path, settings, "b") as b:
            b.wait_status(lambda status: status.state == "running", "the second daemon in the group")
            _wait_shared(a, b)
            _wait_handled(tmp_path)
            assert a.terminate() == 0
            b.wait_running(PARTITIONS)
            _wait_handled(tmp_path)
            ledger = _finish(kafka, topic, producer, b)
    assert not ledger.repeated


def test_a_static_member_that_bounces_disturbs_nobody(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    """It stays in the group while it is away, and gets its own partitions back: no rebalance for the others."""
    named = [(*QUICK_SESSION, f"supervisor.group_instance_id=host-{name}") for name in "ab"]
    with (
        SteadyProducer(kafka.bootstrap, topic, PARTITIONS) as producer,
        _daemon(kafka, topic, tmp_path, named[0]) as a,
        _daemon(kafka, topic, tmp_path, named[1], "b") as b,
    ):
        _wait_shared(a, b)
        before = [{partition.partition for partition in daemon.status().partitions} for daemon in (a, b)]
        rebalances, revoked = b.status().rebalances, b.events("revoked")
        for _ in range(2):
            _wait_handled(tmp_path)
            assert a.terminate() == 0
            a.start()
            _wait_shared(a, b)
        after = [{partition.partition for partition in daemon.status().partitions} for daemon in (a, b)]
        assert after == before
        assert b.status().rebalances == rebalances
        assert b.events("revoked") == revoked
        ledger = _finish(kafka, topic, producer, a, b)
    assert not ledger.repeated


def test_a_killed_worker_repeats_nothing_and_a_killed_handler_one_record(
    kafka: KafkaCluster, topic: str, tmp_path: Path, settings: Sequence[str]
) -> None:
    with (
        SteadyProducer(kafka.bootstrap, topic, PARTITIONS) as producer,
        _daemon(kafka, topic, tmp_path, settings) as a,
        _daemon(kafka, topic, tmp_path, settings, "b") as b,
    ):
        _wait_shared(a, b)
        _wait_handled(tmp_path)
        before = a.status()
        for partition in before.partitions[:3]:
            assert partition.worker.pid is not None
            os.kill(partition.worker.pid, signal.SIGKILL)
        a.wait_status(
            lambda status: all(
                now.state == "running" and now.worker.restarts == then.worker.restarts + (index < 3)
                for index, (now, then) in enumerate(zip(status.partitions, before.partitions, strict=True))
            ),
            "three workers restarted, the others left alone",
        )
        _wait_handled(tmp_path)
        assert not Ledger(tmp_path).repeated
        pid = a.status().handlers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        a.wait_status(
            lambda status: status.handlers[0].restarts == 1 and status.handlers[0].state == "ready", "a handler"
        )
        _wait_handled(tmp_path)
        assert a.status().rebalances == before.rebalances
        ledger = _finish(kafka, topic, producer, a, b)
    # A process has one record in its hands.
    assert sum(ledger.repeated.values()) <= 1


def test_a_killed_supervisor_repeats_only_what_was_not_committed(
    kafka: KafkaCluster, topic: str, tmp_path: Path, settings: Sequence[str]
) -> None:
    with (
        SteadyProducer(kafka.bootstrap, topic, PARTITIONS) as producer,
        _daemon(kafka, topic, tmp_path, settings) as a,
        _daemon(kafka, topic, tmp_path, settings, "b") as b,
    ):
        _wait_shared(a, b)
        _wait_handled(tmp_path)
        children = a.kill()
        _, alive = psutil.wait_procs(children, timeout=2)
        assert not alive
        # The other daemon's partitions go on and do not repeat; these are all that could.
        committed = kafka.committed(topic, topic)
        b.wait_running(PARTITIONS)
        _wait_handled(tmp_path)
        ledger = _finish(kafka, topic, producer, b)
    assert all(offset >= committed.get(partition, 0) for partition, offset in ledger.repeated), ledger.repeated
    assert all(times == 1 for times in ledger.repeated.values())
    assert Coordinate(0, 0) in ledger.counts
