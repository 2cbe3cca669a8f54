"""One fault at a time, on a real broker: what is lost, what is done twice, who notices, and that it heals."""

import os
import signal
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import orjson
import psutil
import pytest

from kafkasrcd.daemon.status import Status
from kafkasrcd.errors import KafkasrcdError
from tests.daemon_process import DEADLINE_SECONDS, QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, Record
from tests.ledger import Coordinate, Ledger, SteadyProducer
from tests.waiting import wait_until

PLAIN = b"{}"


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=4)
    return topic_name


def _daemon(
    kafka: KafkaCluster, topic: str, folder: Path, *settings: str, handler: str = "obey", name: str = "a"
) -> DaemonProcess:
    return DaemonProcess(
        folder,
        kafka.bootstrap,
        topic,
        f"tests.fault_handlers:{handler}",
        name=name,
        settings=(*QUICK_SESSION, *settings),
    )


def _produce(kafka: KafkaCluster, topic: str, partition: int, values: Iterable[bytes | None]) -> None:
    kafka.produce(topic, [Record(partition, b"k", value) for value in values])


def _do(what: str, **more: object) -> bytes:
    return orjson.dumps({"do": what, **more})


def _wait_handled(folder: Path, more: int) -> None:
    before = Ledger(folder).counts.total()
    wait_until(lambda: Ledger(folder).counts.total() > before + more, 30, f"{more} more records handled")


STOP = "handler.on_failure=stop"


def _failed(status: Status) -> list[int]:
    return [partition.partition for partition in status.partitions if partition.state == "failed"]


