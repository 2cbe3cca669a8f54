"""A handler process's transaction for ``async def`` handlers: as ``transaction``, awaited."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from kafkasrcd.errors import StoreError, StoreUnavailable
from kafkasrcd.storage.dead_letters import DeadLetter, Redelivered, StoredLetter
from kafkasrcd.storage.offset_store import Advance, TopicPartition
from kafkasrcd.storage.sqlite import BEGIN_TO_WRITE, DO_NOT_WAIT, wait_again
from kafkasrcd.storage.transaction import (
    RELEASE,
    ROLL_BACK_TO,
    SAVEPOINT,
    Effects,
    Kind,
    TransactionEnded,
    forget_state,
    take_over,
)


class AsyncEffectsTransaction:
    """One connection, one transaction, one call at a time. Made without connecting.

    A call that is cancelled leaves nothing behind: its transaction is dropped, connection and all.
    """

    def __init__(self, url: str, group_id: str, busy_timeout_ms: int, idle_timeout_seconds: float) -> None:
        self._effects = effects = Effects(url, group_id, busy_timeout_ms, idle_timeout_seconds)
        self._engine: AsyncEngine = create_async_engine(
            effects.url.set(drivername="sqlite+aiosqlite") if effects.is_sqlite else effects.url,
            connect_args=effects.arguments,
            poolclass=NullPool,
            pool_reset_on_return=None,
        )
        effects.watch(self._engine.sync_engine)
        self._connection: AsyncConnection | None = None
        self.active = False
        """Whether a transaction has begun."""
        self._in_savepoint = False
        self._lost_calls = False
        """Whether calls that were made are undone of which nobody has been told."""
        self._letting_go: asyncio.Future[None] | None = None

    async def call(self, function: Callable[[Any, Any], Awaitable[object]], argument: object, kind: Kind) -> object:
        """As ``EffectsTransaction.call``."""
        connection = await self._begun()
        async with self._ours():
            for statement in self._effects.next_savepoint if self._in_savepoint else (SAVEPOINT,):
                await connection.exec_driver_sql(statement)
            self._in_savepoint = True
        self._effects.in_call = True
        try:
            if kind == "connection":
                returned = await function(argument, connection)
            else:
                async with AsyncSession(
                    connection, join_transaction_mode="create_savepoint", expire_on_commit=False
                ) as session:
                    returned = await function(argument, session)
                    await session.commit()
            self._effects.check_after(_plain(connection))
        except BaseException as error:
            if _is_cancelled() or not isinstance(error, (Exception, asyncio.CancelledError)):
                await self._cancelled()
                raise
            await self._undo_call(connection, error)  # also where what it waited for was cancelled
            raise
        finally:
            self._effects.call_ended()
        return returned

    async def bury(self, letter: DeadLetter) -> None:
        """As ``EffectsTransaction.bury``."""

        async def bury(letter: DeadLetter, connection: AsyncConnection) -> None:
            await connection.run_sync(self._effects.letters.bury, letter)

        try:
            await self.call(bury, letter, "connection")
        except SQLAlchemyError as error:
            raise self._effects.refused(error) from error

    async def letter(self, letter_id: int) -> StoredLetter | None:
        """As ``EffectsTransaction.letter``."""
        connection = await self._begun()
        async with self._ours():
            return await connection.run_sync(self._effects.letter, letter_id)

    async def settle_letter(self, redelivered: Redelivered) -> bool:
        """As ``EffectsTransaction.settle_letter``."""

        async def settle(redelivered: Redelivered, connection: AsyncConnection) -> bool:
            return await connection.run_sync(self._effects.letters.settle, redelivered)

        try:
            return bool(await self.call(settle, redelivered, "connection"))
        except SQLAlchemyError as error:
            raise self._effects.refused(error) from error

    async def commit(self, advances: Sequence[Advance]) -> dict[TopicPartition, StoreError]:
        """As ``EffectsTransaction.commit``."""
        connection = await self._begun()
        async with self._ours():
            if self._in_savepoint:
                await connection.exec_driver_sql(RELEASE)
            refusals = await connection.run_sync(self._effects.rows.advance, advances)
        if refusals:
            await self.rollback()
            return refusals
        async with self._ours(self._effects.explain_commit):
            await connection.exec_driver_sql("COMMIT")
        self._end(connection)
        return {}

    async def settle(self, advances: Sequence[Advance]) -> bool:
        """As ``EffectsTransaction.settle``."""
        connection = await self._begun()
        async with self._ours():
            made = await connection.run_sync(self._effects.rows.are_recorded, advances)
        await self.rollback()
        return made

    async def reached(self, mine: Advance) -> int | None:
        """As ``EffectsTransaction.reached``."""
        connection = await self._begun()
        async with self._ours():
            return await connection.run_sync(self._effects.rows.reached, mine)

    async def rollback(self) -> None:
        """As ``EffectsTransaction.rollback``."""
        connection = self._connection
        if connection is None or not self.active:
            return
        with suppress(StoreUnavailable):
            async with self._ours():
                await connection.exec_driver_sql("ROLLBACK")
            self._end(connection)

    async def close(self) -> None:
        """Undo what is open, and disconnect."""
        await self._drop()
        self._effects.close()

    async def _begun(self) -> AsyncConnection:
        if self._lost_calls:
            self._lost_calls = False
            raise StoreUnavailable(f"{self._effects.shown}: the transaction was given up, since a call was cancelled")
        async with self._ours():
            self._effects.check_place()
            if self._connection is None:
                self._connection = await self._engine.connect()
                take_over(self._engine.sync_engine.dialect)
            connection = self._connection
            if not self.active:
                await self._begin(connection)
                self._effects.ended = False
                self.active = True
        return connection

    async def _begin(self, connection: AsyncConnection) -> None:
        turns = self._effects.turns
        if turns is None:
            await connection.exec_driver_sql("BEGIN")
        else:
            await connection.exec_driver_sql("PRAGMA synchronous=FULL")
            await connection.exec_driver_sql(DO_NOT_WAIT)
            await turns.wait_async(lambda: connection.exec_driver_sql(BEGIN_TO_WRITE))
            await connection.exec_driver_sql(wait_again(self._effects.busy_timeout_ms))

    @asynccontextmanager
    async def _ours(self, explain: Callable[[SQLAlchemyError], StoreUnavailable] | None = None) -> AsyncIterator[None]:
        """Around statements of ours: whatever ends one early, an error or a cancellation, ends the transaction.

        A statement that nobody waits for any more may still be carried out: BEGIN IMMEDIATE, and then nobody would give
        back SQLite's write lock.
        """
        try:
            yield
        except SQLAlchemyError as error:
            raise await self._gone((explain or self._effects.explain)(error)) from error
        except StoreUnavailable:
            await self._drop()
            raise
        except BaseException:
            await self._cancelled()
            raise

    async def _cancelled(self) -> None:
        self._lost_calls = self._lost_calls or self.active
        await self._drop()

    async def _undo_call(self, connection: AsyncConnection, error: BaseException) -> None:
        """Roll back to the savepoint; raises instead of returning where the whole transaction is gone."""
        lost = self._effects.lost(error)
        if lost is not None:
            raise await self._gone(lost) from error
        if isinstance(error, (TransactionEnded, StoreUnavailable)):
            await self._drop()
            return
        forget_state(_plain(connection))
        if not self._effects.in_transaction(_plain(connection)):
            ended = self._effects.why_ended(_plain(connection))
            await self._drop()
            raise ended from error
        async with self._ours():
            await connection.exec_driver_sql(ROLL_BACK_TO)

    async def _gone(self, error: StoreUnavailable) -> StoreUnavailable:
        """The transaction is lost, and the connection is not trusted any more."""
        await self._drop()
        return error

    def _end(self, connection: AsyncConnection) -> None:
        self.active = self._in_savepoint = False
        forget_state(_plain(connection))

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self.active = self._in_savepoint = False
        if connection is not None:
            # To its end, also where this task is cancelled once more. Kept, since a loop does not keep its tasks.
            self._letting_go = asyncio.ensure_future(_let_go(connection))
            await asyncio.shield(self._letting_go)


async def _let_go(connection: AsyncConnection) -> None:
    with suppress(Exception):
        await connection.invalidate()
    with suppress(Exception):
        await connection.close()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _plain(connection: AsyncConnection) -> Connection:
    return connection.sync_connection  # type: ignore[return-value]
