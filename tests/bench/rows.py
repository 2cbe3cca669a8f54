"""What the benchmark measures, in the order it is printed."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import NamedTuple

from tests.bench import (
    daemon_rows,
    effect_loop,
    effect_rows,
    format_loops,
    format_rows,
    order_formats,
    raw_loops,
    source_loops,
    waiting_loops,
)
from tests.bench.result import BenchResult, Workload
from tests.bench.topic import Encode
from tests.kafka_cluster import KafkaCluster
from tests.registry_server import RegistryServer


class Topic(StrEnum):
    """The topic that a row reads, filled beforehand."""

    ORDERS = "bench-orders"
    """As many partitions and records as the command line says, a few keys much busier than the rest."""
    WORK_1 = "bench-work-1"
    """One partition, as many records as the rows with work read; Zipf-distributed keys."""
    WAITING_1 = "bench-waiting-1"
    """One partition, for handlers that wait; Zipf-distributed keys."""
    WAITING_8 = "bench-waiting-8"
    """The same in eight partitions."""
    AVRO = "bench-avro"
    """As ORDERS, but each record names its schema in a registry; fewer records."""
    PROTOBUF = "bench-protobuf"
    JSON_SCHEMA = "bench-json-schema"


class Row(NamedTuple):
    """One line of the table. `run` blocks until it is measured, in processes of its own."""

    key: str
    run: Callable[[KafkaCluster, Workload], BenchResult]
    topic: Topic = Topic.ORDERS
    needs_postgres: bool = False


ENCODERS: Mapping[Topic, Callable[[RegistryServer], Encode]] = {
    Topic.AVRO: order_formats.avro_encode,
    Topic.PROTOBUF: order_formats.protobuf_encode,
    Topic.JSON_SCHEMA: order_formats.json_schema_encode,
}
"""Of the topics that need a schema registry; the others have plain JSON."""

ROWS = (
    Row("raw-default", raw_loops.run_default),
    Row("raw-tuned", raw_loops.run_tuned),
    Row("no-op", daemon_rows.run_no_op),
    Row("auto", daemon_rows.run_auto),
    Row("manual", daemon_rows.run_manual),
    Row("key", daemon_rows.run_key),
    Row("raw-json-dataclass", format_loops.run_json_dataclass),
    Row("raw-json-msgspec", format_loops.run_json_msgspec),
    Row("json-typed", format_rows.run_json_typed),
    Row("raw-avro", format_loops.run_avro, Topic.AVRO),
    Row("avro", format_rows.run_avro, Topic.AVRO),
    Row("raw-protobuf", format_loops.run_protobuf, Topic.PROTOBUF),
    Row("protobuf", format_rows.run_protobuf, Topic.PROTOBUF),
    Row("raw-protobuf-dict", format_loops.run_protobuf_dict, Topic.PROTOBUF),
    Row("protobuf-dict", format_rows.run_protobuf_dict, Topic.PROTOBUF),
    Row("raw-json-schema", format_loops.run_json_schema, Topic.JSON_SCHEMA),
    Row("json-schema", format_rows.run_json_schema, Topic.JSON_SCHEMA),
    Row("raw-spin", raw_loops.run_tuned_spin),
    Row("work", daemon_rows.run_work),
    Row("raw-spin-1", raw_loops.run_hot_spin, Topic.WORK_1),
    Row("work-1", daemon_rows.run_hot_work, Topic.WORK_1),
    Row("raw-waiting", waiting_loops.run_one_at_a_time, Topic.WAITING_8),
    Row("raw-tasks-1", waiting_loops.run_tasks, Topic.WAITING_1),
    Row("waiting-1", daemon_rows.run_waiting, Topic.WAITING_1),
    Row("raw-tasks-8", waiting_loops.run_tasks, Topic.WAITING_8),
    Row("waiting-8", daemon_rows.run_waiting, Topic.WAITING_8),
    Row("threads-8", daemon_rows.run_waiting_threads, Topic.WAITING_8),
    Row("raw-effects-sqlite", effect_loop.run_sqlite),
    Row("effects-sqlite", effect_rows.run_sqlite),
    Row("raw-effects-postgres", effect_loop.run_postgres, needs_postgres=True),
    Row("effects-postgres", effect_rows.run_postgres, needs_postgres=True),
    Row("source-poll", source_loops.run_poll),
    Row("source-batch", source_loops.run_batch),
    Row("raw-light", source_loops.run_light_loop),
    Row("source-light", source_loops.run_batch_light),
    Row("source-avro", source_loops.run_batch_avro, Topic.AVRO),
    Row("raw-async-for", source_loops.run_iterate_aiokafka),
    Row("source-async-for", source_loops.run_iterate),
    Row("raw-latency", raw_loops.run_latency),
    Row("latency", daemon_rows.run_latency),
    Row("first-message", daemon_rows.run_first_message),
)
