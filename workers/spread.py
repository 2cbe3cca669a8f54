"""Which slot of a partition a record goes to, and which records a slot had done already under an earlier layout.

The mapping depends on the record and the layout alone. So "slot 2 of 4 is done up to offset 120" is a fact about
records that stays true, whoever reads them next and however many slots there are then.
"""

from collections.abc import Sequence
from typing import Final, cast
from zlib import crc32

from confluent_kafka import Message

from kafkasrcd.settings import Ordering
from kafkasrcd.storage.offset_store import WHOLE, Layer, Layout

MOST_SLOTS: Final = 240
"""A worker is given the bell of every slot's handler process in one message; Linux sends 253 descriptors at most."""


def layout_of(ordering: Ordering, processes: int) -> Layout:
    """How the records of every partition are spread over handler processes."""
    if ordering is Ordering.PARTITION or processes == 1:
        return WHOLE
    return Layout(ordering.value, processes)


def slots_of(layout: Layout, messages: Sequence[Message]) -> list[int]:
    """The slot of each of ``messages``.

    By ``key``: those of one key in one slot; a record without a key has no order to keep, and goes by its offset, as
    all do where there is no order.
    """
    slots = layout.slots
    offsets = cast(list[int], list(map(Message.offset, messages)))
    if slots == 1:
        return [0] * len(offsets)
    if layout.ordering == Ordering.KEY:
        keys = cast(list[bytes | None], list(map(Message.key, messages)))
        return [
            offset % slots if key is None else crc32(key) % slots for offset, key in zip(offsets, keys, strict=True)
        ]
    return [offset % slots for offset in offsets]


def slot_of(layout: Layout, key: bytes | None, offset: int) -> int:
    """The slot of one record, as ``slots_of`` says."""
    number = offset if key is None or layout.ordering != Ordering.KEY else crc32(key)
    return number % layout.slots


def spread(layout: Layout, messages: Sequence[Message]) -> list[list[Message]]:
    """``messages`` for each slot, in their order."""
    parts: list[list[Message]] = [[] for _ in range(layout.slots)]
    for slot, message in zip(slots_of(layout, messages), messages, strict=True):
        parts[slot].append(message)
    return parts


class DoneBefore:
    """The records past the resume point that are not to be handled again."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self.until = max((max(layer.next_offsets) for layer in layers), default=0)
        """From this offset on there is none."""

    def left(self, messages: list[Message]) -> list[Message]:
        """Those of ``messages`` that are to be handled."""
        for layer in self._layers:
            slots = slots_of(layer.layout, messages)
            messages = [
                message
                for message, slot in zip(messages, slots, strict=True)
                if (message.offset() or 0) >= layer.next_offsets[slot]
            ]
        return messages
