"""The harness itself: what other tests take for granted about their Kafka."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from tests import kafka_broker, maven
from tests.kafka_cluster import Coordinate, KafkaCluster, KafkaFailed, Record, kafka_missing
from tests.waiting import wait_until


def read_all(cluster: KafkaCluster, topic: str, count: int) -> list[Message]:
    """The first `count` records of the topic, in the order they arrive."""
    settings = cluster.client_settings(group_id="reader", enable_auto_commit=False)
    with closing(Consumer(settings)) as consumer:
        consumer.assign([TopicPartition(topic, partition, 0) for partition in cluster.partitions(topic)])
        messages: list[Message] = []

        def all_read() -> bool:
            messages.extend(consumer.consume(1000, 0.1))
            return len(messages) >= count

        wait_until(all_read, 20, f"{count} records", seen=lambda: len(messages))
    assert not [message.error() for message in messages if message.error()]
    return messages


def test_a_produced_record_comes_back_as_it_was(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(topic_name, partitions=3)
    coordinates = kafka.produce(
        topic_name,
        [
            Record(2, b"key", b"value", [("trace", b"\x00\xff"), ("empty", None)], 1_234_567_890_123),
            (2, None, None, None, 0),
            Record(0, None, b"other"),
        ],
    )
    assert coordinates == [Coordinate(2, 0), Coordinate(2, 1), Coordinate(0, 0)]
    first, tombstone, other = sorted(read_all(kafka, topic_name, 3), key=lambda m: (-(m.partition() or 0), m.offset()))
    assert (first.key(), first.value(), first.timestamp()[1]) == (b"key", b"value", 1_234_567_890_123)
    assert first.headers() == [("trace", b"\x00\xff"), ("empty", None)]
    assert (tombstone.key(), tombstone.value(), tombstone.headers()) == (None, None, None)
    assert (other.partition(), other.value()) == (0, b"other")


def test_fill_takes_partitions_in_turn(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(topic_name, partitions=4)
    kafka.fill(topic_name, 10, value=lambda i: b"value %d" % i, key=lambda i: b"key %d" % i)
    assert kafka.end_offsets(topic_name) == {0: 3, 1: 3, 2: 2, 3: 2}
    for message in read_all(kafka, topic_name, 10):
        index = (message.offset() or 0) * 4 + (message.partition() or 0)
        assert (message.key(), message.value()) == (b"key %d" % index, b"value %d" % index)


def test_committed_leaves_out_partitions_without_a_commit(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(topic_name, partitions=3)
    assert kafka.committed(topic_name, topic_name) == {}
    with closing(Consumer(kafka.client_settings(group_id=topic_name, enable_auto_commit=False))) as consumer:
        consumer.commit(offsets=[TopicPartition(topic_name, 1, 7)], asynchronous=False)
    assert kafka.committed(topic_name, topic_name) == {1: 7}
    assert kafka.committed(f"{topic_name}-other", topic_name) == {}


def test_topics_are_not_created_by_asking_for_them(kafka: KafkaCluster, topic_name: str) -> None:
    with pytest.raises(KafkaException):
        kafka.end_offsets(topic_name)


def test_deleted_records_move_the_log_start(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(topic_name, partitions=2)
    kafka.fill(topic_name, 20)
    kafka.delete_records(topic_name, {1: 4})
    assert kafka.start_offsets(topic_name) == {0: 0, 1: 4}
    assert kafka.end_offsets(topic_name) == {0: 10, 1: 10}


def test_a_deleted_topic_is_gone(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(topic_name)
    kafka.delete_topic(topic_name)
    with pytest.raises(KafkaException):
        wait_until(lambda: not kafka.partitions(topic_name), 10, "the topic to be gone")


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_both_group_protocols_work(kafka: KafkaCluster, topic_name: str, protocol: str) -> None:
    kafka.create_topic(topic_name, partitions=2)
    kafka.fill(topic_name, 20)
    settings = {"auto.offset.reset": "earliest", "enable.auto.commit": False, "group.protocol": protocol}
    with closing(Consumer({**kafka.client_settings(group_id=topic_name), **settings})) as consumer:
        consumer.subscribe([topic_name])
        messages: list[Message] = []

        def all_read() -> bool:
            messages.extend(consumer.consume(20, 0.1))
            return len(messages) == 20

        wait_until(all_read, 20, "20 records", seen=lambda: len(messages))
        consumer.commit(asynchronous=False)
    assert kafka.committed(topic_name, topic_name) == {0: 10, 1: 10}


@pytest.mark.parametrize("how", ["stop_broker", "kill_broker"])
def test_a_broker_that_comes_back_has_its_ports_and_its_data(kafka: KafkaCluster, topic_name: str, how: str) -> None:
    kafka.create_topic(topic_name, partitions=2)
    kafka.fill(topic_name, 1_000)
    bootstrap = kafka.bootstrap
    getattr(kafka, how)(0)
    with pytest.raises(KafkaException):
        kafka.admin.list_topics(timeout=0.2)
    # From a thread that then ends: the broker must not end with it.
    thread = threading.Thread(target=kafka.start_broker, args=(0,))
    thread.start()
    thread.join()
    assert kafka.bootstrap == bootstrap
    assert kafka.end_offsets(topic_name) == {0: 500, 1: 500}
    assert kafka.produce(topic_name, [Record(0, None, b"more")]) == [Coordinate(0, 500)]


def test_a_broker_that_came_back_leads_all_its_partitions_at_once(kafka: KafkaCluster, topic_name: str) -> None:
    """It answers before it has taken them all up; with this many, some were refused in each of eight restarts."""
    kafka.create_topic(topic_name, partitions=300)
    kafka.stop_broker(0)
    kafka.start_broker(0)
    with closing(Consumer(kafka.client_settings(group_id=topic_name))) as consumer:
        for partition in range(300):
            assert consumer.get_watermark_offsets(TopicPartition(topic_name, partition), timeout=5) == (0, 0)
    kafka.delete_topic(topic_name)


def test_a_frozen_broker_is_silent_and_thaws(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(topic_name)
    kafka.freeze_broker(0)
    try:
        with pytest.raises(KafkaException):
            kafka.admin.list_topics(timeout=0.2)
    finally:
        kafka.thaw_broker(0)
    kafka.wait_ready()
    assert kafka.produce(topic_name, [Record(0, None, b"value")]) == [Coordinate(0, 0)]


def test_three_brokers_survive_the_loss_of_one(kafka_three: KafkaCluster, topic_name: str) -> None:
    kafka_three.create_topic(topic_name, partitions=3)
    kafka_three.fill(topic_name, 30)
    assert set(kafka_three.leaders(topic_name).values()) == {0, 1, 2}
    kafka_three.kill_broker(1)
    kafka_three.wait_leaders(topic_name, 3)
    assert set(kafka_three.leaders(topic_name).values()) == {0, 2}
    kafka_three.fill(topic_name, 30)
    kafka_three.start_broker(1)
    kafka_three.wait_in_sync(topic_name)
    assert kafka_three.end_offsets(topic_name) == {0: 20, 1: 20, 2: 20}


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("log.retention.ms", "nonsense", r"(?s)formatting broker 0 ended with \d+:.*log\.retention\.ms"),
        (
            "metric.reporters",
            "no.such.Reporter",
            r"(?s)broker 0 ended with \d+\. Its log ends with:.*no\.such\.Reporter",
        ),
    ],
)
def test_a_broker_that_cannot_start_says_why(setting: str, value: str, message: str) -> None:
    with pytest.raises(KafkaFailed, match=message), KafkaCluster(properties={setting: value}):
        pass


@pytest.mark.kafka
def test_brokers_die_with_a_killed_test_process(tmp_path: Path) -> None:
    program = (
        "from tests.kafka_cluster import KafkaCluster\n"
        "import time\n"
        "with KafkaCluster() as cluster:\n"
        "    print(cluster.brokers[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    # Its data stays behind when it is killed: let that be in a folder that pytest clears.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        broker_pid = int(parent.stdout.readline())
        assert psutil.pid_exists(broker_pid)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(broker_pid), 5, "the broker to be gone")


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("KAFKASRCD_TEST_CACHE", str(tmp_path / "empty"))
    missing = kafka_missing()
    assert missing is not None
    assert "\n" not in missing
    assert "no java, no mvn" in missing
    for package in ("default-jre-headless", "java-latest-openjdk-headless", "openjdk"):
        assert package in missing


def test_maven_is_not_needed_once_the_cache_is_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(maven, "java_missing", lambda: None)
    monkeypatch.setenv("KAFKASRCD_TEST_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert kafka_missing() is not None
    (tmp_path / kafka_broker.CACHE_FOLDER).mkdir()
    assert kafka_missing() is None


def test_a_reserved_port_refuses_connections_and_can_be_listened_on() -> None:
    with kafka_broker.ReservedPort() as port:
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port.number)) != 0
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port.number))
            server.listen()
            socket.create_connection(("127.0.0.1", port.number), timeout=5).close()
