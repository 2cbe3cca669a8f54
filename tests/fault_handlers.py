"""Handlers that go wrong, for tests/test_faults.py. What each does is in the record: {"do": "raise"} and the like."""

import ctypes
import os
import resource
import sys
import time
from typing import Any

from kafkasrcd import Message
from tests import ledger


def obey(message: Message[Any]) -> None:
    """Do what the record says, then write it down."""
    match message.payload:
        case {"do": "raise"}:
            raise ValueError("told to")
        case {"do": "exit"}:
            os._exit(7)
        case {"do": "segfault"}:
            ctypes.string_at(0)
        case {"do": "sys.exit"}:
            sys.exit(3)
        case {"do": "loop"}:
            while True:
                pass
        case {"do": "recurse"}:
            _recurse_in_c()
        case {"do": "memory"}:
            _take_memory()
        case {"do": "sleep", "seconds": seconds}:
            time.sleep(seconds)
        case _:
            pass
    ledger.append(message)


def _recurse_in_c() -> None:
    """Runs out of stack where Python does not count: an iterator around an iterator, many thousand times."""
    nested: Any = ()
    for _ in range(300_000):
        nested = filter(None, nested)
    list(nested)


def _take_memory() -> None:
    """As the kernel ends a process that is out of memory, within a limit of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    try:
        bytearray(2**31)
    except MemoryError:
        os.kill(os.getpid(), 9)


def slow(message: Message[Any]) -> None:
    """A millisecond of waiting each."""
    time.sleep(0.001)
    ledger.append(message)


def batch_that_dies(messages: list[Message[Any]]) -> None:
    """Ends its process for a batch that has a record which says so."""
    if any(message.payload == {"do": "exit"} for message in messages):
        os._exit(7)
    for message in messages:
        ledger.append(message)


def batch(messages: list[Message[Any]]) -> None:
    """Fails for a batch that has a record which says so."""
    if any(message.payload == {"do": "raise"} for message in messages):
        raise ValueError("told to")
    for message in messages:
        ledger.append(message)


async def obey_async(message: Message[Any]) -> None:
    """As ``obey``, without blocking the other partitions of this process."""
    import asyncio

    if "seconds" in message.payload:
        await asyncio.sleep(message.payload["seconds"])
    ledger.append(message)
