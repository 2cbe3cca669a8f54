"""The peers: loops on confluent-kafka and orjson as people write them by hand, on one core, nothing around them."""

import time
import uuid
from contextlib import closing

import msgspec
import orjson
from confluent_kafka import Consumer, KafkaException

from tests.bench import loop_process, paced_producer
from tests.bench.loop_process import TUNED, Job, committed_batches, default_settings, measured, require_progress
from tests.bench.result import BenchResult, Stopwatch, Workload, percentile
from tests.bench.spin import spin
from tests.kafka_cluster import KafkaCluster

# How often a loop that polls one by one looks at the clock.
CLOCK_EVERY = 1000


def poll_loop(job: Job) -> BenchResult:
    """What the first page of every tutorial shows: default settings, one `poll()` a message."""
    count = 0
    last_heard = time.monotonic()
    stopwatch: Stopwatch | None = None
    with closing(Consumer(default_settings(job))) as consumer:
        consumer.subscribe([job.workload.topic])
        while count < job.workload.messages:
            message = consumer.poll(1.0)
            if message is None:
                require_progress(last_heard, count)
                continue
            if message.error():
                raise KafkaException(message.error())
            stopwatch = stopwatch or Stopwatch()
            orjson.loads(message.value() or b"null")
            count += 1
            if count % CLOCK_EVERY == 0:
                last_heard = time.monotonic()
        return measured(stopwatch).result(job.name, count)


def tuned_loop(job: Job) -> BenchResult:
    """All that is known to make one loop fast, without giving up that what is committed has been processed."""
    loads = orjson.loads
    with closing(Consumer({**default_settings(job), **TUNED})) as consumer:
        count = 0
        stopwatch: Stopwatch | None = None
        for messages in committed_batches(consumer, job.workload.topic, job.workload.messages):
            stopwatch = stopwatch or Stopwatch()
            for message in messages:
                if message.error():
                    raise KafkaException(message.error())
                loads(message.value() or b"null")
            count += len(messages)
        return measured(stopwatch).result(job.name, count)


def tuned_spin_loop(job: Job) -> BenchResult:
    """The tuned loop where each message also costs CPU, as real handlers do."""
    loads = orjson.loads
    iterations = job.workload.spin_iterations
    wanted = min(job.workload.spin_messages, job.workload.messages)
    with closing(Consumer({**default_settings(job), **TUNED})) as consumer:
        count = 0
        stopwatch: Stopwatch | None = None
        for messages in committed_batches(consumer, job.workload.topic, wanted):
            stopwatch = stopwatch or Stopwatch()
            for message in messages:
                if message.error():
                    raise KafkaException(message.error())
                loads(message.value() or b"null")
                spin(iterations)
            count += len(messages)
        return measured(stopwatch).result(job.name, count)


def latency_loop(job: Job) -> BenchResult:
    """The `poll()` loop at a low rate: how long after it was produced does a message reach the user's code?"""
    workload = job.workload
    warm_up = workload.warm_up_seconds * workload.rate_per_second
    total = warm_up + workload.latency_seconds * workload.rate_per_second
    latencies_ms: list[float] = []
    last_heard = time.monotonic()
    stopwatch: Stopwatch | None = None
    with closing(Consumer(default_settings(job))) as consumer:
        consumer.subscribe([job.workload.topic])
        while len(latencies_ms) < total - warm_up:
            message = consumer.poll(1.0)
            if message is None:
                require_progress(last_heard, len(latencies_ms))
                continue
            if message.error():
                raise KafkaException(message.error())
            paced = paced_producer.decode(message.value() or b"null")
            now_ns = time.monotonic_ns()
            last_heard = time.monotonic()
            if paced.number >= warm_up:
                stopwatch = stopwatch or Stopwatch()
                latencies_ms.append((now_ns - paced.sent_ns) / 1e6)
        latencies_ms.sort()
        return measured(stopwatch).result(
            job.name,
            len(latencies_ms),
            latency_p50_ms=percentile(latencies_ms, 0.50),
            latency_p99_ms=percentile(latencies_ms, 0.99),
        )


LOOPS = {loop.__name__: loop for loop in (poll_loop, tuned_loop, tuned_spin_loop, latency_loop)}


def run_default(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `poll_loop`."""
    return loop_process.run(poll_loop, "raw poll() loop, default settings", cluster, workload)


def run_tuned(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `tuned_loop`."""
    return loop_process.run(tuned_loop, "raw consume() loop, tuned by hand", cluster, workload)


def run_tuned_spin(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `tuned_spin_loop`."""
    name = f"the same with {workload.spin_us} µs of work each"
    return loop_process.run(tuned_spin_loop, name, cluster, workload)


def run_hot_spin(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `tuned_spin_loop` over one partition."""
    name = f"the same with {workload.spin_us} µs of work each, 1 partition"
    return loop_process.run(tuned_spin_loop, name, cluster, workload)


def run_latency(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `latency_loop`, with its own topic and a producer in another process."""
    topic = f"bench-latency-{uuid.uuid4().hex[:8]}"
    cluster.create_topic(topic, workload.partitions)
    name = f"raw poll() loop at {workload.rate_per_second:,} msg/s"
    with paced_producer.running(cluster, topic, workload):
        return loop_process.run(latency_loop, name, cluster, msgspec.structs.replace(workload, topic=topic))


if __name__ == "__main__":
    loop_process.main(LOOPS)
