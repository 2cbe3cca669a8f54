"""The peer of the rows with `on_checkpoint`: the same effects, with offsets in the same transaction, by hand."""

from contextlib import AbstractContextManager, closing
from typing import Any

import orjson
from confluent_kafka import Consumer, KafkaException, Message
from sqlalchemy import Connection, and_, bindparam, insert, update

from tests.bench import loop_process
from tests.bench.effects import (
    connect,
    effect,
    effects,
    postgres_database,
    reached,
    require_exactly_once,
    sqlite_database,
)
from tests.bench.loop_process import TUNED, Job, default_settings, measured
from tests.bench.result import BenchResult, Stopwatch, Workload
from tests.kafka_cluster import KafkaCluster

_INSERT = insert(effects)
_ADVANCE = (
    update(reached)
    .where(and_(reached.c.topic == bindparam("its_topic"), reached.c.partition == bindparam("its_partition")))
    .values(next_offset=bindparam("new_offset"))
)


def effect_loop(job: Job) -> BenchResult:
    """A batch, its effects, its offsets; one commit for all of it once there are enough for a checkpoint."""
    engine = connect(job.database_url)
    workload = job.workload
    with engine.begin() as connection:
        rows = [{"topic": workload.topic, "partition": each, "next_offset": 0} for each in range(workload.partitions)]
        connection.execute(insert(reached), rows)
    count = since_checkpoint = 0
    stopwatch: Stopwatch | None = None
    with closing(Consumer({**default_settings(job), **TUNED})) as consumer, engine.connect() as connection:
        for messages in loop_process.batches(consumer, workload.topic, workload.effect_messages):
            stopwatch = stopwatch or Stopwatch()
            _handle(connection, workload.topic, messages)
            count += len(messages)
            since_checkpoint += len(messages)
            if since_checkpoint >= workload.checkpoint_messages:
                connection.commit()
                since_checkpoint = 0
        connection.commit()
        result = measured(stopwatch).result(job.name, count)
    assert require_exactly_once(engine, reached) == count
    return result


def _handle(connection: Connection, topic: str, messages: list[Message]) -> None:
    rows: list[dict[str, Any]] = []
    next_offsets: dict[int, int] = {}
    for message in messages:
        if message.error():
            raise KafkaException(message.error())
        partition, offset = message.partition() or 0, message.offset() or 0
        rows.append(effect(partition, offset, orjson.loads(message.value() or b"null")))
        next_offsets[partition] = offset + 1
    connection.execute(_INSERT, rows)
    connection.execute(
        _ADVANCE,
        [
            {"its_topic": topic, "its_partition": partition, "new_offset": next_offset}
            for partition, next_offset in next_offsets.items()
        ],
    )


def run_sqlite(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `effect_loop` on SQLite."""
    return _run("SQLite", sqlite_database(), cluster, workload)


def run_postgres(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `effect_loop` on PostgreSQL."""
    return _run("PostgreSQL", postgres_database(), cluster, workload)


def _run(name: str, database: AbstractContextManager[str], cluster: KafkaCluster, workload: Workload) -> BenchResult:
    with database as url:
        return loop_process.run(effect_loop, f"raw loop, effects and offsets in {name}", cluster, workload, url)


if __name__ == "__main__":
    loop_process.main({effect_loop.__name__: effect_loop})
