"""The counts of a partition: each record that was handed off is succeeded, skipped, dead-lettered or in flight."""

import os
import signal
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson
import pytest

from kafkasrcd.daemon.partition import Partition
from kafkasrcd.daemon.start_points import StartPoint
from kafkasrcd.message import Message
from kafkasrcd.settings import Ordering, Settings
from kafkasrcd.storage.offset_store import WHOLE, TopicPartition
from kafkasrcd.workers.partition_memory import MESSAGES
from kafkasrcd.workers.ring import DEAD_LETTERED, HANDLED, SKIPPED
from tests.daemon_process import QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, Record
from tests.ledger import Ledger
from tests.runner_rig import Kind, Rig, settings_of
from tests.waiting import wait_until

RECORDS = 3_000


@pytest.mark.parametrize("ordering", [Ordering.PARTITION, Ordering.KEY])
def test_deaths_of_workers_and_handlers_count_no_record_twice_and_none_too_few(
    kafka: KafkaCluster, topic_name: str, tmp_path: Path, ordering: Ordering
) -> None:
    """The worker is killed while it waits for room with a part of its batch in the ring: it hands that off again."""
    kafka.create_topic(topic_name)
    value = orjson.dumps({"pad": "x" * 1000})
    kafka.produce(topic_name, [Record(0, b"%d" % number, value) for number in range(RECORDS)])
    settings = (*QUICK_SESSION, f"handler.ordering={ordering}", "supervisor.ring_bytes=65536")
    with DaemonProcess(tmp_path, kafka.bootstrap, topic_name, "tests.fault_handlers:slow", settings=settings) as daemon:
        for death in range(6):
            _wait_handled(tmp_path, 300 * (death + 1))
            status = daemon.wait_running(1)
            pid = status.handlers[0].pid if death % 3 == 2 else status.partitions[0].worker.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        (partition,) = daemon.wait_caught_up({0: RECORDS}).partitions
        assert partition.worker.restarts == 4
        assert (partition.messages, partition.succeeded) == (RECORDS, RECORDS)


def test_what_one_slot_had_done_beyond_another_is_not_handed_off_again(
    kafka: KafkaCluster, topic_name: str, tmp_path: Path
) -> None:
    """By key: one slot is held up at its first record, the other gets to the end; then the daemon is started anew."""
    kafka.create_topic(topic_name)
    keys = [next(key for key in map(b"%d".__mod__, range(100)) if crc32(key) % 2 == slot) for slot in (0, 1)]
    slow, plain = orjson.dumps({"do": "sleep", "seconds": 2}), orjson.dumps({})
    kafka.produce(topic_name, [Record(0, keys[n % 2], slow if n == 0 else plain) for n in range(200)])
    settings = (*QUICK_SESSION, "handler.ordering=key")
    with DaemonProcess(tmp_path, kafka.bootstrap, topic_name, "tests.fault_handlers:obey", settings=settings) as daemon:
        wait_until(lambda: Ledger(tmp_path).counts.total() == 100, 30, "the other slot to be at the end")
        assert daemon.terminate() == 0
        daemon.start()
        (partition,) = daemon.wait_caught_up({0: 200}).partitions
        assert (partition.messages, partition.succeeded) == (99, 99)
        assert daemon.terminate() == 0
    assert not Ledger(tmp_path).repeated


def _wait_handled(folder: Path, least: int) -> None:
    wait_until(lambda: Ledger(folder).counts.total() > least, 30, f"{least} records handled")


def test_what_a_handler_process_had_handled_when_it_died_is_counted() -> None:
    first = Rig(Kind(is_batch=False, is_async=False), settings_of())
    partition = first.partition()
    first.publish_values(partition, range(10))
    first.publish_values(partition, range(10, 20))

    def die(message: Message[Any]) -> None:
        if message.offset == 13:
            raise SystemExit

    first.act = die
    first.start()
    assert isinstance(first.wait_ended(), SystemExit)
    assert (partition.processed, partition.cells[HANDLED]) == (13, 13)
    partition.memory.slots[0].handler_ended()
    second = Rig(first.kind, first.settings)
    second.bind(partition)
    # As a worker that was killed before it had moved its position.
    first.publish_values(partition, range(10, 22))
    second.start()
    second.wait_processed(partition, 22)
    assert second.handled == list(range(13, 22))
    assert partition.cells[HANDLED] == 22
    second.close()
    first.close()


def test_what_is_dropped_with_a_partitions_memory_is_not_in_flight_for_ever() -> None:
    partition = Partition(TopicPartition("orders", 0), Settings())
    partition.begin(StartPoint(next_offset=0, assignment_epoch=1), WHOLE)
    assert partition.memory is not None
    partition.memory.cells[MESSAGES] = 10
    for cell, count in ((HANDLED, 4), (SKIPPED, 2), (DEAD_LETTERED, 1)):
        partition.memory.slots[0].cells[cell] = count
    assert partition.totals[:1] + partition.totals[2:5] == (10, 4, 2, 1)
    partition.drop_memory()
    assert partition.totals[:1] + partition.totals[2:5] == (7, 4, 2, 1)
    partition.end()
