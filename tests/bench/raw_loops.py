"""The peers: loops on confluent-kafka and orjson as people write them by hand, on one core, with nothing around them.

Each row runs in a process of its own: `python -m tests.bench.raw_loops JOB` prints a BenchResult as JSON.
"""

import sys
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing

import msgspec
import orjson
from confluent_kafka import Consumer, KafkaException, Message

from tests.bench import paced_producer
from tests.bench.child import run_module
from tests.bench.result import BenchResult, Stopwatch, Workload, percentile
from tests.bench.spin import spin
from tests.kafka_cluster import KafkaCluster

# A loop that gets nothing for this long says so instead of waiting for ever.
SILENCE_DEADLINE_SECONDS = 30
# How often a loop that polls one by one looks at the clock.
CLOCK_EVERY = 1000

# The best found, at full speed on a backlog, medians of five runs: 1.0M messages/s, where 100 to 1,000 messages a batch
# and 4 to 64 MiB of queue differ by less than the noise, larger batches cost 10 % (caches), switching the garbage
# collector off gains at most 3 %, and fetch sizes change nothing.
TUNED_BATCH = 500
TUNED: dict[str, str | int | float | bool] = {
    # How long a partition whose queue was full waits before it fetches again. The default, 1000, is what holds the
    # default loop down.
    "fetch.queue.backoff.ms": 10,
    # A partition. As fast as the default of 64 MiB, at half the memory.
    "queued.max.messages.kbytes": 4096,
    # The loop commits what it has processed; storing an offset by hand for each message or batch costs 5-10 %.
    "enable.auto.commit": False,
}
COMMIT_INTERVAL_SECONDS = 1.0


class Job(msgspec.Struct, frozen=True):
    """What the process of one row is told."""

    loop: str
    name: str
    bootstrap: str
    topic: str
    workload: Workload


def poll_loop(job: Job) -> BenchResult:
    """What the first page of every tutorial shows: default settings, one `poll()` a message."""
    count = 0
    last_heard = time.monotonic()
    stopwatch: Stopwatch | None = None
    with closing(Consumer(_default_settings(job))) as consumer:
        consumer.subscribe([job.topic])
        while count < job.workload.messages:
            message = consumer.poll(1.0)
            if message is None:
                _require_progress(last_heard, count)
                continue
            if message.error():
                raise KafkaException(message.error())
            stopwatch = stopwatch or Stopwatch()
            orjson.loads(message.value() or b"null")
            count += 1
            if count % CLOCK_EVERY == 0:
                last_heard = time.monotonic()
        return _measured(stopwatch).result(job.name, count)


def tuned_loop(job: Job) -> BenchResult:
    """All that is known to make one loop fast, without giving up that what is committed has been processed."""
    loads = orjson.loads
    with closing(Consumer({**_default_settings(job), **TUNED})) as consumer:
        count = 0
        stopwatch: Stopwatch | None = None
        for messages in _batches(consumer, job.topic, job.workload.messages):
            stopwatch = stopwatch or Stopwatch()
            for message in messages:
                if message.error():
                    raise KafkaException(message.error())
                loads(message.value() or b"null")
            count += len(messages)
        return _measured(stopwatch).result(job.name, count)


def tuned_spin_loop(job: Job) -> BenchResult:
    """The tuned loop where each message also costs CPU, as real handlers do."""
    loads = orjson.loads
    iterations = job.workload.spin_iterations
    wanted = min(job.workload.spin_messages, job.workload.messages)
    with closing(Consumer({**_default_settings(job), **TUNED})) as consumer:
        count = 0
        stopwatch: Stopwatch | None = None
        for messages in _batches(consumer, job.topic, wanted):
            stopwatch = stopwatch or Stopwatch()
            for message in messages:
                if message.error():
                    raise KafkaException(message.error())
                loads(message.value() or b"null")
                spin(iterations)
            count += len(messages)
        return _measured(stopwatch).result(job.name, count)


