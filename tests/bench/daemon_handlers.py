"""The handlers of kafkasrcd's rows: what the raw loops do with a record, as functions."""

import asyncio
import os
import struct
import time
from typing import Any

from kafkasrcd import Message
from tests.bench.paced_producer import PacedRecord
from tests.bench.spin import spin

SPIN_VARIABLE = "BENCH_SPIN_ITERATIONS"
WAIT_VARIABLE = "BENCH_WAIT_MS"
LATENCY_VARIABLE = "BENCH_LATENCY_DIRECTORY"

_iterations = int(os.environ.get(SPIN_VARIABLE, "0"))
_wait_seconds = int(os.environ.get(WAIT_VARIABLE, "0")) / 1000
_latencies = -1
_noted: set[int] = set()
LATENCY = struct.Struct("<qd")
"""A record's number and its latency in ms, as ``measure_latency`` writes them, one file a process."""


def no_op(message: Message[Any]) -> None:
    """Nothing, with the whole envelope and the decoded payload in hand."""


def commit_each(message: Message[Any]) -> None:
    """Nothing, and its commit."""
    message.commit()


async def wait(message: Message[Any]) -> None:
    """As for an answer of some service."""
    await asyncio.sleep(_wait_seconds)


def wait_in_thread(message: Message[Any]) -> None:
    """The same, holding up its thread."""
    time.sleep(_wait_seconds)


def work(message: Message[Any]) -> None:
    """Pure CPU, as much as the benchmark has calibrated."""
    spin(_iterations)


def note_first(message: Message[Any]) -> None:
    """When each partition's first record was handled."""
    if message.partition not in _noted:
        _noted.add(message.partition)
        path = os.path.join(os.environ[LATENCY_VARIABLE], f"{message.partition}.first")
        with open(path, "w") as file:
            file.write(str(time.time()))


def measure_latency(message: Message[PacedRecord]) -> None:
    """How long since the record was sent."""
    global _latencies
    now_ns = time.monotonic_ns()
    if _latencies < 0:
        path = os.path.join(os.environ[LATENCY_VARIABLE], f"{os.getpid()}.latencies")
        _latencies = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    paced = message.payload
    os.write(_latencies, LATENCY.pack(paced.number, (now_ns - paced.sent_ns) / 1e6))
