"""The plain and the async transaction of a handler process, behind one face."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kafkasrcd.errors import StoreError
from kafkasrcd.storage.async_transaction import AsyncEffectsTransaction
from kafkasrcd.storage.offset_store import Advance, TopicPartition
from kafkasrcd.storage.transaction import Kind

Handler = Callable[[Any, Any], object]


class Transaction(Protocol):
    """What is tested: ``EffectsTransaction``, or the async one run to its end call by call."""

    @property
    def active(self) -> bool: ...
    def call(self, function: Handler, argument: object, kind: Kind) -> object: ...
    def commit(self, advances: Sequence[Advance]) -> dict[TopicPartition, StoreError]: ...
    def settle(self, advances: Sequence[Advance]) -> bool: ...
    def rollback(self) -> None: ...
    def close(self) -> None: ...


class Awaited:
    """The async transaction, for handlers written as plain functions of a plain Connection or Session."""

    def __init__(self, url: str, group_id: str, busy_timeout_ms: int, idle_timeout_seconds: float) -> None:
        self.runner = asyncio.Runner()
        self.transaction = AsyncEffectsTransaction(url, group_id, busy_timeout_ms, idle_timeout_seconds)

    @property
    def active(self) -> bool:
        return self.transaction.active

    def call(self, function: Handler, argument: object, kind: Kind) -> object:
        async def handler(given: object, tx: Any) -> object:
            def plain(of_tx: object) -> object:
                return function(given, of_tx)

            return await tx.run_sync(plain)

        return self.runner.run(self.transaction.call(handler, argument, kind))

    def commit(self, advances: Sequence[Advance]) -> dict[TopicPartition, StoreError]:
        return self.runner.run(self.transaction.commit(advances))

    def settle(self, advances: Sequence[Advance]) -> bool:
        return self.runner.run(self.transaction.settle(advances))

    def rollback(self) -> None:
        self.runner.run(self.transaction.rollback())

    def close(self) -> None:
        self.runner.run(self.transaction.close())
        self.runner.close()
