"""KafkaSource: the same engine from a program of one's own.

The program's process reads the rings itself. Everything else, the group's membership and the workers, is in processes
that its engine starts and that end with the program, however it ends.
"""

import os
import queue
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar, overload

from kafkasrcd.daemon.configuration_rules import validate
from kafkasrcd.daemon.source_config import PROGRAM, KafkaSourceConfig, settings_of
from kafkasrcd.daemon.source_metrics import KafkaSourceMetrics, lag_of, merged, metrics_of
from kafkasrcd.daemon.source_process import SourceProcess
from kafkasrcd.daemon.state_backends import MemoryStateBackend, SqlStateBackend, StateBackend
from kafkasrcd.errors import AssignmentLost, ConfigurationError, GroupError, KafkasrcdError, StoreError, WorkerError
from kafkasrcd.message import Message
from kafkasrcd.settings import CommitStrategy, Settings
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.control import Record, Seek
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.handler_target import HandlerTarget
from kafkasrcd.workers.payload import payload_decoder
from kafkasrcd.workers.source_reader import Counts, SourceReader

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from kafkasrcd.daemon.source_transactions import SourceTransactions

T = TypeVar("T")

COMMIT_SECONDS: Final = 30.0

Partitions = Sequence[TopicPartition]


class Channel(Protocol):
    """What ``start`` puts messages into: a queue.Queue, or anything with ``put``."""

    def put(self, item: Any, /) -> object: ...


