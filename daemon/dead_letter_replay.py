"""Replaying dead letters into a topic: open, replaying, replayed, each change one transaction.

Between "replaying" and "replayed" the record is produced. A command that dies there leaves its letter replaying, since
nobody knows whether the record was; one that is told to stop finishes the letter in its hands.
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from kafkasrcd.errors import BrokerUnavailable, DeadLetterRefused, StoreUnavailable
from kafkasrcd.storage.dead_letter_store import DeadLetterStore
from kafkasrcd.storage.dead_letters import DeadLetter, LetterFilter, LetterState, StoredLetter, as_text


class RecordProducer(Protocol):
    """LetterProducer, or what a test has in its place."""

    def produce(self, letter: DeadLetter, topic: str) -> str: ...


class Outcome(Enum):
    """What became of one letter."""

    REPLAYED = auto()
    REFUSED = auto()
    """It is open again, and its note says why."""
    NOT_OURS = auto()
    """Someone else has changed it meanwhile."""


class Replay:
    """One command's. ``by`` names it, and no other: what it has changed is its own until another takes it up."""

    def __init__(
        self,
        store: DeadLetterStore,
        producer: RecordProducer,
        by: str,
        topic_of: Callable[[DeadLetter], str],
        say: Callable[[str], None],
    ) -> None:
        self._store = store
        self._producer = producer
        self._by = by
        self._topic_of = topic_of
        self._say = say

    def replay(self, letter_id: int, before: LetterState) -> Outcome:
        """Blocks for the store's and the producer's timeouts.

        Raises BrokerUnavailable (the letter is open again), StoreUnavailable (it is as the message says).
        """
        found = next(self._store.find(LetterFilter(ids=(letter_id,), states=(before,))), None)
        if found is None:
            return Outcome.NOT_OURS
        target = self._topic_of(found.letter)
        # Of two commands that take up what was left replaying, the second finds it changed by the first.
        taken = self._store.change(
            letter_id, [before], LetterState.REPLAYING, by=self._by, note=f"to {target}", seen=found.changed_by
        )
        if not taken:
            return Outcome.NOT_OURS
        try:
            place = self._producer.produce(found.letter, target)
        except DeadLetterRefused as refusal:
            self._say(self._reopen(found, str(refusal)))
            return Outcome.REFUSED
        except BrokerUnavailable as error:
            raise BrokerUnavailable(self._reopen(found, str(error))) from error
        return self._finish(found, place)

    def _reopen(self, found: StoredLetter, why: str) -> str:
        """What there is to say of it."""
        try:
            self._end(found, LetterState.OPEN, f"not replayed: {why}")
        except StoreUnavailable as error:
            raise StoreUnavailable(f"{name_of(found)} is not replayed, but stays replaying: {error}") from error
        return f"{name_of(found)} is not replayed, and open: {why}"

    def _finish(self, found: StoredLetter, place: str) -> Outcome:
        try:
            ours = self._end(found, LetterState.REPLAYED, f"as {place}")
        except StoreUnavailable as error:
            raise StoreUnavailable(
                f"{name_of(found)} is replayed as {place}, but stays replaying: the store does not take it: {error}"
            ) from error
        if not ours:
            self._say(f"{name_of(found)} was replayed as {place}; someone else has changed it meanwhile")
            return Outcome.NOT_OURS
        return Outcome.REPLAYED

    def _end(self, found: StoredLetter, state: LetterState, note: str) -> bool:
        return self._store.change(
            found.id, [LetterState.REPLAYING], state, by=self._by, note=as_text(note), seen=self._by
        )


def name_of(stored: StoredLetter) -> str:
    """``dead letter 5 (orders[3]@7)``."""
    letter = stored.letter
    return f"dead letter {stored.id} ({letter.topic}[{letter.partition}]@{letter.offset})"
