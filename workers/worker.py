"""The worker process: fetches one partition and hands its records off.

It is no member of the group: it is told where to start and reads on from there. It keeps nothing that is not in the
shared memory, so it can be killed at any moment: what it had published is in the ring, and the next worker starts at
the position in its cell, where at worst the last frame is handed off again and passed over by the reader.
"""

import faulthandler
import os
import random
import select
import time
from pathlib import Path
from typing import Any, Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import Settings
from kafkasrcd.workers import event_log, ring
from kafkasrcd.workers.allocator import Allocator
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.control import (
    STACKS_SIGNAL,
    ControlChannel,
    OffsetOutOfRange,
    Setup,
    StartWorker,
    WorkerFault,
    WorkerReady,
    WorkerWaits,
)
from kafkasrcd.workers.frame import EncodedFrame
from kafkasrcd.workers.kafka_settings import QUIET, worker_config
from kafkasrcd.workers.partition_memory import (
    BROKER_DOWN_SINCE,
    BYTES,
    BYTES_BEFORE,
    HIGH_WATERMARK,
    LOG_START,
    MESSAGES,
    MESSAGES_BEFORE,
    POSITION,
    UNKNOWN,
    PartitionMemory,
)
from kafkasrcd.workers.preparing import Preparation, preparation_of
from kafkasrcd.workers.record_batch import hand_off
from kafkasrcd.workers.schema_document import RegistryAway
from kafkasrcd.workers.spread import DoneBefore, spread

_BATCH_MESSAGES: Final = 1000
"""Per-call costs are below 1 % of a batch of this size, and it is some 300 kB of ordinary JSON."""
_WATERMARK_SECONDS: Final = 1.0
"""How often the watermarks are asked for where no fetch brings them: the lag is that old at most."""
_LEASE_WAIT_MS: Final = 20
_IDLE_MS: Final = 1000
"""Until the bell rings; the watermarks are asked for then."""
_FIRST_WAIT_MS: Final = 200.0
_LONGEST_WAIT_MS: Final = 10_000.0
"""Between two questions to a registry that is away: 64 workers are then some ten questions a second."""
_BURST_BYTES: Final = 1024 * 1024
"""Handing off less than this has left no memory worth looking for."""

_GONE: Final = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})
_HOPELESS: Final = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError._FATAL})


def main(channel: ControlChannel) -> int:
    """Fetch until killed. Returns the exit code where it cannot go on."""
    setup = channel.receive()
    start = channel.receive()
    if setup is None or start is None:
        return 0
    if not isinstance(setup[0], Setup) or not isinstance(start[0], StartWorker):
        raise TypeError(f"a worker was told {setup[0]!r}, then {start[0]!r}")
    settings = msgspec.json.decode(setup[0].settings, type=Settings)
    event_log.configure(settings.supervisor.log_format, settings.supervisor.log_level)
    faulthandler.register(STACKS_SIGNAL, file=setup[1][0], all_threads=True)
    try:
        return Worker(settings, setup[0], start[0], start[1], channel).run()
    except ConfigurationError as error:
        channel.send(WorkerFault(str(error)))
        return 78


