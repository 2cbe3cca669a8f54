"""kafkasrcd's own rows: the real daemon, from its first message to its last, all of its processes counted."""

import time
import uuid
from collections.abc import Mapping

from msgspec import structs

from tests.bench import paced_producer
from tests.bench.result import BenchResult, Workload, percentile
from tests.bench.running_daemon import DEADLINE_SECONDS, running_daemon
from tests.bench.topic import ZIPF_EXPONENT, ZIPF_KEYS
from tests.kafka_cluster import KafkaCluster
from tests.waiting import wait_until

CONCURRENCY = 500
THREADS = 100
"""Of each process."""


def run_no_op(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The whole topic, the full envelope for each record, progress recorded for each, nothing done."""
    return throughput("kafkasrcd, no-op handler", "no_op", cluster, workload, workload.messages)


def run_work(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """As many records as the raw loop with the same work reads."""
    wanted = min(workload.spin_messages, workload.messages)
    return throughput(f"kafkasrcd, {workload.spin_us} µs of work each", "work", cluster, workload, wanted)


def run_auto(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """What is handed off counts as done."""
    settings = {"commit_strategy": "auto"}
    return throughput("kafkasrcd, no-op, auto", "no_op", cluster, workload, workload.messages, settings)


def run_manual(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """Each message committed by its handler."""
    name = "kafkasrcd, message.commit() each, manual"
    return throughput(name, "commit_each", cluster, workload, workload.messages, {"commit_strategy": "manual"})


def run_key(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """Every partition spread over all processes, by key."""
    settings = {"handler.ordering": "key"}
    return throughput("kafkasrcd, no-op, ordering by key", "no_op", cluster, workload, workload.messages, settings)


def run_hot_work(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """One partition, on all cores."""
    name = f"kafkasrcd, {workload.spin_us} µs of work each by key, {_zipf(workload)}"
    return throughput(name, "work", cluster, workload, workload.messages, {"handler.ordering": "key"})


def run_latency(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """Paced records, each measured by the handler."""
    topic = f"bench-latency-{uuid.uuid4().hex[:8]}"
    cluster.create_topic(topic, workload.partitions)
    warm_up = workload.warm_up_seconds * workload.rate_per_second
    total = warm_up + workload.latency_seconds * workload.rate_per_second
    with (
        running_daemon("daemon_handlers:measure_latency", cluster, structs.replace(workload, topic=topic)) as daemon,
        paced_producer.running(cluster, topic, workload),
    ):
        wait_until(lambda: daemon.processed() >= warm_up, DEADLINE_SECONDS, "the warm-up", seen=daemon.log_end)
        started, cpu_started = time.monotonic(), daemon.cpu_seconds()
        # Asking is work for the daemon, which shares the cores with what is measured.
        wait_until(lambda: daemon.latency_count() >= total, DEADLINE_SECONDS, f"{total} latencies", seen=daemon.log_end)
        seconds, cpu_seconds = time.monotonic() - started, daemon.cpu_seconds() - cpu_started
        latencies = sorted(latency for number, latency in daemon.latencies() if number >= warm_up)
        return BenchResult(
            name=f"kafkasrcd at {workload.rate_per_second:,} msg/s",
            messages=len(latencies),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            processes=daemon.process_count(),
            latency_p50_ms=percentile(latencies, 0.50),
            latency_p99_ms=percentile(latencies, 0.99),
        )


def run_first_message(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """A fresh group on a full topic: from the assignment to each partition's first record in the handler."""
    with running_daemon("daemon_handlers:note_first", cluster, workload) as daemon:
        wait_until(
            lambda: len(daemon.first_messages_ms()) == workload.partitions,
            DEADLINE_SECONDS,
            "the first message of every partition",
            seen=daemon.log_end,
            ignoring=(StopIteration, ValueError),
        )
        firsts = daemon.first_messages_ms()
        return BenchResult(
            name=f"kafkasrcd, assignment to first message (p50: first of {len(firsts)} partitions, p99: last)",
            messages=len(firsts),
            seconds=1.0,
            cpu_seconds=daemon.cpu_seconds(),
            processes=daemon.process_count(),
            latency_p50_ms=firsts[0],
            latency_p99_ms=firsts[-1],
        )


def run_waiting(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """An `async def` handler that waits, as many at once in each of two processes as the setting says."""
    in_processes = f"2 processes with {CONCURRENCY} at once"
    name = f"kafkasrcd, async, {in_processes}, by key, {workload.wait_ms} ms each, {_zipf(workload)}"
    settings = {"handler.ordering": "key", "handler.processes": 2, "handler.concurrency": CONCURRENCY}
    return throughput(name, "wait", cluster, workload, workload.messages, settings)


def run_waiting_threads(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The same of a plain handler, in threads."""
    name = f"kafkasrcd, 2 processes with {THREADS} threads, by key, {workload.wait_ms} ms each, {_zipf(workload)}"
    settings = {"handler.ordering": "key", "handler.processes": 2, "handler.threads": THREADS}
    return throughput(name, "wait_in_thread", cluster, workload, workload.messages, settings)


def throughput(
    name: str,
    handler: str,
    cluster: KafkaCluster,
    workload: Workload,
    wanted: int,
    settings: Mapping[str, object] | None = None,
    module: str = "daemon_handlers",
) -> BenchResult:
    """Until `wanted` records are processed by the `handler` of `module`; `settings` are `running_daemon`'s."""
    with running_daemon(f"{module}:{handler}", cluster, workload, settings) as daemon:
        wait_until(lambda: daemon.processed() > 0, DEADLINE_SECONDS, "the first message", seen=daemon.log_end)
        started, cpu_started, before = time.monotonic(), daemon.cpu_seconds(), daemon.processed()
        wait_until(lambda: daemon.processed() >= wanted, DEADLINE_SECONDS, f"{wanted} messages", seen=daemon.log_end)
        seconds = time.monotonic() - started
        return BenchResult(
            name=name,
            messages=daemon.processed() - before,
            seconds=seconds,
            cpu_seconds=daemon.cpu_seconds() - cpu_started,
            processes=daemon.process_count(),
            worker_pss_mb=daemon.worker_pss_mb(),
        )


def _zipf(workload: Workload) -> str:
    return f"{workload.shape}, {ZIPF_KEYS:,} keys, Zipf exponent {ZIPF_EXPONENT:g}"
