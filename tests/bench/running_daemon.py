"""The real daemon as a row measures it: started on a topic, looked at from outside, stopped."""

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import psutil

from kafkasrcd.daemon.control_client import ControlClient
from kafkasrcd.daemon.status import Status
from kafkasrcd.errors import KafkasrcdError
from tests.bench.child import ROOT
from tests.bench.daemon_handlers import LATENCY, LATENCY_VARIABLE, SPIN_VARIABLE, WAIT_VARIABLE
from tests.bench.result import Workload
from tests.kafka_cluster import KafkaCluster

DEADLINE_SECONDS = 300
"""A row's end is found one sample (20 ms) late at most, and that time counts as the row's."""
_COMPLAINTS = {"error", "critical"}


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
            self.require_running()
            return 0

    def require_running(self) -> None:
        """Raises AssertionError with its log where it has ended."""
        ended = not self._process.is_running() or self._process.status() == psutil.STATUS_ZOMBIE
        assert not ended, self.log_end()

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
        """For each partition, from the log's word of the assignment to its first record in the handler; sorted.

        Raises StopIteration before the assignment, ValueError while a handler has its file open and not yet written.
        """
        assigned = next(datetime.fromisoformat(line["time"]) for line in self._log() if line["event"] == "assigned")
        firsts = [float(path.read_text()) for path in self._directory.glob("*.first")]
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

    def complaints(self) -> list[str]:
        """The texts of its log that a good run does not have."""
        lines = (self._directory / "log").read_text().splitlines()
        foreign = [line for line in lines if not line.startswith("{")]
        return [f"{line['level']}: {line['message']}" for line in self._log() if line["level"] in _COMPLAINTS] + foreign

    def log_end(self) -> str:
        """The end of its log."""
        return (self._directory / "log").read_text()[-4000:]

    def _log(self) -> list[dict[str, Any]]:
        lines = (self._directory / "log").read_bytes().splitlines()
        return [msgspec.json.decode(line) for line in lines if line.startswith(b"{")]


@contextmanager
def running_daemon(
    handler: str, cluster: KafkaCluster, workload: Workload, settings: Mapping[str, object] | None = None
) -> Generator[RunningDaemon]:
    """The daemon on the workload's topic, starting; stopped on leaving.

    `handler` is MODULE:FUNCTION of this package, `settings` go over those that all rows have. What its log complains
    of is printed to standard error.
    """
    with tempfile.TemporaryDirectory(prefix="kafkasrcd-bench-") as folder:
        directory = Path(folder)
        (directory / "kafkasrcd.toml").write_text(f"""\
brokers = "{cluster.bootstrap}"
group_id = "bench-{uuid.uuid4().hex[:8]}"
topics = ["{workload.topic}"]
commit_interval_secs = 1
[handler]
target = "tests.bench.{handler}"
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
            WAIT_VARIABLE: str(workload.wait_ms),
            LATENCY_VARIABLE: folder,
            # Where schemas are kept: of this row's registry alone.
            "XDG_STATE_HOME": folder,
        }
        command = [sys.executable, "-m", "kafkasrcd.daemon.commands", "start", "-c", str(directory / "kafkasrcd.toml")]
        for name, value in (settings or {}).items():
            command += ["-s", f"{name}={value}"]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        daemon = RunningDaemon(process, directory)
        try:
            yield daemon
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        for complaint in daemon.complaints():
            print(f"{handler}: {complaint}", file=sys.stderr)
