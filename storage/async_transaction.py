"""A handler process's transaction for ``async def`` handlers: as ``transaction``, awaited."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from kafkasrcd.errors import StoreError, StoreUnavailable
from kafkasrcd.storage.offset_store import Advance, TopicPartition
from kafkasrcd.storage.transaction import (
    ROLL_BACK_TO,
    SAVEPOINT,
    CommitUnknown,
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
        self._connection: AsyncConnection | None = None
        self.active = False
        """Whether a transaction has begun."""
        self._in_savepoint = False

    async def call(self, function: Callable[[Any, Any], Awaitable[object]], argument: object, kind: Kind) -> object:
        """As ``EffectsTransaction.call``."""
        connection = await self._begun()
        try:
            for statement in self._effects.next_savepoint if self._in_savepoint else (SAVEPOINT,):
                await connection.exec_driver_sql(statement)
            self._in_savepoint = True
        except SQLAlchemyError as error:
            raise await self._gone(self._effects.explain(error)) from error
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
        except Exception as error:
            await self._undo_call(connection, error)
            raise
        except BaseException:
            await self._drop()
            raise
        return returned

    async def commit(self, advances: Sequence[Advance]) -> dict[TopicPartition, StoreError]:
        """As ``EffectsTransaction.commit``."""
        connection = await self._begun()
        try:
            refusals = await connection.run_sync(self._effects.rows.advance, advances)
        except SQLAlchemyError as error:
            raise await self._gone(self._effects.explain(error)) from error
        if refusals:
            await self.rollback()
            return refusals
        try:
            await connection.exec_driver_sql("COMMIT")
        except SQLAlchemyError as error:
            explained = self._effects.explain(error)
            if self._effects.is_sqlite:
                raise await self._gone(explained) from error  # it says itself that it was not made
            raise await self._gone(CommitUnknown(str(explained))) from error
        self._end(connection)
        return {}

    async def settle(self, advances: Sequence[Advance]) -> bool:
        """As ``EffectsTransaction.settle``."""
        connection = await self._begun()
        try:
            return await connection.run_sync(self._effects.rows.are_recorded, advances)
        except SQLAlchemyError as error:
            raise await self._gone(self._effects.explain(error)) from error
        finally:
            await self.rollback()

    async def rollback(self) -> None:
        """As ``EffectsTransaction.rollback``."""
        connection = self._connection
        if connection is None or not self.active:
            return
        try:
            await connection.exec_driver_sql("ROLLBACK")
        except SQLAlchemyError:
            await self._drop()
        else:
            self._end(connection)

    async def close(self) -> None:
        """Undo what is open, and disconnect."""
        await self._drop()

    async def _begun(self) -> AsyncConnection:
        try:
            if self._connection is None:
                self._connection = await self._engine.connect()
                take_over(self._engine.sync_engine.dialect)
            if not self.active:
                for statement in self._effects.begin:
                    await self._connection.exec_driver_sql(statement)
                self.active = True
        except SQLAlchemyError as error:
            raise await self._gone(self._effects.explain(error)) from error
        return self._connection

    async def _undo_call(self, connection: AsyncConnection, error: Exception) -> None:
        """Roll back to the savepoint; raises instead of returning where the whole transaction is gone."""
        lost = self._effects.lost(error)
        if lost is not None:
            raise await self._gone(lost) from error
        if isinstance(error, TransactionEnded):
            await self._drop()
            return
        forget_state(_plain(connection))
        if not self._effects.in_transaction(_plain(connection)):
            await self._drop()
            self._effects.check_after(_plain(connection))
        try:
            await connection.exec_driver_sql(ROLL_BACK_TO)
        except SQLAlchemyError as second:
            raise await self._gone(self._effects.explain(second)) from error

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
            with suppress(Exception):
                await connection.invalidate()
            with suppress(Exception):
                await connection.close()


def _plain(connection: AsyncConnection) -> Connection:
    return connection.sync_connection  # type: ignore[return-value]
