"""Handlers for tests/test_pauses.py."""

import time
from typing import Any

from sqlalchemy import Connection

from kafkasrcd import Message
from tests import ledger


def append_with_effects(message: Message[Any], tx: Connection) -> None:
    """As ``on_checkpoint`` calls it; what is written down is every call, and not only those that were committed."""
    ledger.append(message)


async def append_async(message: Message[Any]) -> None:
    """Many in hand."""
    ledger.append(message)


def refuse(message: Message[Any]) -> None:
    """{"bad": true} is one for the dead letters."""
    if message.payload.get("bad"):
        time.sleep(0.005)  # so that a supervisor that looks in each turn of its loop sees some of them, and not all
        raise ValueError("told to")
    ledger.append(message)