class KafkaSource(Generic[T]):
    """A typed, parallel source of the records of Kafka topics.

    ``poll``, ``commit``, ``seek`` and what else moves it are called by one thread at a time; ``metrics``, ``get_lag``
    and ``close`` by any. A polled message counts as processed with the next poll, or commit, or close, as in Kafka's
    own clients. Nothing is started before it is subscribed, or polled for the first time.
    """

    @overload
    def __init__(
        self: "KafkaSource[Any]",
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
        """Raises ConfigurationError for settings that cannot be used; starts and asks nothing.

        ``payload_type``: what each value is made to be; without one, Python's own objects. The listeners are told from
        within calls of this source: ``on_assigned`` before the first record of a partition, ``on_revoked`` and
        ``on_lost`` (another member may be at it already) when there will be no more.
        """
        self._config = config
        self._in_transactions = config.commit_strategy is CommitStrategy.ON_CHECKPOINT
        if self._in_transactions and not isinstance(state_backend, SqlStateBackend):
            raise ConfigurationError(
                "commit_strategy on_checkpoint commits offsets in the database of your effects: give "
                "state_backend=SqlStateBackend(url)"
            )
        self._transactions: SourceTransactions | None = None
        self._is_auto = config.commit_strategy is CommitStrategy.AUTO
        self._backend = state_backend or MemoryStateBackend()
        self._topics = list(config.topics)
        self._target = HandlerTarget(PROGRAM, _never, False, False, payload_type, payload_decoder(payload_type))
        self._listeners = (on_assigned, on_revoked, on_lost)
        self._engine: SourceProcess | None = None
        self._before: dict[TopicPartition, Counts] = {}
        """What earlier engines have counted."""
        self._pid = os.getpid()
        self._using = threading.RLock()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.closing = False
        self._on_its_way = False
        """The message in hand is not in ``start``'s channel yet."""
        self._closed = False
        self._commits = 0
        self._log = EventLog("source")
        if self._topics:
            validate(self._settings(self._topics))

    # ---- the seed's methods --------------------------------------------------------------------------------------

    def subscribe(self, topics: Iterable[str]) -> None:
        """Have the records of these topics from now on; blocks until the engine is there, some tenths of a second.

        Raises ConfigurationError, WorkerBootError.
        """
        with self.mine():
            topics = list(topics)
            if self._engine is not None and topics == self._topics:
                return
            validate(self._settings(topics))
            self._end_engine()
            self._topics = topics
            self.ready()

    def poll(self, timeout: float | None = None) -> Message[T] | None:
        """The next message; None after ``timeout`` seconds (``poll_timeout_ms`` where it is unset) without one, and
        once the source is closed.

        Raises what ended the engine: GroupError, StoreError, ConfigurationError, WorkerError.
        """
        with self.mine():
            reader = self.ready()
            reader.finish()
            message = reader.take()
            if message is None and self._wait(reader, self.seconds(timeout)):
                message = reader.take()
            self.polled(reader)
            return message

    def poll_batch(self, max_messages: int = 100, timeout: float | None = None) -> list[Message[T]]:
        """As ``poll``, as many as are there; empty where ``poll`` would give None."""
        with self.mine():
            reader = self.ready()
            reader.finish()
            reader.receive()
            messages = reader.take_many(max_messages)
            if not messages and self._wait(reader, self.seconds(timeout)):
                messages = reader.take_many(max_messages)
            self.polled(reader)
            return messages

    def commit(self) -> None:
        """Commit what was polled so far, also the last message; blocks until the store and Kafka have it.

        Raises GroupError or StoreUnavailable where they do not take it; what was committed before stays.
        """
        with self.mine():
            reader = self.ready()
            self._record(reader)

    @contextmanager
    def checkpoint(self) -> "Iterator[Connection]":
        """With ``on_checkpoint``: what the block does on its SQLAlchemy connection, and what was polled since the last
        checkpoint (also within the block), is committed together at the end of the block.

        Where the block raises, or this cannot be committed, nothing of it is, and what was polled since the last one is
        polled again. Between two checkpoints no more is polled than a ring holds (``supervisor.ring_bytes``, for each
        partition): ``poll`` gives None then. Raises AssignmentLost where a partition of it has gone to another member
        meanwhile, StoreUnavailable where the database does not take it now.
        """
        if not self._in_transactions:
            raise KafkasrcdError("checkpoint() is for commit_strategy on_checkpoint")
        with self.mine():
            reader = self.ready()
            transactions = self._begin_transactions()
        try:
            with transactions.scope() as connection:
                yield connection
            with self.mine():
                reader.finish()
                reader.receive()
                self.raise_if_ended()
                transactions.commit(reader)
        except BaseException as error:
            with self.mine():
                self._undo(reader, transactions, error)
            raise

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Go on with a partition at ``offset``: the next message of it is from there. Does not wait for it.

        Raises AssignmentLost where the partition is not assigned to this source.
        """
        with self.mine():
            reader = self.ready()
            reader.finish()
            reader.receive()
            if not reader.stand_still(TopicPartition(topic, partition)):
                raise AssignmentLost(f"{topic}[{partition}] is not assigned to this source: it cannot be moved")
            reader.tell(Seek(topic=topic, partition=partition, offset=offset))

    def close(self) -> None:
        """Commit what was polled, leave the group, and end the engine; again is a no-op. From any thread: a ``poll``
        that waits returns None."""
        self.end(finish=True)

    def start(self, channel: Channel) -> None:
        """Put every message into ``channel`` until ``close`` is called from elsewhere; blocks.

        Commits as the strategy says. An error that may pass is tried again ``max_retries`` times in a row, with
        backoff; then it is raised. A message counts as processed once ``channel`` has taken it and the next one is
        asked for.
        """
        failures = 0
        while not self.closing:
            try:
                message = self.poll()
            except (GroupError, StoreError, WorkerError) as error:
                failures += 1
                if failures > self.max_retries:
                    raise
                self._log.warning("source_retries", f"the source starts again: {error}", attempt=failures)
                self._sleep(self.backoff_seconds(failures))
                continue
            failures = 0
            if message is not None:
                try:
                    with self.on_its_way():
                        self._put(channel, message)
                except _NotTaken:
                    return

    def metrics(self) -> KafkaSourceMetrics:
        """A snapshot; from any thread."""
        engine = self._engine
        now = {} if engine is None else engine.reader.counts()
        return metrics_of(merged(self._before, now), None if engine is None else engine.status())

    def get_lag(self) -> dict[int, int]:
        """Records between what is processed and the end, by partition number; from any thread."""
        engine = self._engine
        return lag_of(None if engine is None else engine.status())

    # ---- what Kafka's own clients have ---------------------------------------------------------------------------

    def assignment(self) -> list[TopicPartition]:
        """The partitions that this source has now, as of its last call."""
        reader = self.reader
        return [] if reader is None else reader.assignment()

    def pause(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Have no messages of these before ``resume``; they stay assigned."""
        with self.mine():
            self.ready().pause([TopicPartition(*name) for name in partitions])

    def resume(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Have messages of these again."""
        with self.mine():
            self.ready().resume([TopicPartition(*name) for name in partitions])

    def __enter__(self) -> "KafkaSource[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Closes it; where the block raised, the message in hand does not count as processed."""
        self.end(finish=kind is None)

    def __iter__(self) -> Iterator[Message[T]]:
        """Messages until it is closed."""
        while not self.closing:
            message = self.poll()
            if message is not None:
                yield message

    # ---- waiting -------------------------------------------------------------------------------------------------

    def _wait(self, reader: SourceReader, seconds: float) -> bool:
        """Until there is a record to take; False after ``seconds``, or once the source is closing."""
        deadline = time.monotonic() + seconds
        poller = select.poll()
        for fd in (reader.bell, reader.channel.fileno(), self._stop):
            poller.register(fd, select.POLLIN)
        while True:
            reader.receive()
            self.raise_if_ended()
            if reader.has_record():
                return True
            left = deadline - time.monotonic()
            if left <= 0 or self.closing:
                return False
            if reader.announce():
                poller.poll(min(left, 1.0) * 1000)
            reader.awake()

    def _record(self, reader: SourceReader) -> None:
        number = self.ask_to_record(reader)
        deadline = time.monotonic() + COMMIT_SECONDS
        while not self.is_recorded(reader, number):
            if time.monotonic() > deadline:
                raise GroupError(f"nothing is committed within {COMMIT_SECONDS:.0f} s: no broker answers")
            select.select([reader.channel], [], [], 1.0)

    # ---- what its asyncio counterpart uses, too ------------------------------------------------------------------

    def polled(self, reader: SourceReader) -> None:
        """After a poll: with ``auto`` what it took counts as processed at once."""
        if self._is_auto:
            reader.finish()

    def ask_to_record(self, reader: SourceReader) -> int:
        """Have the engine commit what was polled; the number of its answer."""
        if self._in_transactions:
            raise KafkasrcdError("with commit_strategy on_checkpoint, checkpoint() commits")
        reader.finish()
        reader.commit()
        self._commits += 1
        reader.tell(Record(number=self._commits))
        return self._commits

    def is_recorded(self, reader: SourceReader, number: int) -> bool:
        """Whether there is an answer; raises GroupError where it says that nothing is committed."""
        reader.receive()
        self.raise_if_ended()
        if number not in reader.recorded:
            return False
        problem = reader.recorded.pop(number)
        if problem:
            raise GroupError(f"not committed: {problem}")
        return True

    def raise_if_ended(self) -> None:
        """Raises what has ended the engine; the next call begins another one."""
        engine = self._engine
        if engine is not None and engine.reader.ended is not None:
            self._end_engine()
            engine.raise_if_ended()

    @contextmanager
    def on_its_way(self) -> Iterator[None]:
        """The message in hand is being put into ``start``'s channel: it does not count before that has it."""
        self._on_its_way = True
        yield
        self._on_its_way = False

    @property
    def max_retries(self) -> int:
        """Of ``start``, in a row."""
        return 3 if self._config.max_retries is None else self._config.max_retries

    def _begin_transactions(self) -> "SourceTransactions":
        if self._transactions is None:
            # Here, so that programs without transactions do not load SQLAlchemy (0.2 s, 20 MB).
            from kafkasrcd.daemon.source_transactions import SourceTransactions

            self._transactions = SourceTransactions(self._settings(self._topics))
        return self._transactions

    def _undo(self, reader: SourceReader, transactions: "SourceTransactions", error: BaseException) -> None:
        from kafkasrcd.storage.transaction import CommitUnknown

        transactions.rollback()
        if isinstance(error, CommitUnknown):
            self._end_engine()  # to claim anew: the store's row says then where to go on
        elif self.reader is reader:
            reader.rewind()

    def _put(self, channel: Channel, message: Message[T]) -> None:
        if not isinstance(channel, queue.Queue):
            channel.put(message)
            return
        while not self.closing:
            try:
                channel.put(message, timeout=0.5)  # who reads it may be gone, and close must be heard
                return
            except queue.Full:
                continue
        raise _NotTaken

    def _sleep(self, seconds: float) -> None:
        with suppress(OSError, ValueError):  # closed meanwhile
            select.select([self._stop], [], [], seconds)

    def seconds(self, timeout: float | None) -> float:
        """How long a poll waits."""
        return (self._config.poll_timeout_ms or 1_000) / 1000 if timeout is None else timeout

    def backoff_seconds(self, failures: int) -> float:
        """Before a further attempt, after so many failures in a row."""
        return float(min((self._config.retry_backoff_ms or 100) * 2 ** min(failures - 1, 20), 10_000) / 1000)

    # ---- the engine ----------------------------------------------------------------------------------------------

    def mine(self) -> "_OneThread":
        """To be held around every use."""
        if self._pid != os.getpid():
            raise KafkasrcdError(
                "this KafkaSource was made before a fork: make one in the process that uses it; only one reads a ring"
            )
        return _OneThread(self._using)

    def ready(self) -> SourceReader:
        """The reader, of an engine that is there; blocks where it is not yet."""
        if self._closed:
            raise KafkasrcdError("this KafkaSource is closed")
        if self._engine is None:
            if not self._topics:
                raise ConfigurationError("no topics: name them in KafkaSourceConfig, or call subscribe(topics)")
            self._engine = SourceProcess(self._settings(self._topics), self._target, self._bound, self._unbound)
        return self._engine.reader

    @property
    def reader(self) -> SourceReader | None:
        """The reader; None where there is no engine."""
        return None if self._engine is None else self._engine.reader

    def _settings(self, topics: list[str]) -> Settings:
        return settings_of(self._config, topics, self._backend.url)

    def _end_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.end()
            self._before = merged(self._before, engine.reader.counts())

    def end(self, *, finish: bool) -> None:
        """As ``close``; where it is not to ``finish``, what is in hand does not count as processed."""
        if self._pid != os.getpid():
            return
        self.closing = True
        if not self._closed:
            os.eventfd_write(self._stop, 1)
        with self._using:
            if self._closed:
                return
            self._closed = True
            if self._transactions is not None:
                self._transactions.close()
            if self._engine is not None:
                reader = self._engine.reader
                if self._in_transactions:
                    reader.rewind()  # nothing of it is committed without a checkpoint
                elif finish and not self._on_its_way:
                    reader.finish()
                else:
                    reader.drop_hand()
            self._end_engine()
            os.close(self._stop)

    def _bound(self, name: TopicPartition) -> None:
        if self._listeners[0] is not None:
            self._listeners[0]([name])

    def _unbound(self, name: TopicPartition, lost: bool) -> None:
        listener = self._listeners[2 if lost else 1]
        if listener is not None:
            listener([name])


class _OneThread:
    """Raises where another thread is in the source already: two would take each other's messages for processed. The
    same thread may be, in a listener."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise KafkasrcdError(
                "another thread is using this KafkaSource: only metrics, get_lag and close may be called"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _NotTaken(Exception):
    """The channel was full until the source was closed."""


def _never(_: object) -> None:
    """A source has no handler."""
