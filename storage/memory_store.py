"""The offset store that forgets: for tests, demonstrations, and groups whose offsets Kafka alone shall keep."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from kafkasrcd.errors import StoreError
from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.intents import Intent, IntentKind, Scope
from kafkasrcd.storage.offset_store import (
    HISTORY_KEPT_MS,
    HISTORY_STEP_MS,
    WHOLE,
    Advance,
    Claim,
    Layer,
    Layout,
    OffsetStore,
    StoredOffset,
    TopicPartition,
)
from kafkasrcd.storage.refusals import refusal


class _Row(msgspec.Struct):
    """One partition."""

    assignment_epoch: int
    owner: str
    updated_ms: int
    layouts: dict[Layout, list[int | None]]

    @property
    def layers(self) -> list[Layer]:
        layers: list[Layer] = []
        for layout, slots in sorted(self.layouts.items()):
            known = tuple(next_offset for next_offset in slots if next_offset is not None)
            if len(known) == layout.slots:
                layers.append(Layer(layout, known))
        return layers

    @property
    def next_offset(self) -> int | None:
        return max((min(layer.next_offsets) for layer in self.layers), default=None)


class MemoryOffsetStore(OffsetStore):
    """Offsets and intents of ``group_id`` for as long as this object lives. Never blocks and is always available.

    Epochs start again with the process. That is safe: nobody else can write here, and what wrote for an earlier
    process died with it.
    """

    def __init__(self, group_id: str, *, now_ms: Callable[[], int] = wall_clock_ms) -> None:
        self.group_id = group_id
        self._now_ms = now_ms
        self._rows: dict[TopicPartition, _Row] = {}
        self._history: dict[TopicPartition, dict[int, int]] = {}
        self._intents: dict[tuple[Scope, IntentKind], Intent] = {}

    def claim(
        self, topic_partitions: Sequence[TopicPartition], owner: str, layout: Layout = WHOLE
    ) -> dict[TopicPartition, Claim]:
        claims: dict[TopicPartition, Claim] = {}
        for name in dict.fromkeys(topic_partitions):
            row = self._rows.setdefault(name, _Row(0, owner, 0, {}))
            row.assignment_epoch += 1
            row.owner = owner
            row.updated_ms = self._now_ms()
            resume = row.next_offset
            telling = tuple(layer for layer in row.layers if max(layer.next_offsets) > (resume or 0))
            kept = {layout, *(layer.layout for layer in telling)}
            row.layouts = {each: slots for each, slots in row.layouts.items() if each in kept}
            slots = row.layouts.setdefault(layout, [resume] * layout.slots)
            if resume is not None:
                # Slots of an earlier time with this layout catch up: what said that they may is dropped.
                slots[:] = [max(next_offset or 0, resume) for next_offset in slots]
            claims[name] = Claim(name, row.assignment_epoch, resume, telling)
        return claims

    def restart(
        self, starts: Mapping[TopicPartition, tuple[int, int]], layout: Layout = WHOLE
    ) -> dict[TopicPartition, StoreError]:
        asked = [Advance(name, *start, layout=layout) for name, start in starts.items()]
        refusals: dict[TopicPartition, StoreError] = {}
        for start in asked:
            row = self._rows.get(start.topic_partition)
            if row is None or row.assignment_epoch != start.assignment_epoch:
                refusals[start.topic_partition] = refusal(start, self._stored(start.topic_partition))
            else:
                row.layouts = {layout: [start.next_offset] * layout.slots}
                row.updated_ms = self._now_ms()
        return refusals

    def advance(self, advances: Iterable[Advance]) -> dict[TopicPartition, StoreError]:
        asked = {(each.topic_partition, each.layout, each.slot): each for each in advances}
        refusals: dict[TopicPartition, StoreError] = {}
        for advance in asked.values():
            name = advance.topic_partition
            row = self._rows.get(name)
            slots = [] if row is None else row.layouts.get(advance.layout, [])
            has_slot = 0 <= advance.slot < len(slots)
            before = slots[advance.slot] if has_slot else None
            if (
                row is None
                or not has_slot
                or row.assignment_epoch != advance.assignment_epoch
                or (before is not None and before > advance.next_offset)
            ):
                refusals[name] = refusal(advance, self._stored(name, before), has_slot=has_slot)
            else:
                slots[advance.slot] = advance.next_offset
                row.updated_ms = self._now_ms()
        return refusals

    def offsets(self) -> list[StoredOffset]:
        stored = [self._stored(name) for name in sorted(self._rows)]
        return [row for row in stored if row is not None]

    def remember(self, topic_partitions: Iterable[TopicPartition]) -> None:
        at_ms = self._now_ms() // HISTORY_STEP_MS * HISTORY_STEP_MS
        for name in topic_partitions:
            row = self._rows.get(name)
            if row is not None and row.next_offset is not None:
                self._history.setdefault(name, {}).setdefault(at_ms, row.next_offset)
        for entries in self._history.values():
            for old in [old_ms for old_ms in entries if old_ms < at_ms - HISTORY_KEPT_MS]:
                del entries[old]

    def history(self, topic_partition: TopicPartition) -> list[tuple[int, int]]:
        return sorted(self._history.get(topic_partition, {}).items())

    def intents(self) -> list[Intent]:
        return [intent for _, intent in sorted(self._intents.items())]

    def set_intent(self, intent: Intent) -> None:
        self._intents.setdefault((intent.scope, intent.kind), intent)

    def close(self) -> None:
        self._rows.clear()

    def _stored(self, name: TopicPartition, of_slot: int | None = None) -> StoredOffset | None:
        row = self._rows.get(name)
        if row is None:
            return None
        next_offset = row.next_offset if of_slot is None else of_slot
        return StoredOffset(name, row.assignment_epoch, next_offset, row.owner, row.updated_ms)
