"""The handler process: runs the user's function over the records of the partitions bound to it."""

import asyncio
import gc
import sys
from pathlib import Path
from typing import Any

import msgspec

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import Settings
from kafkasrcd.workers import async_runner, event_log, sync_runner
from kafkasrcd.workers.control import ControlChannel, HandlerReady, HandlerRefused, Setup
from kafkasrcd.workers.handler_bindings import HandlerBindings
from kafkasrcd.workers.handler_target import load_targets


def main(channel: ControlChannel) -> int:
    """Serve until told to end; returns the exit code."""
    received = channel.receive()
    if received is None:
        return 0
    setup, descriptors = received
    if not isinstance(setup, Setup):
        raise TypeError(f"a handler process was told {setup!r} first")
    settings = msgspec.json.decode(setup.settings, type=Settings)
    output: Any = sys.stdout
    output.reconfigure(line_buffering=True)  # what a handler prints is seen when it prints it
    event_log.configure(settings.supervisor.log_format, settings.supervisor.log_level)
    try:
        targets = load_targets(settings.handler, Path(setup.base_directory))
    except ConfigurationError as error:
        channel.send(HandlerRefused(str(error)))
        return 78
    channel.send(HandlerReady())
    # What was imported stays: the collector need not walk it again, and its pages stay shared.
    gc.collect()
    gc.freeze()
    bindings = HandlerBindings(settings, targets, channel, descriptors[0])
    if any(target.is_async for target in targets.all()):
        asyncio.run(async_runner.run(bindings))
    else:
        sync_runner.run(bindings)
    return 0
