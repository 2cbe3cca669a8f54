"""The partitions this member has: taken, worked on, given back.

Everything here runs on the event loop. A partition's ring and worker exist once per claim: nothing of an earlier
assignment, or of an earlier offset, can reach a handler through them.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from kafkasrcd.daemon.child_processes import ChildProcess, ForkServer
from kafkasrcd.daemon.handler_pool import HandlerPool, describe_exit
from kafkasrcd.daemon.hung_workers import HungWorkers
from kafkasrcd.daemon.lifecycle import ENDED, WORKING, State
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.daemon.pauses import Pauses
from kafkasrcd.daemon.recorder import Recorder
from kafkasrcd.daemon.recording import Recording
from kafkasrcd.errors import KafkasrcdError
from kafkasrcd.settings import AutoOffsetReset, CommitStrategy, Settings
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.control import (
    ControlMessage,
    OffsetOutOfRange,
    Setup,
    StartWorker,
    WorkerFault,
    WorkerReady,
    WorkerWaits,
)
from kafkasrcd.workers.deadline import Deadline
from kafkasrcd.workers.event_log import EventLog

_CLAIM_RETRY_SECONDS: Final = (0.2, 5.0)
_DRY_LOOK_SECONDS: Final = 0.02
_ASK_AGAIN_SECONDS: Final = 0.5
_SHARED_STORE: Final = "see that this group_id of this store is used by one Kafka cluster only, then restart kafkasrcd"
_MEND_AND_RESTART: Final = "mend it, then restart kafkasrcd (systemctl restart, or kafkasrcd stop and start)"


class Assignment:
    """The partitions, and what happens to them. ``on_*`` are the membership's events."""

    def __init__(
        self,
        settings: Settings,
        fork_server: ForkServer,
        recorder: Recorder,
        base_directory: Path = Path(),
        schema_directory: Path | None = None,
    ) -> None:
        self.partitions: dict[TopicPartition, Partition] = {}
        self.rebalances = 0
        self.handlers: HandlerPool
        self.assigned_once = False
        self.closing = False
        """The daemon is ending: what is assigned now is given back without having been touched."""
        self.renew_leases: Callable[[], None] = _nothing
        """The lease keeper's."""
        self._settings = settings
        self._setup = Setup(
            settings=msgspec.json.encode(settings),
            base_directory=str(base_directory),
            store_url="",
            slot=-1,
            schema_directory="" if schema_directory is None else str(schema_directory),
        )
        self._fork_server = fork_server
        self._recorder = recorder
        self.recording = Recording(settings, recorder, self.partitions, self.on_fenced)
        self._hung_workers = HungWorkers(settings.handler.timeout_seconds)
        self.pauses = Pauses(settings, recorder, self.partitions, self.on_pause_changed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = EventLog("assignment")

    # ---- the membership's events -------------------------------------------------------------------------------

    def on_assigned(self, names: list[TopicPartition]) -> None:
        """Take these, too. Where one of them is still being given back, that ends first."""
        self.rebalances += 1
        self.assigned_once = True
        self._log.info("assigned", f"{len(names)} partitions assigned: {_listed(names)}", partitions=len(names))
        if self.closing:
            return
        fresh: list[Partition] = []
        for name in names:
            predecessor = self.partitions.get(name)
            partition = self.partitions[name] = Partition(name, self._settings)
            if predecessor is None:
                fresh.append(partition)
            else:
                self._begin_task(self._take_after(predecessor, partition))
        if fresh:
            self._begin_task(self._take(fresh, {}))

    def on_revoked(self, names: list[TopicPartition], done: Callable[[], None]) -> None:
        """Drain and record these, in parallel, on one deadline; then ``done``."""
        self._log.info("revoked", f"{len(names)} partitions revoked: {_listed(names)}", partitions=len(names))
        self._begin_task(self._give_back(names, done))

    def on_lost(self, names: list[TopicPartition]) -> None:
        """Another member may have them already: stop, and record nothing."""
        self.rebalances += 1
        self._log.error("lost", f"{len(names)} partitions lost: {_listed(names)}", partitions=len(names))
        for name in names:
            partition = self.partitions.get(name)
            if partition is not None:
                self._lose(partition, "the group has given it to another member")

    # ---- taking ------------------------------------------------------------------------------------------------

    async def _take_after(self, predecessor: Partition, partition: Partition) -> None:
        await predecessor.ended.wait()
        await self._take([partition], {})

    async def _take(self, partitions: Sequence[Partition], moved: Mapping[TopicPartition, int]) -> None:
        """Claim, and start those that are still ours by then; tries until the store and the broker answer."""
        wait_seconds, most_seconds = _CLAIM_RETRY_SECONDS
        while True:
            waiting = {partition.name: partition for partition in partitions if partition.state is State.CLAIMING}
            if not waiting:
                return
            try:
                starts = await self._recorder.claim(list(waiting), moved)
                await self.pauses.look_up()
                break
            except KafkasrcdError as error:
                self.recording.note_store(error)
                for partition in waiting.values():
                    partition.problem = f"cannot be claimed: {error}; it is tried again"
                self._log.repeated("claim_failed", f"partitions cannot be claimed: {error}", same=(str(error),))
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, most_seconds)
        self.recording.note_store(None)
        for name, partition in waiting.items():
            if partition.state is not State.CLAIMING:
                continue
            start = starts[name]
            partition.problem = ""
            if start.next_offset is None:
                partition.fail(start.problem, "commit an offset for the group, or set auto_offset_reset")
                continue
            partition.begin(start, self.handlers.layout)
            self.handlers.bind(partition)
            partition.enter(State.STARTING, f"from offset {start.next_offset}")
            self._start_worker(partition)
        self.renew_leases()

    def _start_worker(self, partition: Partition) -> None:
        memory = partition.memory
        if memory is None:
            return
        name = partition.name
        child = self._fork_server.spawn(
            "worker",
            f"ksrc-{name.partition}-{name.topic}",
            lambda message: self._on_worker_message(partition, message),
            lambda exit_code: self._on_worker_exit(partition, child, exit_code),
        )
        partition.worker = child
        partition.hands.clear()
        child.send(self._setup, (self._hung_workers.stacks.fd,))
        child.send(
            StartWorker(
                topic=name.topic,
                partition=name.partition,
                assignment_epoch=memory.epoch,
                start_offset=memory.position,
                layout=self.handlers.layout,
                layers=partition.done_before,
                shape=self.handlers.shape(name.topic),
                refused=partition.deadly.refused,
            ),
            (memory.fd, partition.bell, *self.handlers.bells(partition)),
        )

    def watch(self, now: float) -> None:
        """Now and then, ``now`` in monotonic seconds: end workers that have had a record for too long."""
        for partition in self.partitions.values():
            if self._hung_workers.look(partition, now):
                self._begin_task(self._hung_workers.end(partition))

    # ---- what workers and handlers say -------------------------------------------------------------------------

    def _on_worker_message(self, partition: Partition, message: ControlMessage) -> None:
        if isinstance(message, WorkerReady):
            if partition.state is State.STARTING:
                partition.problem = ""
                partition.ready()
        elif isinstance(message, OffsetOutOfRange):
            self._on_out_of_range(partition, message)
        elif isinstance(message, WorkerWaits):
            if partition.state in WORKING:
                partition.problem = message.reason
        elif isinstance(message, WorkerFault):
            partition.fail(message.reason, _MEND_AND_RESTART)

    def _on_worker_exit(self, partition: Partition, child: ChildProcess, exit_code: int) -> None:
        if partition.worker is not child or partition.state not in WORKING or partition.moving:
            return
        refused = partition.worker_ended(f"with {describe_exit(exit_code)}")
        if refused is not None:
            self._log.error(
                "record_refused",
                f"{partition.name}@{refused.offset} is not prepared again: {refused.reason}",
                topic=partition.name.topic,
                partition=partition.name.partition,
                offset=refused.offset,
            )
        delay = partition.backoff.next_delay()
        if delay is None:
            partition.fail(f"its worker keeps ending, last with {describe_exit(exit_code)}", _MEND_AND_RESTART)
            return
        self._log.error(
            "worker_died",
            f"the worker of {partition.name} ended with {describe_exit(exit_code)}; it starts again in {delay:.1f} s",
            topic=partition.name.topic,
            partition=partition.name.partition,
            exit_code=exit_code,
        )
        if partition.state is not State.STARTING:
            partition.enter(State.STARTING, "its worker ended")

        def restart() -> None:
            if partition.worker is child and partition.state is State.STARTING:
                self._start_worker(partition)

        asyncio.get_running_loop().call_later(delay, restart)

    def _on_out_of_range(self, partition: Partition, gone: OffsetOutOfRange) -> None:
        policy = self._settings.auto_offset_reset
        if policy is AutoOffsetReset.ERROR:
            partition.fail(
                f"the broker has offsets {gone.log_start} to {gone.high_watermark}, not {gone.position}",
                "commit an offset that exists, or set auto_offset_reset",
            )
            return
        target = gone.log_start if policy is AutoOffsetReset.EARLIEST else gone.high_watermark
        self._log.error(
            "offset_out_of_range",
            f"{partition.name} goes on at {target}: the broker has offsets {gone.log_start} to {gone.high_watermark}, "
            f"not {gone.position}; {max(0, target - gone.position)} offsets are lost",
            topic=partition.name.topic,
            partition=partition.name.partition,
            offset=gone.position,
            target=target,
            lost=max(0, target - gone.position),
        )
        self._begin_move(partition, target)

    def on_record_failed(self, partition: Partition, reason: str) -> None:
        """A record failed for the last time: its partition stands still before it."""
        partition.fail(reason, _MEND_AND_RESTART)

    def on_letter_refused(self, partition: Partition, reason: str) -> None:
        """Nothing behind the record is handled before its letter is written down."""
        if partition.state in WORKING:
            partition.problem = reason

    def on_ring_broken(self, partition: Partition, reason: str) -> None:
        """Replace the ring; what was in it is fetched again."""
        if partition.state in WORKING and partition.processed is not None:
            self._log.error("ring_replaced", f"the ring of {partition.name} is replaced: {reason}")
            partition.ring_is_broken = True
            self._begin_move(partition, None)

    def on_fenced(self, partition: Partition, reason: str) -> None:
        """The store has a later claim than this one's. Mostly the group has given the partition to another member, and
        this one will hear of it. But a claim may also come late: from a member that was frozen in it, or whose store
        did not answer, until the group had given the partition to this one. Whose it is, the coordinator knows.
        """
        if partition.state is State.DRAINING and not partition.moving:
            self._lose(partition, reason)  # it is being given back in any case
        elif partition.state in WORKING or partition.moving:
            partition.contested = reason
            if not partition.moving:
                self._begin_move(partition, None)

    def on_store_away(self, reason: str) -> None:
        """A handler process cannot commit its transactions."""
        self.recording.on_store_away(reason)

    def on_pause_changed(self, partition: Partition) -> None:
        """Wake who sleeps until its lease changes, and those who have something of it open."""
        self.renew_leases()
        os.eventfd_write(partition.bell, 1)
        self.handlers.ring(partition)
        auto = self._settings.commit_strategy is CommitStrategy.AUTO
        if auto and partition.paused is not None and partition.state in WORKING and not partition.moving:
            self._begin_move(partition, None)

    def seek(self, name: TopicPartition, offset: int) -> bool:
        """Go on at ``offset`` without having handled what is in the rings; False where it is not at work here."""
        partition = self.partitions.get(name)
        if partition is None or partition.state not in WORKING or partition.moving:
            return False
        self._begin_move(partition, offset, dry=False)
        return True

    def _begin_move(self, partition: Partition, target: int | None, *, dry: bool = True) -> None:
        """Start the partition anew with a new claim, rings and worker: at ``target`` once the rings are ``dry``, or,
        where that is None, now and where it is."""
        partition.moving = True  # at once: its worker's end may be the next thing that is heard
        self._begin_task(self._move(partition, target, dry=dry))

    async def _move(self, partition: Partition, target: int | None, *, dry: bool) -> None:
        while (
            dry
            and target is not None
            and partition.state in WORKING
            and not _is_dry(partition)
            and not partition.contested
        ):
            await asyncio.sleep(_DRY_LOOK_SECONDS)
        if partition.state not in WORKING:
            return
        partition.enter(State.DRAINING, partition.contested or "it starts anew at another offset")
        deadline = Deadline(self._settings.supervisor.drain_timeout_seconds)
        await self._settle([partition], deadline)
        if target is None and not partition.contested:
            if self._settings.commit_strategy is CommitStrategy.AUTO and partition.paused is not None:
                # What is handed off is committed, and not to be handled now: it is read again after the pause.
                target = partition.processed
            else:
                await self.recording.record([partition], deadline.remaining)
        if partition.state is not State.DRAINING or not partition.moving:
            return
        self.handlers.unbind(partition)
        partition.drop_memory()
        partition.moving = False
        partition.enter(State.CLAIMING)
        if not partition.contested:
            await self._take([partition], {} if target is None else {partition.name: target})
        elif await self._is_ours(partition):
            await self._take([partition], {})

    async def _is_ours(self, partition: Partition) -> bool:
        """Ask the group's coordinator whose a contested partition is, until it says; lost where it is another's."""
        delay = partition.backoff.next_delay()
        if delay is None:
            partition.fail(f"it keeps being claimed by another: {partition.contested}", _SHARED_STORE)
            return False
        await asyncio.sleep(delay)
        partition.problem = f"{partition.contested}; the group's coordinator is asked whose it is"
        while (ours := await self._recorder.is_assigned(partition.name)) is None:
            if partition.state is not State.CLAIMING:
                break
            await asyncio.sleep(_ASK_AGAIN_SECONDS)
        if partition.state is not State.CLAIMING:
            return False
        if not ours:
            self._lose(partition, partition.contested)
            return False
        self._log.warning(
            "claimed_anew",
            f"{partition.name} is this member's, says the group, and is claimed anew: {partition.contested}",
            topic=partition.name.topic,
            partition=partition.name.partition,
        )
        partition.contested = partition.problem = ""
        return True

    # ---- giving back -------------------------------------------------------------------------------------------

    async def drain(self, deadline: Deadline) -> bool:
        """Stop, record and release every partition; False where not all that was processed is recorded."""
        return await self._release(list(self.partitions.values()), deadline)

    async def _give_back(self, names: Iterable[TopicPartition], done: Callable[[], None]) -> None:
        try:
            partitions = [self.partitions[name] for name in names if name in self.partitions]
            await self._release(partitions, Deadline(self._settings.supervisor.drain_timeout_seconds))
        finally:
            done()

    async def _release(self, partitions: Iterable[Partition], deadline: Deadline) -> bool:
        """Revoke, in this order: end the hand-off, let handlers finish what they hold, kill those that do not, record
        what is processed, give back."""
        mine = [partition for partition in partitions if partition.state not in ENDED]
        claiming = any(partition.state is State.CLAIMING for partition in mine)
        if self._settings.commit_strategy is CommitStrategy.AUTO:
            await asyncio.gather(*(self._finish_ring(partition, deadline) for partition in mine))
        for partition in mine:
            partition.moving = False
            partition.stop_work()
            if partition.state is not State.DRAINING:
                partition.enter(State.DRAINING)
        await self._settle(mine, deadline)
        all_recorded = await self.recording.record_finally(mine, deadline)
        if claiming:
            # A claim that is still being made would come after the next owner's.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._recorder.idle(), deadline.remaining)
        for partition in mine:
            if partition.state is State.DRAINING:
                self._end(partition)
        return all_recorded

    async def _finish_ring(self, partition: Partition, deadline: Deadline) -> None:
        """With ``auto``: what is handed off is committed already, or will be; have it handled, too."""
        if partition.state not in WORKING or partition.worker is None or partition.paused is not None:
            return
        partition.moving = True
        partition.worker.kill()
        await partition.worker_gone()
        while partition.state in WORKING and not _is_dry(partition) and not deadline.passed:
            if partition.memory is not None:
                partition.memory.extend_lease(self._settings.supervisor.lease_seconds)
            await asyncio.sleep(_DRY_LOOK_SECONDS)
        if not _is_dry(partition):
            self._log.error(
                "handed_off_not_handled",
                f"{partition.name}: up to {(partition.position or 0) - (partition.processed or 0)} records are "
                "committed and were not handled by the deadline: commit_strategy auto loses them",
                topic=partition.name.topic,
                partition=partition.name.partition,
                offset=partition.processed,
                position=partition.position,
            )

    async def _settle(self, partitions: list[Partition], deadline: Deadline) -> None:
        """End all work on ``partitions`` in parallel; a handler that holds a record past the deadline is killed."""
        for partition in partitions:
            partition.stop_work()
            self.handlers.ring(partition)
        settled = await asyncio.gather(*(partition.settle(deadline) for partition in partitions))
        for partition, quiet in zip(partitions, settled, strict=True):
            if not quiet:
                self._log.error(
                    "handler_overdue",
                    f"{partition.name}: its handler process is killed, holding a record past the deadline",
                    topic=partition.name.topic,
                    partition=partition.name.partition,
                )
                await self.handlers.kill(partition)
                await partition.worker_gone()

    def _lose(self, partition: Partition, reason: str) -> None:
        if partition.state in ENDED:
            return
        partition.moving = False
        partition.stop_work()
        partition.enter(State.LOST, reason)

        async def bury() -> None:
            await self._settle([partition], Deadline(self._settings.supervisor.drain_timeout_seconds))
            self._end(partition)

        self._begin_task(bury())

    def _end(self, partition: Partition) -> None:
        self.handlers.unbind(partition)
        partition.enter(State.RELEASED)
        if self.partitions[partition.name] is partition:  # and not its successor, which waits for this end
            del self.partitions[partition.name]
        partition.end()

    def _begin_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._log.error("defect", f"an internal task failed: {task.exception()!r}", cause=task.exception())


def _nothing() -> None:
    """Until there is a lease keeper."""


def _is_dry(partition: Partition) -> bool:
    """Whether all that was handed off is done."""
    return partition.memory is None or partition.memory.is_empty


def _listed(names: list[TopicPartition]) -> str:
    by_topic: dict[str, list[int]] = {}
    for name in sorted(names):
        by_topic.setdefault(name.topic, []).append(name.partition)
    return ", ".join(f"{topic}{numbers}" for topic, numbers in by_topic.items()) or "none"