def latency_loop(job: Job) -> BenchResult:
    """The `poll()` loop at a low rate: how long after it was produced does a message reach the user's code?"""
    workload = job.workload
    warm_up = workload.warm_up_seconds * workload.rate_per_second
    total = warm_up + workload.latency_seconds * workload.rate_per_second
    latencies_ms: list[float] = []
    last_heard = time.monotonic()
    stopwatch: Stopwatch | None = None
    with closing(Consumer(_default_settings(job))) as consumer:
        consumer.subscribe([job.topic])
        while len(latencies_ms) < total - warm_up:
            message = consumer.poll(1.0)
            if message is None:
                _require_progress(last_heard, len(latencies_ms))
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
        return _measured(stopwatch).result(
            job.name,
            len(latencies_ms),
            latency_p50_ms=percentile(latencies_ms, 0.50),
            latency_p99_ms=percentile(latencies_ms, 0.99),
        )


LOOPS: dict[str, Callable[[Job], BenchResult]] = {
    loop.__name__: loop for loop in (poll_loop, tuned_loop, tuned_spin_loop, latency_loop)
}


def run_default(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `poll_loop`."""
    return _run(poll_loop, "raw poll() loop, default settings", cluster, workload)


def run_tuned(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `tuned_loop`."""
    return _run(tuned_loop, "raw consume() loop, tuned by hand", cluster, workload)


def run_tuned_spin(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `tuned_spin_loop`."""
    return _run(tuned_spin_loop, f"the same with {workload.spin_us} µs of work each", cluster, workload)


def run_latency(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `latency_loop`, with its own topic and a producer in another process."""
    topic = f"bench-latency-{uuid.uuid4().hex[:8]}"
    cluster.create_topic(topic, workload.partitions)
    name = f"raw poll() loop at {workload.rate_per_second:,} msg/s"
    with paced_producer.running(cluster, topic, workload):
        return _run(latency_loop, name, cluster, workload, topic)


def _run(
    loop: Callable[[Job], BenchResult], name: str, cluster: KafkaCluster, workload: Workload, topic: str | None = None
) -> BenchResult:
    job = Job(loop.__name__, name, cluster.bootstrap, topic or workload.topic, workload)
    return msgspec.json.decode(run_module(__name__, job), type=BenchResult)


def _default_settings(job: Job) -> dict[str, str | int | float | bool]:
    return {
        "bootstrap.servers": job.bootstrap,
        "group.id": f"bench-{uuid.uuid4().hex[:8]}",
        "auto.offset.reset": "earliest",
    }


def _batches(consumer: Consumer, topic: str, wanted: int) -> Generator[list[Message]]:
    """Batches of what is there, until `wanted` messages came; each is committed some time after it was processed."""
    consumer.subscribe([topic])
    count = 0
    last_heard = last_commit = time.monotonic()
    while count < wanted:
        messages = consumer.consume(TUNED_BATCH, 0.1)
        if not messages:
            _require_progress(last_heard, count)
            continue
        last_heard = time.monotonic()
        yield messages
        count += len(messages)
        # librdkafka has stored the offset of the batch's end when it gave it out; by now that is true.
        if last_heard - last_commit > COMMIT_INTERVAL_SECONDS:
            consumer.commit(asynchronous=True)
            last_commit = last_heard


def _require_progress(last_heard: float, count: int) -> None:
    if time.monotonic() - last_heard > SILENCE_DEADLINE_SECONDS:
        raise TimeoutError(f"nothing came for {SILENCE_DEADLINE_SECONDS} s, after {count} messages")


def _measured(stopwatch: Stopwatch | None) -> Stopwatch:
    if stopwatch is None:
        raise ValueError("nothing to measure: the row was asked for no messages")
    return stopwatch


if __name__ == "__main__":
    job = msgspec.json.decode(sys.argv[1], type=Job)
    print(msgspec.json.encode(LOOPS[job.loop](job)).decode())
