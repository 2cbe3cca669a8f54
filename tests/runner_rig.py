"""A runner over real shared memory and control sockets; the test is its supervisor, its workers and its handler."""

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kafkasrcd.message import Message
from kafkasrcd.settings import CommitStrategy, HandlerSettings, OnFailure, Ordering, Retry, Settings, StoreSettings
from kafkasrcd.storage.offset_store import WHOLE
from kafkasrcd.workers import concurrent_runner, sync_runner
from kafkasrcd.workers.control import Bind, ControlChannel, ControlMessage, Exit, Quarantined, Unbind
from kafkasrcd.workers.frame import Columns, encode_frame
from kafkasrcd.workers.handler import commits_of
from kafkasrcd.workers.handler_bindings import HandlerBindings
from kafkasrcd.workers.handler_target import HandlerTarget, HandlerTargets
from kafkasrcd.workers.partition_memory import POSITION, PartitionMemory
from kafkasrcd.workers.payload import payload_decoder
from kafkasrcd.workers.redelivery import Redeliveries
from kafkasrcd.workers.ring import FAILURES, HANDLED, HEAD, PAGE, PROCESSED, SKIPPED, TAIL, RingWriter
from tests.waiting import wait_until

THIS_EPOCH = 4
LONG_SECONDS = 20.0
"""What a test waits for comes in milliseconds, or on a busy machine later, or never."""

Act = Callable[[Message[Any]], None]


class Kind(NamedTuple):
    """How the handler is declared."""

    is_batch: bool
    is_async: bool

    def __str__(self) -> str:
        return f"{'async' if self.is_async else 'plain'} {'batch' if self.is_batch else 'single'}"


KINDS = [Kind(is_batch, is_async) for is_batch in (False, True) for is_async in (False, True)]


def settings_of(
    on_failure: OnFailure = OnFailure.STOP,
    *,
    max_retries: int = 2,
    backoff_ms: int = 1,
    backoff_max_ms: int = 10_000,
    batch: int = 500,
    wait_ms: int = 0,
    strategy: CommitStrategy = CommitStrategy.PERIODIC,
    ordering: Ordering = Ordering.PARTITION,
    concurrency: int = 100,
    threads: int = 1,
    non_retryable: Sequence[str] = (),
    checkpoint_interval_ms: int = 20,
    checkpoint_max_messages: int = 10_000,
    scheduled: bool = False,
) -> Settings:
    return Settings(
        max_retries=max_retries,
        retry_backoff_ms=backoff_ms,
        retry_backoff_max_ms=backoff_max_ms,
        commit_strategy=strategy,
        checkpoint_interval_ms=checkpoint_interval_ms,
        checkpoint_max_messages=checkpoint_max_messages,
        store=StoreSettings(busy_timeout_ms=300),
        handler=HandlerSettings(
            on_failure=on_failure,
            batch_max_messages=batch,
            batch_max_wait_ms=wait_ms,
            ordering=ordering,
            concurrency=concurrency,
            threads=threads,
            non_retryable=list(non_retryable),
            retry=Retry.SCHEDULED if scheduled else Retry.IN_PLACE,
        ),
    )


def json_of(offset: int) -> bytes:
    return b'{"number": %d}' % offset


class Partition:
    """A partition's memory and its worker's side."""

    def __init__(self, binding: int, topic: str, next_offset: int, capacity: int, handler_bell: int) -> None:
        self.binding = binding
        self.topic = topic
        self.memory = PartitionMemory.create(capacity, THIS_EPOCH, next_offset)
        self.memory.extend_lease(60)
        self.cells = self.memory.slots[0].cells
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.writer = RingWriter(self.memory.slots[0].ring, THIS_EPOCH, handler_bell)
        self.quarantined: tuple[Quarantined, ...] = ()

    @property
    def bind(self) -> Bind:
        return Bind(
            binding=self.binding,
            topic=self.topic,
            partition=self.binding,
            assignment_epoch=THIS_EPOCH,
            slot=0,
            layout=WHOLE,
            quarantined=self.quarantined,
        )

    @property
    def counts(self) -> tuple[int, int, int]:
        """Handled, failures, skipped."""
        return self.cells[HANDLED], self.cells[FAILURES], self.cells[SKIPPED]

    @property
    def processed(self) -> int:
        return self.cells[PROCESSED]

    @property
    def is_empty(self) -> bool:
        """Whether everything in the ring was released."""
        return self.cells[HEAD] == self.cells[TAIL]

    def close(self) -> None:
        self.memory.close()
        os.close(self.bell)


