"""Talking to a running daemon over its control socket."""

import contextlib
import os
import select
import socket
import struct
import time
from pathlib import Path
from typing import Final

import msgspec

from kafkasrcd.daemon.status import Status
from kafkasrcd.errors import KafkasrcdError, NotRunning

_ANSWER_SECONDS: Final = 10.0
"""The daemon's loop answers within a turn, 0.1 s; this is for a machine under stress."""
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


class ControlClient:
    """One connection. Raises NotRunning where there is no daemon, KafkasrcdError where it does not answer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_ANSWER_SECONDS)
        try:
            self._connect()
        except PermissionError as error:
            self._socket.close()
            raise KafkasrcdError(f"{path} may only be used by root, the daemon's user and its group") from error
        except BlockingIOError as error:
            self._socket.close()
            raise KafkasrcdError(f"the daemon at {path} does not answer: others are waiting for it already") from error
        except OSError as error:
            self._socket.close()
            raise NotRunning(f"not running: no daemon listens at {path}") from error
        self._lines = self._socket.makefile("rb")
        self._pidfd = self._open_pidfd()

    def status(self) -> Status:
        """The daemon's status, now."""
        return msgspec.json.decode(self.status_json(), type=Status)

    def status_json(self) -> bytes:
        """The same as the daemon sent it, one line."""
        return self._ask("status")

    def stop(self) -> None:
        """Tell it to stop; it goes on draining."""
        self._ask("stop")

    def wait_ended(self, seconds: float | None) -> bool:
        """After ``stop``: until the daemon's process is gone; False where that takes longer than ``seconds``."""
        deadline = None if seconds is None else time.monotonic() + seconds
        self._socket.settimeout(seconds)
        try:
            while self._lines.readline():
                pass
        except TimeoutError:
            return False
        except OSError:
            pass  # reset: it has ended
        if self._pidfd is None:
            return True
        # It closes its connections a little before its end.
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return bool(select.select([self._pidfd], [], [], left)[0])

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _connect(self) -> None:
        """Where more connections wait to be accepted than the socket holds, the kernel does not wait: we do."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while True:
            try:
                self._socket.connect(str(self._path))
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def _open_pidfd(self) -> int | None:
        """The daemon's process; None where it has ended, or is in another PID namespace."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        pid, _, _ = _PEER_CREDENTIALS.unpack(credentials)
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid) if pid else None
        return None

    def _ask(self, command: str) -> bytes:
        try:
            with contextlib.suppress(BrokenPipeError):  # it has said why it hung up, and that is read next
                self._socket.sendall(msgspec.json.encode({"command": command}) + b"\n")
            answer = self._lines.readline()
        except OSError as error:
            raise KafkasrcdError(f"the daemon at {self._path} does not answer: {error}") from error
        if not answer:
            raise NotRunning(f"not running: the daemon at {self._path} has just ended")
        if answer.startswith(b'{"error"'):
            raise KafkasrcdError(msgspec.json.decode(answer)["error"])
        return answer
