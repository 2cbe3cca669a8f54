"""Records that fit no ring, on a real broker: their dead letters are whole, wherever the bytes are."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer
from sqlalchemy import create_engine, func, select

from kafkasrcd.message import decode_headers
from kafkasrcd.storage.dead_letters import DeadLetter, LetterFilter
from kafkasrcd.storage.opening import open_dead_letters
from tests import strategy_handlers
from tests.daemon_process import DaemonProcess
from tests.kafka_cluster import KafkaCluster
from tests.ledger import Coordinate, Ledger
from tests.postgres import PostgresServer

PLAIN = b'{"n": 1}'
HOLD = b'{"do": "sleep", "seconds": 4}'
SMALL_RING = "supervisor.ring_bytes=65536"
HEADERS: list[tuple[str, str | bytes | None]] = [("trace", b"1"), ("trace", None)]


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, config={"max.message.bytes": "30000000"})
    return topic_name


def produce(kafka: KafkaCluster, topic: str, values: Sequence[bytes]) -> None:
    producer = Producer(kafka.client_settings(message_max_bytes=40_000_000))
    for value in values:
        producer.produce(topic, value, b"key", partition=0, headers=HEADERS)
        assert producer.flush(60) == 0


def large(size: int) -> bytes:
    """Nothing that could be compressed, so that no byte may be at another's place."""
    return os.urandom(size)


def daemon(
    kafka: KafkaCluster, topic: str, folder: Path, *settings: str, target: str = "tests.fault_handlers:obey"
) -> DaemonProcess:
    whole = ("handler.processes=1", SMALL_RING, *settings)
    return DaemonProcess(folder, kafka.bootstrap, topic, target, settings=whole)


def letters(url: str, topic: str) -> list[DeadLetter]:
    store = open_dead_letters(url, topic, 5_000)
    try:
        return sorted((each.letter for each in store.find(LetterFilter())), key=lambda letter: letter.offset)
    finally:
        store.close()


def is_whole(letter: DeadLetter, value: bytes) -> bool:
    headers = decode_headers(letter.headers or b"").items_all()
    return (letter.key, letter.value == value, list(headers)) == (b"key", True, HEADERS)


@pytest.mark.parametrize("target", ["obey", "obey_async"])
@pytest.mark.parametrize("ordering", ["partition", "none"])
def test_its_letter_has_what_kafka_has(
    kafka: KafkaCluster, topic: str, tmp_path: Path, target: str, ordering: str
) -> None:
    first, second = large(20_000_000), large(33_000)
    produce(kafka, topic, [PLAIN, first, PLAIN, second, PLAIN])
    settings = (f"handler.ordering={ordering}", "handler.timeout_seconds=1")
    with daemon(kafka, topic, tmp_path, *settings, target=f"tests.fault_handlers:{target}") as running:
        status = running.wait_caught_up({0: 5})
        assert (status.partitions[0].dead_lettered, status.handlers[0].restarts) == (2, 0)
        assert running.terminate() == 0
    one, other = letters(f"sqlite:///{tmp_path / 'offsets.db'}", topic)
    assert (one.offset, one.error, is_whole(one, first)) == (1, "RecordTooLarge", True)
    assert one.reason.startswith("cannot be deserialized: a record of 20000")
    assert (other.offset, is_whole(other, second)) == (3, True)
    assert set(Ledger(tmp_path).counts) == {Coordinate(0, offset) for offset in (0, 2, 4)}


def test_its_letter_is_in_the_transaction_of_the_effects(
    kafka: KafkaCluster, postgres: PostgresServer, topic: str, tmp_path: Path
) -> None:
    value = large(20_000_000)
    produce(kafka, topic, [PLAIN, value, PLAIN])
    url = postgres.url(postgres.create_database())
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        strategy_handlers.metadata.create_all(engine)
        settings = ("commit_strategy=on_checkpoint", f"store.url={url}")
        with daemon(kafka, topic, tmp_path, *settings, target="tests.strategy_handlers:effect") as running:
            running.wait_caught_up({0: 3})
            assert running.terminate() == 0
        with engine.connect() as connection:
            assert connection.execute(select(func.count()).select_from(strategy_handlers.effects)).scalar() == 2
    finally:
        engine.dispose()
    (letter,) = letters(url, topic)
    assert (letter.offset, is_whole(letter, value)) == (1, True)


def test_one_that_is_gone_from_kafka_is_kept_without_its_bytes_and_says_so(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    produce(kafka, topic, [HOLD, large(100_000), PLAIN])
    with daemon(kafka, topic, tmp_path) as running:
        running.wait_status(lambda status: status.partitions and status.partitions[0].position == 3, "all handed off")
        kafka.delete_records(topic, {0: 3})
        running.wait_caught_up({0: 3})
        assert running.terminate() == 0
    (letter,) = letters(f"sqlite:///{tmp_path / 'offsets.db'}", topic)
    assert (letter.offset, letter.key, letter.value, letter.headers) == (1, None, None, None)
    assert letter.reason.endswith("; without its bytes: Kafka has the record no longer")
    assert set(Ledger(tmp_path).counts) == {Coordinate(0, 0), Coordinate(0, 2)}


def test_a_broker_that_is_away_is_waited_for(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    value = large(100_000)
    produce(kafka, topic, [HOLD, value, PLAIN])
    with daemon(kafka, topic, tmp_path) as running:
        running.wait_status(lambda status: status.partitions and status.partitions[0].position == 3, "all handed off")
        kafka.stop_broker(0)
        try:
            status = running.wait_status(
                lambda status: "its bytes" in status.partitions[0].problem, "the problem in the status", 60
            )
        finally:
            kafka.start_broker(0)
        assert status.partitions[0].problem.startswith(
            f"offset 1 cannot be dead-lettered, and is waited for: {topic}[0]@1: its bytes cannot be fetched: "
        )
        assert status.partitions[0].processed == 1
        status = running.wait_caught_up({0: 3})
        assert (status.partitions[0].problem, status.handlers[0].restarts) == ("", 0)
        assert running.terminate() == 0
    (letter,) = letters(f"sqlite:///{tmp_path / 'offsets.db'}", topic)
    assert (letter.offset, is_whole(letter, value)) == (1, True)
    assert set(Ledger(tmp_path).counts) == {Coordinate(0, 0), Coordinate(0, 2)}


def test_a_topic_that_is_too_small_for_it_is_waited_for_with_the_cure(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    value = large(20_000_000)
    kafka.create_topic(f"{topic}.DLQ")
    produce(kafka, topic, [PLAIN, value, PLAIN])
    settings = ("handler.dead_letter_topic={topic}.DLQ", "handler.dead_letter_store=false")
    with daemon(kafka, topic, tmp_path, *settings) as running:
        status = running.wait_status(
            lambda status: status.partitions and status.partitions[0].problem, "the problem in the status"
        )
        said = status.partitions[0].problem
        assert f"topic '{topic}.DLQ' does not take it: " in said
        assert "too large; set max.message.bytes of that topic to 2000" in said
        needed = said.partition("set max.message.bytes of that topic to ")[2].split()[0]
        assert status.partitions[0].processed == 1
        kafka.configure_topic(f"{topic}.DLQ", {"max.message.bytes": needed})
        running.wait_caught_up({0: 3})
        assert running.terminate() == 0
    consumer = Consumer(kafka.client_settings(group_id=topic, auto_offset_reset="earliest"))
    try:
        consumer.subscribe([f"{topic}.DLQ"])
        message = consumer.poll(30)
        assert message is not None
        assert (message.error(), message.key(), message.value() == value) == (None, b"key", True)
    finally:
        consumer.close()
