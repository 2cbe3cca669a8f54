"""The Status of this moment, from the supervisor's parts."""

import time

import psutil

from kafkasrcd.daemon.assignment import Assignment
from kafkasrcd.daemon.handler_pool import HandlerPool
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.daemon.status import HandlerStatus, PartitionStatus, PauseStatus, WorkerStatus


class ProcessUsage:
    """CPU and memory of processes, looked up when someone asks and not before."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[float, float]] = {}
        """By pid: when looked at, and the CPU seconds by then."""

    def of(self, pid: int | None) -> tuple[float, int]:
        """Percent of one core since it was last asked for, and resident bytes; zeros for no process."""
        if pid is None:
            return 0.0, 0
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                times = process.cpu_times()
                resident = process.memory_info().rss
        except (psutil.Error, OSError):
            self._before.pop(pid, None)
            return 0.0, 0
        now, used = time.monotonic(), times.user + times.system
        # Not since the process's start: psutil reads the boot time for that, which a hardened unit hides.
        then, used_then = self._before.get(pid, (now, used))
        self._before[pid] = (now, used)
        return (100.0 * (used - used_then) / (now - then) if now > then else 0.0), resident

    def watch(self, pids: set[int]) -> None:
        """Begin with those that are new, so that the first answer about each covers its life so far."""
        for pid in pids - self._before.keys():
            self.of(pid)

    def forget_all_but(self, pids: set[int]) -> None:
        """Drop what is known of processes that have ended."""
        self._before = {pid: before for pid, before in self._before.items() if pid in pids}


def partition_status(partition: Partition, usage: ProcessUsage) -> PartitionStatus:
    """One partition's."""
    worker = partition.worker
    pid = worker.pid if worker is not None and worker.exit_code is None else None
    cpu_percent, rss_bytes = usage.of(pid)
    partition.sample_rates(time.monotonic())  # right from the first second, and not a second old
    totals = partition.totals
    pause = partition.paused
    return PartitionStatus(
        topic=partition.name.topic,
        partition=partition.name.partition,
        state=partition.state.value,
        since_ms=partition.since_ms,
        problem=partition.advice,
        assignment_epoch=0 if partition.memory is None else partition.memory.epoch,
        handlers=sorted(set(partition.bindings.values())),
        position=partition.position,
        processed=partition.processed,
        committed=partition.committed,
        high_watermark=partition.high_watermark,
        lag=partition.lag,
        messages=totals.messages,
        succeeded=totals.succeeded,
        skipped=totals.skipped,
        dead_lettered=totals.dead_lettered,
        scheduled=totals.scheduled,
        redelivered=totals.redelivered,
        failures=totals.failures,
        bytes=totals.bytes,
        rate=round(partition.message_rate.per_second, 1),
        bytes_rate=round(partition.byte_rate.per_second, 1),
        last_commit_ms=partition.last_commit_ms,
        worker=WorkerStatus(
            pid=pid, restarts=partition.backoff.total, cpu_percent=round(cpu_percent, 1), rss_bytes=rss_bytes
        ),
        paused=None
        if pause is None
        else PauseStatus(
            by=pause.set_by,
            since_ms=pause.set_ms,
            reason=pause.reason,
            scope=str(pause.scope),
            way_on=partition.way_on,
        ),
    )


def running_pids(assignment: Assignment, handlers: HandlerPool) -> set[int]:
    """Of every worker and handler process there is now."""
    children = [partition.worker for partition in assignment.partitions.values()]
    children += [slot.child for slot in handlers.slots]
    return {child.pid for child in children if child is not None and child.pid is not None and child.exit_code is None}


def handler_statuses(handlers: HandlerPool, usage: ProcessUsage) -> list[HandlerStatus]:
    """Every slot's."""
    statuses: list[HandlerStatus] = []
    for slot in handlers.slots:
        pid = slot.child.pid if slot.child is not None and slot.child.exit_code is None else None
        cpu_percent, rss_bytes = usage.of(pid)
        statuses.append(
            HandlerStatus(
                slot=slot.slot,
                pid=pid,
                state="ready" if slot.ready else "starting",
                restarts=slot.backoff.total,
                cpu_percent=round(cpu_percent, 1),
                rss_bytes=rss_bytes,
                partitions=len(slot.bound),
            )
        )
    return statuses


def partition_statuses(assignment: Assignment, usage: ProcessUsage) -> list[PartitionStatus]:
    """Every assigned partition's, in order."""
    return [partition_status(partition, usage) for _, partition in sorted(assignment.partitions.items())]
