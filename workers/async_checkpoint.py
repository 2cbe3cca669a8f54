"""``on_checkpoint`` for ``async def`` handlers: as for plain ones, with the transaction's calls awaited.

One call at a time in the whole process: a database connection runs one statement at a time.
"""

from collections.abc import Callable
from typing import Any

from kafkasrcd.errors import StoreUnavailable
from kafkasrcd.settings import Settings
from kafkasrcd.storage.async_transaction import AsyncEffectsTransaction
from kafkasrcd.storage.transaction import CommitUnknown, TransactionEnded
from kafkasrcd.workers.checkpoint import Checkpoints
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.commits import HeldUp
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.handler_bindings import HandlerBindings
from kafkasrcd.workers.ring import COMMITTABLE


class AsyncCheckpoints(Checkpoints):
    """The runner awaits each call, and counts it, before it begins another or takes a turn here."""

    def __init__(self, settings: Settings, bindings: HandlerBindings, transaction: AsyncEffectsTransaction) -> None:
        super().__init__(settings, bindings)
        self._transaction = transaction

    def caller(self, cursor: PartitionCursor) -> Callable[[Any], Any]:
        target = cursor.target
        function, kind, is_batch = target.function, target.transaction or "connection", target.is_batch

        async def call(argument: Any) -> Any:
            self._hold(cursor)
            if self._is_full and not await self._commit():
                raise HeldUp
            try:
                if cursor not in self._known and not await self._look(cursor):
                    raise HeldUp
                self._touch(cursor)
                returned = await self._transaction.call(function, argument, kind)
            except StoreUnavailable as error:
                self._away(error)
                raise HeldUp from error
            except TransactionEnded as error:
                self._broken(cursor, error)
                raise HeldUp from error
            self._count += len(argument) if is_batch else 1
            return returned

        return call

    async def turn_async(self) -> float:
        if self._unknown:
            await self._decide()
        elif self._is_due:
            await self._commit()
        return self._wait_ms

    async def end_async(self) -> None:
        await self._transaction.close()

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
