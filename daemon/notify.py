"""What systemd is told about the daemon (sd_notify(3)), without libsystemd."""

import os
import socket
import time
from collections.abc import MutableMapping

MAX_STATUS_BYTES = 1024
"""systemd drops a whole message above 4096 bytes; a status line is for a person and shorter than this."""


class Notifier:
    """Tells systemd how the service is. Without systemd every call does nothing.

    Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID and removes them from ``environ``, so that no child speaks for
    the service: make it before any child is started. No call blocks or raises; each returns whether systemd was
    given the message, and one that was not may be sent again.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        self._address = _address(environ.pop("NOTIFY_SOCKET", ""))
        self._last_status = ""
        self.watchdog_interval_seconds = _watchdog_interval_seconds(
            environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        )
        """How often to call ``watchdog``: twice within WatchdogSec=, as sd_watchdog_enabled(3) asks. None is never."""
        self._socket = None
        if self._address:
            # Made once: a daemon that has run out of descriptors must still be able to say so.
            kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            try:
                self._socket = socket.socket(socket.AF_UNIX, kind)
            except OSError:
                self._address = ""

    def ready(self) -> bool:
        """The service is up; also ends ``reloading``."""
        return self._send("READY=1")

    def starting(self, within_seconds: float) -> bool:
        """Not up yet, and not stuck: TimeoutStartSec= ends no sooner than ``within_seconds`` from now."""
        return self._send(f"EXTEND_TIMEOUT_USEC={int(within_seconds * 1_000_000)}")

    def reloading(self) -> bool:
        """The configuration is being read again; ``ready`` must follow."""
        return self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, within_seconds: float | None = None) -> bool:
        """The service is shutting down, and ends within ``within_seconds``, also where TimeoutStopSec= is less."""
        if within_seconds is None:
            return self._send("STOPPING=1")
        return self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(within_seconds * 1_000_000)}")

    def status(self, text: str) -> bool:
        """The line that ``systemctl status`` shows. The same text again costs nothing."""
        if text == self._last_status:
            return True
        line = " ".join(text.split()).encode("utf-8", "replace")[:MAX_STATUS_BYTES].decode("utf-8", "ignore")
        sent = self._send(f"STATUS={line}")
        if sent:
            self._last_status = text
        return sent

    def watchdog(self) -> bool:
        """The main loop makes progress. Call it from there and nowhere else, every ``watchdog_interval_seconds``."""
        return self._send("WATCHDOG=1")

    def close(self) -> None:
        """Give back the socket; later calls do nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError:
            # systemd is away or its queue is full. The service is worth more than the message.
            return False
        return True


def _address(notify_socket: str) -> str:
    """The socket's address for Python: ``@name`` is one in the abstract namespace. Others than unix are not spoken."""
    if notify_socket.startswith("@"):
        return "\0" + notify_socket[1:]
    return notify_socket if notify_socket.startswith("/") else ""


def _watchdog_interval_seconds(watchdog_usec: str, watchdog_pid: str) -> float | None:
    try:
        meant_for_us = not watchdog_pid or int(watchdog_pid) == os.getpid()
        limit_seconds = int(watchdog_usec) / 1_000_000
    except ValueError:
        return None
    return limit_seconds / 2 if meant_for_us and limit_seconds > 0 else None
