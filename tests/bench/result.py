"""What a row of the benchmark is given, and what it gives back."""

import math
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec


class Workload(msgspec.Struct, frozen=True):
    """A row's topic, how much of it each kind of row reads, and what is done with a record."""

    topic: str
    partitions: int
    messages: int
    """Records in the topic."""
    spin_messages: int
    """How many records the rows with work in the handler read: at 100 µs each, a million would take minutes."""
    spin_iterations: int
    """The argument for `spin` that costs `spin_us` on this machine."""
    spin_us: int
    wait_ms: int
    """How long the rows that wait on others do so for each record."""
    one_at_a_time_messages: int
    """How many the row reads that waits for one after the other."""
    effect_messages: int
    """How many the rows with effects in a database read."""
    checkpoint_messages: int
    """After how many they commit."""
    rate_per_second: int
    """At which the latency rows are sent records."""
    warm_up_seconds: int
    """For which latencies are not counted: joining a group takes its time."""
    latency_seconds: int
    registry_url: str = ""
    """Of the topics whose records name their schema."""

    @property
    def shape(self) -> str:
        """For names of rows."""
        return "1 partition" if self.partitions == 1 else f"{self.partitions} partitions"


class BenchResult(msgspec.Struct, frozen=True):
    """One row, measured. Times are from the first message to the last."""

    name: str
    messages: int
    seconds: float
    cpu_seconds: float
    """User and system time of the row's processes, librdkafka's threads too, but not of the broker and the database."""
    processes: int = 1
    peak_memory_mb: float | None = None
    """Resident, the sum over the row's processes."""
    worker_pss_mb: float | None = None
    """Proportional set size of the largest worker."""
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None

    @property
    def messages_per_second(self) -> float:
        """Throughput, from the first message to the last."""
        return self.messages / self.seconds

    @property
    def cpu_us_per_message(self) -> float:
        """Microseconds of CPU a message, in all of the row's processes."""
        return self.cpu_seconds * 1e6 / self.messages


class Stopwatch:
    """Wall and CPU time of this process, from the first message to the last."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._cpu_started = cpu_seconds()

    def result(
        self,
        name: str,
        messages: int,
        *,
        latency_p50_ms: float | None = None,
        latency_p99_ms: float | None = None,
    ) -> BenchResult:
        """What has been measured since the stopwatch was made."""
        return BenchResult(
            name=name,
            messages=messages,
            seconds=time.monotonic() - self._started,
            cpu_seconds=cpu_seconds() - self._cpu_started,
            peak_memory_mb=peak_memory_mb(),
            latency_p50_ms=latency_p50_ms,
            latency_p99_ms=latency_p99_ms,
        )


def cpu_seconds() -> float:
    """User and system time of this process so far, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_memory_mb(pid: int | None = None) -> float | None:
    """The most memory the process (None: this one) has had resident, or None where the system does not tell."""
    # Not ru_maxrss: that one survives exec, and so starts at the size of the process that started this one.
    status = Path(f"/proc/{pid or 'self'}/status")
    if not status.exists():
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return int(match[1]) / 1024 if match else None


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed. `ordered` is sorted, not empty."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
