"""The supervisor: puts the parts together, runs the loop, and ends it all in order."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from confluent_kafka import KafkaError

from kafkasrcd.daemon.assignment import Assignment
from kafkasrcd.daemon.breaker import Breaker
from kafkasrcd.daemon.broker_watch import BrokerWatch
from kafkasrcd.daemon.child_processes import ForkServer
from kafkasrcd.daemon.control_server import ControlServer
from kafkasrcd.daemon.due_letters import DueLetters
from kafkasrcd.daemon.handler_pool import HandlerPool
from kafkasrcd.daemon.lease_keeper import LeaseKeeper
from kafkasrcd.daemon.lifecycle import State
from kafkasrcd.daemon.membership import Membership
from kafkasrcd.daemon.notify import Notifier
from kafkasrcd.daemon.one_host import check_one_host
from kafkasrcd.daemon.open_letters import OpenLetters
from kafkasrcd.daemon.places import schema_directory
from kafkasrcd.daemon.recorder import Recorder
from kafkasrcd.daemon.status import Status
from kafkasrcd.daemon.status_report import (
    ProcessUsage,
    handler_statuses,
    partition_statuses,
    running_pids,
)
from kafkasrcd.errors import GroupError, StoreUnavailable
from kafkasrcd.settings import CommitStrategy, Settings
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.storage.opening import open_store
from kafkasrcd.version import installed_version
from kafkasrcd.workers.deadline import Deadline
from kafkasrcd.workers.event_log import EventLog
from kafkasrcd.workers.failure_policy import failure_policy
from kafkasrcd.workers.kafka_settings import session_timeout_ms
from kafkasrcd.workers.preparing import modules_of
from kafkasrcd.workers.spread import layout_of

_TURN_SECONDS: Final = 0.1
"""One turn of the loop: leases are renewed this often, a fiftieth of the default lease."""
_LEAVE_SECONDS: Final = 5.0
"""To leave the group and to end idle handlers: beyond the drain, and inside systemd's TimeoutStopSec."""
_REJOIN_SECONDS: Final = 10.0
"""Beyond the session timeout, for a member that is out of the group to be in it again."""
_SUSPICIOUS_SECONDS: Final = 2.0
"""Outside of the group: a member of one whose broker answers is back sooner."""
_ENDS_MEMBERSHIP: Final = (KafkaError._FATAL, KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError.FENCED_INSTANCE_ID)
"""``_FATAL`` is how a callback is told of any error that is fatal, as of another member under this one's name."""
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_STORE_RETRY_SECONDS: Final = (0.2, 5.0)
_START_TURN_SECONDS: Final = 5.0
_START_EXTENSION_SECONDS: Final = 60.0
"""While it waits for a broker, handlers or the group, systemd is told so every turn, and may give up on a daemon that
has not said so for this long. A broker may be away for hours; a loop that hangs is started again."""


class DaemonState(StrEnum):
    """The daemon as a whole."""

    STARTING = "starting"
    JOINING = "joining"
    RUNNING = "running"
    STOPPING = "stopping"


