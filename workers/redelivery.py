"""A letter whose record is handled again, in the handler process that has its partition: from the store to the store.

Either its handler failed and it was put aside for a while, or someone replays it. It is handled beside the records in
the ring, in its own ordering unit, and what becomes of it is written down where, and as, the commit strategy has its
effects written down.
"""

import socket
from pathlib import Path
from typing import Any

import msgspec

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.message import Message
from kafkasrcd.settings import OnFailure, Settings
from kafkasrcd.storage.clock import wall_clock_ms
from kafkasrcd.storage.dead_letters import LetterState, Redelivered, StoredLetter, as_text
from kafkasrcd.version import installed_version
from kafkasrcd.workers.control import LetterDue
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.failure import Failure, failure_of, of_the_user
from kafkasrcd.workers.failure_policy import failure_policy
from kafkasrcd.workers.frame import Columns
from kafkasrcd.workers.preparing import Preparation, preparation_of
from kafkasrcd.workers.reasons import reason_of, text_of
from kafkasrcd.workers.retry_policy import RetryPolicy
from kafkasrcd.workers.ring import FAILURES, PAGE, REDELIVERED


class Redelivery:
    """One letter in hand. ``outcome`` is what is to be written down, once there is something."""

    def __init__(self, cursor: PartitionCursor, due: LetterDue, seen: StoredLetter, again: "Redeliveries") -> None:
        self.id = due.id
        self.alone = due.alone
        self.key = seen.letter.key
        self.cursor = cursor
        self.outcome: Redelivered | None = None
        self._seen = seen
        self._again = again
        self._argument: Any = None
        if due.ended is not None:
            self._failed(Failure(due.ended.error, due.ended.reason, due.ended.traceback))

    def read(self) -> Redelivered | None:
        """Have what the handler is called with; the outcome where it cannot be read. May block for the registry.

        Raises RegistryAway where its schema cannot be had now.
        """
        try:
            self._argument = self._again.argument(self.cursor, self._seen)
        except Unreadable as error:
            return self._failed(Failure(error.name, as_text(f"cannot be deserialized: {error}")))
        return None

    @property
    def what(self) -> str:
        """For messages."""
        letter = self._seen.letter
        return f"dead letter {self.id} ({letter.topic}[{letter.partition}]@{letter.offset})"

    @property
    def argument(self) -> Any:
        """What the handler is called with."""
        return self._argument

    def handled(self) -> Redelivered:
        """The handler returned."""
        self.outcome = Redelivered(seen=self._seen)
        return self.outcome

    def raised(self, error: Exception) -> Redelivered:
        """The handler raised. What was put aside is put aside once more, as often as retries are allowed; what someone
        replays is open again at once, for them to see."""
        error = of_the_user(error)
        wait_ns = None
        if self._seen.state is LetterState.RETRYING:
            wait_ns = self._again.retries.next_ns(error, self._seen.letter.attempts + 1)
        self._again.log.repeated(
            "redelivery_failed",
            f"{self.cursor.target.name} raised {type(error).__name__} at {self.what}: {text_of(error)} "
            f"(attempt {self._seen.letter.attempts + 1})",
            same=(self.cursor.binding,),
            cause=error,
            offset=self._seen.letter.offset,
            **self.cursor.coordinates,
        )
        return self._failed(failure_of(error, self.cursor.target.name), wait_ns)

    def settled(self, *, ours: bool) -> None:
        """The outcome is written down; or, where it is not ``ours``, someone else has changed the letter meanwhile."""
        if self.outcome is None:
            return
        if not ours:
            self._again.log.warning(
                "redelivery_overtaken",
                f"{self.what} was handled again; someone else has changed it meanwhile",
                **self.cursor.coordinates,
            )
        elif self.outcome.failed is None:
            self.cursor.cells[REDELIVERED] += 1

    def _failed(self, failure: Failure, wait_ns: int | None = None) -> Redelivered:
        self.cursor.cells[FAILURES] += 1
        now_ms = wall_clock_ms()
        letter = msgspec.structs.replace(
            self._seen.letter,
            error=failure.error,
            reason=failure.reason,
            traceback=failure.traceback,
            attempts=self._seen.letter.attempts + 1,
            last_failed_ms=now_ms,
            host=socket.gethostname(),
            version=installed_version(),
            due_ms=None if wait_ns is None else now_ms + wait_ns // 1_000_000,
        )
        is_over = letter.due_ms is None and self._seen.state is LetterState.RETRYING
        self.outcome = Redelivered(seen=self._seen, failed=letter, forgotten=is_over and self._again.forgets)
        return self.outcome


class Redeliveries:
    """What all letters of a handler process share: how their records are read, and what follows from a failure."""

    def __init__(self, settings: Settings, base_directory: Path, schema_directory: str) -> None:
        self.retries = RetryPolicy(settings)
        self.forgets = failure_policy(settings) is not OnFailure.DEAD_LETTER or not settings.handler.dead_letter_store
        """Whether the store keeps nothing of a record after its last attempt."""
        self.log = EventLog("handler")
        self._settings = settings
        self._base_directory = base_directory
        self._schema_directory = schema_directory
        self._preparations: dict[str, Preparation | None] = {}
        self._cells = memoryview(bytearray(PAGE)).cast("q")
        """Where a worker has those of its partition; a death in here is blamed on the letter."""

    def take(self, cursor: PartitionCursor, due: LetterDue, found: StoredLetter | None) -> Redelivery | None:
        """``due`` in hand, ``found`` being what the store has of it now; None where it is not due any more."""
        due_ms = None if found is None else found.letter.due_ms
        if found is None or due_ms is None or due_ms > wall_clock_ms():
            return None
        return Redelivery(cursor, due, found, self)

    def argument(self, cursor: PartitionCursor, stored: StoredLetter) -> Any:
        """The record as the handler is given it. Raises Unreadable, or RegistryAway."""
        letter = stored.letter
        columns = Columns(
            [letter.offset],
            [letter.timestamp_ms],
            [letter.value],
            None if letter.key is None else [letter.key],
            None if letter.headers is None else [letter.headers],
        )
        try:
            preparation = self._preparation(cursor)
        except ConfigurationError as error:
            raise Unreadable(type(error).__name__, str(error)) from error
        if preparation is not None:
            preparation.need(letter.value, letter.key)
            columns = preparation.prepare(columns)
        cursor.decode_keys(columns)
        for bad in columns.errors:
            raise Unreadable(bad.error, bad.reason)
        value: Any = columns.values[0]
        try:
            payload = None if value is None else cursor.target.decode(value)
        except Exception as error:
            raise Unreadable(type(error).__name__, reason_of(error)) from error
        message = Message(
            payload,
            None if columns.keys is None else columns.keys[0],
            letter.topic,
            letter.partition,
            letter.offset,
            letter.timestamp_ms,
            letter.headers,
        )
        return [message] if cursor.target.is_batch else message

    def _preparation(self, cursor: PartitionCursor) -> Preparation | None:
        if cursor.topic not in self._preparations:
            self._preparations[cursor.topic] = preparation_of(
                self._settings,
                cursor.topic,
                cursor.target.shape,
                self._base_directory,
                self._schema_directory,
                self._cells,
            )
        return self._preparations[cursor.topic]


class Unreadable(Exception):
    """The record cannot be deserialized: the error's ``name``, and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name