def test_nothing_outlives_a_killed_supervisor(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    """Not a handler that is stuck in user code, nor a child that is stopped."""
    with _daemon(kafka, topic, tmp_path) as daemon:
        status = daemon.wait_running(4)
        _produce(kafka, topic, 0, [_do("sleep", seconds=600)])
        daemon.wait_status(lambda status: status.partitions[0].position == 1, "the record handed off")
        stopped = status.partitions[1].worker.pid
        assert stopped is not None
        os.kill(stopped, signal.SIGSTOP)
        children = daemon.kill()
        assert len(children) == 1 + 4 + 2
        _, alive = psutil.wait_procs(children, timeout=2)
        assert not alive


def test_a_killed_fork_server_takes_its_children_along_and_all_come_back(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    with SteadyProducer(kafka.bootstrap, topic, 4) as producer, _daemon(kafka, topic, tmp_path) as daemon:
        before = daemon.wait_running(4)
        wait_until(lambda: Ledger(tmp_path).counts.total() > 500, 30, "500 records handled")
        (fork_server,) = psutil.Process(daemon.process.pid).children()
        fork_server.kill()
        daemon.wait_status(
            lambda status: all(partition.worker.restarts == 1 for partition in status.partitions), "restarted workers"
        )
        after = daemon.wait_running(4)
        assert after.rebalances == before.rebalances
        producer.stop()
        daemon.wait_caught_up(kafka.end_offsets(topic))
        ledger = Ledger(tmp_path)
        assert not ledger.lost(producer.acknowledged)
        assert sum(ledger.repeated.values()) <= 2  # one in the hands of each process
        assert not ledger.disorder


def test_a_handler_that_raises_is_called_again_then_its_partition_stops(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    _produce(kafka, topic, 0, [PLAIN, _do("raise"), PLAIN])
    _produce(kafka, topic, 1, [PLAIN] * 10)
    with _daemon(kafka, topic, tmp_path, "max_retries=2", "retry_backoff_ms=10", STOP) as daemon:
        status = daemon.wait_status(lambda status: _failed(status) == [0], "partition 0 failed")
        partition = status.partitions[0]
        assert (partition.processed, partition.failures) == (1, 3)
        assert "offset 1" in partition.problem
        assert "ValueError: told to" in partition.problem
        daemon.wait_status(
            lambda status: [p.committed for p in status.partitions[:2]] == [1, 10], "what was processed committed"
        )
        (logged,) = daemon.events("handler_failed")[:1]
        assert "fault_handlers.py" in logged["traceback"]
        assert "sync_runner" not in logged["traceback"]
        assert daemon.terminate() == 0
    assert kafka.committed(topic, topic) == {0: 1, 1: 10, 2: 0, 3: 0}
    assert Coordinate(0, 2) not in Ledger(tmp_path).counts


def test_on_failure_skip_goes_on_and_counts(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, 0, [PLAIN, _do("raise"), b"not JSON", None, PLAIN])
    with _daemon(kafka, topic, tmp_path, "max_retries=1", "retry_backoff_ms=1", "handler.on_failure=skip") as daemon:
        status = daemon.wait_status(
            lambda status: status.partitions and status.partitions[0].processed == 5, "all of it"
        )
        assert status.partitions[0].failures == 3
        assert len(daemon.events("record_skipped")) >= 1
    assert set(Ledger(tmp_path).counts) == {(0, 0), (0, 3), (0, 4)}


def test_only_the_failing_records_of_a_batch_are_skipped(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, 0, [_do("raise") if number in (7, 30) else PLAIN for number in range(50)])
    settings = ("max_retries=1", "retry_backoff_ms=1", "handler.on_failure=skip")
    with _daemon(kafka, topic, tmp_path, *settings, handler="batch") as daemon:
        daemon.wait_status(lambda status: status.partitions and status.partitions[0].processed == 50, "all of it")
    ledger = Ledger(tmp_path)
    assert set(ledger.counts) == {(0, offset) for offset in range(50) if offset not in (7, 30)}
    assert not ledger.repeated


@pytest.mark.parametrize("death", ["exit", "segfault"])
def test_a_record_that_kills_its_process_stops_its_partition_alone(
    kafka: KafkaCluster, topic: str, tmp_path: Path, death: str
) -> None:
    for partition in range(4):
        _produce(kafka, topic, partition, [PLAIN, _do(death) if partition == 2 else PLAIN, PLAIN])
    with _daemon(kafka, topic, tmp_path, "handler.processes=1", "handler.crash_attempts=2", STOP) as daemon:
        status = daemon.wait_status(
            lambda status: (
                _failed(status) == [2] and [partition.processed for partition in status.partitions] == [3, 3, 1, 3]
            ),
            "partition 2 failed, the others done",
        )
        assert "offset 1" in status.partitions[2].problem
        assert ("SIGSEGV" if death == "segfault" else "exit code 7") in status.partitions[2].problem
        assert status.handlers[0].restarts == 2
    ledger = Ledger(tmp_path)
    assert not ledger.disorder
    assert not ledger.repeated


def test_a_record_that_does_not_fit_the_ring_is_an_error_and_no_crash(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    _produce(kafka, topic, 0, [PLAIN, orjson.dumps("x" * 100_000), PLAIN])
    with _daemon(kafka, topic, tmp_path, "supervisor.ring_bytes=65536", STOP) as daemon:
        status = daemon.wait_status(lambda status: _failed(status) == [0], "partition 0 failed")
        assert status.partitions[0].worker.restarts == 0
        assert "ring_bytes" in status.partitions[0].problem


def test_a_slow_handler_holds_the_worker_back(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    """Backpressure: what is handed off is bounded, and a stop does not wait for it."""
    value = orjson.dumps({"pad": "x" * 1000})
    kafka.produce(topic, [Record(0, None, value) for _ in range(20_000)])
    with _daemon(kafka, topic, tmp_path, "supervisor.ring_bytes=262144", handler="slow") as daemon:
        status = daemon.wait_status(
            lambda status: status.partitions and (status.partitions[0].processed or 0) > 500, "500 records"
        )
        partition = status.partitions[0]
        assert partition.position is not None
        assert partition.processed is not None
        assert partition.position - partition.processed <= 262_144 // 1000
        assert partition.lag == 20_000 - partition.processed
        assert daemon.terminate(10) == 0
        first = Ledger(tmp_path).counts.total()
        assert kafka.committed(topic, topic)[0] == first
    assert not Ledger(tmp_path).repeated


def test_sigterm_under_load_repeats_nothing_after_a_restart(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    with SteadyProducer(kafka.bootstrap, topic, 4) as producer, _daemon(kafka, topic, tmp_path) as daemon:
        for _ in range(3):
            _wait_handled(tmp_path, 1000)
            assert daemon.terminate() == 0
            daemon.start()
        producer.stop()
        daemon.wait_caught_up(kafka.end_offsets(topic))
        ledger = Ledger(tmp_path)
    assert not ledger.lost(producer.acknowledged)
    assert not ledger.repeated
    assert not ledger.disorder


def test_a_second_sigterm_ends_the_wait_for_a_handler(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, 0, [PLAIN, _do("sleep", seconds=600)])
    with _daemon(kafka, topic, tmp_path, "supervisor.drain_timeout_seconds=300") as daemon:
        daemon.wait_status(lambda status: status.partitions and status.partitions[0].processed == 1, "one record")
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_status(lambda status: status.partitions[0].state == "draining", "the drain")
        assert daemon.terminate(20) == 0
    assert kafka.committed(topic, topic)[0] == 1


def test_a_handler_past_the_drain_deadline_is_killed(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, 0, [PLAIN, _do("sleep", seconds=600)])
    _produce(kafka, topic, 1, [PLAIN])
    with _daemon(kafka, topic, tmp_path, "supervisor.drain_timeout_seconds=1") as daemon:
        daemon.wait_status(
            lambda status: [partition.processed for partition in status.partitions] == [1, 1, 0, 0], "two records"
        )
        assert daemon.terminate(20) == 0
        assert daemon.events("handler_overdue")
    assert kafka.committed(topic, topic) == {0: 1, 1: 1, 2: 0, 3: 0}


def test_async_handlers_run_their_partitions_concurrently(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    for partition in range(4):
        _produce(kafka, topic, partition, [_do("sleep", seconds=1)] * 3)
    with _daemon(kafka, topic, tmp_path, "handler.processes=1", handler="obey_async") as daemon:
        daemon.wait_caught_up(kafka.end_offsets(topic))
        assert daemon.terminate() == 0
    (file,) = tmp_path.glob("ledger-*")
    order = [int(line.split()[0]) for line in file.read_bytes().splitlines()]
    # One after the other they would come partition by partition; the first of each comes before the second of any.
    assert sorted(order[:4]) == [0, 1, 2, 3]
    assert not Ledger(tmp_path).disorder


@pytest.mark.parametrize(("policy", "goes_on_at"), [("earliest", 60), ("latest", 100)])
def test_offsets_that_are_gone_are_reset_loudly(
    kafka: KafkaCluster, topic: str, tmp_path: Path, policy: str, goes_on_at: int
) -> None:
    with _daemon(kafka, topic, tmp_path, f"auto_offset_reset={policy}") as daemon:
        daemon.wait_running(4)
        _produce(kafka, topic, 0, [PLAIN] * 10)
        daemon.wait_caught_up(kafka.end_offsets(topic))
        assert daemon.terminate() == 0
        _produce(kafka, topic, 0, [PLAIN] * 90)
        kafka.delete_records(topic, {0: 60})
        daemon.start()
        daemon.wait_status(
            lambda status: (
                status.partitions and status.partitions[0].state == "running" and status.partitions[0].processed == 100
            ),
            "partition 0 at the end",
        )
        (event,) = daemon.events("offset_out_of_range")
        assert (event["offset"], event["target"], event["lost"]) == (10, goes_on_at, goes_on_at - 10)
    assert {offset for _, offset in Ledger(tmp_path).counts} == {*range(10), *range(goes_on_at, 100)}


def test_a_ring_that_outlasts_the_lease_is_finished_before_offsets_are_reset(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    """What had been handed off when the broker dropped the rest is handled, however long that takes."""
    kafka.produce(topic, [Record(0, None, _do("sleep", seconds=0.02, pad="x" * 1000)) for _ in range(5000)])
    small = (
        "supervisor.ring_bytes=262144",
        "extra_config.queued.max.messages.kbytes=64",
        "extra_config.fetch.message.max.bytes=65536",
    )
    with _daemon(kafka, topic, tmp_path, *small) as daemon:
        daemon.wait_status(lambda status: status.partitions and (status.partitions[0].processed or 0) > 5, "a start")
        kafka.delete_records(topic, {0: 5000})
        daemon.wait_caught_up(kafka.end_offsets(topic))
        (event,) = daemon.events("offset_out_of_range")
    handled = sorted(offset for _, offset in Ledger(tmp_path).counts)
    assert handled == list(range(event["offset"]))
    assert len(handled) > 200, "more than a lease's worth"
    assert event["lost"] == 5000 - event["offset"]


def test_a_store_that_is_away_stops_the_hand_off_and_nothing_is_committed(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    with (
        SteadyProducer(kafka.bootstrap, topic, 4) as producer,
        _daemon(kafka, topic, tmp_path, "store.busy_timeout_ms=100") as daemon,
    ):
        daemon.wait_running(4)
        _wait_handled(tmp_path, 500)
        with closing(sqlite3.connect(tmp_path / "offsets.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            status = daemon.wait_status(lambda status: status.problems, "the problem in the status")
            assert "offset store" in status.problems[0]
            committed = kafka.committed(topic, topic)

            def stands_still() -> bool:
                first = [partition.processed for partition in daemon.status().partitions]
                time.sleep(0.5)
                return first == [partition.processed for partition in daemon.status().partitions]

            wait_until(stands_still, 30, "handling to stand still")
            assert kafka.committed(topic, topic) == committed
            other.execute("ROLLBACK")
        daemon.wait_status(lambda status: not status.problems, "the store back")
        _wait_handled(tmp_path, 500)
        producer.stop()
        daemon.wait_caught_up(kafka.end_offsets(topic))
        assert daemon.terminate() == 0
    ledger = Ledger(tmp_path)
    assert not ledger.lost(producer.acknowledged)
    assert not ledger.repeated
    assert not ledger.disorder


def test_a_recreated_topic_is_read_from_its_start(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, 0, [PLAIN] * 50)
    with _daemon(kafka, topic, tmp_path) as daemon:
        daemon.wait_caught_up(kafka.end_offsets(topic))
        assert daemon.terminate() == 0
        kafka.delete_topic(topic)
        wait_until(lambda: topic not in kafka.admin.list_topics(timeout=10).topics, 30, "the topic to be gone")
        kafka.create_topic(topic, partitions=4)
        _produce(kafka, topic, 0, [PLAIN] * 20)
        daemon.start()
        daemon.wait_status(
            lambda status: status.partitions and status.partitions[0].committed == 20, "the new records handled"
        )
    assert sum(count for (partition, _), count in Ledger(tmp_path).counts.items() if partition == 0) == 70


def test_transaction_markers_leave_no_lag(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": topic})
    producer.init_transactions(30)
    for commits in (True, False, True, False):
        producer.begin_transaction()
        producer.produce(topic, PLAIN, partition=0)
        producer.flush(30)
        (producer.commit_transaction if commits else producer.abort_transaction)(30)
    with _daemon(kafka, topic, tmp_path) as daemon:
        daemon.wait_caught_up(kafka.end_offsets(topic))
        assert daemon.terminate() == 0
    assert kafka.committed(topic, topic) == kafka.end_offsets(topic)
    assert Ledger(tmp_path).counts.total() == 2


def test_partitions_added_while_running_are_picked_up(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    with _daemon(kafka, topic, tmp_path, "extra_config.topic.metadata.refresh.interval.ms=500") as daemon:
        daemon.wait_running(4)
        kafka.add_partitions(topic, 6)
        daemon.wait_running(6)
        _produce(kafka, topic, 5, [PLAIN] * 10)
        daemon.wait_status(lambda status: status.partitions[5].processed == 10, "the new partition's records")


def test_a_frozen_supervisor_comes_back_as_no_zombie(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    """Its children stand still once the lease is over; it goes on only where the group has it."""
    with (
        SteadyProducer(kafka.bootstrap, topic, 4) as producer,
        _daemon(kafka, topic, tmp_path) as frozen,
    ):
        frozen.wait_running(4)
        with _daemon(kafka, topic, tmp_path, name="b") as other:
            other.wait_status(lambda status: len(status.partitions) == 2, "two partitions each")
            frozen.wait_status(lambda status: len(status.partitions) == 2, "two partitions each")
            os.kill(frozen.process.pid, signal.SIGSTOP)
            committed = kafka.committed(topic, topic)
            other.wait_running(4)
            _wait_handled(tmp_path, 2000)
            os.kill(frozen.process.pid, signal.SIGCONT)
            frozen.wait_status(lambda status: status.partitions and status.rebalances > 2, "the frozen one back")
            _wait_handled(tmp_path, 2000)
            producer.stop()
            frozen.wait_caught_up(kafka.end_offsets(topic))
            other.wait_caught_up(kafka.end_offsets(topic))
            assert frozen.events("lease_lapsed")
            assert other.terminate() == 0
            assert frozen.terminate() == 0
    ledger = Ledger(tmp_path)
    assert not ledger.lost(producer.acknowledged)
    # What it handled between its last commit and the end of its lease, and no more: 2,000 a second for 2 partitions of
    # 4, for half a second of commit interval, 2 s of lease.
    assert all(times == 1 for times in ledger.repeated.values())
    assert all(offset >= committed.get(partition, 0) for partition, offset in ledger.repeated)
    assert len(ledger.repeated) <= 2_000 // 2 * 4


def test_a_broker_that_goes_and_comes_back_is_waited_for(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    with _daemon(kafka, topic, tmp_path) as daemon:
        daemon.wait_running(4)
        _produce(kafka, topic, 0, [PLAIN] * 100)
        daemon.wait_caught_up(kafka.end_offsets(topic))
        kafka.stop_broker(0)
        try:
            status = daemon.wait_status(lambda status: status.problems, "the problem in the status")
            assert "no broker answers" in status.problems[0]
        finally:
            kafka.start_broker(0)
        daemon.wait_status(lambda status: not status.problems, "the broker back", 60)
        _produce(kafka, topic, 1, [PLAIN] * 100)
        daemon.wait_caught_up(kafka.end_offsets(topic))
        assert daemon.terminate() == 0
        assert len(daemon.events("broker_unreachable")) == len(daemon.events("broker_back")) == 1
    ledger = Ledger(tmp_path)
    assert ledger.counts.total() == 200
    assert not ledger.repeated


def test_a_broker_that_is_not_there_yet_is_waited_for(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, 0, [PLAIN] * 10)
    ends = kafka.end_offsets(topic)
    kafka.stop_broker(0)
    with _daemon(kafka, topic, tmp_path) as daemon:
        try:
            daemon.wait_status(lambda status: status.problems, "the problem in the status")
            before = time.monotonic()
            assert daemon.terminate() == 0
            assert time.monotonic() - before < 10
            daemon.start()
            daemon.wait_status(lambda status: status.problems, "the problem in the status")
        finally:
            kafka.start_broker(0)
        daemon.wait_caught_up(ends)


def test_a_daemon_that_ends_is_not_running(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    with _daemon(kafka, topic, tmp_path) as daemon:
        daemon.wait_running(4)
        daemon.terminate()
        with pytest.raises(KafkasrcdError, match="not running"):
            daemon.status()


@pytest.mark.parametrize(("times", "exit_code"), [(1, None), (100, 70)])
def test_a_handler_process_killed_while_it_starts_is_started_again(
    kafka: KafkaCluster, topic: str, tmp_path: Path, times: int, exit_code: int | None
) -> None:
    """As for want of memory. That is no mistake in the configuration, for which it would stay down (exit code 78)."""
    (tmp_path / "killed.py").write_text(
        "import os, signal\n"
        f"with open({str(tmp_path / 'starts')!r}, 'ab', 0) as starts:\n"
        "    starts.write(b'.')\n"
        f"    if starts.tell() <= {times}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "from tests.ledger import append\n"
    )
    with DaemonProcess(tmp_path, kafka.bootstrap, topic, "killed:append", settings=QUICK_SESSION) as daemon:
        if exit_code is None:
            daemon.wait_running(4)
            assert daemon.terminate() == 0
        else:
            assert daemon.process.wait(DEADLINE_SECONDS) == exit_code
            assert "SIGKILL" in daemon.log_text()
