"""kafkasrcd's own rows: the real daemon, from its first message to its last, all of its processes counted."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import msgspec
import psutil

from kafkasrcd.daemon.control_client import ControlClient
from kafkasrcd.daemon.status import Status
from kafkasrcd.errors import KafkasrcdError
from tests.bench import paced_producer
from tests.bench.child import ROOT
from tests.bench.daemon_handlers import LATENCY, LATENCY_VARIABLE, SPIN_VARIABLE
from tests.bench.result import BenchResult, Workload, percentile
from tests.kafka_cluster import KafkaCluster
from tests.waiting import wait_until

DEADLINE_SECONDS = 300
"""A row's end is found one sample (20 ms) late at most, and that time counts as the row's."""


def run_no_op(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The whole topic, the full envelope for each record, progress recorded for each, nothing done."""
    return _throughput("kafkasrcd, no-op handler", "no_op", cluster, workload, workload.messages)


def run_work(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """As many records as the raw loop with the same work reads."""
    wanted = min(workload.spin_messages, workload.messages)
    return _throughput(f"kafkasrcd, {workload.spin_us} µs of work each", "work", cluster, workload, wanted)


def run_latency(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """Paced records, each measured by the handler."""
    topic = f"bench-latency-{uuid.uuid4().hex[:8]}"
    cluster.create_topic(topic, workload.partitions)
    warm_up = workload.warm_up_seconds * workload.rate_per_second
    total = warm_up + workload.latency_seconds * workload.rate_per_second
    with (
        _daemon("measure_latency", topic, cluster, workload) as daemon,
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
    with _daemon("note_first", workload.topic, cluster, workload) as daemon:
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


def _throughput(name: str, handler: str, cluster: KafkaCluster, workload: Workload, wanted: int) -> BenchResult:
    with _daemon(handler, workload.topic, cluster, workload) as daemon:
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


class RunningDaemon:
    """A daemon under measurement."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self._process = psutil.Process(process.pid)
        self._directory = directory
        self._ended_cpu_seconds = 0.0

    def status(self) -> Status:
        """As an operator sees it; raises AssertionError with the daemon's log where it has ended."""
        client = ControlClient(self._directory / "control.sock")
        try:
            return client.status()
        finally:
            client.close()

    def processed(self) -> int:
        """Records handled so far: the topic starts at offset 0."""
        try:
            return sum(partition.processed or 0 for partition in self.status().partitions)
        except KafkasrcdError:
            assert self._process.is_running(), self.log_end()
            return 0

    def cpu_seconds(self) -> float:
        """User and system time of all its processes so far."""
        processes = [self._process, *self._process.children(recursive=True)]
        times = [process.cpu_times() for process in processes]
        return sum(time.user + time.system for time in times)

    def process_count(self) -> int:
        """Supervisor, fork server, workers and handlers."""
        return 1 + len(self._process.children(recursive=True))

    def worker_pss_mb(self) -> float:
        """The proportional set size of a worker: its own memory, and its share of what it shares. The largest."""
        pids = [partition.worker.pid for partition in self.status().partitions]
        return max(psutil.Process(pid).memory_full_info().pss for pid in pids if pid is not None) / 2**20

    def first_messages_ms(self) -> list[float]:
        """For each partition, from the log's word of the assignment to its first record in the handler; sorted."""
        events = [msgspec.json.decode(line) for line in (self._directory / "log").read_bytes().splitlines()]
        assigned = next(datetime.fromisoformat(event["time"]) for event in events if event["event"] == "assigned")
        firsts = [float(path.read_text() or "0") for path in self._directory.glob("*.first")]
        return sorted(1000 * (first - assigned.timestamp()) for first in firsts)

    def latencies(self) -> list[tuple[int, float]]:
        """What the handlers measured: the record's number and ms."""
        return [
            pair
            for path in self._directory.glob("*.latencies")
            for pair in LATENCY.iter_unpack(path.read_bytes()[: path.stat().st_size // LATENCY.size * LATENCY.size])
        ]

    def latency_count(self) -> int:
        """How many there are by now."""
        return sum(path.stat().st_size for path in self._directory.glob("*.latencies")) // LATENCY.size

    def log_end(self) -> str:
        """The end of its log."""
        return (self._directory / "log").read_text()[-4000:]


@contextmanager
def _daemon(handler: str, topic: str, cluster: KafkaCluster, workload: Workload) -> Generator[RunningDaemon]:
    """The daemon, starting; stopped on leaving."""
    with tempfile.TemporaryDirectory(prefix="kafkasrcd-bench-") as folder:
        directory = Path(folder)
        (directory / "kafkasrcd.toml").write_text(f"""\
brokers = "{cluster.bootstrap}"
group_id = "bench-{uuid.uuid4().hex[:8]}"
topics = ["{topic}"]
commit_interval_secs = 1
[handler]
target = "tests.bench.daemon_handlers:{handler}"
path = ["{ROOT}"]
[store]
url = "sqlite:///offsets.db"
[supervisor]
control_socket = "control.sock"
log_format = "json"
""")
        environment = {
            **os.environ,
            SPIN_VARIABLE: str(workload.spin_iterations),
            LATENCY_VARIABLE: folder,
        }
        command = [sys.executable, "-m", "kafkasrcd.daemon.commands", "start", "-c", str(directory / "kafkasrcd.toml")]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield RunningDaemon(process, directory)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
