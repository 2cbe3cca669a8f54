"""What tests of KafkaSource have in common: its configuration, records, and what is committed."""

import time
from typing import Any, Final

import msgspec
import orjson

from kafkasrcd import KafkaSource, KafkaSourceConfig, Message
from kafkasrcd.settings import LogLevel, SupervisorSettings
from tests.kafka_cluster import KafkaCluster, Record

DEADLINE_SECONDS: Final = 30.0
PARTITIONS: Final = 3


class Order(msgspec.Struct):
    n: int


def config(kafka: KafkaCluster, topic: str, **others: Any) -> KafkaSourceConfig:
    supervisor = SupervisorSettings(
        session_timeout_ms=6_000, heartbeat_interval_ms=500, lease_seconds=2.0, log_level=LogLevel.WARNING
    )
    config = KafkaSourceConfig(
        brokers=kafka.bootstrap, group_id=topic, topics=[topic], supervisor=supervisor, commit_interval_secs=0.5
    )
    return msgspec.structs.replace(config, **others)


def produce(kafka: KafkaCluster, topic: str, count: int, first: int = 0, partitions: int = PARTITIONS) -> None:
    kafka.produce(
        topic,
        [Record(n % partitions, b"%d" % n, orjson.dumps({"n": n})) for n in range(first, first + count)],
    )


def polled(source: KafkaSource[Any], count: int) -> list[Message[Any]]:
    """So many messages."""
    found: list[Message[Any]] = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count}"
        message = source.poll()
        if message is not None:
            found.append(message)
    return found


def committed(kafka: KafkaCluster, topic: str) -> dict[int, int]:
    """Where something is."""
    return {partition: offset for partition, offset in kafka.committed(topic, topic).items() if offset > 0}
