"""The store away under load: handing off pauses, nothing gets ahead of it, it is named, and work goes on by itself."""

import resource
import time
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.daemon_process import QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster
from tests.ledger import Ledger, SteadyProducer
from tests.postgres import PostgresServer
from tests.test_strategies import Effects
from tests.waiting import wait_until

PARTITIONS = 4


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    return topic_name


@pytest.fixture
def server() -> Generator[PostgresServer]:
    """One of this file's own, which may be stopped."""
    with PostgresServer() as server:
        yield server


def _daemon(kafka: KafkaCluster, topic: str, folder: Path, target: str, *settings: str) -> DaemonProcess:
    return DaemonProcess(folder, kafka.bootstrap, topic, target, settings=(*QUICK_SESSION, *settings))


def _not_ahead(kafka: KafkaCluster, topic: str, found: Effects) -> None:
    """Kafka has nothing that the store has not. It is asked first: the store only goes on."""
    committed, recorded = kafka.committed(topic, topic), found.recorded(topic)
    assert all((recorded[partition] or 0) >= offset for partition, offset in committed.items())


def _settled(daemon: DaemonProcess) -> int:
    """How many records are handed off, once that does not change any more."""
    before = -1
    while True:
        now = sum(partition.messages for partition in daemon.status().partitions)
        if now == before:
            return now
        before = now
        time.sleep(0.7)


@pytest.mark.parametrize("strategy", ["periodic", "on_checkpoint"])
def test_postgresql_is_waited_for(
    kafka: KafkaCluster, topic: str, tmp_path: Path, server: PostgresServer, strategy: str
) -> None:
    found = Effects(server.url(server.create_database("outage")))
    target = "tests.ledger:append" if strategy == "periodic" else "tests.strategy_handlers:effect"
    settings = (f"commit_strategy={strategy}", f"store.url={found.url}")
    with ExitStack() as stack:
        stack.callback(found.close)
        producer = stack.enter_context(SteadyProducer(kafka.bootstrap, topic, PARTITIONS, rate_per_second=500))
        daemon = stack.enter_context(_daemon(kafka, topic, tmp_path, target, *settings))
        daemon.wait_running(PARTITIONS)
        daemon.wait_status(lambda status: sum(each.messages for each in status.partitions) > 500, "records")
        server.stop(immediate=True)
        try:
            status = daemon.wait_status(lambda status: status.problems, "the problem in the status")
            assert "offset store" in status.problems[0]
            assert "'outage'" in status.problems[0]
            stands = _settled(daemon)
            committed = kafka.committed(topic, topic)
            handled = Ledger(tmp_path).counts.total()
            time.sleep(1)
            assert sum(partition.messages for partition in daemon.status().partitions) == stands, "hands off nothing"
            assert kafka.committed(topic, topic) == committed, "nothing is committed"
            assert Ledger(tmp_path).counts.total() == handled, "nothing is handled"
        finally:
            server.start()
        daemon.wait_status(lambda status: not status.problems, "the store back", 60)
        _not_ahead(kafka, topic, found)
        producer.stop()
        ends = kafka.end_offsets(topic)
        daemon.wait_caught_up(ends)
        assert daemon.terminate() == 0
        assert found.recorded(topic) == kafka.committed(topic, topic) == ends
        if strategy == "periodic":
            ledger = Ledger(tmp_path)
            assert ledger.counts.keys() == producer.acknowledged
            assert not ledger.repeated
        else:
            assert found.counts().keys() == producer.acknowledged
            assert set(found.counts().values()) == {1}


def test_a_store_that_is_not_there_yet_is_waited_for(
    kafka: KafkaCluster, topic: str, tmp_path: Path, server: PostgresServer
) -> None:
    url = server.url(server.create_database("later"))
    server.stop()
    with _daemon(kafka, topic, tmp_path, "tests.ledger:append", f"store.url={url}") as daemon:
        status = daemon.wait_status(lambda status: status.problems, "the problem in the status")
        assert "'later'" in status.problems[0]
        assert daemon.terminate() == 0
        daemon.start()
        daemon.wait_status(lambda status: status.problems, "the problem in the status")
        server.start()
        daemon.wait_running(PARTITIONS)
        daemon.wait_status(lambda status: not status.problems, "no problem")
        assert daemon.terminate() == 0


@pytest.mark.parametrize("target", ["effect", "effect_async"])
def test_connections_cut_at_any_moment_apply_no_effect_twice(
    kafka: KafkaCluster, topic: str, tmp_path: Path, server: PostgresServer, target: str
) -> None:
    """Among them some in the middle of a commit, of which nobody knows whether it was made."""
    found = Effects(server.url(server.create_database()))
    settings = ("commit_strategy=on_checkpoint", f"store.url={found.url}", "checkpoint_interval_ms=5")
    with ExitStack() as stack:
        stack.callback(found.close)
        producer = stack.enter_context(SteadyProducer(kafka.bootstrap, topic, PARTITIONS, rate_per_second=500))
        daemon = stack.enter_context(_daemon(kafka, topic, tmp_path, f"tests.strategy_handlers:{target}", *settings))
        daemon.wait_running(PARTITIONS)
        cut = 0
        for _ in range(15):
            before = found.counts().total()
            wait_until(lambda before=before: found.counts().total() > before, 60, "more effects")  # type: ignore[misc]
            cut += server.terminate_connections(found.url.rpartition("/")[2])
        assert cut > 15
        producer.stop()
        ends = kafka.end_offsets(topic)
        daemon.wait_caught_up(ends)
        assert daemon.terminate() == 0
        counts = found.counts()
    assert counts.keys() == producer.acknowledged
    assert set(counts.values()) == {1}


def test_a_full_disk_under_sqlite_is_waited_out(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    """As a limit on the size of files gives it: of the database and of its log."""
    found = Effects(f"sqlite:///{tmp_path / 'effects.db'}")
    settings = ("commit_strategy=on_checkpoint", f"store.url={found.url}")

    def limit(size: int) -> None:
        for process in [psutil.Process(daemon.process.pid), *daemon.children()]:
            process.rlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    with ExitStack() as stack:
        stack.callback(found.close)
        producer = stack.enter_context(SteadyProducer(kafka.bootstrap, topic, PARTITIONS, rate_per_second=1_000))
        daemon = stack.enter_context(_daemon(kafka, topic, tmp_path, "tests.strategy_handlers:effect", *settings))
        daemon.wait_running(PARTITIONS)
        limit(400 * 1024)
        status = daemon.wait_status(lambda status: status.problems, "the problem in the status", 60)
        assert "effects.db" in status.problems[0]
        _not_ahead(kafka, topic, found)
        limit(resource.RLIM_INFINITY)
        daemon.wait_status(lambda status: not status.problems, "room again", 60)
        producer.stop()
        ends = kafka.end_offsets(topic)
        daemon.wait_caught_up(ends)
        assert daemon.terminate() == 0
        counts = found.counts()
        assert counts.keys() == producer.acknowledged
        assert set(counts.values()) == {1}
        assert found.recorded(topic) == ends
