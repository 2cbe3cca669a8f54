"""What a group was told to do until it is told otherwise, wherever its partitions live: an intent."""

from enum import StrEnum
from typing import Final

import msgspec

WHOLE_TOPIC: Final = -1
"""In the place of a partition's number."""
ALL_TOPICS: Final = ""
"""In the place of a topic's name."""


class IntentKind(StrEnum):
    """What is told."""

    PAUSE = "pause"
    """Start no record. It has no value."""


class Scope(msgspec.Struct, frozen=True, order=True):
    """What an intent is about: a partition, a topic, or all topics of the group."""

    topic: str = ALL_TOPICS
    partition: int = WHOLE_TOPIC

    def __str__(self) -> str:
        """As the commands take it."""
        if self.topic == ALL_TOPICS:
            return "--all"
        return self.topic if self.partition == WHOLE_TOPIC else f"{self.topic}:{self.partition}"

    def around(self) -> tuple["Scope", ...]:
        """Itself, and what it is a part of, the nearest first."""
        whole = [self, Scope(self.topic), Scope()]
        return tuple(dict.fromkeys(whole))


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """There is one of a kind and scope. ``set_by`` is who said it, ``set_ms`` when, in milliseconds since 1970;
    ``value`` is the kind's own."""

    kind: IntentKind
    scope: Scope
    value: str = ""
    set_by: str
    set_ms: int
    reason: str