class Supervisor:
    """One run of the daemon, from start to end."""

    def __init__(
        self,
        settings: Settings,
        base_directory: Path,
        store_url: str,
        control_path: Path,
        make_pool: Callable[..., HandlerPool] = HandlerPool,
    ) -> None:
        """``make_pool``: of who handles the records, where these are no handler processes."""
        self._settings = settings
        self._base_directory = base_directory
        self._store_url = store_url
        self._control_path = control_path
        self._state = DaemonState.STARTING
        self._started_ms = int(time.time() * 1000)
        self._stop_asked = asyncio.Event()
        self._drain_deadline: Deadline | None = None
        self._fatal: str | None = None
        self._topic_problem = ""
        self._outside_from = 0.0
        """When a broker was last away: before that nobody could be a member."""
        self._usage = ProcessUsage()
        self._log = EventLog("supervisor")
        self._notifier = Notifier(os.environ)
        self._fork_server = ForkServer(modules_of(settings))
        processes = settings.handler.processes or len(os.sched_getaffinity(0))
        layout = layout_of(settings.handler.ordering, processes)
        self._recorder = Recorder(settings, f"{socket.gethostname()}:{os.getpid()}", layout)
        self._assignment = Assignment(settings, self._fork_server, self._recorder, base_directory, schema_directory())
        self._handlers = self._assignment.handlers = make_pool(
            settings, layout, base_directory, self._fork_server, store_url, self._assignment, schema_directory()
        )
        self._due = self._handlers.letters = DueLetters(
            settings, self._assignment.partitions, self._handlers, self._recorder.due_letters
        )
        self._letters = OpenLetters(settings, self._recorder.count_letters)
        self._breaker = Breaker(settings, self._assignment.partitions, self._assignment.pauses.trip)
        self._broker = BrokerWatch(settings.brokers, self._recorder)
        self._control = ControlServer(control_path, self.status, self.stop)

    async def run(self) -> None:
        """Until told to stop, or something cannot be mended by waiting.

        Raises ConfigurationError where a handler, the store or the control socket cannot be used, before the group is
        joined; GroupError where the group will not have this member.
        """
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._decline_reload)
        self._log.info(
            "starting", f"kafkasrcd {installed_version()} starts for group {self._settings.group_id}", pid=os.getpid()
        )
        if self._settings.commit_strategy is CommitStrategy.AUTO:
            self._log.warning(
                "auto_commits_early",
                "commit_strategy auto commits what is handed off: a crash of this daemon or host loses up to "
                f"{self._settings.supervisor.ring_bytes >> 10} KiB of records in each partition's ring, unhandled; "
                "periodic loses none",
            )
        if failure_policy(self._settings) is not self._settings.handler.on_failure:
            self._log.warning(
                "no_place_for_dead_letters",
                "a record that keeps failing stops its partition: memory:// keeps no dead letters, and no "
                "handler.dead_letter_topic is named",
            )
        membership: Membership | None = None
        try:
            await self._control.start()
            settings = self._settings
            await self._unless_stopped(self._open_store())
            if not self._stop_asked.is_set():
                self._fork_server.start()
                await self._unless_stopped(self._handlers.start())
            if not self._stop_asked.is_set():
                membership = Membership(settings, self._assignment, self.on_group_error, self.on_membership_ended)
                self._recorder.connect(membership)
                self._state = DaemonState.JOINING
                self._notifier.status("waiting for a broker")
                await self._unless_stopped(self._broker.until_reachable())
            if membership is not None and not self._stop_asked.is_set():
                await asyncio.to_thread(check_one_host, settings, self._store_url)
                self._recorder.look_around()
                membership.join_group()
                await self._serve(membership)
        finally:
            await self._end(membership)
        if self._fatal is not None:
            raise GroupError(self._fatal)

    def stop(self) -> None:
        """Drain and end; a second call ends the drain now: what is processed by then is still committed."""
        if self._stop_asked.is_set():
            self._log.warning("stop_now", "told to stop again: handlers are not waited for any more")
            if self._drain_deadline is not None:
                self._drain_deadline.shorten(0.0)
        self._stop_asked.set()

    async def record_now(self) -> str:
        """Record what is processed, without waiting for the interval; why it is not, or empty."""
        mine = list(self._assignment.partitions.values())
        if await self._assignment.recording.record_finally(mine, Deadline(0.0)):
            return ""
        return self._assignment.recording.store_problem or "the group has not taken all of it"

    def seek(self, name: TopicPartition, offset: int) -> bool:
        """Go on with a partition at ``offset``, now: what is in its ring is dropped. False where it is not ours."""
        return self._assignment.seek(name, offset)

    def abandon(self) -> None:
        """Who handles the records is gone, with what was in their hands: record what is processed, and end."""
        for partition in self._assignment.partitions.values():
            for slot in partition.memory.slots if partition.memory is not None else ():
                slot.handler_ended()
        self.stop()

    def _decline_reload(self) -> None:
        self._log.warning("reload_declined", "SIGHUP changes nothing: restart kafkasrcd to load new code or settings")

    # ---- the loop ----------------------------------------------------------------------------------------------

    async def _serve(self, membership: Membership) -> None:
        lease = LeaseKeeper(self._settings.supervisor.lease_seconds, self._assignment, membership)
        recording = self._assignment.recording
        sample_due = watchdog_due = 0.0
        commits: set[asyncio.Task[None]] = set()
        while not self._stop_asked.is_set():
            lease.renew()
            now = time.monotonic()
            interval = self._notifier.watchdog_interval_seconds
            if interval is not None and now >= watchdog_due:
                watchdog_due = now + interval
                self._notifier.watchdog()
            if recording.is_due:
                commit = asyncio.ensure_future(recording.record_processed())
                commits.add(commit)
                commit.add_done_callback(commits.discard)
            self._breaker.look(now)
            if now >= sample_due:
                sample_due = now + 1.0
                self._watch_membership(membership)
                for partition in self._assignment.partitions.values():
                    partition.sample_rates(now)
                self._assignment.watch(now)
                self._handlers.watch(now)
                self._due.watch(store_answers=not recording.store_problem)
                self._assignment.pauses.watch(store_answers=not recording.store_problem)
                self._letters.watch(now, store_answers=not recording.store_problem)
                self._usage.watch(running_pids(self._assignment, self._handlers))
                self._notifier.status(self._summary())
                if self._state is DaemonState.JOINING:
                    self._notifier.starting(_START_EXTENSION_SECONDS)
            self._note_ready()
            try:
                await asyncio.wait_for(self._stop_asked.wait(), _TURN_SECONDS)
            except TimeoutError:
                pass

    def _note_ready(self) -> None:
        if self._state is DaemonState.JOINING and self._assignment.assigned_once:
            coming = (State.CLAIMING, State.STARTING)
            if all(partition.state not in coming for partition in self._assignment.partitions.values()):
                self._state = DaemonState.RUNNING
                self._notifier.ready()
                self._log.info("ready", f"running, {len(self._assignment.partitions)} partitions assigned")

    async def _open_store(self) -> None:
        """Wait for it where it is away, as for one that goes away later."""
        settings, wait_seconds = self._settings, _STORE_RETRY_SECONDS[0]
        while True:
            try:
                await self._recorder.open(
                    lambda: open_store(
                        self._store_url,
                        settings.group_id,
                        settings.store.busy_timeout_ms,
                        shared_with_effects=settings.commit_strategy is CommitStrategy.ON_CHECKPOINT,
                    )
                )
            except StoreUnavailable as error:
                self._assignment.recording.note_store(error)
                self._notifier.status(f"waiting for the offset store: {error}")
                self._log.repeated("store_unavailable", f"the offset store is waited for: {error}", same=(str(error),))
                await asyncio.sleep(wait_seconds)
                wait_seconds = min(2 * wait_seconds, _STORE_RETRY_SECONDS[1])
            else:
                self._assignment.recording.note_store(None)
                return

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for ``work``, or for the word to stop, whichever comes first."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop_asked.wait())
        while not task.done() and not stop.done():
            self._notifier.starting(_START_EXTENSION_SECONDS)
            await asyncio.wait((task, stop), timeout=_START_TURN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            task.result()
        else:
            task.cancel()

    async def _end(self, membership: Membership | None) -> None:
        """Drain, leave, end the processes, close: in this order, so that nothing works on what is not ours."""
        self._state = DaemonState.STOPPING
        self._assignment.closing = True
        self._notifier.stopping(self._settings.supervisor.drain_timeout_seconds + 3 * _LEAVE_SECONDS)
        self._broker.stop()
        self._letters.stop()
        self._due.stop()
        self._assignment.pauses.stop()
        self._drain_deadline = Deadline(self._settings.supervisor.drain_timeout_seconds)
        if membership is not None:
            draining = f"draining {len(self._assignment.partitions)} partitions"
            self._log.info("stopping", draining)
            self._notifier.status(draining)
        all_recorded = await self._assignment.drain(self._drain_deadline)
        overdue = membership is not None and not await membership.leave(self._drain_deadline, _LEAVE_SECONDS)
        await self._handlers.stop(_LEAVE_SECONDS)
        self._fork_server.stop()
        self._recorder.close()
        if not all_recorded:
            self._log.warning("stopped", "not all that was processed is recorded; it comes again after the next start")
        elif membership is not None:
            self._log.info("stopped", "everything processed is recorded")
        await self._control.stop()
        _ignore_stop_signals()
        if overdue:
            # librdkafka is stuck in leaving, and the interpreter would wait for its thread.
            self._log.error("leave_overdue", "the group is not left in time; ending anyway")
            os._exit(1)

    # ---- the group's errors ------------------------------------------------------------------------------------

    def on_group_error(self, error: KafkaError) -> None:
        """An error of the group's consumer: most heal by themselves, and librdkafka repeats them many times."""
        code = error.code()
        if code in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT):
            self._broker.suspect("" if code == KafkaError._ALL_BROKERS_DOWN else error.str())
        elif code in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC):
            self._topic_problem = f"{error.str()}: create the topic, or correct topics"
            self._log.repeated("topic_missing", self._topic_problem, same=(error.str(),))
        elif error.fatal() or code in _ENDS_MEMBERSHIP:
            self.on_membership_ended(f"{error.name()}: {error.str()}")
        else:
            self._log.repeated("group_error", f"{error.name()}: {error.str()}", same=(code,))

    def on_membership_ended(self, reason: str) -> None:
        """There is no member of the group any more, and waiting would not bring one back."""
        self._fatal = f"the membership of group {self._settings.group_id!r} has ended: {reason}"
        if not self._stop_asked.is_set():
            self.stop()

    def _watch_membership(self, membership: Membership) -> None:
        """End where the group has no such member any more and it does not come back, with a broker that answers."""
        if self._broker.down_since is not None:
            self._outside_from = time.monotonic()
            return
        if membership.outside_seconds > _SUSPICIOUS_SECONDS:
            self._broker.suspect("")  # librdkafka has no word for one that keeps its connections and is silent
        outside = min(membership.outside_seconds, time.monotonic() - self._outside_from)
        if self._assignment.assigned_once and outside > session_timeout_ms(self._settings) / 1000 + _REJOIN_SECONDS:
            self.on_membership_ended(f"it has not come back into the group for {outside:.0f} s; start kafkasrcd again")

    # ---- what an operator sees ---------------------------------------------------------------------------------

    def status(self) -> Status:
        """Everything, now."""
        partitions = partition_statuses(self._assignment, self._usage)
        handlers = handler_statuses(self._handlers, self._usage)
        self._usage.forget_all_but(running_pids(self._assignment, self._handlers))
        return Status(
            kafkasrcd=installed_version(),
            group_id=self._settings.group_id,
            state=self._state.value,
            pid=os.getpid(),
            started_ms=self._started_ms,
            now_ms=int(time.time() * 1000),
            problems=self._problems(),
            rebalances=self._assignment.rebalances,
            total_commits=self._assignment.recording.total_commits,
            partitions=partitions,
            handlers=handlers,
            dead_letters=self._letters.open,
            retrying=self._letters.retrying,
        )

    def _problems(self) -> list[str]:
        problems: list[str] = []
        if self._broker.down_since is not None:
            since = time.strftime("%H:%M:%S", time.localtime(self._broker.down_since))
            problems.append(
                f"no broker answers at {self._settings.brokers} since {since}{self._broker.reason}: start it, or check "
                "brokers and network"
            )
        store_problem = self._assignment.recording.store_problem
        if store_problem:
            problems.append(f"the offset store takes nothing, so handing off stands still: {store_problem}")
        problems += [
            f"handler process {slot.slot} cannot start: {slot.problem}" for slot in self._handlers.slots if slot.problem
        ]
        if self._topic_problem and not self._assignment.partitions:
            problems.append(self._topic_problem)
        return problems

    def _summary(self) -> str:
        partitions = self._assignment.partitions.values()
        if self._broker.down_since is not None:
            return f"no broker answers at {self._settings.brokers}"
        rate = sum(partition.message_rate.per_second for partition in partitions)
        lag = sum(partition.lag or 0 for partition in partitions)
        troubled = sum(1 for partition in partitions if partition.advice)
        trouble = f", {troubled} with a problem" if troubled else ""
        return f"{self._state}: {len(partitions)} partitions, {rate:.0f} messages/s, lag {lag}{trouble}"


def _ignore_stop_signals() -> None:
    """All is done: a third Ctrl-C must not end with a traceback what the interpreter ends within milliseconds."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    for number in _STOP_SIGNALS:
        # By the loop, which would otherwise do it when it closes, and leave the default in its place.
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
