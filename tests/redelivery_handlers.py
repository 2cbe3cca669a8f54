"""Handlers that depend on something that is away for a while, for tests/test_redelivery_daemon.py.

The record says on what: {"needs": NAME} fails until the folder of the ledger has a file of that name.
"""

import os
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert

from kafkasrcd import Deserializer, Message
from tests import ledger
from tests.strategy_handlers import effects


def _require(needs: str) -> None:
    if needs and not Path(os.environ["LEDGER_FOLDER"], needs).exists():
        raise ConnectionError(f"{needs} is away")


def handle(message: Message[dict[str, Any]]) -> None:
    """Write it down; end the process, or take some time, where the record says so."""
    _require(message.payload.get("needs", ""))
    if message.payload.get("do") == "exit":
        os._exit(7)
    time.sleep(message.payload.get("seconds", 0))
    ledger.append(message)


async def handle_async(message: Message[dict[str, Any]]) -> None:
    """As ``handle``."""
    handle(message)


def effect(message: Message[dict[str, Any]], tx: Connection) -> None:
    """One row; undone where it fails."""
    tx.execute(insert(effects), {"partition": message.partition, "offset": message.offset})
    handle(message)


def word(message: Message[str]) -> None:
    """As ``handle``, of ``Reversed`` text."""
    _require(message.payload)
    ledger.append(message)


class Reversed(Deserializer[str]):
    """A format with two halves."""

    def prepare(self, raw: bytes) -> bytes:
        return raw[::-1]

    def build(self, prepared: bytes) -> str:
        return prepared.decode()
