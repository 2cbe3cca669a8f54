"""Handlers that write down what they were given, for tests/test_formats_daemon.py; and a format of their own."""

import os
import signal
import time
from typing import Any, NamedTuple

from kafkasrcd import Deserializer, Message


def keep(message: Message[Any]) -> None:
    """Write the record down, as Python would show it; raise where it says so."""
    if message.payload == {"name": "raise"}:
        raise ValueError("told to")
    line = (message.topic, message.partition, message.offset, message.key, message.payload, message.headers.items_all())
    path = os.path.join(os.environ["LEDGER_FOLDER"], f"kept-{os.getpid()}")
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    os.write(descriptor, f"{line!r}\n".encode())
    os.close(descriptor)


def keep_numbers(message: Message[int]) -> None:
    """As ``keep``, of whole numbers."""
    keep(message)


class Kept(NamedTuple):
    """What was written down of a record."""

    topic: str
    partition: int
    offset: int
    key: Any
    payload: Any
    headers: tuple[tuple[str, bytes | None], ...]


class Deadly(Deserializer[str]):
    """A format whose deserializer ends its process for some values."""

    def prepare(self, raw: bytes) -> bytes:
        if raw == b"deadly":
            os.kill(os.getpid(), signal.SIGSEGV)
        return raw.upper()

    def build(self, prepared: bytes) -> str:
        return prepared.decode()


class Hanging(Deserializer[str]):
    """A format whose deserializer never ends for one value, and takes its time for another."""

    def prepare(self, raw: bytes) -> bytes:
        if raw == b"hang":
            while True:
                pass
        if raw == b"slow":
            time.sleep(2.5)
        return raw.upper()

    def build(self, prepared: bytes) -> str:
        return prepared.decode()
