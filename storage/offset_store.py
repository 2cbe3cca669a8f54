"""The interface of the offset store, and what each implementation must hold to.

Called from the supervisor's recorder thread only; every call may block, up to the store's own timeout. Each raises
``StoreUnavailable`` where the store cannot be reached or written now: then nothing of that call was recorded, or, where
a server was lost amid a commit, all of it. To make the call again is right after either.

``next_offset`` is the next offset after the contiguous processed prefix: the record to read next.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from kafkasrcd.errors import StoreError
from kafkasrcd.storage.dead_letters import DueLetter, LetterCount, LetterState
from kafkasrcd.storage.intents import Intent


class TopicPartition(msgspec.Struct, frozen=True, order=True):
    """A partition's name; hashable and ordered."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


class Layout(msgspec.Struct, frozen=True, order=True):
    """How a partition's records are spread over handler processes: by ``ordering``, over so many ``slots``.

    Which slot a record goes to depends on the record and the layout alone.
    """

    ordering: str
    slots: int


WHOLE = Layout("partition", 1)
"""One slot has all of a partition."""

HISTORY_STEP_MS: Final = 60_000
"""One entry a minute and partition, however many hosts write it down."""
HISTORY_KEPT_MS: Final = 24 * 3_600_000


class Layer(msgspec.Struct, frozen=True):
    """A fact about records, whoever reads them next: slot n of ``layout`` has done those before the nth of
    ``next_offsets``."""

    layout: Layout
    next_offsets: tuple[int, ...]


class Claim(msgspec.Struct, frozen=True):
    """What claiming a partition answered.

    ``assignment_epoch`` is higher than any given out for it before, so that whatever an earlier owner still writes is
    refused. ``next_offset`` is what was recorded before, or None: everything before it is done. ``layers`` say what is
    done from there on, by slots of the claimed layout or of earlier ones.
    """

    topic_partition: TopicPartition
    assignment_epoch: int
    next_offset: int | None
    layers: tuple[Layer, ...] = ()


class Advance(msgspec.Struct, frozen=True):
    """Record that ``slot`` of ``layout`` has done everything before ``next_offset`` under ``assignment_epoch``."""

    topic_partition: TopicPartition
    assignment_epoch: int
    next_offset: int
    slot: int = 0
    layout: Layout = WHOLE

    def __post_init__(self) -> None:
        # librdkafka's logical offsets (-1001 is "none") are negative: no such thing may become a resume point.
        if self.next_offset < 0:
            raise ValueError(f"{self.topic_partition}: {self.next_offset} is not an offset")


class StoredOffset(msgspec.Struct, frozen=True):
    """A partition's record. ``updated_ms`` is milliseconds since 1970; before ``next_offset`` everything is done."""

    topic_partition: TopicPartition
    assignment_epoch: int
    next_offset: int | None
    owner: str
    updated_ms: int


class OffsetStore(ABC):
    """Who owns a partition of one consumer group, and how far it has been processed."""

    @abstractmethod
    def claim(
        self, topic_partitions: Sequence[TopicPartition], owner: str, layout: Layout = WHOLE
    ) -> dict[TopicPartition, Claim]:
        """Make ``owner`` the owner of each, at a new epoch, in one transaction; its slots are those of ``layout``. What
        was recorded stays, as far as it says anything.

        Survives a power cut, where the store keeps anything at all.
        """

    @abstractmethod
    def restart(
        self, starts: Mapping[TopicPartition, tuple[int, int]], layout: Layout = WHOLE
    ) -> dict[TopicPartition, StoreError]:
        """Set ``{partition: (assignment_epoch, next_offset)}`` where the group resumes elsewhere than recorded: for
        every slot of ``layout``, and what slots of others had done is forgotten.

        The one way an offset may go backwards: for its current epoch only, all in one transaction. Refusals,
        ``StaleAssignment`` only, are returned as by ``advance``. Survives a power cut as ``claim`` does.
        """

    @abstractmethod
    def advance(self, advances: Iterable[Advance]) -> dict[TopicPartition, StoreError]:
        """Record each that is still owned at its epoch and does not go backwards, in one transaction.

        Returns the refusals, ``StaleAssignment`` or ``OffsetWentBackwards`` by partition; the others are recorded.
        An advance to the recorded offset is accepted. Where several name one slot, the last one counts: it says all
        that those before it said. Where one slot of several is refused, its partition is among the refusals. After a
        power cut, not after anything less, the last advances may be missing. A slot that the partition was not claimed
        with is ``StaleAssignment``.
        """

    @abstractmethod
    def offsets(self) -> list[StoredOffset]:
        """Every row of this group, ordered by partition."""

    @abstractmethod
    def remember(self, topic_partitions: Iterable[TopicPartition]) -> None:
        """Write down where each is now, for ``history``: once a minute and partition at most, kept for a day."""

    @abstractmethod
    def history(self, topic_partition: TopicPartition) -> list[tuple[int, int]]:
        """``(at_ms, next_offset)``, milliseconds since 1970, oldest first."""

    def count_letters(self, state: LetterState) -> list[LetterCount]:
        """How many dead letters of this group are in ``state``; none where the store keeps none."""
        return []

    def due_letters(self, topic_partitions: Sequence[TopicPartition], most: int) -> list[DueLetter]:
        """Letters of these partitions whose records are to be handled again now, ``most`` at once."""
        return []

    @abstractmethod
    def intents(self) -> list[Intent]:
        """Everything that this group was told to do until it is told otherwise."""

    @abstractmethod
    def set_intent(self, intent: Intent) -> None:
        """Keep it, unless there is one of its kind and scope. Survives a power cut as ``claim`` does."""

    @abstractmethod
    def close(self) -> None:
        """Give back connections. The store is not used afterwards."""
