"""KafkaSource for asyncio: the same source, whose waiting is the loop's.

It has no thread of its own. Whatever waits can be cancelled: nothing is taken between the last wait and the return, so
no message is lost in one.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Final, Generic, TypeVar, overload

from kafkasrcd.daemon.kafka_source import COMMIT_SECONDS, KafkaSource, Partitions
from kafkasrcd.daemon.source_config import KafkaSourceConfig
from kafkasrcd.daemon.source_metrics import KafkaSourceMetrics
from kafkasrcd.daemon.state_backends import StateBackend
from kafkasrcd.errors import ConfigurationError, GroupError, KafkasrcdError, StoreError, WorkerError
from kafkasrcd.message import Message
from kafkasrcd.settings import CommitStrategy
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.source_reader import SourceReader

T = TypeVar("T")

_LONGEST_WAIT_SECONDS: Final = 1.0
"""A wake-up cannot be lost on x86-64 or ARMv8 (see ring.fence); elsewhere it is this late."""


class AsyncKafkaSource(Generic[T]):
    """As KafkaSource; one coroutine at a time polls, commits and seeks. Used in one event loop."""

    @overload
    def __init__(
        self: "AsyncKafkaSource[Any]",
        config: KafkaSourceConfig,
        *,
        state_backend: StateBackend | None = None,
        on_assigned: Callable[[Partitions], None] | None = None,
        on_revoked: Callable[[Partitions], None] | None = None,
        on_lost: Callable[[Partitions], None] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        config: KafkaSourceConfig,
        payload_type: type[T],
        state_backend: StateBackend | None = None,
        *,
        on_assigned: Callable[[Partitions], None] | None = None,
        on_revoked: Callable[[Partitions], None] | None = None,
        on_lost: Callable[[Partitions], None] | None = None,
    ) -> None: ...
    def __init__(
        self,
        config: KafkaSourceConfig,
        payload_type: Any = Any,
        state_backend: StateBackend | None = None,
        *,
        on_assigned: Callable[[Partitions], None] | None = None,
        on_revoked: Callable[[Partitions], None] | None = None,
        on_lost: Callable[[Partitions], None] | None = None,
    ) -> None:
        """As KafkaSource's."""
        self._source: KafkaSource[T] = KafkaSource(
            config,
            payload_type,
            state_backend,
            on_assigned=on_assigned,
            on_revoked=on_revoked,
            on_lost=on_lost,
        )
        if config.commit_strategy is CommitStrategy.ON_CHECKPOINT:
            raise ConfigurationError(
                "commit_strategy on_checkpoint: an AsyncKafkaSource has none yet; take KafkaSource, or the daemon"
            )
        self._woken = asyncio.Event()
        self._in_use = False

    async def subscribe(self, topics: Iterable[str]) -> None:
        """As KafkaSource's."""
        await asyncio.to_thread(self._source.subscribe, list(topics))

    async def poll(self, timeout: float | None = None) -> Message[T] | None:
        """As KafkaSource's."""
        source = self._source
        with self._mine():
            reader = await self._ready()
            reader.finish()
            message = reader.take()
            if message is None and await self._wait(reader, source.seconds(timeout)):
                message = reader.take()
            source.polled(reader)
            return message

    async def poll_batch(self, max_messages: int = 100, timeout: float | None = None) -> list[Message[T]]:
        """As KafkaSource's."""
        source = self._source
        with self._mine():
            reader = await self._ready()
            reader.finish()
            reader.receive()
            messages = reader.take_many(max_messages)
            if not messages and await self._wait(reader, source.seconds(timeout)):
                messages = reader.take_many(max_messages)
            source.polled(reader)
            return messages

    async def commit(self) -> None:
        """As KafkaSource's."""
        source = self._source
        with self._mine():
            reader = await self._ready()
            number = source.ask_to_record(reader)
            deadline = time.monotonic() + COMMIT_SECONDS
            while not source.is_recorded(reader, number):
                if time.monotonic() > deadline:
                    raise GroupError(f"nothing is committed within {COMMIT_SECONDS:.0f} s: no broker answers")
                await self._wake(reader, _LONGEST_WAIT_SECONDS)

    async def seek(self, topic: str, partition: int, offset: int) -> None:
        """As KafkaSource's."""
        await self._begun()
        self._source.seek(topic, partition, offset)

    async def start(self, channel: "asyncio.Queue[Message[T]]") -> None:
        """As KafkaSource's, into an asyncio.Queue."""
        failures = 0
        while not self._source.closing:
            try:
                message = await self.poll()
            except (GroupError, StoreError, WorkerError):
                failures += 1
                if failures > self._source.max_retries:
                    raise
                await asyncio.sleep(self._source.backoff_seconds(failures))
                continue
            failures = 0
            if message is not None:
                with self._source.on_its_way():
                    await channel.put(message)

    async def metrics(self) -> KafkaSourceMetrics:
        """As KafkaSource's."""
        return await asyncio.to_thread(self._source.metrics)

    async def get_lag(self) -> dict[int, int]:
        """As KafkaSource's."""
        return await asyncio.to_thread(self._source.get_lag)

    def assignment(self) -> list[TopicPartition]:
        """As KafkaSource's."""
        return self._source.assignment()

    async def pause(self, partitions: Iterable[tuple[str, int]]) -> None:
        """As KafkaSource's."""
        await self._begun()
        self._source.pause(partitions)

    async def resume(self, partitions: Iterable[tuple[str, int]]) -> None:
        """As KafkaSource's."""
        await self._begun()
        self._source.resume(partitions)

    async def close(self) -> None:
        """As KafkaSource's; a ``poll`` of another coroutine returns None."""
        await self._close(finish=True)

    async def __aenter__(self) -> "AsyncKafkaSource[T]":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """As KafkaSource's."""
        await self._close(finish=kind is None)

    async def __aiter__(self) -> AsyncIterator[Message[T]]:
        """Messages until it is closed."""
        while not self._source.closing:
            message = await self.poll()
            if message is not None:
                yield message

    async def _close(self, *, finish: bool) -> None:
        self._source.closing = True
        self._woken.set()
        # To its end, also where this task is cancelled: the engine's processes would stay.
        await asyncio.shield(asyncio.to_thread(self._source.end, finish=finish))

    @contextlib.contextmanager
    def _mine(self) -> Iterator[None]:
        """Around every use; raises KafkasrcdError where another coroutine is in the source already."""
        if self._in_use:
            raise KafkasrcdError("another coroutine is using this AsyncKafkaSource: one polls at a time")
        with self._source.mine():
            self._in_use = True
            try:
                yield
            finally:
                self._in_use = False

    async def _begun(self) -> None:
        with self._mine():
            await self._ready()

    async def _ready(self) -> SourceReader:
        reader = self._source.reader
        return await asyncio.to_thread(self._source.ready) if reader is None else reader

    async def _wait(self, reader: SourceReader, seconds: float) -> bool:
        """As KafkaSource's."""
        deadline = time.monotonic() + seconds
        while True:
            reader.receive()
            self._source.raise_if_ended()
            if reader.has_record():
                return True
            left = deadline - time.monotonic()
            if left <= 0 or self._source.closing:
                return False
            try:
                if reader.announce():
                    await self._wake(reader, min(left, _LONGEST_WAIT_SECONDS))
            finally:
                reader.awake()

    async def _wake(self, reader: SourceReader, seconds: float) -> None:
        """Until someone rings. The loop looks at the descriptors in between only: they stay readable until then."""
        loop = asyncio.get_running_loop()
        self._woken.clear()
        descriptors = (reader.bell, reader.channel.fileno())
        for descriptor in descriptors:
            loop.add_reader(descriptor, self._woken.set)
        try:
            if not self._source.closing:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), seconds)
        finally:
            for descriptor in descriptors:
                loop.remove_reader(descriptor)
