"""Where partitions start again, on a real broker: what counts where the records of the group's progress disagree, what
comes later than the group, and a partition's slots through stops, deaths and other layouts."""

import random
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from kafkasrcd.daemon.reached import layers_of
from kafkasrcd.workers.spread import DoneBefore
from tests.daemon_process import QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, Record
from tests.ledger import Coordinate, Ledger, SteadyProducer
from tests.waiting import wait_until

# What is new is seen by the group as soon as librdkafka looks for it.
QUICK_LOOK = "extra_config.topic.metadata.refresh.interval.ms=500"
IN_TRANSACTION = """
from typing import Any

from sqlalchemy import Connection

from kafkasrcd import Message
from tests import ledger


def append(message: Message[Any], tx: Connection) -> None:
    if message.payload == {"do": "raise"}:
        raise ValueError("told to")
    ledger.append(message)
"""


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=1)
    return topic_name


def _daemon(
    kafka: KafkaCluster, topic: str, folder: Path, *settings: str, target: str = "tests.ledger:append", name: str = "a"
) -> DaemonProcess:
    return DaemonProcess(folder, kafka.bootstrap, topic, target, name=name, settings=(*QUICK_SESSION, *settings))


def _produce(kafka: KafkaCluster, topic: str, count: int, partition: int = 0) -> None:
    """Records with keys that go to all slots."""
    kafka.produce(topic, [Record(partition, b"key-%d" % number, b"{}") for number in range(count)])


def _produce_to_new(kafka: KafkaCluster, topic: str, count: int, partition: int) -> None:
    """By a producer of its own, which has not heard of the topic as it was before."""
    producer = Producer(kafka.client_settings(linger_ms=5))
    for number in range(count):
        producer.produce(topic, b"{}", b"key-%d" % number, partition)
    assert producer.flush(30) == 0


def _commit(kafka: KafkaCluster, topic: str, offset: int, partition: int = 0) -> None:
    """As whoever moves the group while no member is there."""
    consumer = Consumer(kafka.client_settings(group_id=topic))
    consumer.commit(offsets=[TopicPartition(topic, partition, offset)], asynchronous=False)
    consumer.close()


def _told(kafka: KafkaCluster, topic: str, partitions: int) -> list[TopicPartition]:
    """What the group has committed, with the metadata."""
    with closing(Consumer(kafka.client_settings(group_id=topic))) as consumer:
        return consumer.committed([TopicPartition(topic, number) for number in range(partitions)], timeout=20)


def _delete_group(kafka: KafkaCluster, group: str) -> None:
    admin: Any = kafka.admin
    for deleted in admin.delete_consumer_groups([group], request_timeout=20).values():
        deleted.result(20)


def _stored(folder: Path) -> list[int]:
    with closing(sqlite3.connect(folder / "offsets.db")) as connection:
        return [row[0] for row in connection.execute("SELECT next_offset FROM kafkasrcd_offsets")]


def _handled(folder: Path, partition: int = 0) -> list[int]:
    counts = Ledger(folder).counts.items()
    return sorted(offset for (number, offset), count in counts if number == partition for _ in range(count))


def _wait_handled(folder: Path, expected: Iterable[int], partition: int = 0) -> None:
    """Wait until exactly these offsets are handled, each once."""
    wanted = sorted(expected)
    wait_until(
        lambda: len(_handled(folder, partition)) >= len(wanted),
        60,
        f"{len(wanted)} records of partition {partition} handled",
        seen=lambda: _handled(folder, partition),
    )
    assert _handled(folder, partition) == wanted


# ---- which record of the progress counts -----------------------------------------------------------------------------


@pytest.mark.parametrize("ordering", ["partition", "key"])
@pytest.mark.parametrize("moved_to", [10, 80])
def test_with_periodic_kafka_decides(
    kafka: KafkaCluster, topic: str, tmp_path: Path, moved_to: int, ordering: str
) -> None:
    _produce(kafka, topic, 50)
    with _daemon(kafka, topic, tmp_path, f"handler.ordering={ordering}") as daemon:
        daemon.wait_caught_up({0: 50})
        assert daemon.terminate() == 0
        assert not daemon.events("offsets_disagree")
        _commit(kafka, topic, moved_to)
        _produce(kafka, topic, 50)
        daemon.start()
        daemon.wait_caught_up({0: 100})
        (event,) = daemon.events("offsets_disagree")
        assert (event["stored"], event["committed"], event["offset"]) == (50, moved_to, moved_to)
        assert event["level"] == "warning"
        assert daemon.terminate() == 0
    assert _handled(tmp_path) == sorted([*range(50), *range(moved_to, 100)])
    assert set(_stored(tmp_path)) == {100}