class Rig:
    """One handler process's runner, in a thread.

    The handler notes what it is called with in ``calls`` (offsets by call) and calls ``act`` for each message.
    """

    def __init__(self, kind: Kind, settings: Settings, act: Act | None = None, store_url: str = "") -> None:
        """``store_url``: of handlers in transactions."""
        self.store_url = store_url
        self.kind = kind
        self.settings = settings
        self.act = act
        self.calls: list[list[int]] = []
        self.messages: list[Message[Any]] = []
        """Those for which ``act`` returned, in that order."""
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.supervisor, theirs = ControlChannel.pair()
        self.supervisor.setblocking(False)
        self.channel = ControlChannel(theirs)
        self.partitions: list[Partition] = []
        self.descriptors: list[int] = []
        """Others that are to be closed with this."""
        self.told: list[ControlMessage] = []
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None

    # ---- the handler -------------------------------------------------------------------------------------------------

    def _handle(self, argument: Any) -> None:
        messages: list[Message[Any]] = argument if self.kind.is_batch else [argument]
        self.calls.append([message.offset for message in messages])
        for message in messages:
            if self.act is not None:
                self.act(message)
            self.messages.append(message)

    async def _handle_async(self, argument: Any) -> None:
        await asyncio.sleep(0)
        self._handle(argument)

    def target(self, function: Callable[..., Any] | None = None) -> HandlerTarget:
        return HandlerTarget(
            "orders:handle",
            function or (self._handle_async if self.kind.is_async else self._handle),
            self.kind.is_async,
            self.kind.is_batch,
            Any,
            payload_decoder(Any),
        )

    def run(self, target: HandlerTarget | None = None) -> None:
        """The runner itself, in this thread; returns when it is told to end."""
        targets = HandlerTargets({}, target or self.target())
        again = Redeliveries(self.settings, Path(), "")
        bindings = HandlerBindings(self.settings, targets, self.channel, self.bell, again)
        bindings.commits = commits_of(self.settings, bindings, self.store_url)
        try:
            if self.kind.is_async or self.settings.handler.threads > 1:
                asyncio.run(concurrent_runner.run(bindings, self.settings))
            else:
                sync_runner.run(bindings)
        finally:
            for cursor in bindings.cursors():  # as the end of a handler process does
                cursor.close()

    def start(self, target: HandlerTarget | None = None) -> None:
        def run() -> None:
            try:
                self.run(target)
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    # ---- the supervisor ----------------------------------------------------------------------------------------------

    def partition(
        self,
        topic: str = "orders",
        *,
        next_offset: int = 0,
        capacity: int = 4 * PAGE,
        leased: bool = True,
        quarantined: tuple[Quarantined, ...] = (),
    ) -> Partition:
        """A new partition, bound to the runner."""
        partition = Partition(len(self.partitions), topic, next_offset, capacity, self.bell)
        partition.quarantined = quarantined
        if not leased:
            partition.memory.stop()
        self.partitions.append(partition)
        self.bind(partition)
        return partition

    def bind(self, partition: Partition) -> None:
        self.supervisor.send(partition.bind, (partition.memory.fd, partition.bell))

    def unbind(self, partition: Partition) -> None:
        self.supervisor.send(Unbind(partition.binding))

    def ring(self) -> None:
        """Wake the runner, as the supervisor does where a lease has ended."""
        os.eventfd_write(self.bell, 1)

    def exit(self) -> None:
        self.supervisor.send(Exit())

    def hear(self) -> list[ControlMessage]:
        """What the runner has told so far."""
        while True:
            try:
                received = self.supervisor.receive()
            except BlockingIOError:
                return self.told
            if received is None:
                return self.told
            self.told.append(received[0])

    # ---- the workers -------------------------------------------------------------------------------------------------

    def publish(self, partition: Partition, columns: Columns) -> None:
        """As a worker that finds room."""
        frame = encode_frame(columns)
        assert partition.writer.publish(frame.parts), "the ring is full"
        partition.memory.cells[POSITION] = frame.next_offset

    def publish_values(self, partition: Partition, offsets: Sequence[int], **others: bytes | None) -> None:
        """Records of ``offsets``, whose value is their number in JSON; ``at_N`` gives another for offset N."""
        values = [others.get(f"at_{offset}", json_of(offset)) for offset in offsets]
        self.publish(partition, Columns(offsets, [1_000] * len(values), values))

    def publish_keys(self, partition: Partition, first: int, keys: Sequence[bytes | None]) -> None:
        """Records from offset ``first`` on, with these keys."""
        offsets = range(first, first + len(keys))
        self.publish(partition, Columns(offsets, [1_000] * len(keys), list(map(json_of, offsets)), keys))

    # ---- the test ----------------------------------------------------------------------------------------------------

    @property
    def handled(self) -> list[int]:
        """The offsets of what was handled."""
        return [message.offset for message in self.messages]

    def wait(self, condition: Callable[[], object], describe: str, seconds: float = LONG_SECONDS) -> None:
        def met() -> bool:
            assert self._thread is None or self.error is None, f"the runner ended by {self.error!r}"
            return bool(condition())

        wait_until(met, seconds, describe, seen=lambda: (self.calls[-5:], self.hear()), interval_seconds=0.002)

    def wait_processed(self, partition: Partition, offset: int, seconds: float = LONG_SECONDS) -> None:
        """Until all before ``offset`` is processed and the space of it is given back."""
        self.wait(
            lambda: partition.processed == offset and partition.is_empty, f"{offset} to be processed and freed", seconds
        )

    def wait_ended(self) -> BaseException | None:
        """Until the runner has ended by itself; by what."""
        if self._thread is not None:
            self._thread.join(LONG_SECONDS)
            assert not self._thread.is_alive(), "the runner does not end"
            self._thread = None
        error, self.error = self.error, None
        return error

    def stop(self) -> None:
        """End the runner; whatever ended it before is raised here."""
        if self._thread is not None:
            if self._thread.is_alive():
                self.exit()
            self._thread.join(LONG_SECONDS)
            assert not self._thread.is_alive(), "the runner does not end"
            self._thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    def close(self) -> None:
        try:
            self.stop()
        finally:
            for partition in self.partitions:
                partition.close()
            for descriptor in self.descriptors:
                os.close(descriptor)
            self.supervisor.close()
            self.channel.close()
            os.close(self.bell)
