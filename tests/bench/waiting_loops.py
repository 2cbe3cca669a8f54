"""The peers of the rows whose handler waits on others: one message at a time, and as many tasks as a loop can hold."""

import asyncio
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Protocol

import orjson
from confluent_kafka import Consumer, KafkaException

from tests.bench import loop_process
from tests.bench.loop_process import Job, default_settings, measured, new_group, require_progress
from tests.bench.result import BenchResult, Stopwatch, Workload
from tests.kafka_cluster import KafkaCluster

TASKS = 1000


class _Record(Protocol):
    @property
    def value(self) -> bytes | None: ...


class _Consumer(Protocol):
    """AIOKafkaConsumer as far as it is used here; aiokafka has no annotations for others."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def getmany(self, *, timeout_ms: int, max_records: int) -> Mapping[object, Sequence[_Record]]: ...


_new_consumer: Callable[..., _Consumer] = importlib.import_module("aiokafka").AIOKafkaConsumer


def one_at_a_time_loop(job: Job) -> BenchResult:
    """`poll()`, wait, again. A few hundred messages are enough to know its rate."""
    count = 0
    last_heard = time.monotonic()
    stopwatch: Stopwatch | None = None
    with closing(Consumer(default_settings(job))) as consumer:
        consumer.subscribe([job.workload.topic])
        while count < job.workload.one_at_a_time_messages:
            message = consumer.poll(1.0)
            if message is None:
                require_progress(last_heard, count)
                continue
            if message.error():
                raise KafkaException(message.error())
            last_heard = time.monotonic()
            stopwatch = stopwatch or Stopwatch()
            orjson.loads(message.value() or b"null")
            time.sleep(job.workload.wait_ms / 1000)
            count += 1
        return measured(stopwatch).result(job.name, count)


def task_loop(job: Job) -> BenchResult:
    """A task a message, in any order; offsets are committed as they are fetched, so a crash loses what was waiting."""
    return asyncio.run(_run_tasks(job))


async def _run_tasks(job: Job) -> BenchResult:
    wait_seconds = job.workload.wait_ms / 1000
    free = asyncio.Semaphore(TASKS)
    tasks: set[asyncio.Task[None]] = set()

    async def handle(value: bytes | None) -> None:
        try:
            orjson.loads(value or b"null")
            await asyncio.sleep(wait_seconds)
        finally:
            free.release()

    count = 0
    last_heard = time.monotonic()
    stopwatch: Stopwatch | None = None
    consumer = _new_consumer(
        job.workload.topic, bootstrap_servers=job.bootstrap, group_id=new_group(), auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        while count < job.workload.messages:
            by_partition = await consumer.getmany(timeout_ms=100, max_records=TASKS)
            if not by_partition:
                require_progress(last_heard, count)
                continue
            last_heard = time.monotonic()
            stopwatch = stopwatch or Stopwatch()
            for records in by_partition.values():
                for record in records:
                    await free.acquire()
                    task = asyncio.create_task(handle(record.value))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                count += len(records)
        await asyncio.gather(*tasks)
        return measured(stopwatch).result(job.name, count)
    finally:
        await consumer.stop()


def run_one_at_a_time(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `one_at_a_time_loop`."""
    return loop_process.run(one_at_a_time_loop, f"raw poll() loop, {workload.wait_ms} ms each", cluster, workload)


def run_tasks(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `task_loop`."""
    name = f"aiokafka, {TASKS:,} tasks without order, {workload.wait_ms} ms each, {workload.shape}"
    return loop_process.run(task_loop, name, cluster, workload)


if __name__ == "__main__":
    loop_process.main({loop.__name__: loop for loop in (one_at_a_time_loop, task_loop)})
