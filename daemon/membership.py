"""Membership of the consumer group: the one consumer that joins it, on a thread that does nothing else.

The thread polls without a pause, so a slow store or handler never makes the group think this member dead. Its
callbacks decide nothing: they tell the event loop, and a revocation waits, with a deadline, for the loop's word that
the partitions are drained and recorded; only when the callback returns does the group give them to another member.

Every use of the consumer happens on this thread, by ``call``: confluent_kafka holds a lock for the length of each of
its calls, callbacks included, so a commit on another thread would wait for a revocation that waits for the commit.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka import TopicPartition as KafkaTopicPartition

from kafkasrcd.errors import GroupError
from kafkasrcd.settings import AssignmentStrategy, GroupProtocol, Settings
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.deadline import Deadline
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.kafka_settings import QUIET, member_config

_POLL_EVERY_SECONDS: Final = 0.02
"""The thread waits in its own queue, where a call wakes it, and not in librdkafka's: so a rebalance is heard this much
later at most, and a commit does not wait at all."""
_LEAVE_LOOK_SECONDS: Final = 0.005
_REVOCATION_SLACK_SECONDS: Final = 10.0
"""Beyond the drain's own deadline: its final commit may block 8 s where the broker is gone."""

T = TypeVar("T")
_Call = tuple[Callable[[Consumer], Any], "Future[Any]"]


class MembershipEvents(Protocol):
    """What the loop is told. Each is called on the event loop, in the order the group said it."""

    def on_assigned(self, names: list[TopicPartition]) -> None: ...
    def on_revoked(self, names: list[TopicPartition], done: Callable[[], None]) -> None:
        """``done`` must be called once the partitions are drained and recorded."""
        ...

    def on_lost(self, names: list[TopicPartition]) -> None: ...


class Membership:
    """The group's member. Made on the event loop; ``call`` may be used from any thread but its own."""

    def __init__(
        self,
        settings: Settings,
        events: MembershipEvents,
        on_group_error: Callable[[KafkaError], None],
        on_ended: Callable[[str], None],
    ) -> None:
        """``on_ended`` is told, with the reason, where there is no member any more without ``leave``."""
        self._settings = settings
        self._events = events
        self._on_group_error = on_group_error
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._log = EventLog("membership")
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._calls_closing = threading.Lock()
        """Held to put a call or to close: nobody waits for a call that came after the last one was served."""
        self._calls_closed = False
        self._stopping = False
        self._leave_by = Deadline(0)
        self._incremental = (
            settings.supervisor.group_protocol is GroupProtocol.CONSUMER
            or settings.supervisor.partition_assignment_strategy is not AssignmentStrategy.RANGE
        )
        self.polls = 0
        """Polls since the start: what was pending at one count has been told when it is two higher."""
        self.member_id = ""
        """As the group's coordinator calls this member; empty outside the group."""
        self._outside_since: float | None = None
        self._consumer = Consumer({**QUIET, **member_config(settings), "error_cb": self._on_error})
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[Consumer], T]) -> "Future[T]":
        """Run ``function`` on the thread, between two polls or while a revocation waits."""
        future: Future[T] = Future()
        with self._calls_closing:
            if not self._calls_closed:
                self._calls.put((function, future))
                return future
        future.set_exception(GroupError("the group has been left"))
        return future

    @property
    def outside_seconds(self) -> float:
        """For how long it has had no member id: normally some milliseconds, between an end of the membership and the
        request to join again. librdkafka 2.16 can stay so for ever: where the topics' metadata changes while a
        cooperative revocation is waited for, it takes that for still going on, and joins no more."""
        since = self._outside_since
        return 0.0 if since is None else time.monotonic() - since

    def join_group(self) -> None:
        """Subscribe; the group's events follow."""

        def subscribe(consumer: Consumer) -> None:
            consumer.subscribe(
                self._settings.topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )

        def subscribed(future: "Future[None]") -> None:
            if (error := future.exception()) is not None:
                self._tell(self._on_ended, str(error))

        self.call(subscribe).add_done_callback(subscribed)

    async def leave(self, deadline: Deadline, close_seconds: float) -> bool:
        """Leave the group; False where that takes longer than until the deadline and ``close_seconds`` more, which
        only the end of the process can mend.

        In a rebalance it takes until all members have joined: the broker hears of the leaving only after it has
        answered this member's own request to join. A member that ends without waiting for that is waited for in turn,
        by the whole group, until its session times out.
        """
        self._leave_by = deadline
        self._stopping = True
        await self._thread_ended(deadline)
        return await self._thread_ended(Deadline(close_seconds))

    async def _thread_ended(self, deadline: Deadline) -> bool:
        while self._thread.is_alive() and not deadline.passed:
            await asyncio.sleep(_LEAVE_LOOK_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        consumer = self._consumer
        try:
            while not self._stopping:
                self._serve_calls(_POLL_EVERY_SECONDS)
                message = consumer.poll(0)
                self.polls += 1
                self.member_id = consumer.memberid() or ""
                if self.member_id:
                    self._outside_since = None
                elif self._outside_since is None:
                    self._outside_since = time.monotonic()
                error = None if message is None else message.error()
                if error is not None:
                    self._tell(self._on_group_error, error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the group has no member here any more
            self._tell(self._on_ended, str(error))
        finally:
            try:
                self._leave()
            finally:
                with self._calls_closing:
                    self._calls_closed = True
                while not self._calls.empty():
                    self._calls.get()[1].set_exception(GroupError("the group has been left"))

    def _leave(self) -> None:
        """Close the consumer, having left the group."""
        consumer = self._consumer
        # librdkafka closes a cooperative member that has no partitions without telling the group. It does tell it when
        # such a member unsubscribes, and then forgets its id. (A static member is to stay; one of the consumer protocol
        # tells the group as it closes, and keeps its id.)
        kafka = self._settings.supervisor
        cooperative = self._incremental and kafka.group_protocol is GroupProtocol.CLASSIC
        if cooperative and not kafka.group_instance_id:
            with contextlib.suppress(KafkaException):
                consumer.unsubscribe()
                while consumer.memberid() and not self._leave_by.passed:
                    self._serve_calls(_POLL_EVERY_SECONDS)
                    consumer.poll(0)
        consumer.close()

    def _serve_calls(self, wait_seconds: float) -> None:
        """Wait for a call and run it, and those behind it."""
        try:
            function, future = self._calls.get(timeout=wait_seconds)
            while True:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(function(self._consumer))
                    except Exception as error:  # noqa: BLE001 - it is the caller's
                        future.set_exception(error)
                function, future = self._calls.get_nowait()
        except queue.Empty:
            pass

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
        deadline = time.monotonic() + budget
        while not drained.is_set():
            self._serve_calls(0.005)  # the final commit is among them
            if time.monotonic() >= deadline:
                self._log.error("revocation_overdue", f"partitions are given up undrained after {budget:.0f} s")
                return

    def _on_lost(self, _consumer: Consumer, partitions: Sequence[KafkaTopicPartition]) -> None:
        self._tell(self._events.on_lost, _names(partitions))

    def _on_error(self, error: KafkaError) -> None:
        self._tell(self._on_group_error, error)

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop has ended: nobody is left to tell, or to wait for
            for argument in arguments:
                if callable(argument):
                    argument()


def _names(partitions: Sequence[KafkaTopicPartition]) -> list[TopicPartition]:
    return [TopicPartition(partition.topic, partition.partition) for partition in partitions]
