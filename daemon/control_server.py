"""The control socket: a request a line, an answer a line, both JSON.

``{"command": "status"}`` answers with the Status; ``{"command": "stop"}`` with ``{"stopping": true}``, and the
connection closes when the daemon has ended. Anything else answers with ``{"error": …}``.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from kafkasrcd.daemon.status import Status
from kafkasrcd.errors import ConfigurationError

_MOST_BYTES: Final = 64 * 1024
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a client may ask."""

    command: str


class ControlServer:
    """Serves the socket at ``path``, mode 0660, to root, this user and members of this group."""

    def __init__(self, path: Path, status: Callable[[], Status], stop: Callable[[], None]) -> None:
        self._path = path
        self._status = status
        self._stop = stop
        self._server: asyncio.Server | None = None
        self._waiting: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen; raises ConfigurationError where another daemon does, or the path cannot be used."""
        self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        if self._path.exists():
            if _someone_listens(self._path):
                raise ConfigurationError(
                    f"another kafkasrcd listens at {self._path}: stop it, or set supervisor.control_socket"
                )
            self._path.unlink()
        mask = os.umask(0o117)  # 0660 from the first moment
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=_MOST_BYTES)
        except OSError as error:
            raise ConfigurationError(
                f"the control socket {self._path} cannot be made ({error.strerror or error}): set "
                "supervisor.control_socket to a shorter path, or one this user can write"
            ) from error
        finally:
            os.umask(mask)

    async def stop(self) -> None:
        """Close the socket, and the connections that wait for the end."""
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)
        for writer in self._waiting:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):
            if not _may_ask(writer.get_extra_info("socket")):
                writer.write(_line({"error": "only root, the daemon's user and its group may ask"}))
            else:
                while line := await reader.readline():
                    stopping, answer = self._answer(line)
                    writer.write(answer)
                    await writer.drain()
                    if stopping:
                        self._waiting.add(writer)
                        return
        writer.close()

    def _answer(self, line: bytes) -> tuple[bool, bytes]:
        try:
            request = msgspec.json.decode(line, type=Request)
        except msgspec.DecodeError as error:
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
    return uid in (0, os.geteuid()) or gid == os.getegid()


def _someone_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
