"""The handler processes: started, kept alive, and given the partitions that are bound to them."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from kafkasrcd.daemon.backoff import RestartBackoff
from kafkasrcd.daemon.child_processes import ChildProcess, ForkServer
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.errors import ConfigurationError, WorkerBootError
from kafkasrcd.settings import Settings
from kafkasrcd.workers.control import (
    Bind,
    ControlMessage,
    Exit,
    HandlerReady,
    HandlerRefused,
    RecordFailed,
    RingBroken,
    Setup,
    Unbind,
)
from kafkasrcd.workers.event_log import EventLog

_BOOT_SECONDS: Final = 120.0
"""Importing the largest frameworks takes some ten seconds on a busy host."""

OnRecordFailed = Callable[[Partition, str], None]
OnRingBroken = Callable[[Partition, str], None]


class HandlerSlot:
    """The place of one handler process; the process in it may be replaced, its bell and bindings stay."""

    def __init__(self, slot: int, backoff: RestartBackoff) -> None:
        self.slot = slot
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Rung by the workers of the bound partitions."""
        self.bound: dict[int, Partition] = {}
        self.child: ChildProcess | None = None
        self.ready = False
        self.problem = ""
        """Why the process in it cannot work; empty where it can."""
        self.backoff = backoff
        self.restart: asyncio.TimerHandle | None = None
        """The last one that was planned."""