class Worker:
    """One partition's fetching, under one assignment epoch."""

    def __init__(
        self, settings: Settings, setup: Setup, start: StartWorker, descriptors: list[int], channel: ControlChannel
    ) -> None:
        self._log = event_log.EventLog("worker")
        self._channel = channel
        memory_fd, self._bell, *handler_bells = descriptors
        self._memory = PartitionMemory(memory_fd, start.assignment_epoch)
        self._cells = self._memory.cells
        self._publishers = [
            _Publisher(self, ring.RingWriter(slot.ring, start.assignment_epoch, bell))
            for slot, bell in zip(self._memory.slots, handler_bells, strict=True)
        ]
        self._layout = start.layout
        self._done_before = DoneBefore(start.layers)
        self._largest = ring.largest_payload(self._publishers[0].writer.capacity)
        self._poll_seconds = settings.poll_timeout_ms / 1000
        self._source = TopicPartition(start.topic, start.partition, start.start_offset)
        self._where: dict[str, Any] = {
            "topic": start.topic,
            "partition": start.partition,
            "epoch": start.assignment_epoch,
        }
        self._watermarks_due = 0.0
        self._preparation = preparation_of(
            settings,
            start.topic,
            start.shape,
            Path(setup.base_directory),
            setup.schema_directory,
            self._cells,
            {each.offset: each for each in start.refused},
        )
        self._allocator = Allocator()
        self._trimmed_at_bytes = 0
        # What a killed worker had handed off behind its position comes again, and is counted already.
        self._messages = self._cells[MESSAGES_BEFORE]
        self._bytes = self._cells[BYTES_BEFORE]
        self._consumer = Consumer({**QUIET, **worker_config(settings), "error_cb": self._on_error})

    def run(self) -> int:
        """Fetch and hand off until the supervisor ends it; returns the exit code."""
        consumer = self._consumer
        consumer.assign([self._source])
        self._channel.send(WorkerReady())
        while True:
            if not self._memory.leased:
                if self._sleep(self._lease_wait_ms):
                    return 0
                self._ask_watermarks()
                continue
            first = consumer.poll(self._poll_seconds)
            if first is None:
                self._on_idle()
                continue
            messages = [first, *consumer.consume(_BATCH_MESSAGES - 1, 0)]
            if any(map(Message.error, messages)):
                errors = [message for message in messages if message.error() is not None]
                messages = [message for message in messages if message.error() is None]
            else:
                errors = []
            self._note_watermark()  # before the records: what they do to the handler may end this process
            if messages:
                self._hand_off(messages)
                self._cells[BROKER_DOWN_SINCE] = UNKNOWN
            for message in errors:
                exit_code = self._on_message_error(message)
                if exit_code is not None:
                    return exit_code

    def _hand_off(self, messages: list[Message]) -> None:
        """Into the rings; then the position. Killed between the two, it is handed off again, and passed over there."""
        next_offset = (messages[-1].offset() or 0) + 1
        if self._cells[POSITION] < self._done_before.until:
            messages = self._done_before.left(messages)
        if self._preparation is None:
            self._publish(messages, None)
        else:
            self._prepare_and_publish(messages, self._preparation)
        self._move(next_offset)

    def _move(self, next_offset: int) -> None:
        """Everything before ``next_offset`` is handed off, and counted."""
        self._cells[MESSAGES_BEFORE] = self._messages
        self._cells[BYTES_BEFORE] = self._bytes
        self._cells[POSITION] = next_offset

    def _prepare_and_publish(self, messages: list[Message], preparation: Preparation) -> None:
        """Up to the first record whose schema cannot be had; then that one is waited for, and so on."""
        wait_ms: float = _FIRST_WAIT_MS
        waiting = False
        while messages:
            try:
                count = preparation.ready(messages)
            except RegistryAway as error:
                reason = f"offset {messages[0].offset()}: its schema is waited for: {error}"
                self._log.repeated("schema_awaited", reason, same=(), **self._where)
                self._channel.send(WorkerWaits(reason))
                waiting = True
                if self._sleep(round(wait_ms * random.uniform(0.5, 1.0))):  # noqa: S311 - jitter
                    os._exit(0)
                wait_ms = min(2 * wait_ms, _LONGEST_WAIT_MS)
                self._ask_watermarks()
                continue
            if waiting:
                self._channel.send(WorkerWaits(""))
                waiting, wait_ms = False, _FIRST_WAIT_MS
            self._publish(messages[:count], preparation)
            if count < len(messages):
                self._move((messages[count - 1].offset() or 0) + 1)
            messages = messages[count:]

    def _publish(self, messages: list[Message], preparation: Preparation | None) -> None:
        prepare = None if preparation is None else preparation.prepare
        parts = [messages] if self._layout.slots == 1 else spread(self._layout, messages)
        for part, publisher in zip(parts, self._publishers, strict=True):
            if part:
                hand_off(part, self._largest, publisher.publish, prepare)

    def publish(self, writer: ring.RingWriter, frame: EncodedFrame) -> None:
        """Into the ring, waiting for room and for the lease."""
        while not (self._memory.leased and writer.publish(frame.parts)):
            writer.await_room()
            try:
                if self._memory.leased and writer.publish(frame.parts):
                    break
                if self._sleep(_IDLE_MS if self._memory.leased else self._lease_wait_ms):
                    os._exit(0)
            finally:
                writer.awake()
            self._ask_watermarks()
        cells = self._cells
        self._messages += frame.records
        self._bytes += frame.record_bytes
        cells[MESSAGES] = max(cells[MESSAGES], self._messages)
        cells[BYTES] = max(cells[BYTES], self._bytes)

    @property
    def _lease_wait_ms(self) -> int:
        """Without a lease: a pause ends with the bell, everything else by itself."""
        return _IDLE_MS if self._memory.paused else _LEASE_WAIT_MS

    def _sleep(self, milliseconds: int) -> bool:
        """Until the bell rings or the time is over; True where the supervisor is gone."""
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        poller.register(self._channel, select.POLLIN)
        for fd, _ in poller.poll(milliseconds):
            if fd != self._bell:
                return True  # a worker is told nothing after its start: the socket is readable when it is closed
            os.eventfd_read(self._bell)
        return False

    def _on_message_error(self, message: Message) -> int | None:
        """An error that came in place of a record; the exit code where the worker has to end."""
        error = message.error()
        if error is None:
            return None
        code = error.code()
        if code == KafkaError._PARTITION_EOF:
            # Past transaction markers and what compaction removed: nothing before this offset is left to hand off.
            self._cells[POSITION] = max(self._cells[POSITION], message.offset() or 0)
            self._cells[BROKER_DOWN_SINCE] = UNKNOWN
            return None
        if code in _GONE:
            low, high = self._consumer.get_watermark_offsets(self._source, timeout=30)
            self._channel.send(OffsetOutOfRange(position=self._cells[POSITION], log_start=low, high_watermark=high))
            return 0
        if code in _HOPELESS:
            self._channel.send(WorkerFault(f"{error.name()}: {error.str()}"))
            return 0
        self._log.repeated("fetch_failed", f"fetching fails: {error.str()}", same=(code,), **self._where)
        return None

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN and self._cells[BROKER_DOWN_SINCE] == UNKNOWN:
            self._cells[BROKER_DOWN_SINCE] = boottime_ns()

    def _on_idle(self) -> None:
        handed_off = self._cells[BYTES]
        if handed_off - self._trimmed_at_bytes >= _BURST_BYTES:
            self._trimmed_at_bytes = handed_off
            self._allocator.give_back()
        if self._cells[BROKER_DOWN_SINCE] != UNKNOWN or self._cells[LOG_START] == UNKNOWN:
            self._ask_watermarks()
        else:
            self._note_watermark()

    def _note_watermark(self) -> None:
        """The high watermark that came along with the last fetch; no request."""
        _, high = self._consumer.get_watermark_offsets(self._source, cached=True)
        if high >= 0:
            self._cells[HIGH_WATERMARK] = high

    def _ask_watermarks(self) -> None:
        """Ask the broker, at most once each ``_WATERMARK_SECONDS``: while the ring is full nothing is fetched, and
        the lag would stand still."""
        now = time.monotonic()
        if now < self._watermarks_due:
            return
        self._watermarks_due = now + _WATERMARK_SECONDS
        try:
            low, high = self._consumer.get_watermark_offsets(self._source, timeout=_WATERMARK_SECONDS)
        except KafkaException:
            return
        self._cells[LOG_START] = low
        self._cells[HIGH_WATERMARK] = high
        self._cells[BROKER_DOWN_SINCE] = UNKNOWN


class _Publisher:
    """The way into one slot's ring."""

    def __init__(self, worker: Worker, writer: ring.RingWriter) -> None:
        self.writer = writer
        self._worker = worker

    def publish(self, frame: EncodedFrame) -> None:
        """Into this ring."""
        self._worker.publish(self.writer, frame)
