"""``on_checkpoint``: the handler's SQL and how far it got, in one transaction for all slots of this process.

A call is a savepoint: where the handler raises, only what that call did is rolled back. A checkpoint advances every
slot that has done something, in the same transaction, and commits. Until then nothing of it is released from the rings,
so whatever ends the transaction otherwise (a lost connection, a claim by another owner, the death of this process)
only has the records handled again, from where the committed ones end.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from kafkasrcd.errors import StaleAssignment, StoreError, StoreUnavailable
from kafkasrcd.settings import Settings
from kafkasrcd.storage.dead_letters import DeadLetter, Redelivered, StoredLetter
from kafkasrcd.storage.offset_store import Advance, TopicPartition
from kafkasrcd.storage.refusals import Conflict
from kafkasrcd.storage.transaction import CommitUnknown, EffectsTransaction, Kind, TransactionEnded
from kafkasrcd.workers.checkpoint_size import CheckpointSize
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.commits import Commits, HeldUp
from kafkasrcd.workers.control import Fenced, StoreAway
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.dead_letter_sink import DeadLetterSink
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.handler_bindings import HandlerBindings
from kafkasrcd.workers.ring import COMMITTABLE, PROCESSED, UNSAVED

if TYPE_CHECKING:
    from kafkasrcd.storage.async_transaction import AsyncEffectsTransaction

T = TypeVar("T")

_FIRST_RETRY_NS: Final = 100_000_000
_MOST_RETRY_NS: Final = 5_000_000_000
_MOST_CONFLICT_NS: Final = 50_000_000
"""Some transactions of a few records."""


class Checkpoints(Commits):
    """Which slots have done something since the last checkpoint, and what follows from what the database says."""

    one_at_a_time = True

    def __init__(
        self,
        settings: Settings,
        bindings: HandlerBindings,
        transaction: "AsyncEffectsTransaction | _Blocking",
        letters: DeadLetterSink,
    ) -> None:
        """``letters``: where dead letters go besides the database."""
        super().__init__(letters)
        self._transaction = transaction
        self._letters_in_store = settings.handler.dead_letter_store
        self._interval_ns = settings.checkpoint_interval_ms * 1_000_000
        self._size = CheckpointSize(settings.checkpoint_max_messages, boottime_ns)
        self._bindings = bindings
        self._log = EventLog("checkpoint")
        self._known: set[PartitionCursor] = set()
        """Those whose record in the store was looked at: a process before this one may have been killed between its
        commit and its word of it."""
        self._unsaved: dict[PartitionCursor, None] = {}
        self._count = 0
        self._due_ns = 0
        self._unknown: dict[PartitionCursor, int] = {}
        """What a commit would have recorded of which nobody knows whether it was made."""
        self._retry_ns = _FIRST_RETRY_NS
        self._retry_at_ns = 0
        self._random = random.Random()  # noqa: S311 - for jitter

    def given_up(self, cursor: PartitionCursor, offset: int) -> None:
        self._touch(cursor)

    def closed(self, cursor: PartitionCursor) -> None:
        self._known.discard(cursor)
        self._unsaved.pop(cursor, None)
        self._unknown.pop(cursor, None)

    @property
    def _is_full(self) -> bool:
        return self._count >= self._size.now

    @property
    def _is_due(self) -> bool:
        """Also where a slot has lost its lease: it may be given back as soon as nothing of it is open."""
        return bool(self._unsaved) and (
            self._is_full or boottime_ns() >= self._due_ns or any(not cursor.memory.leased for cursor in self._unsaved)
        )

    @property
    def _wait_ms(self) -> float:
        if self._unknown:
            return max(1.0, (self._retry_at_ns - boottime_ns()) / 1e6)
        return max(0.0, (self._due_ns - boottime_ns()) / 1e6) if self._unsaved else float("inf")

    def _touch(self, cursor: PartitionCursor) -> None:
        """Before a call: what it does is in the open transaction from now on."""
        if not self._unsaved:
            self._due_ns = boottime_ns() + self._interval_ns
        self._unsaved[cursor] = None
        cursor.cells[UNSAVED] = 1

    def _hold(self, cursor: PartitionCursor) -> None:
        """Raise HeldUp while a commit is unknown: nothing may begin before it is decided."""
        if self._unknown:
            cursor.retry_at_ns = self._retry_at_ns
            raise HeldUp

    def _learn(self, cursor: PartitionCursor, recorded: int | None) -> bool:
        """Begin where the store has it; False where that is further than was known, or nowhere: it is rewound."""
        if recorded is None:
            self._refused({_name(cursor): StaleAssignment(f"{_name(cursor)} was claimed by another owner")})
            return False
        self._known.add(cursor)
        if recorded <= cursor.cells[COMMITTABLE]:
            return True
        cursor.cells[COMMITTABLE] = recorded
        self._rolled_back()
        return False

    def _reached(self) -> dict[PartitionCursor, int]:
        """How far those have got that have got any further: the supervisor may have recorded the others beyond their
        own last record already, over offsets that hold none of theirs."""
        reached = {cursor: cursor.cells[PROCESSED] for cursor in self._unsaved}
        return {cursor: offset for cursor, offset in reached.items() if offset > cursor.cells[COMMITTABLE]}

    @staticmethod
    def _advances(reached: dict[PartitionCursor, int]) -> list[Advance]:
        return [
            Advance(_name(cursor), cursor.memory.epoch, next_offset, cursor.bind.slot, cursor.bind.layout)
            for cursor, next_offset in reached.items()
        ]

    def _saved(self, reached: dict[PartitionCursor, int]) -> None:
        """The transaction is committed."""
        for cursor, next_offset in reached.items():
            cursor.cells[COMMITTABLE] = next_offset
            cursor.release_done()
        for cursor in self._unsaved:
            cursor.cells[UNSAVED] = 0
        self._forget()
        self._retry_ns = _FIRST_RETRY_NS
        self._size.committed()

    def _rolled_back(self) -> None:
        """The transaction is undone: read everything again from where the committed records end."""
        for cursor in self._unsaved:
            cursor.cells[UNSAVED] = 0
        self._forget()
        self._bindings.rewind()

    def _forget(self) -> None:
        self._unsaved.clear()
        self._unknown = {}
        self._count = 0

    def _refused(self, refusals: dict[TopicPartition, StoreError]) -> None:
        """Another owner has claimed these: nothing of the transaction is kept, and these are not gone on with."""
        self._rolled_back()
        for cursor in self._bindings.cursors():
            refusal = refusals.get(_name(cursor))
            if refusal is not None:
                cursor.failed = str(refusal)
                cursor.reported = True
                self._bindings.channel.send(Fenced(binding=cursor.binding, reason=str(refusal)))

    def _away(self, error: StoreError) -> None:
        """The store takes nothing now; everything waits, longer each time. Where only another transaction was in the
        way, it is tried again soon, at a random moment and with fewer records: two that met will not for ever."""
        if isinstance(error, Conflict):
            self._log.repeated("transaction_conflict", f"the transaction is rolled back: {error}", same=())
            self._size.conflict(self._count)
            self._rolled_back()
            self._hold_back(boottime_ns() + self._random.randrange(_MOST_CONFLICT_NS))
            return
        self._log.repeated("store_unavailable", f"the transaction is rolled back: {error}", same=())
        self._rolled_back()
        self._wait(error)

    def _broken(self, cursor: PartitionCursor, error: TransactionEnded) -> None:
        """The handler breaks the promise: trying again would break it again."""
        self._rolled_back()
        cursor.failed = f"{cursor.target.name}: {error}"
        cursor.failed_offset = cursor.cells[PROCESSED]

    def _in_doubt(self, error: StoreError, reached: dict[PartitionCursor, int]) -> None:
        self._log.warning("commit_unknown", f"whether a commit was made is asked when the store answers: {error}")
        self._unknown = reached
        self._wait(error)

    def _wait(self, error: StoreError) -> None:
        self._retry_at_ns = boottime_ns() + self._retry_ns
        self._retry_ns = min(2 * self._retry_ns, _MOST_RETRY_NS)
        self._hold_back(self._retry_at_ns)
        self._bindings.channel.send(StoreAway(str(error)))

    def _hold_back(self, until_ns: int) -> None:
        for cursor in self._bindings.cursors():
            cursor.retry_at_ns = until_ns

    def _decided(self, made: bool) -> None:
        self._log.info("commit_known", f"the commit {'was' if made else 'was not'} made")
        if made:
            self._saved(self._unknown)
        else:
            self._rolled_back()

    async def _call(self, cursor: PartitionCursor, argument: Any) -> Any:
        target = cursor.target
        kind = target.transaction or "connection"
        returned = await self._run(cursor, self._transaction.call, target.function, argument, kind)
        self._count += len(argument) if target.is_batch else 1
        return returned

    async def _bury(self, cursor: PartitionCursor, letter: DeadLetter) -> None:
        """Keep it in the transaction: where, and only where, its record is passed over for good."""
        if self._letters_in_store or letter.due_ms is not None:
            await self._run(cursor, self._transaction.bury, letter)
            self._count += 1

    async def _letter(self, cursor: PartitionCursor, letter_id: int) -> StoredLetter | None:
        """As the open transaction has it: what it has done to the letter already counts."""
        return await self._run(cursor, self._transaction.letter, letter_id)

    async def _settle(self, cursor: PartitionCursor, redelivered: Redelivered) -> None:
        """In the transaction that has what the handler did. Where someone else has changed the letter meanwhile, the
        whole of it is undone."""
        if not await self._run(cursor, self._transaction.settle_letter, redelivered):
            await self._transaction.rollback()
            self._rolled_back()
            raise HeldUp
        self._count += 1

    async def _run(self, cursor: PartitionCursor, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """``work`` in a savepoint of the open transaction. Raises HeldUp where that is gone, or cannot be had now."""
        self._hold(cursor)
        if self._is_full and not await self._commit():
            raise HeldUp
        try:
            if cursor not in self._known and not await self._look(cursor):
                raise HeldUp
            self._touch(cursor)
            return await work(*arguments)
        except StoreUnavailable as error:
            self._away(error)
            raise HeldUp from error
        except TransactionEnded as error:
            self._broken(cursor, error)
            raise HeldUp from error

    async def _turn(self) -> float:
        if self._unknown:
            await self._decide()
        elif self._is_due:
            await self._commit()
        return self._wait_ms

    async def _look(self, cursor: PartitionCursor) -> bool:
        """Learn where ``cursor`` begins, in a transaction of its own: what is locked for that is free again at once."""
        if self._unsaved and not await self._commit():
            return False
        (mine,) = self._advances({cursor: cursor.cells[COMMITTABLE]})
        recorded = await self._transaction.reached(mine)
        await self._transaction.rollback()
        return self._learn(cursor, recorded)

    async def _commit(self) -> bool:
        """False where it was not made, as far as is known."""
        reached = self._reached()
        try:
            refusals = await self._transaction.commit(self._advances(reached))
        except CommitUnknown as error:
            self._in_doubt(error, reached)
        except StoreUnavailable as error:
            self._away(error)
        else:
            if not refusals:
                self._saved(reached)
                return True
            self._refused(refusals)
        return False

    async def _decide(self) -> None:
        if boottime_ns() < self._retry_at_ns:
            return
        try:
            self._decided(await self._transaction.settle(self._advances(self._unknown)))
        except StoreUnavailable as error:
            self._wait(error)


class AsyncCheckpoints(Checkpoints):
    """For ``async def`` handlers: the runner awaits each call, and counts it, before it begins another or takes a turn
    here. One call at a time in the whole process: a database connection runs one statement at a time."""

    def caller(self, cursor: PartitionCursor) -> Callable[[Any], Any]:
        return partial(self._call, cursor)

    async def bury_async(self, cursor: PartitionCursor, letter: DeadLetter) -> None:
        await self._bury(cursor, letter)
        await asyncio.to_thread(self._letters.keep, letter)

    async def letter_async(self, cursor: PartitionCursor, letter_id: int) -> StoredLetter | None:
        return await self._letter(cursor, letter_id)

    async def settle_async(self, cursor: PartitionCursor, redelivered: Redelivered) -> bool:
        await self._settle(cursor, redelivered)
        return await asyncio.to_thread(self._letters.settle, redelivered)

    async def turn_async(self) -> float:
        return await self._turn()

    async def end_async(self) -> None:
        await self._transaction.close()


class PlainCheckpoints(Checkpoints):
    """For plain handlers: everything blocks the process, and what is awaited is done when it is asked for."""

    def __init__(
        self,
        settings: Settings,
        bindings: HandlerBindings,
        transaction: EffectsTransaction,
        letters: DeadLetterSink,
    ) -> None:
        super().__init__(settings, bindings, _Blocking(transaction), letters)

    def caller(self, cursor: PartitionCursor) -> Callable[[Any], Any]:
        return lambda argument: _at_once(self._call(cursor, argument))

    def bury(self, cursor: PartitionCursor, letter: DeadLetter) -> None:
        _at_once(self._bury(cursor, letter))
        self._letters.keep(letter)

    def letter(self, cursor: PartitionCursor, letter_id: int) -> StoredLetter | None:
        return _at_once(self._letter(cursor, letter_id))

    def settle(self, cursor: PartitionCursor, redelivered: Redelivered) -> bool:
        _at_once(self._settle(cursor, redelivered))
        return self._letters.settle(redelivered)

    def turn(self) -> float:
        return _at_once(self._turn())

    def end(self) -> None:
        _at_once(self._transaction.close())


class _Blocking:
    """A plain transaction, to be awaited: every step of it is over when it is first looked at."""

    def __init__(self, transaction: EffectsTransaction) -> None:
        self._transaction = transaction

    async def call(self, function: Callable[[Any, Any], Any], argument: object, kind: Kind) -> object:
        return self._transaction.call(function, argument, kind)

    async def bury(self, letter: DeadLetter) -> None:
        self._transaction.bury(letter)

    async def letter(self, letter_id: int) -> StoredLetter | None:
        return self._transaction.letter(letter_id)

    async def settle_letter(self, redelivered: Redelivered) -> bool:
        return self._transaction.settle_letter(redelivered)

    async def commit(self, advances: Sequence[Advance]) -> dict[TopicPartition, StoreError]:
        return self._transaction.commit(advances)

    async def settle(self, advances: Sequence[Advance]) -> bool:
        return self._transaction.settle(advances)

    async def reached(self, mine: Advance) -> int | None:
        return self._transaction.reached(mine)

    async def rollback(self) -> None:
        self._transaction.rollback()

    async def close(self) -> None:
        self._transaction.close()


def _at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which waits for nothing."""
    try:
        work.send(None)
    except StopIteration as returned:
        return cast(T, returned.value)
    raise RuntimeError("a plain handler's checkpoint waits for something")


def _name(cursor: PartitionCursor) -> TopicPartition:
    return TopicPartition(cursor.topic, cursor.partition)
