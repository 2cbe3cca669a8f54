"""The control socket: a request a line, an answer a line, both JSON.

``{"command": "status"}`` answers with the Status; ``{"command": "stop"}`` with ``{"stopping": true}``, and the
connection closes when the daemon ends. Anything else answers with ``{"error": …}``.
"""

import asyncio
import contextlib
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from kafkasrcd.daemon.status import Status
from kafkasrcd.errors import ConfigurationError

_MOST_BYTES: Final = 64 * 1024
_MOST_CONNECTIONS: Final = 100
"""Far above the few people and monitors that ask; the supervisor's descriptors are for partitions."""
_IDLE_SECONDS: Final = 60.0
"""A connection that asks nothing for so long is closed, so that forgotten ones do not keep others out."""
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED
_SO_PEERGROUPS: Final = 59  # asm-generic/socket.h; Python has no name for it
_GROUPS_BYTES: Final = 1024
"""The most that Python's getsockopt takes: 256 groups."""


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a client may ask."""

    command: str


class ControlServer:
    """Serves the socket at ``path``, mode 0660, to root, this user and members of this group."""

    def __init__(self, path: Path, status: Callable[[], Status], stop: Callable[[], None]) -> None:
        self._path = path
        self._status = status
        self._stop = stop
        self._lock = -1
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen; raises ConfigurationError where another daemon does, or the path cannot be used."""
        try:
            self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            if self._path.parent.stat().st_uid not in (0, os.geteuid()):
                raise ConfigurationError(
                    f"{self._path.parent} belongs to another user, who could replace the control socket in it: set "
                    "supervisor.runtime_directory"
                )
            self._take_lock()
            # Under the lock, a socket that lies here is a killed daemon's.
            if self._path.exists() and not stat.S_ISSOCK(self._path.stat().st_mode):
                raise ConfigurationError(
                    f"{self._path} is no socket and is left alone: set supervisor.control_socket to another path"
                )
            self._path.unlink(missing_ok=True)
            mask = os.umask(0o117)  # 0660 from the first moment
            try:
                self._server = await asyncio.start_unix_server(self._serve, self._path, limit=_MOST_BYTES)
            finally:
                os.umask(mask)
        except OSError as error:
            raise ConfigurationError(
                f"the control socket {self._path} cannot be made ({error.strerror or error}): set "
                "supervisor.control_socket to a short path that this user can write"
            ) from error

    async def stop(self) -> None:
        """Close the socket and every connection. A no-op where ``start`` failed: what is there is another's."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        for writer in self._connections:
            writer.close()
        if self._lock >= 0:
            os.close(self._lock)

    def _take_lock(self) -> None:
        """Locked for the life of this process: of two daemons that start at once, one has the path to itself.

        The file stays: to remove it would let a third lock a new one beside a second that waits for the old.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(self._path.with_name(self._path.name + ".lock"), flags, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another kafkasrcd listens at {self._path}: stop it, or set supervisor.control_socket"
            ) from None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= _MOST_CONNECTIONS:
            writer.write(_line({"error": f"{_MOST_CONNECTIONS} others are connected already"}))
            writer.close()
            return
        self._connections.add(writer)
        try:
            await self._converse(reader, writer)
        except ValueError:
            writer.write(_line({"error": f"a line of more than {_MOST_BYTES} bytes is no request"}))
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # the peer is gone, or silent, or this process ends
        self._connections.discard(writer)
        writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not _may_ask(writer.get_extra_info("socket")):
            writer.write(_line({"error": "only root, the daemon's user and its group may ask"}))
            return
        stopping = False
        while True:
            # Who has asked for the stop waits for the end, and need not say more.
            async with asyncio.timeout(None if stopping else _IDLE_SECONDS):
                line = await reader.readline()
                if not line:
                    return
                stops, answer = self._answer(line)
                stopping = stopping or stops
                writer.write(answer)
                await writer.drain()

    def _answer(self, line: bytes) -> tuple[bool, bytes]:
        try:
            request = msgspec.json.decode(line, type=Request)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return False, _line({"error": f"not a request: {error}"})
        if request.command == "status":
            return False, _line(self._status())
        if request.command == "stop":
            self._stop()
            return True, _line({"stopping": True})
        return False, _line({"error": f"unknown command {request.command!r}; known are status, stop"})


def _line(answer: object) -> bytes:
    return msgspec.json.encode(answer) + b"\n"


def _may_ask(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, uid, gid = _PEER_CREDENTIALS.unpack(credentials)
    return uid in (0, os.geteuid()) or os.getegid() in (gid, *_supplementary_groups(connection))


def _supplementary_groups(connection: socket.socket) -> tuple[int, ...]:
    """The peer's when it connected; a person is a member of the daemon's group by one of these."""
    with contextlib.suppress(OSError):  # no such option before Linux 4.13, or more groups than that
        groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        return struct.unpack(f"{len(groups) // 4}I", groups)
    return ()
