"""How far a partition has got: what is recorded of it, and how the slots of one that is spread are told to Kafka.

Kafka keeps one offset a partition: the one before which everything is done. What single slots have done beyond it goes
along as the commit's metadata, so that the group's own record says it all, and one that someone else commits (by
``kafka-consumer-groups --reset-offsets``) says nothing more. The metadata names the offset that it is about: what moves
a group may carry the metadata along (a script that commits what it was told with another offset, a mirror that
translates offsets), and "20 more than that" would then be of other records.
"""

import re
from collections.abc import Sequence
from typing import Final

import msgspec

from kafkasrcd.storage.offset_store import Layer, Layout

_MOST_CHARACTERS: Final = 3_500
"""Kafka keeps 4,096 bytes (``offset.metadata.max.bytes``). What the note leaves out is repeated, and nothing lost."""
_OURS: Final = "kafkasrcd epoch "
_NOTE: Final = re.compile(
    r"kafkasrcd epoch [0-9]{1,18}, beyond ([0-9]{1,18})((?:; (?:key|none|partition)(?: \+[0-9]{1,18})+)+)"
)


class Reached(msgspec.Struct, frozen=True):
    """Under ``assignment_epoch``, each slot of ``layout`` has done what is before its one of ``next_offsets``.

    ``carried``: what slots of other layouts had done, as far as that still says more. ``stored``: for each slot,
    whether the store has it already, from the handlers' own transactions.
    """

    assignment_epoch: int
    next_offsets: tuple[int, ...]
    layout: Layout
    carried: tuple[Layer, ...] = ()
    stored: tuple[bool, ...] = ()

    @property
    def next_offset(self) -> int:
        """Everything before is done: where a successor begins."""
        return min(self.next_offsets)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What is done beyond ``next_offset``."""
        return beyond(self.next_offset, (Layer(self.layout, self.next_offsets), *self.carried))


def beyond(next_offset: int, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Those of ``layers`` that say something of records from ``next_offset`` on."""
    return tuple(layer for layer in layers if max(layer.next_offsets) > next_offset)


def note_of(reached: Reached) -> str:
    """The commit's metadata: for whoever looks at the group with Kafka's tools, and for the next owner."""
    base = reached.next_offset
    note = f"{_OURS}{reached.assignment_epoch}"
    layers = ""
    for layer in reached.layers:
        more = "".join(f" +{max(0, next_offset - base)}" for next_offset in layer.next_offsets)
        if len(note) + len(layers) + len(more) > _MOST_CHARACTERS:
            break
        layers += f"; {layer.layout.ordering}{more}"
    return f"{note}, beyond {base}{layers}" if layers else note


def is_ours(note: str) -> bool:
    """Whether ``note_of`` wrote it: whether it was this daemon that committed."""
    return note.startswith(_OURS)


def layers_of(note: str, next_offset: int) -> tuple[Layer, ...]:
    """What ``note_of`` had written beside ``next_offset``; nothing for a note of anyone else, or of another offset."""
    match = _NOTE.fullmatch(note)
    if match is None or int(match[1]) != next_offset:
        return ()
    layers: list[Layer] = []
    for part in match[2].split("; ")[1:]:
        ordering, *more = part.split(" ")
        next_offsets = tuple(next_offset + int(each[1:]) for each in more)
        layers.append(Layer(Layout(ordering, len(next_offsets)), next_offsets))
    return tuple(layers)
