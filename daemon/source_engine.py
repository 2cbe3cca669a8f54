"""The process that a KafkaSource starts: a supervisor, whose records the program handles that started it.

``python -m kafkasrcd.daemon.source_engine FD PID``: FD is its end of the channel, PID the program. It ends with the
program, however that ends: where nobody is at the other end, or the process is gone though a child of its holds on to
the channel, what is processed is recorded if that can be done at once, and everything ends.
"""

import asyncio
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from kafkasrcd.daemon.program import ProgramPool
from kafkasrcd.daemon.supervisor import Supervisor
from kafkasrcd.errors import KafkasrcdError
from kafkasrcd.settings import Settings
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers import event_log
from kafkasrcd.workers.control import Close, ControlChannel, ControlMessage, Ended, OpenSource, Record, Recorded, Seek

_ABANDONED_SECONDS: Final = 1.5
"""From the program's end to ours, whatever the broker and the store do."""


class SourceEngine:
    """One source's. Belongs to the loop."""

    def __init__(self, channel: ControlChannel, pid: int, opened: OpenSource) -> None:
        settings = msgspec.json.decode(opened.settings, type=Settings)
        event_log.configure(settings.supervisor.log_format, settings.supervisor.log_level)
        self._channel = channel
        self._pid = pid
        self._abandoned = False
        self._tasks: set[asyncio.Task[None]] = set()
        pool = partial(ProgramPool, pid=pid, channel=channel, on_asked=self._on_asked, on_gone=self._on_gone)
        self._supervisor = Supervisor(
            settings, Path(opened.base_directory), opened.store_url, Path(opened.control_path), pool
        )

    async def run(self) -> None:
        """Until the program closes the source, or is gone. Raises as ``Supervisor.run``."""
        pidfd = os.pidfd_open(self._pid)
        asyncio.get_running_loop().add_reader(pidfd, self._on_gone)
        await self._supervisor.run()

    def _on_asked(self, message: ControlMessage) -> None:
        if isinstance(message, Record):
            task = asyncio.get_running_loop().create_task(self._record(message.number))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Seek):
            self._supervisor.seek(TopicPartition(message.topic, message.partition), message.offset)
        elif isinstance(message, Close):
            self._supervisor.stop()

    async def _record(self, number: int) -> None:
        self._channel.send(Recorded(number=number, problem=await self._supervisor.record_now()))

    def _on_gone(self) -> None:
        if not self._abandoned:
            self._abandoned = True
            asyncio.get_running_loop().call_later(_ABANDONED_SECONDS, os._exit, 1)
            self._supervisor.abandon()


def main() -> int:
    """Run for one source; returns the exit code."""
    fd, pid = map(int, sys.argv[1:])
    channel = ControlChannel(socket.socket(fileno=fd))
    received = channel.receive()
    if received is None or not isinstance(received[0], OpenSource):
        return 1
    error: KafkasrcdError | None = None
    try:
        asyncio.run(_run(channel, pid, received[0]))
    except KafkasrcdError as raised:
        error = raised
    ended = Ended() if error is None else Ended(error=type(error).__name__, reason=str(error))
    try:
        channel.setblocking(True)
        channel.send(ended)
    except OSError:
        pass  # there is nobody to tell
    return 0 if error is None else 1


async def _run(channel: ControlChannel, pid: int, opened: OpenSource) -> None:
    await SourceEngine(channel, pid, opened).run()


if __name__ == "__main__":
    sys.exit(main())