class HandlerPool:
    """N handler processes. A partition is bound to the one that has the fewest."""

    def __init__(
        self,
        settings: Settings,
        base_directory: Path,
        fork_server: ForkServer,
        on_record_failed: OnRecordFailed,
        on_ring_broken: OnRingBroken,
    ) -> None:
        self._settings = settings
        self._setup = msgspec.json.encode(settings)
        self._base_directory = str(base_directory)
        self._fork_server = fork_server
        self._on_record_failed = on_record_failed
        self._on_ring_broken = on_ring_broken
        self._log = EventLog("handlers")
        self._bindings = 0
        self._stopping = False
        self._boot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        supervisor = settings.supervisor
        # No limit: without handlers nothing goes on, and a record that kills is stopped by its partition's own count.
        self.slots = [
            HandlerSlot(slot, RestartBackoff(1_000_000, supervisor.restart_window_seconds))
            for slot in range(settings.handler.processes or len(os.sched_getaffinity(0)))
        ]

    async def start(self) -> None:
        """Start all and wait until each has imported its targets.

        Raises ConfigurationError where one cannot, WorkerBootError where that takes longer than ``_BOOT_SECONDS``.
        """
        for slot in self.slots:
            self._spawn(slot)
        try:
            await asyncio.wait_for(asyncio.shield(self._boot), _BOOT_SECONDS)
        except TimeoutError:
            raise WorkerBootError(
                f"a handler process has not imported its target within {_BOOT_SECONDS:.0f} s: does its module wait for "
                "something when it is imported?"
            ) from None

    def bind(self, partition: Partition) -> HandlerSlot:
        """Give ``partition`` (which has its memory) to a handler process."""
        slot = min(self.slots, key=lambda slot: len(slot.bound))
        self._bindings += 1
        partition.binding = self._bindings
        partition.slot = slot.slot
        slot.bound[partition.binding] = partition
        if slot.ready:
            self._send_bind(slot, partition)
        return slot

    def unbind(self, partition: Partition) -> None:
        """Take it back; nothing of it is in flight. A no-op where it is not bound."""
        if partition.slot is None:
            return
        slot = self.slots[partition.slot]
        if slot.bound.pop(partition.binding, None) is not None and slot.child is not None and slot.ready:
            slot.child.send(Unbind(partition.binding))
        partition.slot = None

    async def kill(self, partition: Partition) -> None:
        """End the process that holds ``partition``'s record past its deadline; its other partitions go on after."""
        if partition.slot is None:
            return
        child = self.slots[partition.slot].child
        if child is not None:
            child.kill()
            await child.exited.wait()

    async def stop(self, seconds: float) -> None:
        """End all: idle ones by themselves, the rest killed after ``seconds``."""
        self._stopping = True
        for slot in self.slots:
            if slot.restart is not None:
                slot.restart.cancel()
        children = [slot.child for slot in self.slots if slot.child is not None and slot.child.exit_code is None]
        for child in children:
            child.send(Exit())
        waits = [asyncio.ensure_future(child.exited.wait()) for child in children]
        if waits:
            _, late = await asyncio.wait(waits, timeout=seconds)
            for child in children:
                child.kill()
            if late:
                await asyncio.wait(late, timeout=1.0)
        for slot in self.slots:
            os.close(slot.bell)

    def _spawn(self, slot: HandlerSlot) -> None:
        slot.ready = False
        slot.child = self._fork_server.spawn(
            "handler",
            f"kafkasrcd-h{slot.slot}",
            lambda message: self._on_message(slot, message),
            lambda exit_code: self._on_exit(slot, exit_code),
        )
        slot.child.send(Setup(settings=self._setup, base_directory=self._base_directory, slot=slot.slot), (slot.bell,))

    def _on_message(self, slot: HandlerSlot, message: ControlMessage) -> None:
        if isinstance(message, HandlerReady):
            slot.ready = True
            slot.problem = ""
            for bound in slot.bound.values():
                self._send_bind(slot, bound)
            if not self._boot.done() and all(other.ready for other in self.slots):
                self._boot.set_result(None)
        elif isinstance(message, HandlerRefused):
            slot.problem = message.reason
            if self._booted:
                self._log.error("handler_refused", f"handler {slot.slot} cannot start again: {message.reason}")
            else:
                self._fail_boot(message.reason)
        elif isinstance(message, RecordFailed):
            partition = slot.bound.get(message.binding)
            if partition is not None:
                self._on_record_failed(partition, f"offset {message.offset}: {message.error}")
        elif isinstance(message, RingBroken):
            partition = slot.bound.get(message.binding)
            if partition is not None:
                self._on_ring_broken(partition, message.reason)

    def _on_exit(self, slot: HandlerSlot, exit_code: int) -> None:
        slot.ready = False
        if self._stopping:
            return
        if not self._booted:
            self._fail_boot(f"a handler process ended with {describe_exit(exit_code)} while importing its target")
            return
        self._blame(slot, exit_code)
        delay = slot.backoff.next_delay() or 0.0
        self._log.error(
            "handler_died",
            f"handler {slot.slot} ended with {describe_exit(exit_code)}; it starts again in {delay:.1f} s",
            slot=slot.slot,
            exit_code=exit_code,
        )
        slot.restart = asyncio.get_running_loop().call_later(delay, self._spawn, slot)

    @property
    def _booted(self) -> bool:
        return self._boot.done() and self._boot.exception() is None

    def _fail_boot(self, reason: str) -> None:
        """The first reason counts; others say the same, or follow from it."""
        if not self._boot.done():
            self._boot.set_exception(ConfigurationError(reason))
            self._boot.exception()  # looked at, so that asyncio does not complain where nobody waits any more

    def _blame(self, slot: HandlerSlot, exit_code: int) -> None:
        """Count the death against the record that was in its hands, and stop a partition whose record kills."""
        for partition in list(slot.bound.values()):
            memory = partition.memory
            offset = None if memory is None else memory.in_flight
            if memory is None or offset is None:
                continue
            memory.handler_ended()
            deaths = partition.count_crash(offset)
            self._log.warning(
                "record_in_flight",
                f"{partition.name}@{offset} was in the hands of handler {slot.slot} when it ended",
                topic=partition.name.topic,
                partition=partition.name.partition,
                offset=offset,
                deaths=deaths,
            )
            if deaths >= self._settings.handler.crash_attempts:
                reason = f"offset {offset}: its handler process ended {deaths} times with {describe_exit(exit_code)}"
                self._on_record_failed(partition, reason)

    def _send_bind(self, slot: HandlerSlot, partition: Partition) -> None:
        if slot.child is None or partition.memory is None:
            return
        slot.child.send(
            Bind(
                binding=partition.binding,
                topic=partition.name.topic,
                partition=partition.name.partition,
                assignment_epoch=partition.memory.epoch,
            ),
            (partition.memory.fd, partition.bell),
        )


def describe_exit(exit_code: int) -> str:
    """An exit code in words."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
