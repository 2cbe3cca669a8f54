"""A real daemon for tests: `kafkasrcd start` in a folder of its own, looked at through its control socket."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from kafkasrcd.daemon.control_client import ControlClient
from kafkasrcd.daemon.status import Status
from kafkasrcd.errors import KafkasrcdError
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent
COMMAND = str(Path(sys.executable).parent / "kafkasrcd")
DEADLINE_SECONDS = 30.0
HANDLERS = 2
"""Handler processes of each daemon."""

# A failed member is noticed soon, and the lease stays well below that.
QUICK_SESSION = (
    "supervisor.session_timeout_ms=6000",
    "supervisor.heartbeat_interval_ms=500",
    "supervisor.lease_seconds=2",
)


class DaemonProcess:
    """Starts on entering, and is gone, with everything it started, on leaving.

    `target` is looked for in `folder` and in the checkout. Relative paths in `settings` are relative to `folder`, which
    daemons of one test share: the store, and the ledger of `tests.ledger`, are in there.
    """

    def __init__(
        self,
        folder: Path,
        brokers: str,
        topic: str,
        target: str,
        *,
        name: str = "a",
        settings: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.socket = folder / f"{name}.sock"
        self._log_path = folder / f"{name}.log"
        self._settings = (
            f"brokers={brokers}",
            f"group_id={topic}",
            f"topics={topic}",
            f"handler.target={target}",
            f"handler.path={folder},{ROOT}",
            f"handler.processes={HANDLERS}",
            "commit_interval_secs=0.5",
            f"store.url=sqlite:///{folder / 'offsets.db'}",
            f"supervisor.control_socket={self.socket}",
            "supervisor.log_format=json",
            *settings,
        )
        self._environment = {**os.environ, "LEDGER_FOLDER": str(folder), **(environment or {})}
        self._started: list[psutil.Process] = []
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> "DaemonProcess":
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with ExitStack() as stack:
            stack.callback(self._kill_all)
            if kind is not None:
                print(f"--- the end of {self._log_path.name}:\n{self.log_text()[-6000:]}")

    def start(self) -> None:
        """Run `kafkasrcd start`; returns at once. Also to start it again after it has ended."""
        arguments = [word for setting in self._settings for word in ("-s", setting)]
        with self._log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [COMMAND, "start", *arguments], cwd=self.folder, env=self._environment, stdout=log, stderr=log
            )

    def status(self) -> Status:
        """As an operator sees it; raises KafkasrcdError where it is not running."""
        client = ControlClient(self.socket)
        try:
            return client.status()
        finally:
            client.close()

    def wait_status(
        self, condition: Callable[[Status], object], describe: str, deadline_seconds: float = DEADLINE_SECONDS
    ) -> Status:
        """Wait until the status fulfils `condition`, and return it."""
        last: list[object] = []

        def fulfilled() -> Status | Literal[False]:
            assert self.process.poll() is None, (
                f"it has ended with {self.process.returncode}: {self.log_text()[-3000:]}"
            )
            status = self.status()
            last[:] = [
                (partition.partition, partition.state, partition.processed, partition.committed, partition.lag)
                for partition in status.partitions
            ]
            return status if condition(status) else False

        status = wait_until(fulfilled, deadline_seconds, describe, seen=lambda: last, ignoring=(KafkasrcdError,))
        assert status
        return status

    def wait_running(self, partitions: int) -> Status:
        """Wait until it has that many partitions and all of them run."""
        return self.wait_status(
            lambda status: (
                len(status.partitions) == partitions
                and all(partition.state == "running" and partition.worker.pid for partition in status.partitions)
            ),
            f"{partitions} running partitions",
        )

    def wait_caught_up(self, ends: Mapping[int, int], deadline_seconds: float = 60.0) -> Status:
        """Wait until everything before `ends`, as the broker has them, is processed and committed in its partitions.

        Not by the daemon's own lag: right after a record was produced, it has not heard of it.
        """
        return self.wait_status(
            lambda status: (
                status.partitions
                and all(partition.committed == ends[partition.partition] for partition in status.partitions)
            ),
            "everything processed and committed",
            deadline_seconds,
        )

    def children(self) -> list[psutil.Process]:
        """Everything it has started, directly or not."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> list[psutil.Process]:
        """SIGKILL the supervisor; what it had started."""
        children = self.children()
        self.process.kill()
        self.process.wait()
        return children

    def terminate(self, deadline_seconds: float = DEADLINE_SECONDS) -> int:
        """SIGTERM, and wait for the end; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline_seconds)

    def log_text(self) -> str:
        """All of its log so far, of every run in this folder under this name."""
        return self._log_path.read_text(errors="replace")

    def events(self, event: str) -> list[dict[str, Any]]:
        """The log's lines with that key."""
        found: list[dict[str, Any]] = []
        for line in self.log_text().splitlines():
            if line.startswith("{"):
                entry = msgspec.json.decode(line)
                if entry["event"] == event:
                    found.append(entry)
        return found

    def _kill_all(self) -> None:
        if self.process.poll() is None:
            children = self.children()
            self.process.kill()
            self.process.wait()
            psutil.wait_procs(children, timeout=5)
