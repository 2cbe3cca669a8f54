"""A place where a daemon runs, is ended and started again, as on a host with a service manager."""

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import psutil

from kafkasrcd.daemon.exit_codes import ExitCode
from tests.chaos.fault import Role, daemon_name
from tests.daemon_process import DaemonProcess

END_DEADLINE_SECONDS = 120.0
"""From SIGTERM: a freeze that began just before it, the drain, leaving, and a machine with better things to do."""
RESTART_SECONDS = 1.0
"""As RestartSec of a unit: where the daemon ended because something was not reachable."""
_PREFIXES = {Role.WORKER: "ksrc-", Role.HANDLER: "kafkasrcd-h"}


class DaemonSlot:
    """What is not asked for is a trouble: an end, an exit code, no end. Methods may be called from any thread."""

    def __init__(self, number: int, daemon: DaemonProcess, note: Callable[[str], None]) -> None:
        self.number = number
        self.daemon = daemon
        self.troubles: list[str] = []
        self.gave_up = 0
        """How often it ended because something was not reachable, and was started again."""
        self._name = f"daemon {daemon_name(number)}"
        self._note = note
        self._lock = threading.Lock()
        self._signals: list[int] = []
        """What this run of it was sent."""
        self._closing = False
        self._ended = threading.Event()
        self._ended.set()

    @property
    def is_running(self) -> bool:
        """Whether its process exists."""
        return not self._ended.is_set()

    @property
    def is_ending(self) -> bool:
        """Whether it runs, and was told to end or killed."""
        return self.is_running and bool(self._signals)

    def start(self) -> bool:
        """Start it once the run before has ended; False where that runs on, untold to end."""
        if self.is_running and not self._signals:
            return False
        if not self.wait_ended():
            return False
        with self._lock:
            if not self._ended.is_set():  # started again by itself meanwhile
                return False
            self._start()
        return True

    def signal(self, number: signal.Signals) -> bool:
        """Send SIGTERM or SIGKILL to the supervisor; False where there is none."""
        with self._lock:
            if self._ended.is_set():
                return False
            self._signals.append(number)
            self.daemon.process.send_signal(number)
            return True

    def wait_ended(self) -> bool:
        """Wait for the end it was told to come to; False, and killed, where it does not."""
        if self._ended.wait(END_DEADLINE_SECONDS):
            return True
        self.troubles.append(f"{self._name} does not end within {END_DEADLINE_SECONDS:.0f} s of being told to")
        self.signal(signal.SIGKILL)
        self._ended.wait(END_DEADLINE_SECONDS)
        return False

    def close(self) -> None:
        """SIGKILL whatever is left."""
        self._closing = True
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._ended.wait(END_DEADLINE_SECONDS)

    # ── Its processes ────────────────────────────────────────────────────────────────────────────────────────────

    def tree(self) -> list[psutil.Process]:
        """The supervisor, the fork server, and its children; empty where it does not run."""
        try:
            supervisor = psutil.Process(self.daemon.process.pid)
            return [supervisor, *supervisor.children(recursive=True)] if self.is_running else []
        except (psutil.NoSuchProcess, AttributeError):  # it was never started
            return []

    def processes(self, role: Role) -> list[psutil.Process]:
        """Those of the role: workers in the order of their partitions, handlers in that of their slots."""
        tree = self.tree()
        if role is Role.SUPERVISOR:
            return tree[:1]
        if role is Role.FORK_SERVER:
            return [process for process in tree[1:] if _name_of(process) == "kafkasrcd-fork"]
        named = [(name, process) for process in tree[1:] if (name := _name_of(process)).startswith(_PREFIXES[role])]
        return [process for _, process in sorted(named, key=lambda pair: _number_in(pair[0]))]

    def pick(self, role: Role, index: int) -> psutil.Process | None:
        """The process of that index, modulo how many there are."""
        processes = self.processes(role)
        return processes[index % len(processes)] if processes else None

    # ── Inside ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self) -> None:
        self._signals = []
        self._ended.clear()
        self.daemon.start()
        threading.Thread(
            target=self._watch, args=(self.daemon.process, time.monotonic()), name=self._name, daemon=True
        ).start()

    def _watch(self, process: subprocess.Popen[bytes], started: float) -> None:
        code = process.wait()
        with self._lock:
            expected = self._closing or self._is_expected(process.pid, code)
            self._note(f"{self._name} has ended with {code} after {time.monotonic() - started:.1f} s")
            self._ended.set()
        if expected:
            return
        if code == ExitCode.UNAVAILABLE and not self._signals:
            self.gave_up += 1
            time.sleep(RESTART_SECONDS)
            with self._lock:
                if self._ended.is_set() and not self._closing:
                    self._start()
            return
        sent = ", ".join(signal.Signals(number).name for number in self._signals) or "nothing"
        lines = self.daemon.log_text().splitlines()[-5:]
        self.troubles.append("\n    ".join([f"{self._name} has ended with {code}, having been sent {sent}:", *lines]))

    def _is_expected(self, pid: int, code: int) -> bool:
        if code == -signal.SIGKILL:
            return signal.SIGKILL in self._signals
        if code == -signal.SIGTERM:
            # Told to end before it could listen.
            return signal.SIGTERM in self._signals and not any(
                entry["pid"] == pid for entry in entries(self.daemon.log_text()) if entry["event"] == "starting"
            )
        if code == ExitCode.FAILURE and signal.SIGTERM in self._signals:
            # Others kept the group in a rebalance for longer than an end may take; all else was in order.
            return [entry["event"] for entry in entries(self.daemon.log_text())][-1:] == ["leave_overdue"]
        return code == ExitCode.OK and signal.SIGTERM in self._signals


def entries(log_text: str) -> list[dict[str, Any]]:
    """The events of a log; a line that a kill has cut short is left out."""
    found: list[dict[str, Any]] = []
    for line in log_text.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(msgspec.DecodeError):
                found.append(msgspec.json.decode(line))
    return found


def described(processes: Sequence[psutil.Process]) -> str:
    """Names and numbers, for people."""
    return ", ".join(f"{_name_of(process) or 'gone'} {process.pid}" for process in processes)


def _name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _number_in(name: str) -> int:
    """Of `ksrc-12-topic` or `kafkasrcd-h1`."""
    digits = name.removeprefix("ksrc-").removeprefix("kafkasrcd-h").split("-")[0]
    return int(digits) if digits.isdigit() else 0