@pytest.mark.parametrize("ordering", ["partition", "key"])
def test_on_checkpoint_the_store_decides(kafka: KafkaCluster, topic: str, tmp_path: Path, ordering: str) -> None:
    (tmp_path / "transactions.py").write_text(IN_TRANSACTION)
    settings = ("commit_strategy=on_checkpoint", f"handler.ordering={ordering}")
    with _daemon(kafka, topic, tmp_path, *settings, target="transactions:append") as daemon:
        end = 0
        # Behind the store, ahead of it, beyond the end, and then no offset at all.
        for moved_to in (None, 10, 90, 1000, 0):
            if moved_to == 0:
                _delete_group(kafka, topic)
            elif moved_to is not None:
                _commit(kafka, topic, moved_to)
            _produce(kafka, topic, 50)
            end += 50
            if moved_to is not None:
                daemon.start()
            daemon.wait_caught_up({0: end})
            assert daemon.terminate() == 0
            assert kafka.committed(topic, topic) == {0: end}
        events = daemon.events("offsets_disagree")
        assert [(event["stored"], event["committed"], event["offset"], event["level"]) for event in events] == [
            (50, 10, 50, "info"),
            (100, 90, 100, "info"),
            (150, 1000, 150, "warning"),
        ]
        assert not daemon.events("offset_out_of_range")
    assert _handled(tmp_path) == list(range(250))


