"""Membership of the consumer group: the one consumer that joins it, on a thread that does nothing else.

The thread polls without a pause, so a slow store, handler or commit never makes the group think this member dead. Its
callbacks decide nothing: they tell the event loop, and a revocation waits, with a deadline, for the loop's word that
the partitions are drained and recorded; only when the callback returns does the group give them to another member.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka import TopicPartition as KafkaTopicPartition

from kafkasrcd.errors import GroupError
from kafkasrcd.settings import AssignmentStrategy, GroupProtocol, Settings
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.kafka_settings import member_config

_POLL_SECONDS: Final = 0.1
_REVOCATION_SLACK_SECONDS: Final = 10.0
"""Beyond the drain's own deadline: its final commit may block 8 s where the broker is gone."""


class MembershipEvents(Protocol):
    """What the loop is told. Each is called on the event loop, in the order the group said it."""

    def on_assigned(self, names: list[TopicPartition]) -> None: ...
    def on_revoked(self, names: list[TopicPartition], done: Callable[[], None]) -> None:
        """``done`` must be called once the partitions are drained and recorded."""
        ...

    def on_lost(self, names: list[TopicPartition]) -> None: ...


class Membership:
    """The group's member. ``start`` and ``stop`` belong to the event loop, the rest says whose it is."""

    def __init__(
        self, settings: Settings, events: MembershipEvents, on_group_error: Callable[[KafkaError], None]
    ) -> None:
        self._settings = settings
        self._events = events
        self._on_group_error = on_group_error
        self._loop = asyncio.get_running_loop()
        self._log = EventLog("membership")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)
        self._incremental = (
            settings.supervisor.group_protocol is GroupProtocol.CONSUMER
            or settings.supervisor.partition_assignment_strategy is not AssignmentStrategy.RANGE
        )
        self.polls = 0
        """Polls since the start: an event that was pending at one count has been told when it is two higher."""
        self.consumer = Consumer({**member_config(settings), "error_cb": self._on_error})
        """For the recorder's thread: ``committed``, ``commit`` and the like; librdkafka's client is thread-safe."""

    def start(self) -> None:
        """Join the group."""
        self._thread.start()

    def stop(self) -> None:
        """Leave the group; returns at once. ``wait_stopped`` waits."""
        self._stopping.set()

    async def wait_stopped(self, seconds: float) -> bool:
        """Until the group is left; False where that takes longer, which only a process's end can mend."""
        if self._thread.ident is None:
            return True
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join, seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        consumer = self.consumer
        try:
            consumer.subscribe(
                self._settings.topics,
                on_assign=self._on_assign,
                on_revoke=self._on_revoke,
                on_lost=self._on_lost,
            )
            while not self._stopping.is_set():
                message = consumer.poll(_POLL_SECONDS)
                self.polls += 1
                error = None if message is None else message.error()
                if error is not None:
                    self._tell(self._on_group_error, error)
        except KafkaException as exception:
            self._tell(self._on_group_error, exception.args[0])
        finally:
            consumer.close()

    def _on_assign(self, consumer: Consumer, partitions: Sequence[KafkaTopicPartition]) -> None:
        if partitions:
            # Assigned, then paused: in this order nothing is fetched, and commits are accepted.
            if self._incremental:
                consumer.incremental_assign(list(partitions))
            else:
                consumer.assign(list(partitions))
            consumer.pause(list(partitions))
        self._tell(self._events.on_assigned, _names(partitions))

    def _on_revoke(self, _consumer: Consumer, partitions: Sequence[KafkaTopicPartition]) -> None:
        drained = threading.Event()
        self._tell(self._events.on_revoked, _names(partitions), drained.set)
        budget = self._settings.supervisor.drain_timeout_seconds + _REVOCATION_SLACK_SECONDS
        if not drained.wait(budget):
            self._log.error("revocation_overdue", f"partitions are given up undrained after {budget:.0f} s")

    def _on_lost(self, _consumer: Consumer, partitions: Sequence[KafkaTopicPartition]) -> None:
        self._tell(self._events.on_lost, _names(partitions))

    def _on_error(self, error: KafkaError) -> None:
        self._tell(self._on_group_error, error)

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop has ended: nobody is left to tell
            for argument in arguments:
                if callable(argument):
                    argument()


def _names(partitions: Sequence[KafkaTopicPartition]) -> list[TopicPartition]:
    return [TopicPartition(partition.topic, partition.partition) for partition in partitions]


def commit(consumer: Consumer, offsets: dict[TopicPartition, tuple[int, int]]) -> dict[TopicPartition, str]:
    """Commit ``{partition: (assignment_epoch, next_offset)}``; the refusals, by partition.

    Blocks: a millisecond with a broker, 8 s without (librdkafka's own limit). Raises GroupError where nothing was
    accepted. Called from the recorder's thread.
    """
    wanted = [
        KafkaTopicPartition(name.topic, name.partition, next_offset, metadata=f"kafkasrcd epoch={epoch}")
        for name, (epoch, next_offset) in offsets.items()
    ]
    try:
        answered = consumer.commit(offsets=wanted, asynchronous=False)
    except KafkaException as exception:
        raise GroupError(f"the commit was not accepted: {exception.args[0].str()}") from exception
    return {
        TopicPartition(partition.topic, partition.partition): partition.error.str()
        for partition in answered or []
        if partition.error is not None
    }
