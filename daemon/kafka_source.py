"""KafkaSource: the same engine from a program of one's own.

The program's process reads the rings itself. Everything else, the group's membership and the workers, is in processes
that its engine starts and that end with the program, however it ends.
"""

import os
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar, overload

import msgspec

from kafkasrcd import errors
from kafkasrcd.daemon.configuration_rules import validate
from kafkasrcd.daemon.source_config import PROGRAM, KafkaSourceConfig, settings_of
from kafkasrcd.daemon.source_metrics import KafkaSourceMetrics, lag_of, metrics_of
from kafkasrcd.daemon.state_backends import MemoryStateBackend, StateBackend
from kafkasrcd.errors import AssignmentLost, GroupError, KafkasrcdError, WorkerBootError
from kafkasrcd.message import Message
from kafkasrcd.settings import CommitStrategy
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.control import Close, ControlChannel, Ended, OpenSource, Record, Seek
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.handler_target import HandlerTarget
from kafkasrcd.workers.payload import payload_decoder
from kafkasrcd.workers.source_reader import SourceReader

T = TypeVar("T")

_BOOT_SECONDS: Final = 60.0
_COMMIT_SECONDS: Final = 30.0
_NOT_FOR_IT: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
"""What systemd tells the program is not for its engine."""
_CLOSE_GRACE_SECONDS: Final = 15.0
"""Beyond the drain: to leave the group, and to end."""

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
        if config.commit_strategy is CommitStrategy.ON_CHECKPOINT:
            raise errors.ConfigurationError(
                "commit_strategy on_checkpoint: a KafkaSource has no transactions yet; take periodic or manual, or the "
                "daemon (kafkasrcd start)"
            )
        self._is_auto = config.commit_strategy is CommitStrategy.AUTO
        self._backend = state_backend or MemoryStateBackend()
        self._topics = list(config.topics)
        self._target = HandlerTarget(PROGRAM, _never, False, False, payload_type, payload_decoder(payload_type))
        self._listeners = (on_assigned, on_revoked, on_lost)
        self._reader: SourceReader | None = None
        self._engine: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._pid = os.getpid()
        self._using = threading.Lock()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._on_its_way = False
        """The message in hand is not in ``start``'s channel yet."""
        self._closed = False
        self._commits = 0
        self._log = EventLog("source")
        if self._topics:
            validate(settings_of(config, self._topics, self._backend.url))

    # ---- the seed's methods --------------------------------------------------------------------------------------

    def subscribe(self, topics: Iterable[str]) -> None:
        """Have the records of these topics from now on; blocks until the engine is there, some tenths of a second.

        Raises ConfigurationError, WorkerBootError.
        """
        with self._mine():
            topics = list(topics)
            if self._reader is not None and topics == self._topics:
                return
            validate(settings_of(self._config, topics, self._backend.url))
            self._end_engine()
            self._topics = topics
            self._begin_engine()

    def poll(self, timeout: float | None = None) -> Message[T] | None:
        """The next message; None after ``timeout`` seconds (``poll_timeout_ms`` where it is unset) without one, and
        once the source is closed.

        Raises what ended the engine: GroupError, StoreError, ConfigurationError, WorkerError.
        """
        with self._mine():
            reader = self._ready()
            reader.finish()
            message = reader.take()
            if message is None and self._wait(reader, self._seconds(timeout)):
                message = reader.take()
            if self._is_auto:
                reader.finish()
            return message

    def poll_batch(self, max_messages: int = 500, timeout: float | None = None) -> list[Message[T]]:
        """As ``poll``, as many as are there; empty where ``poll`` would give None."""
        with self._mine():
            reader = self._ready()
            reader.finish()
            reader.receive()
            messages = reader.take_many(max_messages)
            if not messages and self._wait(reader, self._seconds(timeout)):
                messages = reader.take_many(max_messages)
            if self._is_auto:
                reader.finish()
            return messages

    def commit(self) -> None:
        """Commit what was polled so far, also the last message; blocks until the store and Kafka have it.

        Raises GroupError or StoreUnavailable where they do not take it; what was committed before stays.
        """
        with self._mine():
            reader = self._ready()
            reader.finish()
            reader.commit()
            self._record(reader)

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Go on with a partition at ``offset``: the next message of it is from there. Does not wait for it.

        Raises AssignmentLost where the partition is not assigned to this source.
        """
        with self._mine():
            reader = self._ready()
            reader.finish()
            reader.receive()
            if not reader.stand_still(TopicPartition(topic, partition)):
                raise AssignmentLost(f"{topic}[{partition}] is not assigned to this source: it cannot be moved")
            reader.channel.send(Seek(topic=topic, partition=partition, offset=offset))

    def close(self) -> None:
        """Commit what was polled, leave the group, and end the engine; again is a no-op. From any thread: a ``poll``
        that waits returns None."""
        self._close(finish=True)

    def start(self, channel: Channel) -> None:
        """Put every message into ``channel`` until ``close`` is called from elsewhere; blocks.

        Commits as the strategy says. An error that may pass is tried again ``max_retries`` times in a row, with
        backoff; then it is raised. A message counts as processed once ``channel`` has taken it and the next one is
        asked for.
        """
        failures = 0
        while not self._closing:
            try:
                message = self.poll()
            except (GroupError, errors.StoreError, errors.WorkerError) as error:
                failures += 1
                if failures > (3 if self._config.max_retries is None else self._config.max_retries):
                    raise
                self._log.warning("source_retries", f"the source starts again: {error}", attempt=failures)
                self._sleep(self._backoff_seconds(failures))
                continue
            failures = 0
            if message is not None:
                self._on_its_way = True
                try:
                    self._put(channel, message)
                except _NotTaken:
                    return
                self._on_its_way = False

    def metrics(self) -> KafkaSourceMetrics:
        """A snapshot; from any thread."""
        reader = self._reader
        return metrics_of({} if reader is None else reader.counts(), self._status())

    def get_lag(self) -> dict[int, int]:
        """Records between what is processed and the end, by partition number; from any thread."""
        return lag_of(self._status())

    # ---- what Kafka's own clients have ---------------------------------------------------------------------------

    def assignment(self) -> list[TopicPartition]:
        """The partitions that this source has now, as of its last call."""
        reader = self._reader
        return [] if reader is None else reader.assignment()

    def pause(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Have no messages of these before ``resume``; they stay assigned."""
        with self._mine():
            self._ready().pause([TopicPartition(*name) for name in partitions])

    def resume(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Have messages of these again."""
        with self._mine():
            self._ready().resume([TopicPartition(*name) for name in partitions])

    def __enter__(self) -> "KafkaSource[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Closes it; where the block raised, the message in hand does not count as processed."""
        self._close(finish=kind is None)

    def __iter__(self) -> Iterator[Message[T]]:
        """Messages until it is closed."""
        while not self._closing:
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
            if reader.ended is not None:
                self._raise_ended(reader.ended)
            if reader.has_record():
                return True
            left = deadline - time.monotonic()
            if left <= 0 or self._closing:
                return False
            if reader.announce():
                poller.poll(min(left, 1.0) * 1000)
            reader.awake()

    def _record(self, reader: SourceReader) -> None:
        self._commits += 1
        number = self._commits
        reader.channel.send(Record(number=number))
        poller = select.poll()
        poller.register(reader.channel.fileno(), select.POLLIN)
        deadline = time.monotonic() + _COMMIT_SECONDS
        while number not in reader.recorded:
            reader.receive()
            if reader.ended is not None:
                self._raise_ended(reader.ended)
            if number not in reader.recorded:
                if time.monotonic() > deadline:
                    raise GroupError(f"nothing is committed within {_COMMIT_SECONDS:.0f} s: no broker answers")
                poller.poll(1000)
        problem = reader.recorded.pop(number)
        if problem:
            raise GroupError(f"not committed: {problem}")

    def _put(self, channel: Channel, message: Message[T]) -> None:
        if not isinstance(channel, queue.Queue):
            channel.put(message)
            return
        while not self._closing:
            try:
                channel.put(message, timeout=0.5)  # who reads it may be gone, and close must be heard
                return
            except queue.Full:
                continue
        raise _NotTaken

    def _sleep(self, seconds: float) -> None:
        select.select([self._stop], [], [], seconds)

    def _seconds(self, timeout: float | None) -> float:
        return (self._config.poll_timeout_ms or 1_000) / 1000 if timeout is None else timeout

    def _backoff_seconds(self, failures: int) -> float:
        return float(min((self._config.retry_backoff_ms or 100) * 2 ** min(failures - 1, 20), 10_000) / 1000)

    # ---- the engine ----------------------------------------------------------------------------------------------

    def _mine(self) -> "_OneThread":
        if self._pid != os.getpid():
            raise KafkasrcdError(
                "this KafkaSource was made before a fork: make one in the process that uses it; only one reads a ring"
            )
        return _OneThread(self._using)

    def _ready(self) -> SourceReader:
        if self._closed:
            raise KafkasrcdError("this KafkaSource is closed")
        if self._reader is None:
            if not self._topics:
                raise errors.ConfigurationError("no topics: name them in KafkaSourceConfig, or call subscribe(topics)")
            self._begin_engine()
        if self._reader is None:
            raise WorkerBootError("the source's engine is not there")
        return self._reader

    def _begin_engine(self) -> None:
        settings = settings_of(self._config, self._topics, self._backend.url)
        self._folder = Path(tempfile.mkdtemp(prefix="kafkasrcd-source-"))
        ours, theirs = ControlChannel.pair()
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_IT}
        with theirs:
            # -P: a module in the working directory must not stand in for one of the library.
            command = [sys.executable, "-P", "-m", "kafkasrcd.daemon.source_engine"]
            self._engine = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C is for the program
            )
        ours.send(
            OpenSource(
                settings=msgspec.json.encode(settings),
                base_directory=os.getcwd(),
                store_url=self._backend.url,
                control_path=str(self._folder / "control.sock"),
            )
        )
        self._reader = reader = SourceReader(settings, self._target, ours, self._bound, self._unbound)
        poller = select.poll()
        poller.register(ours.fileno(), select.POLLIN)
        deadline = time.monotonic() + _BOOT_SECONDS
        while reader.bell < 0:
            reader.receive()
            if reader.ended is not None:
                self._raise_ended(reader.ended)
            if reader.bell < 0:
                if time.monotonic() > deadline:
                    raise WorkerBootError(f"the source's engine has not started within {_BOOT_SECONDS:.0f} s")
                poller.poll(1000)

    def _end_engine(self) -> None:
        """Have it drain and end; what it says meanwhile is heard, since it may wait for that."""
        reader, engine = self._reader, self._engine
        self._reader = self._engine = None
        if reader is not None and engine is not None:
            drain_seconds = self._config.supervisor.drain_timeout_seconds
            deadline = time.monotonic() + drain_seconds + _CLOSE_GRACE_SECONDS
            if reader.ended is None:
                try:
                    reader.channel.send(Close())
                except OSError:
                    pass  # it is gone
            poller = select.poll()
            poller.register(reader.channel.fileno(), select.POLLIN)
            while reader.ended is None and time.monotonic() < deadline:
                reader.receive()
                if reader.ended is None:
                    poller.poll(1000)
            reader.close()
            try:
                engine.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                engine.kill()
                engine.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _close(self, *, finish: bool) -> None:
        if self._pid != os.getpid():
            return
        self._closing = True
        if not self._closed:
            os.eventfd_write(self._stop, 1)
        with self._using:
            if self._closed:
                return
            self._closed = True
            if self._reader is not None and finish and not self._on_its_way:
                self._reader.finish()
                if self._config.commit_strategy is not CommitStrategy.MANUAL:
                    self._reader.commit()
            elif self._reader is not None:
                self._reader.drop_hand()
            self._end_engine()
            os.close(self._stop)

    def _raise_ended(self, ended: Ended) -> None:
        """What ended the engine; the next call begins another one."""
        self._end_engine()
        if self._closing and not ended.error:
            return
        kind = getattr(errors, ended.error, KafkasrcdError) if ended.error else WorkerBootError
        raise kind(ended.reason or "the source's engine has ended")

    def _status(self) -> Any:
        from kafkasrcd.daemon.control_client import ControlClient

        folder = self._folder
        if folder is None:
            return None
        try:
            client = ControlClient(folder / "control.sock")
        except KafkasrcdError:
            return None
        try:
            return client.status()
        except KafkasrcdError:
            return None
        finally:
            client.close()

    def _bound(self, name: TopicPartition) -> None:
        if self._listeners[0] is not None:
            self._listeners[0]([name])

    def _unbound(self, name: TopicPartition, lost: bool) -> None:
        listener = self._listeners[2 if lost else 1]
        if listener is not None:
            listener([name])


class _OneThread:
    """Raises where another thread is in the source already: two would take each other's messages for processed."""

    def __init__(self, lock: threading.Lock) -> None:
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
