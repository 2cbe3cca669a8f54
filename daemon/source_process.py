"""The engine of a KafkaSource, as the program sees it: a process, from its start to its end."""

import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from kafkasrcd import errors
from kafkasrcd.daemon.status import Status
from kafkasrcd.errors import KafkasrcdError, WorkerBootError, WorkerError
from kafkasrcd.settings import Settings
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.control import Close, ControlChannel, OpenSource
from kafkasrcd.workers.handler_target import HandlerTarget
from kafkasrcd.workers.source_reader import SourceReader

_BOOT_SECONDS: Final = 60.0
_CLOSE_GRACE_SECONDS: Final = 15.0
"""Beyond the drain: to leave the group, and to end."""
_NOT_FOR_IT: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
"""What systemd tells the program is not for its engine."""


class SourceProcess:
    """Starts with it. ``reader`` reads its rings."""

    def __init__(
        self,
        settings: Settings,
        target: HandlerTarget,
        on_bound: Callable[[TopicPartition], None],
        on_unbound: Callable[[TopicPartition, bool], None],
    ) -> None:
        """Blocks until the engine answers, some tenths of a second. Raises WorkerBootError, and what it says."""
        self._drain_seconds = settings.supervisor.drain_timeout_seconds
        self._folder = Path(tempfile.mkdtemp(prefix="kafkasrcd-source-"))
        ours, theirs = ControlChannel.pair()
        with theirs:
            # -P: a module in the working directory must not stand in for one of the library.
            command = [sys.executable, "-P", "-m", "kafkasrcd.daemon.source_engine"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name not in _NOT_FOR_IT},
                start_new_session=True,  # a terminal's Ctrl-C is for the program
            )
        self.reader = SourceReader(settings, target, ours, on_bound, on_unbound)
        self.reader.tell(
            OpenSource(
                settings=msgspec.json.encode(settings),
                base_directory=os.getcwd(),
                store_url=settings.store.url,
                control_path=str(self._folder / "control.sock"),
            )
        )
        try:
            self._await_boot()
        except BaseException:
            self.end()
            raise

    def _await_boot(self) -> None:
        deadline = time.monotonic() + _BOOT_SECONDS
        while not self.reader.is_ready:
            self.hear(1.0)
            if time.monotonic() > deadline:
                raise WorkerBootError(f"the source's engine has not started within {_BOOT_SECONDS:.0f} s")

    def hear(self, seconds: float) -> None:
        """Wait for what the engine has to say, no longer than ``seconds``. Raises what has ended it."""
        poller = select.poll()
        poller.register(self.reader.channel.fileno(), select.POLLIN)
        poller.poll(seconds * 1000)
        self.reader.receive()
        self.raise_if_ended()

    def raise_if_ended(self) -> None:
        """Raises what has ended the engine: an error of its own class, or WorkerError where it was killed."""
        ended = self.reader.ended
        if ended is not None:
            kind = getattr(errors, ended.error, WorkerError)
            raise kind(ended.reason or "the source's engine has ended")

    def status(self) -> Status | None:
        """What the engine says of itself; from any thread. None where it does not answer."""
        from kafkasrcd.daemon.control_client import ControlClient

        try:
            client = ControlClient(self._folder / "control.sock")
        except KafkasrcdError:
            return None
        try:
            return client.status()
        except KafkasrcdError:
            return None
        finally:
            client.close()

    def end(self) -> None:
        """Have it drain and end, within the drain's deadline and some seconds; what it says meanwhile is heard, since
        it may wait for that."""
        deadline = time.monotonic() + self._drain_seconds + _CLOSE_GRACE_SECONDS
        self.reader.tell(Close())
        try:
            while self.reader.ended is None and time.monotonic() < deadline:
                self.hear(1.0)
        except KafkasrcdError:
            pass  # it has ended
        self.reader.close()
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