def test_on_checkpoint_a_record_that_fails_behind_others_records_is_tried_again(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    """Its slot was recorded as far as the others are, beyond its own last record: that is no other owner's doing."""
    (tmp_path / "transactions.py").write_text(IN_TRANSACTION)
    settings = (
        "commit_strategy=on_checkpoint",
        "handler.ordering=none",
        "max_retries=3",
        "retry_backoff_ms=500",
        "handler.on_failure=stop",
    )
    with _daemon(kafka, topic, tmp_path, *settings, target="transactions:append") as daemon:
        _produce(kafka, topic, 2)
        daemon.wait_caught_up({0: 2})
        kafka.produce(topic, [Record(0, None, b'{"do": "raise"}')])
        status = daemon.wait_status(
            lambda status: status.partitions and status.partitions[0].state == "failed", "the partition failed"
        )
        assert "told to" in status.partitions[0].problem
        assert not daemon.events("lost")
        assert status.partitions[0].assignment_epoch == 1
        assert daemon.terminate() == 0
    assert kafka.committed(topic, topic) == {0: 2}


def test_where_kafka_has_forgotten_the_group_the_store_says_where_it_was(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    """As after offsets.retention.minutes without a member."""
    _produce(kafka, topic, 50)
    with _daemon(kafka, topic, tmp_path) as daemon:
        daemon.wait_caught_up({0: 50})
        assert daemon.terminate() == 0
        _delete_group(kafka, topic)
        _produce(kafka, topic, 10)
        daemon.start()
        daemon.wait_caught_up({0: 60})
        (event,) = daemon.events("start_from_store")
        assert (event["offset"], event["level"]) == (50, "warning")
        assert daemon.terminate() == 0
    assert _handled(tmp_path) == list(range(60))


# ---- offsets that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["earliest", "latest", "error"])
def test_an_offset_beyond_the_end_is_reset_loudly(kafka: KafkaCluster, topic: str, tmp_path: Path, policy: str) -> None:
    _produce(kafka, topic, 20)
    _commit(kafka, topic, 500)
    with _daemon(kafka, topic, tmp_path, f"auto_offset_reset={policy}") as daemon:
        if policy == "error":
            status = daemon.wait_status(
                lambda status: status.partitions and status.partitions[0].state == "failed", "the partition failed"
            )
            assert "the broker has offsets 0 to 20, not 500; commit an offset" in status.partitions[0].problem
            assert daemon.terminate() == 0
            _commit(kafka, topic, 15)
            daemon.start()
        else:
            daemon.wait_status(lambda status: status.partitions and status.partitions[0].committed == 20, "the reset")
            (event,) = daemon.events("offset_out_of_range")
            assert (event["offset"], event["target"], event["level"]) == (
                500,
                0 if policy == "earliest" else 20,
                "error",
            )
        _produce(kafka, topic, 5)
        _wait_handled(tmp_path, range({"earliest": 0, "latest": 20, "error": 15}[policy], 25))
        daemon.wait_caught_up({0: 25})
        assert daemon.terminate() == 0


def test_with_error_a_truncated_log_stops_the_partition(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, 10)
    with _daemon(kafka, topic, tmp_path, "auto_offset_reset=error") as daemon:
        status = daemon.wait_status(
            lambda status: status.partitions and status.partitions[0].state == "failed", "the partition failed"
        )
        assert "no committed offset" in status.partitions[0].problem
        assert daemon.terminate() == 0
        _commit(kafka, topic, 5)
        kafka.delete_records(topic, {0: 5})  # what is gone was done
        daemon.start()
        daemon.wait_caught_up({0: 10})
        assert daemon.terminate() == 0
        _produce(kafka, topic, 20)
        kafka.delete_records(topic, {0: 25})
        daemon.start()
        status = daemon.wait_status(
            lambda status: status.partitions and status.partitions[0].state == "failed", "the partition failed"
        )
        assert "the broker has offsets 25 to 30, not 10" in status.partitions[0].problem
        assert daemon.terminate() == 0
    assert _handled(tmp_path) == list(range(5, 10))
    assert kafka.committed(topic, topic) == {0: 10}


@pytest.mark.parametrize("ordering", ["partition", "key"])
@pytest.mark.parametrize(
    ("start_from", "first"),
    [("earliest", 0), ("latest", 10), ("offset:4", 4), ("timestamp:2026-01-31T12:00:05.500Z", 6)],
)
def test_start_from_is_for_partitions_without_an_offset(
    kafka: KafkaCluster, topic_name: str, tmp_path: Path, start_from: str, first: int, ordering: str
) -> None:
    kafka.create_topic(topic_name, partitions=2)
    noon_ms = 1_769_860_800_000
    for partition in range(2):
        kafka.produce(
            topic_name,
            [Record(partition, b"%d" % second, b"{}", timestamp_ms=noon_ms + 1000 * second) for second in range(10)],
        )
    _commit(kafka, topic_name, 3)
    # Not what counts here.
    settings = (f"start_from={start_from}", f"handler.ordering={ordering}", "auto_offset_reset=error")
    with _daemon(kafka, topic_name, tmp_path, *settings) as daemon:
        daemon.wait_caught_up({0: 10, 1: 10})
        _produce(kafka, topic_name, 2, partition=1)
        daemon.wait_caught_up({0: 10, 1: 12})
        assert daemon.terminate() == 0
        daemon.start()
        daemon.wait_caught_up({0: 10, 1: 12})
        assert daemon.terminate() == 0
    assert _handled(tmp_path, 0) == list(range(3, 10))
    assert _handled(tmp_path, 1) == list(range(first, 12))


@pytest.mark.parametrize(("policy", "first"), [("earliest", 0), ("latest", 10)])
def test_an_offset_beyond_the_end_in_start_from(
    kafka: KafkaCluster, topic: str, tmp_path: Path, policy: str, first: int
) -> None:
    _produce(kafka, topic, 10)
    with _daemon(kafka, topic, tmp_path, "start_from=offset:500", f"auto_offset_reset={policy}") as daemon:
        daemon.wait_status(lambda status: status.partitions and status.partitions[0].committed == 10, "the reset")
        (event,) = daemon.events("offset_out_of_range")
        assert event["offset"] == 500
        _produce(kafka, topic, 5)
        _wait_handled(tmp_path, range(first, 15))
        daemon.wait_caught_up({0: 15})


# ---- what comes later ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_from", ["earliest", "latest", "offset:15"])
def test_nothing_of_an_added_partition_is_missed(
    kafka: KafkaCluster, topic: str, tmp_path: Path, start_from: str
) -> None:
    """Also what was produced before the group knew of it, wherever the group started in the others."""
    _produce(kafka, topic, 20)
    with _daemon(kafka, topic, tmp_path, f"start_from={start_from}", QUICK_LOOK) as daemon:
        daemon.wait_caught_up({0: 20})
        kafka.add_partitions(topic, 3)
        for partition in (1, 2):
            _produce_to_new(kafka, topic, 30, partition)
        daemon.wait_running(3)
        _produce_to_new(kafka, topic, 5, partition=1)
        daemon.wait_caught_up({0: 20, 1: 35, 2: 30})
        assert len(daemon.events("partition_added")) == 2
        assert daemon.terminate() == 0
    assert _handled(tmp_path, 0) == list(range({"earliest": 0, "latest": 20, "offset:15": 15}[start_from], 20))
    assert _handled(tmp_path, 1) == list(range(35))
    assert _handled(tmp_path, 2) == list(range(30))


def test_nothing_of_a_partition_that_was_added_while_no_member_ran_is_missed(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    _produce(kafka, topic, 20)
    with _daemon(kafka, topic, tmp_path, "auto_offset_reset=latest") as daemon:
        daemon.wait_caught_up({0: 20})
        assert daemon.terminate() == 0
        kafka.add_partitions(topic, 3)
        for partition in (1, 2):
            _produce_to_new(kafka, topic, 30, partition)
        daemon.start()
        daemon.wait_caught_up({0: 20, 1: 30, 2: 30})
        assert daemon.terminate() == 0
    assert _handled(tmp_path, 0) == []
    assert _handled(tmp_path, 1) == _handled(tmp_path, 2) == list(range(30))


def test_nothing_of_the_first_topic_that_an_expression_gains_is_missed(
    kafka: KafkaCluster, topic_name: str, tmp_path: Path
) -> None:
    settings = (f"topics=^{topic_name}-.*", "auto_offset_reset=latest", QUICK_LOOK)
    with _daemon(kafka, topic_name, tmp_path, *settings) as daemon:
        daemon.wait_status(lambda status: status.state in ("joining", "running"), "it to wait for a topic")
        time.sleep(1)
        kafka.create_topic(f"{topic_name}-a", partitions=1)
        _produce(kafka, f"{topic_name}-a", 10)
        daemon.wait_running(1)
        daemon.wait_caught_up({0: 10})
    assert _handled(tmp_path) == list(range(10))


@pytest.mark.parametrize(
    ("policy", "protocol"), [("earliest", "classic"), ("latest", "classic"), ("latest", "consumer")]
)
def test_nothing_of_a_topic_that_an_expression_gains_is_missed(
    kafka: KafkaCluster, topic_name: str, tmp_path: Path, policy: str, protocol: str
) -> None:
    kafka.create_topic(f"{topic_name}-a", partitions=1)
    _produce(kafka, f"{topic_name}-a", 10)
    settings = [f"topics=^{topic_name}-.*", f"auto_offset_reset={policy}", QUICK_LOOK]
    if protocol == "classic":
        settings += QUICK_SESSION
    else:
        settings += ["supervisor.group_protocol=consumer", "supervisor.lease_seconds=2"]
    with DaemonProcess(tmp_path, kafka.bootstrap, topic_name, "tests.ledger:append", settings=settings) as daemon:
        daemon.wait_caught_up({0: 10})
        # The ledger knows partitions only: those of the second topic have other numbers.
        kafka.create_topic(f"{topic_name}-b", partitions=3)
        for partition in (1, 2):
            _produce(kafka, f"{topic_name}-b", 30, partition)
        daemon.wait_running(4)
        _produce(kafka, f"{topic_name}-b", 5, partition=1)
        _wait_handled(tmp_path, range(35), partition=1)
        _wait_handled(tmp_path, range(30), partition=2)
        assert daemon.terminate() == 0
    assert kafka.committed(topic_name, f"{topic_name}-b") == {0: 0, 1: 35, 2: 30}
    assert _handled(tmp_path, 0) == list(range(0 if policy == "earliest" else 10, 10))


def test_a_topic_that_is_deleted_while_running_leaves_the_others_alone(
    kafka: KafkaCluster, topic_name: str, tmp_path: Path
) -> None:
    stays, goes = f"{topic_name}-stays", f"{topic_name}-goes"
    kafka.create_topic(stays, partitions=1)
    kafka.create_topic(goes, partitions=2)
    with _daemon(kafka, topic_name, tmp_path, f"topics={stays},{goes}", QUICK_LOOK) as daemon:
        daemon.wait_running(3)
        _produce(kafka, goes, 20, partition=1)
        _wait_handled(tmp_path, range(20), partition=1)
        kafka.delete_topic(goes)
        _produce(kafka, stays, 20)
        _wait_handled(tmp_path, range(20))
        status = daemon.wait_status(lambda status: len(status.partitions) == 1, "only the other topic's partition")
        assert (status.partitions[0].topic, status.partitions[0].state) == (stays, "running")
        _produce(kafka, stays, 20)
        _wait_handled(tmp_path, range(40))
        daemon.wait_caught_up({0: 40})
        assert not daemon.events("defect")
        assert daemon.terminate() == 0


@pytest.mark.parametrize("policy", ["earliest", "latest"])
@pytest.mark.parametrize("records", [10, 30])
def test_a_topic_that_is_recreated_while_running_is_read_from_its_beginning(
    kafka: KafkaCluster, topic: str, tmp_path: Path, records: int, policy: str
) -> None:
    """Whether or not it has as many records as were done of the one before, which the store still knows."""
    with _daemon(kafka, topic, tmp_path, f"auto_offset_reset={policy}", QUICK_LOOK) as daemon:
        daemon.wait_running(1)
        _produce(kafka, topic, 20)
        daemon.wait_caught_up({0: 20})
        kafka.delete_topic(topic)
        daemon.wait_status(lambda status: not status.partitions, "its partition given back")
        wait_until(lambda: topic not in kafka.admin.list_topics(timeout=10).topics, 30, "the topic to be gone")
        kafka.create_topic(topic, partitions=1)
        _produce_to_new(kafka, topic, records, 0)
        daemon.wait_caught_up({0: records})
        (event,) = daemon.events("topic_recreated")
        assert event["stored"] == 20
        assert daemon.terminate() == 0
    assert _handled(tmp_path) == sorted([*range(20), *range(records)])


# ---- slots -----------------------------------------------------------------------------------------------------------

PARTITIONS = 2


class KeyedProducer(SteadyProducer):
    """Knows the key of each record."""

    def __init__(self, brokers: str, topic: str, rate_per_second: int) -> None:
        super().__init__(brokers, topic, PARTITIONS, rate_per_second)
        self.keys: dict[Coordinate, bytes] = {}

    def __enter__(self) -> "KeyedProducer":
        super().__enter__()
        return self

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        super()._delivered(error, message)
        partition, offset, key = message.partition(), message.offset(), message.key()
        if error is None and partition is not None and offset is not None and key is not None:
            self.keys[Coordinate(partition, offset)] = key


class Handlings:
    """Every handling in the ledger: when, and of what."""

    def __init__(self, folder: Path) -> None:
        lines = [line.split() for path in folder.glob("ledger-*") for line in path.read_bytes().splitlines()]
        self.all = sorted((int(at), Coordinate(int(partition), int(offset))) for partition, offset, at in lines)

    def of(self, since_ns: int = 0, until_ns: int = 2**63) -> set[Coordinate]:
        return {coordinate for at, coordinate in self.all if since_ns <= at < until_ns}

    def disorder(self, keys: Mapping[Coordinate, bytes], until_ns: int = 2**63) -> list[str]:
        """Records that were handled for the first time after a later one of their key."""
        found: list[str] = []
        seen: set[Coordinate] = set()
        last: dict[tuple[int, bytes], int] = {}
        for at, coordinate in self.all:
            if at < until_ns and coordinate not in seen:
                seen.add(coordinate)
                of_key = coordinate.partition, keys[coordinate]
                if coordinate.offset < last.get(of_key, -1):
                    found.append(f"{coordinate} after {last[of_key]}")
                last[of_key] = coordinate.offset
        return found


def _recorded(kafka: KafkaCluster, topic: str, keys: Mapping[Coordinate, bytes]) -> set[Coordinate]:
    """What the group's commits say is done, metadata included."""
    done: set[Coordinate] = set()
    for told in _told(kafka, topic, PARTITIONS):
        if told.offset < 0:
            continue
        beyond = DoneBefore(layers_of(told.metadata or "", told.offset))
        messages = [
            Message(topic=topic, partition=told.partition, offset=coordinate.offset, key=key)
            for coordinate, key in sorted(keys.items())
            if coordinate.partition == told.partition
        ]
        later = [message for message in messages if (message.offset() or 0) >= told.offset]
        left = {message.offset() for message in beyond.left(later)}
        done |= {
            Coordinate(told.partition, message.offset() or 0) for message in messages if message.offset() not in left
        }
    return done


def _layout(ordering: str, processes: int) -> Sequence[str]:
    # A static member that comes back has its partitions at once.
    return (
        f"handler.ordering={ordering}",
        f"handler.processes={processes}",
        "supervisor.group_instance_id=only",
        "commit_interval_secs=0.2",
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["stop", "kill", "both"])
def test_slots_go_on_where_they_were_whatever_the_layout(
    kafka: KafkaCluster, topic_name: str, tmp_path: Path, kind: str
) -> None:
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    endings = {"stop": ["stop"], "kill": ["kill"], "both": ["kill", "stop"]}[kind] * 4
    layouts = [("key", 2), ("key", 3), ("key", 1), ("key", 4)]
    chance = random.Random(kind)
    ends_ns: list[int] = []
    done_at_end: list[set[Coordinate]] = []
    with KeyedProducer(kafka.bootstrap, topic_name, 1_000) as producer:
        for (ordering, processes), ending in zip(layouts, endings, strict=False):
            # A millisecond each: slots get apart, and the group lags behind.
            settings = _layout(ordering, processes)
            with _daemon(kafka, topic_name, tmp_path, *settings, target="tests.fault_handlers:slow") as daemon:
                _wait_more(tmp_path, 500)
                time.sleep(chance.random())
                if ending == "kill":
                    psutil.wait_procs(daemon.kill(), timeout=5)
                else:
                    assert daemon.terminate() == 0
            ends_ns.append(time.monotonic_ns())
            done_at_end.append(_recorded(kafka, topic_name, dict(producer.keys)))
        producer.stop()
    with _daemon(kafka, topic_name, tmp_path, *_layout("none", 2)) as daemon:
        daemon.wait_caught_up(kafka.end_offsets(topic_name))
        assert daemon.terminate() == 0
    handlings = Handlings(tmp_path)
    assert handlings.of() == producer.acknowledged
    for end_ns, done, ending in zip(ends_ns, done_at_end, endings, strict=False):
        handled = handlings.of(until_ns=end_ns)
        assert done <= handled, "nothing is recorded that is not handled"
        assert not done & handlings.of(since_ns=end_ns), "nothing recorded is repeated"
        if ending == "stop":
            assert handled == done
    assert not handlings.disorder(producer.keys, until_ns=ends_ns[-1])
    if kind == "stop":
        assert not Ledger(tmp_path).repeated
    else:
        assert any(_is_spread(done, producer.keys) for done in done_at_end), "some slot was ahead of another"


def _wait_more(folder: Path, count: int) -> None:
    before = len(Handlings(folder).all)
    wait_until(lambda: len(Handlings(folder).all) > before + count, 60, f"{count} more records handled")


def _kill_handler(daemon: DaemonProcess, slot: int) -> None:
    pid = daemon.status().handlers[slot].pid
    assert pid is not None
    psutil.Process(pid).kill()
    daemon.wait_status(
        lambda status: status.handlers[slot].restarts == 1 and status.handlers[slot].state == "ready",
        "the handler process back",
    )


def _is_spread(done: set[Coordinate], keys: Mapping[Coordinate, bytes]) -> bool:
    """Whether something is done beyond something that is not."""
    left = keys.keys() - done
    for partition in range(PARTITIONS):
        first_left = min((offset for number, offset in left if number == partition), default=2**63)
        last_done = max((offset for number, offset in done if number == partition), default=-1)
        if first_left < last_done:
            return True
    return False


def test_a_killed_handler_process_repeats_what_was_in_its_hands(
    kafka: KafkaCluster, topic_name: str, tmp_path: Path
) -> None:
    """One record of each partition; the other slots notice nothing."""
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    with (
        KeyedProducer(kafka.bootstrap, topic_name, 1_000) as producer,
        _daemon(kafka, topic_name, tmp_path, *_layout("key", 3), target="tests.fault_handlers:slow") as daemon,
    ):
        daemon.wait_running(PARTITIONS)
        for slot in (0, 2):
            _wait_more(tmp_path, 500)
            _kill_handler(daemon, slot)
        assert [partition.worker.restarts for partition in daemon.status().partitions] == [0] * PARTITIONS
        producer.stop()
        daemon.wait_caught_up(kafka.end_offsets(topic_name))
        assert daemon.terminate() == 0
    handlings = Handlings(tmp_path)
    assert handlings.of() == producer.acknowledged
    assert sum(Ledger(tmp_path).repeated.values()) <= 2 * PARTITIONS
    assert not handlings.disorder(producer.keys)
