"""`python -m tests.bench`: fill a topic on a real broker, run every row over it, print a table."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import click
import msgspec
import orjson
from msgspec import structs
from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench import ratios
from tests.bench.result import BenchResult, Workload
from tests.bench.rows import ENCODERS, ROWS, Row, Topic
from tests.bench.spin import calibrate
from tests.bench.topic import fill_with_orders, skewed, zipf
from tests.kafka_cluster import KafkaCluster, kafka_missing
from tests.postgres import postgres_missing
from tests.registry_server import RegistryServer, registry_missing

SPIN_US = 100
WAIT_MS = 10
ONE_AT_A_TIME_MESSAGES = 300
WARM_UP_SECONDS = 3
TABLE_WIDTH = 132

# The table does not fit into the 80 columns that a pipe is taken for.
console = Console()
if console.width < TABLE_WIDTH:
    console = Console(width=TABLE_WIDTH)


@click.command()
@click.option("--messages", default=1_000_000, show_default=True, help="Records in the topic.")
@click.option("--partitions", default=4, show_default=True, help="Partitions of the topic.")
@click.option(
    "--spin-messages", default=50_000, show_default=True, help=f"Records for the rows with {SPIN_US} µs each."
)
@click.option(
    "--waiting-messages", default=200_000, show_default=True, help=f"Records for the rows that wait {WAIT_MS} ms each."
)
@click.option(
    "--effect-messages", default=200_000, show_default=True, help="Records for the rows with effects in a database."
)
@click.option("--checkpoint-messages", default=500, show_default=True, help="After how many of them to commit.")
@click.option(
    "--format-messages", default=400_000, show_default=True, help="Records for the rows with a schema registry."
)
@click.option("--rate", default=1_000, show_default=True, help="Records a second for the latency rows.")
@click.option("--latency-seconds", default=10, show_default=True, help="How long the latency rows measure.")
@click.option(
    "--repeat",
    default=1,
    type=click.IntRange(min=1),
    show_default=True,
    help="Run each row so often and show the median run.",
)
@click.option("--row", "only", multiple=True, type=click.Choice([row.key for row in ROWS]), help="Only these rows.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the results to this file.")
def main(
    messages: int,
    partitions: int,
    spin_messages: int,
    waiting_messages: int,
    effect_messages: int,
    checkpoint_messages: int,
    format_messages: int,
    rate: int,
    latency_seconds: int,
    repeat: int,
    only: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Measure kafkasrcd and the loops people write by hand on one real broker, in one run."""
    missing = kafka_missing() or registry_missing()
    if missing is not None:
        console.print(missing, style="bold red")
        sys.exit(1)
    rows = [row for row in ROWS if not only or row.key in only]
    no_postgres = postgres_missing()
    if no_postgres is not None and any(row.needs_postgres for row in rows):
        console.print(f"rows are left out: {no_postgres}", style="bold red")
        rows = [row for row in rows if not row.needs_postgres]
    shapes = {
        Topic.ORDERS: (partitions, messages),
        Topic.WORK_1: (1, min(spin_messages, messages)),
        Topic.WAITING_1: (1, waiting_messages),
        Topic.WAITING_8: (8, waiting_messages),
        **dict.fromkeys(ENCODERS, (partitions, format_messages)),
    }
    # The optimizing compiler: the broker shares the machine, and its CPU time is not what is compared.
    with KafkaCluster(optimized=True) as cluster, ExitStack() as stack:
        needs_registry = any(row.topic in ENCODERS for row in rows)
        registry = stack.enter_context(RegistryServer()) if needs_registry else None
        for topic in dict.fromkeys(row.topic for row in rows):
            its_partitions, its_messages = shapes[topic]
            with console.status(f"filling {its_messages:,} records into {its_partitions} partitions"):
                draw_user = skewed if topic is Topic.ORDERS or topic in ENCODERS else zipf()
                encode = orjson.dumps if registry is None or topic not in ENCODERS else ENCODERS[topic](registry)
                fill_with_orders(
                    cluster,
                    topic,
                    messages=its_messages,
                    partitions=its_partitions,
                    draw_user=draw_user,
                    encode=encode,
                )
        workload = Workload(
            topic=Topic.ORDERS,
            partitions=partitions,
            messages=messages,
            spin_messages=spin_messages,
            # After the fill: a CPU that has been idle is slower, or faster, than one at work.
            spin_iterations=calibrate(SPIN_US),
            spin_us=SPIN_US,
            wait_ms=WAIT_MS,
            one_at_a_time_messages=min(ONE_AT_A_TIME_MESSAGES, waiting_messages),
            effect_messages=min(effect_messages, messages),
            checkpoint_messages=checkpoint_messages,
            rate_per_second=rate,
            warm_up_seconds=WARM_UP_SECONDS,
            latency_seconds=latency_seconds,
            registry_url="" if registry is None else registry.url,
        )
        by_row: dict[str, BenchResult] = {}
        for row in rows:
            its_partitions, its_messages = shapes[row.topic]
            its = structs.replace(workload, topic=row.topic, partitions=its_partitions, messages=its_messages)
            by_row[row.key] = _median_run(row, cluster, its, repeat)
    results = list(by_row.values())
    console.print(_table(results, workload))
    for line in ratios.lines(by_row):
        console.print(line, highlight=False)
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(results)))


def _median_run(row: Row, cluster: KafkaCluster, workload: Workload, repeat: int) -> BenchResult:
    """The run in the middle, whole: its figures belong together."""
    runs: list[BenchResult] = []
    for number in range(repeat):
        with console.status(f"{row.key}, run {number + 1} of {repeat}"):
            runs.append(row.run(cluster, workload))
    # The producer sets the duration of a latency run.
    runs.sort(key=lambda run: run.seconds if run.latency_p99_ms is None else run.latency_p99_ms)
    return runs[(repeat - 1) // 2]


def _table(results: list[BenchResult], workload: Workload) -> Table:
    title = (
        f"{workload.messages:,} JSON records of about 250 bytes, {workload.partitions} partitions, "
        f"{os.cpu_count()} CPUs shared with the broker"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("", min_width=44)
    for heading in ("messages", "msg/s", "CPU µs/msg", "procs", "peak MB", "PSS MB", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        is_paced = result.latency_p50_ms is not None
        table.add_row(
            result.name,
            f"{result.messages:,}",
            # Where the producer sets the pace, the throughput says nothing.
            "" if is_paced else f"{result.messages_per_second:,.0f}",
            f"{result.cpu_us_per_message:.2f}",
            str(result.processes),
            _decimals(result.peak_memory_mb, 0),
            _decimals(result.worker_pss_mb, 1),
            _decimals(result.latency_p50_ms, 2),
            _decimals(result.latency_p99_ms, 2),
        )
    return table


def _decimals(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


if __name__ == "__main__":
    main()
