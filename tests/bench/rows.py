"""What the benchmark measures, in the order it is printed."""

from collections.abc import Callable
from typing import NamedTuple

from tests.bench import raw_loops
from tests.bench.result import BenchResult, Workload
from tests.kafka_cluster import KafkaCluster


class Row(NamedTuple):
    """One line of the table. `run` blocks until it is measured, in processes of its own."""

    key: str
    run: Callable[[KafkaCluster, Workload], BenchResult]


ROWS = (
    Row("raw-default", raw_loops.run_default),
    Row("raw-tuned", raw_loops.run_tuned),
    # Here: kafkasrcd beside the tuned loop.
    Row("raw-spin", raw_loops.run_tuned_spin),
    # Here: kafkasrcd with the same work a message, on all cores.
    Row("raw-latency", raw_loops.run_latency),
    # Here: kafkasrcd at the same rate.
)
