"""What a KafkaSource says about itself."""

from datetime import UTC, datetime

import msgspec

from kafkasrcd.daemon.status import Status
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.source_reader import Counts


class KafkaSourceMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Totals are since the source was made; lag, rates and partitions are of now.

    ``messages_per_partition`` and ``lag_per_partition`` are by partition number: those of several topics are added up.
    ``lag_per_partition`` counts records between what is processed and the end. The throughput is over a rolling window
    of 60 s. ``messages_failed``: records that could not be deserialized, and were passed over.
    """

    messages_consumed: int = 0
    messages_failed: int = 0
    messages_per_partition: dict[int, int] = {}
    lag_per_partition: dict[int, int] = {}
    bytes_consumed: int = 0
    throughput_msgs_per_sec: float = 0.0
    throughput_bytes_per_sec: float = 0.0
    avg_message_size: float = 0.0
    last_commit_time: datetime | None = None
    total_commits: int = 0
    rebalance_count: int = 0
    assigned_partitions: list[int] = []


def metrics_of(counts: dict[TopicPartition, Counts], status: Status | None) -> KafkaSourceMetrics:
    """From what the program has counted, and what its engine says of itself; None where there is none now."""
    consumed = sum(each.consumed for each in counts.values())
    handed_off = sum(each.bytes for each in counts.values())
    per_partition: dict[int, int] = {}
    for name, each in counts.items():
        per_partition[name.partition] = per_partition.get(name.partition, 0) + each.consumed
    partitions = [] if status is None else status.partitions
    messages = sum(each.messages for each in partitions)
    size = sum(each.bytes for each in partitions) / messages if messages else 0.0
    commits = [each.last_commit_ms for each in partitions if each.last_commit_ms is not None]
    return KafkaSourceMetrics(
        messages_consumed=consumed,
        messages_failed=sum(each.failed for each in counts.values()),
        messages_per_partition=per_partition,
        lag_per_partition=lag_of(status),
        bytes_consumed=handed_off,
        throughput_msgs_per_sec=sum(each.rate for each in partitions),
        throughput_bytes_per_sec=sum(each.bytes_rate for each in partitions),
        avg_message_size=size,
        last_commit_time=datetime.fromtimestamp(max(commits) / 1000, UTC) if commits else None,
        total_commits=0 if status is None else status.total_commits,
        rebalance_count=0 if status is None else status.rebalances,
        assigned_partitions=sorted({each.partition for each in partitions}),
    )


def merged(before: dict[TopicPartition, Counts], now: dict[TopicPartition, Counts]) -> dict[TopicPartition, Counts]:
    """Both, added up."""
    return {name: before.get(name, Counts()) + now.get(name, Counts()) for name in sorted(before.keys() | now.keys())}


def lag_of(status: Status | None) -> dict[int, int]:
    """By partition number, as far as it is known."""
    lag: dict[int, int] = {}
    for each in [] if status is None else status.partitions:
        if each.lag is not None:
            lag[each.partition] = lag.get(each.partition, 0) + each.lag
    return lag
