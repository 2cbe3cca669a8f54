"""KafkaSource, and what its rows stand beside. CPU and memory are the program's own, without its engine's."""

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from typing import Any, Final, Protocol

import orjson
from confluent_kafka import Consumer, KafkaException

from kafkasrcd import AsyncKafkaSource, KafkaSource, KafkaSourceConfig
from kafkasrcd.settings import SchemaRegistrySettings
from tests.bench import loop_process
from tests.bench.loop_process import TUNED, Job, committed_batches, default_settings, measured, new_group
from tests.bench.result import BenchResult, Stopwatch, Workload
from tests.bench.spin import spin
from tests.kafka_cluster import KafkaCluster

LIGHT_WORK_US: Final = 5


class _Record(Protocol):
    @property
    def value(self) -> bytes | None: ...


class _Consumer(Protocol):
    """AIOKafkaConsumer as far as it is used here; aiokafka has no annotations for others."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    def __aiter__(self) -> AsyncIterator[_Record]: ...


_new_consumer: Callable[..., _Consumer] = importlib.import_module("aiokafka").AIOKafkaConsumer


def _config(job: Job, value_format: str = "json") -> KafkaSourceConfig:
    return KafkaSourceConfig(
        brokers=job.bootstrap,
        group_id=new_group(),
        topics=[job.workload.topic],
        commit_interval_secs=1.0,
        value_format=value_format,
        schema_registry=SchemaRegistrySettings(url=job.workload.registry_url),
    )


def _light_iterations(job: Job) -> int:
    """For `spin`, that cost `LIGHT_WORK_US`."""
    return job.workload.spin_iterations * LIGHT_WORK_US // max(1, job.workload.spin_us)


def poll_source(job: Job) -> BenchResult:
    """One `poll()` a message."""
    count, stopwatch = 0, None
    with KafkaSource(_config(job)) as source:
        while count < job.workload.messages:
            if source.poll() is not None:
                stopwatch = stopwatch or Stopwatch()
                count += 1
        return measured(stopwatch).result(job.name, count)


def batch_source(job: Job) -> BenchResult:
    """`poll_batch()`, and nothing done."""
    return _batches(job, "json", 0)


def batch_source_light(job: Job) -> BenchResult:
    """`poll_batch()`, and some work."""
    return _batches(job, "json", _light_iterations(job))


def batch_source_avro(job: Job) -> BenchResult:
    """`poll_batch()` of Avro, which workers decode."""
    return _batches(job, "avro", 0)


def _batches(job: Job, value_format: str, iterations: int) -> BenchResult:
    count, stopwatch = 0, None
    with KafkaSource(_config(job, value_format)) as source:
        while count < job.workload.messages:
            messages = source.poll_batch()
            if messages:
                stopwatch = stopwatch or Stopwatch()
                count += len(messages)
            if iterations:
                for _ in messages:
                    spin(iterations)
        return measured(stopwatch).result(job.name, count)


def tuned_light_loop(job: Job) -> BenchResult:
    """The tuned loop with the same work."""
    iterations = _light_iterations(job)
    with closing(Consumer({**default_settings(job), **TUNED})) as consumer:
        count, stopwatch = 0, None
        for messages in committed_batches(consumer, job.workload.topic, job.workload.messages):
            stopwatch = stopwatch or Stopwatch()
            for message in messages:
                if message.error():
                    raise KafkaException(message.error())
                orjson.loads(message.value() or b"null")
                spin(iterations)
            count += len(messages)
        return measured(stopwatch).result(job.name, count)


def iterate_source(job: Job) -> BenchResult:
    """`async for` over AsyncKafkaSource."""

    async def run() -> BenchResult:
        count, stopwatch = 0, None
        async with AsyncKafkaSource(_config(job)) as source:
            async for _ in source:
                stopwatch = stopwatch or Stopwatch()
                count += 1
                if count >= job.workload.messages:
                    break
            return measured(stopwatch).result(job.name, count)

    return asyncio.run(run())


def iterate_aiokafka(job: Job) -> BenchResult:
    """`async for` over aiokafka's consumer, with orjson."""

    async def run() -> BenchResult:
        wanted = min(job.workload.messages, job.workload.effect_messages)
        count, stopwatch = 0, None
        consumer = _new_consumer(
            job.workload.topic, bootstrap_servers=job.bootstrap, group_id=new_group(), auto_offset_reset="earliest"
        )
        await consumer.start()
        try:
            async for record in consumer:
                stopwatch = stopwatch or Stopwatch()
                orjson.loads(record.value or b"null")
                count += 1
                if count >= wanted:
                    break
            return measured(stopwatch).result(job.name, count)
        finally:
            await consumer.stop()

    return asyncio.run(run())


def run_poll(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `poll_source`."""
    return loop_process.run(poll_source, "KafkaSource.poll()", cluster, workload)


def run_batch(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `batch_source`."""
    return loop_process.run(batch_source, "KafkaSource.poll_batch()", cluster, workload)


def run_light_loop(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `tuned_light_loop`."""
    name = f"raw consume() loop, tuned, with {LIGHT_WORK_US} µs of work each"
    return loop_process.run(tuned_light_loop, name, cluster, workload)


def run_batch_light(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `batch_source_light`."""
    return loop_process.run(batch_source_light, f"KafkaSource.poll_batch(), {LIGHT_WORK_US} µs each", cluster, workload)


def run_batch_avro(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `batch_source_avro`."""
    return loop_process.run(batch_source_avro, "KafkaSource.poll_batch(), Avro", cluster, workload)


def run_iterate_aiokafka(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `iterate_aiokafka`."""
    return loop_process.run(iterate_aiokafka, "aiokafka, async for, with orjson", cluster, workload)


def run_iterate(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `iterate_source`."""
    return loop_process.run(iterate_source, "AsyncKafkaSource, async for", cluster, workload)


LOOPS: dict[str, Any] = {
    loop.__name__: loop
    for loop in (
        poll_source,
        batch_source,
        batch_source_light,
        batch_source_avro,
        tuned_light_loop,
        iterate_source,
        iterate_aiokafka,
    )
}

if __name__ == "__main__":
    loop_process.main(LOOPS)
