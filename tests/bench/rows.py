"""What the benchmark measures, in the order it is printed."""

from collections.abc import Callable
from typing import NamedTuple

from tests.bench import daemon_rows, raw_loops
from tests.bench.result import BenchResult, Workload
from tests.kafka_cluster import KafkaCluster


class Row(NamedTuple):
    """One line of the table. `run` blocks until it is measured, in processes of its own."""

    key: str
    run: Callable[[KafkaCluster, Workload], BenchResult]


ROWS = (
    Row("raw-default", raw_loops.run_default),
    Row("raw-tuned", raw_loops.run_tuned),
    Row("no-op", daemon_rows.run_no_op),
    Row("raw-spin", raw_loops.run_tuned_spin),
    Row("work", daemon_rows.run_work),
    Row("raw-latency", raw_loops.run_latency),
    Row("latency", daemon_rows.run_latency),
    Row("first-message", daemon_rows.run_first_message),
)
