"""Records that end, or hold up, the process that handles them, on a real broker: they become dead letters, and the
records around them are handled as if they were not there."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import orjson
import pytest
from confluent_kafka import Consumer

from kafkasrcd.storage.dead_letters import DeadLetter, LetterFilter
from kafkasrcd.storage.opening import open_dead_letters
from tests.daemon_process import QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, Record
from tests.ledger import Coordinate, Ledger

PLAIN = orjson.dumps({"n": 1})


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=2)
    return topic_name


def _daemon(kafka: KafkaCluster, topic: str, folder: Path, *settings: str, handler: str = "obey") -> DaemonProcess:
    whole = (*QUICK_SESSION, "handler.processes=1", "retry_backoff_ms=1", "max_retries=1", *settings)
    return DaemonProcess(folder, kafka.bootstrap, topic, f"tests.fault_handlers:{handler}", settings=whole)


def _do(what: str) -> bytes:
    return orjson.dumps({"do": what})


def _produce(kafka: KafkaCluster, topic: str, partition: int, values: list[bytes | None]) -> None:
    kafka.produce(topic, [Record(partition, b"key", value) for value in values])


def _letters(folder: Path, topic: str) -> list[DeadLetter]:
    store = open_dead_letters(f"sqlite:///{folder / 'offsets.db'}", topic, 5_000)
    try:
        return [each.letter for each in store.find(LetterFilter())]
    finally:
        store.close()


@pytest.mark.parametrize(
    ("death", "how"),
    [
        ("exit", "exit code 7"),
        ("sys.exit", "exit code"),
        ("segfault", "SIGSEGV"),
        ("memory", "SIGKILL"),
        ("recurse", "SIGSEGV"),
        ("loop", "longer than 1 s"),
    ],
)
def test_a_record_that_ends_its_process_is_dead_lettered_alone(
    kafka: KafkaCluster, topic: str, tmp_path: Path, death: str, how: str
) -> None:
    _produce(kafka, topic, 0, [PLAIN, PLAIN, _do(death), PLAIN, PLAIN])
    _produce(kafka, topic, 1, [PLAIN] * 3)
    settings = ("handler.crash_attempts=2", "handler.timeout_seconds=1")
    with _daemon(kafka, topic, tmp_path, *settings) as daemon:
        status = daemon.wait_caught_up({0: 5, 1: 3})
        first = status.partitions[0]
        assert (first.dead_lettered, first.skipped, first.problem) == (1, 0, "")
        assert status.handlers[0].restarts == 2
        assert daemon.terminate() == 0
        hung = daemon.events("handler_hung")
    (letter,) = _letters(tmp_path, topic)
    assert (letter.partition, letter.offset, letter.key, letter.value) == (0, 2, b"key", _do(death))
    assert letter.error == ("HandlerTimeout" if death == "loop" else "HandlerProcessEnded")
    assert letter.attempts == 2
    assert how in letter.reason
    if death == "loop":
        assert len(hung) == 2
        assert "fault_handlers.py" in hung[0]["message"], "where it loops"
        assert "fault_handlers.py" in letter.traceback
    ledger = Ledger(tmp_path)
    assert set(ledger.counts) == {Coordinate(0, offset) for offset in (0, 1, 3, 4)} | {
        Coordinate(1, offset) for offset in range(3)
    }
    assert not ledger.disorder


@pytest.mark.parametrize("handler", ["obey_async", "threads"])
def test_a_record_that_hangs_among_many_is_found(kafka: KafkaCluster, topic: str, tmp_path: Path, handler: str) -> None:
    """Many are in hand; the process is killed for the oldest call, and its successor takes them one at a time."""
    stuck = orjson.dumps({"do": "sleep", "seconds": 600})
    _produce(kafka, topic, 0, [*[PLAIN] * 20, stuck, *[PLAIN] * 20])
    settings = ["handler.crash_attempts=2", "handler.timeout_seconds=1", "handler.ordering=none"]
    if handler == "threads":
        settings.append("handler.threads=8")
    name = "obey" if handler == "threads" else handler
    with _daemon(kafka, topic, tmp_path, *settings, handler=name) as daemon:
        status = daemon.wait_caught_up({0: 41, 1: 0})
        assert sum(partition.dead_lettered for partition in status.partitions) == 1
        assert daemon.terminate() == 0
    (letter,) = _letters(tmp_path, topic)
    assert (letter.offset, letter.error) == (20, "HandlerTimeout")
    assert set(Ledger(tmp_path).counts) == {Coordinate(0, offset) for offset in range(41) if offset != 20}


def test_a_record_that_ends_the_process_of_a_batch_is_found(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, 0, [_do("exit") if number == 23 else PLAIN for number in range(100)])
    settings = ("handler.crash_attempts=2", "handler.batch_max_messages=40")
    with _daemon(kafka, topic, tmp_path, *settings, handler="batch_that_dies") as daemon:
        daemon.wait_caught_up({0: 100, 1: 0})
        assert daemon.terminate() == 0
    (letter,) = _letters(tmp_path, topic)
    assert letter.offset == 23
    ledger = Ledger(tmp_path)
    assert set(ledger.counts) == {Coordinate(0, offset) for offset in range(100) if offset != 23}
    assert not ledger.repeated


def test_dead_letters_go_to_a_topic_as_they_were(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    kafka.create_topic(f"{topic}.DLQ", partitions=1)
    kafka.produce(topic, [Record(0, b"key", _do("raise"), headers=[("trace", b"1"), ("trace", None)])])
    _produce(kafka, topic, 0, [b"no JSON", PLAIN])
    settings = ("handler.dead_letter_topic={topic}.DLQ", "handler.dead_letter_store=false")
    with _daemon(kafka, topic, tmp_path, *settings) as daemon:
        daemon.wait_caught_up({0: 3, 1: 0})
        assert daemon.terminate() == 0
    assert not _letters(tmp_path, topic)
    first, second = _read(kafka, f"{topic}.DLQ", 2)
    key, value, headers = first
    assert (key, value) == (b"key", _do("raise"))
    assert headers[:2] == [("trace", b"1"), ("trace", None)]
    ours = dict(headers[2:])
    assert (ours["kafkasrcd.topic"], ours["kafkasrcd.partition"], ours["kafkasrcd.offset"]) == (
        topic.encode(),
        b"0",
        b"0",
    )
    assert ours["kafkasrcd.error"] == b"ValueError"
    assert b"fault_handlers.py" in (ours["kafkasrcd.traceback"] or b"")
    assert ours["kafkasrcd.attempts"] == b"2"
    assert second[1] == b"no JSON"


def test_a_partition_waits_for_a_topic_that_takes_nothing(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, 0, [PLAIN, _do("raise"), PLAIN])
    _produce(kafka, topic, 1, [PLAIN] * 3)
    # The topic is waited for longer than a call may take: that is no call.
    settings = (
        "handler.dead_letter_topic={topic}.DLQ",
        "handler.dead_letter_store=false",
        "handler.timeout_seconds=1",
    )
    with _daemon(kafka, topic, tmp_path, *settings) as daemon:
        status = daemon.wait_status(
            lambda status: status.partitions and status.partitions[0].problem, "the problem in the status", 60
        )
        assert "offset 1 cannot be dead-lettered" in status.partitions[0].problem
        assert f"{topic}.DLQ" in status.partitions[0].problem
        assert status.partitions[0].processed == 1
        kafka.create_topic(f"{topic}.DLQ", partitions=1)
        status = daemon.wait_caught_up({0: 3, 1: 3})
        assert status.partitions[0].problem == ""
        assert status.handlers[0].restarts == 0
        assert daemon.terminate() == 0
    assert [value for _, value, _ in _read(kafka, f"{topic}.DLQ", 1)] == [_do("raise")]


def test_a_store_that_refuses_a_letter_puts_none_into_the_topic(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    """Each further attempt would be one more there."""
    kafka.create_topic(f"{topic}.DLQ", partitions=1)
    with _daemon(kafka, topic, tmp_path, "handler.dead_letter_topic={topic}.DLQ") as daemon:
        daemon.wait_running(2)
        with closing(sqlite3.connect(tmp_path / "offsets.db", timeout=10)) as store:
            store.execute("ALTER TABLE kafkasrcd_dead_letters RENAME TO elsewhere")
        _produce(kafka, topic, 0, [b"no JSON"])
        daemon.wait_status(lambda status: len(daemon.events("dead_letter_refused")) > 1, "a further attempt", 60)
        with closing(sqlite3.connect(tmp_path / "offsets.db", timeout=10)) as store:
            store.execute("ALTER TABLE elsewhere RENAME TO kafkasrcd_dead_letters")
        daemon.wait_caught_up({0: 1, 1: 0})
        assert daemon.terminate() == 0
    assert [each.offset for each in _letters(tmp_path, topic)] == [0]
    assert kafka.end_offsets(f"{topic}.DLQ") == {0: 1}


Found = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]


def _read(kafka: KafkaCluster, topic: str, count: int) -> list[Found]:
    return list(_reading(kafka, topic, count))


def _reading(kafka: KafkaCluster, topic: str, count: int) -> Iterator[Found]:
    consumer = Consumer(
        {"bootstrap.servers": kafka.bootstrap, "group.id": f"{topic}-reader", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([topic])
    try:
        for _ in range(count):
            message = consumer.poll(30)
            assert message is not None
            assert message.error() is None
            yield message.key(), message.value(), cast(list[tuple[str, bytes | None]], message.headers() or [])
    finally:
        consumer.close()
