"""The offset store that forgets: for tests, demonstrations, and groups whose offsets Kafka alone shall keep."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from kafkasrcd.errors import StoreError
from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.offset_store import Advance, Claim, OffsetStore, StoredOffset, TopicPartition
from kafkasrcd.storage.refusals import refusal


class MemoryOffsetStore(OffsetStore):
    """Offsets of ``group_id`` for as long as this object lives. Never blocks and is always available.

    Epochs start again with the process. That is safe: nobody else can write here, and what wrote for an earlier
    process died with it.
    """

    def __init__(self, group_id: str, *, now_ms: Callable[[], int] = wall_clock_ms) -> None:
        self.group_id = group_id
        self._now_ms = now_ms
        self._rows: dict[TopicPartition, StoredOffset] = {}

    def claim(self, topic_partitions: Sequence[TopicPartition], owner: str) -> dict[TopicPartition, Claim]:
        claims: dict[TopicPartition, Claim] = {}
        for topic_partition in dict.fromkeys(topic_partitions):
            before = self._rows.get(topic_partition)
            assignment_epoch, next_offset = (before.assignment_epoch + 1, before.next_offset) if before else (1, None)
            self._rows[topic_partition] = StoredOffset(
                topic_partition, assignment_epoch, next_offset, owner, self._now_ms()
            )
            claims[topic_partition] = Claim(topic_partition, assignment_epoch, next_offset)
        return claims

    def restart(self, starts: Mapping[TopicPartition, tuple[int, int]]) -> dict[TopicPartition, StoreError]:
        return self._move({key: Advance(key, *start) for key, start in starts.items()}, may_go_back=True)

    def advance(self, advances: Iterable[Advance]) -> dict[TopicPartition, StoreError]:
        return self._move({advance.topic_partition: advance for advance in advances}, may_go_back=False)

    def offsets(self) -> list[StoredOffset]:
        return [self._rows[topic_partition] for topic_partition in sorted(self._rows)]

    def close(self) -> None:
        self._rows.clear()

    def _move(self, asked: dict[TopicPartition, Advance], may_go_back: bool) -> dict[TopicPartition, StoreError]:
        refusals: dict[TopicPartition, StoreError] = {}
        for topic_partition, advance in asked.items():
            row = self._rows.get(topic_partition)
            if (
                row is None
                or row.assignment_epoch != advance.assignment_epoch
                or not (may_go_back or row.next_offset is None or row.next_offset <= advance.next_offset)
            ):
                refusals[topic_partition] = refusal(advance, row)
            else:
                self._rows[topic_partition] = msgspec.structs.replace(
                    row, next_offset=advance.next_offset, updated_ms=self._now_ms()
                )
        return refusals
