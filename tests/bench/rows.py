"""What the benchmark measures, in the order it is printed."""

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from tests.bench import daemon_rows, effect_loop, effect_rows, raw_loops, waiting_loops
from tests.bench.result import BenchResult, Workload
from tests.kafka_cluster import KafkaCluster


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


class Row(NamedTuple):
    """One line of the table. `run` blocks until it is measured, in processes of its own."""

    key: str
    run: Callable[[KafkaCluster, Workload], BenchResult]
    topic: Topic = Topic.ORDERS
    needs_postgres: bool = False


ROWS = (
    Row("raw-default", raw_loops.run_default),
    Row("raw-tuned", raw_loops.run_tuned),
    Row("no-op", daemon_rows.run_no_op),
    Row("auto", daemon_rows.run_auto),
    Row("manual", daemon_rows.run_manual),
    Row("key", daemon_rows.run_key),
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
    Row("raw-latency", raw_loops.run_latency),
    Row("latency", daemon_rows.run_latency),
    Row("first-message", daemon_rows.run_first_message),
)
