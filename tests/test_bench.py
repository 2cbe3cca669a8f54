"""The benchmark's raw rows, small: that each one runs, and that its figures mean what they say.

The daemon's own rows measure a window of a run at full speed, and say nothing about a topic as small as this one.
"""

from typing import Any

import orjson
import pytest
from msgspec import structs

from tests.bench.result import BenchResult, Workload, percentile
from tests.bench.rows import ENCODERS, ROWS, Row
from tests.bench.topic import fill_with_orders, orders, zipf
from tests.kafka_cluster import KafkaCluster
from tests.registry_server import RegistryServer


@pytest.fixture(scope="module")
def workload(kafka: KafkaCluster) -> Workload:
    workload = Workload(
        topic="bench-small",
        partitions=4,
        messages=5_000,
        spin_messages=1_000,
        spin_iterations=10,
        spin_us=0,
        wait_ms=1,
        one_at_a_time_messages=100,
        effect_messages=2_000,
        checkpoint_messages=500,
        rate_per_second=200,
        warm_up_seconds=2,
        latency_seconds=1,
    )
    fill_with_orders(kafka, workload.topic, messages=workload.messages, partitions=workload.partitions)
    return workload


def raw_rows(*, with_registry: bool) -> list[Any]:
    return [
        pytest.param(row, id=row.key, marks=[pytest.mark.postgres] if row.needs_postgres else [])
        for row in ROWS
        if row.key.startswith("raw-") and (row.topic in ENCODERS) is with_registry
    ]


@pytest.mark.parametrize("row", raw_rows(with_registry=False))
def test_each_raw_row_reads_what_it_was_asked_to(kafka: KafkaCluster, workload: Workload, row: Row) -> None:
    result = row.run(kafka, workload)
    if result.latency_p50_ms is None:
        # A batch may reach a little past the end of what was asked for.
        assert result.messages in (100, *range(1_000, 2_500), 5_000)
    else:
        assert result.latency_p99_ms is not None
        assert result.messages == 200
        assert 0 < result.latency_p50_ms <= result.latency_p99_ms
    assert result.messages_per_second > 0
    assert result.cpu_us_per_message > 0
    assert result.peak_memory_mb is None or result.peak_memory_mb > 10


@pytest.mark.parametrize("row", raw_rows(with_registry=True))
def test_each_raw_row_with_a_registry_reads_what_it_was_asked_to(
    kafka: KafkaCluster, schema_registry: RegistryServer, workload: Workload, topic_name: str, row: Row
) -> None:
    fill_with_orders(kafka, topic_name, messages=600, partitions=2, encode=ENCODERS[row.topic](schema_registry))
    its = structs.replace(workload, topic=topic_name, messages=600, registry_url=schema_registry.url)
    assert row.run(kafka, its).messages == 600


def test_records_are_the_same_each_time_and_as_large_as_promised() -> None:
    records = list(orders(1_000))
    assert records == list(orders(1_000))
    assert 235 < sum(len(orjson.dumps(order)) for _, order in records) / 1_000 < 265


def test_a_few_keys_are_much_busier_than_the_rest() -> None:
    keys = [key for key, _ in orders(10_000)]
    assert 300 < keys.count(b"user-0") < 650
    assert len(set(keys)) > 3_000


def test_of_the_keys_of_handlers_that_wait_none_is_busy() -> None:
    keys = [key for key, _ in orders(100_000, draw_user=zipf())]
    assert 25 < keys.count(b"user-0") < 90
    assert keys.count(b"user-0") > keys.count(b"user-99")


def test_figures_are_derived_from_what_was_measured() -> None:
    result = BenchResult(name="row", messages=1_000, seconds=0.5, cpu_seconds=0.25)
    assert (result.messages_per_second, result.cpu_us_per_message) == (2_000, 250)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1)) == (50, 99, 100)
    assert percentile([7.0], 0.99) == 7
