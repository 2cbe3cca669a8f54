"""The supervisor's side of the fork server: start children, hear from them, end them."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from kafkasrcd.errors import WorkerBootError
from kafkasrcd.workers.control import ControlChannel, ControlMessage, Exited, Spawn, Spawned
from kafkasrcd.workers.event_log import EventLog

OnMessage = Callable[[ControlMessage], None]
OnExit = Callable[[int], None]
"""Called once with the exit code; negative for a signal."""


class ChildProcess:
    """A worker or handler process. All methods are called from the event loop and do not block."""

    def __init__(self, title: str, channel: ControlChannel, on_message: OnMessage, on_exit: OnExit) -> None:
        self.title = title
        self.pid: int | None = None
        """None until the fork server has answered, some milliseconds after the start."""
        self.exited = asyncio.Event()
        self.exit_code: int | None = None
        self._channel = channel
        self._on_message = on_message
        self._on_exit = on_exit
        self._pidfd = -1
        self._kill_asked = False
        channel.setblocking(False)
        asyncio.get_running_loop().add_reader(channel.fileno(), self._readable)

    def send(self, message: ControlMessage, descriptors: tuple[int, ...] = ()) -> None:
        """Tell it something; where it is gone or does not listen, its exit will tell."""
        if self.exit_code is None:
            try:
                self._channel.send(message, descriptors)
            except OSError:
                self.kill()

    def kill(self) -> None:
        """SIGKILL, now or as soon as it exists. By pidfd: never another process that got the same number."""
        self._kill_asked = True
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens where it does not exist yet, or any more."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass

    def spawned(self, pid: int, pidfd: int) -> None:
        """The fork server has forked it."""
        self.pid = pid
        self._pidfd = pidfd
        if self._kill_asked:
            self.kill()

    def ended(self, exit_code: int) -> None:
        """The fork server has reaped it. What it said last is heard first."""
        if self.exit_code is not None:
            return
        self._readable()
        self.exit_code = exit_code
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        self._channel.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        self.exited.set()
        self._on_exit(exit_code)

    def closed(self) -> None:
        """It says nothing any more; of our own children the fork server tells the rest."""

    def _readable(self) -> None:
        while self.exit_code is None:
            try:
                received = self._channel.receive()
            except BlockingIOError:
                return
            if received is None:
                asyncio.get_running_loop().remove_reader(self._channel.fileno())
                self.closed()
                return
            self._on_message(received[0])


class ForkServer:
    """The fork server process, started again where it dies; its children die with it and are reported as killed."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        """``modules``: what its children need besides, imported once for all of them."""
        self._modules = modules
        self._log = EventLog("fork_server")
        self._children: dict[int, ChildProcess] = {}
        self._numbers = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: ControlChannel | None = None

    def start(self) -> None:
        """Start it; must be called from the main thread, whose end ends it (prctl(2), PR_SET_PDEATHSIG)."""
        self._channel, theirs = ControlChannel.pair()
        with theirs:
            # -P: a module in the working directory must not stand in for one of the library.
            command = [sys.executable, "-P", "-m", "kafkasrcd.workers.fork_server"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid()), *self._modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for the supervisor alone
            )
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._readable)

    @property
    def pid(self) -> int | None:
        """The fork server's own."""
        return None if self._process is None else self._process.pid

    def spawn(self, role: str, title: str, on_message: OnMessage, on_exit: OnExit) -> ChildProcess:
        """A new child of ``role`` worker or handler. Returns at once; messages to it wait in its socket."""
        if self._channel is None:
            raise WorkerBootError("the fork server is not running")
        self._numbers += 1
        number = self._numbers
        ours, theirs = ControlChannel.pair()
        child = ChildProcess(title, ours, on_message, on_exit)
        self._children[number] = child
        with theirs:
            try:
                self._channel.send(Spawn(child=number, role=role, title=title), (theirs.fileno(),))
            except OSError:
                pass  # it has just died: that is heard next, and reports this child as killed
        return child

    def _readable(self) -> None:
        if self._channel is None:
            return
        received = self._channel.receive()
        if received is None:
            self._on_death()
            return
        message, descriptors = received
        if isinstance(message, Spawned):
            child = self._children[message.child]
            child.spawned(message.pid, descriptors[0])
        elif isinstance(message, Exited):
            self._children.pop(message.child).ended(message.exit_code)

    def _on_death(self) -> None:
        """It was killed, and the kernel has killed its children. Start it again, then tell of the children's end."""
        self._detach()
        self._log.error("fork_server_died", "the fork server died, and every worker and handler with it; all restart")
        self.start()
        children, self._children = list(self._children.values()), {}
        for child in children:
            child.ended(-signal.SIGKILL)

    def stop(self) -> None:
        """End it and what is left of its children. Blocks for some milliseconds."""
        self._children.clear()
        self._detach()

    def _detach(self) -> None:
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
